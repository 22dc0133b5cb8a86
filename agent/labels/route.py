"""The one way from a route's labels to its declaration, for every dialect.

This module must not look at networks, ports or instances: whether a declaration can be served is
`agent.compile`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.labels import forms
from agent.labels.declaration import INTERLOCK, Reason, RouteDeclaration, Rules
from agent.labels.forms import InvalidValueError, shown
from agent.labels.names import BACKEND_TLS_OPTIONS, FRONT_OPTIONS
from agent.labels.policy import read_behaviour, read_canary
from agent.labels.reader import Reader, Written, sentence
from agent.model import (
    BackendTls,
    Check,
    CheckKind,
    Policy,
    Protocol,
    Redirect,
    VerifyClient,
    Workload,
    WorkloadKind,
)


def read_route(
    reader: Reader, workload: Workload, rules: Rules, *, name: str
) -> RouteDeclaration | None:
    """The route of a set of labels, or None where something about it is not acceptable."""
    if not _is_ours(reader, rules):
        return None
    default_backend = reader.one("default_backend", forms.boolean, False)
    tcp_port = reader.one("tcp_port", forms.port, None)
    hosts = _hosts(reader, workload, rules, needed=not default_backend and tcp_port is None)
    context_root = reader.one("context_root", forms.context_root, "/")
    rewrite = reader.one("context_root_rewrite", forms.boolean, False)
    endpoints = _endpoints(reader, context_root)
    port = reader.one("port", forms.port, None)
    network = reader.one("network", forms.network, "")
    weight = reader.one("weight", forms.number(0, 1000), None)
    backup = reader.one("backup", forms.boolean, False)
    vip = reader.one("backend_mode", forms.word({"task": "task", "vip": "vip"}), "task") == "vip"
    redirects, to_tls = _redirects(reader, hosts)
    front = _front(reader, context_root, to_tls=to_tls)
    backend_tls = _backend_tls(reader)
    protocol = reader.one("protocol", _protocol, Protocol.HTTP)
    mirror = reader.one("mirror", forms.mirror, None)
    buffering = reader.one("request_buffering", forms.boolean, True)
    if protocol is Protocol.GRPC:
        _note_streaming(reader)
        mirror, buffering = None, True
    elif mirror is not None and not buffering:
        reader.idle(
            "request_buffering",
            f"with {reader.label('mirror')}: there is no copy of a request before all of it is "
            "there",
            "Remove one of the two.",
        )
        buffering = True
    behaviour = read_behaviour(
        reader, context_root=context_root, tls_only=front.only, allowed=rules.directives
    )
    canary = read_canary(reader)
    if reader.refused or hosts is None:
        return None
    policy = _checked(reader, behaviour.policy, protocol=protocol, tls=backend_tls is not None)
    if vip and policy.sticky is not None:
        reader.note(
            f"Sessions cannot be kept with {reader.label('backend_mode')}=vip: Docker chooses the "
            "task of each connection.",
            f"Remove {reader.label('backend_mode')}, so that tasks are chosen here.",
        )
    return RouteDeclaration(
        host=hosts[0] if hosts else "",
        aliases=tuple(sorted(set(hosts[1:]) - {hosts[0]})) if hosts else (),
        context_root=context_root,
        rewrite=rewrite and context_root != "/",
        port=port,
        network=network,
        weight=weight,
        tls=front.tls,
        tls_only=front.only,
        certificate=front.certificate,
        certificate_key=front.key,
        websocket_endpoints=endpoints,
        policy=policy,
        name=name,
        dialect=reader.dialect,
        backup=backup,
        vip=vip,
        verify_client=front.verify_client,
        client_ca=front.client_ca,
        hsts=front.hsts,
        passthrough=front.passthrough,
        redirects=redirects,
        default_backend=default_backend,
        tcp_port=tcp_port,
        backend_tls=backend_tls,
        protocol=protocol,
        mirror=mirror,
        directives=behaviour.directives,
        request_buffering=buffering,
        canary=canary,
    )


def _note_streaming(reader: Reader) -> None:
    """Tell of what has no effect where nobody ever has the whole body of a request."""
    grpc = f"with {reader.label('protocol')}=grpc, whose requests go on as they come"
    reader.idle("mirror", grpc, f"Remove {reader.label('mirror')}.")
    reader.idle("request_buffering", grpc, f"Remove {reader.label('request_buffering')}.")


def _is_ours(reader: Reader, rules: Rules) -> bool:
    """Whether this agent serves the route; otherwise nothing else is told of it."""
    cluster = reader.one("service_cluster", forms.cluster, "")
    if reader.refused or cluster in rules.clusters:
        return True
    reader.found.clear()
    served = ", ".join(item or "those without the label" for item in sorted(rules.clusters))
    if cluster:
        message = f"{reader.label('service_cluster')}={cluster} is not served by this agent"
    else:
        message = f"There is no label {reader.label('service_cluster')}"
    reader.reject(
        Reason.OTHER_CLUSTER,
        f"{message}; this agent serves: {served}.",
        "That is as it should be where another agent serves it; otherwise correct the label, or "
        "ServiceClusters in the configuration.",
    )
    return False


# --- names -------------------------------------------------------------------------------------


def _hosts(
    reader: Reader, workload: Workload, rules: Rules, *, needed: bool
) -> tuple[str, ...] | None:
    """The host and its aliases; None where they are not acceptable, or missing and needed."""
    aliases = reader.several(
        "hosts", forms.host, reason=Reason.INVALID_HOST, ascii_only=False
    ) + reader.several("alias_domain", forms.host, reason=Reason.INVALID_HOST, ascii_only=False)
    if reader.has("hostname"):
        first = _joined_host(reader)
        return None if first is None else (first, *aliases)
    asked = any(reader.written("hosts"))
    if asked and aliases:
        return tuple(aliases)
    if asked:
        # What is wrong with each of them is told already.
        reader.refused = True
        return None
    if rules.hostname_fallback and reader.dialect is INTERLOCK:
        own = _own_host(reader, workload)
        if own is not None:
            return (own, *aliases)
    if not needed:
        return tuple(aliases)
    if reader.dialect is INTERLOCK:
        which, hint = (
            f"no {reader.label('hostname')}",
            (f"Add the label {reader.label('hostname')} (and {reader.label('domain')})."),
        )
    else:
        which = f"neither {reader.label('hosts')} nor {reader.label('default_backend')}"
        hint = f"Add the label {reader.label('hosts')}."
    reader.reject(
        Reason.NO_HOSTNAME,
        f"There are {reader.dialect.prefix.removesuffix('.')} labels, but {which}, so there is no "
        "host to route.",
        hint,
    )
    return None


def _joined_host(reader: Reader) -> str | None:
    """Put the host name together from `hostname` and `domain`, as Interlock did."""
    first = reader.text("hostname", reason=Reason.INVALID_HOST)
    domain = reader.text("domain", default="local", reason=Reason.INVALID_HOST)
    if first is None or domain is None:
        return None
    return _join(reader, first, domain)


def _join(reader: Reader, first: str, domain: str) -> str | None:
    first, domain = first.removesuffix("."), domain.removesuffix(".")
    if not first or first.lower() == domain.lower():
        name = domain
    else:
        name = f"{first}.{domain}" if domain else first
    try:
        return forms.host(name)
    except InvalidValueError as error:
        reader.reject(
            Reason.INVALID_HOST,
            f"{reader.label('hostname')}={shown(first)} and {reader.label('domain')}="
            f"{shown(domain)} make {shown(name)}, which {error.problem}.",
            sentence(error.hint),
        )
        return None


def _own_host(reader: Reader, workload: Workload) -> str | None:
    """The name that a container has for itself, as Interlock up to 1.3 took it.

    A name without a domain is Docker's own invention unless a label gives the domain.
    """
    if workload.kind is not WorkloadKind.CONTAINER or not workload.hostname:
        return None
    domain = workload.domainname
    if reader.has("domain"):
        given = reader.text("domain", reason=Reason.INVALID_HOST)
        if given is None:
            return None
        domain = given
    if not domain and "." not in workload.hostname:
        return None
    return _join(reader, workload.hostname, domain)


def _endpoints(reader: Reader, context_root: str) -> tuple[str, ...]:
    paths = reader.several("websocket_endpoint", forms.websocket_path)
    inside = {path for path in paths if _below(path, context_root)}
    for path in paths:
        if path not in inside:
            reader.note(
                f"{reader.label('websocket_endpoint')} {path} does not lie below the context root "
                f"{context_root}, which is all that this route serves.",
                "Websockets work everywhere below the context root without this label.",
            )
    return tuple(sorted(inside))


def _below(path: str, root: str) -> bool:
    return root == "/" or path == root or path.startswith(root + "/")


def _redirects(reader: Reader, hosts: tuple[str, ...] | None) -> tuple[tuple[Redirect, ...], bool]:
    """The redirects, and whether there is one of the host's from plain HTTP to TLS."""
    found: dict[str, str] = {}
    to_tls = False
    if hosts is None:
        return (), False
    for written in reader.written("redirects"):
        for part in written.value.split(";"):
            if not part.strip():
                continue
            try:
                source, target = forms.redirect(forms.clean(part, ascii_only=False))
            except InvalidValueError as error:
                reader.invalid(Written(written.label, part), Reason.INVALID_LABEL, error)
                continue
            if source not in hosts:
                reader.note(
                    f"{reader.label('redirects')}: {source} is not among the hosts of this route, "
                    "so it is not redirected.",
                    f"Add it to {reader.label('hosts')} too.",
                    reason=Reason.INVALID_LABEL,
                )
            elif target == f"https://{source}":
                to_tls = True
            elif _leads_back(found, source, target):
                reader.note(
                    f"{reader.label('redirects')}: {source} is not redirected to {target}, which "
                    f"would lead back to {source}.",
                    "Have one of the names serve instead of being redirected.",
                    reason=Reason.INVALID_LABEL,
                )
            elif found.setdefault(source, target) != target:
                reader.note(
                    f"{reader.label('redirects')}: {source} is redirected to {found[source]} "
                    f"already, so not to {target}.",
                    "Keep one of the two.",
                )
    return tuple(Redirect(source, target) for source, target in sorted(found.items())), to_tls


