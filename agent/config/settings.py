"""The schema of `config.toml`: Interlock's keys as they are, and Tidegate's own in the same style.

Keys are PascalCase and match case-insensitively, like Interlock's. Field names are the snake_case
form; `Key` in messages is always the PascalCase one. Text comes in from `load`; where the text
lies (file, environment) is `stores`' business. This module must not open anything.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal

import tomli
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from agent.errors import SettingsError

_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|h|m|s)")
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(value: object) -> object:
    """Read a duration the way Interlock's Go did: "500ms", "1m30s"; a bare number is seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        raise ValueError('expected a duration such as "500ms" or "1m30s"')
    text = value.strip()
    if not text:
        return 0.0
    parts = _DURATION_PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        raise ValueError('expected a duration such as "500ms" or "1m30s"')
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]


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
    "ssl_ciphers": "SSLCiphers",
    "ssl_protocols": "SSLProtocols",
    "ssl_default_cert": "SSLDefaultCert",
    "ssl_default_cert_key": "SSLDefaultCertKey",
    "listen_ipv6": "ListenIPv6",
    "urls": "URLs",
    "admin_tls": "AdminTLS",
    "tls_ca": "TLSCA",
}


class _Table(BaseModel):
    model_config = ConfigDict(
        alias_generator=_pascal, populate_by_name=True, extra="forbid", frozen=True, strict=True
    )


class Extension(_Table):
    """`[[Extensions]]`: how the OpenResty side is set up. One entry, `nginx` (Interlock's name)."""

    name: str = Field("nginx", description="which extension the table is for")
    port: Port = Field(80, description="plain HTTP listener of OpenResty")
    ssl_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        443, description="TLS listener of OpenResty; 0 switches TLS off"
    )
    listen_ipv6: bool = Field(False, description="listen on IPv6 too")
    ssl_cert_path: str = Field(
        "/etc/tidegate/certs",
        description="directory inside the OpenResty container that `ssl_cert` labels are below",
    )
    ssl_default_cert: str = Field(
        "", description="certificate for TLS hosts without one and for unknown TLS hosts"
    )
    ssl_default_cert_key: str = Field("", description="key of SSLDefaultCert")
    ssl_protocols: str = Field("TLSv1.2 TLSv1.3", description="ssl_protocols of nginx")
    ssl_ciphers: str = Field("HIGH:!aNULL:!MD5", description="ssl_ciphers of nginx")
    redirect_code: Literal[301, 302, 303, 307, 308] = Field(
        308, description="status of the redirect of `ssl_only` hosts; 308 keeps the method"
    )
    proxy_connect_timeout: Annotated[int, Field(ge=1)] = Field(2, description="seconds")
    proxy_send_timeout: Annotated[int, Field(ge=1)] = Field(600, description="seconds")
    proxy_read_timeout: Annotated[int, Field(ge=1)] = Field(600, description="seconds")
    send_timeout: Annotated[int, Field(ge=1)] = Field(600, description="seconds")
    client_max_body_size: str = Field(
        "2048m", pattern=r"^\d+[kKmMgG]?$", description="largest request body; Interlock's default"
    )
    proxy_next_upstream: str = Field(
        "error timeout",
        pattern=r"^[a-z0-9_]+( [a-z0-9_]+)*$",
        description="when a request is tried on another peer; `off` for never",
    )
    template_path: str = Field(
        "", description="directory of templates that replace the built-in ones by name"
    )
    backend_override_address: str = Field(
        "", description="address for published ports that the engine reports as 0.0.0.0"
    )

    def certificate_path(self, name: str) -> str:
        """Where a certificate or key lies in the OpenResty container: below SSLCertPath.

        An absolute path, which only the configuration itself can name, stays as it is.
        """
        return name if name.startswith("/") else f"{self.ssl_cert_path.rstrip('/')}/{name}"

    @property
    def default_certificate(self) -> tuple[str, str] | None:
        """Paths of SSLDefaultCert and its key, which may be in one file; None if there is none."""
        if not self.ssl_default_cert:
            return None
        key = self.ssl_default_cert_key or self.ssl_default_cert
        return self.certificate_path(self.ssl_default_cert), self.certificate_path(key)


class OpenResty(_Table):
    """`[OpenResty]`: how the agent finds its OpenResty instances and talks to them."""

    urls: tuple[str, ...] = Field(
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
    timeout: Seconds = Field(10.0, description="longest wait for an answer of the admin API")
    heartbeat: Seconds = Field(
        1.5, description="how often each instance is asked for its revision and generation"
    )


class Settings(_Table):
    """All of `config.toml`."""

    listen_addr: str = Field(
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
    resync_interval: Seconds = Field(
        60.0, description="how often everything is listed anew, whatever the stream said"
    )
    request_timeout: Seconds = Field(10.0, description="longest wait for an answer of the engine")
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
    extensions: tuple[Extension, ...] = ()
    openresty: OpenResty = Field(OpenResty(), alias="OpenResty")

    @property
    def polls(self) -> float:
        """Seconds between polls of containers beside the events; 0, unless PollInterval is set."""
        return self.poll_interval if "poll_interval" in self.model_fields_set else 0.0

    @property
    def extension(self) -> Extension:
        """The one extension that sets up OpenResty, with defaults where the file names none."""
        return self.extensions[0] if self.extensions else Extension()


def load(text: str, *, where: str) -> tuple[Settings, tuple[str, ...]]:
    """Read the TOML `text` of a configuration that came from `where` (for messages).

    Returns:
        The settings, and a warning for each key that is not known.

    Raises:
        SettingsError: not TOML (with line), or a value of the wrong type or range (with key path,
            value and what is expected).
    """
    try:
        raw = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise SettingsError(f"{where}: not valid TOML: {error}") from error
    warnings: list[str] = []
    known = _canonical(raw, Settings, path="", where=where, warnings=warnings)
    try:
        settings = Settings.model_validate_json(_json(known))
    except ValidationError as error:
        raise SettingsError(*(_sentence(where, item) for item in error.errors())) from error
    return settings, tuple(warnings)


def _json(value: object) -> str:
    """Strict mode takes a list for a tuple only where it comes from JSON."""
    return json.dumps(value, default=str)


_NESTED: dict[str, type[_Table]] = {"Extensions": Extension, "OpenResty": OpenResty}


def _canonical(
    raw: dict[str, Any], table: type[_Table], *, path: str, where: str, warnings: list[str]
) -> dict[str, Any]:
    """Spell the keys as the schema does; drop the unknown ones with a warning each."""
    spelling = {(f.alias or n).lower(): f.alias or n for n, f in table.model_fields.items()}
    result: dict[str, Any] = {}
    for key, value in raw.items():
        name = spelling.get(key.lower())
        if name is None:
            near = difflib.get_close_matches(key.lower(), spelling, n=1)
            meant = f"; did you mean {spelling[near[0]]}?" if near else ""
            warnings.append(f"{where}: unknown key {path}{key} is ignored{meant}")
            continue
        nested = _NESTED.get(name) if table is Settings else None
        if nested is not None and isinstance(value, dict):
            value = _canonical(value, nested, path=f"{path}{name}.", where=where, warnings=warnings)
        elif nested is not None and isinstance(value, list):
            value = [
                _canonical(
                    item, nested, path=f"{path}{name}[{index}].", where=where, warnings=warnings
                )
                if isinstance(item, dict)
                else item
                for index, item in enumerate(value)
            ]
        result[name] = value
    return result


def _sentence(where: str, item: Any) -> str:
    """One sentence for one fault that pydantic found."""
    path = ""
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return f"{where}: {path}: got {item['input']!r}: {item['msg']}"
