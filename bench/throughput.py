"""Throughput and CPU per request: the dynamic upstream beside nginx's own static one.

Three ways to the same three backends, each with one nginx worker, so that the proxy and not the
machine is the limit:

* `dynamic`: the product as it is, a host of the agent's with Lua balancer and metrics;
* `static, same nginx`: a static `upstream` with keepalive in the very same nginx process, with the
  same headers and the metrics: the dynamic upstream is all that differs;
* `static, plain nginx`: an nginx of its own without any Lua, and plain headers: what all of it
  costs.

Rounds are interleaved and their order rotates, because the machine is shared: ratios are taken
within a round, and the median over the rounds is what counts. A round during which other processes
took more than a twelfth of the machine is thrown away; how many were is told.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.report import Section, paragraph, spread, table
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
FOREIGN_LIMIT = 1 / 12
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
class Run:
    """What one run of wrk found; CPU is that of the proxy's worker.

    `foreign` is the share of the machine that went to processes of others.
    """

    requests_per_second: float
    p99_ms: float
    cpu_us: float
    foreign: float


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


def _keep_apart(ways: list[Way], others: list[Process]) -> None:
    """One core for the proxies' workers, the rest for load and backends: less noise for all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return
    for master in {way.master for way in ways}:
        for pid in worker_starts(master):
            os.sched_setaffinity(pid, cores[:1])
    for process in others:
        for pid in worker_starts(process.popen.pid):
            os.sched_setaffinity(pid, cores[1:])
    # wrk inherits ours.
    os.sched_setaffinity(0, cores[1:])


def _busy_seconds() -> float:
    """CPU time of the whole machine so far, idle and waiting left out."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def _wrk(way: Way, masters: list[int], seconds: int) -> Run:
    """One run through `way`; `masters` are those whose workers are ours, the proxy's included."""
    before, busy = {master: _cpu_seconds(master) for master in masters}, _busy_seconds()
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    command = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--latency"]
    command += ["--duration", f"{seconds}s", "--header", f"Host: {HOST}"]
    command.append(f"http://127.0.0.1:{way.port}/")
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    wrk = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
    cpu = {master: _cpu_seconds(master) - before[master] for master in masters}
    foreign = _busy_seconds() - busy - wrk - sum(cpu.values())
    if "Non-2xx" in text or "Socket errors" in text:
        raise DemoError(f"requests failed through {way.name}:\n{text}")
    number, unit = re.findall(r"99%\s+([\d.]+)(us|ms|s)", text)[0]
    return Run(
        requests_per_second=float(_find(r"Requests/sec:\s+([\d.]+)", text)),
        p99_ms=float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit],
        cpu_us=cpu[way.master] / int(_find(r"(\d+) requests in", text)) * 1e6,
        foreign=foreign / (time.monotonic() - started) / (os.cpu_count() or 1),
    )


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
def _ways() -> Iterator[tuple[list[Way], int]]:
    """The three ways, and the pid of the backends' master."""
    with temporary_directory() as directory:
        backends = [choose_port(port, "a backend", _say) for port in (18101, 18102, 18103)]
        static_port = choose_port(18111, "the static upstream", _say)
        plain_port = choose_port(18112, "the plain nginx", _say)
        servers = "\n    ".join(f"server 127.0.0.1:{port};" for port in backends)
        conf = directory / "conf.d"
        conf.mkdir()
        same = "include conf.d/proxy.inc;"
        static = _STATIC.format(servers=servers, port=static_port, proxy=same)
        (conf / "static.conf").write_text(static)
        plain = _STATIC.format(servers=servers, port=plain_port, proxy=_PROXY_HEADERS)
        pair = Pair(
            directory,
            say=_say,
            nginx_env={"TIDEGATE_WORKERS": "1", "TIDEGATE_CONF_DIR": str(conf)},
        )
        processes: list[Process] = []
        affinity = os.sched_getaffinity(0)
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
            # The worker from before the site's reload may still be about to end.
            pair.wait_for(lambda: len(pair.workers()) == 1, "the old worker to end")
            for way in ways:
                _wait(way.port)
            _keep_apart(ways, processes[:1])
            yield ways, processes[0].popen.pid
        finally:
            os.sched_setaffinity(0, affinity)
            pair.stop()
            for process in processes:
                process.stop()


def _rounds(rounds: int, seconds: int) -> tuple[dict[str, list[Run]], int]:
    """So many rounds that others left alone, and how many were thrown away.

    Raises:
        DemoError: the machine is too busy to measure anything.
    """
    found: dict[str, list[Run]] = {}
    thrown_away = 0
    with _ways() as (ways, backends):
        masters = [backends, *{way.master for way in ways}]
        for way in ways:
            _wrk(way, masters, 1)
            found[way.name] = []
        while len(found["dynamic"]) < rounds:
            turn = (len(found["dynamic"]) + thrown_away) % len(ways)
            runs = {way.name: _wrk(way, masters, seconds) for way in ways[turn:] + ways[:turn]}
            foreign = max(run.foreign for run in runs.values())
            rates = ", ".join(f"{n} {run.requests_per_second:.0f}/s" for n, run in runs.items())
            if foreign > FOREIGN_LIMIT:
                thrown_away += 1
                _say(f"  thrown away, others took {foreign:.0%}: {rates}")
                if thrown_away > rounds * 20:
                    raise DemoError("this machine is too busy: end what else runs, and try again")
                continue
            for name, run in runs.items():
                found[name].append(run)
            _say(f"  round {len(found['dynamic'])} of {rounds}: {rates}")
    return found, thrown_away


def measure(rounds: int, seconds: int) -> Section:
    """Run wrk through each way, so many interleaved rounds of so many seconds."""
    found, thrown_away = _rounds(rounds, seconds)
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
        f"wrk, one nginx worker on a core of its own, {rounds} interleaved rounds of {seconds} s",
        f"({thrown_away} more were thrown away because others used the machine). Medians, with",
        "range in brackets; the ratio is taken within each round. `static, same nginx` differs",
        "from `dynamic` in the upstream alone, `static, plain nginx` is an nginx without any Lua",
        "or metrics. The CPU time per request is the steadiest of these. `bench/throughput.py`.",
    )
    head = ["way", "requests/s", "p99 ms", "CPU µs per request", "dynamic relative to it"]
    head.append("dynamic's further µs")
    return Section(
        "throughput", "Throughput beside a static upstream", f"{about}\n\n{table(head, rows)}"
    )
