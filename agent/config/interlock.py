"""What became of each key of Interlock 1.4.5's configuration: honoured how, or why not.

Those of Interlock 2 and 3 are in `interlock2`.

Why a table: an Interlock user's `config.toml` has to load as it is, and what is not done any more
has to be said in a sentence with what to use instead, in a warning, in docs/migration.md and in
the JSON Schema alike. This module must not know the schema's types, and reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """Where a key stood."""

    TOP = "top"
    EXTENSION = "Extensions[]"
    TABLE = "Extensions.<name>"
    """Interlock 2 and 3 had a table of tables."""
    TABLE_CONFIG = "Extensions.<name>.Config"
    ENVIRONMENT = "env"
    COMMAND_LINE = "cli"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of Interlock's and what became of it.

    Attributes:
        extensions: names of the extensions that read it; empty for the core's.
        honoured: whether it still does something.
        text: what it does here, or why it does nothing and what to use instead.
    """

    scope: Scope
    name: str
    extensions: tuple[str, ...]
    honoured: bool
    text: str


_NGINX = ("nginx",)
_HAPROXY = ("haproxy",)
_BEACON = ("beacon",)
SERVING = ("nginx", "haproxy")
"""Names of extensions that set up the OpenResty side."""

_NO_BEACON = (
    "Tidegate does not collect statistics of containers; scrape cAdvisor with Prometheus for them, "
    "and /metrics of the agent and of OpenResty for traffic"
)


def _honoured(name: str, text: str, *extensions: str, scope: Scope = Scope.EXTENSION) -> Key:
    return Key(scope, name, extensions, True, text)


def _refused(name: str, text: str, *extensions: str, scope: Scope = Scope.EXTENSION) -> Key:
    return Key(scope, name, extensions, False, text)


def _top(name: str, text: str) -> Key:
    return Key(Scope.TOP, name, (), True, text)


