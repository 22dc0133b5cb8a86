"""The schema told to people: docs/configuration.md is what `markdown` returns, a test keeps it so.

`python -m agent.config.document` prints it. This module must not know what a setting does.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal, get_args, get_origin

from agent.config.settings import Extension, OpenResty, Settings

_INTRODUCTION = """\
# Configuration

One TOML file, `config.toml`, in the style of Interlock's: PascalCase keys that match
case-insensitively. An unknown key is a warning with the nearest known name, a value of the wrong
type is an error with its path. Durations are strings such as `"500ms"` or `"1m30s"`.

Where the text comes from, the first that is there: the environment variable `TIDEGATE_CONFIG`
(the whole text), `INTERLOCK_CONFIG` (likewise), the file given with `-c`. Without any of them the
defaults below hold. `tidegate check` says which one it was. SIGHUP makes the agent read it again;
one that is not valid is refused, and the old one stays.

The OpenResty side is set up by environment variables: [data-plane.md](data-plane.md).

This page is made from the schema: `python -m agent.config.document > docs/configuration.md`.
"""

_EXAMPLE = """\
## Example

```toml
ListenAddr = ":8080"
PollInterval = "500ms"

[[Extensions]]
Name = "nginx"
Port = 80
SSLPort = 443
SSLCertPath = "/etc/tidegate/certs"

[OpenResty]
AdminPort = 8081
TokenFile = "/run/secrets/tidegate_token"
```
"""

_TABLES: tuple[tuple[str, type[Any]], ...] = (
    ("Top level", Settings),
    ("`[[Extensions]]`", Extension),
    ("`[OpenResty]`", OpenResty),
)


def markdown() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *(_table(title, table) for title, table in _TABLES), _EXAMPLE])


def _table(title: str, table: type[Any]) -> str:
    lines = [f"## {title}", "", (table.__doc__ or "").strip().replace("\n", " "), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in table.model_fields.items():
        key = field.alias or name
        if key in ("Extensions", "OpenResty"):
            lines.append(f"| `{key}` | table | | below |")
            continue
        default = _default(field.default)
        lines.append(f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |")
    return "\n".join([*lines, ""])


def _type(annotation: Any) -> str:
    """How a value of that type is written in TOML."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    names = {str: "string", int: "integer", bool: "boolean", float: "duration"}
    return names.get(annotation, "table")


def _default(value: Any) -> str:
    if isinstance(value, float):
        return f'`"{value:g}s"`'
    if value in ("", ()):
        return ""
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(markdown())
