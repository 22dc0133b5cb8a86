"""The vocabulary as frozen values: what discovery saw, what the proxies shall serve.

Everything here is immutable and comparable, so that an unchanged workload can be the same object
in the next snapshot and a change is found by identity first. This module must not do I/O and must
not know Docker, nginx or the configuration file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

EMPTY: Mapping[str, str] = MappingProxyType({})


class InstanceState(StrEnum):
    """Where a task or container stands, as far as traffic is concerned."""

    UP = "up"
    DRAINING = "draining"
    """Still running, but told or about to be told to stop: no new traffic."""
    WAITING = "waiting"
    """On its way up: not scheduled, starting, or its health check has not passed yet."""
    GONE = "gone"
    """Has ended, or its node is lost."""


class WorkloadKind(StrEnum):
    """What a workload is where it comes from."""

    SERVICE = "service"
    CONTAINER = "container"
    STATIC = "static"


class WorkloadKey(NamedTuple):
    """Identity of a workload over all sources."""

    source: str
    id: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """An instance's address on a network; `address` is a bare IPv4 or IPv6 address."""

    network: str
    address: str


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A TCP port of an instance that is reachable at its node.

    `host` is the address it is bound to, empty where that is every address of the node, `::` where
    it is every IPv6 address alone.
    """

    target: int
    published: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class Instance:
    """One task or container, of whatever state.

    Attributes:
        id: task or container id; becomes the peer's id.
        name: for people: `shop_web.2`, a container's name.
        node: host name of the node it runs on, empty if none yet.
        node_address: address of that node as the cluster knows it, empty if unknown.
        detail: why the state is not UP, for `explain` ("desired state is shutdown").
        weight: weight given by the source itself (static file); None leaves it to the label.
        host_network: it shares its node's network: every port it listens on is reached at
            `node_address` under that same number, declared or not.
    """

    id: str
    name: str
    state: InstanceState
    node: str = ""
    node_address: str = ""
    attachments: tuple[Attachment, ...] = ()
    published: tuple[PublishedPort, ...] = ()
    detail: str = ""
    weight: int | None = None
    host_network: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """A Swarm service, a container of an engine, or a service of the static file.

    Attributes:
        created: Unix time in seconds; who was first keeps a contested host.
        labels: on a service `deploy.labels`; on a container its labels. First to be asked.
        template_labels: labels of the container template of a service; asked second.
        networks: names of the networks it is attached to that a proxy could share; without the
            ingress network and, in swarm mode, without the default bridge.
        ports: TCP container ports it declares, lowest first (endpoint spec, EXPOSE); a port to
            fall back on where no label names one.
        wanted: how many instances there ought to be; None where the source cannot say.
        stack: namespace of the stack it belongs to, empty if none; networks may be named
            without it.
        host_ports_only: True for a service that is on no overlay network, so that its instances
            are reached at their node's address and published port.
    """

    key: WorkloadKey
    kind: WorkloadKind
    name: str
    created: float
    labels: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    template_labels: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    networks: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    instances: tuple[Instance, ...] = ()
    wanted: int | None = None
    stack: str = ""
    host_ports_only: bool = False


@dataclass(frozen=True, slots=True)
class ProxyInstance:
    """An OpenResty instance that discovery found (a task or container).

    Attributes:
        id: task or container id.
        attachments: where it may be reached; the driver tries them in order.
        node_address, published: the way in for a proxy without an overlay network.
    """

    id: str
    name: str
    attachments: tuple[Attachment, ...] = ()
    node_address: str = ""
    published: tuple[PublishedPort, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """Something that asked to be routed and is not, or a part of it that was refused.

    Attributes:
        subject: who: "service shop_web", "container web-1", "host a.example.com".
        reason: short machine-readable code, snake_case, from a closed set: it labels a metric.
        message: a sentence for people: the label, the value, what is wrong with it.
        hint: what to do about it.
        source: name of the source that the subject comes from, empty for hosts.
    """

    subject: str
    reason: str
    message: str
    hint: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class SourceSnapshot:
    """All that one source saw, complete: a source never publishes a partial list.

    Attributes:
        source: name of the source, unique among the configured ones ("swarm", "engine",
            "classic", "static").
        proxies: OpenResty instances seen by this source.
        proxy_networks: networks that the OpenResty service is attached to; None where this source
            does not know of one, and then nothing can be concluded from a missing network.
        rejections: what the source itself could not make sense of.
        changed_at: monotonic time (seconds) at which the oldest change that is new in this
            snapshot was heard of; where change-to-applied is measured from.
    """

    source: str
    workloads: Mapping[WorkloadKey, Workload]
    proxies: tuple[ProxyInstance, ...] = ()
    proxy_networks: tuple[str, ...] | None = None
    rejections: tuple[Rejection, ...] = ()
    changed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What all sources saw, each complete; by source name."""

    sources: Mapping[str, SourceSnapshot]


class PeerState(StrEnum):
    """State of a peer as it is pushed."""

    UP = "up"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Peer:
    """One task or container of an upstream.

    `weight` is 0 to 1000; 0 takes no new traffic.
    """

    id: str
    address: str
    port: int
    weight: int = 1
    state: PeerState = PeerState.UP


@dataclass(frozen=True, slots=True)
class Policy:
    """How an upstream chooses among its peers; pushed, never rendered."""

    algorithm: str = "round_robin"


@dataclass(frozen=True, slots=True)
class Upstream:
    """A named set of peers. The name is host + context root: `app.example.com/api`.

    Attributes:
        hold: seconds that a request may wait for a peer when there is none to send it to; above 0
            only while a replacement is expected (the service wants instances).
        peers: sorted by id.
    """

    name: str
    peers: tuple[Peer, ...]
    policy: Policy = Policy()
    hold: float = 0.0


@dataclass(frozen=True, slots=True)
class Membership:
    """All upstreams: all that is pushed and never rendered."""

    upstreams: Mapping[str, Upstream]


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificate and key of a host: paths inside the OpenResty container, already checked."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Location:
    """A context root of a host and the upstream that serves it.

    Attributes:
        path: "/" or a path without a slash at its end; matches itself and what lies below it.
        rewrite: the path is taken off before the request goes to the upstream.
        tls_only: plain HTTP is redirected to TLS.
        websocket_endpoints: paths named by labels; sorted. Websockets work everywhere without,
            these are only checked to lie within the context root's host.
    """

    path: str
    upstream: str
    rewrite: bool = False
    tls_only: bool = False
    websocket_endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """One server name with its aliases: one rendered file.

    Attributes:
        name: lower case, IDN in its ASCII form.
        aliases: further names with the very same locations and TLS; sorted.
        locations: sorted by path.
    """

    name: str
    aliases: tuple[str, ...]
    locations: tuple[Location, ...]
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """All that is rendered; hosts sorted by name."""

    hosts: tuple[Host, ...]


@dataclass(frozen=True, slots=True)
class Desired:
    """What every OpenResty instance shall serve, compiled from one snapshot."""

    membership: Membership
    site: Site
    rejections: tuple[Rejection, ...]
