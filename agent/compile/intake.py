"""What was said: the routes and claims of all workloads, kept up with one snapshot after the other.

A workload that is the same object as last time is not looked at, so a snapshot costs what changed
in it. Notes which names and whose peers are to be done again. Must do neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from agent.compile.claims import Claim, ClaimId
from agent.compile.rejections import Ledger
from agent.compile.workloads import Examined, Route, examine, proxy_containers
from agent.config.settings import Settings
from agent.labels import NOTHING
from agent.model import Snapshot, SourceSnapshot, Workload, WorkloadKey


@dataclass(slots=True)
class Dirty:
    """What is to be done again; it stays so until all of it is done.

    Attributes:
        names: names to settle, since claims to them changed.
        peers: claims whose upstreams have other peers.
    """

    names: set[str] = field(default_factory=set)
    peers: set[ClaimId] = field(default_factory=set)

    def clear(self) -> None:
        """All of it is done."""
        self.names.clear()
        self.peers.clear()


@dataclass(slots=True)
class _Source:
    """What is remembered of a source."""

    proxy_networks: tuple[str, ...] | None
    proxies: tuple[str, ...] = ()
    workloads: Mapping[WorkloadKey, Workload] = field(default_factory=dict)
    examined: dict[WorkloadKey, Examined] = field(default_factory=dict)


class Intake:
    """Takes in snapshots.

    Attributes:
        routes: every route that can be served.
        claims: the claims to each name.

    Args:
        dirty: where to note what is to be done again.
        ledger: where to note what is refused.
    """

    def __init__(self, dirty: Dirty, ledger: Ledger) -> None:
        self.routes: dict[ClaimId, Route] = {}
        self.claims: dict[str, dict[ClaimId, Claim]] = {}
        self._dirty = dirty
        self._ledger = ledger
        self._sources: dict[str, _Source] = {}

    def take_in(self, snapshot: Snapshot, settings: Settings, *, afresh: bool) -> None:
        """Take in a snapshot.

        Args:
            afresh: look at every workload, since the settings are others.
        """
        for name in self._sources.keys() - snapshot.sources.keys():
            for key in list(self._sources[name].examined):
                self._forget(name, key)
            self._ledger.note(("source", name), ())
            del self._sources[name]
        for name in sorted(snapshot.sources):
            self._take_in_source(name, snapshot.sources[name], settings, afresh=afresh)

    def _take_in_source(
        self, name: str, seen: SourceSnapshot, settings: Settings, *, afresh: bool
    ) -> None:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source(seen.proxy_networks)
        proxies = proxy_containers(seen)
        afresh = afresh or source.proxy_networks != seen.proxy_networks or source.proxies != proxies
        self._ledger.note(("source", name), seen.rejections)
        if source.workloads is seen.workloads and not afresh:
            return
        examined = source.examined
        changed, gone = _differences(source.workloads, seen.workloads)
        for key in gone:
            self._forget(name, key)
        for key in seen.workloads if afresh else changed:
            before = examined.get(key)
            after = examine(
                seen.workloads[key], seen.proxy_networks, settings, before=before, proxies=proxies
            )
            examined[key] = after
            self._compare(before, after)
        source.workloads = seen.workloads
        source.proxy_networks = seen.proxy_networks
        source.proxies = proxies

    def _forget(self, source: str, key: WorkloadKey) -> None:
        before = self._sources[source].examined.pop(key)
        self._compare(before, replace(before, reading=NOTHING, routes=(), rejections=()))

    def _compare(self, before: Examined | None, after: Examined) -> None:
        """Note what is to be done again because of one workload."""
        old = {route.claim.id: route for route in before.routes} if before is not None else {}
        for route in after.routes:
            known = old.pop(route.claim.id, None)
            self.routes[route.claim.id] = route
            if known is not None and known.claim is route.claim:
                if known.peers is not route.peers or known.hold != route.hold:
                    self._dirty.peers.add(route.claim.id)
                continue
            if known is not None:
                self._withdraw(known.claim)
            for name in route.claim.names:
                self.claims.setdefault(name, {})[route.claim.id] = route.claim
                self._dirty.names.add(name)
            self._dirty.peers.add(route.claim.id)
        for gone in old.values():
            self._withdraw(gone.claim)
            del self.routes[gone.claim.id]
        self._ledger.note(("workload", *after.workload.key), after.rejections)

    def _withdraw(self, claim: Claim) -> None:
        for name in claim.names:
            claims = self.claims[name]
            del claims[claim.id]
            if not claims:
                del self.claims[name]
            self._dirty.names.add(name)


def _differences(
    before: Mapping[WorkloadKey, Workload], after: Mapping[WorkloadKey, Workload]
) -> tuple[list[WorkloadKey], list[WorkloadKey]]:
    """Keys whose workload is new or another object, and keys that are gone.

    A changed snapshot mostly has the keys of the last one in the same order; walking both side by
    side then needs no look-up at all, which matters with many thousands of workloads.
    """
    changed: list[WorkloadKey] = []
    if len(before) == len(after):
        for (key, workload), (old_key, old) in zip(after.items(), before.items(), strict=True):
            if workload is old:
                continue
            if key != old_key:
                break
            changed.append(key)
        else:
            return changed, []
    changed = [key for key, workload in after.items() if before.get(key) is not workload]
    return changed, [key for key in before if key not in after]
