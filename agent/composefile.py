"""Compose and stack files, read as Docker reads them: what of a service matters to a route.

Several files are merged, `extends` is followed, variables are put in, anchors and merge keys are
resolved, and every label knows its file and line. What is not understood is told as a remark, and
never guessed. This module must not know what a label means, and nothing of it executes anything:
YAML is taken as a tree of nodes, of which no Python object is ever made.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import yaml

from agent.errors import ComposeFileError

MAX_NODES = 200_000
"""Values in a file, aliases counted each time: more is a bomb and no compose file."""
_MAX_DEPTH = 60
_MAX_EXTENDS = 20
_MAX_RANGE = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written; lines count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Remark:
    """Something about the files themselves; `fatal` if Docker refuses them for it."""

    message: str
    hint: str
    place: Place
    fatal: bool = False


class Kind(StrEnum):
    """What the files are for."""

    STACK = "stack"
    """`docker stack deploy`: services of a Swarm."""
    COMPOSE = "compose"
    """`docker compose up`: containers of an engine or of a classic Swarm."""


@dataclass(frozen=True, slots=True)
class Label:
    """A label's value as Docker would pass it on."""

    value: str
    place: Place


@dataclass(frozen=True, slots=True)
class Port:
    """A published TCP port; `published` is 0 where Docker chooses one."""

    target: int
    published: int = 0
    host: str = ""
    mode: str = "ingress"


@dataclass(frozen=True, slots=True)
class Service:
    """A service as far as its route goes; merged from all places that speak of it.

    Attributes:
        key: its name in the file.
        labels: of the container; `deploy_labels` are those of the Swarm service.
        networks: keys of the networks it names; None where it names none.
        replicas: None where nothing is said.
        secrets: paths at which Docker secrets are mounted.
        hostname, domainname: the name that its container has for itself.
        swarm_keys: keys of its deploy section that mean something to a Swarm only.
        mode: `replicated`, `global`, or a job's.
        unclear: a construct that decides how it is reached and is not understood; None for none.
    """

    key: str
    place: Place
    labels: Mapping[str, Label] = field(default_factory=dict)
    deploy_labels: Mapping[str, Label] = field(default_factory=dict)
    ports: tuple[Port, ...] = ()
    expose: tuple[int, ...] = ()
    networks: tuple[str, ...] | None = None
    network_mode: str = ""
    container_name: str = ""
    replicas: int | None = None
    mode: str = "replicated"
    endpoint_mode: str = "vip"
    secrets: tuple[str, ...] = ()
    hostname: str = ""
    domainname: str = ""
    swarm_keys: tuple[str, ...] = ()
    unclear: Remark | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the top level. `name` is the one that Docker knows it by, if it is given."""

    name: str = ""
    external: bool = False
    driver: str = ""


@dataclass(frozen=True, slots=True)
class Project:
    """All files, merged.

    Attributes:
        name: of the stack or project.
        because: how `kind` was found out, for people.
        first_version: a file of the first layout, whose containers are all on the default bridge.
    """

    name: str
    kind: Kind
    because: str
    services: tuple[Service, ...]
    networks: Mapping[str, Network]
    remarks: tuple[Remark, ...]
    first_version: bool = False

    def network_name(self, key: str) -> str:
        """The name by which Docker knows a network of these files."""
        network = self.networks.get(key, Network())
        if network.name or network.external:
            return network.name or key
        return f"{self.name}_{key}"


def read(
    files: Sequence[tuple[str, str]],
    *,
    environment: Mapping[str, str],
    kind: Kind | None = None,
    name: str = "",
    env_file: str | None = None,
) -> Project:
    """Read and merge files; each is a path and its text.

    Args:
        environment: variables that are put in; they beat those of `env_file`.
        kind: what the files are for; None finds out.
        name: of the stack or project; empty takes the files' own, then COMPOSE_PROJECT_NAME, then
            the directory's.
        env_file: text of the `.env` file, None where there is none.

    Raises:
        ComposeFileError: a file cannot be used.
    """
    reader = _Reader(environment, env_file)
    drafts = [reader.file(path, text) for path, text in files]
    merged: dict[str, Service] = {}
    networks: dict[str, Network] = {}
    for draft in drafts:
        for key, service in draft.services.items():
            merged[key] = _merge(merged[key], service) if key in merged else service
        networks |= draft.networks
    because = "as told"
    if kind is None:
        kind, because = _kind_of(merged.values(), networks.values())
    name = name or next((draft.name for draft in reversed(drafts) if draft.name), "")
    name = name or environment.get("COMPOSE_PROJECT_NAME", "") or _directory_name(files[0][0])
    services = tuple(merged.values())
    undeclared = [
        Remark(
            f"service {service.key} is on network {key}, which the files do not declare; Docker "
            "refuses such a file.",
            f"Declare {key} under networks, with external: true if it exists already.",
            service.place,
            fatal=True,
        )
        for service in services
        for key in service.networks or ()
        if key not in networks and key != "default"
    ]
    return Project(
        name=name,
        kind=kind,
        because=because,
        services=services,
        networks=networks,
        remarks=(*reader.remarks, *undeclared, *reader.remarks_for(kind)),
        first_version=any(draft.first_version for draft in drafts),
    )


def _kind_of(services: Iterable[Service], networks: Iterable[Network]) -> tuple[Kind, str]:
    """What the files are for, and how one can tell."""
    for service in services:
        if service.swarm_keys:
            return Kind.STACK, f"service {service.key} has deploy.{service.swarm_keys[0]}"
    if any(network.driver == "overlay" for network in networks):
        return Kind.STACK, "it makes an overlay network"
    return Kind.COMPOSE, "nothing in it is for a Swarm"


def _directory_name(path: str) -> str:
    """The project's name as Docker Compose takes it from the directory."""
    directory = Path.cwd() if path == "-" else Path(path).resolve().parent
    return re.sub(r"[^a-z0-9_-]", "", directory.name.lower()).lstrip("_-") or "default"


