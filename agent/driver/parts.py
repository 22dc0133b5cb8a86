"""What the membership worker, the site rollout and the fleet share: seams and small parts.

The protocols here are the driver's own view of its neighbours, so that tests put fakes in their
place and nothing in the driver imports the renderer. Must not hold threads or open connections.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from agent.driver.openresty import Build, CertificateProblem, Status
from agent.driver.targets import Target
from agent.model import Membership, Site, Upstream


class AdminClient(Protocol):
    """One instance's admin API; `openresty.Instance` over HTTP, a fake in tests."""

    @property
    def url(self) -> str:
        """The URL in use."""

    def status(self) -> Status:
        """What the instance is and holds."""

    def membership(self) -> tuple[int, Membership]:
        """Its revision and membership."""

    def versions(self) -> tuple[int, Mapping[str, str]]:
        """Its revision, and what `version_of` gave for each upstream when it was pushed."""

    def upstream(self, name: str) -> Upstream:
        """One of its upstreams."""

    def patch(
        self,
        *,
        writer: str,
        base_revision: int,
        revision: int,
        upsert: Mapping[str, Upstream],
        remove: tuple[str, ...],
    ) -> None:
        """Change some upstreams."""

    def put(self, *, writer: str, revision: int, membership: Membership) -> None:
        """Replace all upstreams."""

    def site(self) -> Mapping[str, str]:
        """The files that it runs, name to text."""

    def certificate_problems(self) -> tuple[CertificateProblem, ...]:
        """What is wrong with its certificates."""

    def put_site(self, *, writer: str, generation: str, files: Mapping[str, str]) -> bool:
        """Replace the site; returns whether nginx was reloaded."""

    def renew(self, writer: str) -> float:
        """Take or renew the writer lease; returns for how many seconds."""

    def release(self, writer: str) -> None:
        """Give the writer lease up."""

    def close(self) -> None:
        """Close the connection."""


Connect = Callable[[Target], AdminClient]

PART_WEIGHT = 6_000
"""Peers in one push, more or less: some 600 kB of JSON and 50 ms of one worker's time."""
UPSTREAM_WEIGHT = 2
"""What an upstream costs by itself, in peers."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A site as nginx files.

    Attributes:
        files: name to text, complete.
        hosts: name of a file to the host, or `TCP port N`, that it is for. Only these can be
            quarantined: the others are the ground that all hosts stand on.
        settings: name of a file to the setting that it is made of.
    """

    files: Mapping[str, str]
    hosts: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)


class Renderer(Protocol):
    """How a site becomes files; pure."""

    def render(self, site: Site, build: Build) -> Rendered:
        """The files for that nginx. Raises RenderError."""

    def generation(self, files: Mapping[str, str]) -> str:
        """The generation that these files are."""


class Sink(Protocol):
    """Is told what the driver does; the agent's metrics."""

    def applied(self, kind: str, seconds: float) -> None:
        """A change ("membership", "site") was in force after `seconds`."""

    def push(self, instance: str, kind: str, result: str) -> None:
        """A push ("delta", "full", "site") ended."""

    def reload(self, instance: str, result: str, seconds: float) -> None:
        """A site push made nginx reload ("ok") or was refused by it ("refused"), after so long."""

    def forget_instance(self, instance: str) -> None:
        """An instance is gone for good."""

    def loop_error(self, loop: str) -> None:
        """A loop's guard caught an unexpected error."""


@dataclass(frozen=True, slots=True)
class Options:
    """Times of the driver, in seconds, and what is asked of instances.

    Attributes:
        http3: HTTP/3 is wanted; an instance that cannot do it is told of.
    """

    heartbeat: float = 3.0
    site_quiet: float = 0.5
    site_max_wait: float = 5.0
    http3: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """What every instance is to serve from now on."""

    membership: Membership
    site: Site


class InstanceState(StrEnum):
    """How an instance stands in the eyes of the fleet."""

    CONNECTING = "connecting"
    IN_SYNC = "in_sync"
    BEHIND = "behind"
    """It answers, and a push is on its way or due."""
    STANDBY = "standby"
    """Another agent holds the writer lease."""
    UNREACHABLE = "unreachable"
    UNAUTHORIZED = "unauthorized"
    REFUSED = "refused"
    """It refuses a push or the site; what it had before serves on."""
    FAILED = "failed"
    """It answers in a way that makes no sense."""


