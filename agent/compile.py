"""Snapshot and settings in, what every OpenResty instance shall serve out.

The work is in three steps, each of which is done again only for what changed:

1. *Examine* one workload: labels → route declaration → address and port of each instance.
   Depends on that workload, the settings and the networks of the proxies, and on nothing else.
2. *Settle* one name (host or alias): who of those that claim it gets which context root, and
   which TLS the name has. Depends on the claims to that name.
3. *Assemble*: hosts with their aliases, upstreams with their peers. What comes out equal to what
   was there before is the same object, so that a difference is found by identity.

A claim is what a workload says about a name; its peers are no part of it. So a task that comes or
goes touches step 1 of its workload and its own upstreams, however many others there are.

Nothing here does input or output, and nothing here raises on what a workload says: what cannot be
served becomes a `Rejection`. The one thing remembered over time is what lingers: a host that
nobody claims any more stays in the site, without peers, for `Settings.host_linger` seconds.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple

from agent.config.settings import Extension, Settings
from agent.labels import (
    NOTHING,
    Reading,
    Reason,
    RouteDeclaration,
    Rules,
    read_labels,
    rules_of,
    subject_of,
)
from agent.labels.forms import CANARY, HSTS_DEFAULT
from agent.model import (
    Attachment,
    BackendTls,
    Canary,
    Desired,
    Host,
    Instance,
    InstanceState,
    Location,
    Membership,
    Peer,
    PeerState,
    Policy,
    Protocol,
    PublishedPort,
    Redirect,
    Rejection,
    Site,
    Snapshot,
    SourceSnapshot,
    TcpRoute,
    Tls,
    Upstream,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

MAX_PEERS = 10_000
"""Peers that the admin API takes in one upstream."""
MAX_HOLD = 300.0
"""Longest hold, in seconds, that the admin API takes."""

_MAX_ID = 128
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_BYTE}(?:\.{_BYTE}){{3}}")
"""Much faster than `ipaddress`, and nearly every peer's address is looked at with it."""
_NOWHERE = ("0.0.0.0", "::")  # noqa: S104 - refused, not bound to
_PEER_STATES = {
    InstanceState.UP: PeerState.UP,
    InstanceState.DRAINING: PeerState.DRAINING,
}


# --- step 1: one workload ----------------------------------------------------------------------


class Way(Enum):
    """How the instances of a workload are reached."""

    NETWORK = "network"
    NODE_PORT = "node port"
    AS_GIVEN = "as given"


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the peers of a route are.

    Attributes:
        network: name of the network whose addresses count; empty unless `way` is NETWORK.
        others: further networks shared with OpenResty, for instances that are not on `network`
            (yet, or any more): an update moves them one after the other.
        port: container port; None only where each instance brings its own.
        network_from, port_from: where the two were found, for people.
        doubt: why `network` was not a free choice, though it holds for now; None otherwise.
    """

    way: Way
    network: str = ""
    port: int | None = None
    network_from: str = ""
    port_from: str = ""
    others: tuple[str, ...] = ()
    doubt: Rejection | None = None


class ClaimId(NamedTuple):
    """Identity of a claim: the workload, and the name of its route."""

    workload: WorkloadKey
    route: str


DEFAULT: Final = "*"
"""The name that stands for all hosts that nobody claims; no host can be called so."""
_TCP = ":"
"""What names that stand for a port of the proxy begin with; no host does."""


def _is_host(name: str) -> bool:
    return name != DEFAULT and not name.startswith(_TCP)


def told(name: str, root: str = "") -> str:
    """A name and context root for people."""
    if name == DEFAULT:
        return f"the default backend{'' if root == '/' else ' ' + root}".rstrip()
    if name.startswith(_TCP):
        return f"TCP port {name.removeprefix(_TCP)}"
    return name + root


class Options(NamedTuple):
    """What must agree where several workloads serve one host and context root."""

    rewrite: bool = False
    tls_only: bool = False
    tls: Tls | None = None
    passthrough: bool = False
    backend_tls: BackendTls | None = None
    protocol: Protocol = Protocol.HTTP
    mirror: tuple[str, str] | None = None
    directives: tuple[str, ...] = ()
    request_buffering: bool = True
    policy: Policy = Policy()


@dataclass(frozen=True, slots=True)
class Claim:
    """What one route of a workload says about the names it wants; without peers.

    Attributes:
        tls, backend_tls: with paths inside the OpenResty container; `tls` without HSTS.
        hsts: the header's value, empty for none; None where the labels say nothing of it.
    """

    id: ClaimId
    created: float
    subject: str
    declaration: RouteDeclaration
    tls: Tls | None
    backend_tls: BackendTls | None = None
    hsts: str | None = None
    kind: WorkloadKind = WorkloadKind.SERVICE

    @property
    def order(self) -> tuple[float, ClaimId]:
        """Who was first keeps what is contested."""
        return self.created, self.id

    @property
    def names(self) -> tuple[str, ...]:
        """The host and its aliases, and what else it is to be had by."""
        route = self.declaration
        names = (route.host, *route.aliases) if route.host else ()
        if route.default_backend:
            names = (*names, DEFAULT)
        if route.tcp_port is not None:
            names = (*names, f"{_TCP}{route.tcp_port}")
        return names

    def root(self, name: str) -> str:
        """The context root that it wants of that name."""
        return "/" if name.startswith(_TCP) else self.declaration.context_root

    def canary(self, name: str) -> Canary | None:
        """What it takes of that name as a canary; connections cannot be told apart for that."""
        return None if name.startswith(_TCP) else self.declaration.canary

    def options(self, name: str) -> Options:
        """What it says of that name."""
        route = self.declaration
        if name.startswith(_TCP):
            return Options(policy=route.policy)
        # A host that nobody claims has no TLS of anybody's, and so is not redirected to it.
        host = name != DEFAULT
        return Options(
            rewrite=route.rewrite,
            tls_only=host and route.tls_only,
            tls=self.tls if host else None,
            passthrough=host and route.passthrough,
            backend_tls=self.backend_tls,
            protocol=route.protocol,
            mirror=route.mirror,
            directives=route.directives,
            request_buffering=route.request_buffering,
            policy=route.policy,
        )

    def says_tls(self, name: str) -> bool:
        """Whether it says anything about TLS of that name."""
        route = self.declaration
        return _is_host(name) and (route.tls is not None or route.passthrough)


@dataclass(frozen=True, slots=True)
class Route:
    """A route that can be served: the claim, and the peers behind it."""

    claim: Claim
    reach: Reach
    peers: tuple[Peer, ...]
    hold: float


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of one workload by itself, before others are looked at."""

    workload: Workload
    rules: Rules
    reading: Reading
    routes: tuple[Route, ...]
    rejections: tuple[Rejection, ...]


def examine(
    workload: Workload,
    proxy_networks: tuple[str, ...] | None,
    settings: Settings,
    before: Examined | None = None,
    proxies: tuple[str, ...] = (),
) -> Examined:
    """Read the labels of a workload and find its instances.

    Args:
        proxy_networks: networks that the OpenResty instances of its source are on, if known.
        proxies: names of those instances, for hints.
        before: what came out last time; parts of it are used again where they still hold.
    """
    rules = rules_of(settings)
    reading = _reading(workload, rules, before)
    routes: list[Route] = []
    rejections = list(reading.rejections)
    for declaration in reading.routes:
        verdict = _route(
            workload,
            declaration,
            proxy_networks,
            settings,
            proxies=proxies,
            before=_reach_of(before, declaration.name),
        )
        if isinstance(verdict, Rejection):
            rejections.append(verdict)
            continue
        route, missing = verdict
        routes.append(_reuse(route, before))
        rejections.extend(missing)
    return Examined(workload, rules, reading, tuple(routes), tuple(rejections))


