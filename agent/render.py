"""A site as nginx configuration: one file per host or TCP port, and what all hosts share.

The text is a function of its arguments alone: sorted, without times, so that an equal site has an
equal generation and needs no reload. Every value that a label or a setting brought in goes through
the quoting filter, which refuses what cannot be written as one word; it is the second line of
defence, behind `agent.labels`. Templates come with the package and can be replaced by name from
`TemplatePath`. This module must not know how files get to nginx or what nginx says about them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2

from agent.config.settings import Settings
from agent.errors import RenderError
from agent.model import BackendTls, Host, Location, Protocol, Site, VerifyClient

DEFAULT_FILE = "00-default.conf"
"""The file of what all hosts share."""

CONNECTIONS_FILE = "00-default.events"
WORKERS_FILE = "00-default.main"
"""The files of what concerns nginx as a whole; each is there only where its setting is made."""

SETTINGS_OF_FILES = {CONNECTIONS_FILE: "MaxConn", WORKERS_FILE: "WorkerProcesses"}
"""The setting that each of these is made of."""

PASSTHROUGH_FILE = "passthrough.stream"
"""The file that tells, by server name, whose TLS is passed on unopened; for nginx's stream part."""

STREAM = "stream"
"""The feature of an OpenResty that can pass connections on unopened."""

