"""Containers of a classic (standalone) Swarm, as its manager tells them.

The manager's API looks like an engine's with the containers of all nodes. What it lists comes from
its own memory of the nodes, so one list is all that is asked, and no node that hangs can hold it
up; nothing is inspected.

What is missing from a list is the question. A manager that has just started knows no node, then
one after the other. So a container that is no longer listed is gone only if

* an event said so: of the container, or that its node is lost, or
* the manager is out of touch with its node: the node is lost, and so is what ran there, or
* the manager is in touch with its node, and lists as many containers of it as it says there are.

Otherwise the list is in doubt, and is read again soon. What stays missing serves on; after
`UNSEEN_LIMIT` as the last resort only, for its node may have died while the manager was away.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from agent.config.settings import Settings
from agent.discovery.base import Observer
from agent.discovery.classic_nodes import NodeView, is_classic, nodes_of
from agent.discovery.containers import STOP_SIGNALS, Container, container, signal_number
from agent.discovery.docker_api import Connect, Engine, Filters, read
from agent.discovery.engine import EngineSource, Listing, address_of, inspect
from agent.errors import DiscoveryError, DockerRefused
from agent.model import InstanceState

NAME = "classic"

_log = logging.getLogger(__name__)

DOUBT_INTERVAL = 2.0
"""Seconds between lists while they are in doubt."""

PATIENCE = 10.0
"""Seconds for which the first snapshot waits for a manager to be in touch with all its nodes."""

UNSEEN_LIMIT = 60.0
"""Seconds after which containers of a node that is not seen again are the last resort only."""

HOST_DOWN = "Host Down"
"""What the manager says of a container on a node that it is out of touch with."""

_HEALTH = re.compile(r"\((?:health: )?(healthy|unhealthy|starting)\)")


@dataclass(frozen=True, slots=True)
class ClassicListing(Listing):
    """A full list, and what it takes to judge it.

    Attributes:
        containers: those that run, on nodes that the manager is in touch with.
        listed: node name of every container that is listed, by id.
        down: ids of those on a node that is lost.
        nodes: by name.
    """

    listed: Mapping[str, str]
    down: frozenset[str]
    nodes: Mapping[str, NodeView]

    def covers(self, node: str) -> bool:
        """Whether all containers of that node are listed."""
        view = self.nodes.get(node)
        count = sum(name == node for name in self.listed.values())
        return view is not None and view.healthy and count >= view.containers

    @property
    def whole(self) -> bool:
        """Whether all containers of all nodes are listed, as far as the nodes can be reached."""
        counts = Counter(self.listed.values())
        return bool(self.nodes) and all(
            view.lost or (view.healthy and counts[name] >= view.containers)
            for name, view in self.nodes.items()
        )


class ClassicSource(EngineSource):
    """The source named "classic"."""

    name = NAME
    # The manager knows no filters; what is none of ours is passed over.
    filters: Filters = MappingProxyType({})

    def __init__(
        self,
        settings: Settings,
        *,
        observer: Observer,
        connect: Connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the source; it connects when it runs."""
        super().__init__(settings, observer=observer, connect=connect, clock=clock)
        self._nodes: Mapping[str, NodeView] = {}
        # Since when nodes are not seen whose containers are still known.
        self._unseen: dict[str, float] = {}
        self._shared: dict[str, bool] = {}
        self._first_list: float | None = None

    # --- what is asked --------------------------------------------------------------------

    def _learn(self, engine: Engine) -> None:
        if not is_classic(read(engine, "/info")):
            raise DiscoveryError(
                "the engine is no classic Swarm's manager; set Sources to auto, or to what it is"
            )

    def _list(
        self, engine: Engine, known: Mapping[str, Container], overdue: frozenset[str]
    ) -> ClassicListing:
        """All containers, whatever their state, and the nodes."""
        nodes = nodes_of(read(engine, "/info"))
        lines = read(engine, "/containers/json", all="1")
        self._learn_networks(engine, lines)
        addresses = {
            name: address_of(urlsplit(f"//{view.address}").hostname or "")
            for name, view in nodes.items()
        }
        found: dict[str, Container] = {}
        listed: dict[str, str] = {}
        down: set[str] = set()
        for line in lines:
            identity = str(line["Id"])
            node, name = names_of(line)
            listed[identity] = node
            if str(line.get("Status", "")) == HOST_DOWN:
                down.add(identity)
                continue
            item = container(
                as_inspected(line, node=node, name=name, shared=self._shared),
                source=self.name,
                node=node,
                node_address=addresses.get(node, ""),
            )
            if item is not None:
                before = known.get(identity)
                found[identity] = (
                    replace(item, stop_signal=before.stop_signal) if before is not None else item
                )
        return ClassicListing(found, listed, frozenset(down), nodes)

    def _learn_networks(self, engine: Engine, lines: Iterable[Mapping[str, Any]]) -> None:
        """Learn which networks span nodes: those that the manager tells without a node's name."""
        used = {identity for line in lines for identity, _, _ in _endpoints(line)}
        if used <= self._shared.keys():
            return
        for network in read(engine, "/networks"):
            self._shared[str(network["Id"])] = "/" not in str(network.get("Name", ""))

    def _inspect(self, engine: Engine, identity: str, known: Container | None) -> Container | None:
        """With which signal a container wants to be stopped, which no list tells."""
        if known is None:
            return None
        try:
            config = inspect(engine, identity).get("Config") or {}
        except DockerRefused as error:
            _log.info("source %s: %s", self.name, error)
            return known
        wanted = signal_number(str(config.get("StopSignal") or ""))
        return replace(known, stop_signal=wanted or known.stop_signal)

    # --- what is made of it ---------------------------------------------------------------

    def _merge(self, listing: Listing, tick: int) -> bool:
        """Believe the list where it is whole; tells whether that can be published."""
        assert isinstance(listing, ClassicListing)
        now = self._clock()
        self._nodes = listing.nodes
        found = dict(listing.containers)
        doubt = False
        for identity, known in self._containers.items():
            if identity in listing.down:
                found[identity] = _lost_with_its_node(known)
            elif identity not in listing.listed and not self._is_gone(known, listing):
                found[identity] = self._unseen_for_long(known, now)
                doubt = True
        seen = {name for name in self._unseen if listing.covers(name)}
        self._unseen = {name: at for name, at in self._unseen.items() if name not in seen}
        self._spare(found, tick)
        self._containers = found
        if self._published is None and not listing.whole:
            # Nothing is known from before: half of the cluster must not pass for all of it.
            self._first_list = self._first_list or now
            if now - self._first_list < PATIENCE:
                self._list_due = min(self._list_due, now + DOUBT_INTERVAL)
                return False
        if doubt:
            self._list_due = min(self._list_due, now + DOUBT_INTERVAL)
        return True

    def _is_gone(self, known: Container, listing: ClassicListing) -> bool:
        """Whether a container that is not listed any more has ended, or its node is lost."""
        node = known.instance.node
        view = listing.nodes.get(node)
        return (
            known.instance.state is InstanceState.GONE
            or (view is not None and view.lost)
            or listing.covers(node)
        )

    def _unseen_for_long(self, known: Container, now: float) -> Container:
        """What is missing serves on; after a while only where there is nothing better."""
        since = self._unseen.setdefault(known.instance.node, now)
        if now - since < UNSEEN_LIMIT or known.instance.state is not InstanceState.UP:
            return known
        return _in_state(
            known,
            InstanceState.DRAINING,
            "the manager does not list it any more, and nothing tells that it has ended",
        )

    def _take_in(self, event: Mapping[str, Any], heard_at: float) -> None:
        action = str(event.get("Action") or event.get("status") or "")
        if not action.startswith("engine_"):
            super()._take_in(event, heard_at)
            return
        self._tick += 1
        self._report.heard("node")
        self._list_soon(heard_at)
        if action == "engine_disconnect":
            attributes = (event.get("Actor") or {}).get("Attributes") or {}
            name = str(attributes.get("node.name") or (event.get("node") or {}).get("Name") or "")
            # Of several nodes with that name it cannot be told which: the list tells.
            if name and (name not in self._nodes or self._nodes[name].alone):
                self._lose(name)

    def _lose(self, node: str) -> None:
        for identity, known in self._containers.items():
            if known.instance.node == node:
                self._touched[identity] = self._tick
                self._containers[identity] = _lost_with_its_node(known)

    def _killed(self, identity: str, number: int, heard_at: float) -> None:
        super()._killed(identity, number, heard_at)
        if identity in self._containers and number not in STOP_SIGNALS:
            # It may be the container's own stop signal; no list tells, so it is asked.
            self._signalled.setdefault(identity, set()).add(number)
            self._want(heard_at)
            self._wanted.add(identity)

    def _put(self, identity: str, seen: Container | None) -> None:
        # Its stop signal is all that was asked for; the rest is as the list tells it.
        known = self._containers.get(identity)
        if seen is not None and known is not None:
            super()._put(identity, replace(known, stop_signal=seen.stop_signal))

    def _look_at(self, identity: str, heard_at: float) -> None:
        """Have everything listed: to the manager that is no more than to look at one."""
        self._touched[identity] = self._tick
        self._list_soon(heard_at)

    def _list_soon(self, heard_at: float) -> None:
        self._want(heard_at)
        self._list_due = 0.0


