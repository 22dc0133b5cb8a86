"""Steady traffic: requests a second and CPU time per request, with nothing changing.

Closed loop (wrk), every proxy with one worker or thread on a core of its own, so that the proxy and
not the machine is the limit; load and backends have the other cores. A round during which other
processes took more than a twelfth of the machine is done again; how many were is told. CPU time per
request is the steadiest figure, and its ratio to nginx's static upstream is taken within a round.

`nginx, in Tidegate's process` is a static upstream with the same headers and the metrics in
Tidegate's own nginx: the dynamic upstream is all that differs.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.backends import Standing
from bench.plot import Bar, bars
from bench.proxies.base import BenchError, Certificate, Peer, Proxy, Setup, free_port
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import NginxStatic
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import Traefik
from bench.report import Section, paragraph, spread, table
from bench.scenes.common import (
    Case,
    Options,
    Sample,
    as_data,
    attempt,
    directory,
    median,
    middle,
    of,
    place,
    rows,
    say,
    values,
    void,
)
from demo.pair import probe

HOST = "localhost"  # what wrk asks for by TLS server name has to resolve
FOREIGN_LIMIT = 1 / 12
INSIDE = "nginx, in Tidegate's process"
_INSIDE = """
upstream bench_static {{
    {servers}
    keepalive 512;
    keepalive_requests 100000;
}}
server {{
    listen 127.0.0.1:{port};
    server_name _;
    location / {{
        include conf.d/proxy.inc;
        proxy_pass http://bench_static;
    }}
}}
"""


@dataclass(frozen=True)
class Kind:
    """A kind of steady traffic."""

    name: str
    title: str
    peers: int
    path: str = "/"
    connections: int = 64
    tls: bool = False


KINDS = (
    Kind("small", "3 peers, small answers", 3),
    Kind("large", "3 peers, answers of 100 kB", 3, path="/100k", connections=16),
    Kind("tls", "3 peers, small answers, TLS to the client", 3, tls=True),
    Kind("many", "1,000 peers, small answers", 1000),
)


@dataclass(frozen=True)
class Way:
    """One way to the backends."""

    name: str
    port: int
    tls_port: int
    roots: tuple[int, ...]


@contextmanager
def _ways(options: Options, peers: int) -> Iterator[tuple[list[Way], Standing]]:
    """All proxies at once, idle but for the one that is measured, and their backends."""
    affinity = os.sched_getaffinity(0)
    with directory() as home:
        backends = Standing(home, [free_port() for _ in range(peers)])
        started: list[Proxy] = []
        try:
            tls = certificate(home)
            ways = []
            for kind in options.among(Tidegate, NginxStatic, HAProxy, Caddy, Traefik):
                inside = free_port()
                if kind is Tidegate:
                    lines = "\n    ".join(f"server 127.0.0.1:{p.port};" for p in backends.peers)
                    proxy: Proxy = Tidegate(extra=_INSIDE.format(servers=lines, port=inside))
                else:
                    proxy = kind()
                started.append(proxy)
                setup = Setup(place(home, kind.key), {HOST: backends.peers}, workers=1, tls=tls)
                proxy.start(setup)
                ways.append(Way(kind.name, proxy.port, proxy.tls_port, tuple(proxy.roots())))
                if kind is Tidegate:
                    ways.append(Way(INSIDE, inside, 0, tuple(proxy.roots())))
            # Old workers of a reload may still be there; they are none a second later.
            time.sleep(1.0)
            _keep_apart(started, backends)
            for way in ways:
                _serves(way, backends.peers)
            yield ways, backends
        finally:
            os.sched_setaffinity(0, affinity)
            for proxy in started:
                proxy.stop()
            backends.stop()


def certificate(home: Path) -> Certificate:
    """A self-signed one for HOST."""
    crt, key, bundle = home / "tls.crt", home / "tls.key", home / "tls.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={HOST}", "-keyout", str(key)]
    command += ["-addext", f"subjectAltName=DNS:{HOST}", "-out", str(crt)]
    subprocess.run(command, check=True, capture_output=True)
    bundle.write_text(crt.read_text() + key.read_text())
    return Certificate(crt, key, bundle)


def _keep_apart(proxies: Sequence[Proxy], backends: Standing) -> None:
    """One core for the proxies, the rest for load and backends."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return
    for proxy in proxies:
        processes.pin(proxy.roots(), cores[:1])
    processes.pin([backends.pid], cores[1:])
    os.sched_setaffinity(0, cores[1:])  # wrk inherits ours


def _serves(way: Way, peers: Sequence[Peer]) -> None:
    """Raises BenchError unless every peer (of many: different ones) answers through it."""
    names = {peer.id for peer in peers}
    answers = [probe(way.port, HOST) for _ in range(30)]
    seen = {answer.backend for answer in answers}
    if not seen <= names or len(seen) < min(len(names), 3):
        raise BenchError(f"{way.name} is answered by {sorted(seen)} of {len(names)} peers")


