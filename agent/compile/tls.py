"""TLS material of a route: which files it names, towards clients and towards peers.

Paths are those inside the OpenResty container: the agent never opens them, and must not. Whether a
name has the TLS of this route is `settle`'s to decide.
"""

from __future__ import annotations

from dataclasses import replace

from agent.compile.rejections import reject
from agent.config.settings import Extension
from agent.labels import Reason, RouteDeclaration
from agent.labels.forms import HSTS_DEFAULT
from agent.model import BackendTls, Rejection, Tls, Workload

_HSTS_USUAL = "max-age=16000000"


def tls_of(
    workload: Workload, declaration: RouteDeclaration, extension: Extension
) -> Tls | Rejection | None:
    """Certificate and key of a route; None where it does not speak TLS, or not by itself."""
    asked = declaration.tls or (declaration.tls is None and extension.tls_everywhere)
    refused = _refused(workload, declaration, extension, asked=asked)
    if refused is not None:
        return refused
    if not asked or declaration.passthrough or not declaration.host:
        return None
    client_ca = _path(declaration, extension, declaration.client_ca)
    if declaration.certificate and declaration.certificate_key:
        return Tls(
            certificate=_path(declaration, extension, declaration.certificate),
            key=_path(declaration, extension, declaration.certificate_key),
            verify_client=declaration.verify_client,
            client_ca=client_ca,
        )
    default = extension.default_certificate
    if not declaration.certificate and not declaration.certificate_key and default is not None:
        return Tls(*default, verify_client=declaration.verify_client, client_ca=client_ca)
    return _no_certificate(workload, declaration, default=default is not None)


def backend_tls_of(declaration: RouteDeclaration, extension: Extension) -> BackendTls | None:
    """TLS towards the peers of a route; None for plain connections."""
    asked = declaration.backend_tls
    if asked is None:
        return None
    return replace(
        asked,
        ca=_path(declaration, extension, asked.ca),
        certificate=_path(declaration, extension, asked.certificate),
        key=_path(declaration, extension, asked.key),
    )


def hsts_of(declaration: RouteDeclaration, extension: Extension) -> str | None:
    """Value of Strict-Transport-Security; empty for none, None where the labels say nothing."""
    if declaration.hsts != HSTS_DEFAULT:
        return declaration.hsts
    return _HSTS_USUAL if extension.hsts == "off" else extension.hsts


def _refused(
    workload: Workload, declaration: RouteDeclaration, extension: Extension, *, asked: bool
) -> Rejection | None:
    """That the settings do not let a route have the TLS it asks for."""
    if extension.ssl_port == 0 and (asked or declaration.passthrough):
        return reject(
            workload,
            Reason.TLS_OFF,
            f"{declaration.what} asks for TLS ({declaration.label('ssl')}, "
            f"{declaration.label('ssl_only')} or {declaration.label('ssl_passthrough')}), but TLS "
            "is switched off by SSLPort = 0.",
            "Set SSLPort in the configuration, or remove the label.",
        )
    if declaration.passthrough and extension.proxy_protocol:
        return reject(
            workload,
            Reason.TLS_OFF,
            f"{declaration.what} asks for its TLS to be passed through "
            f"({declaration.label('ssl_passthrough')}), which cannot be done while the listeners "
            "take the PROXY protocol (ProxyProtocol = true).",
            "Set ProxyProtocol to false in the configuration, or remove the label.",
        )
    return None


def _no_certificate(
    workload: Workload, declaration: RouteDeclaration, *, default: bool
) -> Rejection:
    """That a route asks for TLS without saying with which certificate.

    Args:
        default: there is a default certificate, which is for routes that name no file at all.
    """
    missing = " and ".join(
        declaration.label(option)
        for option, value in (
            ("ssl_cert", declaration.certificate),
            ("ssl_cert_key", declaration.certificate_key),
        )
        if not value
    )
    what = (
        "Docker secrets (mounted in OpenResty, in SSLSecretPath)"
        if declaration.dialect.secrets
        else "files (below SSLCertPath)"
    )
    return reject(
        workload,
        Reason.NO_CERTIFICATE,
        f"{declaration.host} asks for TLS, but there is no {missing}"
        + (" and no SSLDefaultCert." if not default else "."),
        f"Name both {what} in {declaration.label('ssl_cert')} and "
        f"{declaration.label('ssl_cert_key')}, or neither and set SSLDefaultCert in the "
        "configuration.",
    )


def _path(declaration: RouteDeclaration, extension: Extension, name: str) -> str:
    """Where a file that a label names lies inside the OpenResty container; empty for none."""
    if not name:
        return ""
    if declaration.dialect.secrets:
        return extension.secret_path(name)
    return extension.certificate_path(name)
