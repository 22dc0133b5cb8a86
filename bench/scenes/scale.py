"""What one change costs with 1 to 10,000 upstreams of 10 peers each.

All proxies that can hold so many are started, then rounds take turns. In each round there is
constant load on one host, first in peace, then while one peer of other hosts is replaced by another
at a constant rate. Ten backends stand behind all peers; what is measured is the proxy.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from bench import processes
from bench.backends import Standing
from bench.load import percentile
from bench.plot import lines
from bench.proxies.base import BenchError, Peer, Proxy, Setup, free_port
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.tidegate import Tidegate, TidegateOneHost
from bench.proxies.traefik import TraefikFast
from bench.report import Section, paragraph, table
from bench.scenes.common import (
    FAULTS,
    Case,
    Options,
    Sample,
    as_data,
    attempt,
    directory,
    expect_only,
    interleaved,
    load,
    median,
    middle,
    of,
    place,
    pooled,
    reason,
    rows,
    say,
    tell,
    values,
    void,
    window,
)

PEERS = 10
RATE = 500.0
CHANGES_PER_SECOND = 20.0
SIZES = (1, 100, 1_000, 10_000)
QUICK_SIZES = (1, 100)
LOADED = "h0.localhost"


def routes(count: int, backends: tuple[Peer, ...]) -> dict[str, tuple[Peer, ...]]:
    """So many hosts, each with a peer on every backend."""
    return {
        f"h{number}.localhost": tuple(
            replace(peer, id=f"p{index}") for index, peer in enumerate(backends)
        )
        for number in range(count)
    }


class _Held:
    """A proxy that has been started, and what has been changed since."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._count = 0

    def change(self) -> float:
        """Replace a peer of a host without load by one of another name; seconds that it took."""
        hosts = len(self.proxy.routes)
        # With one host there is no other one.
        host = f"h{random.randrange(1, hosts)}.localhost" if hosts > 1 else LOADED
        old = self.proxy.routes[host][0]
        self._count += 1
        new = Peer(f"n{self._count}", old.port)
        before = time.monotonic()
        self.proxy.change(host, add=[new], remove=[old])
        return time.monotonic() - before

    def round(self, seconds: float) -> Mapping[str, Any]:
        """Load in peace, then load with changes."""
        proxy = self.proxy
        with load(proxy, LOADED, rate=RATE, connections=16) as running:
            time.sleep(0.3)
            peace = time.time()
            time.sleep(seconds)
            began, cpu = time.time(), processes.cpu_seconds(proxy.roots())
            calls: list[float] = []
            start = time.monotonic()
            while (due := start + len(calls) / CHANGES_PER_SECOND) < start + seconds:
                time.sleep(max(0.0, due - time.monotonic()))
                calls.append(self.change())
                if time.monotonic() > start + 3 * seconds:
                    break
            over = time.time()
            result = running.stop()
            cpu = processes.cpu_seconds(proxy.roots()) - cpu
        before, during = window(result, peace, began), window(result, began, over)
        if before.failed or not during.requests:
            raise BenchError(f"{before.failed} requests failed before anything was changed")
        workers = [processes.memory_mb(pid, "Pss") for pid in processes.tree(proxy.roots())]
        return {
            "requests": during.requests,
            "failed": during.failed,
            "calls_ms": [call * 1000 for call in calls],
            "p99": during.p99,
            "p99_without": before.p99,
            "max_ms": max(r.latency_ms for r in result.records if not r.kind),
            "cpu_ms_per_call": cpu / len(calls) * 1000,
            "pss_mb": sum(workers),
            "largest_mb": max(workers),
        }


def _kinds(options: Options, count: int) -> list[type[Proxy]]:
    chosen = options.among(Tidegate, TidegateOneHost, HAProxy, Caddy, TraefikFast)
    # With one upstream they are the same.
    alike = TidegateOneHost if count == 1 else None
    return [kind for kind in chosen if kind.bulk_limit >= count and kind is not alike]


