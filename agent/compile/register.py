"""The register of all names: each as it is settled, what lingers of it, and whose alias it is.

This is what is remembered over time. A host that nobody claims any more keeps its place for
`Settings.host_linger` seconds, so that a stack that is deployed anew costs no reload; an alias is
folded into the file of its host for as long as both serve the same. Must not look at peers, nor
build what is served: that is `site`'s and `membership`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

from agent.compile.claims import Claim, ClaimId
from agent.compile.names import is_host
from agent.compile.rejections import Ledger
from agent.compile.settle import Slot, Table, settle
from agent.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Name:
    """What is known of a name.

    Attributes:
        candidate: the host that it may be an alias of; None where it is nobody's.
    """

    table: Table
    candidate: str | None


class Register:
    """Knows every name that is claimed, or was until lately.

    Args:
        ledger: where to note which claims are refused.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._names: dict[str, Name] = {}
        self._candidates: dict[str, set[str]] = {}
        self._lingering: dict[tuple[str, str], float] = {}
        self._mirrors: dict[str, set[str]] = {}

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self._names)

    @property
    def next_expiry(self) -> float | None:
        """When (on the clock) something that lingers is to go; None where nothing does."""
        return min(self._lingering.values(), default=None)

    def expired(self, now: float) -> Iterator[str]:
        """The names of which something has lingered long enough."""
        return (name for (name, _), deadline in self._lingering.items() if deadline <= now)

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The context roots of a name, sorted; none of one that is not known."""
        known = self._names.get(name)
        return known.table.slots if known is not None else ()

    def own_table(self, name: str) -> Table | None:
        """The table of a name that is served by itself; None where it is folded or not known."""
        known = self._names.get(name)
        return known.table if known is not None and self.folded_into(name) is None else None

    def aliases(self, host: str) -> tuple[str, ...]:
        """The names that are folded into a host, sorted."""
        candidates = self._candidates.get(host, ())
        return tuple(sorted(name for name in candidates if self.folded_into(name) == host))

    def folded_into(self, name: str) -> str | None:
        """The host whose file serves `name` as an alias, None where it has a file of its own."""
        known = self._names.get(name)
        if known is None or known.candidate is None:
            return None
        host = self._names.get(known.candidate)
        if host is None or host.candidate is not None or host.table.served != known.table.served:
            return None
        return known.candidate

    def redirect(self, name: str) -> str:
        """Where all requests of a name are sent; empty for nowhere."""
        return self._names[name].table.redirect

    def mirrored_by(self, names: Iterable[str]) -> set[str]:
        """The names some of whose requests are mirrored to `names`."""
        return {mirroring for name in names for mirroring in self._mirrors.get(name, ())}

    def settle(
        self,
        dirty: Set[str],
        claims: Mapping[str, Mapping[ClaimId, Claim]],
        settings: Settings,
        *,
        now: float,
    ) -> set[str]:
        """Settle names anew.

        Args:
            claims: the claims to each name.
            now: seconds on the clock by which things linger.

        Returns:
            All names whose host or upstreams may be others now: also those that are folded, or
            could be, into a name that changed.
        """
        touched = set(dirty)
        for name in dirty:
            touched |= self._candidates.get(name, set())
        for name in sorted(touched):
            before = self._names.get(name)
            self._settle_name(name, claims, settings, now)
            for known in (before, self._names.get(name)):
                if known is not None and known.candidate is not None:
                    touched.add(known.candidate)
        return touched

    def _settle_name(
        self,
        name: str,
        claims: Mapping[str, Mapping[ClaimId, Claim]],
        settings: Settings,
        now: float,
    ) -> None:
        before = self._names.get(name)
        table = before.table if before is not None else None
        contenders = sorted(claims.get(name, {}).values(), key=lambda claim: claim.order)
        kept = {claim.root(name) for claim in contenders}
        # An alias taken off a host that is still there was taken off on purpose. To go at once is
        # one reload, to linger would be two, and either way it answers 503.
        dropped = before is not None and before.candidate in claims
        hsts = settings.extension.hsts
        settled = settle(
            name,
            contenders,
            lingering=self._linger(
                name, kept, deadline=_deadline(now, settings.host_linger), now=now, dropped=dropped
            ),
            before=table,
            hsts="" if hsts == "off" else hsts,
        )
        self._ledger.note(("name", name), settled.rejections)
        self._index_mirrors(name, table, settled.table)
        after = None
        if settled.table.slots:
            after = Name(settled.table, _candidate(name, settled.table, contenders, before))
        self._enter(name, before, after)

    def _linger(
        self, name: str, kept: Set[str], *, deadline: float, now: float, dropped: bool
    ) -> list[Slot]:
        """The slots of `name` that lost their last claim and stay for some time.

        Args:
            kept: context roots that are claimed.
            deadline: when what loses its last claim now is to go.
            dropped: nothing of it is to stay.
        """
        slots: list[Slot] = []
        for slot in self.slots(name):
            key = (name, slot.root)
            if slot.root in kept:
                self._lingering.pop(key, None)
                continue
            until = self._lingering.setdefault(key, deadline)
            if until <= now or dropped:
                del self._lingering[key]
                continue
            slots.append(replace(slot, winners=(), branch=None))
        return slots

    def _index_mirrors(self, name: str, before: Table | None, after: Table) -> None:
        """Remember which hosts are mirrored by `name`, whose file depends on them."""
        for target in _mirrored(before) if before is not None else ():
            mirroring = self._mirrors.get(target, set())
            mirroring.discard(name)
            if not mirroring:
                self._mirrors.pop(target, None)
        for target in _mirrored(after):
            self._mirrors.setdefault(target, set()).add(name)

    def _enter(self, name: str, before: Name | None, after: Name | None) -> None:
        """Put `after` in the place of `before`, also in the index of candidates."""
        if after is not None:
            self._names[name] = after
        else:
            self._names.pop(name, None)
        old = before.candidate if before is not None else None
        new = after.candidate if after is not None else None
        if old == new:
            return
        if old is not None:
            self._candidates[old].discard(name)
            if not self._candidates[old]:
                del self._candidates[old]
        if new is not None:
            self._candidates.setdefault(new, set()).add(name)


def _deadline(now: float, linger: float) -> float:
    """When what loses its last claim now is to go: after one to two times `linger` seconds.

    All that is lost within one such time goes together, so that many short-lived hosts cost one
    reload in all and not one each.
    """
    return math.ceil((now + linger) / linger) * linger if linger else now


def _mirrored(table: Table) -> Iterator[str]:
    return (slot.options.mirror[0] for slot in table.slots if slot.options.mirror is not None)


def _candidate(
    name: str, table: Table, contenders: Iterable[Claim], before: Name | None
) -> str | None:
    """The host that `name` is an alias of, if whoever serves it has it as an alias only."""
    if not is_host(name):
        return None
    winning = {winner for slot in table.slots for winner in slot.winners}
    winners = [claim for claim in contenders if claim.id in winning]
    if not winners:
        return before.candidate if before is not None else None
    if any(claim.declaration.host == name for claim in winners):
        return None
    return winners[0].declaration.host
