"""From the manager's store to routing, on a real two-node Swarm in watch mode.

The pair is deployed from the project's own stack file. A service goes from one task to two and
back; requests go to each proxy at a constant rate, from a network namespace of their own. A change
is in the manager's store when the task has become RUNNING there (the task's `UpdatedAt`, by the
same clock as ours: it is one machine); it is routed when the new task first answers a request.
Beside it stands the agent's own histogram: from hearing of a change to every worker's routing
by it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterator

from bench.load import LoadProcess, Plan, Result
from bench.report import Section, paragraph, quantiles, table
from tests.lab import Lab, LabError
from tests.lab.util import Progress
from tests.swarm.pair import Pair

APP = "bench"
RATE = 500.0
_BUCKET = re.compile(
    r'^tidegate_change_to_applied_seconds_bucket\{kind="membership",le="([^"]+)"\} (\S+)$',
    re.MULTILINE,
)


@contextlib.contextmanager
def deployed(name: str = "bench") -> Iterator[Pair]:
    """The pair on a lab of its own, which is removed at the end."""
    lab = Lab.up(name, progress=Progress(show=True))
    try:
        pair = Pair(lab)
        pair.build()
        pair.deploy(watch="on")
        yield pair
    finally:
        Lab.down(name)


def _running(pair: Pair) -> dict[str, float]:
    """Short container id to the Unix time at which the store had the task RUNNING."""
    manager = pair.lab.manager
    ids = pair.lab.docker(
        manager, "service", "ps", "--quiet", "--no-trunc", "--filter=desired-state=running", APP
    ).split()
    found = {}
    for task in json.loads(pair.lab.docker(manager, "inspect", *ids)):
        if task["Status"]["State"] == "running":
            container = task["Status"]["ContainerStatus"]["ContainerID"][:12]
            found[container] = _unix(task["UpdatedAt"])
    return found


def _unix(text: str) -> float:
    """Docker's time stamps have nanoseconds, which `fromisoformat` does not take."""
    seconds, _, fraction = text.rstrip("Z").partition(".")
    moment = datetime.datetime.fromisoformat(seconds).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or '0'}")


def _scale(pair: Pair, replicas: int) -> dict[str, float]:
    lab = pair.lab
    lab.docker(lab.manager, "service", "scale", "--detach", f"{APP}={replicas}")
    pair.wait_peers(APP, replicas)
    lab.wait_for(lambda: len(_running(pair)) == replicas, 30, f"{replicas} running tasks of {APP}")
    return _running(pair)


def _first_answers(result: Result) -> dict[str, float]:
    """Unix time of the first answer of each backend."""
    first: dict[str, float] = {}
    for record in result.records:
        at = result.started_at + record.due + record.latency_ms / 1000
        if record.backend:
            first[record.backend] = min(at, first.get(record.backend, at))
    return first


def _applied(pair: Pair) -> dict[float, float]:
    """The agent's histogram of membership changes: upper bound in seconds to cumulated count."""
    found = _BUCKET.findall(pair.agent_metrics())
    return {float(bound): float(count) for bound, count in found}


def histogram_rows(before: dict[float, float], after: dict[float, float]) -> list[list[str]]:
    """Bounds (ms) and cumulated share of what came between two looks at a histogram."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    total = counts[max(counts)]
    rows = []
    for bound, count in counts.items():
        if total and bound != float("inf"):
            rows.append([f"{bound * 1000:g}", f"{count:.0f}", f"{count / total:.1%}"])
            if count == total:
                break
    return rows


def measure(pair: Pair, changes: int) -> Section:
    """Scale up and down that many times under load."""
    lab = pair.lab
    lab.docker(lab.manager, "service", "rm", APP, check=False)
    # A health check, so that RUNNING means that the app listens: its start is not ours to measure.
    pair.create_app(APP, "--health-cmd=true", "--health-interval=1s", replicas=1)
    in_store: dict[str, float] = {}
    before = _applied(pair)
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(
                LoadProcess(
                    Plan(
                        urls=pair.urls((node,)),
                        hosts=(f"{APP}.test",),
                        rate=RATE,
                        connections=4,
                        backend_header="X-Backend",
                        keep_records=True,
                    ),
                    prefix=tuple(lab.client_command()),
                )
            )
            for node in lab.nodes
        ]
        known = set(_running(pair))
        for number in range(1, changes + 1):
            for container, moment in _scale(pair, 2).items():
                if container not in known:
                    in_store[container] = moment
                    known.add(container)
            _scale(pair, 1)
            if number % 10 == 0:
                print(f"  {number} of {changes} scalings", flush=True)
        results = [load.stop() for load in loads]
    after = _applied(pair)
    pair.remove_app(APP)

    rows = []
    everywhere: dict[str, float] = {}
    for node, result in zip(lab.nodes, results, strict=True):
        first = _first_answers(result)
        missing = set(in_store) - set(first)
        if missing:
            raise LabError(f"{len(missing)} tasks never answered through {node.name}")
        times = [(first[container] - moment) * 1000 for container, moment in in_store.items()]
        rows.append([f"routed by {node.name}", *quantiles(times)])
        for container, moment in in_store.items():
            ms = (first[container] - moment) * 1000
            everywhere[container] = max(ms, everywhere.get(container, ms))
    rows.append(["routed by both", *quantiles(list(everywhere.values()))])
    requests = sum(result.requests for result in results)
    failed = sum(result.failed for result in results)
    about = paragraph(
        f"A service scaled from 1 task to 2 and back, {changes} times, with {RATE:.0f} requests a",
        f"second through each of {len(lab.nodes)} proxies (kept connections, no retries):",
        f"{requests:,} requests, {failed} failed. Milliseconds from the task's being RUNNING in",
        "the manager's store (it has a health check, so that it listens by then) to its first",
        "answer to a client. That includes SwarmKit's Watch, the agent, the push, the admission",
        "probe (a TCP connect over the overlay network), the wait",
        f"for the next request ({1000 / RATE:.0f} ms) and for the task's turn (every other one),",
        "and the request itself. Two dockerds, two proxies, two load generators and the starting",
        "container share the machine's cores. `bench/swarm_change.py`.",
    )
    own = paragraph(
        "The agent's own `tidegate_change_to_applied_seconds` over the same time, additions and",
        "removals, per proxy: from hearing of a change until every nginx worker routes by it.",
    )
    text = "\n\n".join(
        (
            about,
            table(["store to routed", "changes", "p50", "p99", "max"], rows),
            own,
            table(["at most ms", "changes", "share"], histogram_rows(before, after)),
        )
    )
    return Section("change-swarm", "From the manager's store to routing, on a real Swarm", text)
