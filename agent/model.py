"""The vocabulary as frozen values: what discovery saw, what the proxies shall serve.

Everything here is immutable and comparable, so that an unchanged workload can be the same object
in the next snapshot and a change is found by identity first. This module must not do I/O and must
not know Docker, nginx or the configuration file.
"""

from __future__ import annotations

import hashlib
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
        vips: virtual IPs of a Swarm service, one for each of its networks; none where it has none
            (endpoint mode dnsrr).
        hostname, domainname: the name that a container has for itself, in two parts.
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
    vips: tuple[Attachment, ...] = ()
    hostname: str = ""
    domainname: str = ""


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
        served: it is served nevertheless: a warning.
    """

    subject: str
    reason: str
    message: str
    hint: str
    source: str = ""
    served: bool = False


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

    `weight` is 0 to 1000; 0 takes no new traffic. A `backup` takes traffic only while no other
    peer can.
    """

    id: str
    address: str
    port: int
    weight: int = 1
    state: PeerState = PeerState.UP
    backup: bool = False


class Algorithm(StrEnum):
    """How a peer is chosen for a request that belongs to no session."""

    ROUND_ROBIN = "round_robin"
    LEAST_CONN = "least_conn"
    EWMA = "ewma"
    """Of two at random the one with less in flight times its mean latency."""
    HASH = "hash"
    RANDOM = "random"
    FIRST = "first"
    """The first in order that has room."""


class StickyKind(StrEnum):
    """What a session is told by."""

    COOKIE = "cookie"
    """A cookie that the proxy sets."""
    APP_COOKIE = "app_cookie"
    """A cookie that the application sets; its value is hashed."""
    IP = "ip"


@dataclass(frozen=True, slots=True)
class Sticky:
    """Requests of one session go to one peer, as long as it is there, also while it drains.

    Attributes:
        cookie: name of the cookie; unused for IP.
        max_age: seconds that the proxy's cookie lives; 0 as long as the browser's session.
        secure: the proxy's cookie is sent over TLS only.
        same_site: its SameSite attribute: `Lax`, `Strict` or `None`; empty for none.
        path: its Path attribute.
    """

    kind: StickyKind
    cookie: str = ""
    max_age: int = 0
    secure: bool = False
    http_only: bool = True
    same_site: str = "Lax"
    path: str = "/"


@dataclass(frozen=True, slots=True)
class Canary:
    """A share of the requests goes to another upstream.

    A header or cookie that decides wins over the weight. A canary without peers gets nothing.

    Attributes:
        upstream: name of the upstream that gets them.
        weight: per cent of the requests that say nothing, 0 to 100.
        header: name of a request header; its value `always` sends there, `never` does not.
        header_value: if given, this value sends there instead, and no other says anything.
        cookie: name of a cookie whose value `always` sends there, `never` does not.
    """

    upstream: str
    weight: int = 0
    header: str = ""
    header_value: str = ""
    cookie: str = ""


class CheckKind(StrEnum):
    """What an active health check does."""

    TCP = "tcp"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class Check:
    """Active health checks of every peer. Times in seconds.

    Attributes:
        status: statuses of a healthy answer: `200`, `200-399`, with commas between.
        rise, fall: so many in a row change the verdict.
        host: Host header; empty takes the host of the route.
        tls: an HTTP check speaks TLS with the peer, whose certificate is not verified.
    """

    kind: CheckKind
    method: str = "GET"
    path: str = "/"
    host: str = ""
    interval: float = 5.0
    timeout: float = 2.0
    rise: int = 2
    fall: int = 3
    status: str = "200-399"
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Passive:
    """Peers that fail requests take none for some time.

    Attributes:
        failures: so many in a row eject a peer; 0 never does.
        eject: seconds of the first ejection; each further one is twice as long.
        max_eject: longest ejection, in seconds.
    """

    failures: int = 5
    eject: float = 10.0
    max_eject: float = 300.0


@dataclass(frozen=True, slots=True)
class Retry:
    """When a request is sent to another peer.

    Attributes:
        tries: peers asked in all; 1 never retries, 0 leaves it to the instance.
        on: what is tried again: `error`, `timeout`, `http_500` …; empty leaves it to the site.
        timeout: seconds after the first try in which another may begin; 0 for no limit.
        budget: retries may be this share of requests at most, 0.0 to 1.0, so that a broken
            upstream is not asked many times over; 0 for no limit.
    """

    tries: int = 0
    on: tuple[str, ...] = ()
    timeout: float = 0.0
    budget: float = 0.0


