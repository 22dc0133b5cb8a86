"""The backends behind the proxies: many that only stand there, or few that come and go."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE

from bench.proxies.base import BenchError, Peer
from bench.proxies.nginx import configuration, program
from demo.pair import Process

_SCRIPT = Path(__file__).with_name("backend_server.py")
_SERVER = """
server {{
    listen 127.0.0.1:{port} backlog=1024;
    root {root};
    add_header X-Backend b{port};
    location / {{ default_type text/plain; return 200 "hello from a backend\\n"; }}
    location = /100k {{ default_type text/plain; }}
}}
"""


class Living:
    """Backends that are started and killed one by one, each a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._count = 0
        self._process = Process(
            "backends",
            [sys.executable, "-I", "-S", str(_SCRIPT)],
            log=directory / "backends.log",
            stdin=PIPE,
            stdout=PIPE,
        )

    def start(self) -> Peer:
        """One more; it listens when this returns."""
        self._count += 1
        name = f"b{self._count}"
        return Peer(name, int(self._say(f"start {name}")))

    def kill(self, peer: Peer) -> None:
        """End it by SIGKILL; it is gone, with its connections, when this returns."""
        self._say(f"kill {peer.id}")

    def stop(self) -> None:
        """End them all."""
        assert self._process.popen.stdin is not None
        self._process.popen.stdin.close()
        self._process.stop()

    @property
    def pid(self) -> int:
        """The parent of them all."""
        return self._process.popen.pid

    def _say(self, line: str) -> str:
        popen = self._process.popen
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdin.write(line + "\n")
        popen.stdin.flush()
        answer = str(popen.stdout.readline()).strip()
        if not answer:
            popen.wait(5)
            self._process.check()
            raise BenchError("the backends do not answer")
        return answer


class Standing:
    """One nginx that listens on many ports, each a backend; `/100k` has 100,000 bytes."""

    def __init__(self, directory: Path, ports: list[int]) -> None:
        root = directory / "root"
        root.mkdir()
        (root / "100k").write_bytes(b"0123456789" * 10_000)
        body = "".join(_SERVER.format(port=port, root=root) for port in ports)
        file = directory / "backends.conf"
        file.write_text(configuration(directory, "backends", body, workers=1))
        self.peers = tuple(Peer(f"b{port}", port) for port in ports)
        self._process = Process(
            "backends",
            [program(), "-p", str(directory), "-c", str(file)],
            log=directory / "backends.out",
        )

    def stop(self) -> None:
        """End it."""
        self._process.stop()

    def check(self) -> None:
        """Raises DemoError if it has ended."""
        self._process.check()

    @property
    def pid(self) -> int:
        """The master."""
        return self._process.popen.pid