_DEFAULT_TEMPLATE = "default.conf.j2"
_HOST_TEMPLATE = "host.conf.j2"
_TCP_TEMPLATE = "tcp.stream.j2"
_PASSTHROUGH_TEMPLATE = "passthrough.stream.j2"
_HTTP2_DIRECTIVE_SINCE = 1_025_001
_KEEPALIVE_BY_DEFAULT_SINCE = 1_029_007
_KEEPALIVE_MIN_TIMEOUT_SINCE = 1_027_004
_LONGEST_FILE_NAME = 255


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the nginx that will read the files can do.

    Attributes:
        nginx_version: as nginx numbers itself, 1022001 for 1.22.1.
        features: what it was built with, by the names of its `--with-…_module` options, and what it
            can do that not every build can, as its status says.
    """

    nginx_version: int = 1_022_001
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Backend:
    """TLS towards peers, as templates need it.

    Attributes:
        id: of the identity and of what is spoken; equal ones share connections.
        name: server name to ask and to verify for; empty takes the request's.
        trust: name of the copy of the CA, empty where peers are not verified.
    """

    id: str
    name: str
    trust: str
    tls: BackendTls
    grpc: bool


def render(site: Site, settings: Settings, caps: Capabilities) -> dict[str, str]:
    """The site as files, name to text.

    Without the feature `stream` there are no files for TCP ports and passthrough; who renders says
    so to whoever asked for them.

    Raises:
        RenderError: a template cannot be read or fails, or a setting cannot be written in nginx's
            syntax.
    """
    extension = settings.extension
    if extension.template_path and not Path(extension.template_path).is_dir():
        # The built-in ones in its place would take away what the operator's add.
        raise RenderError(f"TemplatePath {extension.template_path} is no directory that is there")
    templates = _templates(extension.template_path)
    http2_directive = caps.nginx_version >= _HTTP2_DIRECTIVE_SINCE
    grpc = any(
        location.protocol is Protocol.GRPC
        for locations in (site.default, *(host.locations for host in site.hosts))
        for location in locations
    )
    stream = STREAM in caps.features
    unopened = tuple(
        host for host in site.hosts if host.passthrough and stream and extension.ssl_port != 0
    )
    shared = {
        # Hosts with TLS always listen to the stream part too: its old workers, after the last
        # passthrough is gone, still have connections for them.
        "stream": stream,
        "behind_stream": bool(unopened),
        "extension": extension,
        "accepts": " proxy_protocol" if extension.proxy_protocol else "",
        "trusting": bool(extension.trusted_proxies) or extension.proxy_protocol,
        "has_grpc": grpc,
        "plain_http2": http2_directive and (grpc or extension.grpc_port != 0),
        "ipv6": extension.listen_ipv6,
        "http2_directive": http2_directive,
        "http3": extension.http3 and extension.ssl_port != 0 and "http_v3" in caps.features,
        "no_keepalive": caps.nginx_version >= _KEEPALIVE_BY_DEFAULT_SINCE,
        "keepalive_min_timeout": caps.nginx_version >= _KEEPALIVE_MIN_TIMEOUT_SINCE,
    }
    default = extension.default_certificate
    try:
        files = {
            DEFAULT_FILE: templates.get_template(_DEFAULT_TEMPLATE).render(
                shared,
                site=site,
                tls=extension.ssl_port != 0,
                default_certificate=default,
                backends=_backends(
                    [(item, host.name) for host in site.hosts for item in host.locations]
                    + [(item, "") for item in site.default]
                ),
                default_backends=_backends((item, "") for item in site.default),
            )
        }
        template = templates.get_template(_HOST_TEMPLATE)
        for host in site.hosts:
            files[file_name(host.name)] = template.render(
                shared,
                host=host,
                servers=_servers(host),
                tls=host.tls is not None and extension.ssl_port != 0 and host not in unopened,
                verified=host.tls is not None and host.tls.verify_client is VerifyClient.REQUIRED,
                backends=_backends((item, host.name) for item in host.locations),
                has_root=any(location.path == "/" for location in host.locations),
            )
        template = templates.get_template(_TCP_TEMPLATE)
        for route in site.tcp if stream else ():
            files[tcp_file_name(route.port)] = template.render(shared, route=route)
        if unopened:
            files[PASSTHROUGH_FILE] = templates.get_template(_PASSTHROUGH_TEMPLATE).render(
                shared, names=_names(unopened), opened=_opened(site, unopened)
            )
    except _TEMPLATE_FAULTS as error:
        raise RenderError(_told(error, extension.template_path)) from error
    if extension.max_conn:
        files[CONNECTIONS_FILE] = f"worker_connections {extension.max_conn};\n"
    if extension.worker_processes:
        files[WORKERS_FILE] = f"worker_processes {extension.worker_processes};\n"
    return dict(sorted(files.items()))


@dataclass(frozen=True, slots=True)
class _Server:
    """Names that are answered alike; `target`: where they are sent to, empty for the locations.

    With `to_tls` that is the same name over TLS, at whatever port the world sees, so that who has
    come over TLS is there already.
    """

    names: tuple[str, ...]
    target: str = ""
    to_tls: bool = False


def _servers(host: Host) -> list[_Server]:
    sent_on = {redirect.host for redirect in host.redirects}
    own = tuple(name for name in (host.name, *host.aliases) if name not in sent_on)
    redirects = [
        _Server(
            (item.host,),
            item.target.rstrip("/"),
            to_tls=item.target.startswith(f"https://{item.host}:"),
        )
        for item in host.redirects
    ]
    return ([_Server(own)] if own else []) + redirects


def _backend(location: Location, host: str) -> Backend | None:
    """How peers of the location are spoken to over TLS; None where they are not."""
    tls = location.backend_tls
    if tls is None:
        return None
    grpc = location.protocol is Protocol.GRPC
    trust = hashlib.sha256(tls.ca.encode()).hexdigest()[:16] if tls.ca else "system"
    return Backend(
        id=tls.identity(host) + ("_grpc" if grpc else ""),
        name=tls.server_name(host),
        trust=trust if tls.verify else "",
        tls=tls,
        grpc=grpc,
    )


def _backends(locations: Iterable[tuple[Location, str]]) -> list[Backend]:
    """The identities towards peers that these locations have, each once, by id."""
    found = [_backend(item, host) for item, host in locations]
    return sorted(
        {backend.id: backend for backend in found if backend}.values(), key=lambda item: item.id
    )


def generation(files: Mapping[str, str]) -> str:
    """The generation of these files: sha-256, 64 lower-case hex digits, of names and texts."""
    digest = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name].encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def file_name(host: str) -> str:
    """Name of the file of a host; different hosts have different ones.

    A label never starts with a hyphen, and none is `_wildcard` or `00-default`, so that neither
    the shortened form nor the others can be the name of another host.
    """
    plain = "_wildcard." + host[2:] if host.startswith("*.") else host
    if len(plain) + len(".conf") > _LONGEST_FILE_NAME:
        plain = f"{plain[:180]}.-{hashlib.sha256(host.encode()).hexdigest()[:32]}"
    return plain + ".conf"


def tcp_file_name(port: int) -> str:
    """Name of the file of a TCP port."""
    return f"tcp-{port}.stream"


def hosts_of_files(site: Site) -> dict[str, str]:
    """File name to host name, or `TCP port N`, for each file that is for one of them."""
    hosts = {file_name(host.name): host.name for host in site.hosts}
    return hosts | {tcp_file_name(route.port): f"TCP port {route.port}" for route in site.tcp}


def _names(unopened: Iterable[Host]) -> dict[str, str]:
    """Server name to upstream, for each name whose TLS is passed on."""
    return {
        _map_key(name): host.passthrough for host in unopened for name in (host.name, *host.aliases)
    }


def _opened(site: Site, unopened: tuple[Host, ...]) -> tuple[str, ...]:
    """Names that a wildcard among the passed on ones could take away from hosts with TLS here."""
    if not any(name.startswith("*.") for host in unopened for name in (host.name, *host.aliases)):
        return ()
    return tuple(
        _map_key(name)
        for host in site.hosts
        if host.tls is not None and host not in unopened
        for name in (host.name, *host.aliases)
    )


def _map_key(name: str) -> str:
    """A server name as a key of nginx's `map`, where some words mean something else."""
    return "\\" + name if name in ("default", "hostnames", "include", "volatile") else name