@dataclass(frozen=True, slots=True)
class InstanceView:
    """How one instance stands, for people, metrics and the status API.

    Attributes:
        id, name, url: see `Target`; `url` is the one in use.
        error: what is wrong, empty if nothing is.
        instance: id of the running OpenResty.
        writer: who holds its lease.
        last_seen: Unix time of its last answer, 0 for never.
        quarantined: hosts that its nginx refused.
    """

    id: str
    name: str
    url: str
    state: InstanceState
    error: str
    instance: str
    revision: int
    generation: str
    writer: str
    upstreams: int
    peers: int
    versions: Mapping[str, str]
    last_seen: float
    quarantined: tuple[str, ...]

    @property
    def in_sync(self) -> bool:
        """Whether it holds exactly what it shall."""
        return self.state is InstanceState.IN_SYNC


class Revisions:
    """The agent's one growing integer. A revision is only ever given to one content."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._content: Membership | None = None
        self._stamp = 0

    def stamp(self, content: Membership, *, above: int) -> int:
        """The revision of `content`, larger than `above`, which is what an instance holds.

        Instances that get the same object get the same revision, as long as it is above theirs.
        """
        with self._lock:
            self._last = max(self._last, above)
            if content is not self._content or self._stamp <= above:
                self._last += 1
                self._content, self._stamp = content, self._last
            return self._stamp


class Backoff:
    """Growing waits with jitter, so that many agents and instances do not come back in step."""

    def __init__(self, *, first: float, cap: float) -> None:
        self._first = first
        self._cap = max(first, cap)
        self._next = first

    def wait(self) -> float:
        """The next wait in seconds: between half and all of a span that doubles up to the cap."""
        span, self._next = self._next, min(self._next * 2, self._cap)
        return span * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret

    def reset(self) -> None:
        """Start small again: it worked."""
        self._next = self._first


def diff(before: Membership, after: Membership) -> tuple[dict[str, Upstream], tuple[str, ...]]:
    """What makes `after` of `before`: upstreams to upsert, and names to remove, sorted.

    An unchanged upstream is the same object in both, so that the cost follows the change.
    """
    if before is after:
        return {}, ()
    old, new = before.upstreams, after.upstreams
    upsert = {
        name: upstream
        for name, upstream in new.items()
        if (was := old.get(name)) is not upstream and was != upstream
    }
    return upsert, tuple(sorted(old.keys() - new.keys()))


def split(upsert: Mapping[str, Upstream]) -> list[dict[str, Upstream]]:
    """A change in parts, each small enough to be applied without keeping requests waiting."""
    parts: list[dict[str, Upstream]] = [{}]
    weight = 0
    for name, upstream in upsert.items():
        if weight >= PART_WEIGHT:
            parts.append({})
            weight = 0
        parts[-1][name] = upstream
        weight += UPSTREAM_WEIGHT + len(upstream.peers)
    return parts


def named(site: Site) -> Iterator[str]:
    """Upstreams that a site names."""
    yield from (location.upstream for location in site.default)
    for host in site.hosts:
        yield from (location.upstream for location in host.locations)
        if host.passthrough:
            yield host.passthrough
    yield from (route.upstream for route in site.tcp)


def survivors(upstream: Upstream, wanted: Membership) -> Upstream:
    """A retired upstream that the running site still names, with the peers that still live.

    Only peers that are wanted elsewhere stay, in the state that they have there: an address that
    nobody claims any more may belong to somebody else by now.
    """
    states = {peer.id: peer.state for other in wanted.upstreams.values() for peer in other.peers}
    peers = tuple(
        replace(peer, state=states[peer.id]) for peer in upstream.peers if peer.id in states
    )
    return (
        upstream
        if peers == upstream.peers
        else Upstream(name=upstream.name, peers=peers, policy=upstream.policy, hold=0.0)
    )