def _wrk(way: Way, kind: Kind, known: Sequence[int], seconds: int) -> dict[str, Any]:
    """One run through `way`; `known` are the roots of all processes that are ours."""
    before = {root: processes.cpu_seconds([root]) for root in known}
    busy, own = processes.busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    scheme, port = ("https", way.tls_port) if kind.tls else ("http", way.port)
    command = ["wrk", "--threads", "1", "--connections", str(kind.connections), "--latency"]
    command += ["--duration", f"{seconds}s", f"{scheme}://{HOST}:{port}{kind.path}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    wrk = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
    cpu = {root: processes.cpu_seconds([root]) - before[root] for root in known}
    foreign = processes.busy_seconds() - busy - wrk - sum(cpu.values())
    took = time.monotonic() - started
    found = parse_wrk(text)
    if kind.path == "/100k" and found["bytes"] < found["requests"] * 100_000:
        raise BenchError(f"{way.name}: answers were shorter than 100,000 bytes")
    return {
        "requests_per_second": found["rate"],
        "p99_ms": found["p99_ms"],
        "cpu_us": sum(cpu[root] for root in way.roots) / found["requests"] * 1e6,
        "pss_mb": processes.pss_mb(way.roots),
        "foreign": foreign / took / (os.cpu_count() or 1),
    }


def parse_wrk(text: str) -> dict[str, float]:
    """What wrk has printed: requests, rate, p99_ms, bytes.

    Raises:
        BenchError: requests failed, or it printed something unexpected.
    """
    if "Non-2xx" in text or "Socket errors" in text:
        raise BenchError(f"requests failed: {' '.join(text.split())}")

    def find(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, text)
        if found is None:
            raise BenchError(f"wrk said something unexpected: {' '.join(text.split())}")
        return found.groups()

    number, unit = find(r"99%\s+([\d.]+)(us|ms|s)\b")
    size, prefix = find(r"requests in [^,]+, ([\d.]+)([KMGT]?)B read")
    return {
        "requests": float(find(r"(\d+) requests in")[0]),
        "rate": float(find(r"Requests/sec:\s+([\d.]+)")[0]),
        "p99_ms": float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit],
        # wrk rounds to two digits after the point, which is up to half a per cent of 1.00.
        "bytes": float(size) * 1.005 * 1024 ** "_KMGT".index(prefix or "_"),
    }


def _measure(
    options: Options, kind: Kind, ways: Sequence[Way], backends: Standing
) -> tuple[list[Sample], int]:
    """The rounds of one kind of traffic, and how many were done again."""
    seconds = 1 if options.quick else 2
    roots = sorted({backends.pid, *(root for way in ways for root in way.roots)})
    usable = {way.name: way for way in ways if way.tls_port or not kind.tls}
    cases = [Case(name) for name in usable]

    def once(case: Case) -> Mapping[str, Any]:
        return _wrk(usable[case.proxy], kind, roots, seconds)

    for case in cases:
        attempt(case, -1, once)
    samples: list[Sample] = []
    again = number = 0
    while number < options.rounds:
        turn = number % len(cases)
        found = [attempt(case, number, once) for case in [*cases[turn:], *cases[:turn]]]
        foreign = max(sample.values.get("foreign", 0.0) for sample in found)
        if foreign > FOREIGN_LIMIT and not options.quick and again < 3 * options.rounds:
            again += 1
            say(f"  others took {foreign:.0%} of the machine: this round is done again")
            continue
        samples += found
        number += 1
    return samples, again


def _ratio(samples: Sequence[Sample], base: Sequence[Sample], name: str) -> str:
    if void(base) or void(samples):
        return ""
    pairs = zip(values(samples, name), values(base, name), strict=True)
    return spread([mine / other for mine, other in pairs])


def _section(kind: Kind, samples: list[Sample], again: int) -> tuple[str, str]:
    """Text and plot of one kind."""
    names = list(dict.fromkeys(sample.case.proxy for sample in samples))
    cases = [Case(name) for name in names]
    base = of(samples, Case(NginxStatic.name))

    def cells(own: list[Sample]) -> list[str]:
        return [
            median(own, "cpu_us"),
            _ratio(own, base, "cpu_us"),
            median(own, "requests_per_second", 0),
            _ratio(own, base, "requests_per_second"),
            median(own, "p99_ms", 2),
            f"{middle(values(own, 'pss_mb')):.0f}",
        ]

    head = ["proxy", "CPU µs per request", "of static nginx's", "requests/s", "of static nginx's"]
    head += ["p99 ms at full load", "PSS MB"]
    found = rows(cases, samples, lambda case: [case.proxy], cells, width=6)
    again_told = f" {again} rounds were done again." if again else ""
    drawn = [
        Bar(
            case.proxy,
            middle(values(own, "cpu_us")),
            min(values(own, "cpu_us")),
            max(values(own, "cpu_us")),
            emphasis=case.proxy == Tidegate.name,
        )
        for case in cases
        if not void(own := of(samples, case))
    ]
    name = f"steady-{kind.name}"
    text = (
        f"### {kind.title[0].upper()}{kind.title[1:]}\n{kind.connections} connections.{again_told}"
        f"\n\n{table(head, found)}\n\n![{kind.title}](benchmarks/{name}.svg)"
    )
    return text, bars(f"CPU per request, {kind.title}", "µs; less is better", drawn)


def run(options: Options) -> Section:
    """Measure all kinds."""
    texts, plots = [], {}
    data: list[Mapping[str, Any]] = []
    for peers in sorted({kind.peers for kind in KINDS}):
        with _ways(options, peers) as (ways, backends):
            for kind in KINDS:
                if kind.peers != peers:
                    continue
                say(f" {kind.title}")
                samples, again = _measure(options, kind, ways, backends)
                text, plot = _section(kind, samples, again)
                texts.append(text)
                plots[f"steady-{kind.name}"] = plot
                data += [{"kind": kind.name, **item} for item in as_data(samples)]
    about = paragraph(
        "wrk over kept connections, one worker or thread of each proxy on a core of its own,",
        f"{options.rounds} interleaved rounds; medians, with range in brackets; ratios are taken",
        "within each round. CPU time is that of the proxy alone, and the steadiest of these",
        f"figures. `{INSIDE}` differs from Tidegate in the upstream alone;",
        f"`{NginxStatic.name}` is the same binary without Lua or metrics.",
        "`bench/scenes/steady.py`.",
    )
    return Section(
        "throughput", "(a) Steady traffic", "\n\n".join([about, *texts]), plots=plots, data=data
    )