def names_of(line: Mapping[str, Any]) -> tuple[str, str]:
    """Node and name of a container in the list; links of others to it are further names."""
    names = [str(name).strip("/").split("/") for name in line.get("Names") or ()]
    own = min(names, key=len, default=[""])
    return (own[0] if len(own) > 1 else "", own[-1])


def as_inspected(
    line: Mapping[str, Any], *, node: str, name: str, shared: Mapping[str, bool]
) -> dict[str, Any]:
    """A line of the list in the form of an inspection, as far as it tells.

    Args:
        shared: by id, whether a network spans nodes; any other is told as `node/name`, for
            networks of the same name on two nodes have nothing in common.
    """
    status = str(line.get("Status", ""))
    state = str(line.get("State") or ("running" if status.startswith("Up ") else "exited"))
    health = _HEALTH.search(status)
    ports: dict[str, list[dict[str, str]]] = {}
    for port in line.get("Ports") or ():
        offers = ports.setdefault(f"{port.get('PrivatePort')}/{port.get('Type', 'tcp')}", [])
        if port.get("PublicPort"):
            offers.append({"HostIp": str(port.get("IP", "")), "HostPort": str(port["PublicPort"])})
    networks = {
        network if shared.get(identity) else f"{node}/{network}": endpoint
        for identity, network, endpoint in _endpoints(line)
    }
    return {
        "Id": line["Id"],
        "Name": name,
        "Created": datetime.fromtimestamp(int(line.get("Created") or 0), UTC).isoformat(),
        "State": {
            "Status": state,
            "Paused": state == "paused" or "(Paused)" in status,
            "Health": {"Status": health[1]} if health else None,
        },
        "Config": {"Labels": line.get("Labels"), "ExposedPorts": dict.fromkeys(ports)},
        "HostConfig": line.get("HostConfig"),
        "NetworkSettings": {"Ports": ports, "Networks": networks},
    }


def _endpoints(line: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """Of each network of a line of the list: id, name, and the container's place on it."""
    networks = (line.get("NetworkSettings") or {}).get("Networks") or {}
    for name, endpoint in networks.items():
        if identity := str((endpoint or {}).get("NetworkID", "")):
            yield identity, name, endpoint


def _lost_with_its_node(known: Container) -> Container:
    return _in_state(known, InstanceState.GONE, f"node {known.instance.node} is down")


def _in_state(known: Container, state: InstanceState, detail: str) -> Container:
    instance = replace(known.instance, state=state, detail=detail)
    return replace(known, workload=replace(known.workload, instances=(instance,)))
