"""What became of each key of Interlock 2's and 3's configuration, and such a file in our form.

Why: these files (Docker Enterprise, MKE) set up services as much as a proxy, and their extensions
are a table of tables, `[Extensions.NAME]` with a `Config` table within. What set up nginx is taken
over; who creates the services is the operator now. Keys at the top level are Interlock 1's, but
for one. This module must not know the schema's types, and reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.config.interlock import Key, Scope

_NO_SERVICES = (
    "Tidegate creates no services; deploy agent and OpenResty yourself, as stack.yml does, and say "
    "it there"
)
_PUBLISH = "publish the ports of the OpenResty service in stack.yml"
_CONF_DIR = "put directives of your own into files in TIDEGATE_CONF_DIR of OpenResty"

_TAKEN: Mapping[str, tuple[str, ...]] = {
    "TargetPort": ("Port",),
    "TargetSSLPort": ("SSLPort",),
}
_TAKEN_OF_CONFIG: Mapping[str, tuple[str, ...]] = {
    "ConnectTimeout": ("ProxyConnectTimeout",),
    "SendTimeout": ("ProxySendTimeout",),
    "ReadTimeout": ("ProxyReadTimeout",),
    "ServerTimeout": ("ProxyReadTimeout", "ProxySendTimeout"),
    "ClientTimeout": ("SendTimeout",),
    "MaxConnections": ("MaxConn",),
    "WorkerProcesses": ("WorkerProcesses",),
    "SSLDefaultDHParamPath": ("DHParamPath",),
    "SSLCiphers": ("SSLCiphers",),
    "SSLProtocols": ("SSLProtocols",),
    "HideInfoHeaders": ("HideInfoHeaders",),
    "KeepaliveTimeout": ("KeepaliveTimeout",),
    "ClientMaxBodySize": ("ClientMaxBodySize",),
    "ClientBodyBufferSize": ("ClientBodyBufferSize",),
    "ClientHeaderBufferSize": ("ClientHeaderBufferSize",),
    "LargeClientHeaderBuffers": ("LargeClientHeaderBuffers",),
    "ClientBodyTimeout": ("ClientBodyTimeout",),
    "UnderscoresInHeaders": ("UnderscoresInHeaders",),
}
"""Key to the keys of `[[Extensions]]` that mean the same."""


def _as(scope: Scope, name: str, more: str = "") -> Key:
    ours = (_TAKEN if scope is Scope.TABLE else _TAKEN_OF_CONFIG)[name]
    same = "as it was" if ours == (name,) else " and ".join(ours) + " of `[[Extensions]]`"
    return Key(scope, name, (), True, same + more)


def _not(scope: Scope, name: str, text: str) -> Key:
    return Key(scope, name, (), False, text)


KEYS: tuple[Key, ...] = (
    _not(
        Scope.TOP,
        "EndpointOverride",
        "agent and OpenResty find each other without; see [OpenResty] for addresses",
    ),
    *(
        _not(Scope.TABLE, name, _NO_SERVICES)
        for name in (
            "Image",
            "Args",
            "Labels",
            "Networks",
            "ContainerLabels",
            "Constraints",
            "PlacementPreferences",
            "ServiceName",
            "ProxyImage",
            "ProxyArgs",
            "ProxyLabels",
            "ProxyContainerLabels",
        )
    ),
    _not(
        Scope.TABLE,
        "ProxyServiceName",
        f"{_NO_SERVICES}; the agent finds OpenResty by the label interlock.ext.name=nginx, or by "
        "ServiceName of [OpenResty]",
    ),
    _not(
        Scope.TABLE,
        "ProxyConfigPath",
        "OpenResty keeps its configuration itself, in TIDEGATE_RUN_DIR and TIDEGATE_STATE_DIR",
    ),
    *(
        _not(Scope.TABLE, name, _NO_SERVICES)
        for name in (
            "ProxyReplicas",
            "ProxyStopSignal",
            "ProxyStopGracePeriod",
            "ProxyConstraints",
            "ProxyPlacementPreferences",
            "ProxyUpdateDelay",
        )
    ),
    _not(
        Scope.TABLE,
        "ServiceCluster",
        "name the clusters that this agent serves at the top level, ServiceClusters; for others "
        "deploy another agent with OpenResty instances of its own",
    ),
    *(_not(Scope.TABLE, name, _PUBLISH) for name in ("PublishMode", "PublishedPort")),
    _as(Scope.TABLE, "TargetPort"),
    _not(Scope.TABLE, "PublishedSSLPort", _PUBLISH),
    _as(Scope.TABLE, "TargetSSLPort"),
    _not(
        Scope.TABLE,
        "Template",
        "it is a Go template; put what it adds into files in TIDEGATE_CONF_DIR of OpenResty, or "
        "into a Jinja2 template below TemplatePath of `[[Extensions]]`",
    ),
    *(
        _not(
            Scope.TABLE,
            name,
            "every change is taken over without replacing a task, and needs no service for that",
        )
        for name in ("HitlessServiceUpdate", "ConfigImage", "ConfigServiceName")
    ),
    _not(
        Scope.TABLE_CONFIG,
        "User",
        "master and workers run as one user; set TIDEGATE_USER in OpenResty's environment",
    ),
    _not(Scope.TABLE_CONFIG, "PidPath", "set TIDEGATE_RUN_DIR in OpenResty's environment"),
    _as(
        Scope.TABLE_CONFIG,
        "MaxConnections",
        "; left out it is TIDEGATE_WORKER_CONNECTIONS of OpenResty's environment, 8192",
    ),
    _as(Scope.TABLE_CONFIG, "ConnectTimeout"),
    _as(Scope.TABLE_CONFIG, "SendTimeout"),
    _as(Scope.TABLE_CONFIG, "ReadTimeout"),
    _as(Scope.TABLE_CONFIG, "ServerTimeout"),
    _as(Scope.TABLE_CONFIG, "ClientTimeout"),
    _not(
        Scope.TABLE_CONFIG,
        "IPHash",
        "there is no global default; say it for each service with the label com.docker.lb.ip_hash",
    ),
    _not(
        Scope.TABLE_CONFIG,
        "SSLOpts",
        "use SSLProtocols, SSLCiphers and SSLDefaultCert of `[[Extensions]]`",
    ),
    _not(
        Scope.TABLE_CONFIG,
        "SSLDefaultDHParam",
        "key exchange is by elliptic curves, which need no parameters; for DHE name a file in "
        "SSLDefaultDHParamPath",
    ),
    _as(Scope.TABLE_CONFIG, "SSLDefaultDHParamPath", ", with DHParam = true"),
    _not(
        Scope.TABLE_CONFIG,
        "SSLVerify",
        "there is no global default; say it for each service with the label "
        "com.docker.lb.ssl_backend_tls_verify",
    ),
    _as(
        Scope.TABLE_CONFIG,
        "WorkerProcesses",
        ", or `auto`; left out it is TIDEGATE_WORKERS of OpenResty's environment, `auto`",
    ),
    _not(
        Scope.TABLE_CONFIG,
        "RLimitNoFile",
        "OpenResty takes as many files as its container may have; set `ulimits: nofile` of the "
        "service",
    ),
    _as(Scope.TABLE_CONFIG, "SSLCiphers"),
    _as(Scope.TABLE_CONFIG, "SSLProtocols"),
    _as(
        Scope.TABLE_CONFIG,
        "HideInfoHeaders",
        "; X-Request-ID is the only such header that there is still",
    ),
    _as(Scope.TABLE_CONFIG, "KeepaliveTimeout"),
    _as(Scope.TABLE_CONFIG, "ClientMaxBodySize", ", but the default is 2048m"),
    _as(Scope.TABLE_CONFIG, "ClientBodyBufferSize", ", but the default is 16k"),
    _as(Scope.TABLE_CONFIG, "ClientHeaderBufferSize"),
    _as(Scope.TABLE_CONFIG, "LargeClientHeaderBuffers"),
    _as(Scope.TABLE_CONFIG, "ClientBodyTimeout"),
    _as(Scope.TABLE_CONFIG, "UnderscoresInHeaders"),
    _not(
        Scope.TABLE_CONFIG,
        "ServerNamesHashBucketSize",
        "it is as large as the longest name needs",
    ),
    _not(
        Scope.TABLE_CONFIG,
        "UpstreamZoneSize",
        "upstreams are in one piece of shared memory; set TIDEGATE_DICT_SIZE in OpenResty's "
        "environment",
    ),
    *(
        _not(Scope.TABLE_CONFIG, name, _CONF_DIR)
        for name in ("GlobalOptions", "DefaultOptions", "HTTPOptions", "TCPOptions")
    ),
    _not(
        Scope.TABLE_CONFIG,
        "AccessLogPath",
        "set TIDEGATE_ACCESS_LOG (`stdout` or a path; off by default) in OpenResty's environment",
    ),
    _not(
        Scope.TABLE_CONFIG,
        "ErrorLogPath",
        "set TIDEGATE_ERROR_LOG (default stderr) in OpenResty's environment",
    ),
    *(
        _not(
            Scope.TABLE_CONFIG,
            name,
            "the access log is lines of JSON; for another one put `log_format` and `access_log` "
            "into a file in TIDEGATE_CONF_DIR of OpenResty",
        )
        for name in ("MainLogFormat", "TraceLogFormat")
    ),
    *(
        _not(
            Scope.TABLE_CONFIG,
            name,
            "there is no statistics page on the public port; set TIDEGATE_STATUS_PASSWORD_FILE in "
            "OpenResty's environment for /nginx_status of the admin listener",
        )
        for name in ("AdminUser", "AdminPass")
    ),
)

_OF_TABLE = {key.name.lower(): key for key in KEYS if key.scope is Scope.TABLE}
_OF_CONFIG = {key.name.lower(): key for key in KEYS if key.scope is Scope.TABLE_CONFIG}


Origins = dict[tuple[int | str, ...], tuple[int | str, ...]]
"""Path of a value in our form to its path in the file."""


def adapt(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], Origins]:
    """A file of Interlock 2 or 3 in the form of Interlock 1's; any other as it is.

    Returns:
        The values, a sentence for each key that is not used, and where in the file values stand
        that stand elsewhere here.
    """
    values, said = dict(raw), []
    origins: Origins = {}
    for key in raw:
        if key.lower() == "endpointoverride":
            del values[key]
            said.append(f"{key} is not used: {KEYS[0].text}")
        elif key.lower() == "extensions" and _is_table_of_tables(raw[key]):
            values[key] = []
            for index, (name, table) in enumerate(raw[key].items()):
                taken: dict[str, tuple[str, ...]] = {}
                values[key].append(_extension(table, f"{key}.{name}", said, taken))
                for ours, path in taken.items():
                    origins[("Extensions", index, ours)] = (key, name, *path)
    return values, said, origins


def _is_table_of_tables(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _extension(
    table: Mapping[str, Any], path: str, said: list[str], taken: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    result: dict[str, Any] = {"Name": "nginx"}
    for key, value in table.items():
        if key.lower() == "config" and isinstance(value, dict):
            for name, item in value.items():
                known = _OF_CONFIG.get(name.lower())
                for ours in _take(result, known, f"{path}.{key}.{name}", name, item, said):
                    taken[ours] = key, name
        else:
            known = _OF_TABLE.get(key.lower())
            for ours in _take(result, known, f"{path}.{key}", key, value, said):
                taken[ours] = (key,)
    if "DHParamPath" in result:
        result["DHParam"] = True
    return result


def _take(
    result: dict[str, Any], known: Key | None, path: str, name: str, value: Any, said: list[str]
) -> tuple[str, ...]:
    """Take over one value; the keys of ours that it is under now."""
    ours: tuple[str, ...] = ()
    if known is None:
        ours = (name,)
    elif not known.honoured:
        if value not in ("", 0, False, []):
            said.append(f"{path} is not used: {known.text}")
    elif value not in ("", 0):
        ours = (_TAKEN if known.scope is Scope.TABLE else _TAKEN_OF_CONFIG)[known.name]
    result.update(dict.fromkeys(ours, value))
    return ours
