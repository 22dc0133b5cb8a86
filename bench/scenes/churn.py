"""Membership that changes while peers really start and stop, under constant load.

Each change starts a backend, adds it and removes the oldest in one go, and kills the removed one:
at once after the proxy's call has returned, or 2 s later, which is how long Swarm leaves a task
running. Load is open loop on kept connections; it never retries, and latency counts from the time a
request was due. Requests whose connection was closed under way are told apart: a client that tries
again does not see them.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench import processes
from bench.backends import Living
from bench.plot import Bar, bars
from bench.proxies.base import Peer, Proxy, Setup
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import Nginx
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import Traefik, TraefikFast
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
    of,
    place,
    rows,
    say,
    values,
    void,
    window,
)

HOST = "app.localhost"
PEERS = 4
RATE = 2000.0
CONNECTIONS = 32
_SETTLE = 1.0


def cases(options: Options) -> list[Case]:
    """Every rate killed at once; 10 a second also killed late, and the other way of retrying."""
    found = []
    for kind in options.among(Tidegate, Nginx, HAProxy, Caddy, Traefik, TraefikFast):
        usual = kind.retries_by_default
        variants = [(1, 0.0, usual), (10, 0.0, usual), (100, 0.0, usual)]
        variants += [(10, 2.0, usual), (10, 0.0, not usual)]
        found += [
            Case(kind.name, {"rate": rate, "kill_after": after, "retries": retries})
            for rate, after, retries in variants
        ]
    return found


def _churn(
    proxy: Proxy, backends: Living, rate: float, seconds: float, kill_after: float
) -> tuple[list[float], float]:
    """Change peers at that rate for so long; seconds that each call took, and when it was over."""
    calls: list[float] = []
    doomed: list[tuple[float, str, Peer]] = []
    start = time.monotonic()

    def kill_due(now: float) -> None:
        while doomed and doomed[0][0] <= now:
            backends.kill(heapq.heappop(doomed)[2])

    while (due := start + len(calls) / rate) < start + seconds:
        while (wait := due - time.monotonic()) > 0:
            kill_due(time.monotonic())
            time.sleep(min(wait, 0.05))
        if time.monotonic() > start + seconds:
            break
        new, old = backends.start(), proxy.routes[HOST][0]
        before = time.monotonic()
        proxy.change(HOST, add=[new], remove=[old])
        now = time.monotonic()
        calls.append(now - before)
        heapq.heappush(doomed, (now + kill_after, old.id, old))
        kill_due(now)
    while doomed:
        time.sleep(max(0.0, doomed[0][0] - time.monotonic()))
        kill_due(time.monotonic())
    return calls, time.time()


def _run(kind: type[Proxy], case: Case, options: Options) -> Mapping[str, Any]:
    quiet = 1.0 if options.quick else 2.0
    seconds = 1.0 if options.quick else 6.0 if case.variant["rate"] == 1 else 4.0
    with directory() as home:
        backends = Living(home)
        proxy = kind()
        try:
            peers = tuple(backends.start() for _ in range(PEERS))
            proxy.start(
                Setup(place(home, "proxy"), {HOST: peers}, retries=case.variant["retries"])
            )
            with load(proxy, HOST, rate=RATE, connections=CONNECTIONS) as running:
                started = time.time()
                time.sleep(0.5 + quiet)
                began, cpu = time.time(), processes.cpu_seconds(proxy.roots())
                calls, over = _churn(
                    proxy, backends, case.variant["rate"], seconds, case.variant["kill_after"]
                )
                cpu = processes.cpu_seconds(proxy.roots()) - cpu
                # What the last change broke is broken by it, also a moment later.
                time.sleep(_SETTLE)
                result = running.stop()
            expect_only(proxy, HOST, proxy.routes[HOST], within=5 + 3 * proxy.long_wait)
        finally:
            proxy.stop()
            backends.stop()
    before, during = window(result, started + 0.5, began), window(result, began, over + _SETTLE)
    if before.failed:
        raise RuntimeError(f"{before.failed} requests failed before anything was changed")
    return {
        "requests": during.requests,
        "failed": during.failed,
        "closed": during.closed,
        "reconnects": result.reconnects,
        "p50": during.p50,
        "p99": during.p99,
        "p999": during.p999,
        "p99_without": before.p99,
        "p99_ratio": during.p99 / max(before.p99, 0.001),
        "calls_per_second": len(calls) / seconds,
        "call_ms": middle(calls) * 1000,
        "cpu_per_10s": cpu / (over - began) * 10,
        "lag_p99": result.lag_ms_p99,
    }


def _table(chosen: Sequence[Case], samples: Sequence[Sample]) -> str:
    def cells(own: list[Sample]) -> list[str]:
        requests = sum(values(own, "requests"))
        failed, closed = sum(values(own, "failed")), sum(values(own, "closed"))
        return [
            f"{failed:,.0f} of {requests:,.0f}",
            f"{failed - closed:,.0f}",
            f"{closed:,.0f}",
            f"{sum(values(own, 'reconnects')):,.0f}",
            f"{middle(values(own, 'p50')):.1f}",
            median(own, "p99"),
            median(own, "p999"),
            f"{middle(values(own, 'p99_without')):.1f}",
            f"{middle(values(own, 'call_ms')):.1f}",
            f"{middle(values(own, 'calls_per_second')):.1f}",
            f"{middle(values(own, 'cpu_per_10s')):.1f}",
        ]

    head = ["proxy", "failed", "with a retrying client", "connections closed under way"]
    head += ["idle ones closed", "p50 ms", "p99", "p99.9", "p99 without churn", "call ms"]
    head += ["calls/s reached", "CPU s in 10 s"]
    return table(head, rows(chosen, samples, lambda case: [case.proxy], cells, width=11))


def run(options: Options) -> Section:
    """Measure every proxy at every rate."""
    say(" membership changing while peers start and stop")
    kinds = {kind.name: kind for kind in options.proxies}
    chosen = cases(options)
    samples = interleaved(
        chosen, options.rounds, lambda case: _run(kinds[case.proxy], case, options)
    )
    parts, drawn = [], []
    defaults = {name: kind.retries_by_default for name, kind in kinds.items()}
    for title, rate, after, usual in (
        ("1 change a second, killed at once", 1, 0.0, True),
        ("10 changes a second, killed at once", 10, 0.0, True),
        ("100 changes a second, killed at once", 100, 0.0, True),
        ("10 changes a second, killed 2 s later", 10, 2.0, True),
        ("10 changes a second, killed at once, retries the other way round", 10, 0.0, False),
    ):
        wanted = [
            case
            for case in chosen
            if case.variant["rate"] == rate
            and case.variant["kill_after"] == after
            and (case.variant["retries"] == defaults[case.proxy]) is usual
        ]
        note = "" if usual else (
            "\nWithout retries: nginx, HAProxy, Tidegate. With retries: Caddy, Traefik.\n"
        )
        parts.append(f"### {title}\n{note}\n{_table(wanted, samples)}")
        if rate == 10 and usual and not after:
            for case in wanted:
                own = of(samples, case)
                if not void(own):
                    share = [100 * sample.values["failed"] / sample.values["requests"] for sample in own]
                    drawn.append(
                        Bar(case.proxy, middle(share), min(share), max(share), case.proxy == Tidegate.name)
                    )
    about = paragraph(
        f"{PEERS} peers, each a process; a change starts one, adds it, removes the oldest and",
        f"kills that. {RATE:,.0f} requests a second over {CONNECTIONS} kept connections, which",
        "never retries; p99 is the median over the rounds, with range in brackets, of requests",
        "from the first change on; `p99 without churn` that of the seconds before. Failures are",
        f"summed over {options.rounds} rounds. 2 workers or threads each; nginx, HAProxy and",
        "Tidegate retry by default, Caddy and Traefik do not; the last table has it the other way",
        "round. The call is the proxy's own: nginx and Traefik only take note in it.",
        "`bench/scenes/churn.py`.",
    )
    text = "\n\n".join([about, *parts, "![failed requests](benchmarks/churn.svg)"])
    plot = bars("Failed requests, 10 changes a second, killed at once", "per cent", drawn)
    return Section(
        "churn", "(b) Membership changing", text, plots={"churn": plot}, data=as_data(samples)
    )
