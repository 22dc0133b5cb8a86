"""The driver: takes a snapshot through all steps, and remembers what the next one can use again.

The order of the steps is known here and nowhere else. Must not decide anything itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.compile.intake import Dirty, Intake
from agent.compile.membership import MembershipBuilder
from agent.compile.register import Register
from agent.compile.rejections import Ledger
from agent.compile.site import SiteBuilder
from agent.config.settings import Settings
from agent.model import Desired, Snapshot


class Compiler:
    """Compiles one snapshot after the other; what did not change costs nothing and stays the same.

    Not for use by several threads at once.

    Args:
        clock: seconds that never go back; tells when what lingers is to go.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._settings: Settings | None = None
        self._dirty = Dirty()
        self._ledger = Ledger()
        self._intake = Intake(self._dirty, self._ledger)
        self._register = Register(self._ledger)
        self._site = SiteBuilder(self._register, self._intake.routes, self._ledger)
        self._membership = MembershipBuilder(self._register, self._intake.routes, self._ledger)
        self._desired = self._assembled()

    @property
    def next_expiry(self) -> float | None:
        """When (on the clock) something that lingers is to go, so that compile is to run again."""
        return self._register.next_expiry

    def compile(self, snapshot: Snapshot, settings: Settings) -> Desired:
        """What shall be served, from this snapshot and these settings.

        Never raises on what workloads say. Equal results are the same objects as last time: the
        `Desired`, its parts, each `Host` and each `Upstream`.
        """
        now = self._clock()
        afresh = self._settings is not settings and self._settings != settings
        if afresh:
            self._dirty.names.update(self._register)
        self._intake.take_in(snapshot, settings, afresh=afresh)
        self._settings = settings
        self._dirty.names.update(self._register.expired(now))
        touched = self._register.settle(self._dirty.names, self._intake.claims, settings, now=now)
        self._site.update(touched)
        self._membership.update(touched, self._dirty.peers)
        self._dirty.clear()
        return self._publish()

    def _publish(self) -> Desired:
        old, new = self._desired, self._assembled()
        if (
            new.site is not old.site
            or new.membership is not old.membership
            or new.rejections is not old.rejections
        ):
            self._desired = new
        return self._desired

    def _assembled(self) -> Desired:
        return Desired(
            membership=self._membership.membership(),
            site=self._site.site(),
            rejections=self._ledger.rejections(),
        )


def compile_snapshot(snapshot: Snapshot, settings: Settings) -> Desired:
    """Compile one snapshot by itself, with nothing remembered, so that nothing lingers."""
    return Compiler(clock=lambda: 0.0).compile(snapshot, settings)
