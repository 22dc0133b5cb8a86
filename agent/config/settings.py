"""The schema of `config.toml`: Interlock's keys as they are, and Tidegate's own in the same style.

Keys are PascalCase and match case-insensitively, like Interlock's. Field names are the snake_case
form; `Key` in messages is always the PascalCase one. Text comes in from `load`; where the text
lies (file, environment, key-value store) is `stores`' business, and what became of each of
Interlock's keys is said in `interlock`. This module must not open anything.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import tomli
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from agent.config import interlock, interlock2
from agent.errors import SettingsError

_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|\u00b5s|\u03bcs|ms|h|m|s)")
LONGEST_SECONDS = 365 * 86400
"""Of any duration: what is longer means never, and is more than a system call can wait for."""
_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}


def parse_duration(value: object) -> object:
    """Read a duration the way Interlock's Go did: "500ms", "1m30s"; a bare number is seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError('expected a duration such as "500ms" or "1m30s"')
        return float(value)
    if not isinstance(value, str):
        raise ValueError('expected a duration such as "500ms" or "1m30s"')
    text = value.strip()
    if text in ("", "0"):
        return 0.0
    parts = _DURATION_PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        raise ValueError('expected a duration such as "500ms" or "1m30s"')
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(ge=0, le=LONGEST_SECONDS),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^\s*(0|({_DURATION_PART.pattern})*)\s*$"},
                {"type": "number", "minimum": 0, "maximum": LONGEST_SECONDS},
            ]
        }
    ),
]


Span = Annotated[Seconds, Field(gt=0)]
"""A time that is never none at all: a loop would spin on it, and a call could not succeed."""

_RETRIED = (
    "error", "timeout", "invalid_header", "http_403", "http_404", "http_429", "http_500",
    "http_502", "http_503", "http_504", "non_idempotent", "off",
)  # fmt: skip


def parse_retried(value: str) -> str:
    """Check the words of proxy_next_upstream, of which nginx knows no others."""
    if not value.split() or not set(value.split()) <= set(_RETRIED):
        raise ValueError(f"expected some of {', '.join(_RETRIED)}, separated by spaces")
    return " ".join(value.split())


def parse_network(value: str) -> str:
    """Check an address or network, and write it as nginx wants it, without bits of a host."""
    try:
        return str(ipaddress.ip_network(value.strip(), strict=False))
    except ValueError:
        raise ValueError('expected an address or a network such as "10.0.0.0/8"') from None


def parse_max_conn(value: int) -> int:
    """Check how many connections a worker is to have; nginx would take numbers that do not work."""
    if not LEAST_CONNECTIONS <= value <= MOST_CONNECTIONS:
        raise ValueError(
            f"expected {LEAST_CONNECTIONS} to {MOST_CONNECTIONS} connections per worker, of which "
            "listeners, peers and health checks take theirs; leave MaxConn out for what "
            "TIDEGATE_WORKER_CONNECTIONS of OpenResty's environment says"
        )
    return value


def parse_worker_processes(value: object) -> object:
    """Check how many workers there are to be."""
    if value == "auto" or (type(value) is int and 1 <= value <= MOST_WORKERS):
        return value
    raise ValueError(
        f'expected 1 to {MOST_WORKERS} workers, or "auto" for one per core; leave WorkerProcesses '
        "out for what TIDEGATE_WORKERS of OpenResty's environment says"
    )


LEAST_CONNECTIONS = 128
"""What a worker needs for itself, with a little room: listeners, timers, checks, the admin API."""
MOST_CONNECTIONS = 1048576
"""As many files as Linux lets a process have open (fs.nr_open)."""
MOST_WORKERS = 128
"""During a reload there are as many old ones, and OpenResty counts in 256 workers."""

MaxConn = Annotated[
    int,
    AfterValidator(parse_max_conn),
    WithJsonSchema(
        {
            "type": "integer",
            "anyOf": [
                {"const": 0},
                {"minimum": LEAST_CONNECTIONS, "maximum": MOST_CONNECTIONS},
            ],
        }
    ),
]
WorkerProcesses = Annotated[
    int | str,
    BeforeValidator(parse_worker_processes),
    WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0, "maximum": MOST_WORKERS}]}
    ),
]


