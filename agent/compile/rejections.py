"""Rejections: how one of a workload is made, and the book of all that are in force.

Each rejection belongs to what it came from (a source, a workload, a name, an upstream), so that
doing that one thing again takes back what it said before and nothing else. Must not know why
anything is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.labels import Reason, subject_of
from agent.model import Rejection, Workload


def reject(workload: Workload, reason: Reason, message: str, hint: str) -> Rejection:
    """Why something that the labels of a workload ask for is not served.

    Args:
        message: what is wrong, one sentence.
        hint: what its owner can do about it.
    """
    return Rejection(
        subject=subject_of(workload),
        reason=reason.value,
        message=message,
        hint=hint,
        source=workload.key.source,
    )


def listed(names: Iterable[str]) -> str:
    """Names within a sentence: sorted, with commas between."""
    return ", ".join(sorted(names)) or "none"


class Ledger:
    """All rejections in force, by what they came from."""

    def __init__(self) -> None:
        self._noted: dict[tuple[str, ...], tuple[Rejection, ...]] = {}
        self._all: tuple[Rejection, ...] = ()
        self._changed = False

    def note(self, key: tuple[str, ...], rejections: tuple[Rejection, ...]) -> None:
        """Put these in the place of what was said of `key` before.

        Args:
            key: what they came from; its first part says what kind of thing that is.
        """
        if self._noted.get(key, ()) == rejections:
            return
        self._changed = True
        if rejections:
            self._noted[key] = rejections
        else:
            self._noted.pop(key, None)

    def rejections(self) -> tuple[Rejection, ...]:
        """All of them, sorted, each once; the same object for as long as they are equal."""
        if self._changed:
            found = {rejection for noted in self._noted.values() for rejection in noted}
            rejections = tuple(sorted(found, key=_rank))
            if rejections != self._all:
                self._all = rejections
            self._changed = False
        return self._all


def _rank(rejection: Rejection) -> tuple[str, str, str, str, str]:
    return (
        rejection.subject,
        rejection.reason,
        rejection.message,
        rejection.hint,
        rejection.source,
    )
