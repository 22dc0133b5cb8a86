"""An engine and a watch without Docker, and a way to follow a source from a test.

What the engine answers was recorded on a real one (fixtures/swarm, fixtures/engine). Any call that
`docker_api.CALLS` does not promise fails the test that made it.
"""

from __future__ import annotations

import copy
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.discovery.base import Mode, Source
from agent.discovery.cluster import Change, Service, Task, TaskState
from agent.discovery.docker_api import CALLS, Filters, Fit, elements, whatever
from agent.discovery.swarm_watch import Transaction
from agent.errors import DiscoveryError, DockerRefused
from agent.model import EMPTY, Instance, SourceSnapshot, Workload

FIXTURES = Path(__file__).parent / "fixtures"
TIMEOUT = 10.0

_ALLOWED = re.compile("|".join(re.escape(c).replace(r"\{id\}", r"[\w.-]+") for c in CALLS))


def recorded(name: str) -> Any:
    """A recorded answer, fresh, to be changed at will."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def eventually(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait until a condition holds."""
    end = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {TIMEOUT} s: {what or condition}"
        time.sleep(0.002)
    return value


class FakeEvents:
    """An event stream that tests put events into; None ends it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.closed = False

    def put(self, event: dict[str, Any] | None) -> None:
        self._queue.put(event)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (event := self._queue.get()) is not None:
            yield event

    def close(self) -> None:
        self.closed = True
        self._queue.put(None)


class FakeEngine:
    """An engine that answers from `answers` (path to object), after `before` had a look."""

    version = "20.10.24"
    api_version = "1.41"
    host = ""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.calls: list[str] = []
        self.failing: dict[str, DiscoveryError] = {}
        self.before: Callable[[str], None] = lambda path: None
        self.streams: list[FakeEvents] = []
        self.event_filters: list[Filters] = []
        self.connections = 0
        self.down: DiscoveryError | None = None
        self.deaf: DiscoveryError | None = None
        self.attached: list[tuple[str, str]] = []

    def connect(self, fit: Fit = whatever) -> FakeEngine:
        if self.down:
            raise self.down
        self.connections += 1
        fit(self)
        return self

    def get(
        self, path: str, *, filters: Filters | None = None, params: Mapping[str, str] | None = None
    ) -> bytes:
        assert _ALLOWED.fullmatch(path), f"GET {path} is not among the promised calls"
        self.calls.append(path)
        self.before(path)
        if self.down:
            raise self.down
        if path in self.failing:
            raise self.failing[path]
        if path not in self.answers:
            raise DockerRefused(f"no such thing: {path}", status=404)
        answer = self.answers[path]
        if path == "/tasks" and filters:
            answer = [task for task in answer if _matches(task, filters)]
        return json.dumps(answer).encode()

    def each(self, path: str) -> Iterator[dict[str, Any]]:
        return elements([self.get(path)], path)

    def connect_network(self, network: str, container: str) -> None:
        self.attached.append((network, container))
        if error := self.failing.get(f"/networks/{network}/connect"):
            raise error

    def events(self, filters: Filters) -> FakeEvents:
        if self.deaf:
            raise self.deaf
        self.calls.append("/events")
        self.event_filters.append(filters)
        self.streams.append(FakeEvents())
        return self.streams[-1]

    def close(self) -> None:
        for stream in self.streams:
            if not stream.closed:
                stream.close()

    def say(self, event: dict[str, Any] | None) -> None:
        """Send an event to whoever listens."""
        eventually(lambda: self.streams, "somebody listens")
        self.streams[-1].put(event)


def _matches(task: Mapping[str, Any], filters: Filters) -> bool:
    """As the manager does it: any of the values of each filter; ids by prefix."""
    desired = filters.get("desired-state")
    ids = filters.get("id")
    return (desired is None or task["DesiredState"] in desired) and (
        ids is None or any(task["ID"].startswith(identity) for identity in ids)
    )


def swarm_engine() -> FakeEngine:
    """The manager that was recorded."""
    names = ("info", "swarm", "nodes", "networks", "services", "tasks")
    engine = FakeEngine({f"/{name}": recorded(f"swarm/{name}") for name in names})
    engine.answers[f"/networks/{HOST_NETWORK}"] = {
        "Id": HOST_NETWORK,
        "Name": "host",
        "Driver": "host",
        "Ingress": False,
    }
    return engine


NOTHING = SourceSnapshot(source="nothing", workloads={})
HOST_NETWORK = "vzs10af6pcugd2g1fuw1zravc"


class FakeWatch:
    """An open watch that tests put transactions or errors into."""

    def __init__(self, root: str, resume_from: int) -> None:
        self.root = root
        self.resume_from = resume_from
        self.closed = False
        self._queue: queue.SimpleQueue[Transaction | DiscoveryError] = queue.SimpleQueue()

    def send(self, *changes: Change, version: int = 0) -> float:
        """One transaction of the manager's store; returns when it was heard of."""
        heard_at = time.monotonic()
        self._queue.put(Transaction(changes=changes, version=version, heard_at=heard_at))
        return heard_at

    def fail(self, error: DiscoveryError) -> None:
        self._queue.put(error)

    def next(self, timeout: float) -> Transaction | None:
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, DiscoveryError):
            raise item
        return item

    def close(self) -> None:
        self.closed = True