def check_admin_url(value: str) -> str:
    """Whether an instance can be reached there; else its driver would look in the wrong place."""
    expected = 'expected "http://HOST:PORT", "https://HOST:PORT" or "unix:/PATH"'
    if value.startswith("unix:/"):
        return value
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(expected)
    return value


_LISTEN = re.compile(r"\s*(?:\S*:)?([0-9]{1,5})\s*")
_HIGHEST_PORT = 65535


def parse_listen(value: str) -> str:
    """Check an address to listen on, before the next start finds out."""
    found = _LISTEN.fullmatch(value)
    if found is None or int(found[1]) > _HIGHEST_PORT:
        raise ValueError('expected something like ":8080" or "127.0.0.1:8080"')
    return value


def parse_word(value: str) -> str:
    """Check what becomes one word of nginx's configuration: there is no way to write these."""
    if re.search(r"[\x00-\x1f\x7f$]", value):
        raise ValueError("expected text without control characters and without $")
    return value


Word = Annotated[str, AfterValidator(parse_word)]
Network = Annotated[str, AfterValidator(parse_network)]
AdminURL = Annotated[str, AfterValidator(check_admin_url)]
Size = Annotated[str, Field(pattern=r"^\d+[kKmM]?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(ge=1)]


def _unused(default: Any, key: str) -> Any:
    """A key of Interlock's that is accepted, for its type is checked, and does nothing."""
    return Field(
        default,
        description=f"not used: {interlock.EXTENSION_KEYS[key].text}",
        json_schema_extra={"deprecated": True},
    )


def _pascal(name: str) -> str:
    """`tls_ca_cert` → `TLSCACert`: the key under which a field is written."""
    return _SPELLED.get(name) or "".join(part.capitalize() for part in name.split("_"))


_SPELLED = {
    "docker_url": "DockerURL",
    "tls_ca_cert": "TLSCACert",
    "tls_cert": "TLSCert",
    "tls_key": "TLSKey",
    "ssl_port": "SSLPort",
    "ssl_cert_path": "SSLCertPath",
    "ssl_secret_path": "SSLSecretPath",
    "hsts": "HSTS",
    "ssl_ciphers": "SSLCiphers",
    "ssl_protocols": "SSLProtocols",
    "ssl_default_cert": "SSLDefaultCert",
    "ssl_default_cert_key": "SSLDefaultCertKey",
    "ssl_stapling": "SSLStapling",
    "http3": "HTTP3",
    "listen_ipv6": "ListenIPv6",
    "grpc_port": "GRPCPort",
    "urls": "URLs",
    "admin_tls": "AdminTLS",
    "tls_ca": "TLSCA",
    "ssl_cert": "SSLCert",
    "ssl_opts": "SSLOpts",
    "ssl_default_dh_param": "SSLDefaultDHParam",
    "ssl_server_verify": "SSLServerVerify",
    "dh_param": "DHParam",
    "dh_param_path": "DHParamPath",
    "rlimit_no_file": "RLimitNoFile",
    "stats_prometheus_push_gateway_url": "StatsPrometheusPushGatewayURL",
    "stats_influxdb_address": "StatsInfluxDBAddress",
    "stats_influxdb_user": "StatsInfluxDBUser",
    "stats_influxdb_password": "StatsInfluxDBPassword",
    "stats_influxdb_database": "StatsInfluxDBDatabase",
    "stats_influxdb_precision": "StatsInfluxDBPrecision",
}


class _Table(BaseModel):
    model_config = ConfigDict(
        alias_generator=_pascal, populate_by_name=True, extra="forbid", frozen=True, strict=True
    )


class Extension(_Table):
    """`[[Extensions]]`: how the OpenResty side is set up. The first `nginx` or `haproxy` counts."""

    name: str = Field(
        "nginx",
        description="`nginx` or `haproxy`, Interlock's names: both set up OpenResty, and differ in "
        "which time-outs and default certificate they read",
    )
    port: Port = Field(80, description="plain HTTP listener of OpenResty")
    ssl_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        443, description="TLS listener of OpenResty; 0 switches TLS off"
    )
    listen_ipv6: bool = Field(False, description="listen on IPv6 too")
    ssl_cert_path: Word = Field(
        "/etc/tidegate/certs",
        description="directory inside the OpenResty container that `ssl_cert` labels are below",
    )
    ssl_secret_path: str = Field(
        "/run/secrets",
        description="directory inside the OpenResty container that the Docker secrets lie in which "
        "`com.docker.lb.ssl_cert` and the like name",
    )
    hsts: str = Field(
        "max-age=16000000",
        pattern=r"^(off|max-age=\d{1,10}(; ?includeSubDomains)?(; ?preload)?;?)$",
        description="Strict-Transport-Security header of hosts with `ssl_only` that say nothing "
        "else; `off` sends none",
    )
    allowed_directives: tuple[str, ...] = Field(
        (),
        description="names of nginx directives that `backend_option` labels may put into their "
        "location; whoever may deploy can then use them in any way",
    )
    ssl_default_cert: str = Field(
        "", description="certificate for TLS hosts without one and for unknown TLS hosts"
    )
    ssl_default_cert_key: str = Field("", description="key of SSLDefaultCert")
    ssl_cert: str = Field(
        "",
        description="with Name = `haproxy`: one PEM file with certificate and key, the default "
        "certificate, with which every host is served over TLS too",
    )
    ssl_protocols: str = Field("TLSv1.2 TLSv1.3", description="ssl_protocols of nginx")
    ssl_ciphers: Word = Field("HIGH:!aNULL:!MD5", description="ssl_ciphers of nginx")
    ssl_stapling: bool = Field(
        True,
        description="send OCSP answers along with certificates that name a responder; they are "
        "fetched ahead of time, and clients never wait for them",
    )
    http3: bool = Field(
        False,
        description="serve HTTP/3 too, over UDP at SSLPort, where OpenResty was built with it",
    )
    dh_param: bool = Field(False, description="use DHParamPath for DHE key exchange")
    dh_param_path: Word = Field(
        "", description="file with DH parameters inside the OpenResty container"
    )
    redirect_code: Literal[301, 302, 303, 307, 308] = Field(
        308, description="status of the redirect of `ssl_only` hosts; 308 keeps the method"
    )
    proxy_connect_timeout: Positive = Field(
        2, description="seconds until connecting to a peer fails"
    )
    proxy_send_timeout: Positive = Field(
        600, description="seconds that a peer may take between two reads of a request"
    )
    proxy_read_timeout: Positive = Field(
        600, description="seconds that a peer may take between two writes of an answer"
    )
    send_timeout: Positive = Field(
        600, description="seconds that a client may take between two reads of an answer"
    )
    connect_timeout: Positive = Field(
        5000, description="with Name = `haproxy`: ProxyConnectTimeout, in milliseconds"
    )
    server_timeout: Positive = Field(
        10000,
        description="with Name = `haproxy`: ProxyReadTimeout and ProxySendTimeout, in milliseconds",
    )
    client_timeout: Positive = Field(
        10000, description="with Name = `haproxy`: SendTimeout, in milliseconds"
    )
    client_max_body_size: str = Field(
        "2048m", pattern=r"^\d+[kKmMgG]?$", description="largest request body; Interlock's default"
    )
    proxy_next_upstream: Annotated[str, AfterValidator(parse_retried)] = Field(
        "error timeout",
        pattern=r"^[a-z0-9_]+( +[a-z0-9_]+)*$",
        description="when a request is tried on another peer; `off` for never",
    )
    template_path: str = Field(
        "", description="directory of templates that replace the built-in ones by name"
    )
    trusted_proxies: tuple[Network, ...] = Field(
        (),
        description="addresses and networks of proxies in front of OpenResty whose X-Forwarded-* "
        "and Forwarded headers are believed and passed on; everybody else's are overwritten",
    )
    proxy_protocol: bool = Field(
        False,
        description="all public listeners expect the PROXY protocol (v1 or v2); the client's "
        "address in it is believed from TrustedProxies, or from everybody if there are none",
    )
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0,
        description="plain listener for HTTP/2 without TLS alone, for gRPC with an nginx before "
        "1.25.1; newer ones take it on Port too. 0: none",
    )
    nginx_status_from: tuple[Network, ...] = Field(
        (),
        description="addresses and networks that may read /nginx_status on every host, as "
        "Interlock had it; none: it is on the admin listener alone",
    )
    request_buffering: bool = Field(
        True,
        description="receive the body of a request whole before a peer gets any of it, so that it "
        "can be sent again; false passes it on as it comes, and it is never sent again",
    )
    keepalive_timeout: Seconds = Field(
        75.0, description="how long an idle connection of a client is kept open"
    )
    client_body_timeout: Seconds = Field(
        60.0, description="how long a client may take between two parts of a request's body"
    )
    client_body_buffer_size: Size = Field(
        "16k", description="a request's body is kept in memory up to this, else in a file"
    )
    client_header_buffer_size: Size = Field(
        "1k", description="memory for the head of a request that is not unusually long"
    )
    large_client_header_buffers: str = Field(
        "4 8k",
        pattern=r"^\d+ \d+[kKmM]?$",
        description="number and size of buffers for longer heads; no line may be longer than one",
    )
    underscores_in_headers: bool = Field(
        False, description="take request headers with underscores in their names, else drop them"
    )
    hide_info_headers: bool = Field(
        False,
        description="add no headers to answers (X-Request-ID); peers get theirs all the same",
    )
    backend_override_address: str = Field(
        "", description="address for published ports that the engine reports as 0.0.0.0"
    )
    max_conn: MaxConn = Field(
        0,
        description="connections of each worker, to clients and peers together, 128 to 1048576, "
        "some 0.4 kB of memory each; more than OpenResty's limit of open files cannot be used. "
        "0: what TIDEGATE_WORKER_CONNECTIONS of its environment says, by default 8192",
    )
    worker_processes: WorkerProcesses = Field(
        0,
        description='workers of OpenResty, 1 to 128, or `"auto"` for one per core. 0: what '
        "TIDEGATE_WORKERS of its environment says, by default `auto`",
    )
    config_path: str = _unused("", "ConfigPath")
    pid_path: str = _unused("", "PidPath")
    user: str = _unused("", "User")
    rlimit_no_file: int = _unused(0, "RLimitNoFile")
    nginx_plus_enabled: bool = _unused(False, "NginxPlusEnabled")
    ssl_opts: str = _unused("", "SSLOpts")
    ssl_default_dh_param: int = _unused(0, "SSLDefaultDHParam")
    ssl_server_verify: str = _unused("", "SSLServerVerify")
    syslog_addr: str = _unused("", "SyslogAddr")
    admin_user: str = _unused("", "AdminUser")
    admin_pass: str = _unused("", "AdminPass")
    stats_interval: str = _unused("", "StatsInterval")
    stats_backend_type: str = _unused("", "StatsBackendType")
    stats_prometheus_push_gateway_url: str = _unused("", "StatsPrometheusPushGatewayURL")
    stats_influxdb_address: str = _unused("", "StatsInfluxDBAddress")
    stats_influxdb_user: str = _unused("", "StatsInfluxDBUser")
    stats_influxdb_password: str = _unused("", "StatsInfluxDBPassword")
    stats_influxdb_database: str = _unused("", "StatsInfluxDBDatabase")
    stats_influxdb_precision: str = _unused("", "StatsInfluxDBPrecision")

    @property
    def _haproxy(self) -> bool:
        return self.name.lower() == "haproxy"

    @property
    def client_options(self) -> dict[str, str]:
        """nginx's directives for connections of clients and what differs from their defaults."""
        wanted = {
            "keepalive_timeout": _milliseconds(self.keepalive_timeout),
            "client_body_timeout": _milliseconds(self.client_body_timeout),
            "client_body_buffer_size": self.client_body_buffer_size,
            "client_header_buffer_size": self.client_header_buffer_size,
            "large_client_header_buffers": self.large_client_header_buffers,
            "underscores_in_headers": "on" if self.underscores_in_headers else "off",
        }
        fields = type(self).model_fields
        return {
            directive: value
            for directive, value in wanted.items()
            if getattr(self, directive) != fields[directive].default
        }

    def certificate_path(self, name: str) -> str:
        """Where a certificate or key lies in the OpenResty container: below SSLCertPath.

        An absolute path, which only the configuration itself can name, stays as it is.
        """
        return name if name.startswith("/") else f"{self.ssl_cert_path.rstrip('/')}/{name}"

    def secret_path(self, name: str) -> str:
        """Where a Docker secret lies in the OpenResty container: below SSLSecretPath."""
        return f"{self.ssl_secret_path.rstrip('/')}/{name}"

    @property
    def default_certificate(self) -> tuple[str, str] | None:
        """Paths of SSLDefaultCert and its key, which may be in one file; None if there is none.

        The same of HAProxy's SSLCert.
        """
        if not self.ssl_default_cert:
            if not (self._haproxy and self.ssl_cert):
                return None
            path = self.certificate_path(self.ssl_cert)
            return path, path
        key = self.ssl_default_cert_key or self.ssl_default_cert
        return self.certificate_path(self.ssl_default_cert), self.certificate_path(key)

    @property
    def tls_everywhere(self) -> bool:
        """Whether each host speaks TLS, asked for or not: HAProxy's one frontend with SSLCert."""
        return self._haproxy and bool(self.ssl_cert) and self.ssl_port != 0

    @property
    def dh_parameters(self) -> str | None:
        """Path of the file with DH parameters, None if there is none."""
        if not (self.dh_param and self.dh_param_path):
            return None
        return self.certificate_path(self.dh_param_path)

    @property
    def times(self) -> dict[str, str]:
        """nginx's directives for time-outs and their values, by extension in seconds or ms."""
        if self._haproxy:
            server = f"{self.server_timeout}ms"
            connect, client = f"{self.connect_timeout}ms", f"{self.client_timeout}ms"
            return {
                "proxy_connect_timeout": connect,
                "proxy_send_timeout": server,
                "proxy_read_timeout": server,
                "send_timeout": client,
            }
        return {
            "proxy_connect_timeout": f"{self.proxy_connect_timeout}s",
            "proxy_send_timeout": f"{self.proxy_send_timeout}s",
            "proxy_read_timeout": f"{self.proxy_read_timeout}s",
            "send_timeout": f"{self.send_timeout}s",
        }


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