KEYS: tuple[Key, ...] = (
    _top(
        "ListenAddr",
        "the agent's listener, which also has /healthz, /readyz and /api/state; empty is `:8080`",
    ),
    _top(
        "DockerURL",
        "as it was; several addresses, with commas between, are tried in turn; empty takes "
        "DOCKER_HOST, then the local socket",
    ),
    _top("TLSCACert", "as it was; with it the engine is verified, unless AllowInsecure is set"),
    _top("TLSCert", "as it was"),
    _top("TLSKey", "as it was"),
    _top("AllowInsecure", "does what it says, which it did not in Interlock"),
    _top("EnableMetrics", "as it was; the default is true"),
    _top(
        "PollInterval",
        "containers are listed so often in addition to events, the way out where event streams are "
        "cut; without SwarmKit's watch, tasks too; no lower limit of 2 s",
    ),
    _top("Extensions", "the first `nginx` or `haproxy` sets up OpenResty"),
    Key(Scope.TOP, "Rules.<name>.Type", _BEACON, False, _NO_BEACON),
    Key(Scope.TOP, "Rules.<name>.Regex", _BEACON, False, _NO_BEACON),
    _honoured(
        "Name",
        "`nginx` and `haproxy`, in any case, both set up OpenResty; `beacon` is accepted and does "
        "nothing; another name is a warning",
        "nginx",
        "haproxy",
        "beacon",
    ),
    _refused(
        "ConfigPath",
        "OpenResty keeps its configuration itself, in TIDEGATE_RUN_DIR and TIDEGATE_STATE_DIR; put "
        "directives of your own into files in TIDEGATE_CONF_DIR",
        *SERVING,
    ),
    _refused(
        "PidPath",
        "OpenResty keeps its pid file in TIDEGATE_RUN_DIR of its own environment; "
        "set that to move it",
        *SERVING,
    ),
    _honoured(
        "TemplatePath",
        "a directory of Jinja2 templates. A Go template of Interlock's is not read, with a "
        "warning: put what it adds into files in TIDEGATE_CONF_DIR, or into a Jinja2 template",
        *SERVING,
    ),
    _honoured(
        "BackendOverrideAddress",
        "as it was, and no longer lost where `interlock.port` matches",
        *SERVING,
    ),
    _honoured(
        "MaxConn",
        "worker_connections, as nginx's was: of each worker, to clients and peers together "
        "(HAProxy counted those of clients alone). Left out it is not 1024 but "
        "TIDEGATE_WORKER_CONNECTIONS of OpenResty's environment, 8192",
        *SERVING,
    ),
    _honoured("Port", "as it was", *SERVING),
    _honoured(
        "SSLPort",
        "as it was, but left out it is 443; 0 still is no TLS listener, and a host that asks for "
        "TLS is then refused alone",
        *SERVING,
    ),
    _honoured(
        "SSLCertPath",
        "as it was, inside the OpenResty container; empty is `/etc/tidegate/certs`",
        *_NGINX,
    ),
    _honoured(
        "SSLCert",
        "the default certificate (one PEM file with its key, inside the OpenResty container), "
        "and every host is served over TLS with it, as it was. Not a directory: certificates of "
        "hosts are named by `interlock.ssl_cert`",
        *_HAPROXY,
    ),
    _refused(
        "SSLOpts",
        "it is HAProxy's syntax; use SSLProtocols, SSLCiphers and SSLDefaultCert",
        *_HAPROXY,
    ),
    _refused(
        "SSLDefaultDHParam",
        "key exchange is by elliptic curves, which need no parameters; for DHE name a file with "
        "DHParam = true and DHParamPath",
        *_HAPROXY,
    ),
    _refused(
        "SSLServerVerify",
        "there is no global default; say it for each service with the label "
        "`interlock.ssl_backend_tls_verify`",
        *_HAPROXY,
    ),
    _honoured("ConnectTimeout", "proxy_connect_timeout, in milliseconds as it was", *_HAPROXY),
    _honoured(
        "ServerTimeout", "proxy_read_timeout and proxy_send_timeout, in milliseconds", *_HAPROXY
    ),
    _honoured("ClientTimeout", "send_timeout, in milliseconds as it was", *_HAPROXY),
    _refused(
        "SyslogAddr",
        "OpenResty logs to its container's output; use Docker's syslog log driver, and "
        "TIDEGATE_ACCESS_LOG for the access log",
        *_HAPROXY,
    ),
    _refused(
        "AdminUser",
        "there is no statistics page on the public port; /nginx_status and /metrics of OpenResty's "
        "admin listener and `tidegate status` have the numbers",
        *_HAPROXY,
    ),
    _refused(
        "AdminPass",
        "there is no statistics page on the public port; /nginx_status of the admin listener has a "
        "password of its own, TIDEGATE_STATUS_PASSWORD_FILE of OpenResty, and is not served "
        "without one",
        *_HAPROXY,
    ),
    _honoured(
        "DHParam",
        "as it was; without DHParamPath a warning, where nginx refused the whole file before",
        *_NGINX,
    ),
    _honoured("DHParamPath", "as it was, inside the OpenResty container", *_NGINX),
    _refused(
        "NginxPlusEnabled",
        "OpenResty is not NGINX Plus; its numbers are at /metrics of OpenResty's admin listener, "
        "with no template of its own",
        *_NGINX,
    ),
    _refused(
        "User",
        "master and workers run as one user, that of the OpenResty container; set TIDEGATE_USER "
        "in its environment",
        *_NGINX,
    ),
    _honoured(
        "WorkerProcesses",
        "as it was, or `auto`, one per core; left out it is not 2 but TIDEGATE_WORKERS of "
        "OpenResty's environment, `auto`",
        *_NGINX,
    ),
    _refused(
        "RLimitNoFile",
        "OpenResty takes as many files as its container may have; set `ulimits: nofile` of the "
        "service",
        *_NGINX,
    ),
    _honoured("ProxyConnectTimeout", "as it was, in seconds; the default is 2", *_NGINX),
    _honoured("ProxySendTimeout", "as it was, in seconds", *_NGINX),
    _honoured("ProxyReadTimeout", "as it was, in seconds", *_NGINX),
    _honoured("SendTimeout", "as it was, in seconds", *_NGINX),
    _honoured("SSLCiphers", "as it was", *_NGINX),
    _honoured(
        "SSLProtocols",
        "as it was, without SSLv2 and SSLv3, which are left out with a warning; TLSv1 and TLSv1.1 "
        "get one too. The default is `TLSv1.2 TLSv1.3`",
        *_NGINX,
    ),
    _refused("StatsInterval", _NO_BEACON, *_BEACON),
    _refused("StatsBackendType", _NO_BEACON, *_BEACON),
    _refused("StatsPrometheusPushGatewayURL", _NO_BEACON, *_BEACON),
    _refused("StatsInfluxDBAddress", _NO_BEACON, *_BEACON),
    _refused("StatsInfluxDBUser", _NO_BEACON, *_BEACON),
    _refused("StatsInfluxDBPassword", _NO_BEACON, *_BEACON),
    _refused("StatsInfluxDBDatabase", _NO_BEACON, *_BEACON),
    _refused("StatsInfluxDBPrecision", _NO_BEACON, *_BEACON),
    _honoured(
        "INTERLOCK_CONFIG",
        "as it was: the whole text, which beats `-c`; TIDEGATE_CONFIG comes before it",
        scope=Scope.ENVIRONMENT,
    ),
    _honoured("DOCKER_HOST", "as it was, where DockerURL is empty", scope=Scope.ENVIRONMENT),
    _honoured(
        "DOCKER_CERT_PATH",
        "ca.pem, cert.pem and key.pem of this directory, where the settings name no TLS files; "
        "DOCKER_TLS_VERIFY is not needed too",
        scope=Scope.ENVIRONMENT,
    ),
    _honoured(
        "DOCKER_TLS_VERIFY",
        "TLS with verification, with the files of DOCKER_CERT_PATH or `~/.docker`; a TLSCACert "
        "verifies without it",
        scope=Scope.ENVIRONMENT,
    ),
    _honoured("--debug,-D", "as it was, before the command", scope=Scope.COMMAND_LINE),
    _honoured(
        "run --config,-c",
        "as it was, and a change of the file takes effect by itself",
        scope=Scope.COMMAND_LINE,
    ),
    _honoured(
        "run --discovery,-k",
        "as it was, and a change takes effect by itself; etcd by its v3 API too, ZooKeeper, "
        "several endpoints, a key of your own as the path. Without the key the agent waits for it "
        "and touches no proxy",
        scope=Scope.COMMAND_LINE,
    ),
    _honoured(
        "run --discovery-tls-ca-cert",
        "as it was; one of the three is enough to speak TLS",
        scope=Scope.COMMAND_LINE,
    ),
    _honoured("run --discovery-tls-cert", "as it was", scope=Scope.COMMAND_LINE),
    _honoured("run --discovery-tls-key", "as it was", scope=Scope.COMMAND_LINE),
    _honoured(
        "spec",
        "prints a full commented sample, which loads without a warning",
        scope=Scope.COMMAND_LINE,
    ),
)