def _reach_of(before: Examined | None, route: str) -> Reach | None:
    for known in before.routes if before is not None else ():
        if known.claim.id.route == route:
            return known.reach
    return None


def _reading(workload: Workload, rules: Rules, before: Examined | None) -> Reading:
    if before is not None and before.rules == rules:
        old = before.workload
        same = (
            old.name == workload.name
            and old.labels == workload.labels
            and old.template_labels == workload.template_labels
            and (old.hostname, old.domainname) == (workload.hostname, workload.domainname)
        )
        if same:
            return before.reading
    return read_labels(workload, rules)


def _reuse(route: Route, before: Examined | None) -> Route:
    for old in before.routes if before is not None else ():
        if old.claim.id == route.claim.id:
            claim = old.claim if old.claim == route.claim else route.claim
            peers = old.peers if old.peers == route.peers else route.peers
            return replace(route, claim=claim, peers=peers)
    return route


def _route(
    workload: Workload,
    declaration: RouteDeclaration,
    proxy_networks: tuple[str, ...] | None,
    settings: Settings,
    *,
    proxies: tuple[str, ...],
    before: Reach | None,
) -> tuple[Route, tuple[Rejection, ...]] | Rejection:
    tls = _tls(workload, declaration, settings.extension)
    if isinstance(tls, Rejection):
        return tls
    taken = _own_port(workload, declaration, settings)
    if taken is not None:
        return taken
    reach = find_reach(workload, declaration, proxy_networks, proxies=proxies, before=before)
    if isinstance(reach, Rejection):
        return reach
    claim = Claim(
        id=ClaimId(workload.key, declaration.name),
        created=workload.created,
        subject=subject_of(workload),
        declaration=declaration,
        tls=tls,
        backend_tls=_backend_tls(declaration, settings.extension),
        hsts=_hsts(declaration, settings.extension),
        kind=workload.kind,
    )
    found = (
        _vip_peers(workload, declaration, reach)
        if declaration.vip
        else _peers(workload, declaration, reach, settings)
    )
    if isinstance(found, Rejection):
        return found
    peers, missing = found
    hold = min(settings.hold_timeout, MAX_HOLD) if workload.wanted else 0.0
    doubt = () if reach.doubt is None else (reach.doubt,)
    return Route(claim, reach, peers, hold), missing + doubt


def _reject(workload: Workload, reason: Reason, message: str, hint: str) -> Rejection:
    return Rejection(
        subject=subject_of(workload),
        reason=reason.value,
        message=message,
        hint=hint,
        source=workload.key.source,
    )


def _tls(
    workload: Workload, declaration: RouteDeclaration, extension: Extension
) -> Tls | Rejection | None:
    """Certificate and key of a route; None where it does not speak TLS."""
    asked = declaration.tls or (declaration.tls is None and extension.tls_everywhere)
    if extension.ssl_port == 0 and (asked or declaration.passthrough):
        return _reject(
            workload,
            Reason.TLS_OFF,
            f"{declaration.what} asks for TLS ({declaration.label('ssl')}, "
            f"{declaration.label('ssl_only')} or {declaration.label('ssl_passthrough')}), but TLS "
            "is switched off by SSLPort = 0.",
            "Set SSLPort in the configuration, or remove the label.",
        )
    if declaration.passthrough and extension.proxy_protocol:
        return _reject(
            workload,
            Reason.TLS_OFF,
            f"{declaration.what} asks for its TLS to be passed through "
            f"({declaration.label('ssl_passthrough')}), which cannot be done while the listeners "
            "take the PROXY protocol (ProxyProtocol = true).",
            "Set ProxyProtocol to false in the configuration, or remove the label.",
        )
    if not asked or declaration.passthrough or not declaration.host:
        return None
    client_ca = _path(declaration, extension, declaration.client_ca)
    if declaration.certificate and declaration.certificate_key:
        return Tls(
            certificate=_path(declaration, extension, declaration.certificate),
            key=_path(declaration, extension, declaration.certificate_key),
            verify_client=declaration.verify_client,
            client_ca=client_ca,
        )
    default = extension.default_certificate
    if not declaration.certificate and not declaration.certificate_key and default is not None:
        return Tls(*default, verify_client=declaration.verify_client, client_ca=client_ca)
    missing = " and ".join(
        declaration.label(option)
        for option, value in (
            ("ssl_cert", declaration.certificate),
            ("ssl_cert_key", declaration.certificate_key),
        )
        if not value
    )
    what = (
        "Docker secrets (mounted in OpenResty, in SSLSecretPath)"
        if declaration.dialect.secrets
        else "files (below SSLCertPath)"
    )
    return _reject(
        workload,
        Reason.NO_CERTIFICATE,
        f"{declaration.host} asks for TLS, but there is no {missing}"
        + (" and no SSLDefaultCert." if default is None else "."),
        f"Name both {what} in {declaration.label('ssl_cert')} and "
        f"{declaration.label('ssl_cert_key')}, or neither and set SSLDefaultCert in the "
        "configuration.",
    )


def _path(declaration: RouteDeclaration, extension: Extension, name: str) -> str:
    """Where a file that a label names lies inside the OpenResty container; empty for none."""
    if not name:
        return ""
    if declaration.dialect.secrets:
        return extension.secret_path(name)
    return extension.certificate_path(name)


def _backend_tls(declaration: RouteDeclaration, extension: Extension) -> BackendTls | None:
    asked = declaration.backend_tls
    if asked is None:
        return None
    return replace(
        asked,
        ca=_path(declaration, extension, asked.ca),
        certificate=_path(declaration, extension, asked.certificate),
        key=_path(declaration, extension, asked.key),
    )


_HSTS_USUAL = "max-age=16000000"


def _hsts(declaration: RouteDeclaration, extension: Extension) -> str | None:
    if declaration.hsts != HSTS_DEFAULT:
        return declaration.hsts
    return _HSTS_USUAL if extension.hsts == "off" else extension.hsts


def _own_port(
    workload: Workload, declaration: RouteDeclaration, settings: Settings
) -> Rejection | None:
    """That a TCP port is one that the proxy itself listens on, None where it is not."""
    extension = settings.extension
    own = {
        extension.port: "Port",
        extension.ssl_port: "SSLPort",
        extension.grpc_port: "GRPCPort",
        settings.openresty.admin_port: "AdminPort",
    }
    if declaration.tcp_port is None or declaration.tcp_port not in own:
        return None
    return _reject(
        workload,
        Reason.CONFLICT,
        f"{declaration.label('tcp_port')}={declaration.tcp_port} is the proxy's own port "
        f"({own[declaration.tcp_port]}).",
        "Choose another port.",
    )


