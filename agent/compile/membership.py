"""The membership: every upstream with its peers, made of settled names and the routes behind them.

An upstream is called by what it serves, name and context root, so that a second service that joins
the same route is no change of the site. Only upstreams whose name or peers changed are made again.
Must not decide who serves what: that is settled.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from agent.compile.claims import ClaimId
from agent.compile.names import subject_of_upstream
from agent.compile.peers import merge_peers
from agent.compile.register import Register
from agent.compile.rejections import Ledger
from agent.compile.settle import Slot
from agent.compile.workloads import Route
from agent.labels import Reason
from agent.labels.forms import CANARY
from agent.model import Membership, Peer, Policy, Rejection, Upstream

MAX_PEERS = 10_000
"""Peers that the admin API takes in one upstream."""


class MembershipBuilder:
    """Builds the membership.

    Args:
        register: the names as they are settled.
        routes: every route that can be served, with its peers.
        ledger: where to note what cannot be served whole.
    """

    def __init__(self, register: Register, routes: Mapping[ClaimId, Route], ledger: Ledger) -> None:
        self._register = register
        self._routes = routes
        self._ledger = ledger
        self._served: dict[str, tuple[str, ...]] = {}
        self._membership = Membership({})

    def update(self, touched: Set[str], peers: Set[ClaimId]) -> None:
        """Build again what depends on these names, and the upstreams of these claims."""
        changes: dict[str, Upstream | None] = {}
        for name in touched:
            self._change_name(name, changes)
        for claim_id in peers:
            route = self._routes.get(claim_id)
            if route is None:
                continue
            for name in route.claim.names:
                root = route.claim.root(name)
                if name not in touched and name + root in self._served.get(name, ()):
                    slot = next(s for s in self._register.slots(name) if s.root == root)
                    self._change_slot(name, slot, changes)
        if changes:
            self._membership = Membership(_changed(self._membership.upstreams, changes))

    def membership(self) -> Membership:
        """All of it; the same object for as long as nothing changed."""
        return self._membership

    def _change_name(self, name: str, changes: dict[str, Upstream | None]) -> None:
        own = self._register.own_table(name)
        slots = own.slots if own is not None else ()
        served = [name + slot.root for slot in slots]
        served += [name + slot.root + CANARY for slot in slots if slot.branch is not None]
        for key in self._served.get(name, ()):
            if key not in served:
                changes[key] = None
                self._ledger.note(("peers", key), ())
        for slot in slots:
            self._change_slot(name, slot, changes)
        if served:
            self._served[name] = tuple(served)
        else:
            self._served.pop(name, None)

    def _change_slot(self, name: str, slot: Slot, changes: dict[str, Upstream | None]) -> None:
        key, policy, branch = name + slot.root, slot.options.policy, slot.branch
        if branch is not None:
            canary = replace(branch.canary, upstream=key + CANARY)
            policy = replace(policy, canary=canary)
            self._change_upstream(canary.upstream, branch.winners, branch.policy, changes)
        self._change_upstream(key, slot.winners, policy, changes)

    def _change_upstream(
        self,
        key: str,
        winners: tuple[ClaimId, ...],
        policy: Policy,
        changes: dict[str, Upstream | None],
    ) -> None:
        routes = [self._routes[winner] for winner in winners]
        peers = merge_peers([route.peers for route in routes])
        self._ledger.note(("peers", key), _surplus(key, peers))
        new = Upstream(
            name=key,
            peers=peers[:MAX_PEERS],
            policy=policy,
            hold=max((route.hold for route in routes), default=0.0),
        )
        if new != self._membership.upstreams.get(key):
            changes[key] = new


def _changed(
    before: Mapping[str, Upstream], changes: Mapping[str, Upstream | None]
) -> dict[str, Upstream]:
    """The upstreams with these changes, sorted; to sort is only needed where one is new."""
    upstreams = dict(before)
    new = False
    for key, upstream in changes.items():
        if upstream is None:
            del upstreams[key]
        else:
            new = new or key not in upstreams
            upstreams[key] = upstream
    return dict(sorted(upstreams.items())) if new else upstreams


def _surplus(upstream: str, peers: tuple[Peer, ...]) -> tuple[Rejection, ...]:
    if len(peers) <= MAX_PEERS:
        return ()
    return (
        Rejection(
            subject=subject_of_upstream(upstream),
            reason=Reason.TOO_MANY_PEERS.value,
            message=f"{upstream} has {len(peers)} peers; only the first {MAX_PEERS} serve.",
            hint="Split the service over several hosts or context roots.",
        ),
    )