class Rule(_Table):
    """`[Rules.<name>]` of Interlock's beacon: accepted, and does nothing."""

    type: str = Field("", description=f"not used: {interlock.RULES}")
    regex: str = Field("", description=f"not used: {interlock.RULES}")


class OpenResty(_Table):
    """`[OpenResty]`: how the agent finds its OpenResty instances and talks to them."""

    urls: tuple[AdminURL, ...] = Field(
        (), description="admin URLs of instances outside Docker, http://host:port or unix:/path"
    )
    service_name: str = Field(
        "", description="Swarm service that is OpenResty, where it has no interlock.ext.name label"
    )
    admin_port: Port = Field(8081, description="admin port of instances found through Docker")
    admin_network: str = Field(
        "", description="network over which instances are reached; empty tries each that they have"
    )
    admin_tls: bool = Field(False, description="speak HTTPS to instances found through Docker")
    token: str = Field("", description="bearer token of the admin API; TokenFile is better")
    token_file: str = Field(
        "", description="file with the bearer token, a Docker secret; reread when it changes"
    )
    tls_ca: str = Field("", description="CA file that instances' certificates are verified with")
    tls_cert: str = Field("", description="client certificate for the admin API")
    tls_key: str = Field("", description="key of TLSCert")
    timeout: Span = Field(10.0, description="longest wait for an answer of the admin API")
    heartbeat: Span = Field(
        1.5, description="how often each instance is asked for its revision and generation"
    )


