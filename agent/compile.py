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
from typing import NamedTuple

from agent.config.settings import Extension, Settings
from agent.labels import NOTHING, Reading, Reason, RouteDeclaration, read_labels, subject_of
from agent.model import (
    Desired,
    Host,
    Instance,
    InstanceState,
    Location,
    Membership,
    Peer,
    PeerState,
    Policy,
    PublishedPort,
    Rejection,
    Site,
    Snapshot,
    SourceSnapshot,
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
    """Identity of a claim: the workload, and which of its routes."""

    workload: WorkloadKey
    route: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What one route of a workload says about the names it wants; without peers."""

    id: ClaimId
    created: float
    subject: str
    declaration: RouteDeclaration
    tls: Tls | None

    @property
    def order(self) -> tuple[float, ClaimId]:
        """Who was first keeps what is contested."""
        return self.created, self.id

    @property
    def names(self) -> tuple[str, ...]:
        """The host and its aliases."""
        return (self.declaration.host, *self.declaration.aliases)

    @property
    def options(self) -> tuple[bool, bool, Tls | None, Policy]:
        """What must agree where several workloads serve one host and context root."""
        route = self.declaration
        return route.rewrite, route.tls_only, self.tls, route.policy


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
    reading = _reading(workload, before)
    routes: list[Route] = []
    rejections = list(reading.rejections)
    for index, declaration in enumerate(reading.routes):
        verdict = _route(
            workload,
            index,
            declaration,
            proxy_networks,
            settings,
            proxies=proxies,
            before=_reach_of(before, index),
        )
        if isinstance(verdict, Rejection):
            rejections.append(verdict)
            continue
        route, missing = verdict
        routes.append(_reuse(route, before))
        rejections.extend(missing)
    return Examined(workload, reading, tuple(routes), tuple(rejections))


def _reach_of(before: Examined | None, index: int) -> Reach | None:
    for route in before.routes if before is not None else ():
        if route.claim.id.route == index:
            return route.reach
    return None


def _reading(workload: Workload, before: Examined | None) -> Reading:
    if before is not None:
        old = before.workload
        same = (
            old.name == workload.name
            and old.labels == workload.labels
            and old.template_labels == workload.template_labels
        )
        if same:
            return before.reading
    return read_labels(workload)


def _reuse(route: Route, before: Examined | None) -> Route:
    for old in before.routes if before is not None else ():
        if old.claim.id == route.claim.id:
            claim = old.claim if old.claim == route.claim else route.claim
            peers = old.peers if old.peers == route.peers else route.peers
            return replace(route, claim=claim, peers=peers)
    return route


def _route(
    workload: Workload,
    index: int,
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
    reach = find_reach(workload, declaration, proxy_networks, proxies=proxies, before=before)
    if isinstance(reach, Rejection):
        return reach
    claim = Claim(
        id=ClaimId(workload.key, index),
        created=workload.created,
        subject=subject_of(workload),
        declaration=declaration,
        tls=tls,
    )
    peers, missing = _peers(workload, declaration, reach, settings)
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
    if not asked:
        return None
    if extension.ssl_port == 0:
        return _reject(
            workload,
            Reason.TLS_OFF,
            f"{declaration.host} asks for TLS (interlock.ssl or interlock.ssl_only), but TLS is "
            "switched off by SSLPort = 0.",
            "Set SSLPort in the configuration, or remove the label.",
        )
    if declaration.certificate and declaration.certificate_key:
        return Tls(
            certificate=extension.certificate_path(declaration.certificate),
            key=extension.certificate_path(declaration.certificate_key),
        )
    default = extension.default_certificate
    if not declaration.certificate and not declaration.certificate_key and default is not None:
        return Tls(*default)
    missing = " and ".join(
        label
        for label, value in (
            ("interlock.ssl_cert", declaration.certificate),
            ("interlock.ssl_cert_key", declaration.certificate_key),
        )
        if not value
    )
    return _reject(
        workload,
        Reason.NO_CERTIFICATE,
        f"{declaration.host} asks for TLS, but there is no {missing}"
        + (" and no SSLDefaultCert." if default is None else "."),
        "Name both files (below SSLCertPath) in interlock.ssl_cert and interlock.ssl_cert_key, or "
        "neither and set SSLDefaultCert in the configuration.",
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
            port_from="each instance's own, else interlock.port",
        )
    network: tuple[str, str] | Rejection | None
    doubt: Rejection | None = None
    if declaration.network:
        network = _named_network(workload, declaration.network, proxy_networks, proxies)
    elif workload.host_ports_only:
        network = None
    elif workload.kind is WorkloadKind.CONTAINER:
        network = _container_network(workload, proxy_networks)
    else:
        network = _shared_network(workload, proxy_networks)
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
        port, port_from = declaration.port, "interlock.port"
    else:
        lowest = _lowest(workload.ports)
        if lowest is None:
            return _reject(
                workload,
                Reason.NO_PORT,
                f"{declaration.host}: no port is known, since there is no interlock.port label and "
                "neither the service nor its image declares one.",
                "Add the label interlock.port with the port that the application listens on.",
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
    label: str,
    proxy_networks: tuple[str, ...] | None,
    proxies: tuple[str, ...],
) -> tuple[str, str] | Rejection:
    """The network of the label: its exact name, else with the stack's name in front."""
    prefixed = f"{workload.stack}_{label}" if workload.stack else label
    name = label if label in workload.networks else prefixed
    if name not in workload.networks:
        tried = label if prefixed == label else f"{label} nor {prefixed}"
        return _reject(
            workload,
            Reason.NETWORK_UNKNOWN,
            f"interlock.network={label}, but {subject_of(workload)} is not attached to {tried}; "
            f"it is attached to: {_listed(workload.networks)}.",
            "Correct the label interlock.network, or attach it: "
            + _attach(workload, label, workload.name),
        )
    # A proxy in the host's network reaches the bridges of a plain engine without being on them.
    on_bridges = workload.kind is WorkloadKind.CONTAINER and (
        not proxy_networks or "host" in proxy_networks
    )
    if proxy_networks is not None and name not in proxy_networks and not on_bridges:
        return _reject(
            workload,
            Reason.NETWORK_NOT_SHARED,
            f"interlock.network={label}, but OpenResty is not attached to {name}; OpenResty is "
            f"attached to: {_listed(proxy_networks)}.",
            _attach_openresty(workload, name, proxies),
        )
    return name, "interlock.network"


def _attach_openresty(workload: Workload, network: str, proxies: tuple[str, ...]) -> str:
    """How OpenResty gets onto a network, by the names of its containers where they are known."""
    commands = "; ".join(_attach(workload, network, proxy) for proxy in proxies or ("OPENRESTY",))
    naming = "" if proxies else " (with its name for OPENRESTY)"
    setting = " or set AttachNetworks = true," if workload.kind is WorkloadKind.CONTAINER else ""
    return (
        f"Attach OpenResty too: {commands}{naming},{setting} or name another network in "
        "interlock.network."
    )


def _attach(workload: Workload, network: str, target: str) -> str:
    if workload.kind is WorkloadKind.CONTAINER:
        return f"docker network connect {network} {target}"
    return f"docker service update --network-add {network} {target}"


def _shared_network(
    workload: Workload, proxy_networks: tuple[str, ...] | None
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
        return _ambiguous(workload, candidates, proxy_networks)
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
        + ", and name that network in interlock.network where there is more than one.",
    )


def _ambiguous(
    workload: Workload, candidates: tuple[str, ...], proxy_networks: tuple[str, ...] | None
) -> Rejection:
    what = (
        "shares several networks with OpenResty"
        if proxy_networks is not None
        else "is attached to several networks, and it is not known which of them OpenResty is on"
    )
    command = (
        f"docker service update --label-add interlock.network={sorted(candidates)[0]} "
        f"{workload.name}"
        if workload.kind is WorkloadKind.SERVICE
        else f"docker run --label interlock.network={sorted(candidates)[0]} ..."
    )
    return _reject(
        workload,
        Reason.NETWORK_AMBIGUOUS,
        f"{subject_of(workload)} {what}: {_listed(candidates)}.",
        f"Name one of them in the label interlock.network, for example: {command}",
    )


def _doubtful(ambiguous: Rejection, network: str) -> Rejection:
    return replace(
        ambiguous,
        message=f"{ambiguous.message} It is still reached over {network}, as it was before, until "
        "the agent starts anew.",
    )


def _container_network(
    workload: Workload, proxy_networks: tuple[str, ...] | None
) -> tuple[str, str] | Rejection | None:
    """A network that a container shares with a discovered proxy; None: go by published ports."""
    shared = tuple(name for name in workload.networks if name in (proxy_networks or ()))
    # On the default bridge by habit, on another by intent.
    # Told as `node/name`, a network is on one node only, and other proxies do not reach it.
    own = tuple(name for name in shared if name not in ("host", "none") and "/" not in name)
    candidates = tuple(name for name in own if name != "bridge") or own
    if len(candidates) > 1:
        return _ambiguous(workload, candidates, proxy_networks)
    return (candidates[0], "the one network shared with OpenResty") if candidates else None


def _node_port(workload: Workload, declaration: RouteDeclaration) -> Reach | Rejection:
    """Reach a workload at its nodes' addresses and published ports."""
    running = [item for item in workload.instances if item.state in _PEER_STATES]
    published = {port.target for item in running or workload.instances for port in item.published}
    if declaration.port is not None:
        target, port_from = declaration.port, "interlock.port"
    else:
        lowest = _lowest(published)
        if lowest is None:
            lowest = _lowest(workload.ports)
        if lowest is None:
            return _reject(
                workload,
                Reason.NO_PORT,
                f"{declaration.host}: no port is known, since there is no interlock.port label and "
                "no TCP port is published.",
                "Publish a port of it, or attach it to a network that OpenResty is on and add the "
                "labels interlock.network and interlock.port.",
            )
        target, port_from = lowest, "the lowest port published"
    own_node = any(item.host_network for item in workload.instances)
    up = any(item.state is InstanceState.UP for item in running)
    if target not in published and up and not own_node:
        return _reject(
            workload,
            Reason.NOT_PUBLISHED,
            f"{declaration.host}: port {target} ({port_from}) of {subject_of(workload)} is not "
            f"published, and no network is shared with OpenResty; published are: "
            f"{_listed(str(port) for port in published)}.",
            f"Publish port {target}, or attach it to a network that OpenResty is on and name that "
            "network in interlock.network.",
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
            )
        )
    peers.sort(key=_by_id)
    if not missing:
        return tuple(peers), ()
    return tuple(peers), (_no_address(workload, sorted(missing)),)


