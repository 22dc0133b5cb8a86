"""HAProxy's and nginx's own words, in `balance_algorithm`, `health_check` and `backend_option`.

Interlock wrote these values into the proxy's file as they were. Each that has a meaning here is
given it, each other one is refused with a sentence; a raw nginx directive passes only where the
operator allows it by name, as one simple directive. This module must not read labels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from agent.labels import forms
from agent.labels.forms import InvalidValueError
from agent.model import Algorithm, Check, CheckKind


@dataclass(frozen=True, slots=True)
class Balance:
    """An algorithm, and what it hashes."""

    algorithm: Algorithm
    key: str = ""


_BALANCE = {
    "roundrobin": Balance(Algorithm.ROUND_ROBIN),
    "round_robin": Balance(Algorithm.ROUND_ROBIN),
    "static-rr": Balance(Algorithm.ROUND_ROBIN),
    "leastconn": Balance(Algorithm.LEAST_CONN),
    "least_conn": Balance(Algorithm.LEAST_CONN),
    "source": Balance(Algorithm.HASH, "ip"),
    "ip_hash": Balance(Algorithm.HASH, "ip"),
    "uri": Balance(Algorithm.HASH, "uri"),
    "hash": Balance(Algorithm.HASH),
    "first": Balance(Algorithm.FIRST),
    "ewma": Balance(Algorithm.EWMA),
    "random": Balance(Algorithm.RANDOM),
    "random(1)": Balance(Algorithm.RANDOM),
}
_DRAWS = re.compile(r"random\((?:[2-9]|[1-9][0-9])\)")
_HEADER = re.compile(r"hdr\(([A-Za-z0-9_-]{1,128})\)", re.IGNORECASE)
_PARAMETER = re.compile(r"url_param\s+([A-Za-z0-9_-]{1,128})", re.IGNORECASE)


def balance(text: str) -> Balance:
    """An algorithm of HAProxy's or of our own."""
    word = " ".join(text.split()).lower()
    if found := _BALANCE.get(word):
        return found
    if _DRAWS.fullmatch(word):
        # Of so many drawn the least loaded one: two are drawn here.
        return Balance(Algorithm.EWMA)
    if match := _HEADER.fullmatch(text):
        return Balance(Algorithm.HASH, f"header:{match[1]}")
    if match := _PARAMETER.fullmatch(text):
        return Balance(Algorithm.HASH, f"arg:{match[1]}")
    base = word.split(" ", 1)[0].split("(", 1)[0]
    if base in ("uri", "url_param", "hdr", "rdp-cookie", "source", "random"):
        raise InvalidValueError(
            "is an algorithm of HAProxy's, or an argument of one, that Tidegate does not have",
            "use uri, url_param NAME, hdr(NAME), source or random, without further arguments",
        )
    raise InvalidValueError(
        "is not a balancing algorithm",
        "use roundrobin, leastconn, source, uri, first, static-rr, url_param NAME, hdr(NAME), "
        "random, random(N), hash or ewma",
    )


_URL = r"/[A-Za-z0-9._~!$&'()*+,;=:@%/?\[\]-]{0,1000}"
_HTTP_CHECK = re.compile(
    rf"(?:(?P<method>[A-Za-z]{{1,16}})\s+)?(?P<path>{_URL})"
    r"(?:\s+HTTP/1\.[01](?:\\r\\nHost:(?:\\ |\s)*(?P<host>[A-Za-z0-9_.:-]{1,253}))?)?",
    re.IGNORECASE,
)
_URL_CHECK = re.compile(
    rf"http://(?P<host>[A-Za-z0-9_.:-]{{1,253}})(?P<path>{_URL})?", re.IGNORECASE
)
_TCP_WORDS = frozenset({"tcp", "tcp-check", "ssl-hello-chk", "check"})
_OTHER_CHECKS = frozenset(
    {
        "external-check",
        "ldap-check",
        "mysql-check",
        "pgsql-check",
        "redis-check",
        "smtpchk",
        "spop-check",
        "lb-agent-chk",
        "agent-check",
    }
)
_CHECK_HINT = "write tcp, a path such as /ping, GET /ping, or httpchk GET /ping"


def check(text: str) -> Check | None:
    """A health check: HAProxy's `httpchk GET /ping`, or shorter; None for none."""
    word = text.lower()
    if word in _TCP_WORDS:
        return Check(CheckKind.TCP)
    if word == "http":
        return Check(CheckKind.HTTP)
    if word.split(" ", 1)[0] in _OTHER_CHECKS:
        raise InvalidValueError(
            "is a check of a protocol that Tidegate does not speak",
            "use tcp, which checks that connections are accepted",
        )
    rest, method = text, "GET"
    if word.split(" ", 1)[0] == "httpchk":
        # Without a method HAProxy asks for OPTIONS.
        rest, method = text[len("httpchk") :].strip(), "OPTIONS"
        if not rest:
            return Check(CheckKind.HTTP, method=method)
    if match := _URL_CHECK.fullmatch(rest):
        return Check(CheckKind.HTTP, path=match["path"] or "/", host=match["host"])
    if match := _HTTP_CHECK.fullmatch(rest):
        return Check(
            CheckKind.HTTP,
            method=(match["method"] or method).upper(),
            path=match["path"],
            host=match["host"] or "",
        )
    try:
        return Check(CheckKind.TCP) if forms.boolean(text) else None
    except InvalidValueError:
        raise InvalidValueError("is not a health check", _CHECK_HINT) from None