class Settings(_Table):
    """All of `config.toml`."""

    listen_addr: Annotated[str, AfterValidator(parse_listen)] = Field(
        ":8080", description="agent's HTTP listener: /metrics, /healthz, /readyz, /api/state"
    )
    enable_metrics: bool = Field(True, description="serve /metrics on ListenAddr")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged, to stderr"
    )
    docker_url: str = Field(
        "",
        description="engine API, several managers with commas between them; empty takes "
        "DOCKER_HOST, then the local socket",
    )
    tls_ca_cert: str = Field(
        "", description="CA of the engine API; without TLS files those of DOCKER_CERT_PATH"
    )
    tls_cert: str = Field("", description="client certificate for the engine API")
    tls_key: str = Field("", description="key of TLSCert")
    allow_insecure: bool = Field(False, description="do not verify the engine's certificate")
    sources: tuple[Literal["auto", "swarm", "engine", "classic", "static"], ...] = Field(
        ("auto",),
        description="where workloads come from; auto: what the engine is, and StaticFile if set",
    )
    static_file: str = Field("", description="TOML file of services and peers outside Docker")
    watch: Literal["auto", "on", "off"] = Field(
        "auto", description="SwarmKit's Watch: on makes its absence an error, off polls only"
    )
    watch_socket: str = Field(
        "/var/run/docker/swarm/control.sock", description="SwarmKit's socket on a manager"
    )
    poll_interval: Seconds = Field(
        0.5,
        description="how often tasks are listed without the watch; where it is set, containers "
        "are listed as often too, beside the events",
    )
    resync_interval: Span = Field(
        60.0, description="how often everything is listed anew, whatever the stream said"
    )
    request_timeout: Span = Field(10.0, description="longest wait for an answer of the engine")
    attach_networks: bool = Field(
        False,
        description="attach proxy containers to the networks that `interlock.network` labels of "
        "containers name, the only call that changes anything at the engine",
    )
    hold_timeout: Seconds = Field(
        15.0,
        description="how long a request may wait for a peer while a replacement is on its way",
    )
    host_linger: Seconds = Field(
        600.0,
        description="how long a host that nobody claims any more stays in the site, at least; what "
        "is lost within one such time goes together, with one reload",
    )
    site_quiet: Seconds = Field(
        0.5, description="a changed site is pushed when it has not changed again for so long"
    )
    site_max_wait: Seconds = Field(5.0, description="but at the latest after so long")
    ready_limit: Seconds = Field(
        60.0, description="/readyz fails when the last good sync of a source is older than this"
    )
    service_clusters: tuple[str, ...] = Field(
        (),
        description="only services whose `service_cluster` label is one of these are served, "
        '`""` stands for those without the label; nothing given serves those without the label',
    )
    hostname_fallback: bool = Field(
        False,
        description="a container without `interlock.hostname` is served by its own host name "
        "(docker run --hostname), as up to Interlock 1.3",
    )
    extensions: tuple[Extension, ...] = ()
    openresty: OpenResty = Field(OpenResty(), alias="OpenResty")
    rules: dict[str, Rule] = Field(
        {},
        description=f"not used: {interlock.RULES}",
        json_schema_extra={"deprecated": True},
    )

    @property
    def polls(self) -> float:
        """Seconds between polls of containers beside the events; 0, unless PollInterval is set."""
        return self.poll_interval if "poll_interval" in self.model_fields_set else 0.0

    @property
    def extension(self) -> Extension:
        """The one extension that sets up OpenResty, with defaults where the file names none."""
        for extension in self.extensions:
            if extension.name.lower() in interlock.SERVING:
                return extension
        return Extension()