def quote(value: object, *, variables: str = "") -> str:
    """Write a value as one word of nginx's configuration, whatever is in it.

    Args:
        variables: what follows in the same word and is meant as it stands.

    Raises:
        RenderError: it has a control character or a `$` in it, for which nginx knows no way.
    """
    text = str(value)
    if _UNWRITABLE.search(text):
        raise RenderError(f"{text[:100]!a} cannot be written in nginx's configuration")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}{variables}"'


def quote_with(value: object, variables: str) -> str:
    """The value quoted, with nginx variables behind it in the same word."""
    return quote(value, variables=variables)


def redirect_url(target: str) -> str:
    """Where a request goes that is sent to `target`; without a scheme it keeps its own."""
    url = quote(target, variables="$request_uri")
    return url if "://" in target else f'"$tidegate_proto://{url[1:]}'


def directive(text: str) -> str:
    """A raw directive that was allowed by name, as it is.

    Raises:
        RenderError: it is more or less than one directive without a block.
    """
    if not _ONE_DIRECTIVE.fullmatch(text):
        raise RenderError(f"{text[:100]!a} is not one directive with its semicolon")
    return text


_DOUBLE = r'"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*"'
_SINGLE = _DOUBLE.replace('"', "'")
_BARE = r"""[^"'\\;{}#\x00-\x20\x7f][^"'\\;{}\x00-\x20\x7f]*"""
_ONE_DIRECTIVE = re.compile(rf"[a-z][a-z0-9_]*(?: +(?:{_DOUBLE}|{_SINGLE}|{_BARE}))* *;")


def lua(value: object) -> str:
    """Write a value as a string of Lua, in which nothing is left that means anything to nginx."""
    escaped = _NOT_PLAIN.sub(lambda found: b"\\%03d" % found[0][0], str(value).encode())
    return f'"{escaped.decode()}"'


_NOT_PLAIN = re.compile(rb"[^A-Za-z0-9._/@:+,=~* -]")
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f$]")


@lru_cache(maxsize=8)
def _templates(template_path: str) -> jinja2.Environment:
    """The templates, those of the operator first; changed ones are read again by themselves.

    As `builtin/NAME` a replaced template can still be had, to extend it.
    """
    built_in = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    loaders: list[jinja2.BaseLoader] = [built_in, jinja2.PrefixLoader({"builtin": built_in})]
    if template_path:
        loaders.insert(0, jinja2.FileSystemLoader(template_path))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - not HTML; each value is quoted for nginx
        keep_trailing_newline=True,
    )
    environment.globals["backend_of"] = _backend
    environment.filters["lua"] = lua
    environment.filters["quote"] = quote
    environment.filters["quote_with"] = quote_with
    environment.filters["redirect_url"] = redirect_url
    environment.filters["directive"] = directive
    return environment


_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What an operator's template can do wrong: not be read, not be a template, fail at work."""


def _told(error: Exception, template_path: str) -> str:
    where = ""
    if isinstance(error, jinja2.TemplateSyntaxError):
        where = f" {error.name}, line {error.lineno}"
    beside = f" (TemplatePath is {template_path})" if template_path else ""
    return f"template{where}: {type(error).__name__}: {error}{beside}"
