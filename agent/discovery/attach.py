"""Which proxy containers lack a network that a workload names, and what is said when that stays so.

Interlock attached its proxies to each `interlock.network`; with AttachNetworks the sources of
containers do so too. Pure: the call itself is the source's, and nothing is ever detached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from agent.discovery.containers import Container
from agent.labels import Rules, read_labels
from agent.model import InstanceState, Rejection

_LIVE = (InstanceState.UP, InstanceState.WAITING)
_NOT_ATTACHABLE = ("host", "none")


class Link(NamedTuple):
    """A network, and a proxy container that is to be attached to it."""

    network: str
    proxy: str
    """Id of the container."""
    name: str
    """Its name, for people."""


def missing_links(containers: Iterable[Container], rules: Rules) -> tuple[Link, ...]:
    """What would have to be attached so that every network named by a label is shared.

    A proxy in the network of its node needs none. A network that only exists on one node, as a
    classic Swarm's manager tells them (`node/name`), is for the proxies there.
    """
    everything = tuple(containers)
    wanted: set[str] = set()
    for item in everything:
        if item.instance.state in _LIVE and not item.is_proxy:
            workload = item.workload
            for route in read_labels(workload, rules).routes:
                for name in (route.network, f"{workload.stack}_{route.network}"):
                    if route.network and name in workload.networks:
                        wanted.add(name)
                        break
    wanted.difference_update(_NOT_ATTACHABLE)
    links = {
        Link(network, item.instance.id, item.workload.name)
        for item in everything
        if item.is_proxy and item.instance.state in _LIVE and not item.instance.host_network
        for network in wanted - set(item.workload.networks)
        if "/" not in network or network.startswith(f"{item.instance.node}/")
    }
    return tuple(sorted(links))


def refusal(link: Link, reason: str, *, source: str) -> Rejection:
    """That a proxy could not be attached, and how to do it by hand."""
    return Rejection(
        subject=f"container {link.name}",
        reason="attach_refused",
        message=f"AttachNetworks: {link.name} cannot be attached to {link.network}: {reason}",
        hint="Let POST /networks/{id}/connect by, or run: "
        f"docker network connect {link.network} {link.name}",
        source=source,
    )