def find_reach(
    workload: Workload,
    declaration: RouteDeclaration,
    proxy_networks: tuple[str, ...] | None,
    *,
    proxies: tuple[str, ...] = (),
    before: Reach | None = None,
) -> Reach | Rejection:
    """Decide over which network and port the instances of a workload are reached.

    Args:
        before: what was decided last time. Where it has become one of several possible networks it
            stays, with a rejection that says so: another network must not take a service down
            that is served.
    """
    if workload.kind is WorkloadKind.STATIC:
        return Reach(
            Way.AS_GIVEN,
            port=declaration.port or _lowest(workload.ports),
            network_from="addresses are given by the static file",
            port_from=f"each instance's own, else {declaration.label('port')}",
        )
    network: tuple[str, str] | Rejection | None
    doubt: Rejection | None = None
    if declaration.network:
        network = _named_network(workload, declaration, proxy_networks, proxies)
    elif workload.host_ports_only:
        network = None
    elif workload.kind is WorkloadKind.CONTAINER:
        network = _container_network(workload, declaration, proxy_networks)
    else:
        network = _shared_network(workload, declaration, proxy_networks)
    if (
        isinstance(network, Rejection)
        and network.reason == Reason.NETWORK_AMBIGUOUS
        and before is not None
        and before.network in workload.networks
        and (proxy_networks is None or before.network in proxy_networks)
    ):
        doubt = _doubtful(network, before.network)
        network = before.network, before.network_from
    if isinstance(network, Rejection):
        return network
    if network is None:
        return _node_port(workload, declaration)
    name, network_from = network
    if declaration.port is not None:
        port, port_from = declaration.port, declaration.label("port")
    else:
        lowest = _lowest(workload.ports)
        if lowest is None:
            return _reject(
                workload,
                Reason.NO_PORT,
                f"{declaration.what}: no port is known, since there is no "
                f"{declaration.label('port')} label and neither the service nor its image "
                "declares one.",
                f"Add the label {declaration.label('port')} with the port that the application "
                "listens on.",
            )
        port, port_from = lowest, "the lowest port declared"
    others = tuple(sorted(set(proxy_networks or ()) - {name, "bridge", "host"}))
    return Reach(Way.NETWORK, name, port, network_from, port_from, others, doubt)


def _lowest(ports: Iterable[int]) -> int | None:
    return min((port for port in ports if 1 <= port <= 65535), default=None)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _named_network(
    workload: Workload,
    declaration: RouteDeclaration,
    proxy_networks: tuple[str, ...] | None,
    proxies: tuple[str, ...],
) -> tuple[str, str] | Rejection:
    """The network of the label: its exact name, else with the stack's name in front."""
    label, option = declaration.network, declaration.label("network")
    prefixed = f"{workload.stack}_{label}" if workload.stack else label
    name = label if label in workload.networks else prefixed
    if name not in workload.networks:
        tried = label if prefixed == label else f"{label} nor {prefixed}"
        return _reject(
            workload,
            Reason.NETWORK_UNKNOWN,
            f"{option}={label}, but {subject_of(workload)} is not attached to {tried}; "
            f"it is attached to: {_listed(workload.networks)}.",
            f"Correct the label {option}, or attach it: " + _attach(workload, label, workload.name),
        )
    # A proxy in the host's network reaches the bridges of a plain engine without being on them.
    on_bridges = workload.kind is WorkloadKind.CONTAINER and (
        not proxy_networks or "host" in proxy_networks
    )
    if proxy_networks is not None and name not in proxy_networks and not on_bridges:
        return _reject(
            workload,
            Reason.NETWORK_NOT_SHARED,
            f"{option}={label}, but OpenResty is not attached to {name}; OpenResty is "
            f"attached to: {_listed(proxy_networks)}.",
            _attach_openresty(workload, name, proxies, option),
        )
    return name, option


def _attach_openresty(
    workload: Workload, network: str, proxies: tuple[str, ...], option: str
) -> str:
    """How OpenResty gets onto a network, by the names of its containers where they are known."""
    commands = "; ".join(_attach(workload, network, proxy) for proxy in proxies or ("OPENRESTY",))
    naming = "" if proxies else " (with its name for OPENRESTY)"
    setting = " or set AttachNetworks = true," if workload.kind is WorkloadKind.CONTAINER else ""
    return (
        f"Attach OpenResty too: {commands}{naming},{setting} or name another network in {option}."
    )


def _attach(workload: Workload, network: str, target: str) -> str:
    if workload.kind is WorkloadKind.CONTAINER:
        return f"docker network connect {network} {target}"
    return f"docker service update --network-add {network} {target}"


def _shared_network(
    workload: Workload, declaration: RouteDeclaration, proxy_networks: tuple[str, ...] | None
) -> tuple[str, str] | Rejection:
    """The one network of a service that OpenResty is on too."""
    if proxy_networks is None:
        candidates = workload.networks
        found = "its only network"
    else:
        candidates = tuple(name for name in workload.networks if name in proxy_networks)
        found = "the one network shared with OpenResty"
    if len(candidates) == 1:
        return candidates[0], found
    if candidates:
        return _ambiguous(workload, declaration, candidates, proxy_networks)
    if proxy_networks is None:
        return _reject(
            workload,
            Reason.NETWORK_NOT_SHARED,
            f"{subject_of(workload)} is attached to no network on which it could be reached.",
            "Attach it to a network that OpenResty is on: "
            + _attach(workload, "NETWORK", workload.name),
        )
    common = proxy_networks[0] if len(proxy_networks) == 1 else "NETWORK"
    return _reject(
        workload,
        Reason.NETWORK_NOT_SHARED,
        f"{subject_of(workload)} shares no network with OpenResty. It is attached to: "
        f"{_listed(workload.networks)}; OpenResty is attached to: {_listed(proxy_networks)}.",
        "Attach it to a network of OpenResty: "
        + _attach(workload, common, workload.name)
        + f", and name that network in {declaration.label('network')} where there is more than "
        "one.",
    )


def _ambiguous(
    workload: Workload,
    declaration: RouteDeclaration,
    candidates: tuple[str, ...],
    proxy_networks: tuple[str, ...] | None,
) -> Rejection:
    option = declaration.label("network")
    what = (
        "shares several networks with OpenResty"
        if proxy_networks is not None
        else "is attached to several networks, and it is not known which of them OpenResty is on"
    )
    command = (
        f"docker service update --label-add {option}={sorted(candidates)[0]} {workload.name}"
        if workload.kind is WorkloadKind.SERVICE
        else f"docker run --label {option}={sorted(candidates)[0]} ..."
    )
    return _reject(
        workload,
        Reason.NETWORK_AMBIGUOUS,
        f"{subject_of(workload)} {what}: {_listed(candidates)}.",
        f"Name one of them in the label {option}, for example: {command}",
    )


def _doubtful(ambiguous: Rejection, network: str) -> Rejection:
    return replace(
        ambiguous,
        message=f"{ambiguous.message} It is still reached over {network}, as it was before, until "
        "the agent starts anew.",
    )


def _container_network(
    workload: Workload, declaration: RouteDeclaration, proxy_networks: tuple[str, ...] | None
) -> tuple[str, str] | Rejection | None:
    """A network that a container shares with a discovered proxy; None: go by published ports."""
    shared = tuple(name for name in workload.networks if name in (proxy_networks or ()))
    # On the default bridge by habit, on another by intent.
    # Told as `node/name`, a network is on one node only, and other proxies do not reach it.
    own = tuple(name for name in shared if name not in ("host", "none") and "/" not in name)
    candidates = tuple(name for name in own if name != "bridge") or own
    if len(candidates) > 1:
        return _ambiguous(workload, declaration, candidates, proxy_networks)
    return (candidates[0], "the one network shared with OpenResty") if candidates else None


