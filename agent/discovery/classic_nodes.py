"""The nodes of a classic (standalone) Swarm, as its manager tells them: text pairs in `/info`.

Pure. Apart from the source, because `auto` and `tidegate check` look at it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

HEALTHY = "Healthy"
PENDING = "Pending"
"""Known to the manager, and not reached by it since it started."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as the manager sees it.

    Attributes:
        address: its engine's `host:port`.
        status: the manager's word for it; the oldest have none.
        containers: how many it has, stopped ones too.
        alone: False where several nodes have that name; then status is the worst of them, and
            containers their sum.
    """

    address: str
    status: str = HEALTHY
    containers: int = 0
    alone: bool = True

    @property
    def healthy(self) -> bool:
        """The manager is in touch with it, so that what it lists of it is all there is."""
        return self.status == HEALTHY

    @property
    def lost(self) -> bool:
        """The manager was in touch with it and is no more."""
        return self.status not in (HEALTHY, PENDING)


def is_classic(info: Mapping[str, Any]) -> bool:
    """Whether an answer to `/info` is a classic Swarm manager's."""
    return str(info.get("ServerVersion", "")).startswith("swarm/") or any(
        key == "Nodes" for key, _ in _pairs(info)
    )


def nodes_of(info: Mapping[str, Any]) -> dict[str, NodeView]:
    """The nodes by name; those that the manager has not reached yet by their address."""
    told: list[tuple[str, NodeView]] = []
    pairs = iter(_pairs(info))
    for key, _ in pairs:
        if key == "Nodes":
            break
    for key, value in pairs:
        if not key.startswith("\u2514"):
            told.append((value if key == "(unknown)" else key, NodeView(value)))
            continue
        name, view = told[-1] if told else ("", NodeView(""))
        match key.strip("\u2514 "):
            case "Status":
                view = replace(view, status=value)
            case "Containers":
                view = replace(view, containers=int((re.match(r"\d+", value) or ["0"])[0]))
        told[-1:] = [(name, view)]
    nodes: dict[str, NodeView] = {}
    for name, view in told:
        nodes[name] = _both(nodes[name], view) if name in nodes else view
    return nodes


def _both(first: NodeView, second: NodeView) -> NodeView:
    worse = second if first.healthy else first
    return NodeView(first.address, worse.status, first.containers + second.containers, alone=False)


def _pairs(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The manager's status; old clients were told it as that of a storage driver."""
    status = info.get("SystemStatus") or info.get("DriverStatus") or ()
    return [(str(pair[0]).strip(" \x08"), str(pair[1])) for pair in status if len(pair) > 1]
