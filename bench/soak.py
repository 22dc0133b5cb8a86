"""`make soak`: the whole pair under everything at once for an hour, and what it has grown by.

    python -m bench.soak                    an hour
    python -m bench.soak --seconds 300      shorter; growth is judged by the same bounds

The agent with a static file, nginx with two workers, and all at once: kept connections, new ones,
POSTs whose answers are compared, websockets, TLS; peers that come, drain and go, weights and
policies that change, peers that fail and are ejected, certificates that are renewed. In the first
half there are reloads too, so that what a reload leaks is seen in the master and in new workers; in
the second half there are none, so that what a worker leaks is seen in workers that live.

Three times all traffic rests and is looked at what there is: after a warm-up, after each half.
Exit code 0: nothing failed and nothing has grown; 1: else, with the reasons.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.processes import memory_mb, pss_mb
from demo.pair import ROOT, end_on_signals
from tests.certificates import authority, certificate
from tests.dataplane.harness import Backend, Proxy, free_port, request, wait_until

HOUR = 3600.0
WARM_UP = 0.15
"""Share of the time after which is looked for the first time."""
APPS = 4
POLICIES: tuple[dict[str, str], ...] = (
    {},
    {"interlock.balance_algorithm": "leastconn"},
    {"interlock.balance_algorithm": "ewma"},
    {"interlock.hash_key": "uri", "interlock.hash_balance": "1.25"},
    {"interlock.sticky": "cookie", "interlock.slow_start": "2s"},
    {"interlock.max_conns": "50", "interlock.queue": "50"},
    {"interlock.health_check": "GET /check", "interlock.health_check_interval": "200ms"},
    {"interlock.retry_budget": "20%", "interlock.circuit_error_ratio": "90%"},
    {"interlock.balance_algorithm": "random", "interlock.weight": "3"},
)
LOOKS_INTO_LUA = """
server {{
    listen 127.0.0.1:{port};
    location / {{
        content_by_lua_block {{
            -- Compiled code comes and goes, within LuaJIT's own bounds; a leak is in what is left.
            jit.flush()
            collectgarbage()
            collectgarbage()
            ngx.print(ngx.worker.pid(), " ", collectgarbage("count"))
        }}
    }}
}}
"""
SETTLE = 20.0
"""Seconds after which connections have to be closed and old workers gone, once traffic rests."""


@dataclass(frozen=True)
class Look:
    """What there is while nothing is under way.

    Memory is what belongs to a process alone or since its fork (`Anonymous`), in MiB; `pss_mb` is
    that of master and workers together, shared memory included, as the kernel divides it. `lua_kb`
    is what lives in each worker's Lua, without compiled code.
    """

    seconds: float
    master_mb: float
    workers_mb: list[float]
    lua_kb: list[float]
    agent_mb: float
    pss_mb: float
    master_descriptors: int
    worker_descriptors: int
    agent_descriptors: int
    dict_free_bytes: int
    load_cells: int
    series: int
    reloads: int


@dataclass
class Outcome:
    """What the soak found."""

    seconds: float = 0.0
    answered: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    failures: int = 0
    closed_idle: int = 0
    closed_after: dict[str, int] = field(default_factory=dict)
    happened: dict[str, int] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Traffic:
    """All kinds of clients, in a loop of their own; they never try again.

    But for one case: a kept connection that was closed before a byte of an answer came. A reload
    closes idle connections, and a client cannot know that a moment before it sends. It is counted,
    and the request is sent on a new connection, once.
    """

    def __init__(self, port: int, tls_port: int) -> None:
        self.answered: Counter[str] = Counter()
        self.failed: list[str] = []
        self.failures = 0
        self.closed_idle = 0
        self.closed_after: Counter[str] = Counter()
        self.serials: set[bytes] = set()
        self._port, self._tls_port = port, tls_port
        self._resting = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Sends until the end of the block, and returns when the last answer is there."""
        self._resting.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        try:
            yield
        finally:
            self._resting.set()
            self._thread.join()

    async def _run(self) -> None:
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        jobs: list[Coroutine[object, object, None]] = []
        for number in range(APPS):
            host = f"app{number}.test"
            jobs.append(self._kept("kept", host))
            jobs.append(self._again("new", lambda host=host: self._get(host, "new")))  # type: ignore[misc]
            jobs.append(self._again("post", lambda host=host: self._post(host)))  # type: ignore[misc]
            jobs.append(self._again("websocket", lambda host=host: self._websocket(host)))  # type: ignore[misc]
        jobs.append(self._kept("ejected", "fails.test"))
        jobs.append(self._kept("ejected", "fails.test"))
        jobs.append(self._again("tls", lambda: self._get("tls.test", "tls", tls=tls)))
        jobs.append(self._kept("tls kept", "tls.test", tls=tls))
        await asyncio.gather(*jobs)

    def _fail(self, kind: str, what: object) -> None:
        self.failures += 1
        if len(self.failed) < 20:
            self.failed.append(f"{time.strftime('%H:%M:%S')} {kind}: {what}")

    async def _again(self, kind: str, once: Callable[[], Awaitable[None]]) -> None:
        while not self._resting.is_set():
            try:
                await asyncio.wait_for(once(), 30)
                self.answered[kind] += 1
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self._fail(kind, repr(error))
            await asyncio.sleep(0.02)

    async def _open(
        self, tls: ssl.SSLContext | None = None, host: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self._tls_port if tls else self._port
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=tls, server_hostname=host if tls else None
        )
        if tls:
            self.serials.add(writer.get_extra_info("ssl_object").getpeercert(True)[-64:])
        return reader, writer

    async def _get(self, host: str, kind: str, tls: ssl.SSLContext | None = None) -> None:
        reader, writer = await self._open(tls, host)
        with contextlib.closing(writer):
            writer.write(_head("GET", f"/{kind}", host, "Connection: close\r\n"))
            await _answer(reader)

    async def _post(self, host: str) -> None:
        body = random.randbytes(random.choice((10, 5_000, 200_000)))
        reader, writer = await self._open()
        with contextlib.closing(writer):
            more = f"Connection: close\r\nContent-Length: {len(body)}\r\n"
            writer.write(_head("POST", "/echo", host, more) + body)
            await writer.drain()
            if (await _answer(reader))[0] != body:
                raise ValueError("not the body that was sent")

    async def _kept(self, kind: str, host: str, tls: ssl.SSLContext | None = None) -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        used = 0
        number = 0
        while not self._resting.is_set():
            number += 1
            try:
                if reader is None or writer is None:
                    reader, writer = await self._open(tls, host)
                    used = 0
                writer.write(_head("GET", f"/kept/{number}", host, ""))
                _, closed = await asyncio.wait_for(_answer(reader), 30)
                used += 1
                self.answered[kind] += 1
                if closed:
                    self.closed_after[kind] += 1
                    writer.close()
                    reader = writer = None
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                unanswered = isinstance(error, ConnectionError) or (
                    isinstance(error, asyncio.IncompleteReadError) and not error.partial
                )
                if used and unanswered:
                    self.closed_idle += 1
                else:
                    self._fail(kind, repr(error))
                if writer is not None:
                    writer.close()
                reader = writer = None
                continue
            await asyncio.sleep(0.005)
        if writer is not None:
            writer.close()

    async def _websocket(self, host: str) -> None:
        """A session of three seconds: it outlives whatever happens meanwhile."""
        reader, writer = await self._open()
        with contextlib.closing(writer):
            more = (
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            )
            writer.write(_head("GET", "/ws", host, more))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101 "):
                raise ValueError(head[:60])
            for number in range(15):
                text = b"message %d" % number
                writer.write(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
                if await reader.readexactly(len(text) + 2) != bytes([0x81, len(text)]) + text:
                    raise ValueError("not the message that was sent")
                await asyncio.sleep(0.2)
                if self._resting.is_set():
                    break


def _head(method: str, path: str, host: str, more: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """The body of a 200, and whether the connection will be closed.

    Raises:
        ValueError: it is another status.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    body = await reader.readexactly(length)
    if head[9:12] != b"200":
        raise ValueError(f"status {head[9:12].decode()}")
    return body, b"\r\nconnection: close\r\n" in head


class Scene:
    """What happens to the pair; each method is one event.

    Peers leave as tasks do: they drain, vanish from the file, and only then does the process end.
    """

    def __init__(self, directory: Path, proxy: Proxy, tls_port: int) -> None:
        self.happened: Counter[str] = Counter()
        self.agent: subprocess.Popen[bytes] | None = None
        self._directory = directory
        self._proxy = proxy
        self._tls_port = tls_port
        self._agent_port = free_port()
        self._lua_port = free_port()
        conf = Path(proxy.env["TIDEGATE_CONF_DIR"])
        conf.mkdir(parents=True)
        (conf / "soak.conf").write_text(LOOKS_INTO_LUA.format(port=self._lua_port))
        self._serial = 0
        self._apps = [[self._backend() for _ in range(3)] for _ in range(APPS)]
        self._draining: list[set[str]] = [set() for _ in range(APPS)]
        self._policies: list[dict[str, str]] = [{} for _ in range(APPS)]
        self._failing = [self._backend() for _ in range(3)]
        self._alias = 0
        authority(directory, "ca")
        for name in ("tls", "one", "other"):
            certificate(directory, name, ca="ca", names="DNS:tls.test")

    def _backend(self) -> Backend:
        self._serial += 1
        backend = Backend(f"b{self._serial}")
        backend.listen()
        return backend

    def start(self) -> None:
        """The agent, until it serves."""
        self.write()
        config = self._directory / "agent.toml"
        config.write_text(
            f'ListenAddr = "127.0.0.1:{self._agent_port}"\nSources = ["static"]\n'
            f'StaticFile = "{self._directory}/services.toml"\nSiteQuiet = "50ms"\n'
            f'[[Extensions]]\nName = "nginx"\nPort = {self._proxy.http_port}\n'
            f'SSLPort = {self._tls_port}\nSSLCertPath = "{self._directory}"\n'
            f'[OpenResty]\nURLs = ["http://127.0.0.1:{self._proxy.admin_port}"]\n'
        )
        with (self._directory / "agent.log").open("ab") as log:
            command = [sys.executable, "-m", "agent.cli", "run", "-c", str(config)]
            self.agent = subprocess.Popen(command, cwd=ROOT, stderr=log)
        wait_until(self._serves, timeout=30, what="the pair serves")

    def _serves(self) -> bool:
        hosts = [f"app{number}.test" for number in range(APPS)] + ["fails.test"]
        return all(request(self._proxy.http_port, host=host).status == 200 for host in hosts)

    def stop(self) -> None:
        """Ends the agent and the backends."""
        if self.agent is not None:
            self.agent.terminate()
            self.agent.wait(30)
        for backend in [*self._failing, *(one for app in self._apps for one in app)]:
            backend.kill()

    def write(self) -> None:
        """The file that the agent follows, as things are."""
        services = [
            _service(f"app{number}.test", app, self._policies[number], self._draining[number])
            for number, app in enumerate(self._apps)
        ]
        failing = {
            "interlock.eject_failures": "3",
            "interlock.eject_time": "500ms",
            "interlock.eject_max": "1s",
            "interlock.retry_on": "error timeout http_503",
            "interlock.alias_domain": f"alias{self._alias}.test",
        }
        services.append(_service("fails.test", self._failing, failing))
        files = {"interlock.ssl_cert": "tls.pem", "interlock.ssl_cert_key": "tls.key"}
        tls = {"interlock.ssl": "true", **files}
        services.append(_service("tls.test", self._apps[0], tls, self._draining[0]))
        staged = self._directory / "services.new"
        staged.write_text("\n".join(services))
        staged.replace(self._directory / "services.toml")

    def replace_peer(self, number: int) -> None:
        """A rolling update of one task, start first."""
        self._apps[number].append(self._backend())
        self.write()
        self._applied(number)
        leaving = self._apps[number][0]
        self._draining[number] = {leaving.name}
        self.write()
        self._applied(number)
        self._apps[number].remove(leaving)
        self._draining[number] = set()
        self.write()
        self._applied(number)
        wait_until(lambda: not leaving.busy, timeout=30, what="a peer is left")
        leaving.kill()
        self.happened["peers replaced"] += 1

    def _applied(self, number: int) -> None:
        wanted = {
            one.name: "draining" if one.name in self._draining[number] else "up"
            for one in self._apps[number]
        }
        names = [f"app{number}.test/", *(["tls.test/"] if number == 0 else [])]

        def is_there() -> bool:
            found = [self._proxy.admin.live(name) for name in names]
            # "unhealthy" and "ejected" ones are up as far as the agent is concerned.
            return all(
                set(one) == set(wanted)
                and all(
                    one[name] not in ("probing", "up", "draining") or one[name] == state
                    for name, state in wanted.items()
                )
                for one in found
            )

        wait_until(is_there, timeout=30, what=f"peers of app{number}: {wanted}")

    def change_policy(self, number: int) -> None:
        """Another one of the policies."""
        self._policies[number] = random.choice(POLICIES)
        self.write()
        self.happened["policies changed"] += 1

    def fail(self) -> None:
        """One of three peers answers 503 for a while, and is well again."""
        for backend in self._failing:
            backend.status = 200
            backend.requests.clear()
        self._failing[self.happened["peers failed"] % 3].status = 503
        self.happened["peers failed"] += 1

    def renew(self) -> None:
        """Another certificate in the place of the one in use."""
        name = ("one", "other")[self.happened["certificates renewed"] % 2]
        for suffix in (".pem", ".key"):
            new = self._directory / f"tls{suffix}.new"
            new.write_bytes((self._directory / f"{name}{suffix}").read_bytes())
            new.replace(self._directory / f"tls{suffix}")
        self.happened["certificates renewed"] += 1

    def change_site(self) -> None:
        """Another alias of a host, which takes a reload."""
        self._alias = 1 - self._alias
        before = self._reloads()
        self.write()
        wait_until(lambda: self._reloads() > before, timeout=30, what="a reload")
        self.happened["sites changed"] += 1

    def _reloads(self) -> int:
        return int(self._proxy.admin.metrics()["tidegate_site_changes_total"])

    def rest(self, started: float) -> Look:
        """What there is once connections are closed, old workers gone and no peer is failing."""
        for backend in self._failing:
            backend.status = 200
        self._policies = [{} for _ in range(APPS)]
        self.write()
        proxy = self._proxy
        idle = 'tidegate_nginx_connections{state="active"}'

        def quiet() -> bool:
            alone = proxy.admin.metrics()[idle] <= 3  # this one, and the agent's
            return len(proxy.workers()) == 2 and alone and not self._busy()

        wait_until(quiet, timeout=SETTLE, what="connections closed and old workers gone")
        workers = sorted(proxy.workers())
        assert self.agent is not None
        metrics = proxy.admin.metrics()
        return Look(
            seconds=round(time.monotonic() - started, 1),
            master_mb=round(memory_mb(proxy.pid, "Anonymous"), 2),
            workers_mb=[round(memory_mb(pid, "Anonymous"), 2) for pid in workers],
            lua_kb=self._lua_kb(workers),
            agent_mb=round(memory_mb(self.agent.pid, "Anonymous"), 2),
            pss_mb=round(pss_mb([proxy.pid]), 2),
            master_descriptors=_descriptors(proxy.pid),
            worker_descriptors=sum(_descriptors(pid) for pid in workers),
            agent_descriptors=_descriptors(self.agent.pid),
            dict_free_bytes=proxy.admin.status()["dict"]["free_bytes"],
            load_cells=int(metrics["tidegate_load_cells"]),
            series=len(metrics),
            reloads=int(metrics["tidegate_site_changes_total"]),
        )

    def _lua_kb(self, workers: list[int]) -> list[float]:
        found: dict[int, float] = {}

        def all_seen() -> bool:
            pid, kilobytes = request(self._lua_port).text.split()
            found[int(pid)] = round(float(kilobytes), 1)
            return set(found) >= set(workers)

        wait_until(all_seen, what="every worker has answered")
        return [found[pid] for pid in workers]

    def _busy(self) -> bool:
        backends = [*self._failing, *(one for app in self._apps for one in app)]
        return any(one._writers for one in backends)


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _service(
    host: str,
    backends: list[Backend],
    labels: dict[str, str],
    draining: set[str] | frozenset[str] = frozenset(),
) -> str:
    name, _, domain = host.partition(".")
    lines = ["[[service]]", f'name = "{name}"', "[service.labels]"]
    everything = {"interlock.hostname": name, "interlock.domain": domain, **labels}
    lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in everything.items()]
    for one in backends:
        lines += ["[[service.peer]]", f'id = "{one.name}"', 'address = "127.0.0.1"']
        lines += [f"port = {one.port}", *(['state = "draining"'] if one.name in draining else [])]
    return "\n".join(lines)


def play(scene: Scene, until: float, *, reloads: bool, pace: float) -> None:
    """Everything in turn until that moment; `pace` is the time between reloads in seconds."""
    turn, reloaded = 0, time.monotonic()
    while time.monotonic() < until:
        turn += 1
        scene.replace_peer(turn % APPS)
        scene.change_policy(random.randrange(APPS))
        if turn % 3 == 0:
            scene.fail()
        if turn % 4 == 0:
            scene.renew()
        if reloads and time.monotonic() - reloaded > pace:
            scene.change_site()
            reloaded = time.monotonic()
        time.sleep(0.05)


def run(seconds: float, say: Callable[[str], None]) -> Outcome:
    """The soak, for about so many seconds of traffic."""
    outcome, started = Outcome(), time.monotonic()
    warm_up = min(max(WARM_UP * seconds, 3.0), 300.0)
    half = (seconds - warm_up) / 2
    pace = min(max(seconds / 60, 1.0), 10.0)
    tls_port = free_port()
    with tempfile.TemporaryDirectory() as place:
        proxy = Proxy(Path(place) / "nginx")
        scene = Scene(Path(place), proxy, tls_port)
        traffic = Traffic(proxy.http_port, tls_port)
        try:
            proxy.start()
            scene.start()
            for length, reloads in ((warm_up, True), (half, True), (half, False)):
                with traffic.under_way():
                    play(scene, time.monotonic() + length, reloads=reloads, pace=pace)
                outcome.looks.append(scene.rest(started))
                say(f"soak: {outcome.looks[-1]}, {traffic.failures} failed")
            metrics = proxy.admin.metrics()
        finally:
            scene.stop()
            proxy.stop()
        if (errors := proxy.output.count("[error] ")) or "[alert]" in proxy.output:
            lines = [line for line in proxy.output.splitlines() if "[error] " in line]
            ours = [line for line in lines if "tidegate" in line or "lua" in line]
            scene.happened["lines of errors logged"] = errors
            outcome.complaints += ours[:5]
            if "[alert]" in proxy.output:
                outcome.complaints.append("nginx has logged an alert")
    outcome.seconds = round(time.monotonic() - started, 1)
    outcome.answered = dict(traffic.answered)
    outcome.failed, outcome.failures = traffic.failed, traffic.failures
    outcome.closed_idle, outcome.closed_after = traffic.closed_idle, dict(traffic.closed_after)
    scene.happened["peers ejected"] = int(
        metrics.get('tidegate_ejections_total{upstream="fails.test/"}', 0)
    )
    scene.happened["certificates seen"] = len(traffic.serials)
    scene.happened["revisions"] = int(metrics["tidegate_membership_revision"])
    outcome.happened = dict(scene.happened)
    outcome.complaints += judge(outcome)
    return outcome


def judge(outcome: Outcome) -> list[str]:
    """What is wrong: requests that failed, a scene that did not happen, growth."""
    wrong = []
    if outcome.failures:
        wrong.append(f"{outcome.failures} requests failed")
    first, middle, last = outcome.looks
    reloads = middle.reloads - first.reloads
    kept = APPS + 3
    if outcome.closed_idle > kept * (last.reloads + 1):
        wrong.append(f"{outcome.closed_idle} kept connections closed at {last.reloads} reloads")
    for what in ("peers replaced", "policies changed", "certificates renewed", "sites changed"):
        if not outcome.happened.get(what):
            wrong.append(f"{what}: none")
    if not outcome.happened["peers ejected"]:
        wrong.append("no peer was ejected")
    if outcome.happened["certificates seen"] < 2:
        wrong.append("no renewed certificate was served")
    if last.reloads != middle.reloads:
        wrong.append("a reload in the half without")

    def bounded(what: str, before: float, after: float, allowed: float) -> None:
        if after - before > allowed:
            wrong.append(f"{what}: from {before:g} to {after:g}, at most {allowed:g} more")

    # A configuration takes some hundred kB in the master, a Lua state more than a MB: a reload that
    # left either would be far beyond.
    bounded("master MB", first.master_mb, middle.master_mb, 3 + 0.03 * reloads)
    bounded("master MB", middle.master_mb, last.master_mb, 0.5)
    # In the second half workers live, and compile more and more of what they do: some MB.
    bounded("MB of a worker", max(first.workers_mb), max(middle.workers_mb), 5)
    bounded("MB of a worker", max(middle.workers_mb), max(last.workers_mb), 16)
    bounded("kB of a worker's Lua", max(first.lua_kb), max(middle.lua_kb), 250)
    bounded("kB of a worker's Lua", max(middle.lua_kb), max(last.lua_kb), 250)
    bounded("agent MB", first.agent_mb, last.agent_mb, 15)
    for name, allowed in (
        ("master_descriptors", 2),
        ("worker_descriptors", 6),
        ("agent_descriptors", 4),
        ("load_cells", 0),
        ("series", 60),
    ):
        bounded(name.replace("_", " "), getattr(first, name), getattr(last, name), allowed)
    bounded("dict bytes taken", last.dict_free_bytes, first.dict_free_bytes, 16384)
    return wrong


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    end_on_signals()
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Soak the pair.")
    parser.add_argument("--seconds", type=float, default=HOUR, help="of traffic (3600)")
    options = parser.parse_args(arguments)
    outcome = run(options.seconds, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(asdict(outcome), indent=2))
    return 1 if outcome.complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