def _node_port(workload: Workload, declaration: RouteDeclaration) -> Reach | Rejection:
    """Reach a workload at its nodes' addresses and published ports."""
    running = [item for item in workload.instances if item.state in _PEER_STATES]
    published = {port.target for item in running or workload.instances for port in item.published}
    if declaration.port is not None:
        target, port_from = declaration.port, declaration.label("port")
    else:
        lowest = _lowest(published)
        if lowest is None:
            lowest = _lowest(workload.ports)
        if lowest is None:
            return _reject(
                workload,
                Reason.NO_PORT,
                f"{declaration.what}: no port is known, since there is no "
                f"{declaration.label('port')} label and no TCP port is published.",
                "Publish a port of it, or attach it to a network that OpenResty is on and add the "
                f"labels {declaration.label('network')} and {declaration.label('port')}.",
            )
        target, port_from = lowest, "the lowest port published"
    own_node = any(item.host_network for item in workload.instances)
    up = any(item.state is InstanceState.UP for item in running)
    if target not in published and up and not own_node:
        return _reject(
            workload,
            Reason.NOT_PUBLISHED,
            f"{declaration.what}: port {target} ({port_from}) of {subject_of(workload)} is not "
            f"published, and no network is shared with OpenResty; published are: "
            f"{_listed(str(port) for port in published)}.",
            f"Publish port {target}, or attach it to a network that OpenResty is on and name that "
            f"network in {declaration.label('network')}.",
        )
    return Reach(
        Way.NODE_PORT,
        port=target,
        network_from="the node's address and the published port",
        port_from=port_from,
    )


def _peers(
    workload: Workload, declaration: RouteDeclaration, reach: Reach, settings: Settings
) -> tuple[tuple[Peer, ...], tuple[Rejection, ...]]:
    peers: list[Peer] = []
    missing: list[tuple[str, str]] = []
    for instance in workload.instances:
        state = _PEER_STATES.get(instance.state)
        if state is None:
            continue
        place = place_of(instance, reach, settings)
        if isinstance(place, str):
            if state is PeerState.UP:
                missing.append((instance.name or instance.id, place))
            continue
        address, port = place
        weight = instance.weight if instance.weight is not None else declaration.weight
        peers.append(
            Peer(
                id=_peer_id(instance.id),
                address=address,
                port=port,
                weight=1 if weight is None else min(max(weight, 0), 1000),
                state=state,
                backup=declaration.backup,
            )
        )
    peers.sort(key=_by_id)
    if not missing:
        return tuple(peers), ()
    return tuple(peers), (_no_address(workload, declaration, sorted(missing)),)


def _vip_peers(
    workload: Workload, declaration: RouteDeclaration, reach: Reach
) -> tuple[tuple[Peer, ...], tuple[Rejection, ...]] | Rejection:
    """The virtual IP as the one peer, as long as there is a task behind it."""
    option = declaration.label("backend_mode")
    found = vip_of(workload, reach)
    if found is None:
        where = f" on network {reach.network}" if reach.network else ""
        return _reject(
            workload,
            Reason.NO_VIP,
            f"{option}=vip, but {subject_of(workload)} has no virtual IP{where}.",
            f"Virtual IPs are for Swarm services on an overlay network, without --endpoint-mode "
            f"dnsrr; otherwise remove {option}, so that tasks are reached themselves.",
        )
    place = _checked(found.address, reach.port)
    if isinstance(place, str):
        return _reject(
            workload,
            Reason.NO_VIP,
            f"{option}=vip, but the virtual IP of {subject_of(workload)} is of no use: {place}.",
            f"Remove {option}, so that tasks are reached themselves.",
        )
    states = {_PEER_STATES.get(item.state) for item in workload.instances}
    if states <= {None}:
        return (), ()
    peer = Peer(
        id=_peer_id(f"{workload.key.id}-vip"),
        address=place[0],
        port=place[1],
        weight=1 if declaration.weight is None else declaration.weight,
        state=PeerState.UP if PeerState.UP in states else PeerState.DRAINING,
        backup=declaration.backup,
    )
    return (peer,), ()


def vip_of(workload: Workload, reach: Reach) -> Attachment | None:
    """The virtual IP of a service on the network over which it is reached."""
    for vip in workload.vips:
        if reach.way is Way.NETWORK and vip.network == reach.network:
            return vip
    return None


_NAMED_INSTANCES = 5


def _no_address(
    workload: Workload, declaration: RouteDeclaration, missing: list[tuple[str, str]]
) -> Rejection:
    told = "; ".join(f"{name}: {problem}" for name, problem in missing[:_NAMED_INSTANCES])
    more = (
        f"; and {len(missing) - _NAMED_INSTANCES} more" if len(missing) > _NAMED_INSTANCES else ""
    )
    return _reject(
        workload,
        Reason.INSTANCE_NO_ADDRESS,
        f"{len(missing)} running instance(s) of {subject_of(workload)} cannot be reached: "
        f"{told}{more}.",
        "Others that can be reached serve meanwhile. Check the networks and published ports of "
        f"these, and {declaration.label('network')} and {declaration.label('port')}.",
    )


def _by_id(peer: Peer) -> str:
    return peer.id


def _peer_id(text: str) -> str:
    """The id itself where the admin API takes it, else a digest that it takes."""
    if 0 < len(text) <= _MAX_ID and text.isascii() and text.isprintable():
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def place_of(instance: Instance, reach: Reach, settings: Settings) -> tuple[str, int] | str:
    """Address and port of an instance, or what is missing (a clause for people)."""
    if reach.way is Way.NETWORK:
        for network in (reach.network, *reach.others):
            for attachment in instance.attachments:
                if attachment.network == network:
                    return _checked(attachment.address, reach.port)
        return f"it has no address on network {reach.network}"
    if reach.way is Way.NODE_PORT:
        return _published_place(instance, reach, settings)
    published = instance.published[0] if instance.published else None
    if instance.attachments:
        address = instance.attachments[0].address
    else:
        address = (published.host if published else "") or instance.node_address
    return _checked(address, published.published if published else reach.port)


def _published_place(instance: Instance, reach: Reach, settings: Settings) -> tuple[str, int] | str:
    offers = [port for port in instance.published if port.target == reach.port]
    if instance.host_network and not offers and reach.port is not None:
        offers = [PublishedPort(target=reach.port, published=reach.port)]
    if not offers:
        return f"it publishes no port for {reach.port}"
    offer = min(offers, key=_preference)
    if offer.host not in ("", *_NOWHERE):
        return _checked(offer.host, offer.published)
    override = settings.extension.backend_override_address
    if override:
        return _checked(override, offer.published)
    if instance.node_address:
        return _checked(instance.node_address, offer.published)
    if not settings.docker_url or settings.docker_url.startswith("unix:"):
        return _checked("::1" if offer.host == "::" else "127.0.0.1", offer.published)
    return "the address of its node is not known (BackendOverrideAddress can give it)"


def _preference(port: PublishedPort) -> tuple[bool, int, str]:
    return ":" in port.host, port.published, port.host


def _checked(address: str, port: int | None) -> tuple[str, int] | str:
    """Let through only what the admin API takes, so that one peer cannot spoil a whole push."""
    if not address:
        return "it has no address"
    if not _IPV4.fullmatch(address):
        try:
            address = str(ipaddress.IPv6Address(address))
        except ValueError:
            return f"{address[:60]!a} is not an IP address"
    if address in _NOWHERE or "%" in address:
        return f"{address[:60]!a} is not an address that can be reached"
    if port is None:
        return "it has no port"
    if not 1 <= port <= 65535:
        return f"{port} is not a port"
    return address, port


# --- step 2: one name --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Branch:
    """The canary of a slot: whose peers it has, how it treats them, and what goes there."""

    winners: tuple[ClaimId, ...]
    policy: Policy
    canary: Canary