_NAMED_INSTANCES = 5


def _no_address(workload: Workload, missing: list[tuple[str, str]]) -> Rejection:
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
        "these, and interlock.network and interlock.port.",
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
class Slot:
    """One context root of a name, as settled.

    Attributes:
        winners: whose peers serve it, oldest first; empty where it only lingers.
        says_tls: whether those who hold it say something about TLS.
    """

    root: str
    winners: tuple[ClaimId, ...]
    rewrite: bool
    tls_only: bool
    says_tls: bool
    tls: Tls | None
    policy: Policy
    websocket_endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A name as settled: slots sorted by context root, and TLS, which the whole name has."""

    slots: tuple[Slot, ...]
    tls: Tls | None


@dataclass(frozen=True, slots=True)
class _Name:
    """What is known of a name: its table, the host that it may be an alias of, who was refused."""

    table: Table
    candidate: str | None
    rejections: tuple[Rejection, ...]


def _settle(
    name: str, claims: list[Claim], lingering: Iterable[Slot]
) -> tuple[Table, tuple[Rejection, ...]]:
    """Give each context root of `name` to the oldest claim and to those that agree with it.

    TLS belongs to the whole name: the oldest claim that says anything about it decides, who says
    nothing takes it as it is, and who says something else is refused.

    Args:
        claims: oldest first.
        lingering: slots that nobody claims and that stay; none of them has the root of a claim.
    """
    holders: dict[str, list[Claim]] = {}
    decider: Claim | None = None
    rejections: list[Rejection] = []
    for claim in claims:
        root = claim.declaration.context_root
        holder = holders[root][0] if root in holders else None
        if holder is not None and holder.options != claim.options:
            rejections.append(_conflict(name, claim, holder))
            continue
        if claim.declaration.tls is not None:
            if decider is not None and decider.tls != claim.tls:
                rejections.append(_tls_conflict(name, claim, decider))
                continue
            decider = decider or claim
        holders.setdefault(root, []).append(claim)
    slots = [_slot(root, winners) for root, winners in holders.items()]
    slots.extend(lingering)
    slots.sort(key=lambda slot: slot.root)
    if decider is not None:
        tls = decider.tls
    else:
        # Where nobody says anything there may still be a certificate that serves every host.
        telling = [slot for slot in slots if slot.says_tls] or [slot for slot in slots if slot.tls]
        tls = telling[0].tls if telling else None
    # A lingering slot may have lost the TLS that it was made for.
    settled = tuple(
        replace(slot, tls_only=False) if slot.tls_only and tls is None else slot for slot in slots
    )
    return Table(settled, tls), tuple(rejections)


def _slot(root: str, winners: list[Claim]) -> Slot:
    oldest = winners[0]
    return Slot(
        root=root,
        winners=tuple(claim.id for claim in winners),
        rewrite=oldest.declaration.rewrite,
        tls_only=oldest.declaration.tls_only,
        says_tls=any(claim.declaration.tls is not None for claim in winners),
        tls=oldest.tls,
        policy=oldest.declaration.policy,
        websocket_endpoints=tuple(
            sorted({path for claim in winners for path in claim.declaration.websocket_endpoints})
        ),
    )


_OPTION_LABELS = (
    "interlock.context_root_rewrite",
    "interlock.ssl_only",
    "interlock.ssl, interlock.ssl_cert or interlock.ssl_cert_key",
    "the balancing policy",
)


def _conflict(name: str, claim: Claim, holder: Claim) -> Rejection:
    differ = [
        label
        for label, mine, theirs in zip(_OPTION_LABELS, claim.options, holder.options, strict=True)
        if mine != theirs
    ]
    return Rejection(
        subject=claim.subject,
        reason=Reason.CONFLICT.value,
        message=f"{name}{claim.declaration.context_root} is held by {holder.subject}, which is "
        f"older, and {claim.subject} asks for it with other options: {', '.join(differ)}.",
        hint=f"Give {claim.subject} the same options as {holder.subject} to have both serve it, "
        "or another host or context root.",
        source=claim.id.workload.source,
    )


def _tls_conflict(name: str, claim: Claim, decider: Claim) -> Rejection:
    return Rejection(
        subject=claim.subject,
        reason=Reason.TLS_CONFLICT.value,
        message=f"{name} has its TLS from {decider.subject}, which is older, and {claim.subject} "
        "asks for other TLS (interlock.ssl, interlock.ssl_cert, interlock.ssl_cert_key) on "
        "another context root of that host.",
        hint=f"Remove the TLS labels of {claim.subject}, which then has the TLS of the host, or "
        f"make them equal to those of {decider.subject}.",
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
        self._hosts: dict[str, Host] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._roots: dict[str, tuple[str, ...]] = {}
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
        self._compare(before, Examined(before.workload, NOTHING, (), ()))

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
        roots = {claim.declaration.context_root for claim in claims}
        lingering = self._linger(name, before, roots, now)
        table, rejections = _settle(name, claims, lingering)
        self._note_rejections(("name", name), rejections)
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
            slots.append(replace(slot, winners=()))
        return slots

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
        if host is None or host.candidate is not None or host.table != known.table:
            return None
        return known.candidate

    # assembling

    def _assemble_hosts(self, touched: set[str]) -> bool:
        changed = False
        for name in sorted(touched):
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
            return None
        return Host(
            name=name,
            aliases=tuple(
                sorted(
                    alias
                    for alias in self._candidates.get(name, ())
                    if self._folded_into(alias) == name
                )
            ),
            locations=tuple(
                Location(
                    path=slot.root,
                    upstream=name + slot.root,
                    rewrite=slot.rewrite,
                    tls_only=slot.tls_only,
                    websocket_endpoints=slot.websocket_endpoints,
                )
                for slot in known.table.slots
            ),
            tls=known.table.tls,
        )

    def _assemble_upstreams(self, touched: set[str]) -> bool:
        changes: dict[str, Upstream | None] = {}
        for name in touched:
            self._upstreams_of(name, changes)
        for claim_id in self._dirty_peers:
            claim = self._routes[claim_id].claim if claim_id in self._routes else None
            for name in claim.names if claim is not None else ():
                if name in touched or claim is None:
                    continue
                root = claim.declaration.context_root
                if root in self._roots.get(name, ()):
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
        old = self._roots.get(name, ())
        slots = self._names[name].table.slots if name in self._hosts else ()
        roots = tuple(slot.root for slot in slots)
        for root in old:
            if root not in roots:
                changes[name + root] = None
                self._note_rejections(("peers", name, root), ())
        for slot in slots:
            self._upstream(name, slot, changes)
        if roots:
            self._roots[name] = roots
        else:
            self._roots.pop(name, None)

    def _upstream(self, name: str, slot: Slot, changes: dict[str, Upstream | None]) -> None:
        routes = [self._routes[winner] for winner in slot.winners]
        peers = merge_peers([route.peers for route in routes])
        key = name + slot.root
        self._note_rejections(("peers", name, slot.root), _surplus(key, peers))
        old = self._upstreams.get(key)
        new = Upstream(
            name=key,
            peers=peers[:MAX_PEERS],
            policy=slot.policy,
            hold=max((route.hold for route in routes), default=0.0),
        )
        if new != old:
            changes[key] = new

    def _publish(self, *, site_changed: bool, membership_changed: bool) -> Desired:
        old = self._desired
        site, membership, rejections = old.site, old.membership, old.rejections
        if site_changed:
            site = Site(tuple(self._hosts[name] for name in sorted(self._hosts)))
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
            subject=f"host {upstream.split('/', 1)[0]}",
            reason=Reason.TOO_MANY_PEERS.value,
            message=f"{upstream} has {len(peers)} peers; only the first {MAX_PEERS} serve.",
            hint="Split the service over several hosts or context roots.",
        ),
    )


def _rank(rejection: Rejection) -> tuple[str, str, str, str, str]:
    return (
        rejection.subject,
        rejection.reason,
        rejection.message,
        rejection.hint,
        rejection.source,
    )