def _measure(options: Options, count: int) -> list[Sample]:
    seconds = 1.0 if options.quick else 1.5
    variant = {"upstreams": count}
    kinds = {kind.name: kind for kind in _kinds(options, count)}
    with directory() as home, ExitStack() as stack:
        backends = Standing(home, [free_port() for _ in range(PEERS)])
        stack.callback(backends.stop)
        held: dict[str, _Held] = {}

        def start(case: Case) -> Mapping[str, Any]:
            kind = kinds[case.proxy]
            proxy = kind()
            stack.callback(proxy.stop)
            before = time.monotonic()
            proxy.start(Setup(place(home, kind.key), routes(count, backends.peers)))
            proxy.await_host(LOADED)
            held[case.proxy] = _Held(proxy)
            return {"start_seconds": time.monotonic() - before}

        started = [attempt(Case(name, variant), -1, start) for name in kinds]
        samples = [sample for sample in started if sample.error]
        time.sleep(1.0)
        cases = [Case(name, variant) for name in held]
        samples += interleaved(cases, options.rounds, lambda case: held[case.proxy].round(seconds))
        for case in cases:
            try:
                expect_only(held[case.proxy].proxy, LOADED, backends.peers, within=10)
            except FAULTS as problem:
                samples.append(Sample(case, options.rounds, error=reason(problem)))
                tell(samples[-1])
    return samples


def run(options: Options) -> Section:
    """Measure every size."""
    samples: list[Sample] = []
    chosen: list[Case] = []
    for count in QUICK_SIZES if options.quick else SIZES:
        say(f" {count} upstreams of {PEERS} peers")
        samples += _measure(options, count)
        chosen += [Case(kind.name, {"upstreams": count}) for kind in _kinds(options, count)]

    def cells(own: list[Sample]) -> list[str]:
        calls = pooled(own, "calls_ms")
        return [
            f"{percentile(calls, 0.5):.1f}",
            f"{percentile(calls, 0.99):.1f}",
            f"{middle(values(own, 'cpu_ms_per_call')):.1f}",
            median(own, "p99"),
            f"{middle(values(own, 'p99_without')):.1f}",
            f"{max(values(own, 'max_ms')):.0f}",
            f"{sum(values(own, 'failed')):,.0f} of {sum(values(own, 'requests')):,.0f}",
            f"{middle(values(own, 'largest_mb')):.0f}",
            f"{middle(values(own, 'pss_mb')):.0f}",
        ]

    head = ["upstreams", "proxy", "call p50 ms", "p99", "CPU ms per change", "proxied p99 ms"]
    head += ["without changes", "longest ms", "failed", "largest process, PSS MB", "all, PSS MB"]
    found = table(
        head,
        rows(
            chosen,
            samples,
            lambda case: [f"{case.variant['upstreams']:,}", case.proxy],
            cells,
            width=9,
        ),
    )
    calls: dict[str, list[tuple[float, float]]] = {}
    proxied: dict[str, list[tuple[float, float]]] = {}
    for case in chosen:
        own = of(samples, case)
        if not void(own):
            size = float(case.variant["upstreams"])
            call = percentile(pooled(own, "calls_ms"), 0.99)
            calls.setdefault(case.proxy, []).append((size, call))
            proxied.setdefault(case.proxy, []).append((size, middle(values(own, "p99"))))
    left_out = ", ".join(kind.name for kind in _kinds(options, 1) if kind.bulk_limit < max(SIZES))
    about = paragraph(
        f"Upstreams of {PEERS} peers; {CHANGES_PER_SECOND:.0f} times a second one peer of one of",
        f"them is replaced, with {RATE:.0f} requests a second to another one.",
        f"{options.rounds} interleaved rounds, 2 workers or threads each; calls of all rounds",
        "together; proxied p99 and its range in milliseconds from the time due. CPU time",
        f"until the last call has returned. `{TidegateOneHost.name}` holds all upstreams and",
        "serves one host, which leaves out what nginx itself needs for each host. Traefik's call",
        f"only writes the file. {left_out}: up to 1,000 upstreams, since each",
        "change costs them the whole configuration. `bench/scenes/scale.py`.",
    )
    text = (
        f"{about}\n\n{found}\n\n![p99 of a call](benchmarks/scale-call.svg)\n\n"
        "![proxied p99 during changes](benchmarks/scale-proxied.svg)"
    )
    plots = {
        "scale-call": lines("p99 of the call that changes one peer", "upstreams", "ms", calls),
        "scale-proxied": lines("p99 of requests during changes", "upstreams", "ms", proxied),
    }
    title = "(f) One change, by the number of upstreams"
    return Section("scale-upstreams", title, text, plots, as_data(samples))