@dataclass(frozen=True, slots=True)
class Slot:
    """One context root of a name, as settled.

    Attributes:
        winners: whose peers serve it, oldest first; empty where it only lingers.
        says_tls: whether those who hold it say something about TLS.
        hsts: what the oldest that says anything says of HSTS.
    """

    root: str
    winners: tuple[ClaimId, ...]
    options: Options
    says_tls: bool
    hsts: str | None
    websocket_endpoints: tuple[str, ...]
    branch: Branch | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A name as settled: slots sorted by context root, and what the whole name has.

    Attributes:
        passthrough: its TLS connections go to the upstream of "/" unopened.
        redirect: where all its requests are sent instead; empty for nowhere.
    """

    slots: tuple[Slot, ...]
    tls: Tls | None
    passthrough: bool = False
    redirect: str = ""

    @property
    def served(self) -> tuple[tuple[Slot, ...], Tls | None, bool]:
        """What a host and its aliases have in common."""
        return self.slots, self.tls, self.passthrough


@dataclass(frozen=True, slots=True)
class _Name:
    """What is known of a name: its table, the host that it may be an alias of, who was refused."""

    table: Table
    candidate: str | None
    rejections: tuple[Rejection, ...]


class _Settling:
    """Gives each context root of a name to the oldest claim and to those that agree with it.

    TLS belongs to the whole name: the oldest claim that says anything about it decides, who says
    nothing takes it as it is, and who says something else is refused. Canaries come after all
    others: one without anything to be the canary of serves as if it were none.
    """

    def __init__(self, name: str, claims: list[Claim]) -> None:
        """Settle.

        Args:
            claims: oldest first.
        """
        self.name = name
        self.rejections: list[Rejection] = []
        self.decider: Claim | None = None
        self._holders: dict[str, list[Claim]] = {}
        self._canaries: dict[str, list[Claim]] = {}
        for claim in claims:
            if claim.canary(name) is None:
                self._admit(claim)
        mains = frozenset(self._holders)
        for claim in claims:
            if claim.canary(name) is not None:
                self._admit(claim, canary=claim.root(name) in mains)
        self.redirect = self._settle_redirect(claims)

    def slots(self) -> list[Slot]:
        """The slots that are claimed."""
        return [self._slot(root, winners) for root, winners in self._holders.items()]

    def _admit(self, claim: Claim, *, canary: bool = False) -> None:
        root = claim.root(self.name)
        holders = self._holders.get(root)
        beside = self._canaries.get(root) if canary else holders
        differ = [] if not holders else self._differences(claim, holders[0], policy=not canary)
        if canary and beside and not differ:
            differ = self._canary_differences(claim, beside[0])
            holders = beside
        if differ and holders:
            self.rejections.append(_conflict(self.name, claim, holders[0], differ))
            return
        if claim.says_tls(self.name):
            mine = claim.options(self.name)
            if self.decider is not None:
                theirs = self.decider.options(self.name)
                if (mine.tls, mine.passthrough) != (theirs.tls, theirs.passthrough):
                    self.rejections.append(_tls_conflict(self.name, claim, self.decider))
                    return
            self.decider = self.decider or claim
        (self._canaries if canary else self._holders).setdefault(root, []).append(claim)

    def _differences(self, claim: Claim, holder: Claim, *, policy: bool) -> list[str]:
        mine, theirs = claim.options(self.name), holder.options(self.name)
        differ = [
            told_as(claim.declaration)
            for field, told_as in _OPTION_LABELS.items()
            if getattr(mine, field) != getattr(theirs, field) and (policy or field != "policy")
        ]
        if self.name == DEFAULT and claim.declaration.host != holder.declaration.host:
            differ.append("the host")
        if self.name.startswith(_TCP) and not _same_set(claim, holder):
            differ.append("the service")
        return differ

    def _canary_differences(self, claim: Claim, holder: Claim) -> list[str]:
        differ = []
        if claim.canary(self.name) != holder.canary(self.name):
            differ.append(claim.declaration.label("canary.*"))
        if claim.declaration.policy != holder.declaration.policy:
            differ.append("the balancing policy")
        return differ

    def _settle_redirect(self, claims: list[Claim]) -> str:
        """The oldest claim decides where the requests of a name are sent."""
        target = ""
        for number, claim in enumerate(claims):
            redirects = {item.host: item.target for item in claim.declaration.redirects}
            mine = redirects.get(self.name, "")
            if number == 0:
                target = mine
            elif mine and mine != target:
                self.rejections.append(_redirect_conflict(self.name, claim, claims[0], mine))
        return target

    def _slot(self, root: str, winners: list[Claim]) -> Slot:
        oldest, canaries = winners[0], self._canaries.get(root)
        branch = None
        if canaries:
            canary = canaries[0].canary(self.name)
            assert canary is not None
            branch = Branch(
                winners=tuple(claim.id for claim in canaries),
                policy=canaries[0].declaration.policy,
                canary=canary,
            )
        said = (claim.hsts for claim in winners if claim.hsts is not None)
        return Slot(
            root=root,
            winners=tuple(claim.id for claim in winners),
            options=oldest.options(self.name),
            says_tls=any(claim.says_tls(self.name) for claim in winners),
            hsts=next(said, None),
            websocket_endpoints=tuple(
                sorted(
                    {path for claim in winners for path in claim.declaration.websocket_endpoints}
                )
            ),
            branch=branch,
        )


def _same_set(claim: Claim, holder: Claim) -> bool:
    """Whether two claims to one port are of containers that were made alike, to be one service."""
    containers = claim.kind is holder.kind is WorkloadKind.CONTAINER
    return containers and claim.declaration == holder.declaration


def _settle(
    name: str, claims: list[Claim], lingering: Iterable[Slot], before: Table | None, hsts: str
) -> tuple[Table, tuple[Rejection, ...]]:
    """What becomes of a name.

    Args:
        claims: oldest first.
        lingering: slots that nobody claims and that stay; none of them has the root of a claim.
        before: what the name was; where nobody claims it, it stays like that.
        hsts: value of the header for names that are redirected to TLS and say nothing of it.
    """
    settling = _Settling(name, claims)
    slots = [*settling.slots(), *lingering]
    slots.sort(key=lambda slot: slot.root)
    decider = settling.decider
    if decider is not None:
        options = decider.options(name)
        tls, passthrough = options.tls, options.passthrough
    else:
        # Where nobody says anything there may still be a certificate that serves every host.
        with_tls = [slot for slot in slots if slot.options.tls]
        telling = [slot for slot in slots if slot.says_tls] or with_tls
        tls = telling[0].options.tls if telling else None
        passthrough = bool(telling) and telling[0].options.passthrough
    # A lingering slot may have lost the TLS that it was made for.
    settled = tuple(
        replace(slot, options=slot.options._replace(tls_only=False))
        if slot.options.tls_only and tls is None and not passthrough
        else slot
        for slot in slots
    )
    if tls is not None:
        said = [slot.hsts for slot in settled if slot.hsts is not None]
        if decider is not None and decider.hsts is not None:
            said.insert(0, decider.hsts)
        only = any(slot.options.tls_only for slot in settled)
        tls = replace(tls, hsts=said[0] if said else hsts if only else "")
    redirect = settling.redirect
    if not claims and before is not None:
        redirect = before.redirect
    return Table(settled, tls, passthrough, redirect), tuple(settling.rejections)


_OPTION_LABELS: Mapping[str, Callable[[RouteDeclaration], str]] = {
    "rewrite": lambda route: route.label("context_root_rewrite"),
    "tls_only": lambda route: route.label("ssl_only"),
    "tls": lambda route: (
        f"{route.label('ssl')}, {route.label('ssl_cert')} or {route.label('ssl_cert_key')}"
    ),
    "passthrough": lambda route: route.label("ssl_passthrough"),
    "backend_tls": lambda route: f"{route.label('ssl_backend')} and what belongs to it",
    "protocol": lambda route: route.label("protocol"),
    "mirror": lambda route: route.label("mirror"),
    "directives": lambda route: route.label("backend_option"),
    "request_buffering": lambda route: route.label("request_buffering"),
    "policy": lambda _: "the balancing policy",
}


def _conflict(name: str, claim: Claim, holder: Claim, differ: list[str]) -> Rejection:
    what = told(name, claim.root(name))
    if name.startswith(_TCP):
        hint = "Choose another port of the proxy."
    else:
        hint = (
            f"Give {claim.subject} the same options as {holder.subject} to have both serve it, "
            "or another host or context root."
        )
    return Rejection(
        subject=claim.subject,
        reason=Reason.CONFLICT.value,
        message=f"{what} is held by {holder.subject}, which is older, and {claim.subject} asks "
        f"for it with other options: {', '.join(differ)}.",
        hint=hint,
        source=claim.id.workload.source,
    )


def _tls_conflict(name: str, claim: Claim, decider: Claim) -> Rejection:
    route = claim.declaration
    return Rejection(
        subject=claim.subject,
        reason=Reason.TLS_CONFLICT.value,
        message=f"{name} has its TLS from {decider.subject}, which is older, and {claim.subject} "
        f"asks for other TLS ({route.label('ssl')}, {route.label('ssl_cert')}, "
        f"{route.label('ssl_cert_key')}) on another context root of that host.",
        hint=f"Remove the TLS labels of {claim.subject}, which then has the TLS of the host, or "
        f"make them equal to those of {decider.subject}.",
        source=claim.id.workload.source,
    )


def _redirect_conflict(name: str, claim: Claim, holder: Claim, target: str) -> Rejection:
    return Rejection(
        subject=claim.subject,
        reason=Reason.CONFLICT.value,
        message=f"{name} is held by {holder.subject}, which is older and does not redirect it to "
        f"{target}, as {claim.subject} asks for.",
        hint=f"Give {holder.subject} the same {claim.declaration.label('redirects')}, or remove "
        "them.",
        source=claim.id.workload.source,
    )


# --- step 3: all of it -------------------------------------------------------------------------


@dataclass(slots=True)
class _Source:
    """What the compiler remembers of a source."""

    proxy_networks: tuple[str, ...] | None
    proxies: tuple[str, ...]
    workloads: Mapping[WorkloadKey, Workload]
    examined: dict[WorkloadKey, Examined]


class Compiler:
    """Compiles one snapshot after the other; what did not change costs nothing and stays the same.

    Not for use by several threads at once.

    Args:
        clock: seconds that never go back; tells when what lingers is to go.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._settings: Settings | None = None
        self._sources: dict[str, _Source] = {}
        self._routes: dict[ClaimId, Route] = {}
        self._claims: dict[str, dict[ClaimId, Claim]] = {}
        self._names: dict[str, _Name] = {}
        self._candidates: dict[str, set[str]] = {}
        self._lingering: dict[tuple[str, str], float] = {}
        self._mirrors: dict[str, set[str]] = {}
        self._hosts: dict[str, Host] = {}
        self._default: tuple[Location, ...] = ()
        self._tcp: dict[int, str] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._served: dict[str, tuple[str, ...]] = {}
        self._rejected: dict[tuple[str, ...], tuple[Rejection, ...]] = {}
        self._desired = Desired(Membership({}), Site(()), ())
        self._dirty_names: set[str] = set()
        self._dirty_peers: set[ClaimId] = set()
        self._rejections_changed = False

    @property
    def next_expiry(self) -> float | None:
        """When (on the clock) something that lingers is to go, so that compile is to run again."""
        return min(self._lingering.values(), default=None)

    def compile(self, snapshot: Snapshot, settings: Settings) -> Desired:
        """What shall be served, from this snapshot and these settings.

        Never raises on what workloads say. Equal results are the same objects as last time: the
        `Desired`, its parts, each `Host` and each `Upstream`.
        """
        now = self._clock()
        self._take_in(snapshot, settings)
        self._expire(now)
        touched = self._settle_names(now)
        site_changed = self._assemble_hosts(touched)
        membership_changed = self._assemble_upstreams(touched)
        self._dirty_names.clear()
        self._dirty_peers.clear()
        return self._publish(site_changed=site_changed, membership_changed=membership_changed)

    # taking in

    def _take_in(self, snapshot: Snapshot, settings: Settings) -> None:
        afresh = self._settings is not settings and self._settings != settings
        if afresh:
            self._dirty_names.update(self._names)
        for name in self._sources.keys() - snapshot.sources.keys():
            for key in list(self._sources[name].examined):
                self._forget(name, key)
            self._note_rejections(("source", name), ())
            del self._sources[name]
        for name in sorted(snapshot.sources):
            self._take_in_source(name, snapshot.sources[name], settings, afresh=afresh)
        self._settings = settings

    def _take_in_source(
        self, name: str, seen: SourceSnapshot, settings: Settings, *, afresh: bool
    ) -> None:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source(seen.proxy_networks, (), {}, {})
        afresh = afresh or source.proxy_networks != seen.proxy_networks
        proxies = proxy_containers(seen)
        afresh = afresh or source.proxies != proxies
        self._note_rejections(("source", name), seen.rejections)
        if source.workloads is seen.workloads and not afresh:
            return
        examined = source.examined
        changed, gone = _differences(source.workloads, seen.workloads)
        for key in gone:
            self._forget(name, key)
        for key in seen.workloads if afresh else changed:
            before = examined.get(key)
            after = examine(seen.workloads[key], seen.proxy_networks, settings, before, proxies)
            examined[key] = after
            self._compare(before, after)
        source.workloads = seen.workloads
        source.proxy_networks = seen.proxy_networks
        source.proxies = proxies

    def _forget(self, source: str, key: WorkloadKey) -> None:
        before = self._sources[source].examined.pop(key)
        self._compare(before, replace(before, reading=NOTHING, routes=(), rejections=()))

    def _compare(self, before: Examined | None, after: Examined) -> None:
        """Note what is to be done again because of one workload."""
        old = {route.claim.id: route for route in before.routes} if before is not None else {}
        for route in after.routes:
            known = old.pop(route.claim.id, None)
            self._routes[route.claim.id] = route
            if known is not None and known.claim is route.claim:
                if known.peers is not route.peers or known.hold != route.hold:
                    self._dirty_peers.add(route.claim.id)
                continue
            if known is not None:
                self._withdraw(known.claim)
            for name in route.claim.names:
                self._claims.setdefault(name, {})[route.claim.id] = route.claim
                self._dirty_names.add(name)
            self._dirty_peers.add(route.claim.id)
        for gone in old.values():
            self._withdraw(gone.claim)
            del self._routes[gone.claim.id]
        self._note_rejections(("workload", *after.workload.key), after.rejections)

    def _withdraw(self, claim: Claim) -> None:
        for name in claim.names:
            claims = self._claims[name]
            del claims[claim.id]
            if not claims:
                del self._claims[name]
            self._dirty_names.add(name)

    def _note_rejections(self, key: tuple[str, ...], rejections: tuple[Rejection, ...]) -> None:
        if self._rejected.get(key, ()) == rejections:
            return
        self._rejections_changed = True
        if rejections:
            self._rejected[key] = rejections
        else:
            self._rejected.pop(key, None)

    # names

    def _expire(self, now: float) -> None:
        for (name, _), deadline in self._lingering.items():
            if deadline <= now:
                self._dirty_names.add(name)

    def _settle_names(self, now: float) -> set[str]:
        """Settle the dirty names.

        Returns:
            All names whose host or upstreams may be others now: also those that are folded, or
            could be, into a name that changed.
        """
        touched = set(self._dirty_names)
        for name in self._dirty_names:
            touched |= self._candidates.get(name, set())
        # An alias without a claim lingers only as long as its host does, see _linger.
        for name in sorted(touched):
            known = self._names.get(name)
            if known is not None and known.candidate is not None:
                touched.add(known.candidate)
            self._settle_name(name, now)
            known = self._names.get(name)
            if known is not None and known.candidate is not None:
                touched.add(known.candidate)
        return touched

    def _settle_name(self, name: str, now: float) -> None:
        before = self._names.get(name)
        claims = sorted(self._claims.get(name, {}).values(), key=lambda claim: claim.order)
        roots = {claim.root(name) for claim in claims}
        lingering = self._linger(name, before, roots, now)
        assert self._settings is not None
        hsts = self._settings.extension.hsts
        table, rejections = _settle(
            name,
            claims,
            lingering,
            before.table if before is not None else None,
            "" if hsts == "off" else hsts,
        )
        self._note_rejections(("name", name), rejections)
        self._index_mirrors(name, before, table)
        if not table.slots:
            self._set_candidate(name, before, None)
            self._names.pop(name, None)
            return
        candidate = self._candidate(name, table, before)
        self._set_candidate(name, before, candidate)
        self._names[name] = _Name(table, candidate, rejections)

    def _linger(self, name: str, before: _Name | None, roots: set[str], now: float) -> list[Slot]:
        """The slots of `name` that lost their last claim and stay for some time."""
        assert self._settings is not None
        slots: list[Slot] = []
        # An alias taken off a host that is still there was taken off on purpose. To go at once is
        # one reload, to linger would be two, and either way it answers 503.
        dropped = (
            before is not None and before.candidate is not None and before.candidate in self._claims
        )
        for slot in before.table.slots if before is not None else ():
            key = (name, slot.root)
            if slot.root in roots:
                self._lingering.pop(key, None)
                continue
            deadline = self._lingering.setdefault(key, self._deadline(now))
            if deadline <= now or dropped:
                del self._lingering[key]
                continue
            slots.append(replace(slot, winners=(), branch=None))
        return slots

    def _index_mirrors(self, name: str, before: _Name | None, table: Table) -> None:
        """Remember which hosts are mirrored by `name`, whose file depends on them."""
        old = before.table.slots if before is not None else ()
        for slot in old:
            if slot.options.mirror is not None:
                target = slot.options.mirror[0]
                self._mirrors.get(target, set()).discard(name)
                if not self._mirrors.get(target):
                    self._mirrors.pop(target, None)
        for slot in table.slots:
            if slot.options.mirror is not None:
                self._mirrors.setdefault(slot.options.mirror[0], set()).add(name)

    def _deadline(self, now: float) -> float:
        """When what loses its last claim now is to go: after one to two times HostLinger.

        All that is lost within one such time goes together, so that many short-lived hosts cost
        one reload in all and not one each.
        """
        assert self._settings is not None
        linger = self._settings.host_linger
        return math.ceil((now + linger) / linger) * linger if linger else now

    def _candidate(self, name: str, table: Table, before: _Name | None) -> str | None:
        """The host that `name` is an alias of, if whoever serves it has it as an alias only."""
        if not _is_host(name):
            return None
        winners = [self._routes[winner].claim for slot in table.slots for winner in slot.winners]
        if not winners:
            return before.candidate if before is not None else None
        if any(claim.declaration.host == name for claim in winners):
            return None
        return min(winners, key=lambda claim: claim.order).declaration.host

    def _set_candidate(self, name: str, before: _Name | None, candidate: str | None) -> None:
        old = before.candidate if before is not None else None
        if old == candidate:
            return
        if old is not None:
            self._candidates[old].discard(name)
            if not self._candidates[old]:
                del self._candidates[old]
        if candidate is not None:
            self._candidates.setdefault(candidate, set()).add(name)

    def _folded_into(self, name: str) -> str | None:
        """The host whose file serves `name` as an alias, None where it has a file of its own."""
        known = self._names[name]
        if known.candidate is None:
            return None
        host = self._names.get(known.candidate)
        if host is None or host.candidate is not None or host.table.served != known.table.served:
            return None
        return known.candidate

    # assembling

    def _assemble_hosts(self, touched: set[str]) -> bool:
        changed = False
        mirroring = {name for target in touched for name in self._mirrors.get(target, ())}
        for name in sorted(touched | mirroring):
            if not _is_host(name):
                changed = self._assemble_other(name) or changed
                continue
            old = self._hosts.get(name)
            new = self._host(name)
            if new == old:
                continue
            changed = True
            if new is not None:
                self._hosts[name] = new
                continue
            del self._hosts[name]
        return changed

    def _host(self, name: str) -> Host | None:
        known = self._names.get(name)
        if known is None or self._folded_into(name) is not None:
            self._note_rejections(("mirror", name), ())
            return None
        aliases = tuple(
            sorted(
                alias
                for alias in self._candidates.get(name, ())
                if self._folded_into(alias) == name
            )
        )
        redirects = (
            Redirect(each, target)
            for each in (name, *aliases)
            if (target := self._names[each].table.redirect)
        )
        opened = known.table.slots[0].root == "/"
        return Host(
            name=name,
            aliases=aliases,
            locations=self._locations(name, known.table.slots),
            tls=known.table.tls,
            redirects=tuple(sorted(redirects, key=lambda redirect: redirect.host)),
            passthrough=name + "/" if known.table.passthrough and opened else "",
        )

    def _assemble_other(self, name: str) -> bool:
        """The default backend, or a port; tells whether it is another."""
        known = self._names.get(name)
        if name == DEFAULT:
            slots = known.table.slots if known is not None else ()
            old, self._default = self._default, self._locations(name, slots)
            return old != self._default
        port = int(name.removeprefix(_TCP))
        before = self._tcp.pop(port, None)
        if known is not None:
            self._tcp[port] = name + "/"
        return before != self._tcp.get(port)

    def _locations(self, name: str, slots: tuple[Slot, ...]) -> tuple[Location, ...]:
        rejections: list[Rejection] = []
        locations = tuple(
            Location(
                path=slot.root,
                upstream=name + slot.root,
                rewrite=slot.options.rewrite,
                tls_only=slot.options.tls_only,
                websocket_endpoints=slot.websocket_endpoints,
                backend_tls=slot.options.backend_tls,
                protocol=slot.options.protocol,
                mirror=self._mirror(name, slot, rejections),
                directives=slot.options.directives,
                request_buffering=slot.options.request_buffering,
            )
            for slot in slots
        )
        self._note_rejections(("mirror", name), tuple(rejections))
        return locations

    def _mirror(self, name: str, slot: Slot, rejections: list[Rejection]) -> str:
        """The upstream that a slot is mirrored to; empty for none, or where there is none."""
        if slot.options.mirror is None:
            return ""
        host, root = slot.options.mirror
        known = self._names.get(host)
        found = known is not None and any(item.root == root for item in known.table.slots)
        upstream = (self._folded_into(host) or host) + root if found else ""
        if upstream and upstream != name + slot.root:
            return upstream
        for winner in slot.winners[:1]:
            claim = self._routes[winner].claim
            label = claim.declaration.label("mirror")
            where = "that is the route itself" if upstream else "there is no such route"
            rejections.append(
                Rejection(
                    subject=claim.subject,
                    reason=Reason.MIRROR_UNKNOWN.value,
                    message=f"{label}={host}{root}: {where}, so {told(name, slot.root)} is not "
                    "mirrored.",
                    hint="Name the host and the context root of another route, for example "
                    "shadow.example.com or shadow.example.com/api.",
                    source=claim.id.workload.source,
                )
            )
        return ""

    def _assemble_upstreams(self, touched: set[str]) -> bool:
        changes: dict[str, Upstream | None] = {}
        for name in touched:
            self._upstreams_of(name, changes)
        for claim_id in self._dirty_peers:
            claim = self._routes[claim_id].claim if claim_id in self._routes else None
            for name in claim.names if claim is not None else ():
                if name in touched or claim is None:
                    continue
                root = claim.root(name)
                if name + root in self._served.get(name, ()):
                    slot = next(s for s in self._names[name].table.slots if s.root == root)
                    self._upstream(name, slot, changes)
        if not changes:
            return False
        upstreams = dict(self._upstreams)
        reorder = False
        for key, upstream in changes.items():
            if upstream is None:
                del upstreams[key]
            else:
                reorder = reorder or key not in upstreams
                upstreams[key] = upstream
        if reorder:
            upstreams = dict(sorted(upstreams.items()))
        self._upstreams = upstreams
        return True

    def _upstreams_of(self, name: str, changes: dict[str, Upstream | None]) -> None:
        old = self._served.get(name, ())
        own = name in self._hosts or not _is_host(name)
        slots = self._names[name].table.slots if own and name in self._names else ()
        served = [name + slot.root for slot in slots]
        served += [name + slot.root + CANARY for slot in slots if slot.branch is not None]
        for key in old:
            if key not in served:
                changes[key] = None
                self._note_rejections(("peers", key), ())
        for slot in slots:
            self._upstream(name, slot, changes)
        if served:
            self._served[name] = tuple(served)
        else:
            self._served.pop(name, None)

    def _upstream(self, name: str, slot: Slot, changes: dict[str, Upstream | None]) -> None:
        key, policy, branch = name + slot.root, slot.options.policy, slot.branch
        if branch is not None:
            canary = replace(branch.canary, upstream=key + CANARY)
            policy = replace(policy, canary=canary)
            self._put_upstream(canary.upstream, branch.winners, branch.policy, changes)
        self._put_upstream(key, slot.winners, policy, changes)

    def _put_upstream(
        self,
        key: str,
        winners: tuple[ClaimId, ...],
        policy: Policy,
        changes: dict[str, Upstream | None],
    ) -> None:
        routes = [self._routes[winner] for winner in winners]
        peers = merge_peers([route.peers for route in routes])
        self._note_rejections(("peers", key), _surplus(key, peers))
        new = Upstream(
            name=key,
            peers=peers[:MAX_PEERS],
            policy=policy,
            hold=max((route.hold for route in routes), default=0.0),
        )
        if new != self._upstreams.get(key):
            changes[key] = new

    def _publish(self, *, site_changed: bool, membership_changed: bool) -> Desired:
        old = self._desired
        site, membership, rejections = old.site, old.membership, old.rejections
        if site_changed:
            site = Site(
                hosts=tuple(self._hosts[name] for name in sorted(self._hosts)),
                default=self._default,
                tcp=tuple(TcpRoute(port, self._tcp[port]) for port in sorted(self._tcp)),
            )
            site = old.site if site == old.site else site
        if membership_changed:
            membership = Membership(self._upstreams)
        if self._rejections_changed:
            rejections = tuple(
                sorted({item for some in self._rejected.values() for item in some}, key=_rank)
            )
            rejections = old.rejections if rejections == old.rejections else rejections
            self._rejections_changed = False
        if site is old.site and membership is old.membership and rejections is old.rejections:
            return old
        self._desired = Desired(membership, site, rejections)
        return self._desired


