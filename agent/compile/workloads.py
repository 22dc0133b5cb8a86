"""One workload by itself: what its labels ask for, and the peers it has for that.

What comes out depends on the workload, the settings and the networks of the proxies, and on nothing
else; `explain` and `lint` ask it the same questions and so get the same answers. Must not know of
other workloads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.compile.claims import Claim, ClaimId
from agent.compile.peers import find_peers
from agent.compile.reach import Reach, find_reach
from agent.compile.rejections import reject
from agent.compile.tls import backend_tls_of, hsts_of, tls_of
from agent.config.settings import Settings
from agent.labels import (
    Reading,
    Reason,
    RouteDeclaration,
    Rules,
    read_labels,
    rules_of,
    subject_of,
)
from agent.model import Peer, Rejection, SourceSnapshot, Workload, WorkloadKind

MAX_HOLD = 300.0
"""Longest hold, in seconds, that the admin API takes."""


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
    *,
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
        known = _known(before, declaration.name)
        verdict = _route(
            workload,
            declaration,
            proxy_networks,
            settings,
            proxies=proxies,
            before=known.reach if known is not None else None,
        )
        if isinstance(verdict, Rejection):
            rejections.append(verdict)
            continue
        route, missing = verdict
        routes.append(_reuse(route, known))
        rejections.extend(missing)
    return Examined(workload, rules, reading, tuple(routes), tuple(rejections))


def proxy_containers(seen: SourceSnapshot) -> tuple[str, ...]:
    """Names of the OpenResty containers of a source of containers; tasks come and go unnamed."""
    first = next(iter(seen.workloads.values()), None)
    if first is None or first.kind is not WorkloadKind.CONTAINER:
        return ()
    return tuple(sorted(proxy.name for proxy in seen.proxies))


def _known(before: Examined | None, route: str) -> Route | None:
    """The route of that name as it was last time."""
    known = before.routes if before is not None else ()
    return next((item for item in known if item.claim.id.route == route), None)


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


def _reuse(new: Route, old: Route | None) -> Route:
    """The new route, of objects of the old one where they are equal."""
    if old is None:
        return new
    return replace(
        new,
        claim=old.claim if old.claim == new.claim else new.claim,
        peers=old.peers if old.peers == new.peers else new.peers,
    )


def _route(
    workload: Workload,
    declaration: RouteDeclaration,
    proxy_networks: tuple[str, ...] | None,
    settings: Settings,
    *,
    proxies: tuple[str, ...],
    before: Reach | None,
) -> tuple[Route, tuple[Rejection, ...]] | Rejection:
    tls = tls_of(workload, declaration, settings.extension)
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
        backend_tls=backend_tls_of(declaration, settings.extension),
        hsts=hsts_of(declaration, settings.extension),
        kind=workload.kind,
    )
    found = find_peers(workload, declaration, reach, settings)
    if isinstance(found, Rejection):
        return found
    hold = min(settings.hold_timeout, MAX_HOLD) if workload.wanted else 0.0
    doubt = () if reach.doubt is None else (reach.doubt,)
    return Route(claim, reach, found.peers, hold), found.missing + doubt


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
    return reject(
        workload,
        Reason.CONFLICT,
        f"{declaration.label('tcp_port')}={declaration.tcp_port} is the proxy's own port "
        f"({own[declaration.tcp_port]}).",
        "Choose another port.",
    )
