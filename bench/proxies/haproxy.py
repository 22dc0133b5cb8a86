"""HAProxy, Debian's; peers change through its runtime API, hosts by a reload of its master.

`add server` needs `pool-max-conn` and `pool-purge-delay`, which a server of the configuration has
by default: without them a server that was added never has a connection reused.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.proxies.base import BenchError, Peer, Proxy, find_program

_CONFIG = """\
global
    nbthread {workers}
    maxconn 4096
    stats socket {socket} mode 600 level admin expose-fd listeners
    stats timeout 1h
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
    timeout http-keep-alive 60s
    option http-keep-alive
    http-reuse always
    option redispatch 1
    retries {retries}
    retry-on conn-failure empty-response response-timeout
frontend web
    bind 127.0.0.1:{port}
{tls}    option forwardfor
    http-request set-header X-Forwarded-Proto %[ssl_fc,iif(https,http)]
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    use_backend %[req.hdr(host),field(1,:),lower,map({map})]
"""
_BACKEND = """\
backend u{number}
    balance roundrobin
{servers}
"""
_POOL = "pool-max-conn 512 pool-purge-delay 60s"
# A peer that fails a request is out at once, and back when a check of each second reaches it. With
# many peers the checks would be most of what is measured, so there are none.
_CHECKED = 100
_HEALTH = "check inter 1s rise 1 fall 1 observe layer4 error-limit 1 on-error mark-down"


class HAProxy(Proxy):
    """HAProxy with its runtime API."""

    name = "HAProxy"
    key = "haproxy"
    retries_by_default = True
    how = "runtime API: add server, enable, set state maint, del server"

    def __init__(self) -> None:
        super().__init__()
        self._leaving: list[str] = []
        self._names: dict[str, int] = {}
        self._api: socket.socket | None = None

    @classmethod
    def missing(cls) -> str:
        """See the base class."""
        return "" if find_program("haproxy") else "not installed: scripts/install-deps.sh bench"

    @classmethod
    def version(cls) -> str:
        """See the base class."""
        text = subprocess.run(
            [find_program("haproxy"), "-v"], capture_output=True, text=True, check=True
        ).stdout
        return " ".join(text.split()[:3]).removesuffix("-")

    def configuration(self) -> str:
        """The whole haproxy.cfg."""
        setup = self.setup
        secure = (
            f"    bind 127.0.0.1:{self.tls_port} ssl crt {setup.tls.bundle}\n" if setup.tls else ""
        )
        parts = [
            _CONFIG.format(
                workers=setup.workers,
                socket=self._socket,
                retries=3 if self.retries else 0,
                port=self.port,
                tls=secure,
                map=setup.directory / "hosts.map",
            )
        ]
        self._names = {host: number for number, host in enumerate(self.routes)}
        for host, peers in self.routes.items():
            servers = "\n".join(
                f"    server {peer.id} 127.0.0.1:{peer.port} {self._options}" for peer in peers
            )
            parts.append(_BACKEND.format(number=self._names[host], servers=servers))
        return "".join(parts)

    @property
    def _options(self) -> str:
        peers = sum(len(peers) for peers in self.routes.values())
        return f"{_POOL} {_HEALTH}" if peers <= _CHECKED else _POOL

    @property
    def _socket(self) -> Path:
        return self.setup.directory / "haproxy.sock"

    def _write(self) -> Path:
        file = self.setup.directory / "haproxy.cfg"
        file.write_text(self.configuration())
        lines = (f"{host} u{number}" for host, number in self._names.items())
        (self.setup.directory / "hosts.map").write_text("\n".join(lines) + "\n")
        return file

    def _start(self) -> None:
        self.launch([find_program("haproxy"), "-W", "-db", "-f", str(self._write())])

    def stop(self) -> None:
        """See the base class."""
        if self._api is not None:
            self._api.close()
            self._api = None
        super().stop()

    def _change(self, host: str, add: Sequence[Peer], remove: Sequence[Peer]) -> None:
        backend = f"u{self._names[host]}"
        commands = []
        for peer in add:
            server = f"{backend}/{peer.id}"
            commands += [f"add server {server} 127.0.0.1:{peer.port} {self._options}"]
            if _HEALTH in self._options:
                commands.append(f"enable health {server}")
            commands.append(f"enable server {server}")
        for peer in remove:
            commands.append(f"set server {backend}/{peer.id} state maint")
            self._leaving.append(f"{backend}/{peer.id}")
        answers = self._ask(commands)
        faults = [text for text in answers if text and "registered" not in text]
        if faults:
            raise BenchError(f"HAProxy: {'; '.join(faults)}")
        # A server with a connection under way cannot be deleted: it stays in maintenance, which is
        # what counts, and is tried again.
        deleted = self._ask([f"del server {server}" for server in self._leaving])
        self._leaving = [
            server
            for server, text in zip(self._leaving, deleted, strict=True)
            if "deleted" not in text
        ]

    def _ask(self, commands: Sequence[str]) -> list[str]:
        """Commands over one kept connection to the socket, an answer to each."""
        if self._api is None:
            self._api = socket.socket(socket.AF_UNIX)
            self._api.settimeout(10)
            self._api.connect(str(self._socket))
            self._api.sendall(b"prompt\n")
            self._read()
        answers = []
        for command in commands:
            self._api.sendall(command.encode() + b"\n")
            answers.append(self._read())
        return answers

    def _read(self) -> str:
        assert self._api is not None
        data = b""
        while not data.endswith(b"\n> "):
            received = self._api.recv(65536)
            if not received:
                raise BenchError("HAProxy closed its socket")
            data += received
        return data[:-2].decode().strip()

    def _reload(self) -> None:
        self._write()
        self.check()
        if self._api is not None:
            with contextlib.suppress(OSError):
                self._api.close()
            self._api = None
        self._leaving = []
        self.processes[0].popen.send_signal(signal.SIGUSR2)
