"""A site as nginx configuration: one file per host, and one for what all hosts share.

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
from agent.model import BackendTls, Location, Site, VerifyClient

DEFAULT_FILE = "00-default.conf"
"""The file of what all hosts share; every other file is for one host."""

_DEFAULT_TEMPLATE = "default.conf.j2"
_HOST_TEMPLATE = "host.conf.j2"
_HTTP2_DIRECTIVE_SINCE = 1_025_001
_KEEPALIVE_BY_DEFAULT_SINCE = 1_029_007
_KEEPALIVE_MIN_TIMEOUT_SINCE = 1_027_004
_LONGEST_FILE_NAME = 255


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the nginx that will read the files can do.

    Attributes:
        nginx_version: as nginx numbers itself, 1022001 for 1.22.1.
        features: what it was built with, by the names of its `--with-…_module` options.
    """

    nginx_version: int = 1_022_001
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Backend:
    """TLS towards peers, as templates need it.

    Attributes:
        id: of the identity; equal ones share connections.
        name: server name to ask and to verify for; empty takes the request's.
        trust: name of the copy of the CA, empty where peers are not verified.
    """

    id: str
    name: str
    trust: str
    tls: BackendTls


def render(site: Site, settings: Settings, caps: Capabilities) -> dict[str, str]:
    """The site as files, name to text.

    Raises:
        RenderError: a template cannot be read or fails, or a setting cannot be written in nginx's
            syntax.
    """
    extension = settings.extension
    templates = _templates(extension.template_path)
    shared = {
        "extension": extension,
        "ipv6": extension.listen_ipv6,
        "http2_directive": caps.nginx_version >= _HTTP2_DIRECTIVE_SINCE,
        "http3": extension.http3 and extension.ssl_port != 0 and "http_v3" in caps.features,
        "no_keepalive": caps.nginx_version >= _KEEPALIVE_BY_DEFAULT_SINCE,
        "backend_of": _backend,
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
            )
        }
        template = templates.get_template(_HOST_TEMPLATE)
        for host in site.hosts:
            files[file_name(host.name)] = template.render(
                shared,
                host=host,
                tls=host.tls is not None and extension.ssl_port != 0,
                verified=host.tls is not None and host.tls.verify_client is VerifyClient.REQUIRED,
                backends=_backends((item, host.name) for item in host.locations),
                has_root=any(location.path == "/" for location in host.locations),
            )
    except _TEMPLATE_FAULTS as error:
        raise RenderError(_told(error, extension.template_path)) from error
    return dict(sorted(files.items()))


def _backend(tls: BackendTls, host: str) -> Backend:
    trust = hashlib.sha256(tls.ca.encode()).hexdigest()[:16] if tls.ca else "system"
    return Backend(
        id=tls.identity(host),
        name=tls.server_name(host),
        trust=trust if tls.verify else "",
        tls=tls,
    )


def _backends(locations: Iterable[tuple[Location, str]]) -> list[Backend]:
    """The identities towards peers that these locations have, each once, by id."""
    found = [_backend(item.backend_tls, host) for item, host in locations if item.backend_tls]
    return sorted({backend.id: backend for backend in found}.values(), key=lambda item: item.id)


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


def hosts_of_files(site: Site) -> dict[str, str]:
    """File name to host name, for each file that is for one host."""
    return {file_name(host.name): host.name for host in site.hosts}


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
    environment.filters["lua"] = lua
    environment.filters["quote"] = quote
    environment.filters["quote_with"] = quote_with
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
