"""A Swarm's objects as last heard of, and the workloads that follow from them.

Lists and changes go in, snapshots come out. Every object carries SwarmKit's version, a number that
grows with every change of the cluster, and the newest version of an object wins wherever it came
from: so a list and a stream of changes can overlap in any way. A workload is built anew only when
something that it is made of has changed. No I/O here, and one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Literal

from agent.model import (
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

PROXY_LABEL = "interlock.ext.name"
PROXY_VALUES = frozenset({"nginx", "haproxy"})
"""Interlock's two; both proxies are OpenResty now, and keep their labels."""
STACK_LABEL = "com.docker.stack.namespace"


class TaskState(IntEnum):
    """SwarmKit's states of a task; only ever growing over a task's life."""

    NEW = 0
    PENDING = 64
    ASSIGNED = 192
    ACCEPTED = 256
    PREPARING = 320
    READY = 384
    STARTING = 448
    RUNNING = 512
    COMPLETE = 576
    SHUTDOWN = 640
    FAILED = 704
    REJECTED = 768
    REMOVE = 800
    ORPHANED = 832


Kind = Literal["task", "service", "node", "network"]


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the cluster. `shared` is one over which tasks have addresses of their own."""

    id: str
    version: int
    name: str
    driver: str
    ingress: bool

    @property
    def shared(self) -> bool:
        """Neither the ingress network nor one of the node's own."""
        return not self.ingress and self.driver not in _NODE_DRIVERS


_NODE_DRIVERS = frozenset({"host", "bridge", "null"})


@dataclass(frozen=True, slots=True)
class Node:
    """A node. `down` is for lost ones only: unknown and disconnected nodes may come back."""

    id: str
    version: int
    hostname: str
    address: str
    down: bool


