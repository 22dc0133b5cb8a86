"""What a benchmark asks of every proxy alike: start, change peers, change hosts, stop.

Each driver makes its proxy's own change in the way its documentation recommends, and returns when
the proxy has acknowledged it, or, where it acknowledges nothing, when it has been told. Drivers
must not measure anything, and must not make up for what their proxy lacks.
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from demo.pair import Process, probe

START_SECONDS = 180.0


class BenchError(Exception):
    """A measurement that is void: a proxy or backend did not do what the figure would claim."""


@dataclass(frozen=True)
class Peer:
    """A backend on 127.0.0.1."""

    id: str
    port: int


@dataclass(frozen=True)
class Certificate:
    """Files in PEM; `bundle` is both in one, as HAProxy wants it."""

    certificate: Path
    key: Path
    bundle: Path


Routes = Mapping[str, tuple[Peer, ...]]
"""Peers by host name."""


@dataclass(frozen=True)
class Setup:
    """What a proxy is started with.

    Attributes:
        directory: for its files; the caller's, and only this proxy's.
        workers: worker processes or threads that it may use.
        retries: whether it tries a failed request on another peer; None for its own default.
        tls: it serves HTTPS too, on a port of its own.
    """

    directory: Path
    routes: Routes
    workers: int = 2
    retries: bool | None = None
    tls: Certificate | None = None


class Proxy(abc.ABC):
    """A proxy. `start` comes first, once; `stop` is safe at any time."""

    name: ClassVar[str]
    """As tables have it."""
    key: ClassVar[str]
    """For file names and the command line."""
    retries_by_default: ClassVar[bool]
    how: ClassVar[str]
    """How it changes its peers, in a few words."""
    bulk_limit: ClassVar[int] = 10_000
    """More upstreams than this take it more time than a benchmark has."""
    same_configuration_as: ClassVar[str] = ""
    """Name of another proxy that is configured alike, but for what `how` says."""
    long_wait: ClassVar[float] = 0.0
    """Seconds that it may hold a change back on purpose."""

    def __init__(self) -> None:
        self.port = 0
        self.tls_port = 0
        self.admin_port = 0
        self.processes: list[Process] = []
        self.routes: dict[str, tuple[Peer, ...]] = {}
        self._setup: Setup | None = None

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str:
        """Why it cannot be run on this machine, and what to do about it; empty if it can."""

    @classmethod
    @abc.abstractmethod
    def version(cls) -> str:
        """Of the program, as it tells it."""

    @abc.abstractmethod
    def configuration(self) -> str:
        """What it is (or would be) configured with, for people to judge whether that is fair."""

    @abc.abstractmethod
    def _start(self) -> None:
        """Start the processes."""

    @abc.abstractmethod
    def _change(self, host: str, add: Sequence[Peer], remove: Sequence[Peer]) -> None:
        """Make the change that `self.routes` has already; returns when acknowledged."""

    @abc.abstractmethod
    def _reload(self) -> None:
        """Serve the hosts of `self.routes`; returns when acknowledged."""

    @property
    def setup(self) -> Setup:
        """What it was prepared with."""
        assert self._setup is not None, "not prepared"
        return self._setup

    @property
    def retries(self) -> bool:
        """Whether failed requests are tried on another peer."""
        wanted = self.setup.retries
        return self.retries_by_default if wanted is None else wanted

    def prepare(self, setup: Setup) -> None:
        """Take the setup and choose ports, but start nothing."""
        self._setup = setup
        self.routes = dict(setup.routes)
        self.port = free_port()
        self.tls_port = free_port() if setup.tls is not None else 0
        self.admin_port = free_port()

    def start(self, setup: Setup) -> None:
        """Start it; returns when the first and the last of its hosts answer.

        Raises:
            DemoError, BenchError: it does not start, or does not serve.
        """
        self.prepare(setup)
        self._start()
        hosts = self.served_hosts()
        for host in {hosts[0], hosts[-1]}:
            self.await_host(host)

    def served_hosts(self) -> list[str]:
        """The hosts of its routes that clients can reach."""
        return list(self.routes)

    def await_host(self, host: str) -> None:
        """Wait until `host` is answered with 200."""
        self.wait_for(lambda: self.answers(host), f"{host} to answer")

    def answers(self, host: str) -> bool:
        """Whether one request for `host`, on a new connection, is answered 200."""
        return probe(self.port, host).status == 200

    def change(self, host: str, *, add: Sequence[Peer] = (), remove: Sequence[Peer] = ()) -> None:
        """Add and remove peers of a host in one go."""
        gone = {peer.id for peer in remove}
        kept = tuple(peer for peer in self.routes[host] if peer.id not in gone)
        self.routes[host] = (*kept, *add)
        self._change(host, add, remove)

    def reload(self, routes: Routes) -> None:
        """Serve these hosts, which are not those of before."""
        self.routes = dict(routes)
        self._reload()

    def roots(self) -> list[int]:
        """Pids of its processes; all below them are its own too."""
        return [process.popen.pid for process in self.processes]

    def stop(self) -> None:
        """End all that was started."""
        for process in self.processes:
            process.stop()
        self.processes = []

    def check(self) -> None:
        """Raises DemoError if a process has ended."""
        for process in self.processes:
            process.check()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition`, for some minutes: a hundred thousand peers take their time."""
        end = time.monotonic() + START_SECONDS
        while not condition():
            self.check()
            if time.monotonic() > end:
                raise BenchError(f"{self.name}: waited {START_SECONDS:.0f} s for {what}")
            time.sleep(0.02)

    def launch(self, command: list[str], *, env: Mapping[str, str] | None = None) -> Process:
        """Start one process of the proxy's, with its log in the setup's directory."""
        log = self.setup.directory / f"{self.key}.log"
        process = Process(self.name, command, log=log, env=env)
        self.processes.append(process)
        return process


_GIVEN: set[int] = set()


def free_port() -> int:
    """A free TCP port, never the same twice, below those that outgoing connections get."""
    for port in random.sample(range(15000, 32000), 17000):
        if port in _GIVEN:
            continue
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("0.0.0.0", port))
            _GIVEN.add(port)
            return port
    raise BenchError("no free TCP port")


def find_program(name: str) -> str:
    """Path of a program, also of one that pip has put beside this Python; empty if not there."""
    places = [
        sysconfig.get_path("scripts"),
        str(Path(sys.executable).parent),
        os.environ.get("PATH", ""),
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    ]
    return shutil.which(name, path=os.pathsep.join(places)) or ""


def call(
    port: int, method: str, path: str, body: object, *, connection: list[http.client.HTTPConnection]
) -> None:
    """A JSON call to an admin API on loopback, over a connection that is kept in `connection`.

    Raises:
        BenchError: it was refused, with what the API says.
    """
    if not connection:
        connection.append(http.client.HTTPConnection("127.0.0.1", port, timeout=60))
    data = json.dumps(body, separators=(",", ":"))
    try:
        connection[0].request(method, path, data, {"Content-Type": "application/json"})
        answer = connection[0].getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        connection.pop().close()
        raise BenchError(f"{method} {path}: {error!r}") from error
    if answer.status >= 300:
        raise BenchError(f"{method} {path}: {answer.status} {text[:300]!r}")
