"""TLS to a manager's socket, done here because gRPC's own cannot be used for it.

A manager that has renewed its certificate (on its own after some weeks, or when the CA is rotated)
no longer says "h2" in the handshake until it is restarted, and gRPC's library refuses such a
server. So TLS ends here: gRPC speaks plain HTTP/2 to a relay in this very process. Nobody but this
process can connect to it, and it verifies the manager's certificate against the cluster's CA.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import ssl
import struct
import threading
from contextlib import closing, suppress

from agent.errors import WatchUnavailable

_CHUNK = 65536
_CREDENTIALS = struct.Struct("3i")


class TlsRelay:
    """One connection to a manager, handed on in the clear to one client: this process."""

    def __init__(self, path: str, *, trust_root: str, server_name: str, timeout: float) -> None:
        """Connect, shake hands and listen; the client may then connect to `target`.

        Raises:
            WatchUnavailable: no connection, or a certificate that is not the cluster's.
        """
        try:
            self._tls = _connect(path, trust_root, server_name, timeout)
        except (OSError, ValueError) as error:
            raise WatchUnavailable(f"{path}: {_reason(error)}") from error
        name = f"tidegate-watch-{os.getpid()}-{secrets.token_hex(8)}"
        self.target = f"unix-abstract:{name}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{name}")
        self._listener.listen(1)
        threading.Thread(target=self._run, name="swarm-tls", daemon=True).start()

    def close(self) -> None:
        """End it, from any thread."""
        for end in (self._listener, self._tls):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        with closing(self._tls), suppress(OSError):
            with closing(self._listener):
                client = self._accept()
            with closing(client):
                self._pump(client)

    def _accept(self) -> socket.socket:
        """The first client that is this process; the name has no file whose mode would say so."""
        while True:
            client, _ = self._listener.accept()
            size = _CREDENTIALS.size
            raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            if _CREDENTIALS.unpack(raw)[0] == os.getpid():
                return client
            client.close()

    def _pump(self, client: socket.socket) -> None:
        self._tls.setblocking(False)
        while True:
            readable = select.select([self._tls, client], [], [])[0]
            if client in readable:
                data = client.recv(_CHUNK)
                if not data:
                    return
                self._send(data)
            # Also when only the client spoke: what is decrypted already makes nothing readable.
            with suppress(ssl.SSLWantReadError):
                while data := self._tls.recv(_CHUNK):
                    client.sendall(data)
                return

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._tls.send(rest) :]
            except ssl.SSLWantWriteError:
                select.select([], [self._tls], [])
            except ssl.SSLWantReadError:
                select.select([self._tls], [], [])


def _connect(path: str, trust_root: str, server_name: str, timeout: float) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=trust_root)
    context.set_alpn_protocols(["h2"])
    raw = socket.socket(socket.AF_UNIX)
    try:
        raw.settimeout(timeout)
        raw.connect(path)
        return context.wrap_socket(raw, server_hostname=server_name)
    except BaseException:
        raw.close()
        raise


def _reason(error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"the manager's certificate is not the cluster's: {error.verify_message}"
        case TimeoutError():
            return "no answer in time"
        case PermissionError():
            return "permission denied; the socket belongs to root"
        case ConnectionRefusedError():
            return "nobody listens; mount the directory, not the socket file"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return str(error)
