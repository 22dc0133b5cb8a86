"""Starts the pair and toy backends on loopback, and takes all of it away again.

The demo and the benchmarks stand on this. It knows how the two sides are started and how to look
at them from outside (admin API, process table); what is done with them is its callers' business.
Everything that was started is ended by its own pid, also when we are told to end; when we are
killed, the kernel tells our children.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_START_SECONDS = 20.0
_STOP_SECONDS = 5.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class DemoError(Exception):
    """The demo cannot go on: says what, where, why, and what to do about it."""


@dataclass(frozen=True)
class Peer:
    """One backend of the static file."""

    name: str
    port: int
    draining: bool = False


@dataclass(frozen=True)
class Service:
    """One service of the static file: `host` is served by `peers`."""

    host: str
    peers: tuple[Peer, ...]


def static_file(services: Iterable[Service]) -> str:
    """The static file that says this (see docs/discovery.md)."""
    lines = []
    for service in services:
        hostname, _, domain = service.host.partition(".")
        lines += [
            "[[service]]",
            f'name = "{hostname}"',
            "[service.labels]",
            f'"interlock.hostname" = "{hostname}"',
            f'"interlock.domain" = "{domain}"',
        ]
        for peer in service.peers:
            state = "draining" if peer.draining else "up"
            lines += [
                "[[service.peer]]",
                f'id = "{peer.name}"',
                'address = "127.0.0.1"',
                f"port = {peer.port}",
                f'state = "{state}"',
            ]
    return "\n".join(lines) + "\n" if lines else "service = []\n"


def choose_port(preferred: int, what: str, say: Callable[[str], None]) -> int:
    """`preferred`, or a free one if that is taken; says so then."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("0.0.0.0", port))
                probe.listen()
                found: int = probe.getsockname()[1]
                if port == 0:
                    say(f"port {preferred} is taken, so {what} gets {found}")
                return found
    raise DemoError(f"no free TCP port for {what}: this machine has run out of them")


