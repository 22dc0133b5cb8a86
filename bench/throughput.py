"""Throughput and CPU per request: the dynamic upstream beside nginx's own static one.

Three ways to the same three backends, each with one nginx worker, so that the proxy and not the
machine is the limit:

* `dynamic`: the product as it is, a host of the agent's with Lua balancer and metrics;
* `static, same nginx`: a static `upstream` with keepalive in the very same nginx process, with the
  product's metrics: what the balancer alone costs;
* `static, plain nginx`: the same in an nginx of its own without any Lua: what all of it costs.

Rounds are interleaved and their order rotates, because the machine is shared: ratios are taken
within a round, and the median over the rounds is what counts.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.report import Section, paragraph, spread, table, write
from demo.pair import (
    DemoError,
    Pair,
    Peer,
    Process,
    Service,
    choose_port,
    probe,
    temporary_directory,
    worker_starts,
)

HOST = "app.localhost"
CONNECTIONS = 64
_PROXY_HEADERS = """
    proxy_http_version 1.1;
    proxy_set_header Host $http_host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $http_host;
    proxy_set_header X-Forwarded-Port $server_port;
    proxy_set_header X-Request-ID $request_id;
    proxy_set_header Upgrade "";
    proxy_set_header Connection "";
"""
_STATIC = """
upstream bench_static {{
    {servers}
    keepalive 512;
    keepalive_requests 100000;
}}
server {{
    listen 127.0.0.1:{port};
    server_name _;
    location / {{
        {proxy}
        proxy_pass http://bench_static;
    }}
}}
"""
_PLAIN = """
daemon off;
worker_processes 1;
pid {directory}/{name}.pid;
error_log {directory}/{name}.log;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    server_tokens off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {directory}/{name}-temp;
    proxy_temp_path {directory}/{name}-temp;
    fastcgi_temp_path {directory}/{name}-temp;
    uwsgi_temp_path {directory}/{name}-temp;
    scgi_temp_path {directory}/{name}-temp;
    {body}
}}
"""
_BACKEND = """
server {{
    listen 127.0.0.1:{port};
    location / {{ default_type text/plain; return 200 "hello from a backend\\n"; }}
}}
"""


@dataclass(frozen=True)
class Way:
    """One way to the backends: where it listens and whose CPU is counted."""

    name: str
    port: int
    master: int


@dataclass(frozen=True)
class Round:
    """What one run of wrk found; CPU is that of the proxy's worker."""

    requests_per_second: float
    p99_ms: float
    cpu_us: float


def _say(line: str) -> None:
    print(line, flush=True)


def _nginx() -> str:
    for name in ("openresty", "nginx", "/usr/sbin/nginx"):
        if found := shutil.which(name):
            return found
    raise DemoError("neither openresty nor nginx is installed: scripts/install-deps.sh test")


def _start_nginx(directory: Path, name: str, body: str) -> Process:
    config = directory / f"{name}.conf"
    config.write_text(_PLAIN.format(directory=directory, name=name, body=body))
    command = [_nginx(), "-p", str(directory), "-c", str(config)]
    return Process(name, command, log=directory / f"{name}.out")


def _cpu_seconds(master: int) -> float:
    """CPU time of the workers so far, to the nanosecond."""
    total = 0
    for pid in worker_starts(master):
        total += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    return total / 1e9


def _wrk(way: Way, seconds: float) -> Round:
    before = _cpu_seconds(way.master)
    command = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--latency"]
    command += ["--duration", f"{seconds:g}s", "--header", f"Host: {HOST}"]
    command.append(f"http://127.0.0.1:{way.port}/")
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = _cpu_seconds(way.master) - before
    if "Non-2xx" in text or "Socket errors" in text:
        raise DemoError(f"requests failed through {way.name}:\n{text}")
    requests = int(_find(r"(\d+) requests in", text))
    number, unit = re.findall(r"99%\s+([\d.]+)(us|ms|s)", text)[0]
    p99 = float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]
    return Round(float(_find(r"Requests/sec:\s+([\d.]+)", text)), p99, cpu / requests * 1e6)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise DemoError(f"wrk said something unexpected:\n{text}")
    return found.group(1)


