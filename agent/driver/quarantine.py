"""Hosts whose file an instance's nginx refused: kept apart, so that all others go live.

A host in quarantine runs with its last accepted text, or not at all. It is tried again when its
text changes, when the instance or the settings do, and from time to time, for what was missing (a
certificate) may have come. Not thread-safe but for `hosts`, `rejections`, `due`: the rollout's
thread writes, and replaces whole values. Must not talk to anybody.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from agent.driver.parts import Rendered
from agent.model import Rejection

FIRST_RETRY = 30.0
LAST_RETRY = 600.0
"""Seconds between tries of a refused host: a try costs one `nginx -t`, never a reload."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A refused text of a host, with nginx's message."""

    host: str
    text: str
    message: str
    retry_at: float
    delay: float


class Quarantine:
    """The refused hosts of one instance."""

    def __init__(self) -> None:
        self._accepted: Mapping[str, str] = {}
        self._refused: Mapping[str, _Refusal] = {}
        self._knows_accepted = False

    @property
    def hosts(self) -> tuple[str, ...]:
        """The refused hosts."""
        return tuple(sorted(item.host for item in self._refused.values()))

    @property
    def knows_accepted(self) -> bool:
        """Whether it is known what nginx accepted last; after a start of the agent it is not."""
        return self._knows_accepted

    def select(self, rendered: Rendered) -> dict[str, str]:
        """The files to push: refused ones give way to what was accepted before, or to nothing."""
        now = time.monotonic()
        files = dict(rendered.files)
        for name, item in self._refused.items():
            if files.get(name) == item.text and now < item.retry_at:
                del files[name]
                if name in self._accepted:
                    files[name] = self._accepted[name]
        return files

    def refuse(self, name: str, pushed: str, rendered: Rendered, message: str) -> None:
        """nginx refused file `name`, whose text was `pushed`."""
        wanted = rendered.files[name]
        before = self._refused.get(name)
        if pushed != wanted or self._accepted.get(name) == pushed:
            # Not even the former text works any more.
            self._accepted = {key: text for key, text in self._accepted.items() if key != name}
        again = before is not None and before.text == wanted
        delay = min(before.delay * 2, LAST_RETRY) if before and again else FIRST_RETRY
        self._refused = {
            **self._refused,
            name: _Refusal(
                host=rendered.hosts[name],
                text=wanted,
                message=message,
                retry_at=time.monotonic() + delay,
                delay=delay,
            ),
        }

    def knows(self, name: str, rendered: Rendered) -> bool:
        """Whether this very text of file `name` has been refused before."""
        item = self._refused.get(name)
        return item is not None and item.text == rendered.files[name]

    def accepted(self, files: Mapping[str, str], rendered: Rendered) -> None:
        """nginx runs these files."""
        self._knows_accepted = True
        self._accepted = {name: text for name, text in files.items() if name in rendered.hosts}
        self._refused = {
            name: item
            for name, item in self._refused.items()
            if rendered.files.get(name) == item.text and files.get(name) != item.text
        }

    def retry_all(self) -> None:
        """Try every refused host again at the next push: the circumstances have changed."""
        self._refused = {
            name: _Refusal(item.host, item.text, item.message, 0.0, FIRST_RETRY / 2)
            for name, item in self._refused.items()
        }

    def due_at(self) -> float | None:
        """When the next refused host is to be tried again (monotonic), None if there is none."""
        return min((item.retry_at for item in self._refused.values()), default=None)

    def due(self, now: float) -> bool:
        """Whether a refused host is to be tried again."""
        at = self.due_at()
        return at is not None and now >= at

    def rejections(self, instance: str) -> tuple[Rejection, ...]:
        """A rejection for each refused host."""
        return tuple(
            Rejection(
                # A host's name has no blank in it; `TCP port N` says by itself what it is.
                subject=item.host if " " in item.host else f"host {item.host}",
                reason="host_quarantined",
                message=f"nginx of {instance} refused its configuration: {item.message}",
                hint="Its last accepted configuration serves on, if it had one. Mend what nginx "
                "names (a certificate file that is missing, a template); it is tried again when "
                "its labels change, and by itself within ten minutes.",
            )
            for item in self._refused.values()
        )
