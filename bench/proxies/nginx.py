"""nginx with a static `upstream` and keep-alive; a change is the file rewritten and a reload.

The same binary as Tidegate's, without Lua. Rewriting and reloading is how Interlock, docker-gen and
nginx-proxy change peers: the signal is sent, and nothing tells when it has taken effect.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.proxies.base import BenchError, Certificate, Peer, Proxy, Routes

_MAIN = """\
daemon off;
{user}worker_processes {workers};
worker_shutdown_timeout 10s;
pid {directory}/{name}.pid;
error_log {directory}/{name}.err error;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    server_tokens off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    server_names_hash_max_size 32768;
    server_names_hash_bucket_size 128;
    client_body_temp_path {directory}/{name}-temp;
    proxy_temp_path {directory}/{name}-temp;
    fastcgi_temp_path {directory}/{name}-temp;
    uwsgi_temp_path {directory}/{name}-temp;
    scgi_temp_path {directory}/{name}-temp;
{body}
}}
"""
HEADERS = """\
    proxy_http_version 1.1;
    proxy_set_header Host $http_host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $http_host;
    proxy_set_header X-Forwarded-Port $server_port;
    proxy_set_header X-Request-ID "bench-$connection-$connection_requests";
    proxy_set_header Connection "";
    proxy_buffers 16 16k;
"""
_HOST = """
    upstream u{number} {{
        {servers}
        keepalive {keepalive};
        keepalive_requests 100000;
    }}
    server {{
        listen 127.0.0.1:{port};
{tls}        server_name {host};
        location / {{ proxy_pass http://u{number}; }}
    }}
"""
_TLS = """\
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
"""


def program() -> str:
    """The nginx binary, OpenResty's first.

    Raises:
        BenchError: there is none.
    """
    for name in ("openresty", "nginx", "/usr/sbin/nginx"):
        if found := shutil.which(name):
            return found
    raise BenchError("neither openresty nor nginx is installed: scripts/install-deps.sh bench")


def configuration(directory: Path, name: str, body: str, *, workers: int) -> str:
    """A whole nginx.conf around what stands in its http block."""
    # Else the workers are somebody who cannot enter our directory.
    user = "user root;\n" if os.geteuid() == 0 else ""
    return _MAIN.format(directory=directory, name=name, body=body, workers=workers, user=user)


def hosts(
    routes: Routes, port: int, *, retries: bool, tls: tuple[int, Certificate] | None = None
) -> str:
    """What stands in the http block: an upstream and a server for each host."""
    # Room for an idle connection to each peer, or a rotation over many peers never finds one. Of
    # many upstreams each gets less: the places are laid out in every worker's memory.
    largest = max(len(peers) for peers in routes.values())
    keepalive = max(512, 2 * largest) if len(routes) <= 10 else 16
    secure = _TLS.format(port=tls[0], certificate=tls[1].certificate, key=tls[1].key) if tls else ""
    parts = [HEADERS, f"    proxy_next_upstream {'error timeout' if retries else 'off'};\n"]
    parts.append(f"    server {{ listen 127.0.0.1:{port} default_server; return 503; }}\n")
    for number, (host, peers) in enumerate(routes.items()):
        servers = "\n        ".join(f"server 127.0.0.1:{peer.port};" for peer in peers)
        parts.append(
            _HOST.format(
                number=number,
                servers=servers,
                keepalive=keepalive,
                port=port,
                host=host,
                tls=secure,
            )
        )
    return "".join(parts)


class Nginx(Proxy):
    """nginx, rewritten and reloaded."""

    name = "nginx, rewrite + reload"
    key = "nginx"
    retries_by_default = True
    how = "the file rewritten, SIGHUP"
    bulk_limit = 1000

    @classmethod
    def missing(cls) -> str:
        """See the base class."""
        try:
            program()
        except BenchError as problem:
            return str(problem)
        return ""

    @classmethod
    def version(cls) -> str:
        """See the base class."""
        done = subprocess.run([program(), "-v"], capture_output=True, text=True, check=False)
        return done.stderr.strip().rpartition(": ")[2]

    def configuration(self) -> str:
        """The whole nginx.conf."""
        setup = self.setup
        tls = (self.tls_port, setup.tls) if setup.tls else None
        body = hosts(self.routes, self.port, retries=self.retries, tls=tls)
        return configuration(setup.directory, self.key, body, workers=setup.workers)

    def _write(self) -> Path:
        file = self.setup.directory / f"{self.key}.conf"
        staged = file.with_suffix(".new")
        staged.write_text(self.configuration())
        staged.replace(file)
        return file

    def _start(self) -> None:
        directory = self.setup.directory
        self.launch([program(), "-p", str(directory), "-c", str(self._write())])

    def _change(self, host: str, add: Sequence[Peer], remove: Sequence[Peer]) -> None:
        self._reload()

    def _reload(self) -> None:
        self._write()
        self.check()
        self.processes[0].popen.send_signal(signal.SIGHUP)


class NginxStatic(Nginx):
    """The same where nothing changes."""

    name = "nginx, static upstream"
    key = "nginx-static"
    how = "it does not"
    same_configuration_as = Nginx.name