def _wait(port: int) -> None:
    end = time.monotonic() + 10
    while probe(port, HOST).status != 200:
        if time.monotonic() > end:
            raise DemoError(f"no 200 from 127.0.0.1:{port} within 10 s")
        time.sleep(0.05)


@contextmanager
def _ways() -> Iterator[list[Way]]:
    """Backends and the three ways to them."""
    with temporary_directory() as directory:
        backends = [choose_port(port, "a backend", _say) for port in (18101, 18102, 18103)]
        static_port = choose_port(18111, "the static upstream", _say)
        plain_port = choose_port(18112, "the plain nginx", _say)
        servers = "\n    ".join(f"server 127.0.0.1:{port};" for port in backends)
        conf = directory / "conf.d"
        conf.mkdir()
        static = _STATIC.format(servers=servers, port=static_port, proxy=_PROXY_HEADERS)
        (conf / "static.conf").write_text(static)
        plain = _STATIC.format(servers=servers, port=plain_port, proxy=_PROXY_HEADERS)
        pair = Pair(
            directory,
            say=_say,
            nginx_env={"TIDEGATE_WORKERS": "1", "TIDEGATE_CONF_DIR": str(conf)},
        )
        processes: list[Process] = []
        try:
            bodies = "".join(_BACKEND.format(port=port) for port in backends)
            processes.append(_start_nginx(directory, "backends", bodies))
            processes.append(_start_nginx(directory, "plain", plain))
            peers = tuple(Peer(f"backend-{port}", port) for port in backends)
            pair.start([Service(HOST, peers)])
            master = int(pair.status()["master_pid"])
            ways = [
                Way("static, plain nginx", plain_port, processes[1].popen.pid),
                Way("static, same nginx", static_port, master),
                Way("dynamic", pair.port, master),
            ]
            for way in ways:
                _wait(way.port)
            yield ways
        finally:
            pair.stop()
            for process in processes:
                process.stop()


def measure(rounds: int, seconds: float) -> Section:
    """Run wrk through each way, so many interleaved rounds of so many seconds."""
    found: dict[str, list[Round]] = {}
    with _ways() as ways:
        for way in ways:
            _wrk(way, 1.0)
            found[way.name] = []
        for number in range(rounds):
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                found[way.name].append(_wrk(way, seconds))
            _say(
                f"  round {number + 1} of {rounds}: "
                + ", ".join(f"{n} {r[-1].requests_per_second:.0f}/s" for n, r in found.items())
            )
    dynamic = found["dynamic"]
    rows = []
    for name, results in found.items():
        pairs = list(zip(dynamic, results, strict=True))
        ratios = [d.requests_per_second / r.requests_per_second for d, r in pairs]
        cpu = [d.cpu_us - r.cpu_us for d, r in pairs]
        same = results is dynamic
        rows.append(
            [
                name,
                spread([r.requests_per_second for r in results], 0),
                spread([r.p99_ms for r in results]),
                spread([r.cpu_us for r in results], 1),
                "" if same else spread(ratios, 3),
                "" if same else f"{statistics.median(cpu):+.1f}",
            ]
        )
    about = paragraph(
        f"3 backends (nginx `return 200`), keep-alive to both sides, {CONNECTIONS} connections of",
        f"wrk, one nginx worker, {rounds} interleaved rounds of {seconds:g} s. Medians, with range",
        "in brackets; the ratio is taken within each round. `static, same nginx` shares the",
        "process and the metrics with `dynamic`, `static, plain nginx` is an nginx without any",
        "Lua. wrk, proxy and backends share the cores. `bench/throughput.py`.",
    )
    head = ["way", "requests/s", "p99 ms", "CPU µs per request", "dynamic relative to it"]
    head.append("dynamic's further µs")
    return Section(
        "throughput", "Throughput beside a static upstream", f"{about}\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    write(
        measure(
            int(sys.argv[1]) if len(sys.argv) > 1 else 9,
            float(sys.argv[2]) if len(sys.argv) > 2 else 5.0,
        )
    )
