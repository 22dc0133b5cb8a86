"""A plain engine: one node of the lab in no swarm, and whom it can be reached by over the network.

For what is about an engine itself: how it is reached, and what becomes of its containers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.lab import machine
from tests.lab.builder import Images, docker_cli, runtime_root
from tests.lab.util import LabError, locked, run, wait_for

T = TypeVar("T")

OTHER_ADDRESS = f"{machine.NODE_NETWORK}.200"
"""Another one of the engine, for which it need not have a certificate."""

ADDRESS_6 = "fd00:198:18::11"
CLIENT_ADDRESS_6 = "fd00:198:18::2"
CONTAINERS_6 = "fd00:198:18:1::/64"

_NEW_NETWORK = 0x40000000


def enter(namespace: str) -> None:
    """Move this thread, and those that it will start, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (machine.NETNS_DIR / namespace).open() as file:
        if libc.setns(file.fileno(), _NEW_NETWORK) != 0:
            code = ctypes.get_errno()
            raise LabError(f"no way into {namespace}: {os.strerror(code)}")


@dataclass(frozen=True)
class PlainEngine:
    """A running engine; `docker` speaks with it over its socket, `url` is for everybody else."""

    name: str
    root: Path
    address: str = machine.node_address(1)

    @property
    def socket(self) -> Path:
        return self.root / "run/docker.sock"

    @property
    def node(self) -> str:
        """Network namespace of the engine."""
        return machine.netns(self.name, "node1")

    @property
    def client(self) -> str:
        """Network namespace of those who reach it over the network."""
        return machine.netns(self.name, "client")

    def docker(self, *arguments: str | Path, check: bool = True) -> str:
        """Run the docker client against it; returns its stdout."""
        return docker_cli(self.socket, *arguments, check=check)

    def seen_from(self, namespace: str, call: Callable[[], T]) -> T:
        """What a call comes to in a network namespace."""
        with ThreadPoolExecutor(1, initializer=enter, initargs=(namespace,)) as pool:
            return pool.submit(call).result()


@contextlib.contextmanager
def plain_engine(name: str, *options: str) -> Iterator[PlainEngine]:
    """An engine with these options of dockerd, and the test backend's image; gone afterwards."""
    root, cgroup = runtime_root() / name, f"/tidegate-lab/{name}"

    def remove() -> None:
        machine.delete_machine(root, cgroup)
        machine.delete_network(name)

    app = Images().ensure()
    with locked(runtime_root() / f"{name}.lock"), contextlib.ExitStack() as stack:
        remove()
        stack.callback(remove)
        root.mkdir(parents=True)
        machine.create_network(name, 1)
        engine = PlainEngine(name, root)
        for namespace, *addresses in (
            (engine.node, f"{OTHER_ADDRESS}/24", f"{ADDRESS_6}/64"),
            (engine.client, f"{CLIENT_ADDRESS_6}/64"),
        ):
            for address in addresses:
                nodad = ["nodad"] if ":" in address else []
                run("ip", "-n", namespace, "address", "add", address, "dev", "eth0", *nodad)
        init = machine.start_machine(root, 1, engine.node)
        machine.start_dockerd(root, init, 1, cgroup, *options)

        def answers() -> bool:
            return bool(engine.docker("version", "--format={{.Server.Version}}"))

        try:
            wait_for(answers, 40, "the engine answers")
        except LabError as error:
            raise LabError(f"{error}\n{machine.tail(root / 'dockerd.log')}") from error
        engine.docker("load", "--quiet", "--input", app)
        yield engine
