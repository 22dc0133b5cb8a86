"""What scenes share: interleaved rounds, samples that may be void, load and windows of it.

A sample is one run of one proxy. Rounds take turns between the cases, in an order that rotates, so
that what else the machine does falls on all of them alike. A run whose proxy did not serve what it
should is an error and not a number, and then the case has no numbers at all.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.load import LoadProcess, Plan, Record, Result, percentile
from bench.proxies.base import BenchError, Peer, Proxy
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import Nginx, NginxStatic
from bench.proxies.tidegate import Tidegate, TidegateOneHost
from bench.proxies.traefik import Traefik, TraefikFast
from bench.report import spread
from demo.pair import DemoError, probe

ALL: tuple[type[Proxy], ...] = (
    Tidegate,
    TidegateOneHost,
    NginxStatic,
    Nginx,
    HAProxy,
    Caddy,
    Traefik,
    TraefikFast,
)
CLOSED = frozenset({"closed", "reset"})
"""Failures that a client which tries again hides: the connection was closed under its request."""


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        rounds: of each case.
        quick: a smoke run: everything runs, and no figure means anything.
        proxies: those that are on this machine and wanted.
    """

    rounds: int
    quick: bool
    proxies: tuple[type[Proxy], ...]

    def among(self, *kinds: type[Proxy]) -> tuple[type[Proxy], ...]:
        """Those of `kinds` that are to be measured, in that order."""
        return tuple(kind for kind in kinds if kind in self.proxies)


@dataclass(frozen=True)
class Case:
    """A row of a table: a proxy in some variation of the scene."""

    proxy: str
    variant: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.proxy, *(f"{key} {value}" for key, value in self.variant.items())])


@dataclass(frozen=True)
class Sample:
    """What one run found; `error` says why it is void."""

    case: Case
    round: int
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def say(line: str) -> None:
    """Tell the person who watches."""
    print(line, flush=True)


def interleaved(
    cases: Sequence[Case], rounds: int, run: Callable[[Case], Mapping[str, Any]]
) -> list[Sample]:
    """Run every case in every round; what goes wrong voids that one sample."""
    samples = []
    for number in range(rounds):
        turn = number % max(1, len(cases))
        for case in [*cases[turn:], *cases[:turn]]:
            samples.append(attempt(case, number, run))
    return samples


FAULTS = (BenchError, DemoError, OSError, RuntimeError)
"""What voids a sample."""


def attempt(case: Case, number: int, run: Callable[[Case], Mapping[str, Any]]) -> Sample:
    """One run, void if it goes wrong; number -1 is before the first round."""
    try:
        sample = Sample(case, number, run(case))
    except FAULTS as problem:
        sample = Sample(case, number, error=reason(problem))
    tell(sample)
    return sample


def reason(problem: BaseException) -> str:
    """Why a sample is void, in a line."""
    return str(problem).strip().replace("\n", " ")[:300] or type(problem).__name__


def tell(sample: Sample) -> None:
    """Tell the person who watches."""
    told = f"void: {sample.error}" if sample.error else _told(sample.values)
    what = f"round {sample.round + 1}" if sample.round >= 0 else "before the first round"
    say(f"  {what}, {sample.case}: {told}")


def _told(values: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def of(samples: Sequence[Sample], case: Case) -> list[Sample]:
    """The samples of one case."""
    return [sample for sample in samples if sample.case == case]


def void(samples: Sequence[Sample]) -> str:
    """Why these samples give no numbers; empty if they do."""
    bad = [sample.error for sample in samples if sample.error]
    if bad:
        return f"failed in {len(bad)} of {len(samples)} rounds: {bad[0]}"
    return "" if samples else "not measured"


def values(samples: Sequence[Sample], name: str) -> list[float]:
    """One figure over the rounds."""
    return [float(sample.values[name]) for sample in samples]


def pooled(samples: Sequence[Sample], name: str) -> list[float]:
    """A list of figures, those of all rounds together, sorted."""
    return sorted(float(value) for sample in samples for value in sample.values[name])


def rows(
    cases: Sequence[Case],
    samples: Sequence[Sample],
    head: Callable[[Case], Sequence[str]],
    cells: Callable[[list[Sample]], Sequence[str]],
    *,
    width: int,
) -> list[list[str]]:
    """A row for each case: `head`, then `cells` or why there are none; `width` cells."""
    found = []
    for case in cases:
        own = of(samples, case)
        reason = void(own)
        told = [reason, *[""] * (width - 1)] if reason else list(cells(own))
        found.append([*head(case), *told])
    return found


def median(samples: Sequence[Sample], name: str, digits: int = 1) -> str:
    """Median and range of one figure, as a cell."""
    return spread(values(samples, name), digits)


def middle(numbers: Sequence[float]) -> float:
    """Median."""
    return statistics.median(numbers)


def as_data(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(sample) for sample in samples]


# Running


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def place(parent: Path, name: str) -> Path:
    """A directory of one proxy's own."""
    path = parent / name
    path.mkdir()
    return path


@dataclass(frozen=True)
class Window:
    """What came of the requests that were due in some time; milliseconds, of successful ones.

    Attributes:
        failed: all that failed, those of closed connections included.
        closed: those whose connection was closed under way, which a retrying client hides.
    """

    requests: int
    failed: int
    closed: int
    p50: float
    p99: float
    p999: float


def window(result: Result, since: float, until: float) -> Window:
    """The requests that were due between these Unix times."""
    found = [r for r in result.records if since <= result.started_at + r.due < until]
    latencies = sorted(record.latency_ms for record in found if not record.kind)
    return Window(
        requests=len(found),
        failed=sum(1 for record in found if record.kind),
        closed=sum(1 for record in found if record.kind in CLOSED and not record.status),
        p50=percentile(latencies, 0.5),
        p99=percentile(latencies, 0.99),
        p999=percentile(latencies, 0.999),
    )


def answered_at(result: Result, record: Record) -> float:
    """Unix time of the answer."""
    return result.started_at + record.due + record.latency_ms / 1000


def load(proxy: Proxy, host: str, **plan: Any) -> LoadProcess:
    """Constant load on a host, with every request recorded, and who answered."""
    url = f"http://127.0.0.1:{proxy.port}/"
    return LoadProcess(
        Plan(urls=(url,), hosts=(host,), backend_header="X-Backend", keep_records=True, **plan)
    )


def expect_only(proxy: Proxy, host: str, peers: Sequence[Peer], *, within: float) -> None:
    """Wait until all of these peers answer, and nobody else.

    Raises:
        BenchError: that is not so in time: what was measured is not what it was meant to be.
    """
    names = {peer.id for peer in peers}
    wanted = max(20, 5 * len(names))
    end = time.monotonic() + within
    while True:
        answers = [probe(proxy.port, host) for _ in range(wanted)]
        seen = {answer.backend for answer in answers}
        if seen == names:
            return
        if time.monotonic() > end:
            told = ", ".join(sorted(name or "an error" for name in seen))
            raise BenchError(
                f"{proxy.name} should be answered by {', '.join(sorted(names))}; it was: {told}"
            )
        time.sleep(0.02)
