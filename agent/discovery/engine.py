"""Containers of a plain engine, by its events.

Events are subscribed to first, then everything is listed; an event has its container inspected
anew, so nothing is ever concluded from an event alone, except that a stop signal was sent: `kill`
comes then, `die` only when the process has gone, up to the whole grace period later. Nothing here
knows Swarm services.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from agent.config.settings import Settings
from agent.discovery.base import (
    STOP_CHECK,
    Backoff,
    Observer,
    Publish,
    Reporter,
    SourceStatus,
)
from agent.discovery.cluster import PROXY_LABEL, PROXY_VALUE, STACK_LABEL
from agent.discovery.docker_api import Connect, Engine, EventStream, parse, read
from agent.discovery.swarm_rest import NOT_FOUND, timestamp
from agent.errors import DiscoveryError, DockerRefused, DockerUnavailable
from agent.model import (
    EMPTY,
    Attachment,
    Instance,
    InstanceState,
    ProxyInstance,
    PublishedPort,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

NAME = "engine"

_log = logging.getLogger(__name__)

PROJECT_LABEL = "com.docker.compose.project"
TASK_LABEL = "com.docker.swarm.service.id"

DRAIN_LIMIT = 600.0
"""Seconds after which a container that was signalled and still runs is taken for alive again."""

_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL})
_GONE = frozenset({"die", "destroy"})
_LOOK = frozenset({"start", "pause", "unpause", "oom", "rename", "update", "health_status"})
_NETWORK = frozenset({"connect", "disconnect"})

EVENTS = {
    "type": ("container", "network"),
    # Named, for a health check alone makes three events each time that it runs.
    "event": tuple(sorted({"kill"} | _GONE | _LOOK | _NETWORK)),
}


@dataclass(frozen=True, slots=True)
class Container:
    """A running container as last inspected.

    Attributes:
        summary: what the list said of it then; as long as it says the same there is no need to
            inspect it again.
        stop_signal: the signal that asks it to stop.
    """

    workload: Workload
    is_proxy: bool
    stop_signal: int
    summary: str = ""

    @property
    def instance(self) -> Instance:
        """The one instance of it."""
        return self.workload.instances[0]


class EngineSource:
    """The source named "engine"."""

    name = NAME

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
        self._report = Reporter(NAME, observer, _log)
        self._backoff = Backoff()
        self._containers: dict[str, Container] = {}
        self._draining: dict[str, float] = {}
        self._node = self._node_address = ""
        # By name, and kept: while OpenResty restarts, its networks are still where it will be.
        self._proxy_networks: dict[str, tuple[str, ...]] = {}
        self._published: SourceSnapshot | None = None

    @property
    def status(self) -> SourceStatus:
        """Where it stands."""
        return self._report.status

    def read_once(self) -> SourceSnapshot:
        """List and inspect everything once.

        Raises:
            DiscoveryError: the engine failed.
        """
        with closing(self._connect()) as engine:
            self._learn_node(engine)
            self._containers = self._list(engine)
        return self._snapshot(time.monotonic())

    def run(self, publish: Publish, stop: threading.Event) -> None:
        """Follow the engine until `stop` is set."""
        while not stop.is_set():
            try:
                with closing(self._connect()) as engine:
                    self._follow(engine, publish, stop)
            except DiscoveryError as error:
                self._report.failed(error)
            except Exception as error:  # noqa: BLE001
                # The guard of the loop: a fault of ours must not end discovery for good.
                self._report.fault(error)
            self._report.follow(following=False)
            stop.wait(self._backoff.wait())

    def _follow(self, engine: Engine, publish: Publish, stop: threading.Event) -> None:
        """Follow one connection until it fails."""
        self._learn_node(engine)
        self._report.engine(version=engine.version, api=engine.api_version)
        news: queue.SimpleQueue[tuple[float, dict[str, Any] | None]] = queue.SimpleQueue()
        events = engine.events(EVENTS)
        threading.Thread(
            target=_collect, args=(events, news), name="engine-events", daemon=True
        ).start()
        with closing(events):
            resync_due = 0.0
            while not stop.is_set():
                now = self._clock()
                if now >= resync_due:
                    self._sync(engine)
                    self._publish(publish, now)
                    self._report.mode("events")
                    resync_due = self._clock() + self._settings.resync_interval
                self._report.follow(following=True)
                try:
                    heard_at, event = news.get(timeout=STOP_CHECK)
                except queue.Empty:
                    continue
                if event is None:
                    raise DockerUnavailable("the engine ended the event stream")
                self._take_in(engine, event)
                self._publish(publish, heard_at)

    def _learn_node(self, engine: Engine) -> None:
        info = read(engine, "/info")
        self._node = str(info.get("Name", ""))
        swarm_address = str((info.get("Swarm") or {}).get("NodeAddr", ""))
        self._node_address = _address(engine.host) or swarm_address

    def _sync(self, engine: Engine) -> None:
        started = self._clock()
        try:
            self._containers = self._list(engine)
        except DiscoveryError as error:
            self._report.list_failed(error, self._clock() - started)
            raise
        self._report.synced(self._clock() - started)
        self._backoff.reset()

    def _list(self, engine: Engine) -> dict[str, Container]:
        """All containers, inspecting those that the list tells something new about."""
        now = self._clock()
        overdue = {i for i, since in self._draining.items() if now - since > DRAIN_LIMIT}
        found: dict[str, Container] = {}
        for raw in read(engine, "/containers/json"):
            identity, summary = str(raw["Id"]), _summary(raw)
            known = self._containers.get(identity)
            if known is None or known.summary != summary or identity in overdue:
                known = self._inspect(engine, identity)
            if known is not None:
                found[identity] = replace(known, summary=summary)
        for identity in overdue | (self._draining.keys() - found.keys()):
            self._draining.pop(identity, None)
        return found

    def _inspect(self, engine: Engine, identity: str) -> Container | None:
        """A container as it is now; None when it does not run, or is none of ours."""
        path = f"/containers/{identity}/json"
        try:
            raw = parse(engine.get(path), path)
        except DockerRefused as error:
            if error.status == NOT_FOUND:
                return None
            raise
        labels = (raw.get("Config") or {}).get("Labels") or {}
        if self._skip_tasks and TASK_LABEL in labels:
            return None
        return container(raw, node=self._node, node_address=self._node_address)

    def _take_in(self, engine: Engine, event: Mapping[str, Any]) -> None:
        actor = event.get("Actor") or {}
        attributes = actor.get("Attributes") or {}
        action = str(event.get("Action", "")).partition(":")[0]
        if event.get("Type") == "network":
            identity = str(attributes.get("container", ""))
            self._report.heard("network")
        else:
            identity = str(actor.get("ID", ""))
            self._report.heard("container")
        known = self._containers.get(identity)
        if action in _GONE:
            self._containers.pop(identity, None)
            self._draining.pop(identity, None)
        elif action == "kill":
            number = signal_number(str(attributes.get("signal", "")))
            if known is not None and number in _STOP_SIGNALS | {known.stop_signal}:
                self._draining.setdefault(identity, self._clock())
        elif action in _LOOK or (action in _NETWORK and known is not None):
            if action == "start":
                self._draining.pop(identity, None)
            new = self._inspect(engine, identity)
            if new is None:
                self._containers.pop(identity, None)
            else:
                self._containers[identity] = new

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
            if identity in self._draining:
                draining = replace(
                    item.instance, state=InstanceState.DRAINING, detail="was sent a stop signal"
                )
                workload = replace(workload, instances=(draining,))
            old = before.get(workload.key)
            workloads[workload.key] = old if old == workload else workload
            if item.is_proxy:
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
            source=NAME,
            workloads=MappingProxyType(workloads),
            proxies=tuple(proxies),
            proxy_networks=tuple(sorted(networks)) if self._proxy_networks else None,
            changed_at=changed_at,
        )

    def _proxy_ports(self, instance: Instance) -> tuple[PublishedPort, ...]:
        if not instance.host_network:
            return instance.published
        port = self._settings.openresty.admin_port
        return (PublishedPort(target=port, published=port),)


def container(raw: Mapping[str, Any], *, node: str, node_address: str) -> Container | None:
    """A container as inspected; None unless it runs."""
    state = raw.get("State") or {}
    if state.get("Status") not in ("running", "paused"):
        return None
    config = raw.get("Config") or {}
    labels: Mapping[str, str] = MappingProxyType(dict(config.get("Labels") or {})) or EMPTY
    networking = raw.get("NetworkSettings") or {}
    on_host = (raw.get("HostConfig") or {}).get("NetworkMode") == "host"
    ports = tuple(sorted(_tcp_ports(config.get("ExposedPorts") or {})))
    published = _published(networking.get("Ports") or {})
    if on_host:
        published = tuple(PublishedPort(target=port, published=port) for port in ports)
    attachments = tuple(
        Attachment(network, address)
        for network, endpoint in sorted((networking.get("Networks") or {}).items())
        if (address := endpoint.get("IPAddress") or endpoint.get("GlobalIPv6Address") or "")
    )
    traffic, detail = _traffic_state(state)
    name = str(raw.get("Name", "")).lstrip("/")
    instance = Instance(
        id=str(raw["Id"]),
        name=name,
        state=traffic,
        node=node,
        node_address=node_address,
        attachments=attachments,
        published=published,
        detail=detail,
        host_network=on_host,
    )
    workload = Workload(
        key=WorkloadKey(NAME, instance.id),
        kind=WorkloadKind.CONTAINER,
        name=name,
        created=timestamp(str(raw.get("Created", ""))),
        labels=labels,
        networks=tuple(attachment.network for attachment in attachments),
        ports=ports,
        instances=(instance,),
        stack=labels.get(PROJECT_LABEL) or labels.get(STACK_LABEL, ""),
        host_ports_only=on_host,
    )
    return Container(
        workload=workload,
        is_proxy=labels.get(PROXY_LABEL) == PROXY_VALUE,
        stop_signal=signal_number(str(config.get("StopSignal") or "")) or signal.SIGTERM,
    )


def signal_number(text: str) -> int:
    """The number of a signal told as a number or by name, with or without SIG; 0 for none."""
    if text.isdigit():
        return int(text)
    with suppress(KeyError):
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    return 0


def _traffic_state(state: Mapping[str, Any]) -> tuple[InstanceState, str]:
    if state.get("Paused"):
        # It answers nothing, so not even the last resort that a draining peer is.
        return InstanceState.WAITING, "the container is paused"
    match (state.get("Health") or {}).get("Status"):
        case "starting":
            return InstanceState.WAITING, "its health check has not passed yet"
        case "unhealthy":
            return InstanceState.WAITING, "its health check fails"
        case _:
            return InstanceState.UP, ""


def _tcp_ports(exposed: Iterable[str]) -> set[int]:
    return {int(port.partition("/")[0]) for port in exposed if port.endswith("/tcp")}


def _published(ports: Mapping[str, Any]) -> tuple[PublishedPort, ...]:
    """Published TCP ports, lowest first; one that is bound to IPv4 and to IPv6 is told once."""
    found: dict[tuple[int, int], PublishedPort] = {}
    for spec, bindings in ports.items():
        if not spec.endswith("/tcp"):
            continue
        # IPv4 sorts before IPv6, and where both are there it is the one to be taken.
        for binding in sorted(bindings or (), key=lambda b: ":" in b.get("HostIp", "")):
            target, host = int(spec.partition("/")[0]), str(binding.get("HostIp", ""))
            with suppress(ValueError):
                published = int(binding.get("HostPort") or 0)
                if published:
                    everywhere = not host or ipaddress.ip_address(host).is_unspecified
                    port = PublishedPort(target, published, "" if everywhere else host)
                    found.setdefault((target, published), port)
    return tuple(port for _, port in sorted(found.items()))


def _summary(raw: Mapping[str, Any]) -> str:
    """What of a line of the list would change with the container; its uptime would not."""
    health = re.search(r"\((.*?)\)", str(raw.get("Status", "")))
    picked = [raw.get(key) for key in ("Names", "State", "Labels", "Ports", "NetworkSettings")]
    return json.dumps([health.group(1) if health else "", picked], sort_keys=True)


def _address(host: str) -> str:
    """The address of a host that may be named; empty when it has none."""
    if not host:
        return ""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _collect(
    events: EventStream, news: queue.SimpleQueue[tuple[float, dict[str, Any] | None]]
) -> None:
    """Hand on the events with the time at which they came; None when there are no more."""
    try:
        for event in events:
            news.put((time.monotonic(), event))
    except DockerUnavailable as error:
        _log.info("source engine: event stream: %s", error)
    finally:
        news.put((time.monotonic(), None))