def _merge(base: Service, over: Service) -> Service:
    """What a later file says on top of an earlier one, by Docker's rules."""
    networks = base.networks
    if over.networks is not None:
        networks = tuple(dict.fromkeys((*(base.networks or ()), *over.networks)))
    return Service(
        key=over.key,
        place=base.place,
        labels={**base.labels, **over.labels},
        deploy_labels={**base.deploy_labels, **over.deploy_labels},
        ports=tuple(dict.fromkeys((*base.ports, *over.ports))),
        expose=tuple(dict.fromkeys((*base.expose, *over.expose))),
        networks=networks,
        network_mode=over.network_mode or base.network_mode,
        container_name=over.container_name or base.container_name,
        replicas=base.replicas if over.replicas is None else over.replicas,
        mode=over.mode if over.mode != "replicated" else base.mode,
        endpoint_mode=over.endpoint_mode if over.endpoint_mode != "vip" else base.endpoint_mode,
        secrets=tuple(dict.fromkeys((*base.secrets, *over.secrets))),
        hostname=over.hostname or base.hostname,
        domainname=over.domainname or base.domainname,
        swarm_keys=tuple(sorted({*base.swarm_keys, *over.swarm_keys})),
        unclear=over.unclear or base.unclear,
    )


# --- YAML as a tree ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scalar:
    """`tag` is what YAML takes an unquoted value for: str, int, float, bool, null, timestamp."""

    text: str
    tag: str
    place: Place


