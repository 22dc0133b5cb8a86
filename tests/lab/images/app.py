"""A small HTTP/1.1 backend that can start late, stop well or badly, and hold requests.

Standard library only, and one asyncio thread: what is in flight and what is idle is known exactly
at the moment of SIGTERM, so "graceful" has no race of its own that a test could mistake for a
fault of the proxy.

Settings, all from the environment:

=============  ===============================================================================
LISTEN         port, or address:port (default 8080 on all IPv4 addresses)
VERSION        reported in every answer (default "0")
START_DELAY    seconds between the start of the process and the listening socket (default 0)
STOP_MODE      on SIGTERM: ``graceful`` (default; stop listening, finish what is in flight, close
               idle connections, exit 0), ``abrupt`` (exit at once), ``ignore``
TLS_CERT       with TLS_KEY: serve HTTPS with this certificate chain (file names)
=============  ===============================================================================

Paths: ``/healthz``, ``/slow?ms=N``, ``/status?code=N``, ``/bytes?n=N``, ``/echo``, ``/ws``,
``/sse?ms=N&count=N``; any other path answers with JSON: hostname, version, method, path, query and
the request headers received. Every answer carries ``X-Backend`` (hostname) and ``X-Version``.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import socket
from urllib.parse import parse_qsl

HOSTNAME = socket.gethostname()
VERSION = os.environ.get("VERSION", "0")
MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024
WS_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 404: "Not Found", 429: "Slow Down"}


class BadRequestError(Exception):
    """The peer does not speak HTTP/1.1 as this server knows it."""


class Request:
    """One parsed request; header names are lower case, repeated headers are joined."""

    def __init__(self, head: bytes) -> None:
        try:
            first, *lines = head.decode("latin-1").split("\r\n")
            self.method, target, self.protocol = first.split(" ")
            self.headers: dict[str, str] = {}
            for line in lines:
                name, colon, value = line.partition(":")
                if not colon:
                    raise ValueError(line)
                key = name.lower()
                value = value.strip()
                self.headers[key] = (
                    f"{self.headers[key]}, {value}" if key in self.headers else value
                )
        except ValueError as error:
            raise BadRequestError(str(error)) from error
        self.path, _, self.query = target.partition("?")
        self.args = dict(parse_qsl(self.query))
        self.body = b""
        tokens = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in tokens and (
            self.protocol == "HTTP/1.1" or "keep-alive" in tokens
        )

    def number(self, name: str, default: float) -> float:
        """A numeric query argument, or the default where it is missing or not a number."""
        try:
            return float(self.args[name])
        except (KeyError, ValueError):
            return default


class Server:
    """The listener and its connections, each known as idle or busy."""

    def __init__(self) -> None:
        self.connections: dict[asyncio.Task[None], Connection] = {}
        self.stopping = asyncio.Event()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Known from the moment it is accepted, so that a shutdown cannot overlook it."""
        connection = Connection(self, reader, writer)
        task = asyncio.get_running_loop().create_task(self.serve(connection))
        self.connections[task] = connection
        task.add_done_callback(self.connections.pop)

    async def serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except (BadRequestError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            connection.writer.close()

    async def drain(self) -> None:
        """Close what is idle and wait for the rest.

        A request may be on its way at the moment of SIGTERM; it gets the time of a round trip to
        come in, and is then answered with ``Connection: close``.
        """
        await asyncio.sleep(0.05)
        for connection in list(self.connections.values()):
            # What has come in but is not parsed yet is a request too; it has no public name.
            if not connection.busy and not getattr(connection.reader, "_buffer", b""):
                connection.writer.close()
        while self.connections:
            await asyncio.wait(list(self.connections))


class Connection:
    """One client connection, requests in turn (pipelined ones simply wait in the buffer)."""

    def __init__(
        self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.busy = False

    async def run(self) -> None:
        while True:
            self.busy = False
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            self.busy = True
            request = Request(head[:-4])
            await self.read_body(request)
            await self.answer(request)
            if not request.keep_alive:
                return

    async def read_body(self, request: Request) -> None:
        if request.headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in request.headers.get("transfer-encoding", "").lower():
            parts: list[bytes] = []
            total = 0
            while True:
                line = await self.reader.readuntil(b"\r\n")
                try:
                    size = int(line.split(b";")[0], 16)
                except ValueError as error:
                    raise BadRequestError("chunk size") from error
                if size == 0:
                    break
                total += size
                if total > MAX_BODY:
                    raise BadRequestError("body too large")
                parts.append(await self.reader.readexactly(size))
                await self.reader.readexactly(2)
            while await self.reader.readuntil(b"\r\n") != b"\r\n":
                pass
            request.body = b"".join(parts)
            return
        try:
            length = int(request.headers.get("content-length", "0"))
        except ValueError as error:
            raise BadRequestError("content-length") from error
        if not 0 <= length <= MAX_BODY:
            raise BadRequestError("content-length")
        if length:
            request.body = await self.reader.readexactly(length)

    async def answer(self, request: Request) -> None:
        path = request.path
        if path == "/ws" and request.headers.get("upgrade", "").lower() == "websocket":
            await self.websocket(request)
        elif path == "/sse":
            await self.events(request)
        elif path == "/echo":
            kind = request.headers.get("content-type", "application/octet-stream")
            await self.send(request, 200, request.body, kind)
        elif path == "/healthz":
            await self.send(request, 200, b"ok\n", "text/plain")
        elif path == "/bytes":
            await self.send(request, 200, b"x" * int(request.number("n", 1024)), "text/plain")
        elif path == "/status":
            await self.report(request, int(request.number("code", 200)))
        else:
            if path == "/slow":
                await asyncio.sleep(request.number("ms", 1000) / 1000)
            await self.report(request, 200)

    async def report(self, request: Request, status: int) -> None:
        body = json.dumps(
            {
                "hostname": HOSTNAME,
                "version": VERSION,
                "method": request.method,
                "path": request.path,
                "query": request.query,
                "headers": request.headers,
                "body_bytes": len(request.body),
            }
        ).encode()
        await self.send(request, status, body + b"\n", "application/json")

    async def send(self, request: Request, status: int, body: bytes, kind: str) -> None:
        if self.server.stopping.is_set():
            request.keep_alive = False
        if status in (204, 304):
            body = b""
        self.writer.write(
            (
                f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\n"
                f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                f"X-Backend: {HOSTNAME}\r\nX-Version: {VERSION}\r\n"
                f"Connection: {'keep-alive' if request.keep_alive else 'close'}\r\n\r\n"
            ).encode()
            + (b"" if request.method == "HEAD" else body)
        )
        await self.writer.drain()

    async def events(self, request: Request) -> None:
        """Server-sent events until the client leaves, the count is reached or the server stops."""
        request.keep_alive = False
        self.writer.write(
            (
                "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n"
                f"X-Backend: {HOSTNAME}\r\nX-Version: {VERSION}\r\nConnection: close\r\n\r\n"
            ).encode()
        )
        count = int(request.number("count", 0))
        sent = 0
        while not self.server.stopping.is_set() and (not count or sent < count):
            self.writer.write(f"id: {sent}\ndata: {HOSTNAME} {VERSION} {sent}\n\n".encode())
            await self.writer.drain()
            sent += 1
            await self.stop_within(request.number("ms", 1000) / 1000)

    async def stop_within(self, seconds: float) -> None:
        """Sleep, but not past the begin of the shutdown."""
        try:
            await asyncio.wait_for(self.server.stopping.wait(), seconds)
        except TimeoutError:
            return

    async def websocket(self, request: Request) -> None:
        """Echo frames as they come; on shutdown say 1001 (going away), as a good server does."""
        key = request.headers.get("sec-websocket-key", "").encode()
        accept = base64.b64encode(hashlib.sha1(key + WS_GUID).digest()).decode()
        request.keep_alive = False
        self.writer.write(
            (
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Accept: {accept}\r\nX-Backend: {HOSTNAME}\r\n"
                f"X-Version: {VERSION}\r\n\r\n"
            ).encode()
        )
        stopping = asyncio.ensure_future(self.server.stopping.wait())
        try:
            while True:
                frame = asyncio.ensure_future(self.read_frame())
                await asyncio.wait({frame, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not frame.done():
                    frame.cancel()
                    self.send_frame(0x88, (1001).to_bytes(2, "big"))
                    break
                first, payload = frame.result()
                opcode = first & 0x0F
                if opcode == 0x8:
                    self.send_frame(0x88, payload[:2])
                    break
                if opcode == 0x9:
                    self.send_frame(0x8A, payload)
                elif opcode != 0xA:
                    self.send_frame(first, payload)
                await self.writer.drain()
        finally:
            stopping.cancel()

    async def read_frame(self) -> tuple[int, bytes]:
        first, second = await self.reader.readexactly(2)
        length = second & 0x7F
        if length == 126:
            length = int.from_bytes(await self.reader.readexactly(2), "big")
        elif length == 127:
            length = int.from_bytes(await self.reader.readexactly(8), "big")
        if not second & 0x80 or length > MAX_BODY:
            raise BadRequestError("frame not masked, or too long")
        mask = await self.reader.readexactly(4)
        payload = await self.reader.readexactly(length)
        return first, bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))

    def send_frame(self, first: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = bytes((first, size))
        elif size < 1 << 16:
            head = bytes((first, 126)) + size.to_bytes(2, "big")
        else:
            head = bytes((first, 127)) + size.to_bytes(8, "big")
        self.writer.write(head + payload)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = Server()
    mode = os.environ.get("STOP_MODE", "graceful")
    # PID 1 has no default action for SIGTERM, so also "abrupt" needs a handler.
    handlers = {
        "graceful": server.stopping.set,
        "abrupt": lambda: os._exit(143),
        "ignore": lambda: None,
    }
    if mode not in handlers:
        raise SystemExit(f"STOP_MODE must be one of {', '.join(handlers)}, not {mode!r}")
    loop.add_signal_handler(signal.SIGTERM, handlers[mode])
    loop.add_signal_handler(signal.SIGINT, lambda: os._exit(130))

    delay = float(os.environ.get("START_DELAY", "0"))
    if delay:
        try:
            await asyncio.wait_for(server.stopping.wait(), delay)
            return
        except TimeoutError:
            pass
    address, _, port = os.environ.get("LISTEN", "8080").rpartition(":")
    context = None
    if os.environ.get("TLS_CERT"):
        import ssl  # slow to import, and seldom needed

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(os.environ["TLS_CERT"], os.environ.get("TLS_KEY"))
    listener = await asyncio.start_server(
        server.accept, address or "0.0.0.0", int(port), backlog=4096, limit=MAX_HEAD, ssl=context
    )
    print(f"{HOSTNAME} version {VERSION} listens on {address or '*'}:{port}", flush=True)
    await server.stopping.wait()
    listener.close()
    await server.drain()


if __name__ == "__main__":
    asyncio.run(main())
