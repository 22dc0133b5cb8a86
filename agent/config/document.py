"""The schema told to people and editors: the pages, the JSON Schema and the sample made from it.

`python -m agent.config.document docs` writes docs/configuration.md, docs/configuration.schema.json
and the table in docs/migration.md; a test keeps them so. `tidegate spec` prints the sample. This
module must not know what a setting does.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from agent.config import interlock2
from agent.config.interlock import EXTENSION_KEYS, KEYS, Key, Scope
from agent.config.settings import Extension, OpenResty, Settings

_INTRODUCTION = """\
# Configuration

One TOML file, `config.toml`, in the style of Interlock's: PascalCase keys that match
case-insensitively. An unknown key is a warning with the nearest known name (a failure under
`tidegate check --strict`), a value of the wrong type is an error with its line, key path, the value
and what is expected. Durations are strings such as `"500ms"` or `"1m30s"`. `""`, and 0 for a number
that Interlock knew, mean the default, since that is how Interlock's `spec` printed what is not set
(but `SSLPort = 0` is no TLS listener).

`tidegate spec` prints a file with every key and its default. For editors there is a JSON Schema:
[configuration.schema.json](configuration.schema.json). What became of each of Interlock's keys:
[migration.md](migration.md).

The OpenResty side is set up by environment variables: [data-plane.md](data-plane.md).

## Where it is

Of what is given, the first of these counts, as in Interlock, and `tidegate check` says which:

1. a key-value store: `-k URL` (`--discovery`)
2. the environment: `TIDEGATE_CONFIG`, then `INTERLOCK_CONFIG`; each holds the whole text
3. a file: `-c FILE`
4. nothing: the defaults below

The URL of a store is `SCHEME://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…][/KEY]`. The endpoints are
tried in turn; without a path the key is `interlock/v1/config`. Characters of user, password and
key that mean something in a URL are written as `%XX`. With any of `--discovery-tls-ca-cert`,
`--discovery-tls-cert` and `--discovery-tls-key` it is spoken to over TLS, and verified. Where
that fails the agent says which side, which file, and what to do.

| scheme | port | what is spoken | user and password |
| --- | --- | --- | --- |
| `etcd://` | 2379 | the v3 API through its JSON gateway (etcd 3.2 and later), the key as written \
or with a slash in front; where v3 has no such key, the v2 keys, if the server has them | etcd's \
|
| `consul://` | 8500 | the KV store, with blocking queries | HTTP basic authentication; `:TOKEN@` \
is an ACL token |
| `zk://` | 2181 | the node of that path | a `digest` account |

## Changes take effect by themselves

A file is looked at twice a second, a store tells of a change at once (and is read again every 20 s
in case it did not). SIGHUP reads again at once too. What is valid takes effect without a gap: new
sources start beside the old ones. `ListenAddr` takes effect at the next start.

| what happens | what the agent does |
| --- | --- |
| the change is not valid | logs why, counts it in \
`tidegate_settings_reloads_total{result="refused"}`, shows it in `tidegate status` \
(`settings_problem`), and goes on with the old settings |
| the key or file is emptied or removed | the same: nothing is ever taken back to defaults by that |
| the store is down while the agent runs | it goes on with what it has and tries again for ever, \
at most 15 s apart; `tidegate_settings_store_up` is 0 |
| the store is down, or has no valid text under the key, when the agent starts | it waits: \
`/readyz` fails with the reason, no source is read and no OpenResty touched, so traffic goes on \
as it was. Until then it listens where the file or environment given besides says, or on `:8080`. \
(Interlock ran without extensions then, which comes to the same) |
| a file is missing or not valid when the agent starts | it ends with exit code 2 |
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

