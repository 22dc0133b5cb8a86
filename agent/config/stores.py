"""Where the text of the configuration lies: an environment variable or a file.

Interlock's order is kept, for users' stacks depend on it: the environment holds the whole TOML
text and beats `-c`. This module finds and reads text and hands it to `settings`; it must not know
what is in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.config import settings as schema
from agent.config.settings import Settings
from agent.errors import SettingsError

VARIABLES = ("TIDEGATE_CONFIG", "INTERLOCK_CONFIG")
"""Environment variables with the whole text; the first that is not empty is taken."""

BUILT_IN = "built-in defaults"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, where they came from, and a warning for each key that is not known."""

    settings: Settings
    where: str
    warnings: tuple[str, ...] = ()


def load(path: str | None, env: Mapping[str, str] | None = None) -> Loaded:
    """Find and read the configuration.

    Args:
        path: the file that `-c` names; not even opened where the environment holds the text.
        env: the environment, that of the process by default.

    Raises:
        SettingsError: the file cannot be read, or its content cannot be used.
    """
    env = os.environ if env is None else env
    for variable in VARIABLES:
        if env.get(variable, "").strip():
            return _parsed(env[variable], f"environment variable {variable}")
    if path is None:
        return Loaded(Settings(), BUILT_IN)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text: {error}") from error
    return _parsed(text, path)


def _parsed(text: str, where: str) -> Loaded:
    settings, warnings = schema.load(text, where=where)
    return Loaded(settings, where, warnings)
