"""The settings in ZooKeeper, by the library kazoo: ZooKeeper speaks a protocol of its own.

A module of its own so that the library is loaded only where it is used. kazoo keeps the session;
what it cannot mend is given up and made anew by the next `read`.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import KazooException, NoAuthError, NoNodeError
from kazoo.handlers.threading import KazooTimeoutError

from agent import tls
from agent.config.kv import ANSWER_TIMEOUT, CONNECT_TIMEOUT, LONGEST_WAIT, Address
from agent.config.stores import Content
from agent.errors import SettingsError, StoreUnavailable

# It logs each try and each failure of its own; ours say the same once, and where.
logging.getLogger("kazoo").setLevel(logging.CRITICAL)


class ZooKeeperStore:
    """One node of ZooKeeper; user and password are a `digest` account."""

    remote = True
    longest_wait = LONGEST_WAIT

    def __init__(self, address: Address) -> None:
        self.where = address.where
        self._address = address
        self._path = f"/{address.key}"
        self._client: KazooClient | None = None
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._closed = False

    def read(self) -> Content:
        """The text of the node."""
        with self._lock:
            try:
                client = self._connected()
                self._news.clear()
                # The watch is set before the text is read: what comes between is seen.
                self._answer(client.exists_async(self._path, watch=self._heard))
                data, stat = self._answer(client.get_async(self._path))
                return Content(data.decode("utf-8"), stat.mzxid)
            except NoNodeError:
                return Content("")
            except UnicodeDecodeError as error:
                raise SettingsError(f"{self.where}: not UTF-8 text: {error}") from error
            except NoAuthError as error:
                raise StoreUnavailable(
                    f"ZooKeeper refuses {self._path} to this account; is USER:PASSWORD@ in the "
                    "URL right?"
                ) from error
            except (KazooException, KazooTimeoutError, OSError) as error:
                self._drop()
                reason = str(error) or type(error).__name__
                raise StoreUnavailable(
                    f"ZooKeeper at {','.join(self._address.endpoints)} cannot be reached: {reason}"
                ) from error

    def watch(self, content: Content, timeout: float) -> None:
        """Wait for the watch that `read` has set, or for the session to break."""
        self._news.wait(timeout)

    def close(self) -> None:
        """End the session and a watch."""
        self._closed = True
        self._news.set()
        if self._lock.acquire(timeout=1.0):
            try:
                self._drop()
            finally:
                self._lock.release()

    @staticmethod
    def _answer(pending: Any) -> Any:
        return pending.get(timeout=ANSWER_TIMEOUT)

    def _heard(self, _: object) -> None:
        """Called by kazoo: the node or the session has changed."""
        self._news.set()

    def _connected(self) -> KazooClient:
        if self._closed:
            raise OSError("it was closed")
        if self._client is None:
            address = self._address
            if trouble := self._trouble_of_tls():
                raise OSError(trouble)
            client = KazooClient(
                hosts=",".join(address.endpoints),
                timeout=ANSWER_TIMEOUT,
                auth_data=[("digest", f"{address.user}:{address.password}")]
                if address.user
                else None,
                use_ssl=address.tls,
                check_hostname=address.tls,
                ca=address.ca or None,
                certfile=address.cert or None,
                keyfile=address.cert_key or None,
            )
            client.add_listener(self._heard)
            try:
                client.start(timeout=ANSWER_TIMEOUT)
            except Exception:  # for Ctrl-C its threads are not waited for: they end with us
                _end(client)
                raise
            self._client = client
        return self._client

    def _trouble_of_tls(self) -> str:
        """Why TLS fails with all of them, which kazoo does not tell: to it, that is a time-out."""
        if not self._address.tls:
            return ""
        said = []
        for endpoint in self._address.endpoints:
            host, _, port = endpoint.rpartition(":")
            client = self._address.client
            why = tls.probe(host.strip("[]"), int(port), client, timeout=CONNECT_TIMEOUT)
            if not why:
                return ""
            said.append(f"{endpoint}: {why}")
        return "; ".join(said)

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            _end(client)


def _end(client: KazooClient) -> None:
    with suppress(KazooException, KazooTimeoutError, OSError):
        client.stop()
        client.close()