def _leads_back(redirects: Mapping[str, str], source: str, target: str) -> bool:
    """Whether a request for `source` that is sent to `target` would come to `source` again."""
    while True:
        name = (target.partition("://")[2] or target).partition("/")[0]
        if name == source:
            return True
        if name not in redirects:
            return False
        target = redirects[name]


# --- TLS ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Front:
    """TLS towards the clients."""

    tls: bool | None
    only: bool
    certificate: str
    key: str
    verify_client: VerifyClient
    client_ca: str
    hsts: str | None
    passthrough: bool


_NO_FRONT = _Front(None, False, "", "", VerifyClient.OFF, "", None, False)
_VERIFY_CLIENT = {
    "off": VerifyClient.OFF,
    "optional": VerifyClient.OPTIONAL,
    "required": VerifyClient.REQUIRED,
}


def _front(reader: Reader, context_root: str, *, to_tls: bool) -> _Front:
    if not to_tls and not reader.any_of(FRONT_OPTIONS):
        return _NO_FRONT
    file = forms.secret_name if reader.dialect.secrets else forms.file_name
    tls = reader.one("ssl", forms.boolean, None)
    only = reader.one("ssl_only", forms.boolean, None)
    certificate = reader.one("ssl_cert", file, "")
    key = reader.one("ssl_cert_key", file, "")
    verify = reader.one(
        "ssl_verify_client",
        forms.word(_VERIFY_CLIENT, on=VerifyClient.REQUIRED),
        VerifyClient.OFF,
    )
    client_ca = reader.one("ssl_client_ca", file, "")
    hsts = reader.one("hsts", forms.hsts, None)
    if reader.one("ssl_passthrough", forms.boolean, False):
        return _passthrough(reader, context_root)
    if reader.dialect.secrets and tls is None and (certificate or key):
        tls = True
    if (only or to_tls) and tls is False:
        which = reader.label("ssl_only" if only else "redirects")
        reader.reject(
            Reason.INVALID_LABEL,
            f"{which} asks for TLS while {reader.label('ssl')} is off.",
            f"Remove {reader.label('ssl')} (the other implies it), or turn the other off.",
        )
    if verify is VerifyClient.REQUIRED and only is False:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('ssl_verify_client')} requires certificates of clients, while "
            f"{reader.label('ssl_only')}=false lets them in over plain HTTP.",
            f"Remove {reader.label('ssl_only')}, or write {reader.label('ssl_verify_client')}="
            "optional.",
        )
    only = bool(only) or to_tls or verify is VerifyClient.REQUIRED
    if verify is not VerifyClient.OFF and not client_ca:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('ssl_verify_client')} is on, but there is no "
            f"{reader.label('ssl_client_ca')} to verify with.",
            f"Name the file of the CA in {reader.label('ssl_client_ca')}.",
        )
    speaks = tls or only or (tls is None and verify is not VerifyClient.OFF)
    if tls is False and verify is not VerifyClient.OFF:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('ssl_verify_client')} is on while {reader.label('ssl')} is off.",
            f"Remove {reader.label('ssl')}.",
        )
    if not speaks and not reader.refused:
        for option in ("ssl_cert", "ssl_cert_key", "hsts"):
            reader.idle(
                option,
                f"without {reader.label('ssl')}",
                f"Add {reader.label('ssl')}=true if the host shall speak TLS.",
            )
    if verify is VerifyClient.OFF:
        reader.idle(
            "ssl_client_ca",
            f"without {reader.label('ssl_verify_client')}",
            f"Write {reader.label('ssl_verify_client')}=required or optional.",
        )
        client_ca = ""
    return _Front(
        tls=True if speaks else tls,
        only=only,
        certificate=certificate,
        key=key,
        verify_client=verify,
        client_ca=client_ca,
        hsts=hsts if speaks else None,
        passthrough=False,
    )


