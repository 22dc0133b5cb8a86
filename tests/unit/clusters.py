"""Small clusters to compile, and golden files: what the tests of the pure core share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from agent.config.settings import Extension, Settings
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    PublishedPort,
    Snapshot,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

GOLDEN = Path(__file__).parent / "golden"
EDGE = "edge"


def labels(**values: str) -> dict[str, str]:
    """`hostname="app"` → `interlock.hostname: app`; two underscores are a dot."""
    return {"interlock." + name.replace("__", "."): value for name, value in values.items()}


def instance(
    id_: str,
    address: str = "10.0.0.1",
    state: InstanceState = InstanceState.UP,
    *,
    network: str = EDGE,
    published: tuple[PublishedPort, ...] = (),
    node_address: str = "",
    weight: int | None = None,
    detail: str = "",
    host_network: bool = False,
) -> Instance:
    """A task with one address on one network, or none where the address is empty."""
    return Instance(
        id=id_,
        name=f"{id_}-name",
        state=state,
        node="node-1",
        node_address=node_address,
        attachments=(Attachment(network, address),) if address else (),
        published=published,
        weight=weight,
        detail=detail,
        host_network=host_network,
    )


def service(
    name: str,
    wants: Mapping[str, str],
    *instances: Instance,
    created: float = 1.0,
    template: Mapping[str, str] | None = None,
    networks: tuple[str, ...] = (EDGE,),
    ports: tuple[int, ...] = (80,),
    wanted: int | None = 1,
    stack: str = "",
    kind: WorkloadKind = WorkloadKind.SERVICE,
    source: str = "swarm",
    host_ports_only: bool = False,
) -> Workload:
    """A service on the network `edge` that declares port 80."""
    return Workload(
        key=WorkloadKey(source, f"id-{name}"),
        kind=kind,
        name=name,
        created=created,
        labels=dict(wants),
        template_labels=dict(template or {}),
        networks=networks,
        ports=ports,
        instances=instances,
        wanted=wanted,
        stack=stack,
        host_ports_only=host_ports_only,
    )


def snapshot(*workloads: Workload, proxy_networks: tuple[str, ...] | None = (EDGE,)) -> Snapshot:
    """What the sources of these workloads saw."""
    sources = sorted({workload.key.source for workload in workloads} or {"swarm"})
    return Snapshot(
        {
            name: SourceSnapshot(
                source=name,
                workloads={w.key: w for w in workloads if w.key.source == name},
                proxy_networks=proxy_networks,
            )
            for name in sources
        }
    )


def settings(
    *, host_linger: float = 600.0, hold_timeout: float = 15.0, **extension: object
) -> Settings:
    """Settings with the given keys of the extension."""
    return Settings(
        host_linger=host_linger,
        hold_timeout=hold_timeout,
        extensions=(Extension.model_validate(extension, by_name=True),),
    )


def check_golden(name: str, text: str) -> None:
    """Compare with a golden file; `TIDEGATE_UPDATE_GOLDEN=1` writes it instead, for review."""
    path = GOLDEN / name
    if os.environ.get("TIDEGATE_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), (
        f"{path} is missing; write it with TIDEGATE_UPDATE_GOLDEN=1 and look at it"
    )
    assert text == path.read_text(), f"differs from {path}"
