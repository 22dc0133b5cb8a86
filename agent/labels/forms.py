"""The forms that values of labels have: each function takes text and gives what it means.

Labels are written by whoever may deploy a service, so every value is untrusted text: it is taken
in only where it matches a strict form, and everything behind may rely on that. A function here
raises `InvalidValueError` and nothing else. This module must not know which label has which form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from encodings.idna import nameprep
from typing import TypeVar

T = TypeVar("T")


class InvalidValueError(Exception):
    """A value is not of the form that its label takes; says what is wrong and the cure."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


_SHOWN = 60
_LONGEST_VALUE = 1024
_LONGEST_PATH = 255
_LONGEST_HOST = 253
_LONGEST_ROOT = 240
"""Then the name of an upstream, also a canary's of the longest host, stays below 512 bytes."""

_TRUE = frozenset({"", "true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_HOST_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_KEPT_LETTER = re.compile("([ß\u1e9eς])")
_JOINER = re.compile("[\u200c\u200d]")
_FULL_STOP = re.compile("[.\u3002\uff0e\uff61]")
_PATH_SEGMENT = re.compile(r"[A-Za-z0-9._~!&+,=:@*-]+")
_FILE_SEGMENT = re.compile(r"[A-Za-z0-9._@+=~-]+")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
_CLUSTER = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_.-]{0,62})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUMBER = re.compile(r"[0-9]{1,7}")
_FRACTION = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,6})?|\.[0-9]{1,6})(%?)")
_DURATION_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_URL_PREFIX = re.compile(r"(?:wss?|https?)://[^/]*", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_COOKIE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HEADER_VALUE = re.compile(r"[ -~]{1,128}")
_STATUSES = re.compile(r"[1-5][0-9]{2}(?:-[1-5][0-9]{2})?(?:,[1-5][0-9]{2}(?:-[1-5][0-9]{2})?)*")
_HSTS = re.compile(
    r"max-age=[0-9]{1,10}(?: *; *includeSubDomains)?(?: *; *preload)? *;?", re.IGNORECASE
)
_AGE = re.compile(r"[0-9]{1,10}")
_HOST_AND_PORT = re.compile(r"[A-Za-z0-9_.-]{1,253}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\]")
_COOKIE_PATH = re.compile(r"/[A-Za-z0-9._~!&+,=:@*/-]{0,254}")

_NOT_IN_HOSTS = (
    (
        "/",
        "is more than a host name",
        "write the name alone, without http://; a path belongs into context_root",
    ),
    (":", "is more than a host name", "write the name alone, without scheme and port"),
    (",", "is several host names", "write each into a label of its own, with .0, .1 and so on"),
)
_RESERVED_HOSTS = frozenset({"00-default"})
"""Names whose file the site has a use of its own for."""
_RESERVED_FIRST_LABEL = "_wildcard"
_OWN_SEGMENT = ".tidegate"
"""First part of paths that locations of every host are called by (`nginx/conf.d/mirror.inc`)."""
CANARY = "@canary"
"""End of the name of a canary's upstream, and so of no context root."""


def shown(text: str) -> str:
    """Quote untrusted text for a message: shortened, everything but printable ASCII escaped."""
    if len(text) <= _SHOWN:
        return json.dumps(text)
    return f"{json.dumps(text[:_SHOWN] + '...')} ({len(text)} characters)"


def shown_label(label: str) -> str:
    """The name of a label for a message: as it is where that is safe."""
    plain = label.isascii() and label.isprintable() and " " not in label
    return label if plain and len(label) <= _SHOWN else shown(label)


def clean(value: str, *, ascii_only: bool) -> str:
    """Trim spaces; refuse what no label has a use for before anything looks at it closely."""
    if len(value) > _LONGEST_VALUE:
        raise InvalidValueError(
            f"is longer than {_LONGEST_VALUE} characters",
            "shorten the value, or give a list as several labels with .0, .1 and so on",
        )
    value = value.strip(" \t")
    if _CONTROL.search(value):
        raise InvalidValueError("has a control character in it", "remove the character")
    if ascii_only and not value.isascii():
        raise InvalidValueError("has a character outside ASCII", "remove the character")
    return value


def host(text: str) -> str:
    """Check a host name and bring it to the one form that is compared and rendered.

    Lower case, no dot at the end, IDN as punycode; `*.` in front is taken as nginx takes it.
    Underscores are tolerated, since service names have them.
    """
    hint = "use letters, digits and hyphens, labels of at most 63 characters joined by dots"
    if len(text) > _LONGEST_HOST + 1:
        raise InvalidValueError(f"is longer than {_LONGEST_HOST} characters", hint)
    for mark, what, cure in _NOT_IN_HOSTS:
        if mark in text:
            raise InvalidValueError(what, cure)
    star, name = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    if not name.isascii():
        try:
            name = _punycode(name)
        except UnicodeError:
            raise InvalidValueError(
                "is not a valid internationalised host name", hint + ", or the punycode form"
            ) from None
    name = star + name.lower().removesuffix(".")
    if not name:
        raise InvalidValueError("is empty", "name the host, for example app.example.com")
    if len(name) > _LONGEST_HOST:
        raise InvalidValueError(f"is longer than {_LONGEST_HOST} characters", hint)
    if not all(_HOST_LABEL.fullmatch(label) for label in name.removeprefix("*.").split(".")):
        raise InvalidValueError("is not a host name", hint)
    if name in _RESERVED_HOSTS or name.split(".", 1)[0] == _RESERVED_FIRST_LABEL:
        raise InvalidValueError("is a name that Tidegate keeps for itself", "choose another name")
    return name


def _punycode(name: str) -> str:
    """A name with other letters as clients ask for it.

    Python knows the rules of 2003, which made `ß` into `ss` and a final sigma into a plain one;
    today they are letters of their own, and `straße.de` is not `strasse.de`. So they are left as
    they are. Joiners, which 2003 took off, need rules of their own. Raises UnicodeError.
    """
    if _JOINER.search(name):
        raise UnicodeError("a joiner")
    if not _KEPT_LETTER.search(name):
        return name.encode("idna").decode("ascii")
    labels = []
    for label in _FULL_STOP.split(name):
        if _KEPT_LETTER.search(label):
            parts = _KEPT_LETTER.split(label.replace("\u1e9e", "ß"))
            kept = "".join(part if part in ("ß", "ς") else nameprep(part) for part in parts)
            labels.append("xn--" + kept.encode("punycode").decode("ascii"))
        else:
            labels.append(label.encode("idna").decode("ascii"))
    return ".".join(labels)


def server_name(text: str) -> str:
    """The host name of one server: no wildcard."""
    if text.startswith("*."):
        raise InvalidValueError("is a wildcard", "name one server")
    return host(text)


def boolean(text: str) -> bool:
    """true, 1, yes, on, nothing at all; or false, 0, no, off; in whatever case."""
    word = text.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise InvalidValueError(
        "is neither true nor false", "write true, 1, yes, on (or nothing), or false, 0, no, off"
    )


def number(low: int, high: int) -> Callable[[str], int]:
    """The form of whole numbers in a range."""

    def parse(text: str) -> int:
        if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
            raise InvalidValueError(
                f"is not a whole number from {low} to {high}",
                f"write a number from {low} to {high}",
            )
        return int(text)

    return parse


def share(low: float = 0.0, high: float = 1.0) -> Callable[[str], float]:
    """The form of shares of a whole: `0.2` or `20%`."""

    def parse(text: str) -> float:
        match = _FRACTION.fullmatch(text)
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not low <= value <= high:
            raise InvalidValueError(
                f"is not a share from {low:g} to {high:g}", "write it as 0.2 or as 20%"
            )
        return value

    return parse


def duration(low: float, high: float, *, unit: float = 1.0) -> Callable[[str], float]:
    """The form of times, in seconds: `500ms`, `2s`, `1m30s`; a bare number is of `unit` seconds."""

    def parse(text: str) -> float:
        match = _FRACTION.fullmatch(text)
        parts = _DURATION_PART.findall(text)
        if match and not match[2]:
            value = float(match[1]) * unit
        elif parts and "".join(amount + of for amount, of in parts) == text:
            value = sum(float(amount) * _SECONDS[of] for amount, of in parts)
        else:
            value = -1.0
        value = round(value, 6)
        if not low <= value <= high:
            raise InvalidValueError(
                f"is not a time from {low:g} to {high:g} seconds",
                "write it as 500ms, 2s or 1m30s; a number without a unit is in "
                + ("seconds" if unit == 1.0 else "milliseconds"),
            )
        return value

    return parse


def word(meanings: Mapping[str, T], *, on: T | None = None) -> Callable[[str], T]:
    """The form of one word of several, in whatever case; with `on`, of booleans too.

    Args:
        on: what true means; false means what the first word does.
    """

    def parse(text: str) -> T:
        found = meanings.get(text.lower())
        if found is not None:
            return found
        if on is not None and text.lower() in _TRUE | _FALSE:
            return on if text.lower() in _TRUE else next(iter(meanings.values()))
        known = " or ".join(meanings)
        raise InvalidValueError(f"is not {known}", f"write {known}")

    return parse


def port(text: str) -> int:
    """A port."""
    return number(1, 65535)(text)


def network(text: str) -> str:
    """The name of a network, or nothing."""
    if text and not _NETWORK.fullmatch(text):
        raise InvalidValueError(
            "is not the name of a network", "write the name that `docker network ls` shows"
        )
    return text


def cluster(text: str) -> str:
    """The name of a service cluster, or nothing."""
    if not _CLUSTER.fullmatch(text):
        raise InvalidValueError(
            "is not the name of a service cluster", "use letters, digits, dots, - and _"
        )
    return text


def path(text: str) -> str:
    """A plain path, without a slash at its end."""
    hint = "write a path such as /api, from letters, digits and -._~!&+,=:@*"
    if text in ("", "/"):
        return "/"
    if not text.startswith("/"):
        raise InvalidValueError("does not start with a slash", hint)
    if len(text) > _LONGEST_PATH:
        raise InvalidValueError(f"is longer than {_LONGEST_PATH} characters", hint)
    segments = text.removesuffix("/").split("/")[1:]
    if not all(_PATH_SEGMENT.fullmatch(part) and part not in (".", "..") for part in segments):
        raise InvalidValueError("is not a plain path", hint)
    return "/" + "/".join(segments)


def context_root(text: str) -> str:
    """A plain path that no upstream or location of Tidegate's own is called by."""
    found = path(text)
    if len(found) > _LONGEST_ROOT:
        raise InvalidValueError(
            f"is longer than {_LONGEST_ROOT} characters", "choose a shorter path"
        )
    if found.endswith(CANARY):
        raise InvalidValueError(
            f"ends with {CANARY}, which Tidegate keeps for itself", "choose another path"
        )
    if found.split("/", 2)[1] == _OWN_SEGMENT:
        raise InvalidValueError(
            f"begins with /{_OWN_SEGMENT}, which Tidegate keeps for itself", "choose another path"
        )
    return found


def websocket_path(text: str) -> str:
    """A path; of a URL, as Interlock's documentation shows one, its path."""
    return path(_URL_PREFIX.sub("", text, count=1))


def file_name(text: str) -> str:
    """A file name below the certificate directory, or nothing; a slash in front is cut."""
    hint = "write a file name below SSLCertPath, such as app.pem or shop/app.pem"
    if not text:
        return ""
    name = text.lstrip("/")
    if len(name) > _LONGEST_PATH:
        raise InvalidValueError(f"is longer than {_LONGEST_PATH} characters", hint)
    segments = name.split("/")
    if not all(_FILE_SEGMENT.fullmatch(part) and part not in (".", "..") for part in segments):
        raise InvalidValueError("is not a plain file name", hint)
    return name


def secret_name(text: str) -> str:
    """The name of a Docker secret, a file directly in the directory of the secrets; or nothing."""
    if text and (
        not _FILE_SEGMENT.fullmatch(text) or text in (".", "..") or len(text) > _LONGEST_PATH
    ):
        raise InvalidValueError(
            "is not the name of a Docker secret",
            "write the name under which the secret is mounted in OpenResty (docker secret ls)",
        )
    return text


def name(text: str) -> str:
    """The name of a header or an argument."""
    if not _NAME.fullmatch(text):
        raise InvalidValueError(
            "is not a name", "use 1 to 128 letters, digits, hyphens and underscores"
        )
    return text


def cookie_name(text: str) -> str:
    """The name of a cookie: with dots too, as `connect.sid` and `ASP.NET_SessionId` have them."""
    if not _COOKIE_NAME.fullmatch(text):
        raise InvalidValueError(
            "is not the name of a cookie",
            "use 1 to 128 letters, digits, dots, hyphens and underscores",
        )
    return text


def header_value(text: str) -> str:
    """What a header may be compared with."""
    if not _HEADER_VALUE.fullmatch(text):
        raise InvalidValueError(
            "is not the value of a header", "write 1 to 128 printable characters"
        )
    return text


def cookie_path(text: str) -> str:
    """The Path attribute of a cookie."""
    if not _COOKIE_PATH.fullmatch(text):
        raise InvalidValueError("is not the path of a cookie", "write a path such as / or /api")
    return text


def statuses(text: str) -> str:
    """Statuses of HTTP: `200`, `200-399`, with commas between."""
    joined = text.replace(" ", "")
    ranges = (part.partition("-") for part in joined.split(","))
    if not _STATUSES.fullmatch(joined) or len(joined) > 100:
        problem = True
    else:
        problem = any(last and int(first) > int(last) for first, _, last in ranges)
    if problem:
        raise InvalidValueError("is not a list of statuses", "write 200, 200-399 or 200,204,301")
    return joined


def check_host(text: str) -> str:
    """The Host header of a health check."""
    if not _HOST_AND_PORT.fullmatch(text):
        raise InvalidValueError("is not a host", "write a host name, with a port if need be")
    return text


HSTS_DEFAULT = "default"
"""Stands for the value of Strict-Transport-Security that the settings have."""


def hsts(text: str) -> str:
    """The value of Strict-Transport-Security; empty for none, or `HSTS_DEFAULT`."""
    if _AGE.fullmatch(text) and text not in ("0", "1"):
        return f"max-age={text}"
    if _HSTS.fullmatch(text):
        parts = [part.strip() for part in text.rstrip("; ").split(";")]
        spelled = {"includesubdomains": "includeSubDomains", "preload": "preload"}
        return "; ".join(spelled.get(part.lower(), part.lower()) for part in parts)
    try:
        return HSTS_DEFAULT if boolean(text) else ""
    except InvalidValueError:
        raise InvalidValueError(
            "is no value of Strict-Transport-Security",
            "write true, false, a number of seconds, or max-age=N; includeSubDomains; preload",
        ) from None


def hash_key(text: str) -> str:
    """What consistent hashing looks at."""
    kind, colon, what = text.partition(":")
    kind = kind.lower()
    if kind in ("ip", "uri") and not colon:
        return kind
    form = _COOKIE_NAME if kind == "cookie" else _NAME
    if kind in ("header", "cookie", "arg") and form.fullmatch(what):
        return f"{kind}:{what}"
    raise InvalidValueError(
        "is nothing to hash by", "write ip, uri, header:NAME, cookie:NAME or arg:NAME"
    )


def load_bound(text: str) -> float:
    """How much of the mean load a peer may get, 0 for any."""
    match = _FRACTION.fullmatch(text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if value != 0 and not 1.0 < value <= 100.0:
        raise InvalidValueError(
            "is not a number above 1", "write for example 1.25: at most 125% of the mean load"
        )
    return value


_RETRY_ON = frozenset(
    {
        "error",
        "timeout",
        "invalid_header",
        "non_idempotent",
        *(f"http_{status}" for status in (403, 404, 429, 500, 502, 503, 504)),
    }
)


def retry_on(text: str) -> tuple[str, ...]:
    """What is tried again, in nginx's words."""
    words = text.lower().replace(",", " ").split()
    if not words or not set(words) <= _RETRY_ON:
        raise InvalidValueError(
            "is not a list of what is tried again", f"use {', '.join(sorted(_RETRY_ON))}"
        )
    return tuple(dict.fromkeys(words))


def mirror(text: str) -> tuple[str, str]:
    """Host and context root of another route: HOST[/ROOT]."""
    name_, slash, root = text.partition("/")
    return host(name_), path(slash + root)


_REDIRECT_END = re.compile(
    r"(?:(https?)://)?([^/:,;\s]+)(?::([0-9]{1,5}))?((?:/[A-Za-z0-9._~!&+=@*-]*)*)", re.IGNORECASE
)


def redirect(text: str) -> tuple[str, str]:
    """`SOURCE,TARGET`: the host of the source, and the target.

    The target is a host with a scheme, a port and a path if need be, in the one form that is
    compared and rendered.
    """
    hint = "write SOURCE,TARGET, for example http://old.example.com,https://new.example.com"
    source, comma, target = (part.strip() for part in text.partition(","))
    match = _REDIRECT_END.fullmatch(source), _REDIRECT_END.fullmatch(target)
    if not comma or match[0] is None or match[1] is None:
        raise InvalidValueError("is not a redirect", hint)
    if match[0][3] or match[0][4].strip("/"):
        raise InvalidValueError("has more than a host as its source", hint)
    name_ = host(match[0][2])
    to = host(match[1][2])
    if to.startswith("*."):
        raise InvalidValueError("has a wildcard as its target", hint)
    scheme, port_ = (match[1][1] or "").lower(), match[1][3]
    where = to + (f":{port(port_)}" if port_ else "") + path(match[1][4].rstrip("/")).rstrip("/")
    origin = (match[0][1] or "").lower()
    to_tls = origin != "https" and scheme == "https" and where == to
    if to == name_ and not port_ and not to_tls:
        raise InvalidValueError("redirects to itself", hint)
    return name_, f"{scheme}://{where}" if scheme else where
