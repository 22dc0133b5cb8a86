"""A toy backend: answers its name, and ends the way a well-made server ends.

    python demo/backend.py NAME [PORT]

It listens on loopback (port 0, the default: any free one), prints the port and serves HTTP/1.1 with
keep-alive. On SIGTERM it takes no more connections, answers what it has, and exits. It must stay a
single file on the standard library, so that starting fifty of them takes no time.
"""

from __future__ import annotations

import asyncio
import signal
import sys

_HEAD_LIMIT = 65536


class Backend(asyncio.Protocol):
    """One client connection. Requests carry no body worth reading: GET and the like."""

    stopping = False
    connections: set[Backend] = set()  # noqa: RUF012  (shared on purpose: all of this process)

    def __init__(self, name: str) -> None:
        body = f"{name}\n".encode()
        self._head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            f"X-Backend: {name}\r\n"
        ).encode()
        self._body = body
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Known from here on, so that a stop waits for it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Answer each whole request head."""
        assert self._transport is not None
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            close = self.stopping or b"\r\nconnection: close" in head.lower()
            ending = b"Connection: close\r\n\r\n" if close else b"\r\n"
            self._transport.write(self._head + ending + self._body)
            if close:
                self._transport.close()
                return
        if len(self._received) > _HEAD_LIMIT:
            self._transport.abort()

    def close_when_idle(self) -> None:
        """Close unless the rest of a request is still to come."""
        if self._transport is not None and not self._received:
            self._transport.close()


async def serve(name: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(lambda: Backend(name), "127.0.0.1", port, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    server.close()
    Backend.stopping = True
    # What was accepted or sent before the listener closed gets a moment to arrive.
    await asyncio.sleep(0.05)
    for connection in list(Backend.connections):
        connection.close_when_idle()
    while Backend.connections:
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
