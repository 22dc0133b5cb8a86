"""Settings that follow their store: a valid change takes effect by itself, a bad one never does.

One thread reads the store, compares, and hands on what is new and can be used. The store may be
away for as long as it likes: what is in force stays in force. This module must not know what
settings mean nor what a store speaks.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from agent.config.stores import Choice, Content, Loaded, parsed
from agent.errors import SettingsError, StoreUnavailable

log = logging.getLogger(__name__)

FIRST_WAIT = 0.2
LONGEST_WAIT = 15.0
"""Seconds between tries to reach a store that is away: growing, and never more than this."""

PATIENCE = 20.0
"""Seconds after which a store that told of no change is read again all the same: a connection can
be dead without anybody noticing."""

SHORT = 1.0
"""Seconds; a watch that ends sooner, again and again, with nothing new is slowed down."""


class Observer(Protocol):
    """Who is told how it goes; `agent.metrics.Metrics` is one."""

    def settings_reload(self, result: str) -> None:
        """Count a change of the settings: ok or refused."""

    def settings_store(self, *, connected: bool) -> None:
        """Note whether the store answers."""

    def loop_error(self, loop: str) -> None:
        """Count an unexpected error that a loop's guard caught."""


class Follower:
    """Follows a store and applies what comes out of it.

    Args:
        choice: the store.
        apply: takes settings into force; raises SettingsError when they cannot be.
        observer: is told of results.
        in_force: the text that is in force already, None when nothing is.
        patience: seconds, see PATIENCE.
    """

    def __init__(
        self,
        choice: Choice,
        *,
        apply: Callable[[Loaded], None],
        observer: Observer,
        in_force: str | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._choice = choice
        self._store = choice.store
        self._apply = apply
        self._observer = observer
        self._patience = patience
        self._lock = threading.Lock()
        self._good = in_force
        self._bad: str | None = None
        self._away = "" if in_force is not None else f"{self._store.where} has not answered yet"
        self._refusal = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="settings", daemon=True)

    @property
    def problem(self) -> str:
        """Why what the store has is not in force or may be outdated; empty if all is well."""
        reason = self._away or self._refusal
        return f"{reason}; {self._effect}" if reason else ""

    @property
    def _effect(self) -> str:
        return "waiting for it" if self._good is None else "the settings in force stay"

    def start(self) -> None:
        """Start following."""
        self._observer.settings_store(connected=self._good is not None)
        self._thread.start()

    def stop(self, timeout: float = 0.5) -> None:
        """Stop following. A call under way that cannot be cut short ends with the process."""
        self._stop.set()
        self._store.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def reread(self) -> None:
        """Read the store now and apply what it has, whether it has changed or not: SIGHUP."""
        try:
            content = self._store.read()
        except StoreUnavailable as error:
            self._observer.settings_reload("refused")
            self._gone(error)
        except SettingsError as error:
            self._refused("", error)
        else:
            self._take_in(content, asked=True)

    def _run(self) -> None:
        wait = FIRST_WAIT
        before: object = None
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                content = self._store.read()
                self._take_in(content, asked=False)
                self._store.watch(content, self._patience)
                news = content.mark != before or time.monotonic() - began > SHORT
                before = content.mark
                if news:
                    wait = FIRST_WAIT
                    continue
            except StoreUnavailable as error:
                if not self._stop.is_set():
                    self._gone(error)
            except SettingsError as error:
                if str(error) != self._refusal:
                    self._refused("", error)
            except Exception:
                self._observer.loop_error("settings")
                log.exception("settings: unexpected error; the loop goes on")
            # Jitter, so that many agents do not come back in step.
            self._stop.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311
            wait = min(wait * 2, LONGEST_WAIT, self._store.longest_wait)

    def _gone(self, error: StoreUnavailable) -> None:
        self._observer.settings_store(connected=False)
        if str(error) != self._away:
            log.warning("settings: %s; %s", error, self._effect)
        self._away = str(error)

    def _take_in(self, content: Content, *, asked: bool) -> None:
        """Apply a text that is new; never raises for what is wrong with it."""
        with self._lock:
            self._observer.settings_store(connected=True)
            if self._away:
                log.info("settings: %s answers", self._store.where)
            self._away = ""
            if not asked and content.text == self._good:
                if self._refusal:
                    log.info("settings: %s has again what is in force", self._store.where)
                self._refusal, self._bad = "", None
            elif asked or content.text != self._bad:
                self._change(content)

    def _change(self, content: Content) -> None:
        try:
            if not content.text.strip():
                raise SettingsError(f"{self._store.where}: missing or empty")
            loaded = parsed(content, self._choice)
            for warning in loaded.warnings:
                log.warning("settings: %s", warning)
            self._apply(loaded)
        except SettingsError as error:
            self._refused(content.text, error)
        else:
            self._good, self._bad, self._refusal = content.text, None, ""
            self._observer.settings_reload("ok")

    def _refused(self, text: str, error: SettingsError) -> None:
        self._away = ""
        self._bad, self._refusal = text, str(error)
        self._observer.settings_reload("refused")
        for problem in error.problems:
            log.error("settings refused, %s: %s", self._effect, problem)