@dataclass(frozen=True, slots=True)
class Service:
    """A service; `replicas` is None for a global one, `job` for what is no service at all.

    `vips` are pairs of network id and bare address.
    """

    id: str
    version: int
    name: str
    created: float
    labels: Mapping[str, str]
    template_labels: Mapping[str, str]
    targets: tuple[str, ...]
    ports: tuple[int, ...]
    replicas: int | None
    job: bool
    vips: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A task; `addresses` are pairs of network id and bare address."""

    id: str
    version: int
    service: str
    slot: int
    node: str
    state: int
    desired: int
    error: str
    addresses: tuple[tuple[str, str], ...]
    published: tuple[PublishedPort, ...]

    @property
    def ended(self) -> bool:
        """It will never run again."""
        return self.state > TaskState.RUNNING


Record = Task | Service | Node | Network


@dataclass(frozen=True, slots=True)
class Change:
    """One object created, updated or (`removed`) gone."""

    kind: Kind
    record: Record
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """All objects of a cluster; each kind as of one moment, maybe not the same one.

    `networks` has those that tasks name too: the engine's own list leaves some out, and has no
    versions (0).
    """

    services: Sequence[Service]
    tasks: Sequence[Task]
    nodes: Sequence[Node]
    networks: Sequence[Network]


class Cluster:
    """The replica.

    Args:
        source: name of the source in keys and snapshots.
        proxy_service: name of the service that is OpenResty; one with the label is in any case.
        admin_port: port at which an OpenResty on its node's network is reached.
    """

    def __init__(self, *, source: str, proxy_service: str, admin_port: int) -> None:
        self._source = source
        self._proxy_service = proxy_service
        self._admin_port = admin_port
        self._clear()

    def _clear(self) -> None:
        self._services: dict[str, Service] = {}
        self._tasks: dict[str, Task] = {}
        self._nodes: dict[str, Node] = {}
        self._networks: dict[str, Network] = {}
        self._of_service: dict[str, dict[str, Task]] = {}
        # Newest version of each kind's last list: what is not newer and was not in it, is gone.
        self._horizon: dict[Kind, int] = {}
        self._instances: dict[str, Instance] = {}
        self._dirty: set[str] = set()
        self._workloads: dict[WorkloadKey, Workload] = {}
        self._proxies: dict[str, tuple[ProxyInstance, ...]] = {}
        self._proxy_networks: dict[str, tuple[str, ...]] = {}
        self._published: SourceSnapshot | None = None

    # --- what comes in --------------------------------------------------------------------

    def reset(self, listing: Listing) -> None:
        """Believe the list, forget everything else; unchanged workloads stay the same objects."""
        old = self._published
        workloads, proxies = self._workloads, self._proxies
        self._clear()
        self._workloads, self._proxies, self._published = workloads, proxies, old
        self._dirty.update(key.id for key in workloads)
        self.load(listing)

    def load(self, listing: Listing, *, careful: bool = False) -> bool:
        """Take in a full list: what is not in it is gone, but newer things known already stay.

        Args:
            careful: keep also what is missing from the list and newer than all of it.

        Returns:
            Whether the list is older than what was known: that of a manager that has just started
            and fills its store, or of a cluster that was restored from a backup.
        """
        for network in listing.networks:
            self._put("network", network)
        doubtful = False
        listed: tuple[tuple[Kind, Sequence[Record]], ...] = (
            ("node", listing.nodes),
            ("service", listing.services),
            ("task", listing.tasks),
        )
        for kind, records in listed:
            horizon = max((record.version for record in records), default=0)
            known = self._known(kind)
            here = {record.id for record in records}
            for record in records:
                old = known.get(record.id)
                if old is None or record.version > old.version:
                    self._put(kind, record)
                elif record.version < old.version:
                    doubtful = True
            for identity in [identity for identity in known if identity not in here]:
                newer = known[identity].version > horizon
                doubtful = doubtful or newer
                if not (careful and newer):
                    self._drop(kind, identity)
            self._horizon[kind] = horizon
        return doubtful

    def apply(self, changes: Iterable[Change]) -> None:
        """Take in changes, in the order in which they happened."""
        for change in changes:
            kind, record = change.kind, change.record
            known = self._known(kind).get(record.id)
            if change.removed:
                # Ids are never used again: a removal is final whatever its version.
                if known is not None:
                    self._drop(kind, record.id)
            elif record.version > (known.version if known else self._horizon.get(kind, -1)):
                self._put(kind, record)

    def forget_tasks(self, identities: Iterable[str]) -> None:
        """These tasks are no more."""
        for identity in identities:
            self._drop("task", identity)

    @property
    def live_tasks(self) -> Mapping[str, Task]:
        """Tasks of services, jobs left out, that have not ended, by id."""
        return {
            identity: task
            for service in self._services.values()
            if not service.job
            for identity, task in self._of_service.get(service.id, {}).items()
            if not task.ended
        }

    def _known(self, kind: Kind) -> Mapping[str, Record]:
        match kind:
            case "task":
                return self._tasks
            case "service":
                return self._services
            case "node":
                return self._nodes
            case "network":
                return self._networks

    def _put(self, kind: Kind, record: Record) -> None:
        match record:
            case Task():
                old_task = self._tasks.get(record.id)
                # The engine withdraws a stopping task's ports before the task has stopped.
                if old_task is not None and not record.published and not record.ended:
                    record = replace(record, published=old_task.published)
                self._tasks[record.id] = record
                self._of_service.setdefault(record.service, {})[record.id] = record
                self._instances.pop(record.id, None)
                self._dirty.add(record.service)
            case Service():
                self._services[record.id] = record
                self._touch_instances(record.id)
            case Node():
                self._put_node(record)
            case Network():
                old = self._networks.get(record.id)
                if old is None or record.version > old.version:
                    self._networks[record.id] = record
                    if old is None or replace(old, version=record.version) != record:
                        self._network_changed(record)

    def _put_node(self, node: Node) -> None:
        old = self._nodes.get(node.id)
        if old is not None and not node.address:
            node = replace(node, address=old.address)
        self._nodes[node.id] = node
        if old is None or replace(old, version=node.version) != node:
            self._node_changed(node.id)

    def _drop(self, kind: Kind, identity: str) -> None:
        match kind:
            case "task":
                task = self._tasks.pop(identity, None)
                if task is not None:
                    self._instances.pop(identity, None)
                    siblings = self._of_service[task.service]
                    del siblings[identity]
                    if not siblings:
                        del self._of_service[task.service]
                    self._dirty.add(task.service)
            case "service":
                if self._services.pop(identity, None) is not None:
                    self._touch_instances(identity)
            case "node":
                if self._nodes.pop(identity, None) is not None:
                    self._node_changed(identity)
            case "network":
                # Its name stays known: tasks that still run on it are still reached over it.
                return

    def _touch_instances(self, service: str) -> None:
        for identity in self._of_service.get(service, ()):
            self._instances.pop(identity, None)
        self._dirty.add(service)

    def _node_changed(self, identity: str) -> None:
        for task in self._tasks.values():
            if task.node == identity:
                self._instances.pop(task.id, None)
                self._dirty.add(task.service)

    def _network_changed(self, network: Network) -> None:
        names = {network.id, network.name}
        for service in self._services.values():
            if not names.isdisjoint(service.targets):
                self._touch_instances(service.id)

    # --- what goes out --------------------------------------------------------------------

    def snapshot(self, *, changed_at: float) -> SourceSnapshot | None:
        """All there is, or None if it is what it was at the last call.

        Args:
            changed_at: monotonic time at which the oldest change since then was heard of.
        """
        changed = self._published is None
        workloads: dict[WorkloadKey, Workload] | None = None
        for identity in self._dirty:
            key = WorkloadKey(self._source, identity)
            old = self._workloads.get(key)
            new = self._build(key)
            if new != old:
                # Copied once per snapshot: the one that was published belongs to its readers.
                workloads = dict(self._workloads) if workloads is None else workloads
                if new is None:
                    del workloads[key]
                else:
                    workloads[key] = new
            changed = self._build_proxies(identity) or changed
        self._dirty.clear()
        if workloads is not None:
            self._workloads = workloads
        elif not changed and self._published is not None:
            return None
        networks = {name for names in self._proxy_networks.values() for name in names}
        self._published = SourceSnapshot(
            source=self._source,
            workloads=MappingProxyType(self._workloads),
            proxies=tuple(
                sorted(
                    (proxy for proxies in self._proxies.values() for proxy in proxies),
                    key=lambda proxy: proxy.id,
                )
            ),
            proxy_networks=tuple(sorted(networks)) if self._proxy_networks else None,
            changed_at=changed_at,
        )
        return self._published

    def _build(self, key: WorkloadKey) -> Workload | None:
        service = self._services.get(key.id)
        if service is None or service.job:
            return None
        networks = self._service_networks(service)
        tasks = self._of_service.get(service.id, {})
        instances = [self._instance(service, task) for task in tasks.values() if not task.ended]
        instances += [self._instance(service, task) for task in _newest_failures(tasks.values())]
        return Workload(
            key=key,
            kind=WorkloadKind.SERVICE,
            name=service.name,
            created=service.created,
            labels=service.labels,
            template_labels=service.template_labels,
            networks=tuple(n.name for n in networks.values() if n is not None and n.shared),
            ports=service.ports,
            instances=tuple(sorted(instances, key=lambda instance: (instance.name, instance.id))),
            wanted=_wanted(service, tasks.values()),
            stack=service.labels.get(STACK_LABEL, ""),
            # A network that is not known yet is none of the node's own, which are known first.
            host_ports_only=not any(n is None or n.shared for n in networks.values()),
            vips=self._shared_addresses(service.vips),
        )

    def _shared_addresses(self, addresses: Iterable[tuple[str, str]]) -> tuple[Attachment, ...]:
        return tuple(
            Attachment(network.name, address)
            for identity, address in addresses
            if (network := self._networks.get(identity)) is not None and network.shared
        )

    def _service_networks(self, service: Service) -> dict[str, Network | None]:
        """The networks a service names, by id or by name."""
        found: dict[str, Network | None] = {}
        for target in service.targets:
            network = self._networks.get(target)
            if network is None:
                named = (n for n in self._networks.values() if n.name == target)
                network = next(named, None)
            found[target] = network
        return found

    def _on_host_network(self, service: Service) -> bool:
        networks = self._service_networks(service).values()
        return any(network is not None and network.driver == "host" for network in networks)

    def _instance(self, service: Service, task: Task) -> Instance:
        cached = self._instances.get(task.id)
        if cached is not None:
            return cached
        node = self._nodes.get(task.node)
        state, detail = _traffic_state(task, node)
        where = task.slot or (node.hostname if node else task.node)
        host_network = self._on_host_network(service)
        published = task.published
        if host_network:
            published = tuple(PublishedPort(target=p, published=p) for p in service.ports)
        instance = Instance(
            id=task.id,
            name=f"{service.name}.{where}" if where else service.name,
            state=state,
            node=node.hostname if node else "",
            node_address=node.address if node else "",
            attachments=self._shared_addresses(task.addresses),
            published=published,
            detail=detail,
            host_network=host_network,
        )
        self._instances[task.id] = instance
        return instance

    def _build_proxies(self, identity: str) -> bool:
        """Find the OpenResty instances of a service; tells whether they changed."""
        service = self._services.get(identity)
        old = self._proxies.get(identity), self._proxy_networks.get(identity)
        if service is None or not self._is_proxy(service):
            self._proxies.pop(identity, None)
            self._proxy_networks.pop(identity, None)
            return old != (None, None)
        tasks = self._of_service.get(identity, {}).values()
        instances = (self._instance(service, task) for task in tasks)
        self._proxies[identity] = tuple(
            ProxyInstance(
                id=instance.id,
                name=instance.name,
                attachments=instance.attachments,
                node_address=instance.node_address,
                published=(PublishedPort(target=self._admin_port, published=self._admin_port),)
                if instance.host_network
                else instance.published,
            )
            for instance in instances
            # One that is told to stop serves until it is: keep it in step to the end.
            if instance.state in (InstanceState.UP, InstanceState.DRAINING)
        )
        declared = tuple(
            n.name for n in self._service_networks(service).values() if n is not None and n.shared
        )
        # While an update puts the service on a network, its tasks are not on it yet.
        joined = tuple(
            name
            for name in declared
            if all(
                name in {attachment.network for attachment in proxy.attachments}
                for proxy in self._proxies[identity]
            )
        )
        self._proxy_networks[identity] = joined or declared
        return old != (self._proxies[identity], self._proxy_networks[identity])

    def _is_proxy(self, service: Service) -> bool:
        marks = service.labels.get(PROXY_LABEL), service.template_labels.get(PROXY_LABEL)
        named = bool(self._proxy_service) and service.name == self._proxy_service
        return named or not PROXY_VALUES.isdisjoint(marks)


def _traffic_state(task: Task, node: Node | None) -> tuple[InstanceState, str]:
    """Where a task stands, and why it takes no traffic if it takes none."""
    state, desired = _state_name(task.state), _state_name(task.desired)
    if task.ended:
        return InstanceState.GONE, task.error or f"the task has ended ({state})"
    if node is not None and node.down:
        return InstanceState.GONE, f"node {node.hostname} is down"
    if task.desired > TaskState.RUNNING:
        if task.state == TaskState.RUNNING:
            return InstanceState.DRAINING, f"desired state is {desired}"
        return InstanceState.GONE, f"given up before it ran: desired state is {desired}"
    if task.state == TaskState.RUNNING:
        return InstanceState.UP, ""
    return InstanceState.WAITING, ": ".join(filter(None, (f"the task is {state}", task.error)))


def _state_name(state: int) -> str:
    try:
        return TaskState(state).name.lower()
    except ValueError:
        return f"state {state}"


def _newest_failures(tasks: Iterable[Task]) -> Iterable[Task]:
    """The last task of each slot that ended with an error: what `explain` shows."""
    newest: dict[tuple[int, str], Task] = {}
    for task in tasks:
        if task.ended and task.error:
            place = (task.slot, "" if task.slot else task.node)
            if place not in newest or newest[place].version < task.version:
                newest[place] = task
    return newest.values()


def _wanted(service: Service, tasks: Iterable[Task]) -> int:
    """How many instances there ought to be.

    A global service wants one on each node that it has a task for: an update has two on a node,
    the one to come and the one to go.
    """
    if service.replicas is not None:
        return service.replicas
    return len({task.node for task in tasks if task.desired <= TaskState.RUNNING})
