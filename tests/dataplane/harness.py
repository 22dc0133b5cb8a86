"""Starts the OpenResty side on loopback, with toy backends and a client for its admin API.

Why: tests, benchmarks and the demo all need the real thing with directories of its own. It goes
through `nginx/entrypoint.sh`, as the image does. Nothing here asserts anything.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "nginx"
ENTRYPOINT = HOME / "entrypoint.sh"
TEST_NGINX = os.environ.get("TIDEGATE_TEST_NGINX", "")
"""Binary to test instead of the one that is installed; empty for that one."""
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

T = TypeVar("T")


_GIVEN: set[int] = set()


def free_port() -> int:
    """A TCP port that nothing listens on, never the same twice.

    It is below those that the kernel gives to outgoing connections, so none of these takes it
    before it is used; and like the proxy it looks at all addresses.
    """
    for port in random.sample(range(15000, 32000), 17000):
        if port in _GIVEN:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        _GIVEN.add(port)
        return port
    raise RuntimeError("no free port")


def wait_until(check: Callable[[], T], *, timeout: float = 10.0, what: str = "condition") -> T:
    """Calls `check` until what it returns is true, and returns that.

    Raises:
        TimeoutError: it has not become true within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s; last: {result!r}")
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def request(
    port: int,
    path: str = "/",
    *,
    host: str = "a.test",
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers={"Host": host, **(headers or {})})
        response = connection.getresponse()
        lower = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, lower, response.read())
    finally:
        connection.close()


class Client:
    """A client that has one connection and keeps it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._connection.connect()
        self._connection.auto_open = 0  # a connection that was closed is not made anew

    def status(self, method: str = "GET", path: str = "/echo", *, body: bytes | None = None) -> int:
        """Status of the answer to one more request.

        Raises:
            ConnectionError: the answer closes the connection.
        """
        self._connection.request(method, path, body=body, headers={"Host": "a.test"})
        response = self._connection.getresponse()
        response.read()
        if response.will_close:
            raise ConnectionError(f"{method} {path} is answered {response.status}, and closed")
        return response.status


class Admin:
    """The admin API, as plain as it is: each call gives the answer, whatever its status."""

    def __init__(self, port: int, *, token: str = "", writer: str = "test") -> None:
        self.port = port
        self.token = token
        self.writer = writer
        self.revision = 0

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        token: str | None = None,
    ) -> Answer:
        """One call; `raw` is sent as it is, `body` as JSON."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        token = self.token if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return request(
            self.port, path, host="admin", method=method, body=data, headers=headers, timeout=60
        )

    def status(self) -> dict[str, Any]:
        """`GET /v1/status`."""
        answer: dict[str, Any] = self.call("GET", "/v1/status").json()
        return answer

    def put(self, upstreams: Mapping[str, object]) -> Answer:
        """Full membership under the next revision."""
        self.revision = max(self.revision, self.status()["revision"]) + 1
        body = {"writer": self.writer, "revision": self.revision, "upstreams": upstreams}
        return self.call("PUT", "/v1/membership", body)

    def patch(
        self, upsert: Mapping[str, object] | None = None, remove: Iterable[str] = ()
    ) -> Answer:
        """Delta on what this client pushed last, under the next revision."""
        base = self.revision
        body = {
            "writer": self.writer,
            "base_revision": base,
            "revision": base + 1,
            "upsert": upsert or {},
            "remove": list(remove),
        }
        answer = self.call("PATCH", "/v1/membership", body)
        if answer.status == 200:
            self.revision = base + 1
        return answer

    def shown(self, upstream: str) -> dict[str, Any]:
        """`GET /v1/membership/UPSTREAM`."""
        path = "/v1/membership/" + upstream.replace("/", "%2F")
        answer: dict[str, Any] = self.call("GET", path).json()
        return answer

    def live(self, upstream: str) -> dict[str, str]:
        """Live state by peer id."""
        return {peer["id"]: peer["live"]["state"] for peer in self.shown(upstream)["peers"]}

    def site(self, files: Mapping[str, str]) -> Answer:
        """Pushes a site, with the hash of its files as generation."""
        return self.call(
            "PUT",
            "/v1/site",
            {"writer": self.writer, "generation": generation_of(files), "files": files},
        )

    def metrics(self) -> dict[str, float]:
        """`GET /metrics`: value by series (`name{labels}`)."""
        text = self.call("GET", "/metrics", token="").text
        lines = (line for line in text.splitlines() if line and not line.startswith("#"))
        return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}


