"""What labels come to: declarations of routes, or reasons why there are none.

The values here are what every dialect produces, so that nothing behind them knows how a label was
spelled, but for telling people of it. This module must not read labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from agent.config.settings import Settings
from agent.model import (
    EMPTY,
    BackendTls,
    Canary,
    Policy,
    Protocol,
    Redirect,
    Rejection,
    VerifyClient,
    Workload,
    WorkloadKind,
)

DEFAULT_POLICY = Policy()


class Reason(StrEnum):
    """Why something is not routed: the closed set that labels and compile draw from."""

    NO_HOSTNAME = "no_hostname"
    INVALID_HOST = "invalid_host"
    INVALID_LABEL = "invalid_label"
    LABEL_IGNORED = "label_ignored"
    """A label without effect; the route itself lives."""
    DIRECTIVE_NOT_ALLOWED = "directive_not_allowed"
    OTHER_CLUSTER = "other_cluster"
    """It is for the proxies of another service cluster."""
    NETWORK_UNKNOWN = "network_unknown"
    NETWORK_NOT_SHARED = "network_not_shared"
    NETWORK_AMBIGUOUS = "network_ambiguous"
    NO_PORT = "no_port"
    NOT_PUBLISHED = "not_published"
    NO_VIP = "no_vip"
    INSTANCE_NO_ADDRESS = "instance_no_address"
    """Some running instances cannot be reached; the others serve."""
    TOO_MANY_PEERS = "too_many_peers"
    NO_CERTIFICATE = "no_certificate"
    TLS_OFF = "tls_off"
    CONFLICT = "conflict"
    TLS_CONFLICT = "tls_conflict"
    MIRROR_UNKNOWN = "mirror_unknown"
    """There is no such route to mirror to; the route itself lives."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way to spell labels.

    Attributes:
        prefix: what every label of it begins with.
        spelled: options that have another name in this dialect, to that name.
        lacks: options that this dialect does not have.
        lists: options whose value is a list with commas between.
        secrets: certificates are Docker secrets, and naming one switches TLS on.
        silent: first words of labels that ask for no route.
    """

    prefix: str
    spelled: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    lacks: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset({"hosts"})
    secrets: bool = False
    silent: frozenset[str] = frozenset()

    def label(self, option: str, route: str = "") -> str:
        """The label that sets an option of the route of that name."""
        name = f"{route}." if route else ""
        return f"{self.prefix}{name}{self.spelled.get(option, option)}"


INTERLOCK = Dialect("interlock.", silent=frozenset({"ext", "app"}))
"""Interlock 1.x: also on containers."""

DOCKER_LB = Dialect(
    "com.docker.lb.",
    spelled=MappingProxyType(
        {
            "hostname": "hosts",
            "alias_domain": "hosts",
            "ssl_cert_key": "ssl_key",
            "websocket_endpoint": "websocket_endpoints",
        }
    ),
    lacks=frozenset({"hostname", "domain", "alias_domain"}),
    lists=frozenset({"hosts", "websocket_endpoint"}),
    secrets=True,
)
"""Interlock 2 and 3, Docker's and Mirantis' "layer 7 routing"."""


@dataclass(frozen=True, slots=True)
class RouteDeclaration:
    """One route that a workload asks for, in whatever dialect it asked.

    File names are relative, to the certificate directory or, with `dialect.secrets`, to that of
    the secrets; also those in `backend_tls`.

    Attributes:
        host: server name, checked, lower case, IDN in ASCII form, possibly `*.example.com`; empty
            for a route that is only the default backend or a TCP port.
        aliases: further server names, checked, sorted, without `host`.
        context_root: "/" or a checked path without a slash at its end.
        rewrite: the context root is taken off before the request goes to the upstream.
        port: container port; None leaves it to what the workload declares.
        network: name as written in the label, empty leaves it to what is shared.
        weight: weight of each peer; None leaves it to the source.
        tls: whether the host speaks TLS; None says nothing and takes what others say.
        tls_only: plain HTTP is redirected to TLS.
        certificate, certificate_key: checked file names, or empty.
        websocket_endpoints: checked paths, sorted.
        policy: how the upstream chooses among its peers; its `canary` is never set.
        name: name of the route among those of the workload; empty for the unnamed one.
        backup: its peers serve only while no others can.
        vip: the peer is the virtual IP of the service instead of its tasks.
        verify_client, client_ca: which clients the host lets in; the CA is a checked file name.
        hsts: value of Strict-Transport-Security, empty for none; None says nothing;
            `forms.HSTS_DEFAULT` takes that of the settings.
        passthrough: TLS connections of the host go to the peers unopened.
        redirects: names among its own that are sent elsewhere; sorted.
        default_backend: it serves hosts that nobody claims too.
        tcp_port: port of the proxy whose connections go to the peers unopened.
        backend_tls: TLS towards the peers.
        mirror: host and context root of the route that gets a copy of each request.
        directives: raw nginx directives of kinds that the operator allows.
        request_buffering: a peer gets a request's body when all of it is there.
        canary: its peers take a share of the requests for the same host and context root; what of
            them, with an empty `upstream`.
    """

    host: str
    aliases: tuple[str, ...] = ()
    context_root: str = "/"
    rewrite: bool = False
    port: int | None = None
    network: str = ""
    weight: int | None = None
    tls: bool | None = None
    tls_only: bool = False
    certificate: str = ""
    certificate_key: str = ""
    websocket_endpoints: tuple[str, ...] = ()
    policy: Policy = DEFAULT_POLICY
    name: str = ""
    dialect: Dialect = INTERLOCK
    backup: bool = False
    vip: bool = False
    verify_client: VerifyClient = VerifyClient.OFF
    client_ca: str = ""
    hsts: str | None = None
    passthrough: bool = False
    redirects: tuple[Redirect, ...] = ()
    default_backend: bool = False
    tcp_port: int | None = None
    backend_tls: BackendTls | None = None
    protocol: Protocol = Protocol.HTTP
    mirror: tuple[str, str] | None = None
    directives: tuple[str, ...] = ()
    request_buffering: bool = True
    canary: Canary | None = None

    def label(self, option: str) -> str:
        """The label that sets an option of this route, for telling people."""
        return self.dialect.label(option, self.name)

    @property
    def what(self) -> str:
        """What it asks for, for people: "a.example.com", "TCP port 5432"."""
        names = [self.host, *self.aliases] if self.host else []
        if self.default_backend:
            names.append("the default backend")
        if self.tcp_port is not None:
            names.append(f"TCP port {self.tcp_port}")
        return ", ".join(names)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the labels of one workload came to; both empty where it asks for nothing."""

    routes: tuple[RouteDeclaration, ...] = ()
    rejections: tuple[Rejection, ...] = ()


NOTHING = Reading()


@dataclass(frozen=True, slots=True)
class Rules:
    """What of the settings the reading of labels depends on.

    Attributes:
        clusters: values of `service_cluster` that are served, "" for no such label.
        directives: names of raw nginx directives that are let through.
        hostname_fallback: containers without a host name label go by their own name.
    """

    clusters: frozenset[str] = frozenset({""})
    directives: frozenset[str] = frozenset()
    hostname_fallback: bool = False


DEFAULT_RULES = Rules()


def rules_of(settings: Settings) -> Rules:
    """What of the settings the reading of labels depends on."""
    return Rules(
        clusters=frozenset(settings.service_clusters or ("",)),
        directives=frozenset(settings.extension.allowed_directives),
        hostname_fallback=settings.hostname_fallback,
    )


_KIND_WORDS = {
    WorkloadKind.SERVICE: "service",
    WorkloadKind.CONTAINER: "container",
    WorkloadKind.STATIC: "static service",
}


def subject_of(workload: Workload) -> str:
    """How rejections name a workload: "service shop_web", "container web-1"."""
    return f"{_KIND_WORDS[workload.kind]} {workload.name}"
