"""One name: who of those that claim it gets which context root, and which TLS the name has.

What comes out depends on the claims to that name, on what lingers of it and on what it was. Must
not look at peers, nor at other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from agent.compile.claims import Claim, ClaimId, Options
from agent.compile.conflicts import (
    OPTION_LABELS,
    conflict,
    policy_difference,
    redirect_conflict,
    tls_conflict,
)
from agent.compile.names import DEFAULT, is_tcp
from agent.model import Canary, Policy, Rejection, Tls, WorkloadKind


@dataclass(frozen=True, slots=True)
class Branch:
    """The canary of a slot: whose peers it has, how it treats them, and what goes there."""

    winners: tuple[ClaimId, ...]
    policy: Policy
    canary: Canary


@dataclass(frozen=True, slots=True)
class Slot:
    """One context root of a name, as settled.

    Attributes:
        winners: whose peers serve it, oldest first; empty where it only lingers.
        says_tls: whether those who hold it say something about TLS.
        hsts: what the oldest that says anything says of HSTS.
    """

    root: str
    winners: tuple[ClaimId, ...]
    options: Options
    says_tls: bool
    hsts: str | None
    websocket_endpoints: tuple[str, ...]
    branch: Branch | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A name as settled: slots sorted by context root, and what the whole name has.

    Attributes:
        passthrough: its TLS connections go to the upstream of "/" unopened.
        redirect: where all its requests are sent instead; empty for nowhere.
    """

    slots: tuple[Slot, ...]
    tls: Tls | None
    passthrough: bool = False
    redirect: str = ""

    @property
    def served(self) -> tuple[tuple[Slot, ...], Tls | None, bool]:
        """What a host and its aliases have in common."""
        return self.slots, self.tls, self.passthrough


class Settled(NamedTuple):
    """What became of a name, and which of its claims were refused."""

    table: Table
    rejections: tuple[Rejection, ...]


def settle(
    name: str,
    claims: list[Claim],
    *,
    lingering: Iterable[Slot] = (),
    before: Table | None = None,
    hsts: str = "",
) -> Settled:
    """What becomes of a name.

    Args:
        claims: oldest first.
        lingering: slots that nobody claims and that stay; none of them has the root of a claim.
        before: what the name was; where nobody claims it, it stays like that.
        hsts: value of the header for names that are redirected to TLS and say nothing of it.
    """
    settling = _Settling(name, claims)
    slots = sorted((*settling.slots(), *lingering), key=lambda slot: slot.root)
    tls, passthrough = _tls(name, slots, settling.decider)
    # A lingering slot may have lost the TLS that it was made for.
    settled = tuple(
        replace(slot, options=slot.options._replace(tls_only=False))
        if slot.options.tls_only and tls is None and not passthrough
        else slot
        for slot in slots
    )
    if tls is not None:
        tls = replace(tls, hsts=_hsts(settled, settling.decider, hsts))
    redirect = settling.redirect
    if not claims and before is not None:
        redirect = before.redirect
    return Settled(Table(settled, tls, passthrough, redirect), tuple(settling.rejections))


