"""What every source of workloads has in common: its contract, its status, its patience.

A source runs in a thread of its own, publishes complete snapshots and never gives up. Nothing here
knows where workloads come from, and nothing here counts or exports metrics: that is what the
`Observer` is for.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from agent.model import SourceSnapshot

Publish = Callable[[SourceSnapshot], None]

Mode = Literal["connecting", "watch", "poll", "events", "file"]
"""How a source hears of changes."""

STOP_CHECK = 0.25
"""Seconds after which a source that waits for news looks whether it shall stop."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """Where a source stands, for `status`, `/readyz` and people.

    Attributes:
        mode_reason: why it is in this mode, where a better one exists ("" otherwise).
        connected: it follows its source right now.
        last_success: Unix time up to which what it published is known to be true; 0 is never.
            Moves on while changes are followed and the last full list was good.
        last_change: Unix time of the last published snapshot; 0 is never.
        last_error: a sentence, empty once all is well again.
        events: changes heard of since the start.
    """

    name: str
    mode: Mode = "connecting"
    mode_reason: str = ""
    connected: bool = False
    last_success: float = 0.0
    last_change: float = 0.0
    last_error: str = ""
    engine_version: str = ""
    api_version: str = ""
    events: int = 0


class Observer(Protocol):
    """Is told what a source goes through; where metrics come from. Must return at once."""

    def event(self, source: str, kind: str) -> None:
        """A change was heard of; `kind` is from a small closed set ("task", "container", …)."""

    def sync(self, source: str, *, ok: bool, seconds: float) -> None:
        """A full list was read, or failed, after so many seconds."""

    def mode(self, source: str, mode: Mode) -> None:
        """The source hears of changes in this way from now on."""


class NullObserver:
    """Is told and tells nobody."""

    def event(self, source: str, kind: str) -> None:
        """Ignore it."""

    def sync(self, source: str, *, ok: bool, seconds: float) -> None:
        """Ignore it."""

    def mode(self, source: str, mode: Mode) -> None:
        """Ignore it."""


class Source(Protocol):
    """A source of workloads."""

    @property
    def name(self) -> str:
        """Name of the source, the same as in its snapshots: "swarm", "engine", "static".

        A source that has yet to learn what the engine is calls itself "auto" until then.
        """

    @property
    def status(self) -> SourceStatus:
        """Where it stands; may be asked from any thread."""

    def run(self, publish: Publish, stop: threading.Event) -> None:
        """Publish a snapshot at each change until `stop` is set; never gives up before.

        The first snapshot is published even if it is empty. `publish` is called from this thread
        only, and never with anything but a complete snapshot.
        """

    def read_once(self) -> SourceSnapshot:
        """Read everything once, for `plan`, `explain` and `check`.

        Raises:
            DiscoveryError: with what is wrong and, where there is one, the cure.
        """


class Backoff:
    """Growing waits with jitter, so that many agents do not come back in step."""

    def __init__(self, *, first: float = 0.1, cap: float = 3.0) -> None:
        self._first = first
        self._cap = cap
        self._next = first

    def wait(self) -> float:
        """The next wait in seconds: between half and all of a span that doubles up to the cap."""
        span, self._next = self._next, min(self._next * 2, self._cap)
        return span * random.uniform(0.5, 1.0)  # noqa: S311  (jitter, no secret)

    def reset(self) -> None:
        """Start small again: it worked."""
        self._next = self._first


class Reporter:
    """Keeps the status of one source, tells the observer, and logs each turn for the worse once.

    Written by the source's thread; `status` may be read from any.
    """

    def __init__(self, name: str, observer: Observer, logger: logging.Logger) -> None:
        self.name = name
        self._observer = observer
        self._log = logger
        self._status = SourceStatus(name)
        self._following = False
        self._events = 0

    @property
    def status(self) -> SourceStatus:
        """The status as of now."""
        status = replace(self._status, events=self._events)
        return replace(status, last_success=time.time()) if self._following else status

    def engine(self, *, version: str, api: str) -> None:
        """It is this engine that answers."""
        self._status = replace(self._status, engine_version=version, api_version=api)

    def mode(self, mode: Mode, reason: str = "") -> None:
        """Changes are heard of in this way from now on; `reason` says why not in a better one."""
        if (mode, reason) == (self._status.mode, self._status.mode_reason):
            return
        if mode != self._status.mode:
            self._observer.mode(self.name, mode)
        because = f": {reason}" if reason else ""
        self._log.info("source %s: hears of changes by %s%s", self.name, mode, because)
        self._status = replace(self._status, mode=mode, mode_reason=reason)

    def heard(self, kind: str) -> None:
        """A change of that kind was heard of."""
        self._events += 1
        self._observer.event(self.name, kind)

    def synced(self, seconds: float) -> None:
        """A full list was read in so many seconds."""
        self._observer.sync(self.name, ok=True, seconds=seconds)
        self.alive()

    def alive(self) -> None:
        """All that is known is true as of now."""
        if self._status.last_error:
            self._log.info("source %s: all well again", self.name)
        self._status = replace(
            self._status, connected=True, last_success=time.time(), last_error=""
        )

    def follow(self, *, following: bool) -> None:
        """While changes are followed, what was published stays true as time goes by."""
        if self._following and not following:
            self._status = replace(self._status, last_success=time.time())
        self._following = following

    def published(self) -> None:
        """A snapshot was published."""
        self._status = replace(self._status, last_change=time.time())

    def list_failed(self, error: Exception, seconds: float) -> None:
        """A full list failed: nothing that comes without one is known to be whole."""
        self._observer.sync(self.name, ok=False, seconds=seconds)
        self.failed(error)

    def fault(self, error: Exception) -> None:
        """A fault of ours was caught at the loop's guard: count it, log it whole once."""
        if repr(error) != self._status.last_error:
            self._log.error("source %s: unexpected", self.name, exc_info=error)
        self.heard("fault")
        self._fail(repr(error))

    def failed(self, error: Exception) -> None:
        """Something failed; what was published before stays in force."""
        self._fail(str(error))

    def _fail(self, sentence: str) -> None:
        self.follow(following=False)
        if sentence != self._status.last_error:
            self._log.warning("source %s: %s", self.name, sentence)
        self._status = replace(self._status, connected=False, last_error=sentence)
