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
from dataclasses import dataclass
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
    FAULTS,
    Case,
    Options,
    Sample,
    as_data,
    directory,
    expect_only,
    load,
    median,
    middle,
    of,
    place,
    reason,
    rows,
    say,
    tell,
    values,
    void,
    window,
)

HOST = "app.localhost"
PEERS = 4
RATE = 2000.0
CONNECTIONS = 32
_SETTLE = 0.5
_UNDER_WAY = 0.1
"""What was due so many seconds before a change may have been under way in it."""


@dataclass(frozen=True)
class Phase:
    """Some seconds of changes.

    Attributes:
        rate: changes a second.
        kill_after: seconds from the return of the call to the death of the removed peer.
    """

    title: str
    rate: int
    kill_after: float
    seconds: float


PHASES = (
    Phase("1 change a second, killed at once", 1, 0.0, 3.0),
    Phase("10 changes a second, killed at once", 10, 0.0, 2.5),
    Phase("10 changes a second, killed 2 s later", 10, 2.0, 1.5),
    Phase("100 changes a second, killed at once", 100, 0.0, 1.5),
)
OTHER_WAY = (PHASES[1],)
"""What is measured with retries the other way round."""


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


def _case(kind: type[Proxy], retries: bool, phase: Phase) -> Case:
    variant = {"rate": phase.rate, "kill_after": phase.kill_after, "retries": retries}
    return Case(kind.name, variant)


def _phase(
    proxy: Proxy, backends: Living, phase: Phase, seconds: float
) -> tuple[float, float, Mapping[str, Any]]:
    """One phase: Unix times of its begin and end, and what is known without the load."""
    began, cpu = time.time(), processes.cpu_seconds(proxy.roots())
    calls, over = _churn(proxy, backends, phase.rate, seconds, phase.kill_after)
    cpu = processes.cpu_seconds(proxy.roots()) - cpu
    took = over - began
    # What the last change broke is broken by it, also a moment later.
    time.sleep(_SETTLE)
    ended = time.time()
    expect_only(proxy, HOST, proxy.routes[HOST], within=5 + 3 * proxy.long_wait)
    return (
        began - _UNDER_WAY,
        ended,
        {
            "calls_per_second": len(calls) / seconds,
            "call_ms": middle(calls) * 1000,
            "cpu_per_10s": cpu / took * 10,
        },
    )


def _run(
    kind: type[Proxy], retries: bool, phases: Sequence[Phase], number: int, options: Options
) -> list[Sample]:
    """One start of a proxy: in peace first, then phase by phase, each from a settled state."""
    quiet = 1.0 if options.quick else 1.5
    samples: list[Sample] = []
    marks: list[tuple[Phase, float, float, Mapping[str, Any]]] = []
    error = ""
    with directory() as home:
        backends = Living(home)
        proxy = kind()
        try:
            peers = tuple(backends.start() for _ in range(PEERS))
            proxy.start(Setup(place(home, "proxy"), {HOST: peers}, retries=retries))
            with load(proxy, HOST, rate=RATE, connections=CONNECTIONS) as running:
                started = time.time()
                time.sleep(0.5 + quiet)
                before = (started + 0.5, time.time() - _UNDER_WAY)
                for phase in phases:
                    seconds = 1.0 if options.quick else phase.seconds
                    marks.append((phase, *_phase(proxy, backends, phase, seconds)))
                result = running.stop()
        except FAULTS as problem:
            error = reason(problem)
        finally:
            proxy.stop()
            backends.stop()
    if not error:
        calm = window(result, *before)
        if calm.failed:
            error = f"{calm.failed} requests failed before anything was changed"
    for phase in phases:
        case = _case(kind, retries, phase)
        if error:
            samples.append(Sample(case, number, error=error))
            continue
        began, ended, known = next(mark[1:] for mark in marks if mark[0] is phase)
        during = window(result, began, ended)
        samples.append(
            Sample(
                case,
                number,
                {
                    "requests": during.requests,
                    "failed": during.failed,
                    "closed": during.closed,
                    "p50": during.p50,
                    "p99": during.p99,
                    "p999": during.p999,
                    "p99_without": calm.p99,
                    "p99_ratio": during.p99 / max(calm.p99, 0.001),
                    "reconnects": sum(1 for at in result.reconnected if began <= at < ended),
                    "lag_p99": result.lag_ms_p99,
                    **known,
                },
            )
        )
    for sample in samples:
        tell(sample)
    return samples


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
            f"{middle(values(own, 'lag_p99')):.1f}",
        ]

    head = ["proxy", "failed", "with a retrying client", "connections closed under way"]
    head += ["idle ones closed", "p50 ms", "p99", "p99.9", "p99 without churn", "call ms"]
    head += ["calls/s reached", "CPU s in 10 s", "client's own lag p99"]
    return table(head, rows(chosen, samples, lambda case: [case.proxy], cells, width=12))


def run(options: Options) -> Section:
    """Measure every proxy at every rate."""
    say(" membership changing while peers start and stop")
    kinds = options.among(Tidegate, Nginx, HAProxy, Caddy, Traefik, TraefikFast)
    turns = [(kind, usual) for kind in kinds for usual in (True, False)]
    samples: list[Sample] = []
    for number in range(options.rounds):
        turn = number % len(turns)
        for kind, usual in [*turns[turn:], *turns[:turn]]:
            retries = kind.retries_by_default is usual
            samples += _run(kind, retries, PHASES if usual else OTHER_WAY, number, options)
    parts = []
    for usual, phases in ((True, PHASES), (False, OTHER_WAY)):
        for phase in phases:
            wanted = [_case(kind, kind.retries_by_default is usual, phase) for kind in kinds]
            note = "" if usual else _NOTE
            title = phase.title if usual else f"{phase.title}, retries the other way round"
            parts.append(f"### {title}\n{note}\n{_table(wanted, samples)}")
    about = paragraph(
        f"{PEERS} peers, each a process; a change starts one, adds it, removes the oldest and",
        f"kills that. {RATE:,.0f} requests a second over {CONNECTIONS} kept connections, from a",
        "client that never retries; latency of requests from the first change on, median over the",
        "rounds with range in brackets; `p99 without churn` is that of the second before. Failures",
        f"are summed over {options.rounds} interleaved rounds. 2 workers or threads each; nginx,",
        "HAProxy and Tidegate retry by default, Caddy and Traefik do not; the last table has it",
        "the other way round. The call is the proxy's own: nginx and Traefik only take note in it.",
        "`bench/scenes/churn.py`.",
    )
    text = "\n\n".join([about, *parts, "![failed requests](benchmarks/churn.svg)"])
    plot = bars(
        "Failed requests, 10 changes a second, killed at once", "per cent", _bars(kinds, samples)
    )
    return Section(
        "churn", "(b) Membership changing", text, plots={"churn": plot}, data=as_data(samples)
    )


_NOTE = "\nWithout retries: nginx, HAProxy, Tidegate. With retries: Caddy, Traefik.\n"


def _bars(kinds: Sequence[type[Proxy]], samples: Sequence[Sample]) -> list[Bar]:
    drawn = []
    for kind in kinds:
        own = of(samples, _case(kind, kind.retries_by_default, PHASES[1]))
        if not void(own):
            share = [100 * one.values["failed"] / one.values["requests"] for one in own]
            bar = Bar(kind.name, middle(share), min(share), max(share), kind is Tidegate)
            drawn.append(bar)
    return drawn
