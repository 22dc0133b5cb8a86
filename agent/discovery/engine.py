"""Containers of a plain engine, by its events.

Events are subscribed to first, then everything is listed; an event has its container inspected
anew, so nothing is ever concluded from an event alone, except that a stop signal was sent (`kill`
comes then, `die` only when the process has gone, up to the whole grace period later) and that it
is gone. What is asked of the engine is asked beside the loop: an answer that takes its time makes
no event wait. Nothing here knows Swarm services.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from agent.config.settings import Settings
from agent.discovery.attach import Link, missing_links, refusal
from agent.discovery.base import (
    STOP_CHECK,
    Backoff,
    Observer,
    Publish,
    Reporter,
    SourceStatus,
)
from agent.discovery.containers import STOP_SIGNALS, Container, container, signal_number
from agent.discovery.docker_api import Connect, Engine, EventStream, Filters, parse, read
from agent.discovery.swarm_rest import NOT_FOUND
from agent.errors import DiscoveryError, DockerRefused, DockerUnavailable
from agent.labels import rules_of
from agent.model import (
    Instance,
    InstanceState,
    ProxyInstance,
    PublishedPort,
    Rejection,
    SourceSnapshot,
    Workload,
    WorkloadKey,
)

NAME = "engine"

_log = logging.getLogger(__name__)

TASK_LABEL = "com.docker.swarm.service.id"

DRAIN_LIMIT = 600.0
"""Seconds after which a container that was signalled and still runs is taken for alive again."""

SILENCE_LIMIT = 600.0
"""Seconds without an event after which the stream is opened anew, in case nobody feeds it."""

ATTACH_AGAIN = 60.0
"""Seconds after which a proxy that still lacks a network is attached again."""

DEAF_FIRST, DEAF_CAP = 1.0, 30.0
"""Seconds between attempts to have events, where polling does without them."""

_GONE = frozenset({"die", "destroy"})
_LOOK = frozenset({"start", "pause", "unpause", "oom", "rename", "update", "health_status"})
_NETWORK = frozenset({"connect", "disconnect"})

EVENTS: Filters = MappingProxyType(
    {
        "type": ("container", "network"),
        # Named, for a health check alone makes three events each time that it runs.
        "event": tuple(sorted({"kill"} | _GONE | _LOOK | _NETWORK)),
    }
)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a full list came to."""

    containers: Mapping[str, Container]


@dataclass(frozen=True, slots=True)
class _Heard:
    """An event, and when (on the monotonic clock) it came."""

    at: float
    event: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Ended:
    """There are no more events of that stream."""

    stream: EventStream
    reason: str


@dataclass(frozen=True, slots=True)
class _Order:
    """What is asked of the engine in one go.

    Attributes:
        full: list everything.
        identities: containers to inspect.
        links: what to attach.
        overdue: containers that drain for too long.
        known: what was known then.
        tick: of the last event then: what came later the answer may know or not.
        heard_at: when the oldest event was heard that led to this.
    """

    full: bool
    identities: frozenset[str]
    links: tuple[Link, ...]
    overdue: frozenset[str]
    known: Mapping[str, Container]
    tick: int
    heard_at: float


@dataclass(slots=True)
class _Answer:
    """What the engine said to an order, or how it failed."""

    order: _Order
    listing: Listing | None = None
    seen: dict[str, Container | None] = field(default_factory=dict)
    refused: dict[Link, str] = field(default_factory=dict)
    error: Exception | None = None
    seconds: float = 0.0


_News = queue.SimpleQueue[_Heard | _Ended | _Answer]