def proxy_containers(seen: SourceSnapshot) -> tuple[str, ...]:
    """Names of the OpenResty containers of a source of containers; tasks come and go unnamed."""
    first = next(iter(seen.workloads.values()), None)
    if first is None or first.kind is not WorkloadKind.CONTAINER:
        return ()
    return tuple(sorted(proxy.name for proxy in seen.proxies))


def _differences(
    before: Mapping[WorkloadKey, Workload], after: Mapping[WorkloadKey, Workload]
) -> tuple[list[WorkloadKey], list[WorkloadKey]]:
    """Keys whose workload is new or another object, and keys that are gone.

    A changed snapshot mostly has the keys of the last one in the same order; walking both side by
    side then needs no look-up at all, which matters with many thousands of workloads.
    """
    changed: list[WorkloadKey] = []
    if len(before) == len(after):
        for (key, workload), (old_key, old) in zip(after.items(), before.items(), strict=True):
            if workload is old:
                continue
            if key != old_key:
                break
            changed.append(key)
        else:
            return changed, []
    changed = [key for key, workload in after.items() if before.get(key) is not workload]
    return changed, [key for key in before if key not in after]


def compile_snapshot(snapshot: Snapshot, settings: Settings) -> Desired:
    """Compile one snapshot by itself, with nothing remembered, so that nothing lingers."""
    return Compiler(clock=lambda: 0.0).compile(snapshot, settings)


