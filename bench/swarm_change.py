"""From the manager's store to routing, on a real two-node Swarm in watch mode.

The pair is deployed from the project's own stack file. A service goes from one task to two and
back. A change is in the manager's store when the task has become RUNNING there (the task's
`UpdatedAt`, by the same clock as ours: it is one machine); it is routed when the new task first
answers a request. Beside it stands the agent's own histogram: from hearing of a change to every
worker's routing by it.

What shares the machine with the change is kept small, or its own load would be measured: a light
constant load that counts failures, one cheap prober for each proxy from the scaling to the first
answer, and no question to Docker before that.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.load import LoadProcess, Plan, Result
from bench.report import Section, paragraph, quantiles, table
from tests.lab import Lab, LabError
from tests.lab.util import Progress
from tests.swarm.pair import Pair

APP = "bench"
RATE = 100.0
PROBE_RATE = 1000.0
_LIMIT_SECONDS = 30.0
_PROBER = Path(__file__).with_name("first_answer.py")
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


def running_tasks(pair: Pair, app: str) -> dict[str, float]:
    """Short container id to the Unix time at which the store had the task RUNNING."""
    manager = pair.lab.manager
    ids = pair.lab.docker(
        manager, "service", "ps", "--quiet", "--no-trunc", "--filter=desired-state=running", app
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


def _scale(pair: Pair, replicas: int) -> None:
    pair.lab.docker(pair.lab.manager, "service", "scale", "--detach", f"{APP}={replicas}")


def _settled(pair: Pair, replicas: int) -> dict[str, float]:
    """The tasks in the store, once there are so many of them and they are all the peers."""
    pair.wait_peers(APP, replicas)
    pair.lab.wait_for(
        lambda: len(running_tasks(pair, APP)) == replicas, 30, f"{replicas} tasks of {APP} run"
    )
    return running_tasks(pair, APP)


def _add_task(pair: Pair, known: set[str]) -> tuple[str, list[float]]:
    """Scale to two, and wait for the new task's first answer through each proxy.

    Returns:
        Its container, and the Unix time of the answer by proxy.

    Raises:
        LabError: it did not answer, or requests failed meanwhile.
    """
    lab = pair.lab
    words = [f"{APP}.test", str(PROBE_RATE), str(_LIMIT_SECONDS), *sorted(known)]
    probers = [
        lab.client_popen(sys.executable, "-I", "-S", _PROBER, url, *words) for url in pair.urls()
    ]
    try:
        time.sleep(0.3)  # the start of an interpreter is over before anything changes
        _scale(pair, 2)
        answers: list[dict[str, Any]] = [
            json.loads(prober.communicate(timeout=_LIMIT_SECONDS + 10)[0] or "{}")
            for prober in probers
        ]
    except subprocess.TimeoutExpired as problem:
        raise LabError("a prober did not come to an end") from problem
    finally:
        for prober in probers:
            prober.kill()
            prober.wait()
    found = {str(answer.get("backend", "")) for answer in answers}
    if len(found) != 1 or "" in found or any(answer["failed"] for answer in answers):
        raise LabError(f"the new task of {APP} was not answered alike by all: {answers}")
    return found.pop(), [float(answer["at"]) for answer in answers]


def first_answers(result: Result) -> dict[str, float]:
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
    """Scale up and down that many times under a light load."""
    lab = pair.lab
    lab.docker(lab.manager, "service", "rm", APP, check=False)
    # A health check, so that RUNNING means that the app listens: its start is not ours to measure.
    pair.create_app(APP, "--health-cmd=true", "--health-interval=1s", replicas=1)
    times: list[list[float]] = []
    before = _applied(pair)
    with contextlib.ExitStack() as stack:
        plans = [
            Plan(urls=(url,), hosts=(f"{APP}.test",), rate=RATE, connections=4)
            for url in pair.urls()
        ]
        prefix = tuple(lab.client_command())
        loads = [stack.enter_context(LoadProcess(plan, prefix=prefix)) for plan in plans]
        known = set(_settled(pair, 1))
        for number in range(1, changes + 1):
            container, answers = _add_task(pair, known)
            in_store = _settled(pair, 2)
            if container not in in_store:
                raise LabError(f"{container} answered, and is no task of {APP}")
            times.append([(at - in_store[container]) * 1000 for at in answers])
            _scale(pair, 1)
            known = set(_settled(pair, 1))
            if number % 10 == 0:
                print(f"  {number} of {changes} scalings", flush=True)
        results = [load.stop() for load in loads]
    after = _applied(pair)
    pair.remove_app(APP)

    rows = [
        [f"routed by {node.name}", *quantiles(own)]
        for node, own in zip(lab.nodes, zip(*times, strict=True), strict=True)
    ]
    rows.append(["routed by both", *quantiles([max(both) for both in times])])
    requests = sum(result.requests for result in results)
    failed = sum(result.failed for result in results)
    about = paragraph(
        f"A service scaled from 1 task to 2 and back, {changes} times, with {RATE:.0f} requests a",
        f"second through each of {len(lab.nodes)} proxies (kept connections, no retries):",
        f"{requests:,} requests, {failed} failed. While it scales, {PROBE_RATE:.0f} more a second",
        "through each, one after the other, tell when the new task answers. Milliseconds from the",
        "task's being RUNNING in the manager's store (it has a health check, so that it listens by",
        "then) to its first answer to a client. That includes SwarmKit's Watch, the agent, the",
        "push, the admission probe (a TCP connect over the overlay network), the wait for the next",
        f"request ({1000 / PROBE_RATE:.0f} ms) and for the task's turn (every other one), and the",
        "request itself. Two dockerds, two proxies and the starting container share the machine's",
        "cores. `bench/swarm_change.py`.",
    )
    own_times = paragraph(
        "The agent's own `tidegate_change_to_applied_seconds` over the same time, additions and",
        "removals, per proxy: from hearing of a change until every nginx worker routes by it.",
    )
    text = "\n\n".join(
        (
            about,
            table(["store to routed", "changes", "p50", "p99", "max"], rows),
            own_times,
            table(["at most ms", "changes", "share"], histogram_rows(before, after)),
        )
    )
    return Section("change-swarm", "From the manager's store to routing, on a real Swarm", text)