class Process:
    """A child with a log file, in a session of its own so that Ctrl-C does not reach it first."""

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        user: pwd.struct_passwd | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> None:
        self.name = name
        self.log = log
        as_user: dict[str, Any] = (
            {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        )
        # Should we be killed, so that nothing can be cleaned up, the child is told to end.
        tether = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                [*tether, *command],
                stdin=stdin,
                stdout=out if stdout is None else stdout,
                stderr=out,
                env={**os.environ, **(env or {})},
                cwd="/" if user else ROOT,
                start_new_session=True,
                text=True,
                **as_user,
            )

    def check(self) -> None:
        """Raises DemoError with the end of the log if it has ended."""
        code = self.popen.poll()
        if code is not None:
            raise DemoError(f"{self.name} has ended with code {code}. Its log says:\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        """The end of the log."""
        with contextlib.suppress(OSError):
            text = self.log.read_text(errors="replace").rstrip().splitlines()[-lines:]
            return "\n".join(f"    {line}" for line in text)
        return "    (no log)"

    def stop(self) -> bool:
        """End it, politely at first; False if it had to be killed."""
        polite = True
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                polite = False
                self.popen.kill()
                self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        return polite


class Backend(Process):
    """A toy backend on a free port."""

    def __init__(self, name: str, *, log: Path) -> None:
        script = Path(__file__).with_name("backend.py")
        # -I -S: it needs the standard library only, and starts in half the time.
        command = [sys.executable, "-I", "-S", str(script), name]
        super().__init__(name, command, log=log, stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            self.popen.wait()
            self.check()
        self.port = int(line)

    @property
    def peer(self) -> Peer:
        """As it stands in the static file."""
        return Peer(self.name, self.port)

    @property
    def draining(self) -> Peer:
        """The same, to take no more new traffic."""
        return Peer(self.name, self.port, draining=True)


@dataclass(frozen=True)
class Answer:
    """What one request on a new connection brought; `backend` is empty if not 200."""

    status: int
    backend: str
    at: float


_BACKEND = re.compile(rb"\r\nx-backend:[ \t]*([^\r\n]*)", re.IGNORECASE)


def probe(port: int, host: str, *, timeout: float = 5.0) -> Answer:
    """One GET over a new connection to 127.0.0.1; status 0 if there was no answer."""
    data = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout) as sock,
    ):
        sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        while received := sock.recv(65536):
            data += received
    at = time.monotonic()
    if not data.startswith(b"HTTP/1.1 "):
        return Answer(0, "", at)
    status = int(data[9:12])
    found = _BACKEND.search(data)
    return Answer(status, found.group(1).decode() if found and status == 200 else "", at)


class Pair:
    """OpenResty (or Debian's nginx with Lua) and the agent, with a static file as the source.

    Args:
        directory: where everything goes; made and removed by the caller.
        say: takes a line for the person who watches.
        extra_settings: TOML put before the tables of the agent's configuration.
        nginx_env: further environment for the OpenResty side.
    """

    def __init__(
        self,
        directory: Path,
        *,
        say: Callable[[str], None],
        extra_settings: str = "",
        extension_settings: str = "",
        nginx_env: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._say = say
        self._extra_settings = extra_settings
        self._extension_settings = extension_settings
        self._nginx_env = dict(nginx_env or {})
        self._user = _unprivileged()
        self._backends: list[Backend] = []
        self.openresty: Process | None = None
        self.agent: Process | None = None
        self.services_file = directory / "services.toml"
        self._token = secrets.token_hex(32)
        self.port = 0
        self.admin_port = 0
        self.agent_port = 0

    # Starting and stopping

    def start(self, services: Iterable[Service]) -> None:
        """Start both sides, serving `services`; back when every host answers 200.

        Raises:
            DemoError: one of them does not start, with the end of its log.
        """
        self.port = choose_port(8000, "traffic", self._say)
        self.admin_port = choose_port(8081, "the admin API", self._say)
        self.agent_port = choose_port(8080, "the agent", self._say)
        services = tuple(services)
        self.write(services)
        self._start_openresty()
        self._start_agent()
        for service in services:
            self.wait_for(
                lambda host=service.host: probe(self.port, host).status == 200,  # type: ignore[misc]
                f"http://{service.host}:{self.port}/ to answer",
            )

    def stop(self) -> None:
        """End everything that this object has started."""
        for process in (self.agent, *self._backends, self.openresty):
            if process is not None:
                process.stop()

    def backend(self, name: str) -> Backend:
        """Start one more toy backend."""
        started = Backend(name, log=self.directory / "backends.log")
        self._backends.append(started)
        return started

    def check(self) -> None:
        """Raises DemoError if one of the two sides has ended."""
        for process in (self.openresty, self.agent):
            if process is not None:
                process.check()

    def _start_openresty(self) -> None:
        home = self.directory / "openresty"
        home.mkdir()
        token = home / "token"
        token.write_text(self._token)
        token.chmod(0o600)
        for name in ("run", "state"):
            (home / name).mkdir()
        source = ROOT / "nginx"
        if self._user is not None:
            # Below /root an unprivileged user cannot read the checkout.
            shutil.copytree(source, home / "nginx")
            source = home / "nginx"
            self.directory.chmod(0o755)
            _give(home, self._user)
        env = {
            "TIDEGATE_RUN_DIR": str(home / "run"),
            "TIDEGATE_STATE_DIR": str(home / "state"),
            "TIDEGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "TIDEGATE_ADMIN_TOKEN_FILE": str(token),
            "TIDEGATE_HTTP_PORT": str(self.port),
            **self._nginx_env,
        }
        self.openresty = Process(
            "OpenResty",
            ["sh", str(source / "entrypoint.sh")],
            log=self.directory / "openresty.log",
            env=env,
            user=self._user,
        )
        self.wait_for(lambda: self._get("/healthz") is not None, "the admin API of OpenResty")

    def _start_agent(self) -> None:
        settings = f"""\
ListenAddr = "127.0.0.1:{self.agent_port}"
Sources = ["static"]
StaticFile = "{self.services_file}"
{self._extra_settings}
[[Extensions]]
Name = "nginx"
Port = {self.port}
SSLPort = 0
{self._extension_settings}
[OpenResty]
URLs = ["http://127.0.0.1:{self.admin_port}"]
Token = "{self._token}"
"""
        config = self.directory / "config.toml"
        config.touch(mode=0o600)
        config.write_text(settings)
        self.agent = Process(
            "the agent",
            [sys.executable, "-m", "agent.cli", "run", "-c", str(config)],
            log=self.directory / "agent.log",
        )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition`; DemoError with both logs when it takes too long."""
        end = time.monotonic() + _START_SECONDS
        while not condition():
            self.check()
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{process.name}, {process.log}:\n{process.tail()}"
                    for process in (self.openresty, self.agent)
                    if process is not None
                )
                raise DemoError(f"waited {_START_SECONDS:.0f} s for {what}. The logs say:\n{logs}")
            time.sleep(0.02)

    # Changing and looking

    def write(self, services: Iterable[Service]) -> float:
        """Replace the static file in one step; returns the monotonic time just after."""
        staged = self.services_file.with_suffix(".new")
        staged.write_text(static_file(services))
        staged.replace(self.services_file)
        return time.monotonic()

    def status(self) -> dict[str, Any]:
        """`GET /v1/status` of the OpenResty side."""
        return self._json("/v1/status")

    def peers(self, host: str) -> dict[str, str]:
        """Peer ids of `host` with the state that OpenResty has them in."""
        upstream = self._json(f"/v1/membership/{host}%2F")
        return {peer["id"]: str(peer["live"]["state"]) for peer in upstream["peers"]}

    def wait_peers(self, host: str, condition: Callable[[dict[str, str]], bool], what: str) -> None:
        """Wait until the peers of `host`, as OpenResty has them, fulfil `condition`."""
        self.wait_for(lambda: condition(self.peers(host)), what)

    def workers(self) -> dict[int, float]:
        """Worker pids, also old ones that finish their work, with their start (s since boot)."""
        return worker_starts(int(self.status()["master_pid"]))

    def _json(self, path: str) -> dict[str, Any]:
        text = self._get(path)
        if text is None:
            self.check()
            raise DemoError(f"the admin API does not answer GET {path}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _get(self, path: str) -> bytes | None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.admin_port}{path}",
            headers={"Authorization": f"Bearer {self._token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                body: bytes = response.read()
                return body
        except (urllib.error.URLError, OSError):
            return None


def worker_starts(master: int) -> dict[int, float]:
    """Children of the nginx master with the time of their start, in seconds since boot."""
    found = {}
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    for pid in children:
        # It may end between the two looks.
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[int(pid)] = int(stat[19]) / _CLOCK_TICKS
    return found


class ReloadWatch:
    """Counts reloads as the process table shows them, however short a worker lives.

    A reload starts a set of workers at one time; the number of such times is the number of reloads.
    """

    _SAMPLE_SECONDS = 0.02
    _ONE_RELOAD_SECONDS = 0.3

    def __init__(self, master: int) -> None:
        self._master = master
        self._before = frozenset(worker_starts(master))
        self._seen: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def count(self) -> int:
        """Stop watching; how many reloads there were."""
        self._stop.set()
        self._thread.join()
        self._look()
        return count_bursts(
            [start for pid, start in self._seen.items() if pid not in self._before],
            within=self._ONE_RELOAD_SECONDS,
        )

    def _run(self) -> None:
        while not self._stop.wait(self._SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        # Gone: then the demo fails anyway, and says why.
        with contextlib.suppress(OSError):
            self._seen.update(worker_starts(self._master))


def count_bursts(times: Iterable[float], *, within: float) -> int:
    """How many groups the times fall into, where each is at most `within` after the one before."""
    count, last = 0, float("-inf")
    for moment in sorted(times):
        if moment - last > within:
            count += 1
        last = moment
    return count


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom to run OpenResty as: ourselves (None) unless we are root."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("nobody")
    return None


def _give(directory: Path, user: pwd.struct_passwd) -> None:
    os.chown(directory, user.pw_uid, user.pw_gid)
    for path in directory.rglob("*"):
        os.chown(path, user.pw_uid, user.pw_gid)


def end_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP unwind the stack, so that everything is cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory below /tmp that is removed if all went well, and kept for its logs if not."""
    path = Path(tempfile.mkdtemp(prefix="tidegate-demo-"))
    try:
        yield path
    except Exception:
        print(f"logs are kept in {path}", file=sys.stderr)
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    else:
        shutil.rmtree(path, ignore_errors=True)
