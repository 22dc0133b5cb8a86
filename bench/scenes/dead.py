"""Peers that die without anybody telling the proxy: 1 of 2, and 2 of 3.

The processes are killed under constant load, and the membership stays as it is: what a proxy does
about peers that refuse connections, with its retries and without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bench.backends import Living
from bench.proxies.base import BenchError, Proxy, Setup
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import NginxStatic
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import Traefik
from bench.report import Section, paragraph, table
from bench.scenes.common import (
    Case,
    Options,
    Sample,
    as_data,
    directory,
    expect_only,
    interleaved,
    load,
    median,
    middle,
    place,
    rows,
    say,
    values,
    window,
)

HOST = "app.localhost"
RATE = 1000.0
_UNDER_WAY = 0.05


def _run(kind: type[Proxy], case: Case, options: Options) -> Mapping[str, Any]:
    quiet, seconds = (0.5, 1.0) if options.quick else (0.5, 1.5)
    with directory() as home:
        backends = Living(home)
        proxy = kind()
        try:
            peers = tuple(backends.start() for _ in range(case.variant["peers"]))
            setup = Setup(place(home, "proxy"), {HOST: peers}, retries=case.variant["retries"])
            proxy.start(setup)
            expect_only(proxy, HOST, peers, within=5)
            with load(proxy, HOST, rate=RATE, connections=32) as running:
                started = time.time()
                time.sleep(0.3 + quiet)
                killed = time.time()
                for peer in peers[1:]:
                    backends.kill(peer)
                time.sleep(seconds)
                over = time.time()
                result = running.stop()
        finally:
            proxy.stop()
            backends.stop()
    # A request that was due just before may have been under way when the peers died.
    edge = killed - _UNDER_WAY
    before, after = window(result, started + 0.3, edge), window(result, edge, over)
    late = {r.backend for r in result.records if result.started_at + r.due > killed + 0.1}
    if before.failed or late - {peers[0].id, ""}:
        raise BenchError(f"{before.failed} failed before the kill; after it {late} answered")
    return {
        "requests": after.requests,
        "failed": after.failed,
        "closed": after.closed,
        "p50": after.p50,
        "p99": after.p99,
        "p99_without": before.p99,
    }


def run(options: Options) -> Section:
    """Measure every proxy, both ways of retrying."""
    say(" dead peers")
    kinds = {
        kind.name: kind for kind in options.among(Tidegate, NginxStatic, HAProxy, Caddy, Traefik)
    }
    chosen = [
        Case(name, {"peers": peers, "retries": retries})
        for peers in (2, 3)
        for retries in (True, False)
        for name in kinds
    ]
    samples = interleaved(
        chosen, options.rounds, lambda case: _run(kinds[case.proxy], case, options)
    )

    def head(case: Case) -> list[str]:
        usual = kinds[case.proxy].retries_by_default is case.variant["retries"]
        retries = ("yes" if case.variant["retries"] else "no") + (", its default" if usual else "")
        return [f"{case.variant['peers'] - 1} of {case.variant['peers']}", case.proxy, retries]

    def cells(own: list[Sample]) -> list[str]:
        failed, requests = sum(values(own, "failed")), sum(values(own, "requests"))
        closed = sum(values(own, "closed"))
        return [
            f"{failed:,.0f} of {requests:,.0f}",
            f"{closed:,.0f}",
            f"{middle(values(own, 'p50')):.1f}",
            median(own, "p99"),
            f"{middle(values(own, 'p99_without')):.1f}",
        ]

    about = paragraph(
        f"{RATE:,.0f} requests a second; the peers are killed and stay in the membership. Failures",
        f"from the kill on, summed over {options.rounds} interleaved rounds; p99 in milliseconds,",
        "median and range. Nobody but the proxy retries. 2 workers or threads each.",
        "`bench/scenes/dead.py`.",
    )
    names = ["dead", "proxy", "retries", "failed", "of them: connection closed", "p50 ms", "p99"]
    names.append("p99 before")
    found = table(names, rows(chosen, samples, head, cells, width=5))
    return Section("dead", "(d) Dead peers", f"{about}\n\n{found}", data=as_data(samples))
