"""What would be pushed and rendered now, instance by instance, and whether it takes a reload.

Why apart from the fleet: a plan asks (`GET` only) and does nothing, so it needs no threads, no
lease and no retries. What would be pushed is found by the fleet's own `diff`. What only the running
agent remembers (which hosts linger, what OpenResty refused) comes in as `Running`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field

from agent import policies
from agent.compile import DEFAULT
from agent.driver import certificates
from agent.driver.openresty import Build
from agent.driver.parts import Connect, Rendered, Renderer, diff
from agent.driver.targets import Target
from agent.errors import DriverError
from agent.model import (
    Desired,
    Host,
    Location,
    Membership,
    Peer,
    Policy,
    Rejection,
    Site,
    TcpRoute,
    Upstream,
)

REFUSALS = certificates.REASONS | {
    "host_quarantined",
    "upstream_refused",
    "http3_unavailable",
    "stream_unavailable",
}
"""Reasons of what OpenResty refused: no compilation, only the agent that pushed knows of these."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Route(_Part):
    host: str
    aliases: tuple[str, ...] = ()
    path: str
    upstream: str
    tls_only: bool = False
    rewrite: bool = False
    location: Location | None = None

    def was(self) -> Location:
        """The location that the agent has; an older agent tells less of it."""
        if self.location is not None:
            return self.location
        return Location(self.path, self.upstream, self.rewrite, self.tls_only)


class _Upstream(_Part):
    name: str
    policy: Mapping[str, object] = Field(default_factory=lambda: {"algorithm": "round_robin"})
    hold_seconds: float = 0.0
    peers: tuple[object, ...] = ()


class _Instance(_Part):
    id: str = ""
    name: str = ""
    state: str = ""
    quarantined: tuple[str, ...] = ()