def generation_of(files: Mapping[str, str]) -> str:
    """A generation for `files`."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


class Proxy:
    """One OpenResty side with its own directories and ports.

    Args:
        directory: where its run and state directories go.
        env: further settings of the entry point.
        home: where the entry point and the static configuration are.
    """

    def __init__(
        self,
        directory: Path,
        *,
        workers: int = 2,
        token: str = "",
        env: Mapping[str, str] | None = None,
        home: Path = HOME,
    ) -> None:
        self.directory = directory
        self.home = home
        self.http_port = free_port()
        self.admin_port = free_port()
        self.run_dir = directory / "run"
        self.state_dir = directory / "state"
        self.log = directory / "log"
        self.admin = Admin(self.admin_port, token=token)
        self.env = {
            "TIDEGATE_RUN_DIR": str(self.run_dir),
            "TIDEGATE_STATE_DIR": str(self.state_dir),
            "TIDEGATE_CONF_DIR": str(directory / "conf.d"),
            "TIDEGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "TIDEGATE_ADMIN_TOKEN": token,
            "TIDEGATE_HTTP_PORT": str(self.http_port),
            "TIDEGATE_WORKERS": str(workers),
            "TIDEGATE_NGINX": TEST_NGINX,
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts it without waiting until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", str(self.home / "entrypoint.sh")],
                env={**os.environ, **self.env},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    def start(self, *, timeout: float = 10.0) -> None:
        """Starts it, and returns when its workers answer.

        Raises:
            TimeoutError: they do not within `timeout` seconds.
            RuntimeError: it ended instead; with what it said.
        """
        process = self.launch()

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"entrypoint.sh ended with {process.returncode}: {self.output}")
            try:
                return request(self.admin_port, "/healthz").status == 200
            except OSError:
                return False

        wait_until(answers, timeout=timeout, what="proxy answers")

    @property
    def output(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def pid(self) -> int:
        """Process id of the master."""
        assert self._process is not None
        return self._process.pid

    def workers(self) -> set[int]:
        """Process ids of the workers that live, also of those that are shutting down."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return {int(pid) for pid in path.read_text().split() if _lives(int(pid))}

    def stop(self, *, how: signal.Signals = signal.SIGTERM, timeout: float = 20.0) -> None:
        """Stops it (SIGQUIT: after requests under way) if it runs; `start` starts it again."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            # Its own session: nothing but this nginx is in the group.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout)
            raise
        finally:
            self._process = None


def _lives(pid: int) -> bool:
    """Whether a process is there and is not only waiting for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def site(
    port: int,
    hosts: Mapping[str, Mapping[str, str]],
    *,
    retries: str = "error timeout",
    http: str = "",
    server: str = "",
) -> dict[str, str]:
    """Files of a plain site.

    Args:
        hosts: upstream by location by host name; a location that ends in `!` takes its path off.
        http, server: further directives at these levels.
    """
    retry = "off" if retries == "off" else "on"
    files = {
        "00-default.conf": f"""
proxy_next_upstream {retries};
proxy_connect_timeout 1s;
client_max_body_size 64m;
map $host $tidegate_retry {{ default {retry}; }}
{http}
server {{ listen {port} default_server; server_name _; return 503; }}
"""
    }
    for host, locations in hosts.items():
        blocks = ""
        for path, upstream in locations.items():
            plain = path.removesuffix("!")
            strip = f'set $tidegate_strip "{plain.rstrip("/")}";' if plain != path else ""
            uri = "/" if plain != path else ""
            blocks += f"""
    location {plain} {{
        set $tidegate_upstream "{upstream}";
        {strip}
        include conf.d/proxy.inc;
        proxy_pass http://tidegate{uri};
    }}"""
        files[f"{host.replace('*', '_wildcard')}.conf"] = f"""
server {{
    listen {port};
    server_name {host};
    include conf.d/server.inc;
    {server}
{blocks}
}}
"""
    return files


