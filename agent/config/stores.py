"""Where the text of the configuration lies: a key-value store, an environment variable or a file.

Interlock's real order is kept, for users' stacks depend on it: a store given with `-k` beats the
environment, which holds the whole TOML text and beats `-c`. This module chooses the store, reads
text and hands it to `settings`; it must not know what is in it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.config import settings as schema
from agent.config.settings import Remark, Settings
from agent.errors import SettingsError, StoreUnavailable

VARIABLES = ("TIDEGATE_CONFIG", "INTERLOCK_CONFIG")
"""Environment variables with the whole text; the first that is not empty is taken."""

BUILT_IN = "built-in defaults"

LOOK_INTERVAL = 0.5
"""Seconds between looks at a file's times."""

SETTLE = 0.1
"""Seconds that a file has to rest before it is read: whoever writes in place may be half-way."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a store has.

    Attributes:
        text: the TOML text; empty where the key is missing or empty.
        mark: which version it is, for the store's own `watch`.
    """

    text: str
    mark: object = None


class Store(Protocol):
    """One place that the text can be in."""

    where: str
    """For people; without user and password."""

    remote: bool
    """Whether it may be away for reasons of its own, so that waiting for it is right."""

    longest_wait: float
    """Seconds; the longest that makes sense between two tries to reach it."""

    def read(self) -> Content:
        """The text as of now.

        Raises:
            StoreUnavailable: the store does not answer.
            SettingsError: what it has is no text.
        """

    def watch(self, content: Content, timeout: float) -> None:
        """Return when there may be something else than `content`, or after `timeout` seconds.

        It may return early for nothing. Raises StoreUnavailable.
        """

    def close(self) -> None:
        """Let go of connections, and end a `watch` as far as that can be done."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What `-k` and `--discovery-tls-*` say."""

    url: str
    ca: str = ""
    cert: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The store that counts, and what was given besides and does not."""

    store: Store
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, where they came from, and a remark for each key that is not known or not used."""

    settings: Settings
    where: str
    warnings: tuple[Remark, ...] = ()
    passed_over: tuple[str, ...] = ()
    text: str = field(default="", repr=False)


class FileStore:
    """A file, looked at twice a second: rename, rewrite and a new mount are all seen."""

    remote = False
    longest_wait = LOOK_INTERVAL

    def __init__(self, path: str) -> None:
        self.where = path
        self._path = Path(path)
        self._closed = threading.Event()

    def read(self) -> Content:
        """The file's text."""
        try:
            # The look comes first: what is written after it is seen by the next one.
            look = self._look()
            return Content(self._path.read_text(encoding="utf-8"), look)
        except OSError as error:
            raise StoreUnavailable(f"{self.where}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SettingsError(f"{self.where}: not UTF-8 text: {error}") from error

    def watch(self, content: Content, timeout: float) -> None:
        """Wait for other times, size or inode, and then until they rest."""
        waited = 0.0
        while waited < timeout and not self._closed.wait(LOOK_INTERVAL):
            waited += LOOK_INTERVAL
            try:
                look = self._look()
                if look == content.mark:
                    continue
                while not self._closed.wait(SETTLE) and (after := self._look()) != look:
                    look = after
            except OSError:
                pass  # read() says what is wrong
            return

    def close(self) -> None:
        """End a watch."""
        self._closed.set()

    def _look(self) -> tuple[int, ...]:
        found = self._path.stat()
        return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class FixedStore:
    """A text that does not change while we run: the environment's, or none at all."""

    remote = False
    longest_wait = LOOK_INTERVAL

    def __init__(self, where: str, text: str) -> None:
        self.where = where
        self._content = Content(text)
        self._closed = threading.Event()

    def read(self) -> Content:
        """Always the same."""
        return self._content

    def watch(self, content: Content, timeout: float) -> None:
        """Only wait."""
        self._closed.wait(timeout)

    def close(self) -> None:
        """End a watch."""
        self._closed.set()


def choose(
    path: str | None, env: Mapping[str, str] | None = None, discovery: Discovery | None = None
) -> Choice:
    """The store that counts of all that are given; nothing is opened yet.

    Args:
        path: the file that `-c` names.
        env: the environment, that of the process by default.
        discovery: what `-k` says.

    Raises:
        SettingsError: the URL of the key-value store or its TLS files cannot be used.
    """
    env = os.environ if env is None else env
    given: list[Store] = []
    if discovery is not None:
        from agent.config.kv import open_store  # its libraries load only where they are needed

        given.append(open_store(discovery))
    given += [
        FixedStore(f"environment variable {variable}", env[variable])
        for variable in VARIABLES
        if env.get(variable, "").strip()
    ]
    if path is not None:
        given.append(FileStore(path))
    if not given:
        return Choice(FixedStore(BUILT_IN, "# no settings were given\n"))
    return Choice(given[0], tuple(store.where for store in given[1:]))


def load(
    path: str | None, env: Mapping[str, str] | None = None, discovery: Discovery | None = None
) -> Loaded:
    """Find and read the configuration, once.

    Raises:
        SettingsError: the file cannot be read, or the content cannot be used.
        StoreUnavailable: the key-value store does not answer.
    """
    choice = choose(path, env, discovery)
    try:
        return read(choice)
    finally:
        choice.store.close()


def read(choice: Choice) -> Loaded:
    """Read the configuration from the store that was chosen.

    Raises:
        SettingsError: the file cannot be read, or the content cannot be used.
        StoreUnavailable: the key-value store does not answer.
    """
    try:
        content = choice.store.read()
    except StoreUnavailable as error:
        if choice.store.remote:
            raise
        raise SettingsError(str(error)) from error
    return parsed(content, choice)


def parsed(content: Content, choice: Choice) -> Loaded:
    """Make settings of what a store has.

    Raises:
        SettingsError: it cannot be used.
    """
    where = choice.store.where
    settings, warnings = schema.load(content.text, where=where)
    if not content.text.strip():
        warnings = (Remark(f"{where}: missing or empty; the {BUILT_IN} are in force"),)
    return Loaded(settings, where, warnings, choice.passed_over, content.text)