class _Settling:
    """Gives each context root of a name to the oldest claim and to those that agree with it.

    TLS belongs to the whole name: the oldest claim that says anything about it decides, who says
    nothing takes it as it is, and who says something else is refused. Canaries come after all
    others: one without anything to be the canary of serves as if it were none.
    """

    def __init__(self, name: str, claims: list[Claim]) -> None:
        """Settle.

        Args:
            claims: oldest first.
        """
        self.name = name
        self.rejections: list[Rejection] = []
        self.decider: Claim | None = None
        self._holders: dict[str, list[Claim]] = {}
        self._canaries: dict[str, list[Claim]] = {}
        for claim in claims:
            if claim.canary(name) is None:
                self._admit(claim)
        mains = frozenset(self._holders)
        for claim in claims:
            if claim.canary(name) is not None:
                self._admit(claim, canary=claim.root(name) in mains)
        self.redirect = self._settle_redirect(claims)

    def slots(self) -> list[Slot]:
        """The slots that are claimed."""
        return [self._slot(root, winners) for root, winners in self._holders.items()]

    def _admit(self, claim: Claim, *, canary: bool = False) -> None:
        refused = self._contested(claim, canary=canary) or self._contested_tls(claim)
        if refused is not None:
            self.rejections.append(refused)
            return
        if self.decider is None and claim.says_tls(self.name):
            self.decider = claim
        admitted = self._canaries if canary else self._holders
        admitted.setdefault(claim.root(self.name), []).append(claim)

    def _contested(self, claim: Claim, *, canary: bool) -> Rejection | None:
        """That those who have the context root want it otherwise, or its canary."""
        root = claim.root(self.name)
        holders, canaries = self._holders.get(root), self._canaries.get(root)
        if not holders:
            return None
        differ = self._differences(claim, holders[0], policy=not canary)
        if differ:
            return conflict(self.name, claim, holders[0], differ)
        if not canary or not canaries:
            return None
        differ = self._canary_differences(claim, canaries[0])
        return conflict(self.name, claim, canaries[0], differ) if differ else None

    def _contested_tls(self, claim: Claim) -> Rejection | None:
        """That who decides on the TLS of the name wants other TLS."""
        if self.decider is None or not claim.says_tls(self.name):
            return None
        mine, theirs = claim.options(self.name), self.decider.options(self.name)
        if (mine.tls, mine.passthrough) == (theirs.tls, theirs.passthrough):
            return None
        return tls_conflict(self.name, claim, self.decider)

    def _differences(self, claim: Claim, holder: Claim, *, policy: bool) -> list[str]:
        mine, theirs = claim.options(self.name), holder.options(self.name)
        differ = [
            told_as(claim.declaration)
            for field, told_as in OPTION_LABELS.items()
            if getattr(mine, field) != getattr(theirs, field)
        ]
        if policy and mine.policy != theirs.policy:
            differ.append(policy_difference(claim, holder))
        if self.name == DEFAULT and claim.declaration.host != holder.declaration.host:
            differ.append("the host")
        if is_tcp(self.name) and not _same_set(claim, holder):
            differ.append("the service")
        return differ

    def _canary_differences(self, claim: Claim, holder: Claim) -> list[str]:
        differ = []
        if claim.canary(self.name) != holder.canary(self.name):
            differ.append(claim.declaration.label("canary.*"))
        if claim.declaration.policy != holder.declaration.policy:
            differ.append(policy_difference(claim, holder))
        return differ

    def _settle_redirect(self, claims: list[Claim]) -> str:
        """The oldest claim decides where the requests of a name are sent."""
        target = ""
        for number, claim in enumerate(claims):
            redirects = {item.host: item.target for item in claim.declaration.redirects}
            mine = redirects.get(self.name, "")
            if number == 0:
                target = mine
            elif mine and mine != target:
                self.rejections.append(redirect_conflict(self.name, claim, claims[0], mine))
        return target

    def _slot(self, root: str, winners: list[Claim]) -> Slot:
        oldest, canaries = winners[0], self._canaries.get(root)
        branch = None
        if canaries:
            canary = canaries[0].canary(self.name)
            assert canary is not None
            branch = Branch(
                winners=tuple(claim.id for claim in canaries),
                policy=canaries[0].declaration.policy,
                canary=canary,
            )
        said = (claim.hsts for claim in winners if claim.hsts is not None)
        return Slot(
            root=root,
            winners=tuple(claim.id for claim in winners),
            options=oldest.options(self.name),
            says_tls=any(claim.says_tls(self.name) for claim in winners),
            hsts=next(said, None),
            websocket_endpoints=tuple(
                sorted(
                    {path for claim in winners for path in claim.declaration.websocket_endpoints}
                )
            ),
            branch=branch,
        )


def _same_set(claim: Claim, holder: Claim) -> bool:
    """Whether two claims to one port are of containers that were made alike, to be one service."""
    containers = claim.kind is holder.kind is WorkloadKind.CONTAINER
    return containers and claim.declaration == holder.declaration


def _tls(name: str, slots: Sequence[Slot], decider: Claim | None) -> tuple[Tls | None, bool]:
    """The TLS of a name, without HSTS, and whether it goes to the peers unopened."""
    if decider is not None:
        options = decider.options(name)
        return options.tls, options.passthrough
    # Where nobody says anything there may still be a certificate that serves every host.
    with_tls = [slot for slot in slots if slot.options.tls]
    telling = [slot for slot in slots if slot.says_tls] or with_tls
    if not telling:
        return None, False
    return telling[0].options.tls, telling[0].options.passthrough


def _hsts(slots: Sequence[Slot], decider: Claim | None, usual: str) -> str:
    """What a name with TLS says of HSTS: who decides on its TLS first, then slot by slot."""
    if decider is not None and decider.hsts is not None:
        return decider.hsts
    said = next((slot.hsts for slot in slots if slot.hsts is not None), None)
    if said is not None:
        return said
    return usual if any(slot.options.tls_only for slot in slots) else ""