def merge_peers(groups: list[tuple[Peer, ...]]) -> tuple[Peer, ...]:
    """The peers of several workloads as those of one upstream: sorted by id, each id once.

    The same id at the same place is the same peer, seen by two sources. The same id at another
    place is another peer, and gets a number behind its id.
    """
    if len(groups) == 1 and len({peer.id for peer in groups[0]}) == len(groups[0]):
        return groups[0]
    merged: dict[str, Peer] = {}
    places: set[tuple[str, str, int]] = set()
    for group in groups:
        for peer in group:
            place = (peer.id, peer.address, peer.port)
            if place in places:
                continue
            places.add(place)
            name, number = peer.id, 1
            while name in merged:
                number += 1
                name = f"{peer.id[: _MAX_ID - 8]}#{number}"
            merged[name] = peer if name == peer.id else replace(peer, id=name)
    return tuple(sorted(merged.values(), key=_by_id))


def _surplus(upstream: str, peers: tuple[Peer, ...]) -> tuple[Rejection, ...]:
    if len(peers) <= MAX_PEERS:
        return ()
    return (
        Rejection(
            subject=_subject_of_upstream(upstream),
            reason=Reason.TOO_MANY_PEERS.value,
            message=f"{upstream} has {len(peers)} peers; only the first {MAX_PEERS} serve.",
            hint="Split the service over several hosts or context roots.",
        ),
    )


def _subject_of_upstream(upstream: str) -> str:
    name = upstream.split("/", 1)[0]
    return f"host {name}" if _is_host(name) else told(name)


def _rank(rejection: Rejection) -> tuple[str, str, str, str, str]:
    return (
        rejection.subject,
        rejection.reason,
        rejection.message,
        rejection.hint,
        rejection.source,
    )