class Running(_Part):
    """What matters here of a running agent's `/api/state`.

    Attributes:
        unasked: why it could not be asked, a sentence; everything else is empty then.
        rejections: all of its rejections.

    Raises:
        pydantic.ValidationError: (a `ValueError`) what is validated is no state of an agent.
    """

    unasked: str = ""
    rejections: tuple[Rejection, ...] = ()
    routes: tuple[_Route, ...] = ()
    upstreams: tuple[_Upstream, ...] = ()
    instances: tuple[_Instance, ...] = ()
    tcp: tuple[TcpRoute, ...] = ()

    @property
    def refusals(self) -> tuple[Rejection, ...]:
        """What OpenResty refused, or serves and warns of."""
        return tuple(item for item in self.rejections if item.reason in REFUSALS)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not known, a sentence each."""
        if self.unasked:
            return (self.unasked,)
        return tuple(
            f"the agent that was asked stands by for OpenResty {item.name}: what that refused is "
            "known only to the agent that writes"
            for item in self.instances
            if item.state == "standby"
        )

    def quarantined(self, target: Target) -> frozenset[str]:
        """Hosts that this instance refused."""
        return frozenset(
            host for item in self.instances if item.id == target.id for host in item.quarantined
        )

    def lingering(self, desired: Desired) -> tuple[Upstream, ...]:
        """Upstreams that nobody asks for any more and that the agent keeps, empty, for a while."""
        return tuple(
            Upstream(item.name, (), policies.from_json(item.policy), item.hold_seconds)
            for item in self.upstreams
            if not item.peers and item.name not in desired.membership.upstreams
        )

    def lingering_hosts(self, lingering: Iterable[Upstream]) -> tuple[Host, ...]:
        """The hosts of these upstreams, with no other locations than theirs, and without TLS."""
        names = {item.name for item in lingering}
        hosts: dict[str, Host] = {}
        for route in self.routes:
            if route.upstream in names:
                host = hosts.get(route.host, Host(route.host, route.aliases, ()))
                hosts[route.host] = replace(host, locations=(*host.locations, route.was()))
        return tuple(hosts.values())

    def lingering_ports(self, lingering: Iterable[Upstream]) -> tuple[TcpRoute, ...]:
        """The ports of these upstreams."""
        names = {item.name for item in lingering}
        return tuple(route for route in self.tcp if route.upstream in names)


NOTHING = Running()
"""An agent that has nothing to say."""


@dataclass(frozen=True, slots=True)
class UpstreamChange:
    """What would change in one upstream.

    Attributes:
        change: "added", "removed" or "changed".
        lines: one for each peer or option, with "+", "-" or "~" in front.
    """

    name: str
    change: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """What would be done to one instance.

    Attributes:
        error: why it could not be asked; everything else is empty then.
        revision, generation: what it holds and runs now.
        new_generation: what it would run.
        files: names of the rendered files.
        file_changes: those that would be added, removed or changed, with which of the three.
        lingering: upstreams that nobody asks for; they stay, empty, until HostLinger is over.
        quarantined: hosts that its nginx refused; what it runs of them stays as it is.
    """

    name: str
    url: str
    error: str = ""
    writer: str = ""
    revision: int = 0
    upstreams: tuple[UpstreamChange, ...] = ()
    generation: str = ""
    new_generation: str = ""
    files: tuple[str, ...] = ()
    file_changes: tuple[tuple[str, str], ...] = ()
    lingering: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()

    @property
    def reload(self) -> bool:
        """Whether its nginx would have to be reloaded."""
        return self.generation != self.new_generation

    @property
    def changes(self) -> bool:
        """Whether anything would be done."""
        return bool(self.upstreams) or self.reload

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "name": self.name,
            "url": self.url,
            "error": self.error,
            "writer": self.writer,
            "revision": self.revision,
            "upstreams": [
                {"name": item.name, "change": item.change, "lines": list(item.lines)}
                for item in self.upstreams
            ],
            "generation": self.generation,
            "new_generation": self.new_generation,
            "reload": self.reload and not self.error,
            "files": list(self.files),
            "file_changes": dict(self.file_changes),
            "lingering": list(self.lingering),
            "quarantined": list(self.quarantined),
        }


def plan(
    desired: Desired,
    targets: Iterable[Target],
    *,
    connect: Connect,
    renderer: Renderer,
    running: Running = NOTHING,
) -> tuple[InstancePlan, ...]:
    """Ask every instance what it has, and compare.

    Args:
        desired: compiled anew, so that nothing lingers in it.
        running: what the running agent knows beyond that.

    Raises:
        RenderError: the site cannot be rendered.
    """
    lingering = running.lingering(desired)
    wanted = Membership({**desired.membership.upstreams, **{item.name: item for item in lingering}})
    site, gone = _with_lingering(
        desired.site, running.lingering_hosts(lingering), running.lingering_ports(lingering)
    )
    rendered: dict[Build, tuple[Rendered, Rendered]] = {}
    result = []
    for target in targets:
        client = connect(target)
        try:
            status = client.status()
            _, held = client.membership()
            runs = client.site()
        except DriverError as error:
            result.append(InstancePlan(name=target.name, url=client.url, error=str(error)))
            continue
        finally:
            client.close()
        if status.build not in rendered:
            rendered[status.build] = (
                renderer.render(site, status.build),
                renderer.render(gone, status.build),
            )
        fresh, past = rendered[status.build]
        quarantined = running.quarantined(target)
        kept = {*past.hosts, *(file for file, host in fresh.hosts.items() if host in quarantined)}
        files = _keep(kept, fresh.files, runs)
        upsert, remove = diff(held, wanted)
        changes = [_change(held.upstreams.get(name), item) for name, item in upsert.items()]
        changes += [
            UpstreamChange(
                name, "removed", tuple(f"- {_peer(p)}" for p in held.upstreams[name].peers)
            )
            for name in remove
        ]
        result.append(
            InstancePlan(
                name=target.name,
                url=client.url,
                writer=status.writer,
                revision=status.revision,
                upstreams=tuple(sorted(changes, key=lambda item: item.name)),
                generation=status.generation,
                new_generation=renderer.generation(files),
                files=tuple(files),
                file_changes=_file_changes(runs, files),
                lingering=tuple(sorted(item.name for item in lingering)),
                quarantined=tuple(sorted(quarantined)),
            )
        )
    return tuple(result)


def _with_lingering(
    site: Site, lingering: Iterable[Host], ports: Iterable[TcpRoute]
) -> tuple[Site, Site]:
    """The site with the lingering locations of hosts that are in it, and the hosts that are not.

    The latter cannot be rendered as they are, for nobody tells their certificate any more.
    """
    hosts = {host.name: host for host in site.hosts}
    hosts[DEFAULT] = Host(DEFAULT, (), site.default)
    gone = []
    for past in lingering:
        host = hosts.get(past.name)
        if host is None:
            plain = tuple(replace(location, tls_only=False) for location in past.locations)
            gone.append(replace(past, locations=plain))
            continue
        paths = {location.path for location in host.locations}
        more = [
            # As the compiler does: what nobody asks for is not redirected to a TLS that is not.
            replace(location, tls_only=location.tls_only and _has_tls(host))
            for location in past.locations
            if location.path not in paths
        ]
        locations = sorted((*host.locations, *more), key=lambda location: location.path)
        hosts[past.name] = replace(host, locations=tuple(locations))
    default = hosts.pop(DEFAULT).locations
    tcp = tuple(sorted({*site.tcp, *ports}, key=lambda route: route.port))
    return Site(tuple(hosts.values()), default, tcp), Site(tuple(gone))


def _has_tls(host: Host) -> bool:
    return host.tls is not None or bool(host.passthrough)


def _keep(
    names: Iterable[str], fresh: Mapping[str, str], runs: Mapping[str, str]
) -> Mapping[str, str]:
    """The fresh files, but those of these names as they run now, or not at all."""
    files = dict(fresh)
    for name in names:
        files.pop(name, None)
        if name in runs:
            files[name] = runs[name]
    return files


def _file_changes(
    before: Mapping[str, str], after: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    changes = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            changes.append((name, "added"))
        elif name not in after:
            changes.append((name, "removed"))
        elif before[name] != after[name]:
            changes.append((name, "changed"))
    return tuple(changes)


def _change(before: Upstream | None, after: Upstream) -> UpstreamChange:
    if before is None:
        lines = tuple(f"+ {_peer(peer)}" for peer in after.peers)
        return UpstreamChange(after.name, "added", lines)
    old = {peer.id: peer for peer in before.peers}
    new = {peer.id: peer for peer in after.peers}
    found = []
    for key in sorted(old.keys() | new.keys()):
        if key not in old:
            found.append(f"+ {_peer(new[key])}")
        elif key not in new:
            found.append(f"- {_peer(old[key])}")
        elif old[key] != new[key]:
            found.append(f"~ {_peer(old[key])} -> {_peer(new[key])}")
    if before.policy != after.policy:
        found.append(f"~ policy {_policy(before.policy)} -> {_policy(after.policy)}")
    if before.hold != after.hold:
        found.append(f"~ hold {before.hold:g} s -> {after.hold:g} s")
    return UpstreamChange(after.name, "changed", tuple(found))


def _policy(policy: Policy) -> str:
    rest = {key: value for key, value in policies.to_json(policy).items() if key != "algorithm"}
    return f"{policy.algorithm} {json.dumps(rest)}" if rest else str(policy.algorithm)


def _peer(peer: Peer) -> str:
    host = f"[{peer.address}]" if ":" in peer.address else peer.address
    weight = f" weight {peer.weight}" if peer.weight != 1 else ""
    backup = " backup" if peer.backup else ""
    return f"{peer.id} {host}:{peer.port} {peer.state.value}{weight}{backup}"
