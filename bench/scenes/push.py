"""From the call to routing: how long until every worker has let go of the old peer.

The only peer of a host is replaced by another one that stands ready. Requests come all the while,
each on a new connection and so to any worker. Counted from just before the call: the first answer
of the new peer, and the last request that still went to the old one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.backends import Standing
from bench.load import Result
from bench.plot import Bar, bars
from bench.proxies.base import BenchError, Proxy, Setup, free_port
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import Nginx
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import Traefik, TraefikFast
from bench.report import Section, paragraph, quantiles, table
from bench.scenes.common import (
    Case,
    Options,
    Sample,
    answered_at,
    as_data,
    directory,
    expect_only,
    interleaved,
    load,
    of,
    place,
    pooled,
    say,
    values,
    void,
)

HOST = "app.localhost"
RATE = 1000.0


def since_call(
    result: Result, calls: Sequence[tuple[float, str, str]], until: float
) -> tuple[list[float], list[float]]:
    """Milliseconds from each call to the first answer of the new and the last to the old peer.

    Args:
        calls: Unix time of each, the peer that it removes, the one that it adds; no peer comes
            back once it was removed.
        until: Unix time at which the last change has to be in force.

    Raises:
        BenchError: a change was not in force by the next one.
    """
    first_answer: dict[str, float] = {}
    last_due: dict[str, float] = {}
    for record in result.records:
        due, at = result.started_at + record.due, answered_at(result, record)
        first_answer[record.backend] = min(at, first_answer.get(record.backend, at))
        last_due[record.backend] = max(due, last_due.get(record.backend, due))
    first, last = [], []
    ends = [*(at for at, _old, _new in calls[1:]), until]
    for (at, old, new), end in zip(calls, ends, strict=True):
        if new not in first_answer or first_answer[new] > end:
            raise BenchError("a new peer had not answered by the next change")
        if last_due.get(old, at) > end:
            raise BenchError("an old peer still answered at the next change")
        first.append((first_answer[new] - at) * 1000)
        last.append(max(0.0, (last_due.get(old, at) - at) * 1000))
    return first, last


def _run(kind: type[Proxy], options: Options) -> Mapping[str, Any]:
    changes = 3 if kind.long_wait > 1 else 5 if options.quick else 15
    with directory() as home:
        # Each peer only once: who answers tells which change was in force.
        backends = Standing(home, [free_port() for _ in range(changes + 1)])
        proxy = kind()
        try:
            current = backends.peers[0]
            proxy.start(Setup(place(home, "proxy"), {HOST: (current,)}))
            calls, took = [], []
            with load(proxy, HOST, rate=RATE, keepalive=False) as running:
                for new in backends.peers[1:]:
                    # Not in step with anything; the held-back ones have to be through.
                    time.sleep(random.uniform(0.2, 0.3) + kind.long_wait * 1.1)
                    calls.append((time.time(), current.id, new.id))
                    before = time.monotonic()
                    proxy.change(HOST, add=[new], remove=[current])
                    took.append((time.monotonic() - before) * 1000)
                    current = new
                time.sleep(0.3 + kind.long_wait * 1.1)
                until = time.time()
                result = running.stop()
            expect_only(proxy, HOST, proxy.routes[HOST], within=5)
        finally:
            proxy.stop()
            backends.stop()
    first, last = since_call(result, calls, until)
    return {"failed": result.failed, "call_ms": took, "first_ms": first, "last_ms": last}


def run(options: Options) -> Section:
    """Measure every proxy that can change."""
    say(" from the call to routing")
    kinds = {
        kind.name: kind
        for kind in options.among(Tidegate, Nginx, HAProxy, Caddy, Traefik, TraefikFast)
    }
    chosen = [Case(name) for name in kinds]
    samples = interleaved(chosen, options.rounds, lambda case: _run(kinds[case.proxy], options))
    found, drawn = [], []
    for case in chosen:
        own = of(samples, case)
        told = void(own) or kinds[case.proxy].how
        for label, name in (
            ("call", "call_ms"),
            ("first answer of the new peer", "first_ms"),
            ("last request to the old peer", "last_ms"),
        ):
            numbers = ["", "", "", ""] if void(own) else quantiles(pooled(own, name))
            failed = "" if void(own) else f"{sum(values(own, 'failed')):.0f}"
            found.append([case.proxy, told, label, *numbers, failed])
        if not void(own):
            drawn.append(_bar(case, own))
    about = paragraph(
        "The only peer of a host is replaced, on an otherwise idle machine;",
        f"{RATE:,.0f} requests a second meanwhile, each on a new connection. Milliseconds from",
        f"just before the call; {options.rounds} interleaved rounds, all changes together. A",
        "request and its connection take some tenths of a millisecond, and the next one is due",
        "within 1 ms:",
        "both are part of each figure. 2 workers or threads each. `bench/scenes/push.py`.",
    )
    head = ["proxy", "how", "what", "changes", "p50", "p99", "max", "requests failed"]
    text = f"{about}\n\n{table(head, found)}\n\n![from the call to routing](benchmarks/push.svg)"
    plot = bars("From the call to the first answer of the new peer", "ms, median and p99", drawn)
    return Section(
        "push",
        "(c) From the push to all workers",
        text,
        plots={"push": plot},
        data=as_data(samples),
    )


def _bar(case: Case, own: list[Sample]) -> Bar:
    ordered = pooled(own, "first_ms")
    _count, p50, p99, _largest = (float(cell) for cell in quantiles(ordered))
    return Bar(case.proxy, p50, ordered[0], p99, case.proxy == Tidegate.name)
