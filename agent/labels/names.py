"""The names of all options of a route, and which of them a named route has from the unnamed one.

Why one list for both dialects: an option is read, documented and suggested by the same name
wherever it stands; a `Dialect` only says where it is spelled otherwise. This module must not know
what an option means.
"""

from __future__ import annotations

from agent.labels.declaration import DOCKER_LB, INTERLOCK, Dialect

CANARY_OPTIONS = frozenset(
    {"canary.weight", "canary.header", "canary.header_value", "canary.cookie"}
)
CHECK_OPTIONS = frozenset(
    {
        "health_check",
        "health_check_interval",
        "health_check_timeout",
        "health_check_rise",
        "health_check_fall",
        "health_check_status",
        "health_check_host",
    }
)
STICKY_OPTIONS = frozenset(
    {
        "sticky",
        "sticky_max_age",
        "sticky_secure",
        "sticky_http_only",
        "sticky_same_site",
        "sticky_path",
    }
)
CIRCUIT_OPTIONS = frozenset(
    {"circuit_error_ratio", "circuit_min_requests", "circuit_window", "circuit_open"}
)
POLICY_OPTIONS = frozenset(
    {
        *CHECK_OPTIONS,
        *STICKY_OPTIONS,
        *CIRCUIT_OPTIONS,
        "sticky_session_cookie",
        "balance_algorithm",
        "backend_option",
        "ip_hash",
        "hash_key",
        "hash_balance",
        "slow_start",
        "max_conns",
        "queue",
        "queue_timeout",
        "eject_failures",
        "eject_time",
        "eject_max",
        "panic",
        "retries",
        "retry_on",
        "retry_timeout",
        "retry_budget",
        "connect_timeout",
        "send_timeout",
        "read_timeout",
    }
)
FRONT_OPTIONS = frozenset(
    {
        "ssl",
        "ssl_only",
        "ssl_cert",
        "ssl_cert_key",
        "ssl_verify_client",
        "ssl_client_ca",
        "ssl_passthrough",
        "hsts",
    }
)
BACKEND_TLS_OPTIONS = frozenset(
    {
        "ssl_backend_tls_verify",
        "ssl_backend_ca",
        "ssl_backend_name",
        "ssl_backend_cert",
        "ssl_backend_cert_key",
    }
)
LISTS = frozenset({"alias_domain", "hosts", "websocket_endpoint", "redirects", "backend_option"})
"""Options that may be there several times, with a dot and anything behind."""

OPTIONS = frozenset(
    {
        *POLICY_OPTIONS,
        *CANARY_OPTIONS,
        *BACKEND_TLS_OPTIONS,
        *FRONT_OPTIONS,
        *LISTS,
        "hostname",
        "domain",
        "default_backend",
        "tcp_port",
        "port",
        "network",
        "weight",
        "backup",
        "backend_mode",
        "service_cluster",
        "context_root",
        "context_root_rewrite",
        "mirror",
        "ssl_backend",
        "protocol",
        "request_buffering",
    }
)

_SPOKEN = frozenset({"ssl_backend", "protocol", *BACKEND_TLS_OPTIONS})
_PORT = frozenset({"port"})
_OWN_TLS = frozenset({"ssl_passthrough"})


def _by_itself(*options: str) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(options), frozenset(options)


INHERITED: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    _by_itself("domain"),
    _by_itself("network"),
    _by_itself("weight"),
    _by_itself("backup"),
    _by_itself("backend_mode"),
    _by_itself("service_cluster"),
    (_PORT, _PORT),
    # What is spoken at a port belongs to that port.
    (_SPOKEN, _SPOKEN | _PORT),
    (frozenset({"ssl", "ssl_only"}), frozenset({"ssl", "ssl_only"}) | _OWN_TLS),
    (frozenset({"ssl_cert", "ssl_cert_key"}), frozenset({"ssl_cert", "ssl_cert_key"}) | _OWN_TLS),
    (
        frozenset({"ssl_verify_client", "ssl_client_ca"}),
        frozenset({"ssl_verify_client", "ssl_client_ca"}) | _OWN_TLS,
    ),
    (frozenset({"hsts"}), frozenset({"hsts"}) | _OWN_TLS),
)
"""What a named route has from the unnamed one: each first set, unless it has one of the second."""
INHERITABLE = frozenset(option for options, _ in INHERITED for option in options)


def first_words(dialect: Dialect) -> frozenset[str]:
    """Words that are the beginning of an option's label, and so the name of no route."""
    spelled = {dialect.spelled.get(option, option) for option in OPTIONS}
    return frozenset(item.partition(".")[0] for item in OPTIONS | spelled) | _SILENT


_SILENT = INTERLOCK.silent | DOCKER_LB.silent


def options_of(dialect: Dialect) -> dict[str, str]:
    """The options of a dialect by what they are spelled there."""
    return {
        dialect.spelled.get(option, option): option for option in sorted(OPTIONS - dialect.lacks)
    }


def base_of(option: str) -> str:
    """The option that this is, or is an element of: `alias_domain` of `alias_domain.0`."""
    base, dot, suffix = option.partition(".")
    return base if dot and suffix and base in LISTS else option


KNOWN_LABELS = tuple(
    sorted(
        dialect.prefix + spelled
        for dialect in (INTERLOCK, DOCKER_LB)
        for spelled in options_of(dialect)
    )
)
"""Every label of an unnamed route that is known."""