@dataclass(frozen=True, slots=True)
class Option:
    """What a `backend_option` comes to: one of these, or nothing at all as it is so anyway.

    Attributes:
        told: why it has no effect, what follows "this option" in a sentence.
        protective: to do without it would open what it closes.
        directive: a raw nginx directive for the location, with its semicolon.
        name: name of that directive.
    """

    balance: Balance | None = None
    check: Check | None = None
    told: str = ""
    directive: str = ""
    name: str = ""
    protective: bool = False


_AS_IT_IS = frozenset({"forwardfor", "redispatch", "http-keep-alive", "abortonclose", "allbackups"})
_CLOSING = "is about closing connections to the peers, which are kept and used again for any client"
_LOGGING = "is about HAProxy's log; OpenResty's is set up by TIDEGATE_ACCESS_LOG in its environment"
_SOCKETS = "sets up HAProxy's sockets, which are nginx's here and not a matter of one service"
_STICKY = "is about HAProxy's sessions; use the sticky labels"
_PARSER = "is about HAProxy's way to read and write HTTP, which is nginx's here"
_WITHOUT_EFFECT = {
    "httpclose": _CLOSING,
    "forceclose": _CLOSING,
    "http-server-close": _CLOSING,
    "http-tunnel": _CLOSING,
    "http-pretend-keepalive": _CLOSING,
    "idle-close-on-response": _CLOSING,
    "log-health-checks": "is about HAProxy's log; what checks find is in OpenResty's metrics and "
    "in GET /v1/membership",
    "dontlognull": _LOGGING,
    "dontlog-normal": _LOGGING,
    "httplog": _LOGGING,
    "httpslog": _LOGGING,
    "tcplog": _LOGGING,
    "logasap": _LOGGING,
    "log-separate-errors": _LOGGING,
    "contstats": "is about HAProxy's statistics; OpenResty's are at /metrics of its admin listener",
    "socket-stats": "is about HAProxy's statistics; OpenResty's are at /metrics of its admin "
    "listener",
    "persist": _STICKY,
    "prefer-last-server": _STICKY,
    "nolinger": _SOCKETS,
    "tcpka": _SOCKETS,
    "clitcpka": _SOCKETS,
    "srvtcpka": _SOCKETS,
    "tcp-smart-accept": _SOCKETS,
    "tcp-smart-connect": _SOCKETS,
    "splice-auto": _SOCKETS,
    "splice-request": _SOCKETS,
    "splice-response": _SOCKETS,
    "independent-streams": _SOCKETS,
    "transparent": "sends the requests to where the client wanted to go, which an ingress cannot",
    "originalto": "sends X-Original-To; X-Forwarded-Host and X-Forwarded-Port tell the same",
    "accept-invalid-http-request": _PARSER,
    "accept-invalid-http-response": _PARSER,
    "accept-unsafe-violations-in-http-request": _PARSER,
    "accept-unsafe-violations-in-http-response": _PARSER,
    "checkcache": _PARSER,
    "h1-case-adjust-bogus-client": _PARSER,
    "h1-case-adjust-bogus-server": _PARSER,
    "http-buffer-request": _PARSER,
    "http-ignore-probes": _PARSER,
    "http-no-delay": _PARSER,
    "http-restrict-req-hdr-names": _PARSER,
    "http-use-htx": _PARSER,
    "http-use-proxy-header": _PARSER,
    "http_proxy": "makes HAProxy a forward proxy, which an ingress is not",
    **dict.fromkeys(
        sorted(_OTHER_CHECKS),
        "checks a protocol that Tidegate does not speak; use health_check = tcp",
    ),
}


def option(text: str) -> Option:
    """What one `backend_option` means; one that ends with a semicolon is an nginx directive."""
    if text.endswith(";"):
        return _directive(text)
    words = text.split()
    word = words[0].lower() if words else ""
    if word == "option" and len(words) > 1:
        return option(" ".join(words[1:]))
    if word in ("httpchk", "tcp-check", "ssl-hello-chk"):
        told = ""
        if word == "ssl-hello-chk":
            told = "is done as a TCP check: that a connection is accepted, without a TLS hello"
        return Option(check=check(text if word == "httpchk" else word), told=told)
    if word in _AS_IT_IS:
        if len(words) > 1:
            return Option(told=f"is always in force ({word}), and its arguments have no effect")
        return Option()
    if word in _WITHOUT_EFFECT:
        return Option(told=_WITHOUT_EFFECT[word])
    raise InvalidValueError(
        "is no backend option of HAProxy's that Tidegate knows, and no nginx directive",
        "remove it; an nginx directive ends with a semicolon",
    )