def upstream(
    *peers: Mapping[str, object], hold: float = 0.0, **policy: object
) -> dict[str, object]:
    """An upstream as it goes over the wire; `policy` are the fields of its policy."""
    return {"policy": {"algorithm": "round_robin"} | policy, "hold": hold, "peers": list(peers)}


def peer(
    port: int,
    *,
    id: str = "",  # noqa: A002 - the API's word
    address: str = "127.0.0.1",
    weight: int = 1,
    state: str = "up",
    backup: bool = False,
) -> dict[str, object]:
    """A peer as it goes over the wire."""
    return {
        "id": id or f"peer-{port}",
        "address": address,
        "port": port,
        "weight": weight,
        "state": state,
        **({"backup": True} if backup else {}),
    }


class _Loop:
    """An asyncio loop in a thread, for all toy backends of a process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


_LOOP = _Loop()


@dataclass(slots=True)
class Seen:
    """A request as a backend got it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    tls: ssl.SSLObject | None = None


@dataclass
class Backend:
    """A toy application: answers with its name.

    Paths: `/sleep/SECONDS` answers late; `/echo` answers with the body; `/reset` reads the request
    and closes without an answer; `/garbage` answers with an invalid header; an `Upgrade: websocket`
    is accepted and each message echoed. `/check` answers with `health`, all else with `status`.

    Attributes:
        delay: seconds before each answer.
        busy: requests it has not answered yet; `busiest`: the most there have been.
    """

    name: str = "backend"
    address: str = "127.0.0.1"
    port: int = 0
    status: int = 200
    health: int = 200
    delay: float = 0.0
    busy: int = 0
    busiest: int = 0
    tls: ssl.SSLContext | None = None
    requests: list[Seen] = field(default_factory=list)
    connections: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def listen(self) -> None:
        """Listens, at the port it had before if any."""
        self._server = _LOOP.run(
            asyncio.start_server(self._serve, self.address, self.port, backlog=1024, ssl=self.tls)
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Closes everything at once, as a killed process does."""

        async def close() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            for writer in list(self._writers):
                writer.transport.abort()

        _LOOP.run(close())

    def drop(self) -> None:
        """Closes its connections, and goes on listening."""

        async def close() -> None:
            for writer in list(self._writers):
                writer.close()

        _LOOP.run(close())

    def peer(self, **more: Any) -> dict[str, object]:
        """This backend as a peer on the wire; its id is its name."""
        return peer(self.port, **{"id": self.name, "address": self.address, **more})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        pairs = (line.split(": ", 1) for line in lines if line)
        headers = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        tls = writer.get_extra_info("ssl_object")
        self.requests.append(Seen(method, path, headers, body, tls))
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        try:
            return await self._answer(method, path, headers, body, reader, writer)
        finally:
            self.busy -= 1

    async def _answer(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        if headers.get("upgrade") == "websocket":
            await self._websocket(headers, reader, writer)
            return False
        if path.startswith("/reset"):
            return False
        if path.startswith("/garbage"):
            writer.write(b"HTTP/1.1 200 OK\r\nX\0Y: z\r\n\r\n")
            await writer.drain()
            return False
        if path.startswith("/sleep/"):
            await asyncio.sleep(float(path.split("/")[2]))
        elif self.delay:
            await asyncio.sleep(self.delay)
        text = body if path.startswith("/echo") else self.name.encode()
        status = self.health if path.startswith("/check") else self.status
        writer.write(
            b"HTTP/1.1 %d Said\r\nX-Backend: %s\r\nContent-Length: %d\r\n\r\n"
            % (status, self.name.encode(), len(text))
            + (b"" if method == "HEAD" else text)
        )
        await writer.drain()
        return True

    @property
    def checks(self) -> list[Seen]:
        """Requests of health checks, which go to `/check`."""
        return [seen for seen in self.requests if seen.path.startswith("/check")]

    @property
    def traffic(self) -> list[Seen]:
        """All other requests."""
        return [seen for seen in self.requests if not seen.path.startswith("/check")]

    async def _websocket(
        self,
        headers: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        key = headers["sec-websocket-key"] + WEBSOCKET_GUID
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        while True:
            start = await reader.readexactly(2)
            length = start[1] & 0x7F
            mask = await reader.readexactly(4)
            data = await reader.readexactly(length)
            if start[0] & 0x0F == 8:
                return
            text = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
            writer.write(bytes([0x81, len(text)]) + text)
            await writer.drain()


@contextlib.contextmanager
def backends(count: int) -> Iterator[list[Backend]]:
    """That many backends, named `b0`, `b1` …"""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Backend(f"b{index}")) for index in range(count)]


class Load:
    """Sends requests from several keep-alive connections until it is stopped; no retries.

    `results` counts statuses, and errors by their class name; `names` counts the backends that
    answered.
    """

    def __init__(
        self,
        port: int,
        path: str = "/",
        *,
        host: str = "a.test",
        connections: int = 8,
        keep_alive: bool = True,
        pause: float = 0.0,
    ) -> None:
        self.results: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self._port = port
        self._head = (
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\n"
            f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
        ).encode()
        self._keep_alive = keep_alive
        self._pause = pause
        self._connections = connections
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    def __enter__(self) -> Self:
        async def start() -> None:
            self._tasks = [asyncio.create_task(self._run()) for _ in range(self._connections)]

        _LOOP.run(start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops after the requests under way."""

        async def join() -> None:
            await asyncio.gather(*self._tasks)

        self._stopped = True
        _LOOP.run(join())

    @property
    def total(self) -> int:
        """Requests ended so far."""
        return sum(self.results.values())

    @property
    def failed(self) -> dict[str, int]:
        """All that was no 200."""
        return {what: count for what, count in self.results.items() if what != "200"}

    async def _run(self) -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        while not self._stopped:
            try:
                if reader is None or writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(self._head)
                head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).lower()
                length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                self.results[head[9:12].decode()] += 1
                name = head.partition(b"x-backend: ")[2].partition(b"\r\n")[0].decode()
                if name:
                    self.names[name] += 1
                closed = not self._keep_alive or b"connection: close" in head
            except (OSError, EOFError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.results[type(error).__name__] += 1
                closed = True
            if closed and writer is not None:
                writer.close()
                reader = writer = None
            if self._pause:
                await asyncio.sleep(self._pause)
        if writer is not None:
            writer.close()


def nginx_has_stream_lua() -> bool:
    """Whether the nginx that is tested has Lua in its stream part."""
    binary = TEST_NGINX or (
        "/usr/local/openresty/bin/openresty"
        if Path("/usr/local/openresty/bin/openresty").exists()
        else shutil.which("openresty") or shutil.which("nginx") or ""
    )
    if not binary:
        return False
    built = subprocess.run([binary, "-V"], capture_output=True, text=True, timeout=30).stderr
    return "stream_lua" in built or "stream-lua-nginx-module" in built


def nginx_is_installed() -> bool:
    """Whether this machine has nginx with Lua, or OpenResty."""
    return bool(
        TEST_NGINX
        or shutil.which("openresty")
        or Path("/usr/local/openresty/bin/openresty").exists()
        or Path("/usr/lib/nginx/modules/ngx_http_lua_module.so").exists()
    )
