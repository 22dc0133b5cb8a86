"""One kept HTTP connection to an instance, over TCP, TLS or a unix socket.

Why: a push of one upstream is a millisecond of nginx's work, and what a general HTTP library does
around a request takes longer than that. This does what the admin API needs and nothing else: no
redirects, no proxies or .netrc of the environment (the token goes to the instance alone), no
cookies. It must not know what is said over it.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection, RemoteDisconnected
from urllib.parse import urlsplit

import certifi

from agent.config.settings import OpenResty

CONNECT_TIMEOUT = 3.0
"""Seconds for a connection to stand: an address on a network that we are not on never answers."""


class NotConnected(Exception):
    """No connection stands, so nothing was sent: another address may be tried."""


class NoAnswer(Exception):
    """The request may have arrived, and no answer came."""


class Connection:
    """A connection to `url`, opened when it is needed and anew when the other end has closed it.

    Not thread-safe.

    Args:
        url: `http://`, `https://` or `unix:` and a path.
        settings: TLS.
        verify_name: whether a certificate of an operator's CA must be for the URL's host as well.
    """

    def __init__(self, url: str, settings: OpenResty, *, verify_name: bool) -> None:
        self._url = url
        self._settings = settings
        self._verify_name = verify_name
        self._prefix = "" if url.startswith("unix:") else urlsplit(url).path.rstrip("/")
        self._connection: HTTPConnection | None = None

    def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes]:
        """Status and body of the answer.

        A request whose connection was closed meanwhile is sent again once. So it must be one that
        may be sent twice.

        Args:
            timeout: seconds that the other end may be silent.

        Raises:
            NotConnected, NoAnswer: with a phrase that says why.
        """
        try:
            return self._exchange(method, path, body, headers, timeout)
        except _CLOSED:
            self.close()
        except (HTTPException, OSError) as error:
            raise self._given_up(error, timeout) from error
        try:
            return self._exchange(method, path, body, headers, timeout)
        except (HTTPException, OSError) as error:
            raise self._given_up(error, timeout) from error

    def close(self) -> None:
        """Close it; a later request opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes]:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect(timeout)
        connection.sock.settimeout(timeout)
        connection.request(method, self._prefix + path, body, dict(headers))
        response = connection.getresponse()
        data = response.read()
        if response.will_close:
            self.close()
        return response.status, data

    def _connect(self, timeout: float) -> HTTPConnection:
        limit = min(CONNECT_TIMEOUT, timeout)
        try:
            connection = self._open(limit)
            connection.connect()
        except TimeoutError as error:
            raise NotConnected(f"no connection within {limit:g} s") from error
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
            raise NotConnected(_phrase(error)) from error
        return connection

    def _open(self, timeout: float) -> HTTPConnection:
        if self._url.startswith("unix:"):
            return _UnixConnection(self._url.removeprefix("unix:"), timeout)
        parts = urlsplit(self._url)
        host = parts.hostname or ""
        if parts.scheme != "https":
            return HTTPConnection(host, parts.port, timeout=timeout)
        return HTTPSConnection(host, parts.port, timeout=timeout, context=self._context())

    def _context(self) -> ssl.SSLContext:
        """Made for each connection, since files may have changed."""
        settings = self._settings
        authority = settings.tls_ca or certifi.where()
        try:
            context = ssl.create_default_context(cafile=authority)
        except OSError as error:
            raise NotConnected(f"{authority}: {_phrase(error)}") from error
        # For instances found by address the operator's CA is the proof, not the name.
        context.check_hostname = self._verify_name or not settings.tls_ca
        if settings.tls_cert:
            try:
                context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
            except OSError as error:
                raise NotConnected(f"{settings.tls_cert}: {_phrase(error)}") from error
        return context

    def _given_up(self, error: Exception, timeout: float) -> NoAnswer:
        self.close()
        if isinstance(error, TimeoutError):
            return NoAnswer(f"no answer within {timeout:g} s")
        return NoAnswer(_phrase(error))


_CLOSED = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError, RemoteDisconnected)
"""How a connection looks that the other end closed, as it may while a kept one is idle."""


class _UnixConnection(HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self.sock = sock


def _phrase(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