@dataclass(frozen=True, slots=True)
class Circuit:
    """An upstream of which most requests fail is left alone for some time; they get 503 at once.

    Attributes:
        error_ratio: share of failed requests that opens it, above 0.0 to 1.0.
        min_requests: fewer in the window say nothing.
        window: seconds over which is counted.
        open: seconds until a single request tries again.
    """

    error_ratio: float
    min_requests: int = 20
    window: float = 10.0
    open: float = 5.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 leaves it to the settings."""

    connect: float = 0.0
    send: float = 0.0
    read: float = 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How an upstream treats its peers; pushed, never rendered.

    Attributes:
        hash_key: what HASH looks at: `ip`, `uri`, `header:NAME`, `cookie:NAME`, `arg:NAME`.
        hash_balance: no peer gets more than this times the mean load, above 1.0; 0 for no bound.
        slow_start: seconds over which a peer that is added gets up to its weight.
        max_conns: requests in flight per peer; 0 for no limit.
        queue: requests that may wait for a peer below `max_conns`; more get 503.
        queue_timeout: seconds that they wait at most; 0 leaves it to the proxy.
        panic: where less than this share of the peers is healthy, health is ignored, 0.0 to 1.0.
    """

    algorithm: Algorithm = Algorithm.ROUND_ROBIN
    hash_key: str = ""
    hash_balance: float = 0.0
    sticky: Sticky | None = None
    slow_start: float = 0.0
    max_conns: int = 0
    queue: int = 0
    queue_timeout: float = 0.0
    canary: Canary | None = None
    check: Check | None = None
    passive: Passive = Passive()
    panic: float = 0.5
    retry: Retry = Retry()
    circuit: Circuit | None = None
    timeouts: Timeouts = Timeouts()


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


class VerifyClient(StrEnum):
    """Whether clients of a host must show a certificate."""

    OFF = "off"
    OPTIONAL = "optional"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS of a host towards its clients: paths inside the OpenResty container, already checked.

    Attributes:
        verify_client: whether clients must show a certificate that `client_ca` vouches for.
        hsts: value of the Strict-Transport-Security header; empty for none.
    """

    certificate: str
    key: str
    verify_client: VerifyClient = VerifyClient.OFF
    client_ca: str = ""
    hsts: str = ""


@dataclass(frozen=True, slots=True)
class BackendTls:
    """TLS towards the peers of an upstream: its identity, which decides what connections it shares.

    Attributes:
        verify: the certificate of the peer is verified, against `ca` and for `name`.
        ca: path of the CA inside the OpenResty container; empty takes the system's.
        name: server name to ask and to verify for; empty takes the host of the route.
        certificate, key: what we show the peer; paths, empty for nothing.
    """

    verify: bool = False
    ca: str = ""
    name: str = ""
    certificate: str = ""
    key: str = ""

    def server_name(self, host: str) -> str:
        """The name to ask for on behalf of a host; empty where it is each request's own.

        That is so for a host with a wildcard, and for hosts that nobody claims (empty).
        """
        return self.name or ("" if host.startswith("*") else host)

    def identity(self, host: str) -> str:
        """What tells connections apart that must not be shared: 16 hex digits."""
        ca = self.ca if self.verify else ""
        parts = (str(self.verify), ca, self.server_name(host), self.certificate, self.key)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class Protocol(StrEnum):
    """What is spoken with the peers."""

    HTTP = "http"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Redirect:
    """All requests of a host are sent elsewhere: to `target` (scheme optional) + request URI."""

    host: str
    target: str


@dataclass(frozen=True, slots=True)
class Location:
    """A context root of a host and the upstream that serves it.

    Attributes:
        path: "/" or a path without a slash at its end; matches itself and what lies below it.
        rewrite: the path is taken off before the request goes to the upstream.
        tls_only: plain HTTP is redirected to TLS.
        websocket_endpoints: paths named by labels; sorted. Websockets work everywhere without,
            these are only checked to lie within the context root's host.
        backend_tls: TLS towards the peers; None for none.
        mirror: name of the upstream that gets a copy of each request; empty for none.
        directives: raw nginx directives, each with its semicolon, of kinds that the operator
            allows by name; already checked.
        request_buffering: the body of a request is received whole before a peer gets any of it,
            so that it can be sent again; without, it goes on as it comes.
    """

    path: str
    upstream: str
    rewrite: bool = False
    tls_only: bool = False
    websocket_endpoints: tuple[str, ...] = ()
    backend_tls: BackendTls | None = None
    protocol: Protocol = Protocol.HTTP
    mirror: str = ""
    directives: tuple[str, ...] = ()
    request_buffering: bool = True


@dataclass(frozen=True, slots=True)
class Host:
    """One server name with its aliases: one rendered file.

    Attributes:
        name: lower case, IDN in its ASCII form.
        aliases: further names with the very same locations and TLS; sorted.
        locations: sorted by path.
        redirects: names among the host's own that are sent elsewhere; sorted.
        passthrough: name of the upstream that gets the TLS connections of this host unopened;
            empty for none. Needs the stream module.
    """

    name: str
    aliases: tuple[str, ...]
    locations: tuple[Location, ...]
    tls: Tls | None = None
    redirects: tuple[Redirect, ...] = ()
    passthrough: str = ""


@dataclass(frozen=True, slots=True)
class TcpRoute:
    """A port of the proxy whose connections go to an upstream unopened. Needs the stream module."""

    port: int
    upstream: str


@dataclass(frozen=True, slots=True)
class Site:
    """All that is rendered; hosts sorted by name, TCP routes by port.

    Attributes:
        default: locations for requests of hosts that nobody claims; none answers them with 503.
    """

    hosts: tuple[Host, ...]
    default: tuple[Location, ...] = ()
    tcp: tuple[TcpRoute, ...] = ()


@dataclass(frozen=True, slots=True)
class Desired:
    """What every OpenResty instance shall serve, compiled from one snapshot."""

    membership: Membership
    site: Site
    rejections: tuple[Rejection, ...]
