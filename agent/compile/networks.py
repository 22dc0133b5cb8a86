"""Which network the instances of a workload are reached over.

The one that the label names, else the one that the workload shares with OpenResty. There must be
exactly one: to guess among several would be to guess who can reach whom. Must not look at instances
or ports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from agent.compile.rejections import listed, reject
from agent.labels import Reason, RouteDeclaration, subject_of
from agent.model import Rejection, Workload, WorkloadKind

_SHARED = "the one network shared with OpenResty"


class Network(NamedTuple):
    """A network to reach instances over.

    Attributes:
        how: how it was found, for people.
    """

    name: str
    how: str


def find_network(
    workload: Workload,
    declaration: RouteDeclaration,
    proxy_networks: tuple[str, ...] | None,
    proxies: tuple[str, ...],
) -> Network | Rejection | None:
    """The network of a route; None where it goes by published ports instead.

    Args:
        proxy_networks: networks that the OpenResty instances are on; None where that is not known.
        proxies: names of those instances, for hints.
    """
    if declaration.network:
        return _named(workload, declaration, proxy_networks, proxies)
    if workload.host_ports_only:
        return None
    if workload.kind is WorkloadKind.CONTAINER:
        return _of_container(workload, declaration, proxy_networks)
    return _of_service(workload, declaration, proxy_networks)


def keep_network(
    refused: Rejection,
    before: Network,
    workload: Workload,
    proxy_networks: tuple[str, ...] | None,
) -> Rejection | None:
    """What to say of a network that has become one of several and is kept nevertheless.

    Another network must not take a service down that is served.

    Args:
        before: what the service is reached over until now.

    Returns:
        None where it cannot be kept, so that `refused` holds.
    """
    if (
        refused.reason != Reason.NETWORK_AMBIGUOUS
        or before.name not in workload.networks
        or (proxy_networks is not None and before.name not in proxy_networks)
    ):
        return None
    return replace(
        refused,
        message=f"{refused.message} It is still reached over {before.name}, as it was before, "
        "until the agent starts anew.",
    )


def _named(
    workload: Workload,
    declaration: RouteDeclaration,
    proxy_networks: tuple[str, ...] | None,
    proxies: tuple[str, ...],
) -> Network | Rejection:
    """The network of the label: its exact name, else with the stack's name in front."""
    label, option = declaration.network, declaration.label("network")
    prefixed = f"{workload.stack}_{label}" if workload.stack else label
    name = label if label in workload.networks else prefixed
    if name not in workload.networks:
        tried = label if prefixed == label else f"{label} nor {prefixed}"
        return reject(
            workload,
            Reason.NETWORK_UNKNOWN,
            f"{option}={label}, but {subject_of(workload)} is not attached to {tried}; "
            f"it is attached to: {listed(workload.networks)}.",
            f"Correct the label {option}, or attach it: " + _attach(workload, label, workload.name),
        )
    # A proxy in the host's network reaches the bridges of a plain engine without being on them.
    on_bridges = workload.kind is WorkloadKind.CONTAINER and (
        not proxy_networks or "host" in proxy_networks
    )
    if proxy_networks is not None and name not in proxy_networks and not on_bridges:
        return reject(
            workload,
            Reason.NETWORK_NOT_SHARED,
            f"{option}={label}, but OpenResty is not attached to {name}; OpenResty is "
            f"attached to: {listed(proxy_networks)}.",
            _attach_openresty(workload, name, proxies, option),
        )
    return Network(name, option)


def _attach_openresty(
    workload: Workload, network: str, proxies: tuple[str, ...], option: str
) -> str:
    """How OpenResty gets onto a network, by the names of its containers where they are known."""
    commands = "; ".join(_attach(workload, network, proxy) for proxy in proxies or ("OPENRESTY",))
    naming = "" if proxies else " (with its name for OPENRESTY)"
    setting = " or set AttachNetworks = true," if workload.kind is WorkloadKind.CONTAINER else ""
    return (
        f"Attach OpenResty too: {commands}{naming},{setting} or name another network in {option}."
    )


def _attach(workload: Workload, network: str, target: str) -> str:
    if workload.kind is WorkloadKind.CONTAINER:
        return f"docker network connect {network} {target}"
    return f"docker service update --network-add {network} {target}"


def _of_service(
    workload: Workload, declaration: RouteDeclaration, proxy_networks: tuple[str, ...] | None
) -> Network | Rejection:
    """The one network of a service that OpenResty is on too."""
    if proxy_networks is None:
        candidates = workload.networks
        found = "its only network"
    else:
        candidates = tuple(name for name in workload.networks if name in proxy_networks)
        found = _SHARED
    if len(candidates) == 1:
        return Network(candidates[0], found)
    if candidates:
        return _ambiguous(workload, declaration, candidates, proxy_networks)
    if proxy_networks is None:
        return reject(
            workload,
            Reason.NETWORK_NOT_SHARED,
            f"{subject_of(workload)} is attached to no network on which it could be reached.",
            "Attach it to a network that OpenResty is on: "
            + _attach(workload, "NETWORK", workload.name),
        )
    common = proxy_networks[0] if len(proxy_networks) == 1 else "NETWORK"
    return reject(
        workload,
        Reason.NETWORK_NOT_SHARED,
        f"{subject_of(workload)} shares no network with OpenResty. It is attached to: "
        f"{listed(workload.networks)}; OpenResty is attached to: {listed(proxy_networks)}.",
        "Attach it to a network of OpenResty: "
        + _attach(workload, common, workload.name)
        + f", and name that network in {declaration.label('network')} where there is more than "
        "one.",
    )


def _ambiguous(
    workload: Workload,
    declaration: RouteDeclaration,
    candidates: tuple[str, ...],
    proxy_networks: tuple[str, ...] | None,
) -> Rejection:
    option = declaration.label("network")
    what = (
        "shares several networks with OpenResty"
        if proxy_networks is not None
        else "is attached to several networks, and it is not known which of them OpenResty is on"
    )
    command = (
        f"docker service update --label-add {option}={sorted(candidates)[0]} {workload.name}"
        if workload.kind is WorkloadKind.SERVICE
        else f"docker run --label {option}={sorted(candidates)[0]} ..."
    )
    return reject(
        workload,
        Reason.NETWORK_AMBIGUOUS,
        f"{subject_of(workload)} {what}: {listed(candidates)}.",
        f"Name one of them in the label {option}, for example: {command}",
    )


def _of_container(
    workload: Workload, declaration: RouteDeclaration, proxy_networks: tuple[str, ...] | None
) -> Network | Rejection | None:
    """A network that a container shares with a discovered proxy; None: go by published ports."""
    shared = tuple(name for name in workload.networks if name in (proxy_networks or ()))
    # On the default bridge by habit, on another by intent.
    # Told as `node/name`, a network is on one node only, and other proxies do not reach it.
    own = tuple(name for name in shared if name not in ("host", "none") and "/" not in name)
    candidates = tuple(name for name in own if name != "bridge") or own
    if len(candidates) > 1:
        return _ambiguous(workload, declaration, candidates, proxy_networks)
    return Network(candidates[0], _SHARED) if candidates else None
