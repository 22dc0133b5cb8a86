"""Over which network and port the instances of a workload are reached.

Decided once for all instances of a route and from what the workload declares, so that an instance
that comes or goes cannot move the others. Where one instance lies is `addresses`' business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from agent.compile.networks import Network, find_network, keep_network
from agent.compile.rejections import listed, reject
from agent.labels import Reason, RouteDeclaration, subject_of
from agent.model import InstanceState, PeerState, Rejection, Workload, WorkloadKind

PEER_STATES = {
    InstanceState.UP: PeerState.UP,
    InstanceState.DRAINING: PeerState.DRAINING,
}
"""The instances that become peers, by their state, and the state of that peer."""


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


class _Port(NamedTuple):
    """A container port, and where it was found."""

    number: int
    how: str


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
        proxy_networks: networks that the OpenResty instances are on; None where that is not known.
        proxies: names of those instances, for hints.
        before: what was decided last time. Where it has become one of several possible networks it
            stays, with a rejection that says so.
    """
    if workload.kind is WorkloadKind.STATIC:
        return Reach(
            Way.AS_GIVEN,
            port=declaration.port or _lowest(workload.ports),
            network_from="the addresses that the static file gives",
            port_from=f"each instance's own, else {declaration.label('port')}",
        )
    network = find_network(workload, declaration, proxy_networks, proxies)
    doubt: Rejection | None = None
    if isinstance(network, Rejection):
        if before is None:
            return network
        kept = Network(before.network, before.network_from)
        doubt = keep_network(network, kept, workload, proxy_networks)
        if doubt is None:
            return network
        network = kept
    if network is None:
        return _over_node_port(workload, declaration)
    port = _declared_port(workload, declaration)
    if isinstance(port, Rejection):
        return port
    return Reach(
        Way.NETWORK,
        network=network.name,
        port=port.number,
        network_from=network.how,
        port_from=port.how,
        others=tuple(sorted(set(proxy_networks or ()) - {network.name, "bridge", "host"})),
        doubt=doubt,
    )


def _declared_port(workload: Workload, declaration: RouteDeclaration) -> _Port | Rejection:
    """The port of the label, else the lowest that the service or its image declares."""
    if declaration.port is not None:
        return _Port(declaration.port, declaration.label("port"))
    lowest = _lowest(workload.ports)
    if lowest is not None:
        return _Port(lowest, "the lowest port declared")
    return reject(
        workload,
        Reason.NO_PORT,
        f"{declaration.what}: no port is known, since there is no {declaration.label('port')} "
        "label and neither the service nor its image declares one.",
        f"Add the label {declaration.label('port')} with the port that the application listens on.",
    )


def _over_node_port(workload: Workload, declaration: RouteDeclaration) -> Reach | Rejection:
    """Reach a workload at its nodes' addresses and published ports."""
    running = [item for item in workload.instances if item.state in PEER_STATES]
    published = {port.target for item in running or workload.instances for port in item.published}
    port = _published_port(workload, declaration, published)
    if isinstance(port, Rejection):
        return port
    own_node = any(item.host_network for item in workload.instances)
    up = any(item.state is InstanceState.UP for item in running)
    if port.number not in published and up and not own_node:
        return reject(
            workload,
            Reason.NOT_PUBLISHED,
            f"{declaration.what}: port {port.number} ({port.how}) of {subject_of(workload)} is not "
            f"published, and no network is shared with OpenResty; published are: "
            f"{listed(str(port) for port in published)}.",
            f"Publish port {port.number}, or attach it to a network that OpenResty is on and name "
            f"that network in {declaration.label('network')}.",
        )
    return Reach(
        Way.NODE_PORT,
        port=port.number,
        network_from="the node's address and the published port",
        port_from=port.how,
    )


def _published_port(
    workload: Workload, declaration: RouteDeclaration, published: Iterable[int]
) -> _Port | Rejection:
    """The port of the label, else the lowest that is published, else the lowest declared."""
    if declaration.port is not None:
        return _Port(declaration.port, declaration.label("port"))
    lowest = _lowest(published)
    if lowest is None:
        lowest = _lowest(workload.ports)
    if lowest is not None:
        return _Port(lowest, "the lowest port published")
    return reject(
        workload,
        Reason.NO_PORT,
        f"{declaration.what}: no port is known, since there is no {declaration.label('port')} "
        "label and no TCP port is published.",
        "Publish a port of it, or attach it to a network that OpenResty is on and add the labels "
        f"{declaration.label('network')} and {declaration.label('port')}.",
    )


def _lowest(ports: Iterable[int]) -> int | None:
    return min((port for port in ports if 1 <= port <= 65535), default=None)