EXTENSION_KEYS: dict[str, Key] = {key.name: key for key in KEYS if key.scope is Scope.EXTENSION}

RULES = _NO_BEACON
"""Why `[Rules]` do nothing."""

INSTEAD_OF = {
    "ConnectTimeout": "ProxyConnectTimeout",
    "ServerTimeout": "ProxyReadTimeout and ProxySendTimeout",
    "ClientTimeout": "SendTimeout",
    "SSLCert": "SSLDefaultCert",
    "ProxyConnectTimeout": "ConnectTimeout",
    "ProxyReadTimeout": "ServerTimeout",
    "ProxySendTimeout": "ServerTimeout",
    "SendTimeout": "ClientTimeout",
}
"""A key that works under one extension's name, and what works under the other's."""

_PROTOCOLS = ("SSLv2", "SSLv3", "TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_BROKEN = ("SSLv2", "SSLv3")
_OLD = ("TLSv1", "TLSv1.1")
_GO_TEMPLATE = (".template", ".tmpl", ".tpl", ".conf", ".cfg")


def remarks_on(name: str, values: dict[str, object], path: str) -> list[str]:
    """What there is to say of an extension's keys, one sentence each.

    Args:
        name: of the extension, in lower case.
        values: its keys as the schema spells them; none that means "default".
        path: in front of a key in a message, `Extensions[0].`.
    """
    if name not in SERVING:
        return []
    said = []
    for key, value in values.items():
        known = EXTENSION_KEYS.get(key)
        if known is None or value in ("", False):
            continue
        if not known.honoured:
            said.append(f"{path}{key} is not used: {known.text}")
        elif name not in known.extensions and key in INSTEAD_OF:
            said.append(
                f"{path}{key} is not used: it is a key of {known.extensions[0]}'s; "
                f"with Name = {name!r} use {INSTEAD_OF[key]}"
            )
    if values.get("DHParam") and not values.get("DHParamPath"):
        said.append(f"{path}DHParam is not used: name the file in DHParamPath")
    template = values.get("TemplatePath")
    if isinstance(template, str) and is_go_template(template):
        said.append(
            f"{path}TemplatePath is not used: {template} is a file, as for Interlock's Go "
            "templates; here it is a directory of Jinja2 templates. The built-in ones are in force"
        )
    protocols = values.get("SSLProtocols")
    if isinstance(protocols, str):
        said += _remarks_on_protocols(protocols.split(), path)
    return said


def _remarks_on_protocols(words: list[str], path: str) -> list[str]:
    said = []
    broken = [word for word in words if word in _BROKEN]
    if broken:
        said.append(
            f"{path}SSLProtocols: {' and '.join(broken)} is left out: it is broken, and today's "
            "OpenSSL has it no more; use TLSv1.2 TLSv1.3"
        )
    old = [word for word in words if word in _OLD]
    if old:
        said.append(
            f"{path}SSLProtocols: {' and '.join(old)} is deprecated (RFC 8996); use TLSv1.2 TLSv1.3"
        )
    return said


def usable_protocols(text: str) -> str:
    """SSLProtocols without those that nobody has any more; empty where none is left.

    Raises:
        ValueError: a word is no protocol; nginx would refuse the whole site for it.
    """
    words = text.split()
    for word in words:
        if word not in _PROTOCOLS:
            raise ValueError(f"some of {', '.join(_PROTOCOLS[2:])}, separated by spaces")
    return " ".join(word for word in words if word not in _BROKEN)


def is_go_template(path: str) -> bool:
    """Whether TemplatePath names a file, as Interlock's did, by the look of it."""
    return path.endswith(_GO_TEMPLATE)