def protects(text: str) -> bool:
    """Whether a value that is no option was meant to restrict who gets in, however written."""
    return _PROTECTIVE_WORD.search(text) is not None


# A variable's name is taken whole and never shorter (`*+`): read in all ways that there are, a
# label of some dozen variables would keep us busy for ever.
_NAME = r"[a-z][a-z0-9_]{0,63}"
_WORD = r"(?:[A-Za-z0-9_./:,=%+*@^~?!&|()<>\[\]-]|\$[a-z_][a-z0-9_]*+)+"
_QUOTED = r'"(?:[^"\\${};\x00-\x1f\x7f-\uffff]|\$[a-z_][a-z0-9_]*+)*"'
_SIMPLE = re.compile(rf"({_NAME})((?:\s+(?:{_WORD}|{_QUOTED}))*)\s*;")
_OUR_VARIABLE = re.compile(r"\$tidegate", re.IGNORECASE)

_POOLING = "is about connections to the peers, which OpenResty keeps and shares by itself"
_OF_UPSTREAMS = {
    "keepalive": _POOLING,
    "keepalive_requests": _POOLING,
    "keepalive_time": _POOLING,
    "keepalive_timeout": _POOLING,
    "zone": "is not needed: peers are in shared memory",
    "state": "is not needed: peers come from the agent",
    "server": "names a peer; peers come from Docker, others from the static file",
    "resolver": "is not needed: peers come with their addresses",
    "resolver_timeout": "is not needed: peers come with their addresses",
    "queue": "is set by the labels queue and queue_timeout",
    "sticky": "is set by the label sticky",
    "ntlm": "is of NGINX Plus, and not to be had",
    "least_time": "is of NGINX Plus; use balance_algorithm = ewma",
}
"""Directives of an `upstream` block, where Interlock put them."""
_PROTECTIVE = re.compile(
    r"(?:allow|deny|satisfy|auth_.*|limit_.*|secure_link.*|valid_referers|internal)"
)
_PROTECTIVE_WORD = re.compile(rf"(?:^|[\s;{{])(?:{_PROTECTIVE.pattern})(?=[\s;]|$)", re.IGNORECASE)
_HASH_KEYS = MappingProxyType(
    {
        "$remote_addr": "ip",
        "$binary_remote_addr": "ip",
        "$request_uri": "uri",
        "$uri": "uri",
    }
)
_HASH_VARIABLE = re.compile(r"\$(cookie|http|arg)_([a-z0-9_]{1,128})")
_HASH_KINDS = {"cookie": "cookie", "http": "header", "arg": "arg"}


def _directive(text: str) -> Option:
    match = _SIMPLE.fullmatch(text)
    if match is None or _OUR_VARIABLE.search(text):
        raise InvalidValueError(
            "is not one simple nginx directive",
            "write a name, arguments without braces or backslashes, and one semicolon",
        )
    name, arguments = match[1], match[2].split()
    if name == "least_conn":
        return Option(balance=Balance(Algorithm.LEAST_CONN))
    if name == "ip_hash":
        return Option(balance=Balance(Algorithm.HASH, "ip"))
    if name == "random":
        two = arguments[:1] == ["two"]
        return Option(balance=Balance(Algorithm.EWMA if two else Algorithm.RANDOM))
    if name == "hash":
        return Option(balance=Balance(Algorithm.HASH, _nginx_key(arguments)))
    if name in _OF_UPSTREAMS:
        return Option(told=_OF_UPSTREAMS[name])
    words = " ".join([name, *_words(match[2])])
    return Option(
        directive=f"{words};", name=name, protective=_PROTECTIVE.fullmatch(name) is not None
    )


_ARGUMENT = re.compile(rf"{_QUOTED}|{_WORD}")


def _words(arguments: str) -> list[str]:
    return _ARGUMENT.findall(arguments)


def _nginx_key(arguments: list[str]) -> str:
    key = arguments[0] if arguments else ""
    if key in _HASH_KEYS and arguments[1:] in ([], ["consistent"]):
        return _HASH_KEYS[key]
    match = _HASH_VARIABLE.fullmatch(key)
    if match and arguments[1:] in ([], ["consistent"]):
        name = match[2].replace("_", "-") if match[1] == "http" else match[2]
        return f"{_HASH_KINDS[match[1]]}:{name}"
    raise InvalidValueError(
        "hashes by something that Tidegate does not hash by",
        "use $remote_addr, $request_uri, $cookie_NAME, $http_NAME or $arg_NAME, or the label "
        "hash_key",
    )
