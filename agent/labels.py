"""Label dialects: what the labels of a workload ask for, as route declarations or rejections.

Labels are written by whoever may deploy a service, so every value is untrusted text: it is taken
in only where it matches a strict form, and everything behind this module may rely on that. Each
dialect (today Interlock's) produces the same `RouteDeclaration`, so that nothing behind this
module knows how a label was spelled. This module must not look at networks, ports or instances:
whether a declaration can be served is `agent.compile`'s business.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from agent.model import Policy, Rejection, Workload, WorkloadKind

T = TypeVar("T")

_DEFAULT_POLICY = Policy()


class Reason(StrEnum):
    """Why something is not routed: the closed set that labels and compile draw from."""

    NO_HOSTNAME = "no_hostname"
    INVALID_HOST = "invalid_host"
    INVALID_LABEL = "invalid_label"
    LABEL_IGNORED = "label_ignored"
    """A label without effect; the route itself lives."""
    NETWORK_UNKNOWN = "network_unknown"
    NETWORK_NOT_SHARED = "network_not_shared"
    NETWORK_AMBIGUOUS = "network_ambiguous"
    NO_PORT = "no_port"
    NOT_PUBLISHED = "not_published"
    INSTANCE_NO_ADDRESS = "instance_no_address"
    """Some running instances cannot be reached; the others serve."""
    TOO_MANY_PEERS = "too_many_peers"
    NO_CERTIFICATE = "no_certificate"
    TLS_OFF = "tls_off"
    CONFLICT = "conflict"
    TLS_CONFLICT = "tls_conflict"


@dataclass(frozen=True, slots=True)
class RouteDeclaration:
    """One route that a workload asks for, in whatever dialect it asked.

    Attributes:
        host: server name, checked, lower case, IDN in ASCII form, possibly `*.example.com`.
        aliases: further server names, checked, sorted, without `host`.
        context_root: "/" or a checked path without a slash at its end.
        rewrite: the context root is taken off before the request goes to the upstream.
        port: container port; None leaves it to what the workload declares.
        network: name as written in the label, empty leaves it to what is shared.
        weight: weight of each peer; None leaves it to the source.
        tls: whether the host speaks TLS; None says nothing and takes what others say.
        tls_only: plain HTTP is redirected to TLS.
        certificate, certificate_key: checked file names below the certificate directory, or empty.
        websocket_endpoints: checked paths, sorted.
        policy: how the upstream chooses among its peers.
    """

    host: str
    aliases: tuple[str, ...] = ()
    context_root: str = "/"
    rewrite: bool = False
    port: int | None = None
    network: str = ""
    weight: int | None = None
    tls: bool | None = None
    tls_only: bool = False
    certificate: str = ""
    certificate_key: str = ""
    websocket_endpoints: tuple[str, ...] = ()
    policy: Policy = _DEFAULT_POLICY


@dataclass(frozen=True, slots=True)
class Reading:
    """What the labels of one workload came to; both empty where it asks for nothing."""

    routes: tuple[RouteDeclaration, ...] = ()
    rejections: tuple[Rejection, ...] = ()


NOTHING = Reading()


def read_labels(workload: Workload) -> Reading:
    """Read the labels of `workload`, its own first and those of its template second, per label."""
    merged = {**workload.template_labels, **workload.labels}
    subject, source = subject_of(workload), workload.key.source
    readings = [dialect(merged, subject, source) for dialect in _DIALECTS]
    found = [reading for reading in readings if reading is not NOTHING]
    if len(found) == 1:
        return found[0]
    return Reading(
        routes=tuple(route for reading in found for route in reading.routes),
        rejections=tuple(item for reading in found for item in reading.rejections),
    )


_KIND_WORDS = {
    WorkloadKind.SERVICE: "service",
    WorkloadKind.CONTAINER: "container",
    WorkloadKind.STATIC: "static service",
}


def subject_of(workload: Workload) -> str:
    """How rejections name a workload: "service shop_web", "container web-1"."""
    return f"{_KIND_WORDS[workload.kind]} {workload.name}"


_SHOWN = 60


def shown(text: str) -> str:
    """Quote untrusted text for a message: shortened, everything but printable ASCII escaped."""
    if len(text) <= _SHOWN:
        return json.dumps(text)
    return f"{json.dumps(text[:_SHOWN] + '...')} ({len(text)} characters)"


class _InvalidValueError(Exception):
    """A value is not of the form that its label takes; says what is wrong and the cure."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


_LONGEST_VALUE = 1024
_LONGEST_PATH = 255
_LONGEST_HOST = 253