This page is made from the schema: `python -m agent.config.document docs`.
"""

_TABLES: tuple[tuple[str, type[Any]], ...] = (
    ("Top level", Settings),
    ("`[[Extensions]]`", Extension),
    ("`[OpenResty]`", OpenResty),
)

BEGIN = "<!-- configuration keys: made by python -m agent.config.document docs -->"
END = "<!-- end of configuration keys -->"

_SECTIONS = (
    (Scope.TOP, "Top level of `config.toml`"),
    (Scope.EXTENSION, "`[[Extensions]]`"),
    (Scope.ENVIRONMENT, "Environment"),
    (Scope.COMMAND_LINE, "Command line"),
)

_SECTIONS_OF_2 = (
    (Scope.TOP, "Interlock 2 and 3: top level, besides the keys of Interlock 1"),
    (Scope.TABLE, "Interlock 2 and 3: `[Extensions.<name>]`"),
    (Scope.TABLE_CONFIG, "Interlock 2 and 3: `[Extensions.<name>.Config]`"),
)


def markdown() -> str:
    """The whole page docs/configuration.md."""
    return "\n".join([_INTRODUCTION, *(_table(title, table) for title, table in _TABLES), _EXAMPLE])


def _table(title: str, table: type[Any]) -> str:
    lines = [f"## {title}", "", (table.__doc__ or "").strip().replace("\n", " "), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    unused = []
    for name, field in table.model_fields.items():
        key = field.alias or name
        if key in ("Extensions", "OpenResty"):
            lines.append(f"| `{key}` | table | | below |")
        elif _is_unused(field):
            unused.append(f"`{key}`")
        else:
            default = _default(field.default)
            lines.append(
                f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |"
            )
    if unused:
        names = textwrap.fill(
            f"Accepted because Interlock had them, and not used, with a warning that says why and "
            f"what to use instead ([migration.md](migration.md)): {', '.join(unused)}.",
            width=100,
            break_long_words=False,
        )
        lines += ["", names]
    return "\n".join([*lines, ""])


def _is_unused(field: Any) -> bool:
    return bool((field.json_schema_extra or {}).get("deprecated"))


def _type(annotation: Any) -> str:
    """How a value of that type is written in TOML."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is UnionType:
        return " or ".join(_type(choice) for choice in get_args(annotation))
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


def migration_table() -> str:
    """What became of each of Interlock's keys, for docs/migration.md."""
    parts = [BEGIN]
    for scope, title in _SECTIONS:
        parts += ["", f"### {title}", "", "| key | of | | here |", "| --- | --- | --- | --- |"]
        for key in KEYS:
            if key.scope is scope:
                of = ", ".join(key.extensions) or "core"
                parts.append(f"| `{_name(key)}` | {of} | {_verdict(key)} | {key.text} |")
    for scope, title in _SECTIONS_OF_2:
        parts += ["", f"### {title}", "", "| key | | here |", "| --- | --- | --- |"]
        for key in interlock2.KEYS:
            if key.scope is scope:
                parts.append(f"| `{_name(key)}` | {_verdict(key)} | {key.text} |")
    return "\n".join([*parts, "", END])


def _name(key: Key) -> str:
    return key.name.replace("|", "\\|")


def _verdict(key: Key) -> str:
    return "honoured" if key.honoured else "not used"


def with_migration_table(page: str) -> str:
    """The page docs/migration.md with the table as it has to be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + migration_table() + after


def json_schema() -> str:
    """The JSON Schema of `config.toml`, for editors. It knows one spelling of each key."""
    schema = Settings.model_json_schema(by_alias=True)
    for key, value in schema["$defs"]["Extension"]["properties"].items():
        # 0 means the default.
        if key in EXTENSION_KEYS and value.get("minimum") == 1:
            value["minimum"] = 0
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Tidegate's config.toml",
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def sample() -> str:
    """A file with every key that does something, its meaning and its default."""
    lines = [
        "# Every setting of Tidegate with its default. Keys match in any case.",
        '# Durations are strings such as "500ms" or "1m30s".',
        "",
        *_sample_of(Settings, indent=""),
        *_comment(Extension.__doc__ or ""),
        "[[Extensions]]",
        *_sample_of(Extension, indent="  "),
        *_comment(OpenResty.__doc__ or ""),
        "[OpenResty]",
        *_sample_of(OpenResty, indent="  "),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _sample_of(table: type[Any], *, indent: str) -> list[str]:
    lines, unused = [], []
    for name, field in table.model_fields.items():
        key = field.alias or name
        if key in ("Extensions", "OpenResty"):
            continue
        if _is_unused(field):
            unused.append(key)
            continue
        lines += _comment(field.description or "", indent=indent, type_=field.annotation)
        known = EXTENSION_KEYS.get(key) if table is Extension else None
        off = "# " if known and known.extensions == ("haproxy",) else ""
        lines += [f"{indent}{off}{key} = {_toml(field.default)}", ""]
    if unused and table is Extension:
        text = f"Accepted and not used, see docs/migration.md: {', '.join(unused)}"
        lines += [*_comment(text, indent=indent), ""]
    return lines


def _comment(text: str, *, indent: str = "", type_: Any = None) -> list[str]:
    if get_origin(type_) is Literal:
        choices = " or ".join(json.dumps(choice) for choice in get_args(type_))
        text = f"{text}; {choices}"
    return textwrap.wrap(
        " ".join(text.replace("`", "").split()),
        width=100,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
    )


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f'"{value:g}s"'
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def write(docs: Path) -> None:
    """Bring the pages below `docs` up to date."""
    (docs / "configuration.md").write_text(markdown(), encoding="utf-8")
    (docs / "configuration.schema.json").write_text(json_schema(), encoding="utf-8")
    migration = docs / "migration.md"
    page = with_migration_table(migration.read_text(encoding="utf-8"))
    migration.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