@dataclass(frozen=True, slots=True)
class _List:
    items: tuple[_Value, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class _Map:
    items: Mapping[str, _Value]
    keys: Mapping[str, Place]
    place: Place

    def get(self, key: str) -> _Value | None:
        value = self.items.get(key)
        return None if isinstance(value, _Scalar) and value.tag == "null" else value


_Value = _Scalar | _List | _Map

_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = frozenset(
    _TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")
)


def _parse(path: str, text: str) -> _Map:
    """The tree of one file. Raises ComposeFileError."""
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Place(path, mark.line + 1) if mark else path
        raise ComposeFileError(f"{where}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ComposeFileError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ComposeFileError(f"{path}: nested too deeply") from None
    if len(documents) != 1:
        what = "is empty" if not documents else "holds several documents (---)"
        raise ComposeFileError(f"{path}: the file {what}; expected one mapping")
    tree = _Tree(path).value(documents[0], 0)
    if not isinstance(tree, _Map):
        raise ComposeFileError(f"{tree.place}: expected a mapping at the top level")
    return tree


class _Tree:
    """Turns YAML's nodes into ours: merge keys taken in, aliases resolved, places kept."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._count = 0
        self._open: set[int] = set()

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._path, node.start_mark.line + 1)

    def value(self, node: yaml.Node, depth: int) -> _Value:
        self._count += 1
        place = self._place(node)
        if self._count > MAX_NODES or depth > _MAX_DEPTH:
            raise ComposeFileError(f"{place}: too many values, or nested too deeply")
        if node.tag not in _KNOWN_TAGS:
            raise ComposeFileError(f"{place}: the tag {node.tag} is not supported")
        if isinstance(node, yaml.ScalarNode):
            return _Scalar(str(node.value), node.tag.removeprefix(_TAG), place)
        if id(node) in self._open:
            raise ComposeFileError(f"{place}: the anchor contains itself")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return _List(tuple(self.value(item, depth + 1) for item in node.value), place)
            return self._mapping(node, depth)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.Node, depth: int) -> _Map:
        place = self._place(node)
        items: dict[str, _Value] = {}
        keys: dict[str, Place] = {}
        merged: list[_Map] = []
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                merged += self._merged(self.value(value, depth + 1))
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise ComposeFileError(f"{self._place(key)}: expected a name as the key")
            name = str(key.value)
            if name in items:
                raise ComposeFileError(
                    f"{self._place(key)}: the key {name} is there twice, first in line "
                    f"{keys[name].line}"
                )
            items[name] = self.value(value, depth + 1)
            keys[name] = self._place(key)
        for other in merged:
            items = {**other.items, **items}
            keys = {**other.keys, **keys}
        return _Map(items, keys, place)

    def _merged(self, value: _Value) -> list[_Map]:
        """What `<<` takes in; of several the first one wins."""
        values = value.items if isinstance(value, _List) else (value,)
        found = [item for item in values if isinstance(item, _Map)]
        if len(found) != len(values):
            raise ComposeFileError(f"{value.place}: << takes a mapping or a list of mappings")
        return found


# --- variables ---------------------------------------------------------------------------------

_NAME = re.compile(r"[_a-zA-Z][_a-zA-Z0-9]*")
_OPERATOR = re.compile(r":?[-?+]")
_COMPOSE_ONLY = re.compile(r"(?<!\$)\$\{[_a-zA-Z0-9]+(?::?\+|[^}]*\$\{)")


class _BadVariableError(Exception):
    """A `$` that begins no variable, or a variable that must be set and is not."""


def interpolate(text: str, lookup: Callable[[str], str | None], missing: set[str]) -> str:
    """Put variables in: `$V`, `${V}`, `${V:-default}`, `${V:?error}`, `${V:+other}`; `$$` is `$`.

    Args:
        missing: takes the names that are not set and have no default; they are empty.

    Raises:
        _BadVariableError: as its message says.
    """
    out: list[str] = []
    at = 0
    while (found := text.find("$", at)) >= 0:
        out.append(text[at:found])
        if text.startswith("$$", found):
            out.append("$")
            at = found + 2
        elif text.startswith("${", found):
            end = _closing(text, found)
            out.append(_braced(text[found + 2 : end], lookup, missing))
            at = end + 1
        else:
            name = _NAME.match(text, found + 1)
            if name is None:
                raise _BadVariableError(f"{text!r} has a $ that begins no variable; write $$ for $")
            out.append(_plain(name.group(), lookup, missing))
            at = name.end()
    out.append(text[at:])
    return "".join(out)


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed."""
    depth, at = 0, start
    while at < len(text):
        if text.startswith("${", at):
            depth += 1
            at += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    raise _BadVariableError(f"{text!r} has a ${{ that is not closed")


def _plain(name: str, lookup: Callable[[str], str | None], missing: set[str]) -> str:
    value = lookup(name)
    if value is None:
        missing.add(name)
    return value or ""


def _braced(inside: str, lookup: Callable[[str], str | None], missing: set[str]) -> str:
    name = _NAME.match(inside)
    rest = inside[name.end() :] if name else ""
    operator = _OPERATOR.match(rest)
    if name is None or (rest and operator is None):
        raise _BadVariableError(f"${{{inside}}} is not a variable")
    if operator is None:
        return _plain(name.group(), lookup, missing)
    value, word = lookup(name.group()), rest[operator.end() :]
    there = value is not None and (value != "" or ":" not in operator.group())
    match operator.group()[-1]:
        case "-":
            return value or "" if there else interpolate(word, lookup, missing)
        case "+":
            return interpolate(word, lookup, missing) if there else ""
        case _:
            if not there:
                what = interpolate(word, lookup, missing) or "it is required"
                raise _BadVariableError(f"the variable {name.group()} is not set: {what}")
            return value or ""


_ENV_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]+")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def parse_env_file(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """A `.env` file as Docker Compose reads it.

    `NAME=value` by line, with `export` and comments; values in quotes may have several lines, and
    what is not in single quotes may have variables. A name alone is the environment's.

    Raises:
        ComposeFileError: a line is neither.
    """
    found: dict[str, str] = {}
    lines = text.removeprefix("\ufeff").splitlines()
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at].strip().removeprefix("export ").strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not _ENV_NAME.fullmatch(name):
            raise ComposeFileError(f".env:{number}: expected NAME=value")
        if not equals:
            continue
        quote = value[:1]
        if quote in ("'", '"'):
            while (end := _quote_end(value, quote)) < 0:
                if at == len(lines):
                    raise ComposeFileError(f".env:{number}: the quote is not closed")
                value += "\n" + lines[at]
                at += 1
            value = value[1:end]
        else:
            value = re.split(r"\s+#", value, maxsplit=1)[0]
        if quote == '"':
            value = re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), value)
        found[name] = value if quote == "'" else _expanded(value, {**found, **environment})
    return found


def _quote_end(value: str, quote: str) -> int:
    """Where the quote that a value begins with is closed; below 0 where it is not."""
    match = re.compile(rf"(?:\\.|[^\\{quote}])*{quote}", re.DOTALL).match(value, 1)
    return match.end() - 1 if match else -1


def _expanded(value: str, variables: Mapping[str, str]) -> str:
    """A value with its variables put in; one with a `$` that begins none stays as it is."""
    try:
        return interpolate(value, variables.get, set())
    except (_BadVariableError, RecursionError):
        return value


# --- one file ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """What one file says."""

    name: str
    services: dict[str, Service]
    networks: dict[str, Network]
    first_version: bool


_SERVICE_KEYS = ("labels", "deploy", "networks", "ports", "expose", "extends", "network_mode")
_NEAR_BUT_RIGHT = ("label_file", "network", "depends_on")
_DEPLOY_KEYS = ("labels", "replicas", "mode")
_SWARM_KEYS = (
    "labels", "mode", "endpoint_mode", "placement", "restart_policy", "rollback_config",
    "update_config",
)  # fmt: skip


class _Reader:
    """Reads files one by one, and collects what there is to remark."""

    def __init__(self, environment: Mapping[str, str], env_file: str | None) -> None:
        self._environment = environment
        self._env_file = parse_env_file(env_file or "", environment)
        self._from_file: set[str] = set()
        self._told: set[str] = set()
        self._first: dict[str, Place] = {}
        self.remarks: list[Remark] = []

    def _remark(self, message: str, hint: str, place: Place) -> None:
        self.remarks.append(Remark(message, hint, place))

    def file(self, path: str, text: str) -> _Draft:
        """One file, by itself."""
        tree = _parse(path, text)
        first_version = "services" not in tree.items and _is_first_version(tree)
        if first_version:
            services: _Value | None = tree
        else:
            services = tree.get("services")
            if services is None and not set(tree.items) & {"networks", "include", "name"}:
                raise ComposeFileError(f"{path}: there is no services section in it")
        if (include := tree.get("include")) is not None:
            self._remark(
                "include is not followed: what is included is not looked at.",
                "Name the included file as a further FILE.",
                include.place,
            )
        if "name" in tree.items and not first_version:
            self._first.setdefault("name", tree.keys["name"])
        return _Draft(
            name="" if first_version else self._text(tree.get("name")),
            services=self._services(path, services),
            networks={} if first_version else self._networks(tree.get("networks")),
            first_version=first_version,
        )

    def _services(self, path: str, section: _Value | None) -> dict[str, Service]:
        found: dict[str, Service] = {}
        if section is None:
            return found
        mapping = self._map(section, "services")
        for key, value in mapping.items.items():
            if key.startswith("x-"):
                continue
            found[key] = self._service(path, key, mapping, value, 0)
        return found

    def _service(
        self, path: str, key: str, section: _Map, value: _Value | None, depth: int
    ) -> Service:
        place = section.keys[key]
        if value is None or (isinstance(value, _Scalar) and value.tag == "null"):
            value = _Map({}, {}, place)
        body = self._map(value, f"services.{key}")
        self._look_for_slips(body, _SERVICE_KEYS, f"services.{key}")
        deploy = body.get("deploy")
        deploy_body = _Map({}, {}, place)
        if deploy is not None:
            deploy_body = self._map(deploy, f"services.{key}.deploy")
            self._look_for_slips(deploy_body, _DEPLOY_KEYS, f"services.{key}.deploy")
        service = Service(
            key=key,
            place=place,
            labels=self._labels(body.get("labels"), f"services.{key}.labels"),
            deploy_labels=self._labels(deploy_body.get("labels"), f"services.{key}.deploy.labels"),
            ports=tuple(self._ports(body.get("ports"), f"services.{key}.ports")),
            expose=tuple(self._expose(body.get("expose"), f"services.{key}.expose")),
            networks=self._service_networks(body.get("networks"), f"services.{key}.networks"),
            network_mode=self._text(body.get("network_mode") or body.get("net")),
            container_name=self._text(body.get("container_name")),
            replicas=self._replicas(deploy_body.get("replicas") or body.get("scale")),
            mode=self._text(deploy_body.get("mode")) or "replicated",
            endpoint_mode=self._text(deploy_body.get("endpoint_mode")) or "vip",
            secrets=tuple(self._secrets(body.get("secrets"), f"services.{key}.secrets")),
            hostname=self._text(body.get("hostname")),
            domainname=self._text(body.get("domainname")),
            swarm_keys=tuple(key for key in _SWARM_KEYS if key in deploy_body.items),
            unclear=self._unclear(key, body),
        )
        if (extends := body.get("extends")) is None:
            return service
        self._first.setdefault("extends", extends.place)
        base = self._base(path, key, section, extends, depth)
        return replace(_merge(base, service), key=key, place=place)

    def _base(self, path: str, key: str, section: _Map, extends: _Value, depth: int) -> Service:
        """The service that another one extends, with what that extends in turn."""
        where = f"services.{key}.extends"
        if depth > _MAX_EXTENDS:
            raise ComposeFileError(f"{extends.place}: {where}: extends itself, or too often")
        if isinstance(extends, _Scalar):
            name, file = self._text(extends), ""
        else:
            body = self._map(extends, where)
            name, file = self._text(body.get("service")), self._text(body.get("file"))
        if file:
            other = Path(path).parent / file if path != "-" else Path(file)
            try:
                text = other.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "not UTF-8"
                raise ComposeFileError(f"{extends.place}: {where}: {other}: {why}") from error
            tree = _parse(str(other), text)
            section = self._map(tree.get("services") or _Map({}, {}, tree.place), "services")
            path = str(other)
        if name not in section.items:
            raise ComposeFileError(f"{extends.place}: {where}: there is no service {name!r}")
        return self._service(path, name, section, section.items[name], depth + 1)

    def _unclear(self, key: str, body: _Map) -> Remark | None:
        mode = self._text(body.get("network_mode") or body.get("net"))
        if mode.startswith(("service:", "container:")):
            return Remark(
                f"service {key} shares the network of another container (network_mode: {mode}), "
                "which is not followed, so how it is reached is not known.",
                "Put the labels on the service whose network it shares.",
                body.keys.get("network_mode") or body.keys["net"],
            )
        if (value := body.get("label_file")) is not None:
            return Remark(
                f"service {key} has labels in a label_file, which is not read.",
                "Write the labels of the route into the file itself.",
                value.place,
            )
        return None

    def _look_for_slips(self, body: _Map, known: tuple[str, ...], where: str) -> None:
        for key in body.items:
            if key in known or key in _NEAR_BUT_RIGHT or key.startswith("x-"):
                continue
            if near := difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8):
                self._remark(
                    f"{where}.{key} is not a key that Docker knows.",
                    f"Did you mean {near[0]}?",
                    body.keys[key],
                )

    # values

    def _map(self, value: _Value, where: str) -> _Map:
        if not isinstance(value, _Map):
            raise ComposeFileError(f"{value.place}: {where}: expected a mapping")
        return value

    def _text(self, value: _Value | None) -> str:
        """The text of a scalar with its variables put in; empty for none."""
        if value is None:
            return ""
        if not isinstance(value, _Scalar):
            raise ComposeFileError(f"{value.place}: expected a single value")
        if value.tag == "null":
            return ""
        if "$" not in value.text:
            return value.text
        missing: set[str] = set()
        known = len(self._from_file)
        try:
            text = interpolate(value.text, self._lookup, missing)
        except _BadVariableError as error:
            raise ComposeFileError(f"{value.place}: {error}") from None
        except RecursionError:
            raise ComposeFileError(f"{value.place}: variables are nested too deeply") from None
        if len(self._from_file) > known:
            self._first.setdefault("env_file", value.place)
        if _COMPOSE_ONLY.search(value.text):
            self._first.setdefault("nested", value.place)
        for name in sorted(missing - self._told):
            self._told.add(name)
            self._remark(
                f"the variable {name} is not set, so that it is empty here.",
                f"Set {name} in the environment, or write a default: ${{{name}:-value}}.",
                value.place,
            )
        return text

    def _lookup(self, name: str) -> str | None:
        if name in self._environment:
            return self._environment[name]
        if name in self._env_file:
            self._from_file.add(name)
            return self._env_file[name]
        return None

    def remarks_for(self, kind: Kind) -> list[Remark]:
        """What `docker stack deploy` refuses or leaves out, where the files are for it."""
        if kind is not Kind.STACK:
            return []
        told = {
            "env_file": (
                f"{', '.join(sorted(self._from_file))} is set in .env, which `docker stack deploy` "
                "does not read.",
                "Set it in the environment: set -a; . ./.env; docker stack deploy ...",
            ),
            "nested": (
                "a variable within the default of another one, and ${V:+other}, are for Docker "
                "Compose only.",
                "Write the default out.",
            ),
            "bare": (
                "`docker stack deploy` refuses the whole file: a label's value must be text, and "
                "this is a boolean.",
                'Write it in quotes: "true".',
            ),
            "extends": (
                "`docker stack deploy` refuses the whole file: it knows no extends.",
                "Use a YAML anchor, or deploy what `docker compose config` prints.",
            ),
            "name": (
                "`docker stack deploy` knows no name at the top level and may refuse the file.",
                "Name the stack on the command line.",
            ),
        }
        return [
            Remark(*told[what], place, fatal=what in ("bare", "extends"))
            for what, place in self._first.items()
        ]

    def _labels(self, value: _Value | None, where: str) -> dict[str, Label]:
        if value is None:
            return {}
        if isinstance(value, _List):
            found: dict[str, Label] = {}
            for item in value.items:
                name, equals, text = self._text(item).partition("=")
                if not equals and ": " in name:
                    self._remark(
                        f"Docker takes all of {name!r} for the name of a label without a value.",
                        "In a list write NAME=VALUE, or remove the hyphens to have a mapping.",
                        item.place,
                    )
                found[name] = Label(text, item.place)
            return found
        body = self._map(value, where)
        return {name: self._label(body, name) for name in body.items}

    def _label(self, body: _Map, name: str) -> Label:
        value = body.items[name]
        if not isinstance(value, _Scalar):
            raise ComposeFileError(f"{value.place}: the label {name} is no single value")
        # YAML 1.1 has more words for these two than Docker takes for them.
        bare = value.tag == "bool" and value.text.lower() in ("true", "false")
        if bare:
            self._first.setdefault("bare", body.keys[name])
        text = value.text.lower() if bare else self._text(value)
        if value.tag in ("int", "float", "timestamp"):
            text = _as_number(value.text)
            if text != value.text or value.tag == "timestamp":
                self._remark(
                    f"YAML takes the value of {name} ({value.text}) for a number or a date, so "
                    "that Docker writes it its own way.",
                    "Write it in quotes.",
                    body.keys[name],
                )
        return Label(text, body.keys[name])

    def _list(self, value: _Value | None, where: str) -> tuple[_Value, ...]:
        if value is None:
            return ()
        if not isinstance(value, _List):
            raise ComposeFileError(f"{value.place}: {where}: expected a list")
        return value.items

    def _ports(self, value: _Value | None, where: str) -> Iterator[Port]:
        for item in self._list(value, where):
            if isinstance(item, _Map):
                yield from self._long_port(item, where)
            else:
                yield from _short_port(self._text(item), item.place, where)

    def _long_port(self, item: _Map, where: str) -> Iterator[Port]:
        if (self._text(item.get("protocol")) or "tcp").lower() != "tcp":
            return
        targets = _range(self._text(item.get("target")), item.place, where)
        published = self._text(item.get("published"))
        numbers = [0] if published in ("", "0") else _range(published, item.place, where)
        for target in targets:
            yield Port(
                target=target,
                published=numbers[0],
                host=self._text(item.get("host_ip")),
                mode=self._text(item.get("mode")) or "ingress",
            )

    def _expose(self, value: _Value | None, where: str) -> Iterator[int]:
        for item in self._list(value, where):
            number, _, protocol = self._text(item).partition("/")
            if protocol.lower() in ("", "tcp"):
                yield from _range(number, item.place, where)

    def _secrets(self, value: _Value | None, where: str) -> Iterator[str]:
        """The paths at which secrets are mounted; a relative one is below /run/secrets."""
        for item in self._list(value, where):
            if isinstance(item, _Map):
                name = self._text(item.get("target")) or self._text(item.get("source"))
            else:
                name = self._text(item)
            yield name if name.startswith("/") else f"/run/secrets/{name}"

    def _replicas(self, value: _Value | None) -> int | None:
        text = self._text(value)
        return int(text) if text.isdigit() else None

    def _service_networks(self, value: _Value | None, where: str) -> tuple[str, ...] | None:
        if value is None:
            return None
        if isinstance(value, _List):
            return tuple(self._text(item) for item in value.items)
        return tuple(self._map(value, where).items)

    def _networks(self, value: _Value | None) -> dict[str, Network]:
        found: dict[str, Network] = {}
        if value is None:
            return found
        body = self._map(value, "networks")
        for key in body.items:
            if key.startswith("x-"):
                continue
            item = body.get(key)
            declared = _Map({}, {}, body.place) if item is None else self._map(item, key)
            external, name = declared.get("external"), self._text(declared.get("name"))
            if isinstance(external, _Map):
                is_external, name = True, name or self._text(external.get("name"))
            else:
                is_external = self._text(external).lower() in ("true", "yes", "on")
            found[key] = Network(name, is_external, self._text(declared.get("driver")))
        return found


def _as_number(text: str) -> str:
    """A number without quotes as Docker writes it into a label: 010 is 8, 1.50 is 1.5."""
    if re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
        return str(int(text.replace("_", "")))
    if re.fullmatch(r"0[0-7]+", text):
        return str(int(text, 8))
    if re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return str(int(text, 16))
    if re.fullmatch(r"-?[0-9]+\.[0-9]{1,9}", text):
        return f"{float(text):g}" if len(text) < 7 else repr(float(text))
    return text


def _is_first_version(tree: _Map) -> bool:
    """Services at the top level, as files had them before there was a version."""
    if "version" in tree.items:
        return False
    bodies = [value for key, value in tree.items.items() if not key.startswith("x-")]
    return bool(bodies) and all(
        isinstance(body, _Map) and ("image" in body.items or "build" in body.items)
        for body in bodies
    )


_SHORT_PORT = re.compile(
    r"(?:(?:(?P<host>\[[0-9a-fA-F:.]+\]|[0-9.]+):)?(?P<published>[0-9-]*):)?"
    r"(?P<target>[0-9-]+)(?:/(?P<protocol>[A-Za-z]+))?"
)


def _short_port(text: str, place: Place, where: str) -> Iterator[Port]:
    found = _SHORT_PORT.fullmatch(text)
    if found is None:
        raise ComposeFileError(f"{place}: {where}: {text!r} is not a port")
    if (found["protocol"] or "tcp").lower() != "tcp":
        return
    targets = _range(found["target"], place, where)
    given = found["published"] or "0"
    published = [] if given == "0" else _range(given, place, where)
    host = (found["host"] or "").strip("[]")
    for number, target in enumerate(targets):
        at = published[number] if len(published) == len(targets) else (published or [0])[0]
        yield Port(target, at, host)


def _range(text: str, place: Place, where: str) -> list[int]:
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise ComposeFileError(f"{place}: {where}: {text!r} is not a port")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high <= 65535 or high - low >= _MAX_RANGE:
        raise ComposeFileError(f"{place}: {where}: {text!r} is not a port or a range of ports")
    return list(range(low, high + 1))
