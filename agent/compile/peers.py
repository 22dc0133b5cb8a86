"""The peers of a workload, and those of several as the peers of one upstream.

Must not decide how instances are reached (`reach`) nor what an address is (`addresses`).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import NamedTuple

from agent.compile.addresses import checked, place_of, vip_of
from agent.compile.reach import PEER_STATES, Reach
from agent.compile.rejections import reject
from agent.config.settings import Settings
from agent.labels import Reason, RouteDeclaration, subject_of
from agent.model import Peer, PeerState, Rejection, Workload

_MAX_ID = 128
"""Characters that the admin API takes in the id of a peer."""
_NAMED_INSTANCES = 5
"""How many instances a rejection names; it counts the others."""


class Peers(NamedTuple):
    """The peers of one route, sorted by id, and what is to be told of those that are missing."""

    peers: tuple[Peer, ...]
    missing: tuple[Rejection, ...] = ()


def find_peers(
    workload: Workload, declaration: RouteDeclaration, reach: Reach, settings: Settings
) -> Peers | Rejection:
    """The peers behind a route; a rejection where it cannot have any."""
    if declaration.vip:
        return _virtual(workload, declaration, reach)
    return _each(workload, declaration, reach, settings)


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


def _each(
    workload: Workload, declaration: RouteDeclaration, reach: Reach, settings: Settings
) -> Peers:
    peers: list[Peer] = []
    missing: list[tuple[str, str]] = []
    for instance in workload.instances:
        state = PEER_STATES.get(instance.state)
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
        return Peers(tuple(peers))
    return Peers(tuple(peers), (_no_address(workload, declaration, sorted(missing)),))


def _virtual(workload: Workload, declaration: RouteDeclaration, reach: Reach) -> Peers | Rejection:
    """The virtual IP as the one peer, as long as there is a task behind it."""
    option = declaration.label("backend_mode")
    found = vip_of(workload, reach)
    if found is None:
        where = f" on network {reach.network}" if reach.network else ""
        return reject(
            workload,
            Reason.NO_VIP,
            f"{option}=vip, but {subject_of(workload)} has no virtual IP{where}.",
            f"Virtual IPs are for Swarm services on an overlay network, without --endpoint-mode "
            f"dnsrr; otherwise remove {option}, so that tasks are reached themselves.",
        )
    place = checked(found.address, reach.port)
    if isinstance(place, str):
        return reject(
            workload,
            Reason.NO_VIP,
            f"{option}=vip, but the virtual IP of {subject_of(workload)} is of no use: {place}.",
            f"Remove {option}, so that tasks are reached themselves.",
        )
    states = {PEER_STATES.get(item.state) for item in workload.instances}
    if states <= {None}:
        return Peers(())
    peer = Peer(
        id=_peer_id(f"{workload.key.id}-vip"),
        address=place[0],
        port=place[1],
        weight=1 if declaration.weight is None else declaration.weight,
        state=PeerState.UP if PeerState.UP in states else PeerState.DRAINING,
        backup=declaration.backup,
    )
    return Peers((peer,))


def _no_address(
    workload: Workload, declaration: RouteDeclaration, missing: list[tuple[str, str]]
) -> Rejection:
    told = "; ".join(f"{name}: {problem}" for name, problem in missing[:_NAMED_INSTANCES])
    more = (
        f"; and {len(missing) - _NAMED_INSTANCES} more" if len(missing) > _NAMED_INSTANCES else ""
    )
    return reject(
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