_TRUE = frozenset({"", "true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_HOST_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PATH_SEGMENT = re.compile(r"[A-Za-z0-9._~!&+,=:@*-]+")
_FILE_SEGMENT = re.compile(r"[A-Za-z0-9._@+=~-]+")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUMBER = re.compile(r"[0-9]{1,6}")
_URL_PREFIX = re.compile(r"(?:wss?|https?)://[^/]*", re.IGNORECASE)

_RESERVED_HOSTS = frozenset({"00-default"})
"""Names whose file the site has a use of its own for."""
_RESERVED_FIRST_LABEL = "_wildcard"


def parse_host(text: str) -> str:
    """Check a host name and bring it to the one form that is compared and rendered.

    Lower case, no dot at the end, IDN as punycode; `*.` in front is taken as nginx takes it.
    Underscores are tolerated, since service names have them.

    Raises:
        _InvalidValueError: not a host name.
    """
    hint = "use letters, digits and hyphens, labels of at most 63 characters joined by dots"
    if len(text) > _LONGEST_HOST + 1:
        raise _InvalidValueError(f"is longer than {_LONGEST_HOST} characters", hint)
    star, name = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            raise _InvalidValueError(
                "is not a valid internationalised host name", hint + ", or the punycode form"
            ) from None
    name = star + name.lower().removesuffix(".")
    if not name:
        raise _InvalidValueError("is empty", "name the host, for example app.example.com")
    if len(name) > _LONGEST_HOST:
        raise _InvalidValueError(f"is longer than {_LONGEST_HOST} characters", hint)
    if not all(_HOST_LABEL.fullmatch(label) for label in name.removeprefix("*.").split(".")):
        raise _InvalidValueError("is not a host name", hint)
    if name in _RESERVED_HOSTS or name.split(".", 1)[0] == _RESERVED_FIRST_LABEL:
        raise _InvalidValueError("is a name that Tidegate keeps for itself", "choose another name")
    return name


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise _InvalidValueError(
        "is neither true nor false", "write true, 1, yes, on (or nothing), or false, 0, no, off"
    )


def _number(text: str, *, low: int, high: int) -> int:
    if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise _InvalidValueError(
            f"is not a whole number from {low} to {high}", f"write a number from {low} to {high}"
        )
    return int(text)


def _port(text: str) -> int:
    return _number(text, low=1, high=65535)


def _weight(text: str) -> int:
    return _number(text, low=0, high=1000)


def _network(text: str) -> str:
    if text and not _NETWORK.fullmatch(text):
        raise _InvalidValueError(
            "is not the name of a network", "write the name that `docker network ls` shows"
        )
    return text


def _path(text: str) -> str:
    hint = "write a path such as /api, from letters, digits and -._~!&+,=:@*"
    if text in ("", "/"):
        return "/"
    if not text.startswith("/"):
        raise _InvalidValueError("does not start with a slash", hint)
    if len(text) > _LONGEST_PATH:
        raise _InvalidValueError(f"is longer than {_LONGEST_PATH} characters", hint)
    segments = text.removesuffix("/").split("/")[1:]
    if not all(_PATH_SEGMENT.fullmatch(part) and part not in (".", "..") for part in segments):
        raise _InvalidValueError("is not a plain path", hint)
    return "/" + "/".join(segments)


def _websocket_path(text: str) -> str:
    """A path; of a URL, as Interlock's documentation shows one, its path."""
    return _path(_URL_PREFIX.sub("", text, count=1))


def _file(text: str) -> str:
    """A file name below the certificate directory; a slash in front is as good as none."""
    hint = "write a file name below SSLCertPath, such as app.pem or shop/app.pem"
    name = text.lstrip("/")
    if not name:
        raise _InvalidValueError("is empty", hint)
    if len(name) > _LONGEST_PATH:
        raise _InvalidValueError(f"is longer than {_LONGEST_PATH} characters", hint)
    segments = name.split("/")
    if not all(_FILE_SEGMENT.fullmatch(part) and part not in (".", "..") for part in segments):
        raise _InvalidValueError("is not a plain file name", hint)
    return name


_PREFIX = "interlock."
_SINGLE = (
    "hostname",
    "domain",
    "port",
    "network",
    "context_root",
    "context_root_rewrite",
    "ssl",
    "ssl_only",
    "ssl_cert",
    "ssl_cert_key",
    "weight",
)
_LISTS = ("alias_domain", "websocket_endpoint")
_NOT_ROUTES = ("ext", "app")
_NOT_YET = (
    "ssl_backend",
    "ssl_backend_tls_verify",
    "ip_hash",
    "health_check",
    "health_check_interval",
    "balance_algorithm",
    "backend_option",
)
KNOWN_LABELS = tuple(_PREFIX + name for name in (*_SINGLE, *_LISTS, *_NOT_YET))
"""Every label of a route that is known by name, also those without effect yet."""


def _interlock(merged: Mapping[str, str], subject: str, source: str) -> Reading:
    """Interlock's dialect: `interlock.hostname` and its companions."""
    asked = {
        label: value
        for label, value in merged.items()
        if label[: len(_PREFIX)].lower() == _PREFIX
        and label[len(_PREFIX) :].split(".", 1)[0] not in _NOT_ROUTES
    }
    if not asked:
        return NOTHING
    reader = _Reader(asked, subject, source)
    reader.note_strangers()
    route = _interlock_route(reader)
    return Reading(
        routes=() if route is None else (route,), rejections=tuple(sorted(reader.found, key=_by))
    )


_DIALECTS: tuple[Callable[[Mapping[str, str], str, str], Reading], ...] = (_interlock,)


def _by(rejection: Rejection) -> tuple[str, str, str]:
    return rejection.subject, rejection.reason, rejection.message


def _interlock_route(reader: _Reader) -> RouteDeclaration | None:
    """The one route of a set of labels, or None where something about it is not acceptable."""
    host = _interlock_host(reader)
    aliases = reader.several("alias_domain", parse_host, reason=Reason.INVALID_HOST)
    context_root = reader.one("context_root", _path, "/")
    endpoints = reader.several("websocket_endpoint", _websocket_path, reason=Reason.INVALID_LABEL)
    rewrite = reader.one("context_root_rewrite", _boolean, False)
    port = reader.one("port", _port, None)
    network = reader.one("network", _network, "")
    weight = reader.one("weight", _weight, None)
    tls = reader.one("ssl", _boolean, None)
    tls_only = reader.one("ssl_only", _boolean, False)
    certificate = reader.one("ssl_cert", _file, "")
    certificate_key = reader.one("ssl_cert_key", _file, "")
    if tls_only and tls is False:
        reader.reject(
            Reason.INVALID_LABEL,
            "interlock.ssl_only is on while interlock.ssl is off.",
            "Remove interlock.ssl (interlock.ssl_only implies it), or turn interlock.ssl_only off.",
        )
    if reader.refused or host is None:
        return None
    if not (tls or tls_only):
        for name in ("ssl_cert", "ssl_cert_key"):
            if _PREFIX + name in reader.labels:
                reader.note(
                    f"{_PREFIX}{name} has no effect without interlock.ssl.",
                    "Add interlock.ssl=true if the host shall speak TLS.",
                )
    inside = [path for path in endpoints if _below(path, context_root)]
    for path in endpoints:
        if path not in inside:
            reader.note(
                f"interlock.websocket_endpoint {path} does not lie below the context root "
                f"{context_root}, which is all that this route serves.",
                "Websockets work everywhere below the context root without this label.",
            )
    return RouteDeclaration(
        host=host,
        aliases=tuple(sorted(set(aliases) - {host})),
        context_root=context_root,
        rewrite=rewrite and context_root != "/",
        port=port,
        network=network,
        weight=weight,
        tls=True if tls_only else tls,
        tls_only=tls_only,
        certificate=certificate,
        certificate_key=certificate_key,
        websocket_endpoints=tuple(sorted(set(inside))),
    )


def _below(path: str, root: str) -> bool:
    return root == "/" or path == root or path.startswith(root + "/")


def _interlock_host(reader: _Reader) -> str | None:
    """Put the host name together from `hostname` and `domain`, as Interlock did."""
    if _PREFIX + "hostname" not in reader.labels:
        reader.reject(
            Reason.NO_HOSTNAME,
            "There are interlock labels, but no interlock.hostname, so there is no host to route.",
            "Add the label interlock.hostname (and interlock.domain).",
        )
        return None
    first = reader.text("hostname", reason=Reason.INVALID_HOST)
    domain = reader.text("domain", default="local", reason=Reason.INVALID_HOST)
    if first is None or domain is None:
        return None
    first, domain = first.removesuffix("."), domain.removesuffix(".")
    if not first or first.lower() == domain.lower():
        name = domain
    else:
        name = f"{first}.{domain}" if domain else first
    try:
        return parse_host(name)
    except _InvalidValueError as error:
        reader.reject(
            Reason.INVALID_HOST,
            f"interlock.hostname={shown(first)} and interlock.domain={shown(domain)} make "
            f"{shown(name)}, which {error.problem}.",
            _sentence(error.hint),
        )
        return None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


class _Reader:
    """Reads a set of labels one by one and collects what is wrong with them.

    `refused` turns True with the first fault that the route cannot live with.
    """

    def __init__(self, labels: Mapping[str, str], subject: str, source: str) -> None:
        self.labels = labels
        self.found: list[Rejection] = []
        self.refused = False
        self._subject = subject
        self._source = source

    def reject(self, reason: Reason, message: str, hint: str) -> None:
        """Refuse the route."""
        self.refused = True
        self._add(reason, message, hint)

    def note(self, message: str, hint: str) -> None:
        """Tell of a label without effect; the route lives."""
        self._add(Reason.LABEL_IGNORED, message, hint)

    def text(
        self, name: str, *, reason: Reason = Reason.INVALID_LABEL, default: str = ""
    ) -> str | None:
        """The trimmed value of a label; None, and the route refused, where it is no clean text."""
        try:
            return self._clean(self.labels.get(_PREFIX + name, default), ascii_only=False)
        except _InvalidValueError as error:
            self._invalid(_PREFIX + name, reason, error)
            self.refused = True
            return None

    def one(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """The value of a label that may be there once; a bad one refuses the route."""
        label = _PREFIX + name
        if label not in self.labels:
            return default
        try:
            return parse(self._clean(self.labels[label], ascii_only=True))
        except _InvalidValueError as error:
            self._invalid(label, Reason.INVALID_LABEL, error)
            self.refused = True
            return default

    def several(self, name: str, parse: Callable[[str], T], *, reason: Reason) -> list[T]:
        """The values of `name` and `name.<suffix>`; a bad one is refused alone."""
        values: list[T] = []
        for label in sorted(self.labels):
            if not _is_of_list(label, name):
                continue
            try:
                values.append(
                    parse(self._clean(self.labels[label], ascii_only=parse is not parse_host))
                )
            except _InvalidValueError as error:
                self._invalid(label, reason, error)
        return values

    def note_strangers(self) -> None:
        """Tell of every label that is not known, with the spelling that may have been meant."""
        for label in sorted(self.labels):
            name = label.removeprefix(_PREFIX)
            if label in KNOWN_LABELS and name not in _NOT_YET:
                continue
            if any(_is_of_list(label, item) for item in _LISTS):
                continue
            if name in _NOT_YET or _is_of_list(label, "backend_option"):
                self.note(
                    f"{_shown_label(label)} is a label of Interlock that this version of Tidegate "
                    "does not act on.",
                    "The route works without it; see docs/labels.md for what is supported.",
                )
                continue
            near = (
                difflib.get_close_matches(label.lower(), KNOWN_LABELS, n=1, cutoff=0.8)
                if len(label) <= _SHOWN
                else []
            )
            self.note(
                f"{_shown_label(label)} is not a label that Tidegate knows.",
                f"Did you mean {near[0]}?" if near else "See docs/labels.md for the known labels.",
            )

    def _clean(self, value: str, *, ascii_only: bool) -> str:
        """Trim spaces; refuse what no label has a use for before anything looks at it closely."""
        if len(value) > _LONGEST_VALUE:
            raise _InvalidValueError(
                f"is longer than {_LONGEST_VALUE} characters", "shorten the value"
            )
        value = value.strip(" \t")
        if _CONTROL.search(value):
            raise _InvalidValueError("has a control character in it", "remove the character")
        if ascii_only and not value.isascii():
            raise _InvalidValueError("has a character outside ASCII", "remove the character")
        return value

    def _invalid(self, label: str, reason: Reason, error: _InvalidValueError) -> None:
        self._add(
            reason,
            f"{_shown_label(label)}={shown(self.labels.get(label, ''))} {error.problem}.",
            _sentence(error.hint),
        )

    def _add(self, reason: Reason, message: str, hint: str) -> None:
        self.found.append(
            Rejection(
                subject=self._subject,
                reason=reason.value,
                message=message,
                hint=hint,
                source=self._source,
            )
        )


def _is_of_list(label: str, name: str) -> bool:
    """Exactly `interlock.NAME`, or that with a dot and a suffix; never a name that contains it."""
    base = _PREFIX + name
    return label == base or (label.startswith(base + ".") and len(label) > len(base) + 1)


def _shown_label(label: str) -> str:
    plain = label.isascii() and label.isprintable() and " " not in label
    return label if plain and len(label) <= _SHOWN else shown(label)