def _passthrough(reader: Reader, context_root: str) -> _Front:
    for option in ("ssl_cert", "ssl_cert_key", "ssl_verify_client", "ssl_client_ca", "hsts"):
        reader.idle(
            option,
            f"with {reader.label('ssl_passthrough')}, where TLS is the application's own",
            "Remove one of the two.",
        )
    if context_root != "/":
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('context_root')}={context_root} cannot be told apart with "
            f"{reader.label('ssl_passthrough')}: paths are inside the TLS that is not opened.",
            "Remove one of the two.",
        )
    return _Front(
        tls=None,
        only=True,
        certificate="",
        key="",
        verify_client=VerifyClient.OFF,
        client_ca="",
        hsts=None,
        passthrough=True,
    )


def _checked(reader: Reader, policy: Policy, *, protocol: Protocol, tls: bool) -> Policy:
    """The policy with a check that speaks what the peers do."""
    check = policy.check
    if check is None or check.kind is not CheckKind.HTTP:
        return policy
    if protocol is Protocol.GRPC:
        reader.note(
            "Peers that speak gRPC cannot be asked by HTTP: their health check only connects.",
            f"Write {reader.label('health_check')}=tcp.",
        )
        only_connects = Check(
            CheckKind.TCP,
            interval=check.interval,
            timeout=check.timeout,
            rise=check.rise,
            fall=check.fall,
        )
        return replace(policy, check=only_connects)
    return replace(policy, check=replace(check, tls=tls))