class EngineSource:
    """The source named "engine"; what other dialects of its API have in common with it."""

    name = NAME
    filters: Filters = EVENTS

    def __init__(
        self,
        settings: Settings,
        *,
        observer: Observer,
        connect: Connect,
        skip_tasks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the source; it connects when it runs.

        Args:
            skip_tasks: leave out tasks' containers, because the Swarm's source has them.
        """
        self._settings = settings
        self._connect = connect
        self._skip_tasks = skip_tasks
        self._clock = clock
        self._report = Reporter(self.name, observer, _log)
        self._backoff = Backoff()
        self._containers: dict[str, Container] = {}
        self._draining: dict[str, float] = {}
        # Signals of which it is not known yet whether they ask a container to stop.
        self._signalled: dict[str, set[int]] = {}
        self._node = self._node_address = ""
        # By name, and kept: while OpenResty restarts, its networks are still where it will be.
        self._proxy_networks: dict[str, tuple[str, ...]] = {}
        self._refused: dict[Link, Rejection] = {}
        self._tried: dict[Link, float] = {}
        self._published: SourceSnapshot | None = None
        self._tick = 0
        self._touched: dict[str, int] = {}
        self._wanted: set[str] = set()
        self._wanted_since: float | None = None
        self._list_due = 0.0

    @property
    def status(self) -> SourceStatus:
        """Where it stands."""
        return self._report.status

    def read_once(self) -> SourceSnapshot:
        """List and inspect everything once.

        Raises:
            DiscoveryError: the engine failed.
        """
        with closing(self._connect(self._learn)) as engine:
            self._merge(self._list(engine, {}, frozenset()), self._tick)
        return self._snapshot(time.monotonic())

    def run(self, publish: Publish, stop: threading.Event) -> None:
        """Follow the engine until `stop` is set."""
        while not stop.is_set():
            try:
                with closing(self._connect(self._learn)) as engine:
                    self._follow(engine, publish, stop)
            except DiscoveryError as error:
                self._report.failed(error)
            except Exception as error:  # noqa: BLE001
                # The guard of the loop: a fault of ours must not end discovery for good.
                self._report.fault(error)
            self._report.follow(following=False)
            stop.wait(self._backoff.wait())

    def _follow(self, engine: Engine, publish: Publish, stop: threading.Event) -> None:
        """Follow one connection until it fails, or until its events have been silent for long."""
        self._report.engine(version=engine.version, api=engine.api_version)
        news: _News = queue.SimpleQueue()
        self._wanted, self._list_due = set(), 0.0
        asking = listed = False
        with closing(_Ear(engine, self.filters, news, optional=self._settings.polls > 0)) as ear:
            while not stop.is_set():
                now = self._clock()
                if ear.attend(now):
                    self._list_due = now
                if not asking and (order := self._order(now)):
                    asking = True
                    threading.Thread(
                        target=self._answer,
                        args=(engine, order, news),
                        name=f"{self.name}-ask",
                        daemon=True,
                    ).start()
                self._report.follow(following=listed)
                try:
                    item = news.get(timeout=STOP_CHECK)
                except queue.Empty:
                    if ear.silent(now) > SILENCE_LIMIT:
                        return
                    continue
                match item:
                    case _Heard():
                        ear.heard(now)
                        self._take_in(item.event, item.at)
                        heard_at = item.at
                    case _Answer():
                        asking = False
                        listed = self._take_answer(item) or listed
                        heard_at = item.order.heard_at
                    case _Ended():
                        ear.ended(item, now)
                        continue
                if listed:
                    self._publish(publish, heard_at)
                    self._report.mode(*ear.mode)

    # --- what is asked, beside the loop ---------------------------------------------------

    def _order(self, now: float) -> _Order | None:
        """What there is to ask now; None for nothing."""
        full = now >= self._list_due
        if full:
            self._list_due = now + self._interval
        links: tuple[Link, ...] = ()
        if self._settings.attach_networks:
            links = self._links(now)
        if not (full or self._wanted or links):
            return None
        order = _Order(
            full=full,
            identities=frozenset(self._wanted),
            links=links,
            overdue=frozenset(i for i, at in self._draining.items() if now - at > DRAIN_LIMIT),
            known=dict(self._containers),
            tick=self._tick,
            heard_at=time.monotonic() if self._wanted_since is None else self._wanted_since,
        )
        self._wanted, self._wanted_since = set(), None
        return order

    def _links(self, now: float) -> tuple[Link, ...]:
        """What to attach now; each is tried again after a while only."""
        missing = missing_links(self._containers.values(), rules_of(self._settings))
        self._refused = {link: why for link, why in self._refused.items() if link in missing}
        self._tried = {
            link: at
            for link, at in self._tried.items()
            if now - at < ATTACH_AGAIN and link in missing
        }
        links = tuple(link for link in missing if link not in self._tried)
        self._tried |= dict.fromkeys(links, now)
        return links

    @property
    def _interval(self) -> float:
        """Seconds from one full list to the next."""
        resync, polls = self._settings.resync_interval, self._settings.polls
        return min(resync, polls) if polls else resync

    def _answer(self, engine: Engine, order: _Order, news: _News) -> None:
        """Ask, in a thread of its own."""
        answer, started = _Answer(order), self._clock()
        try:
            for link in order.links:
                try:
                    engine.connect_network(link.network, link.proxy)
                except DockerRefused as error:
                    answer.refused[link] = str(error)
            if order.full:
                answer.listing = self._list(engine, order.known, order.overdue)
            for identity in order.identities | {link.proxy for link in order.links}:
                answer.seen[identity] = self._inspect(engine, identity, order.known.get(identity))
        except Exception as error:  # noqa: BLE001
            # The guard of the thread: what went wrong is raised where the loop is.
            answer.error = error
        answer.seconds = self._clock() - started
        news.put(answer)

    def _learn(self, engine: Engine) -> None:
        """Learn what all containers of a connection have in common.

        Raises:
            DiscoveryError: the engine is not what is looked for.
        """
        info = read(engine, "/info")
        self._node = str(info.get("Name", ""))
        swarm_address = str((info.get("Swarm") or {}).get("NodeAddr", ""))
        self._node_address = address_of(engine.host) or swarm_address

    def _list(
        self, engine: Engine, known: Mapping[str, Container], overdue: frozenset[str]
    ) -> Listing:
        """All containers, inspecting those that the list tells something new about."""
        found: dict[str, Container] = {}
        for raw in read(engine, "/containers/json"):
            identity, summary = str(raw["Id"]), _summary(raw)
            now = known.get(identity)
            if now is None or now.summary != summary or identity in overdue:
                now = self._inspect(engine, identity, now)
            if now is not None:
                found[identity] = replace(now, summary=summary)
        return Listing(found)

    def _inspect(self, engine: Engine, identity: str, known: Container | None) -> Container | None:
        """A container as it is now; None when it does not run, or is none of ours."""
        try:
            raw = inspect(engine, identity)
        except DockerRefused as error:
            if error.status == NOT_FOUND:
                return None
            raise
        labels = (raw.get("Config") or {}).get("Labels") or {}
        if self._skip_tasks and TASK_LABEL in labels:
            return None
        return container(raw, source=self.name, node=self._node, node_address=self._node_address)

    # --- what is made of it, in the loop --------------------------------------------------

    def _take_answer(self, answer: _Answer) -> bool:
        """Take in an answer; tells whether it was a full list that can be published.

        Raises:
            Exception: what the engine failed with.
        """
        order, error, whole = answer.order, answer.error, False
        if error is not None:
            if order.full and isinstance(error, DiscoveryError):
                self._report.list_failed(error, answer.seconds)
            raise error
        for link in order.links:
            self._refused.pop(link, None)
        for link, reason in answer.refused.items():
            self._refused[link] = refusal(link, reason, source=self.name)
        if answer.listing is not None:
            whole = self._merge(answer.listing, order.tick)
            for identity in order.overdue | self._draining.keys() - self._containers.keys():
                if self._touched.get(identity, 0) <= order.tick:
                    self._draining.pop(identity, None)
            self._touched = {i: tick for i, tick in self._touched.items() if tick > order.tick}
            self._report.synced(answer.seconds)
            self._backoff.reset()
        for identity, seen in answer.seen.items():
            # Asked for before the last that was heard of it, the answer says nothing.
            if self._touched.get(identity, 0) <= order.tick:
                self._put(identity, seen)
        return whole

    def _merge(self, listing: Listing, tick: int) -> bool:
        """Believe the list, but for containers of which more was heard since then.

        Returns:
            Whether what is known now can be published.
        """
        found = dict(listing.containers)
        self._spare(found, tick)
        self._containers = found
        return True

    def _spare(self, found: dict[str, Container], tick: int) -> None:
        """Leave as they are those containers that were heard of after `tick`."""
        for identity, touched in self._touched.items():
            if touched > tick:
                found.pop(identity, None)
                if identity in self._containers:
                    found[identity] = self._containers[identity]

    def _put(self, identity: str, seen: Container | None) -> None:
        """Take in what was seen of a container, and what its signals meant."""
        signals = self._signalled.pop(identity, set())
        if seen is not None and seen.stop_signal in signals:
            self._draining.setdefault(identity, self._clock())
        if seen is None:
            self._containers.pop(identity, None)
        else:
            self._containers[identity] = seen

    def _take_in(self, event: Mapping[str, Any], heard_at: float) -> None:
        actor = event.get("Actor") or {}
        attributes = actor.get("Attributes") or {}
        # Older engines tell less, and by other names.
        action = str(event.get("Action") or event.get("status") or "").partition(":")[0]
        self._tick += 1
        if event.get("Type") == "network":
            if action in _NETWORK:
                self._report.heard("network")
                identity = str(attributes.get("container", ""))
                if identity in self._containers:
                    self._look_at(identity, heard_at)
            return
        identity = str(actor.get("ID") or event.get("id") or "")
        if action in _GONE | _LOOK | {"kill"}:
            self._report.heard("container")
        if action in _GONE:
            self._touched[identity] = self._tick
            self._containers.pop(identity, None)
            self._draining.pop(identity, None)
            self._signalled.pop(identity, None)
            self._wanted.discard(identity)
        elif action == "kill":
            self._killed(identity, signal_number(str(attributes.get("signal", ""))), heard_at)
        elif action in _LOOK:
            if action == "start":
                self._draining.pop(identity, None)
            self._look_at(identity, heard_at)

    def _killed(self, identity: str, number: int, heard_at: float) -> None:
        """A signal was sent; one that asks it to stop is the start of draining."""
        known = self._containers.get(identity)
        if number in STOP_SIGNALS or (known is not None and number == known.stop_signal):
            self._draining.setdefault(identity, self._clock())
        elif known is None:
            # It has started just now, and which signal it wants is being asked.
            self._signalled.setdefault(identity, set()).add(number)

    def _look_at(self, identity: str, heard_at: float) -> None:
        """Have a container inspected."""
        self._touched[identity] = self._tick
        self._want(heard_at)
        self._wanted.add(identity)

    def _want(self, heard_at: float) -> None:
        """Something is to be asked because of what was heard then."""
        if self._wanted_since is None:
            self._wanted_since = heard_at

    # --- what goes out --------------------------------------------------------------------

    def _publish(self, publish: Publish, heard_at: float) -> None:
        old, new = self._published, self._snapshot(heard_at)
        if old is None or replace(new, changed_at=old.changed_at) != old:
            self._published = new
            publish(new)
            self._report.published()

    def _snapshot(self, changed_at: float) -> SourceSnapshot:
        before = self._published.workloads if self._published else {}
        workloads: dict[WorkloadKey, Workload] = {}
        proxies = []
        for identity, item in sorted(self._containers.items()):
            workload = item.workload
            if identity in self._draining and item.instance.state is not InstanceState.GONE:
                draining = replace(
                    item.instance, state=InstanceState.DRAINING, detail="was sent a stop signal"
                )
                workload = replace(workload, instances=(draining,))
            old = before.get(workload.key)
            workloads[workload.key] = old if old == workload else workload
            if item.is_proxy and item.instance.state is not InstanceState.GONE:
                self._proxy_networks[workload.name] = workload.networks
                proxies.append(
                    ProxyInstance(
                        id=identity,
                        name=workload.name,
                        attachments=item.instance.attachments,
                        node_address=item.instance.node_address,
                        published=self._proxy_ports(item.instance),
                    )
                )
        networks = {name for names in self._proxy_networks.values() for name in names}
        return SourceSnapshot(
            source=self.name,
            workloads=MappingProxyType(workloads),
            proxies=tuple(proxies),
            proxy_networks=tuple(sorted(networks)) if self._proxy_networks else None,
            rejections=tuple(rejection for _, rejection in sorted(self._refused.items())),
            changed_at=changed_at,
        )

    def _proxy_ports(self, instance: Instance) -> tuple[PublishedPort, ...]:
        if not instance.host_network:
            return instance.published
        port = self._settings.openresty.admin_port
        return (PublishedPort(target=port, published=port),)


class _Ear:
    """Listens to the events of one connection; where polling goes on without, again and again."""

    def __init__(self, engine: Engine, filters: Filters, news: _News, *, optional: bool) -> None:
        """Open the stream.

        Args:
            optional: without events there is polling, so that their absence is no failure.

        Raises:
            DiscoveryError: there are no events, and they are not optional.
        """
        self._engine = engine
        self._filters = filters
        self._news = news
        self._optional = optional
        self._stream: EventStream | None = None
        self._reason = ""
        self._again = Backoff(first=DEAF_FIRST, cap=DEAF_CAP)
        self._due = self._since = 0.0
        if not optional:
            self._open()

    @property
    def mode(self) -> tuple[Literal["events", "poll"], str]:
        """How changes are heard of, and why not in a better way."""
        return ("events", "") if self._stream else ("poll", self._reason)

    def attend(self, now: float) -> bool:
        """Open the stream where there is none; tells whether it did, so that a list is due."""
        if not self._since:
            self._since = now
        if self._stream is not None or now < self._due:
            return False
        try:
            self._open()
        except DiscoveryError as error:
            self._deaf(str(error), now)
            return False
        self._since = now
        return True

    def heard(self, now: float) -> None:
        """An event came."""
        self._since = now

    def silent(self, now: float) -> float:
        """Seconds since the last event; 0 where none is expected."""
        return now - self._since if self._stream else 0.0

    def ended(self, end: _Ended, now: float) -> None:
        """A stream ended.

        Raises:
            DockerUnavailable: and that is a failure.
        """
        if end.stream is not self._stream:
            return
        self._stream = None
        if not self._optional:
            raise DockerUnavailable(end.reason)
        if now - self._since > DEAF_CAP:
            self._again.reset()
        self._deaf(end.reason, now)

    def close(self) -> None:
        """Stop listening."""
        if self._stream is not None:
            self._stream.close()

    def _deaf(self, reason: str, now: float) -> None:
        self._reason = reason
        self._due = now + self._again.wait()

    def _open(self) -> None:
        self._stream = self._engine.events(self._filters)
        threading.Thread(
            target=_collect, args=(self._stream, self._news), name="engine-events", daemon=True
        ).start()


def inspect(engine: Engine, identity: str) -> Mapping[str, Any]:
    """What the engine says of one container.

    Raises:
        DockerRefused: it answers with an error, 404 where there is none.
        DockerUnavailable: it does not answer.
    """
    path = f"/containers/{identity}/json"
    found: Mapping[str, Any] = parse(engine.get(path), path)
    return found


def _summary(raw: Mapping[str, Any]) -> str:
    """What of a line of the list would change with the container; its uptime would not."""
    health = re.search(r"\((.*?)\)", str(raw.get("Status", "")))
    picked = [raw.get(key) for key in ("Names", "State", "Labels", "Ports", "NetworkSettings")]
    return json.dumps([health.group(1) if health else "", picked], sort_keys=True)


def address_of(host: str) -> str:
    """The address of a host that may be named; empty when it has none."""
    if not host:
        return ""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    # Of a name that has both, the one that published ports are rather to be had at.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def _collect(events: EventStream, news: _News) -> None:
    """Hand on the events with the time at which they came, and then that there are no more."""
    reason = "the engine ended the event stream"
    try:
        for event in events:
            news.put(_Heard(time.monotonic(), event))
    except DockerUnavailable as error:
        reason = str(error)
    finally:
        news.put(_Ended(events, reason))