class FakeManager:
    """Opens watches; `refuse` is raised instead, once for each entry, or for good with `closed`."""

    def __init__(self) -> None:
        self.watches: list[FakeWatch] = []
        self.attempts: list[int] = []
        self.refuse: list[DiscoveryError] = []
        self.closed: DiscoveryError | None = None
        self.before: Callable[[FakeWatch], None] = lambda watch: None

    def open(self, root: str, resume_from: int) -> FakeWatch:
        self.attempts.append(resume_from)
        if self.closed:
            raise self.closed
        if self.refuse:
            raise self.refuse.pop(0)
        watch = FakeWatch(root, resume_from)
        self.before(watch)
        self.watches.append(watch)
        return watch

    @property
    def watch(self) -> FakeWatch:
        """The newest one."""
        found: FakeWatch = eventually(lambda: self.watches and self.watches[-1], "a watch is open")
        return found


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.syncs: list[bool] = []
        self.modes: list[str] = []

    def event(self, source: str, kind: str) -> None:
        self.events.append((source, kind))

    def sync(self, source: str, *, ok: bool, seconds: float) -> None:
        assert seconds >= 0
        self.syncs.append(ok)

    def mode(self, source: str, mode: Mode) -> None:
        self.modes.append(mode)


class Following:
    """What a running source has published so far."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.snapshots: list[SourceSnapshot] = []

    @property
    def last(self) -> SourceSnapshot:
        found: SourceSnapshot = eventually(lambda: self.snapshots, "it published")[-1]
        return found

    def workload(self, name: str) -> Workload | None:
        """A workload of the newest snapshot."""
        return named(self.last, name)

    def states(self, name: str) -> list[str]:
        """States of a workload's instances in the newest snapshot."""
        workload = self.workload(name)
        return [str(instance.state) for instance in workload.instances] if workload else []

    def until(self, condition: Callable[[], object], what: str = "") -> SourceSnapshot:
        """Wait until a condition holds; returns the newest snapshot."""
        eventually(condition, what)
        return self.snapshots[-1] if self.snapshots else NOTHING


@contextmanager
def following(source: Source) -> Iterator[Following]:
    """Run a source in a thread; it must end promptly when it is told to."""
    follower, stop = Following(source), threading.Event()
    thread = threading.Thread(target=source.run, args=(follower.snapshots.append, stop))
    thread.start()
    try:
        yield follower
    finally:
        stop.set()
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "the source did not end"


def named(snapshot: SourceSnapshot, name: str) -> Workload | None:
    """A workload of a snapshot by its name."""
    return next((w for w in snapshot.workloads.values() if w.name == name), None)


def only(workload: Workload | None) -> Instance:
    """The one instance of a workload."""
    assert workload is not None
    (instance,) = workload.instances
    return instance


def make_service(identity: str, version: int = 1, **fields: Any) -> Service:
    """A replicated service on the network `net`."""
    values: dict[str, Any] = {
        "name": identity,
        "created": 0.0,
        "labels": EMPTY,
        "template_labels": EMPTY,
        "targets": ("net",),
        "ports": (),
        "replicas": 1,
        "job": False,
    }
    return Service(id=identity, version=version, **(values | fields))


def make_task(identity: str, service: str, version: int = 1, **fields: Any) -> Task:
    """A task that runs and shall."""
    values: dict[str, Any] = {
        "slot": 1,
        "node": "n1",
        "state": TaskState.RUNNING,
        "desired": TaskState.RUNNING,
        "error": "",
        "addresses": (("net", "10.0.0.1"),),
        "published": (),
    }
    return Task(id=identity, service=service, version=version, **(values | fields))


def rest_task(engine: FakeEngine, service: str) -> dict[str, Any]:
    """The engine's own record of a running task of a service, to be changed in place."""
    found = next(s["ID"] for s in engine.answers["/services"] if s["Spec"]["Name"] == service)
    tasks = engine.answers["/tasks"]
    task: dict[str, Any] = next(
        t for t in tasks if t["ServiceID"] == found and t["Status"]["State"] == "running"
    )
    return task


def touched(record: dict[str, Any], version: int, **fields: Any) -> dict[str, Any]:
    """Change a record of the engine in place, as one transaction of the manager would."""
    record |= copy.deepcopy(fields) | {"Version": {"Index": version}}
    return record