@dataclass(frozen=True, slots=True)
class Remark:
    """One warning about a configuration that can be used.

    Attributes:
        text: the sentence, with where it stands.
        unknown: the key is not known, neither here nor to Interlock; `check --strict` fails on it.
    """

    text: str
    unknown: bool = False

    def __str__(self) -> str:
        return self.text


def load(text: str, *, where: str) -> tuple[Settings, tuple[Remark, ...]]:
    """Read the TOML `text` of a configuration that came from `where` (for messages).

    Returns:
        The settings, and a remark for each key that is not known or not used.

    Raises:
        SettingsError: not TOML (with line), or a value of the wrong type or range (with line, key
            path, value and what is expected).
    """
    # Editors of Windows put a mark in front of UTF-8.
    text = text.removeprefix("\ufeff")
    try:
        raw = tomli.loads(text)
    except (ValueError, RecursionError) as error:  # tomli's own, a number of thousands of digits …
        raise SettingsError(f"{where}: not valid TOML: {error}") from error
    reading = _Reading(text, where)
    known = reading.settings(raw)
    try:
        settings = Settings.model_validate_json(json.dumps(known, default=str))
    except ValidationError as error:
        for item in error.errors():
            reading.wrong(item["loc"], item["input"], _expected(item))
    else:
        reading.check_ports(settings)
    if reading.problems:
        raise SettingsError(*reading.problems)
    return settings, tuple(reading.remarks)


