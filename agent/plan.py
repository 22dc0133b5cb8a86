"""What would be pushed and rendered now, instance by instance, and whether it takes a reload.

Why apart from the fleet: a plan asks (`GET` only) and does nothing, so it needs no threads, no
lease and no retries. What would be pushed is found by the fleet's own `diff`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.driver.parts import Connect, Rendered, Renderer, diff
from agent.driver.targets import Target
from agent.errors import DriverError
from agent.model import Desired, Peer, Upstream


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
        }


def plan(
    desired: Desired, targets: Iterable[Target], *, connect: Connect, renderer: Renderer
) -> tuple[InstancePlan, ...]:
    """Ask every instance what it has, and compare.

    Raises:
        RenderError: the site cannot be rendered.
    """
    rendered: dict[int, tuple[Rendered, str]] = {}
    result = []
    for target in targets:
        client = connect(target)
        try:
            status = client.status()
            _, held = client.membership()
            running = client.site()
        except DriverError as error:
            result.append(InstancePlan(name=target.name, url=client.url, error=str(error)))
            continue
        finally:
            client.close()
        if status.nginx_version not in rendered:
            site = renderer.render(desired.site, status.nginx_version)
            rendered[status.nginx_version] = site, renderer.generation(site.files)
        site, generation = rendered[status.nginx_version]
        upsert, remove = diff(held, desired.membership)
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
                new_generation=generation,
                files=tuple(site.files),
                file_changes=_file_changes(running, site.files),
            )
        )
    return tuple(result)


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
        found.append(f"~ policy {before.policy.algorithm} -> {after.policy.algorithm}")
    if before.hold != after.hold:
        found.append(f"~ hold {before.hold:g} s -> {after.hold:g} s")
    return UpstreamChange(after.name, "changed", tuple(found))


def _peer(peer: Peer) -> str:
    host = f"[{peer.address}]" if ":" in peer.address else peer.address
    weight = f" weight {peer.weight}" if peer.weight != 1 else ""
    return f"{peer.id} {host}:{peer.port} {peer.state.value}{weight}"