def _backend_tls(reader: Reader) -> BackendTls | None:
    on = reader.one("ssl_backend", forms.boolean, False)
    if not reader.any_of(BACKEND_TLS_OPTIONS):
        return BackendTls() if on else None
    file = forms.secret_name if reader.dialect.secrets else forms.file_name
    verify = reader.one(
        "ssl_backend_tls_verify", forms.word({"none": False, "required": True}, on=True), None
    )
    ca = reader.one("ssl_backend_ca", file, "")
    name = reader.one("ssl_backend_name", forms.server_name, "")
    certificate = reader.one("ssl_backend_cert", file, "")
    key = reader.one("ssl_backend_cert_key", file, "")
    if not on:
        for option in sorted(BACKEND_TLS_OPTIONS):
            reader.idle(
                option,
                f"without {reader.label('ssl_backend')}",
                f"Add {reader.label('ssl_backend')}=true if the application speaks TLS.",
            )
        return None
    if bool(certificate) != bool(key):
        given, lacks = "ssl_backend_cert", "ssl_backend_cert_key"
        if key:
            given, lacks = lacks, given
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label(given)} is given without {reader.label(lacks)}.",
            "Name both the certificate and its key.",
        )
    if verify is False and ca:
        reader.idle(
            "ssl_backend_ca",
            f"with {reader.label('ssl_backend_tls_verify')}=none",
            f"Write {reader.label('ssl_backend_tls_verify')}=required.",
        )
        ca = ""
    return BackendTls(
        verify=bool(ca) if verify is None else verify,
        ca=ca,
        name=name,
        certificate=certificate,
        key=key,
    )


def _protocol(text: str) -> Protocol:
    if text.lower() == "proxy":
        raise InvalidValueError(
            "asks for the PROXY protocol towards the application, which nginx does not speak with "
            "an HTTP backend",
            "have the application read X-Forwarded-For and X-Real-IP; for a TCP application see "
            "tcp_port",
        )
    return forms.word({"http": Protocol.HTTP, "grpc": Protocol.GRPC})(text)
