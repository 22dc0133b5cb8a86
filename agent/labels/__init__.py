"""Label dialects: what the labels of a workload ask for, as route declarations or rejections.

Labels are written by whoever may deploy a service, so every value is untrusted text: it is taken
in only where it matches a strict form (`forms`), and everything behind this package may rely on
that. Both dialects, Interlock's and `com.docker.lb`, take one way (`route`, `policy`) and produce
the same `RouteDeclaration`, so that nothing behind knows how a label was spelled. Nothing here may
look at networks, ports or instances: whether a declaration can be served is `agent.compile`'s
business.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from agent.labels.declaration import (
    DEFAULT_RULES,
    DOCKER_LB,
    INTERLOCK,
    NOTHING,
    Dialect,
    Reading,
    Reason,
    RouteDeclaration,
    Rules,
    rules_of,
    subject_of,
)
from agent.labels.forms import shown_label
from agent.labels.names import (
    INHERITABLE,
    INHERITED,
    KNOWN_LABELS,
    LISTS,
    base_of,
    first_words,
    options_of,
)
from agent.labels.reader import Reader, Written
from agent.labels.route import read_route
from agent.model import Rejection, Workload, WorkloadKind

__all__ = (
    "DEFAULT_RULES",
    "DOCKER_LB",
    "INTERLOCK",
    "KNOWN_LABELS",
    "NOTHING",
    "Dialect",
    "Reading",
    "Reason",
    "RouteDeclaration",
    "Rules",
    "read_labels",
    "rules_of",
    "subject_of",
)


def read_labels(workload: Workload, rules: Rules = DEFAULT_RULES) -> Reading:
    """Read the labels of `workload`, its own first and those of its template second, per label."""
    merged = {**workload.template_labels, **workload.labels}
    sets = {dialect.prefix: _sort(merged, dialect) for dialect in (INTERLOCK, DOCKER_LB)}
    interlock, docker = sets[INTERLOCK.prefix], sets[DOCKER_LB.prefix]
    found: set[Rejection] = set()
    if interlock.asked and docker.asked:
        loser = docker if interlock.names_something else interlock
        found.add(_beside(workload, loser))
        chosen = interlock if loser is docker else docker
    else:
        chosen = docker if docker.asked else interlock
    if not chosen.asked and not chosen.notes:
        if not _goes_by_its_own_name(workload, merged, rules):
            return NOTHING
        chosen = _Labels(INTERLOCK, {"": {}})
    routes, more = _read(chosen, workload, rules)
    found.update(more)
    return Reading(tuple(routes), tuple(sorted(found, key=_by)))


def _by(rejection: Rejection) -> tuple[str, str, str]:
    return rejection.subject, rejection.reason, rejection.message


# --- which label belongs to which route --------------------------------------------------------


@dataclass(slots=True)
class _Labels:
    """The labels of one dialect that a workload has.

    Attributes:
        routes: name of the route, empty for the unnamed one → option → value.
        strangers: labels that are not known.
        notes: labels of another kind that are told of, and why.
    """

    dialect: Dialect
    routes: dict[str, dict[str, Written]] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def asked(self) -> bool:
        """Whether there is a label that would ask for a route."""
        return bool(self.routes or self.strangers)

    @property
    def names_something(self) -> bool:
        """Whether a label says for what to route."""
        return any(
            base_of(option) in _NAMING for options in self.routes.values() for option in options
        )


_NAMING = frozenset({"hostname", "hosts", "default_backend", "tcp_port"})
_ROUTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_FIRST_WORDS = {dialect.prefix: first_words(dialect) for dialect in (INTERLOCK, DOCKER_LB)}
_OPTIONS = {dialect.prefix: options_of(dialect) for dialect in (INTERLOCK, DOCKER_LB)}
_ONCE_TAKEN = re.compile(r"interlock\.(?:alias_domain|websocket_endpoint|backend_option)")
_SERVICE_NAME = "interlock.ext.service_name"


def _sort(merged: Mapping[str, str], dialect: Dialect) -> _Labels:
    found, prefix = _Labels(dialect), dialect.prefix
    for label, value in merged.items():
        if not label.startswith(prefix):
            if label[: len(prefix)].lower() == prefix:
                found.strangers.append(label)
            continue
        rest = label[len(prefix) :]
        first, _, tail = rest.partition(".")
        if first in dialect.silent:
            if label == _SERVICE_NAME:
                found.notes.append((label, "was never released by Interlock"))
            continue
        route, option = "", _option(dialect, rest)
        if option is None and first not in _FIRST_WORDS[prefix] and _ROUTE_NAME.fullmatch(first):
            route, option = first, _option(dialect, tail)
        if option is None:
            found.strangers.append(label)
        else:
            found.routes.setdefault(route, {})[option] = Written(label, value)
    if dialect is INTERLOCK and found.asked:
        found.notes.extend(
            (label, "has the name of one of Interlock's lists in it, but does not begin with it")
            for label in merged
            if _ONCE_TAKEN.search(label) and not label.lower().startswith(prefix)
        )
    return found


def _option(dialect: Dialect, spelled: str) -> str | None:
    """The option that a label without prefix and route name sets, None if it is not known."""
    known = _OPTIONS[dialect.prefix]
    if spelled in known:
        return known[spelled]
    base, dot, suffix = spelled.partition(".")
    option = known.get(base)
    return f"{option}.{suffix}" if option in LISTS and dot and suffix else None


def _goes_by_its_own_name(workload: Workload, merged: Mapping[str, str], rules: Rules) -> bool:
    """Whether a container without any label is served, as up to Interlock 1.3."""
    return (
        rules.hostname_fallback
        and workload.kind is WorkloadKind.CONTAINER
        and bool(workload.domainname or "." in workload.hostname)
        and not any(label.startswith(INTERLOCK.prefix) for label in merged)
    )


# --- reading them ------------------------------------------------------------------------------


def _read(
    labels: _Labels, workload: Workload, rules: Rules
) -> tuple[list[RouteDeclaration], list[Rejection]]:
    routes: list[RouteDeclaration] = []
    rejections = list(_told(labels, workload))
    unnamed = labels.routes.get("", {})
    for name in sorted(labels.routes.keys() | ({""} if labels.strangers else set())):
        values = labels.routes.get(name, {})
        if name:
            values = _with_inherited(values, unnamed)
        elif any(labels.routes) and unnamed.keys() <= INHERITABLE:
            # Nothing but what the named ones have from it.
            continue
        reader = Reader(
            values,
            labels.dialect,
            route=name,
            subject=subject_of(workload),
            source=workload.key.source,
        )
        route = read_route(reader, workload, rules, name=name)
        rejections += reader.found
        if route is not None:
            routes.append(route)
    return routes, rejections


def _with_inherited(
    own: Mapping[str, Written], unnamed: Mapping[str, Written]
) -> dict[str, Written]:
    values = dict(own)
    for options, unless in INHERITED:
        if unless.isdisjoint(own):
            values.update({option: unnamed[option] for option in options if option in unnamed})
    return values


def _told(labels: _Labels, workload: Workload) -> Iterable[Rejection]:
    """Tell of every label that is not known, with the spelling that may have been meant."""
    for label in labels.strangers:
        near = _nearest(labels.dialect, label)
        yield _ignored(
            workload,
            f"{shown_label(label)} is not a label that Tidegate knows.",
            f"Did you mean {near}?" if near else "See docs/labels.md for the known labels.",
        )
    for label, why in labels.notes:
        hint = (
            "Use interlock.service_cluster, and ServiceClusters in the configuration, to have "
            "several agents each serve its own services."
            if label == _SERVICE_NAME
            else "Interlock took it for one of them. Use the label itself, or that with a dot and "
            "anything behind."
        )
        yield _ignored(workload, f"{shown_label(label)} {why}, and is not read.", hint)


_LONGEST_GUESSED = 80


def _nearest(dialect: Dialect, label: str) -> str:
    if len(label) > _LONGEST_GUESSED:
        return ""
    spelled = label[len(dialect.prefix) :].lower()
    name, _, rest = label[len(dialect.prefix) :].partition(".")
    if _ROUTE_NAME.fullmatch(name) and name not in _FIRST_WORDS[dialect.prefix]:
        near = difflib.get_close_matches(rest.lower(), _OPTIONS[dialect.prefix], n=1, cutoff=0.8)
        if near:
            return f"{dialect.prefix}{name}.{near[0]}"
    # The prefix would make everything look alike.
    near = difflib.get_close_matches(spelled, _OPTIONS[dialect.prefix], n=1, cutoff=0.7)
    return dialect.prefix + near[0] if near else ""


def _beside(workload: Workload, loser: _Labels) -> Rejection:
    """That the labels of one dialect count, and those of the other do not."""
    if loser.dialect is DOCKER_LB:
        message = (
            "The com.docker.lb labels have no effect beside interlock labels that name a host."
        )
        hint = "Keep one of the two sets."
    else:
        message = (
            "The interlock labels name no host, so the com.docker.lb labels count and they do not."
        )
        hint = "Write them as com.docker.lb labels, which know the same options."
    return _ignored(workload, message, hint)


def _ignored(workload: Workload, message: str, hint: str) -> Rejection:
    return Rejection(
        subject=subject_of(workload),
        reason=Reason.LABEL_IGNORED.value,
        message=message,
        hint=hint,
        source=workload.key.source,
    )
