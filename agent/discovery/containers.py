"""What an engine says of a container, made into a workload with one instance.

Pure: apart from the sources that ask, so that both an engine's and a classic Swarm's answers come
to the same. Only TCP counts; a container that does not run is none.
"""

from __future__ import annotations

import ipaddress
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agent.discovery.cluster import PROXY_LABEL, PROXY_VALUES, STACK_LABEL
from agent.discovery.swarm_rest import timestamp
from agent.model import (
    EMPTY,
    Attachment,
    Instance,
    InstanceState,
    PublishedPort,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

PROJECT_LABEL = "com.docker.compose.project"

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL})
"""Signals that are the beginning of the end of whatever container."""


@dataclass(frozen=True, slots=True)
class Container:
    """A running container as last seen.

    Attributes:
        stop_signal: the signal that asks it to stop.
        summary: what the list said of it then; as long as it says the same there is no need to
            inspect it again.
    """

    workload: Workload
    is_proxy: bool
    stop_signal: int
    summary: str = ""

    @property
    def instance(self) -> Instance:
        """The one instance of it."""
        return self.workload.instances[0]


def container(
    raw: Mapping[str, Any], *, source: str, node: str, node_address: str
) -> Container | None:
    """A container as inspected; None unless it runs."""
    state = raw.get("State") or {}
    if state.get("Status") not in ("running", "paused"):
        return None
    config = raw.get("Config") or {}
    labels: Mapping[str, str] = MappingProxyType(dict(config.get("Labels") or {})) or EMPTY
    networking = raw.get("NetworkSettings") or {}
    on_host = (raw.get("HostConfig") or {}).get("NetworkMode") == "host"
    ports = tuple(sorted(_tcp_ports(config.get("ExposedPorts") or {})))
    published = _published(networking.get("Ports") or {})
    if on_host:
        published = tuple(PublishedPort(target=port, published=port) for port in ports)
    attachments = tuple(
        Attachment(network, address)
        for network, endpoint in sorted((networking.get("Networks") or {}).items())
        if (address := endpoint.get("IPAddress") or endpoint.get("GlobalIPv6Address") or "")
    )
    traffic, detail = _traffic_state(state)
    name = str(raw.get("Name", "")).lstrip("/")
    instance = Instance(
        id=str(raw["Id"]),
        name=name,
        state=traffic,
        node=node,
        node_address=node_address,
        attachments=attachments,
        published=published,
        detail=detail,
        host_network=on_host,
    )
    workload = Workload(
        key=WorkloadKey(source, instance.id),
        kind=WorkloadKind.CONTAINER,
        name=name,
        created=timestamp(str(raw.get("Created", ""))),
        labels=labels,
        networks=tuple(attachment.network for attachment in attachments),
        ports=ports,
        instances=(instance,),
        stack=labels.get(PROJECT_LABEL) or labels.get(STACK_LABEL, ""),
        host_ports_only=on_host,
        hostname=str(config.get("Hostname") or ""),
        domainname=str(config.get("Domainname") or ""),
    )
    return Container(
        workload=workload,
        is_proxy=labels.get(PROXY_LABEL) in PROXY_VALUES,
        stop_signal=signal_number(str(config.get("StopSignal") or "")) or signal.SIGTERM,
    )


def signal_number(text: str) -> int:
    """The number of a signal told as a number or by name, with or without SIG; 0 for none."""
    if text.isdigit():
        return int(text)
    with suppress(KeyError):
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    return 0


def _traffic_state(state: Mapping[str, Any]) -> tuple[InstanceState, str]:
    if state.get("Paused"):
        # It answers nothing, so not even the last resort that a draining peer is.
        return InstanceState.WAITING, "the container is paused"
    match (state.get("Health") or {}).get("Status"):
        case "starting":
            return InstanceState.WAITING, "its health check has not passed yet"
        case "unhealthy":
            return InstanceState.WAITING, "its health check fails"
        case _:
            return InstanceState.UP, ""


def _tcp_ports(exposed: Iterable[str]) -> set[int]:
    return {int(port.partition("/")[0]) for port in exposed if port.endswith("/tcp")}


def _published(ports: Mapping[str, Any]) -> tuple[PublishedPort, ...]:
    """Published TCP ports, lowest first; one that is bound to IPv4 and to IPv6 is told once."""
    found: dict[tuple[int, int], PublishedPort] = {}
    for spec, bindings in ports.items():
        if not spec.endswith("/tcp"):
            continue
        # IPv4 sorts before IPv6, and where both are there it is the one to be taken.
        for binding in sorted(bindings or (), key=lambda b: ":" in b.get("HostIp", "")):
            target, host = int(spec.partition("/")[0]), str(binding.get("HostIp", ""))
            with suppress(ValueError):
                published = int(binding.get("HostPort") or 0)
                if host and ipaddress.ip_address(host).is_unspecified:
                    # Bound to every IPv6 address alone, it is not to be had at an IPv4 one.
                    host = "::" if ":" in host else ""
                if published:
                    port = PublishedPort(target, published, host)
                    found.setdefault((target, published), port)
    return tuple(port for _, port in sorted(found.items()))