_NESTED: dict[str, type[_Table]] = {"Extensions": Extension, "OpenResty": OpenResty}


class _Reading:
    """One text on its way to the schema: what is said about it, and where in it that stands."""

    def __init__(self, text: str, where: str) -> None:
        self._text = text
        self._where = where
        self._origins: interlock2.Origins = {}
        self.remarks: list[Remark] = []
        self.problems: list[str] = []

    def settings(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The values under the schema's spelling, without what means "default"."""
        raw, said, self._origins = interlock2.adapt(raw)
        for text in said:
            self._remark(text)
        known = self._canonical(raw, Settings, path="")
        extensions = known.get("Extensions")
        if isinstance(extensions, list):
            known["Extensions"] = self._extensions(extensions)
        if known.get("Rules"):
            self._remark(f"Rules is not used: {interlock.RULES}")
        return known

    def wrong(self, path: tuple[int | str, ...], value: object, expected: str) -> None:
        """Note a value that cannot be taken."""
        path = (*self._origins.get(path[:3], path[:3]), *path[3:])
        line = _line_of(self._text, path)
        at = f"line {line}: " if line else ""
        self.problems.append(
            f"{self._where}: {at}{_spelled(path)}: got {_shown(value)}, expected {expected}"
        )

    def check_ports(self, settings: Settings) -> None:
        """Note listeners that are on one port: nginx would refuse the whole site for them."""
        extension = settings.extension
        taken = {extension.port: "Port"}
        for key, port in (("SSLPort", extension.ssl_port), ("GRPCPort", extension.grpc_port)):
            if port and port in taken:
                index = settings.extensions.index(extension)
                expected = f"another port than that of {taken[port]}, or 0 for no such listener"
                self.wrong(("Extensions", index, key), port, expected)
            taken.setdefault(port, key)

    def _remark(self, text: str, *, unknown: bool = False) -> None:
        self.remarks.append(Remark(f"{self._where}: {text}", unknown))

    def _canonical(
        self, raw: Mapping[str, Any], table: type[_Table], *, path: str
    ) -> dict[str, Any]:
        """Spell the keys as the schema does; drop the unknown ones with a remark each."""
        spelling = {(f.alias or n).lower(): f.alias or n for n, f in table.model_fields.items()}
        result: dict[str, Any] = {}
        taken: dict[str, str] = {}
        for key, value in raw.items():
            name = spelling.get(key.lower())
            if name is None:
                near = difflib.get_close_matches(key.lower(), spelling, n=1)
                meant = f"; did you mean {spelling[near[0]]}?" if near else ""
                where = self._origins.get(_parts(path, key))
                told = _spelled(where) if where else f"{path}{key}"
                self._remark(f"unknown key {told} is ignored{meant}", unknown=True)
            elif name in taken:
                self._remark(
                    f"{path}{key} is the same key as {path}{taken[name]}, whose value counts; "
                    "remove one of the two"
                )
            elif not _means_default(table, name, value):
                taken[name] = key
                result[name] = self._nested(table, name, value, path=f"{path}{name}")
        return result

    def _nested(self, table: type[_Table], name: str, value: Any, *, path: str) -> Any:
        inner = _NESTED.get(name) if table is Settings else None
        if inner is not None and isinstance(value, dict):
            return self._canonical(value, inner, path=f"{path}.")
        if inner is not None and isinstance(value, list):
            return [
                self._canonical(item, inner, path=f"{path}[{index}].")
                if isinstance(item, dict)
                else item
                for index, item in enumerate(value)
            ]
        if table is Settings and name == "Rules" and isinstance(value, dict):
            return {
                rule: self._canonical(item, Rule, path=f"{path}.{rule}.")
                if isinstance(item, dict)
                else item
                for rule, item in value.items()
            }
        return value

    def _extensions(self, tables: list[Any]) -> list[Any]:
        """Say what of them is used; the tables, with what can still be taken of their values."""
        result, serving = [], ""
        for index, item in enumerate(tables):
            path = f"Extensions[{index}]"
            name = item.get("Name", "nginx") if isinstance(item, dict) else None
            if not isinstance(name, str):
                result.append(item)
                continue
            kind = name.lower()
            if kind == "beacon":
                keys = ", ".join(key for key in item if key != "Name")
                self._remark(
                    f"{path} (beacon{': ' + keys if keys else ''}) is not used: "
                    f"{interlock.EXTENSION_KEYS['StatsInterval'].text}"
                )
            elif kind not in interlock.SERVING:
                self._remark(
                    f"{path}: no extension is called {name}, the table is not used; use nginx or "
                    "haproxy, which both set up OpenResty"
                )
            elif serving:
                self._remark(
                    f"{path} ({name}) is not used: the first one that sets up OpenResty counts, "
                    f"and that is {serving}; put into it what both shall have"
                )
            else:
                serving = f"{path} ({name})"
                for text in interlock.remarks_on(kind, item, f"{path}."):
                    self._remark(text)
                if item.get("ProxyProtocol") and not item.get("TrustedProxies"):
                    self._remark(
                        f"{path}.ProxyProtocol without TrustedProxies: whoever reaches the ports "
                        "can claim any address; name the load balancers in TrustedProxies"
                    )
            result.append(self._adapted(item, index))
        return result

    def _adapted(self, item: dict[str, Any], index: int) -> dict[str, Any]:
        protocols, template = item.get("SSLProtocols"), item.get("TemplatePath")
        if isinstance(template, str) and interlock.is_go_template(template):
            item = {key: value for key, value in item.items() if key != "TemplatePath"}
        if isinstance(protocols, str):
            item = {key: value for key, value in item.items() if key != "SSLProtocols"}
            try:
                if usable := interlock.usable_protocols(protocols):
                    item["SSLProtocols"] = usable
            except ValueError as error:
                self.wrong(("Extensions", index, "SSLProtocols"), protocols, str(error))
        return item


def _means_default(table: type[_Table], name: str, value: object) -> bool:
    """Whether a value stands for "not set", as in what Interlock's `spec` printed.

    That is "" everywhere, and 0 for Interlock's numbers. SSLPort = 0 was no TLS listener, and is.
    """
    if value == "":
        return True
    interlocks = table is Extension and name in interlock.EXTENSION_KEYS
    return interlocks and name != "SSLPort" and value == 0 and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value as it was found, short."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


_LONGEST_SHOWN = 100


def _parts(path: str, key: str) -> tuple[int | str, ...]:
    """`Extensions[0].` and a key as the parts of a path."""
    found = re.fullmatch(r"(\w+)\[(\d+)\]\.", path)
    return (found[1], int(found[2]), key) if found else (path, key)


def _spelled(path: tuple[int | str, ...]) -> str:
    """`Extensions[0].Port`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "tables, [Rules.NAME]",
}


def _expected(item: Any) -> str:
    """What pydantic would have taken, in words of TOML."""
    kind, context = item["type"], item.get("ctx", {})
    if item["loc"] == ("Extensions",):
        return "tables that begin with [[Extensions]]"
    match kind:
        case "literal_error":
            return str(context["expected"])
        case "greater_than":
            return f"more than {context['gt']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "string_pattern_mismatch":
            return f"a string of the form {context['pattern']}"
        case "value_error":
            return str(context["error"]).removeprefix("expected ")
    return _EXPECTED.get(kind, str(item["msg"]))


_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")


def _line_of(text: str, path: tuple[int | str, ...]) -> int | None:
    """The line (from 1) on which the key at `path` stands; None where it is written otherwise.

    The parser keeps no lines. This finds keys written one to a line below their table's header,
    which is how people and Interlock's `spec` write them.
    """
    wanted = [part.lower() if isinstance(part, str) else part for part in path]
    table: list[str | int] = []
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header:
            names = [part.strip().strip("\"'").lower() for part in header[2].split(".")]
            table = list(names)
            if header[1] == "[[":
                counts[header[2]] = counts.get(header[2], -1) + 1
                table.append(counts[header[2]])
            if table == wanted or names == wanted:
                return number
            continue
        key, equals, _ = line.partition("=")
        if equals:
            here = [*table, *(part.strip().strip("\"'").lower() for part in key.split("."))]
            if here == wanted[: len(here)] and len(here) > len(table):
                return number
    return None
