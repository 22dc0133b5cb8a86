"""The Swarm as the engine's REST API tells it, turned into `cluster`'s records."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import MappingProxyType
from typing import Any

from agent.discovery.cluster import Listing, Network, Node, Service, Task, TaskState
from agent.discovery.docker_api import Engine, parse, read
from agent.errors import DockerRefused, DockerUnavailable
from agent.model import EMPTY, PublishedPort

NOT_FOUND = 404

LIVE = {"desired-state": ("running", "ready")}
"""Filter for tasks that run or shall: neither the history nor what is told to stop."""


def list_all(engine: Engine) -> Listing:
    """List everything, tasks last.

    Raises:
        DockerUnavailable, DockerRefused: one of the lists failed, so there is no list.
    """
    with _shape_of("/nodes"):
        nodes = [node(raw) for raw in engine.each("/nodes")]
    with _shape_of("/networks"):
        networks = {n.id: n for n in map(network, engine.each("/networks"))}
    with _shape_of("/services"):
        services = [service(raw) for raw in engine.each("/services")]
    tasks, of_tasks = _tasks_and_networks(engine.each("/tasks"))
    networks |= {n.id: n for n in of_tasks}
    for target in {target for item in services for target in item.targets} - networks.keys():
        # The list leaves out the cluster's own "host" and "bridge".
        try:
            networks[target] = network(read(engine, f"/networks/{target}"))
        except DockerRefused as error:
            if error.status != NOT_FOUND:
                raise
    return Listing(services=services, tasks=tasks, nodes=nodes, networks=list(networks.values()))


def tasks_of(body: bytes) -> tuple[list[Task], list[Network]]:
    """The tasks of an answer to `/tasks`, and the networks that they name.

    Raises:
        DockerUnavailable: it is no list of tasks.
    """
    return _tasks_and_networks(parse(body, "/tasks"))


def _tasks_and_networks(raw_tasks: Iterable[Any]) -> tuple[list[Task], list[Network]]:
    tasks: list[Task] = []
    networks: dict[str, Network] = {}
    with _shape_of("/tasks"):
        for raw in raw_tasks:
            tasks.append(task(raw))
            networks |= {item.id: item for item in task_networks(raw)}
    return tasks, list(networks.values())


@contextmanager
def _shape_of(path: str) -> Iterator[None]:
    """An answer that lacks what it must have is as good as none."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise DockerUnavailable(
            f"the engine's answer to {path} is not what it should be: {error!r}"
        ) from error


def node(raw: Any) -> Node:
    """A node; a manager that listens on every address is known by the one it is reached at."""
    address = raw["Status"].get("Addr", "")
    manager = (raw.get("ManagerStatus") or {}).get("Addr", "")
    return Node(
        id=sys.intern(raw["ID"]),
        version=_version(raw),
        hostname=(raw.get("Description") or {}).get("Hostname", ""),
        address=usable_address(address) or usable_address(manager.rpartition(":")[0].strip("[]")),
        down=raw["Status"].get("State") == "down",
    )


def usable_address(address: str) -> str:
    """The address, or nothing where it stands for every address."""
    return "" if address in ("0.0.0.0", "::") else address  # noqa: S104  (compared, not bound)


def network(raw: Any) -> Network:
    """A network as `/networks` has it: with another casing, and without a version."""
    return Network(
        id=sys.intern(raw["Id"]),
        version=0,
        name=sys.intern(raw["Name"]),
        driver=raw.get("Driver", ""),
        ingress=bool(raw.get("Ingress")),
    )


def task_networks(raw: Any) -> list[Network]:
    """The networks that a task is attached to, as the task itself tells."""
    found = []
    for attachment in raw.get("NetworksAttachments") or ():
        item = attachment.get("Network") or {}
        spec = item.get("Spec") or {}
        if item.get("ID") and spec.get("Name"):
            driver = spec.get("DriverConfiguration") or item.get("DriverState") or {}
            found.append(
                Network(
                    id=sys.intern(item["ID"]),
                    version=_version(item),
                    name=sys.intern(spec["Name"]),
                    driver=driver.get("Name", ""),
                    ingress=bool(spec.get("Ingress")),
                )
            )
    return found


def service(raw: Any) -> Service:
    """A service."""
    spec = raw["Spec"]
    template = spec.get("TaskTemplate") or {}
    mode = spec.get("Mode") or {}
    attached = template.get("Networks") or spec.get("Networks") or ()
    ports = (spec.get("EndpointSpec") or {}).get("Ports") or ()
    replicas = None
    if "Replicated" in mode:
        replicas = int((mode["Replicated"] or {}).get("Replicas", 0))
    return Service(
        id=raw["ID"],
        version=_version(raw),
        name=spec.get("Name", ""),
        created=timestamp(raw.get("CreatedAt", "")),
        labels=_labels(spec.get("Labels")),
        template_labels=_labels((template.get("ContainerSpec") or {}).get("Labels")),
        targets=tuple(dict.fromkeys(item["Target"] for item in attached if item.get("Target"))),
        ports=tuple(
            sorted({port["TargetPort"] for port in ports if port.get("Protocol", "tcp") == "tcp"})
        ),
        replicas=replicas,
        job="Replicated" not in mode and "Global" not in mode,
        vips=tuple(
            (sys.intern(item["NetworkID"]), bare(item["Addr"]))
            for item in (raw.get("Endpoint") or {}).get("VirtualIPs") or ()
            if item.get("Addr")
        ),
    )


def task(raw: Any) -> Task:
    """A task."""
    status = raw.get("Status") or {}
    ports = (status.get("PortStatus") or {}).get("Ports") or ()
    return Task(
        id=raw["ID"],
        version=_version(raw),
        service=sys.intern(raw.get("ServiceID", "")),
        slot=raw.get("Slot", 0),
        node=sys.intern(raw.get("NodeID", "")),
        state=_state(status.get("State", "new")),
        desired=_state(raw.get("DesiredState", "new")),
        error=status.get("Err", ""),
        addresses=tuple(
            (sys.intern(attachment["Network"]["ID"]), bare(address))
            for attachment in raw.get("NetworksAttachments") or ()
            for address in attachment.get("Addresses") or ()
        ),
        published=host_ports(
            (port["TargetPort"], port["PublishedPort"])
            for port in ports
            if port.get("Protocol", "tcp") == "tcp"
            and port.get("PublishMode") == "host"
            and port.get("PublishedPort")
        ),
    )


def host_ports(pairs: Any) -> tuple[PublishedPort, ...]:
    """Pairs of target and published port, each once: with IPv6 on, each is told twice."""
    return tuple(
        PublishedPort(target=target, published=published)
        for target, published in dict.fromkeys(pairs)
    )


def bare(address: str) -> str:
    """An address without its prefix length."""
    return address.partition("/")[0]


def timestamp(text: str) -> float:
    """Unix time of an RFC 3339 time with nanoseconds; 0 for none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _state(name: str) -> int:
    """A state that a newer engine may have added is none that takes traffic."""
    try:
        return TaskState[name.upper()]
    except KeyError:
        return TaskState.NEW


def _labels(raw: Mapping[str, str] | None) -> Mapping[str, str]:
    return MappingProxyType(dict(raw)) if raw else EMPTY


def _version(raw: Any) -> int:
    return int((raw.get("Version") or {}).get("Index", 0))
