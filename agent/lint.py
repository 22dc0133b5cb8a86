"""What the services of compose and stack files would be routed as, before they are deployed.

The files are made into workloads with one instance each, at an address that stands for any, and
then read and compiled by what the agent itself uses; so the verdicts and their words cannot differ
from those of `explain`. What a file cannot tell (what an image exposes, which networks an OpenResty
of other files is on) is told as not known. This module must not ask an engine or an OpenResty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from agent import composefile
from agent.compile import (
    DEFAULT,
    Claim,
    Examined,
    Route,
    Way,
    compile_snapshot,
    examine,
    proxy_containers,
    told,
)
from agent.composefile import Kind, Label, Place, Project, Service
from agent.config.settings import Settings
from agent.discovery.cluster import PROXY_LABEL, PROXY_VALUES, STACK_LABEL
from agent.discovery.containers import PROJECT_LABEL
from agent.labels import Reason, subject_of
from agent.labels.declaration import DOCKER_LB, INTERLOCK, Dialect
from agent.model import (
    Attachment,
    Host,
    Instance,
    InstanceState,
    Location,
    ProxyInstance,
    PublishedPort,
    Rejection,
    Snapshot,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

_ADDRESS = "192.0.2.1"
"""Stands for whatever address an instance will have; reserved for documentation."""
_ANY_PORT = 32768
"""Stands for the port that Docker will choose."""

_VIP = "192.0.2.2"
"""Stands for the virtual IP that a service will have."""

_DIALECTS = (INTERLOCK, DOCKER_LB)
_NODE_NETWORKS = ("host", "bridge", "none")
_NODE_DRIVERS = ("host", "bridge", "none", "null", "macvlan", "ipvlan")


class Level(StrEnum):
    """How bad something is."""

    REJECTED = "rejected"
    """It will not be routed, or this part of it will not."""
    WARNING = "warning"
    """It may not be what was meant, or cannot be told from the files."""
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to be told: `reason` is that of a rejection, or `file` for one of Docker's own."""

    level: Level
    reason: str
    message: str
    hint: str
    place: Place

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "level": self.level.value,
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "file": self.place.file,
            "line": self.place.line,
        }


@dataclass(frozen=True, slots=True)
class Line:
    """A route that a service would get.

    Attributes:
        host: empty for the default backend and for a TCP port.
        over: how its instances are reached, and on which port, for people.
        options: what else there is to say of it, for people.
        shared_with: keys of other services whose instances serve the very same.
    """

    host: str
    path: str
    port: int | None
    network: str
    over: str
    what: str
    tcp_port: int | None = None
    default_backend: bool = False
    tls: bool = False
    tls_only: bool = False
    certificate: str = ""
    passthrough: bool = False
    rewrite: bool = False
    backend_tls: bool = False
    canary: bool = False
    redirect: str = ""
    shared_with: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "host": self.host,
            "path": self.path,
            "default_backend": self.default_backend,
            "tcp_port": self.tcp_port,
            "port": self.port,
            "network": self.network,
            "tls": self.tls,
            "tls_only": self.tls_only,
            "certificate": self.certificate,
            "passthrough": self.passthrough,
            "rewrite": self.rewrite,
            "backend_tls": self.backend_tls,
            "canary": self.canary,
            "redirect": self.redirect,
            "shared_with": list(self.shared_with),
        }

    def __str__(self) -> str:
        scheme = "https" if self.tls or self.passthrough else "http"
        what = f"{scheme}://{self.host}{self.path}" if self.host else self.what
        if self.redirect:
            return f"{what} is redirected to {self.redirect}"
        parts = [f"{what} -> {self.over}"]
        if self.passthrough:
            parts.append("TLS is passed through unopened")
        elif self.tls_only:
            parts.append("plain HTTP is redirected to TLS")
        elif self.tls:
            parts.append("plain HTTP too")
        if self.rewrite:
            parts.append(f"{self.path} is taken off")
        if self.backend_tls:
            parts.append("TLS to the backend")
        if self.canary:
            parts.append("as its canary")
        if self.shared_with:
            parts.append(f"together with {', '.join(self.shared_with)}")
        return "; ".join(parts)


class Outcome(StrEnum):
    """What becomes of a service."""

    ROUTED = "routed"
    REJECTED = "not routed"
    UNKNOWN = "not known"
    SILENT = "does not ask to be routed"
    PROXY = "is OpenResty"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One service: `key` is its name in the file, `name` the one that Docker will know it by."""

    key: str
    name: str
    place: Place
    outcome: Outcome
    routes: tuple[Line, ...]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "service": self.key,
            "name": self.name,
            "file": self.place.file,
            "line": self.place.line,
            "outcome": self.outcome.value,
            "routes": [line.as_dict() for line in self.routes],
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All that there is to tell of some files.

    Attributes:
        networks: those that OpenResty is on; None where nothing says.
        findings: of no single service.
    """

    kind: Kind
    name: str
    because: str
    networks: tuple[str, ...] | None
    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """How many findings of that level there are."""
        return sum(finding.level is level for finding in self._all())

    def _all(self) -> Iterator[Finding]:
        yield from self.findings
        for verdict in self.verdicts:
            yield from verdict.findings

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "kind": self.kind.value,
            "name": self.name,
            "openresty_networks": None if self.networks is None else list(self.networks),
            "rejected": self.count(Level.REJECTED),
            "warnings": self.count(Level.WARNING),
            "services": [verdict.as_dict() for verdict in self.verdicts],
            "findings": [finding.as_dict() for finding in self.findings],
        }


def lint(
    files: Sequence[tuple[str, str]],
    settings: Settings,
    *,
    environment: Mapping[str, str],
    kind: Kind | None = None,
    name: str = "",
    env_file: str | None = None,
    proxy_networks: Sequence[str] = (),
) -> Report:
    """Say of each service of `files` (path and text) what routes it would get, or why none.

    Args:
        environment: for the variables in the files.
        kind, name, env_file: as `composefile.read` takes them.
        proxy_networks: networks of an OpenResty that is not in the files.

    Raises:
        ComposeFileError: a file cannot be used.
    """
    project = composefile.read(
        files, environment=environment, kind=kind, name=name, env_file=env_file
    )
    return _Linter(project, settings, tuple(proxy_networks)).report()


class _Linter:
    """Judges one project."""

    def __init__(
        self, project: Project, settings: Settings, proxy_networks: tuple[str, ...]
    ) -> None:
        self._project = project
        self._settings = settings
        self._stack = project.kind is Kind.STACK
        self._source = "swarm" if self._stack else "engine"
        self._proxies = [service for service in project.services if self._is_proxy(service)]
        self._workloads = {
            service.key: self._workload(index, service)
            for index, service in enumerate(project.services)
            if service.unclear is None and not service.mode.endswith("-job")
        }
        self._by_id = {
            identity: key
            for key, work in self._workloads.items()
            for identity in (work.instances[0].id, work.key.id)
        }
        named = {name for service in self._proxies for name in self._reachable(service)}
        named |= set(proxy_networks)
        known = bool(self._proxies or proxy_networks)
        self._networks = tuple(sorted(named)) if known else None
        self._seen = SourceSnapshot(
            source=self._source,
            workloads=MappingProxyType({work.key: work for work in self._workloads.values()}),
            proxies=tuple(
                ProxyInstance(id=service.key, name=self._name(service)) for service in self._proxies
            ),
            proxy_networks=self._networks,
        )
        self._desired = compile_snapshot(Snapshot({self._source: self._seen}), settings)
        self._hosts = {
            name: host for host in self._desired.site.hosts for name in (host.name, *host.aliases)
        }

    def report(self) -> Report:
        """All verdicts."""
        return Report(
            kind=self._project.kind,
            name=self._project.name,
            because=self._project.because,
            networks=self._networks,
            verdicts=tuple(self._verdict(service) for service in self._project.services),
            findings=tuple(
                Finding(
                    Level.REJECTED if remark.fatal else Level.WARNING,
                    "file",
                    remark.message,
                    remark.hint,
                    remark.place,
                )
                for remark in self._project.remarks
            ),
        )

    # from the files to workloads

    def _labels(self, service: Service) -> Mapping[str, Label]:
        """All labels that are read of a service, those that win last."""
        if self._stack:
            return {**service.labels, **service.deploy_labels}
        return service.labels

    def _is_proxy(self, service: Service) -> bool:
        named = self._settings.openresty.service_name
        if self._stack and named and named in (self._name(service), service.key):
            return True
        sections = [service.labels, service.deploy_labels] if self._stack else [service.labels]
        return any(
            PROXY_LABEL in section and section[PROXY_LABEL].value in PROXY_VALUES
            for section in sections
        )

    def _name(self, service: Service) -> str:
        if self._stack:
            return f"{self._project.name}_{service.key}"
        return service.container_name or f"{self._project.name}-{service.key}-1"

    def _on_host(self, service: Service) -> bool:
        if not self._stack:
            return service.network_mode == "host"
        return "host" in {self._project.network_name(key) for key in service.networks or ()}

    def _reachable(self, service: Service) -> tuple[str, ...]:
        """Networks over which the service could be reached, by the names that Docker has."""
        if not self._stack:
            if service.network_mode:
                return (service.network_mode,)
            if self._project.first_version:
                return ("bridge",)
        found = []
        for key in service.networks if service.networks is not None else ("default",):
            name = self._project.network_name(key)
            network = self._project.networks.get(key)
            node_only = name in _NODE_NETWORKS or (
                network is not None and network.driver in _NODE_DRIVERS
            )
            if not (self._stack and node_only):
                found.append(name)
        return tuple(found)

    def _workload(self, index: int, service: Service) -> Workload:
        on_host = self._on_host(service)
        networks = self._reachable(service)
        ports = {port.target for port in service.ports}
        if not self._stack:
            ports |= set(service.expose)
        published = tuple(
            PublishedPort(port.target, port.published or _ANY_PORT, port.host)
            for port in service.ports
            if not self._stack or port.mode == "host"
        )
        if on_host:
            published = tuple(PublishedPort(port, port) for port in sorted(ports))
        name = self._name(service)
        instance = Instance(
            id=f"{service.key}.1",
            name=f"{name}.1" if self._stack else name,
            state=InstanceState.UP,
            node_address=_ADDRESS,
            attachments=tuple(Attachment(network, _ADDRESS) for network in networks),
            published=published,
            host_network=on_host,
        )
        own = service.deploy_labels if self._stack else service.labels
        template: Mapping[str, Label] = service.labels if self._stack else {}
        return Workload(
            key=WorkloadKey(self._source, service.key),
            kind=WorkloadKind.SERVICE if self._stack else WorkloadKind.CONTAINER,
            name=name,
            created=float(index),
            labels=MappingProxyType(self._plain(own)),
            template_labels=MappingProxyType({k: v.value for k, v in template.items()}),
            networks=networks,
            ports=tuple(sorted(ports)),
            instances=(instance,),
            wanted=1,
            stack=self._project.name,
            host_ports_only=on_host or (self._stack and not networks),
            vips=tuple(Attachment(network, _VIP) for network in networks)
            if self._stack and service.endpoint_mode == "vip"
            else (),
            hostname="" if self._stack else service.hostname,
            domainname="" if self._stack else service.domainname,
        )

    def _plain(self, labels: Mapping[str, Label]) -> dict[str, str]:
        """The values, and the label that Docker itself adds."""
        added = STACK_LABEL if self._stack else PROJECT_LABEL
        return {added: self._project.name} | {key: item.value for key, item in labels.items()}

    # verdicts

    def _verdict(self, service: Service) -> Verdict:
        findings = list(self._stumbles(service))
        workload = self._workloads.get(service.key)
        routes: tuple[Line, ...] = ()
        if service in self._proxies:
            outcome = Outcome.PROXY
        elif not self._asks(service):
            outcome = Outcome.SILENT
        elif workload is None:
            findings.append(self._why_no_workload(service))
            outcome = Outcome.UNKNOWN if service.unclear else Outcome.REJECTED
        else:
            examined = self._examined(workload)
            routes = tuple(self._lines(workload, examined))
            refused = [self._finding(service, workload, item) for item in self._refused(examined)]
            findings += refused
            findings += self._open_questions(service, examined)
            outcome = Outcome.ROUTED if routes else Outcome.REJECTED
            levels = {item.level for item in refused}
            if not routes and Level.WARNING in levels and Level.REJECTED not in levels:
                outcome = Outcome.UNKNOWN
        return Verdict(
            key=service.key,
            name=self._name(service),
            place=service.place,
            outcome=outcome,
            routes=routes,
            findings=tuple(findings),
        )

    def _asks(self, service: Service) -> bool:
        if self._settings.hostname_fallback and not self._stack and service.domainname:
            return True
        return any(_asks(label) for label in self._labels(service))

    def _dialect(self, service: Service) -> Dialect:
        """The dialect in which a service asks."""
        found = (_dialect_of(name) for name in self._labels(service) if _asks(name))
        return DOCKER_LB if all(item is DOCKER_LB for item in found) else INTERLOCK

    def _examined(self, workload: Workload) -> Examined:
        return examine(
            workload, self._networks, self._settings, proxies=proxy_containers(self._seen)
        )

    def _refused(self, examined: Examined) -> list[Rejection]:
        """All rejections of a workload: its own, and those that others are the cause of."""
        own = list(examined.rejections)
        subject = subject_of(examined.workload)
        own += [
            item for item in self._desired.rejections if item.subject == subject and item not in own
        ]
        return own

    def _finding(self, service: Service, workload: Workload, rejection: Rejection) -> Finding:
        message, hint, level = rejection.message, rejection.hint, Level.REJECTED
        if rejection.reason in (Reason.LABEL_IGNORED, Reason.MIRROR_UNKNOWN):
            level = Level.WARNING
        elif rejection.reason == Reason.OTHER_CLUSTER:
            level = Level.NOTE
        elif self._depends_on_image(workload, rejection):
            level = Level.WARNING
            message += " What its image exposes is not known here."
        elif self._depends_on_proxy(rejection):
            level = Level.WARNING
            message += " No OpenResty is in these files, so which networks it is on is not known."
            hint = f"Name them with --proxy-network, or give its file too. Else: {hint}"
        elif rejection.reason in (Reason.CONFLICT, Reason.TLS_CONFLICT):
            message += " (Of two that are new, Docker decides which is older.)"
        return Finding(level, rejection.reason, message, hint, self._place(service, rejection))

    def _depends_on_image(self, workload: Workload, rejection: Rejection) -> bool:
        """Whether a container lacks a port that its image may well expose."""
        if rejection.reason != Reason.NO_PORT or workload.kind is not WorkloadKind.CONTAINER:
            return False
        exposing = self._examined(replace(workload, ports=(_ANY_PORT,)))
        return all(item.reason != Reason.NO_PORT for item in exposing.rejections)

    def _depends_on_proxy(self, rejection: Rejection) -> bool:
        return self._networks is None and rejection.reason in (
            Reason.NETWORK_AMBIGUOUS,
            Reason.NETWORK_NOT_SHARED,
            Reason.NOT_PUBLISHED,
            Reason.NO_PORT,
        )

    def _place(self, service: Service, rejection: Rejection) -> Place:
        """Where the label is that a rejection speaks of first, else where the service is."""
        labels = self._labels(service)
        found = re.findall(
            r"(?<![\w.-])(?:interlock|com\.docker\.lb)\.[\w.-]*\w", rejection.message
        )
        for name in found:
            if name in labels:
                return labels[name].place
        routing = [item.place for name, item in labels.items() if _asks(name)]
        return min(routing, key=_line_of) if routing else service.place

    def _lines(self, workload: Workload, examined: Examined) -> Iterator[Line]:
        for route in examined.routes:
            for name in route.claim.names:
                line = self._line(workload, route, name)
                if line is not None:
                    yield line

    def _line(self, workload: Workload, route: Route, name: str) -> Line | None:
        """The route by one of its names, None where others hold that."""
        root = route.claim.root(name)
        host = self._hosts.get(name)
        location = self._location(host, name, root)
        upstream = location.upstream if location is not None else f"{name}{root}"
        serving, canary = self._serving(upstream, workload)
        if not serving:
            return None
        plain = Line(
            host=name if host is not None else "",
            path=root,
            port=route.reach.port,
            network=route.reach.network,
            over=_over(route),
            what=told(name, root),
            tcp_port=route.claim.declaration.tcp_port if location is None else None,
            default_backend=name == DEFAULT,
            canary=canary,
            shared_with=tuple(sorted(serving - {self._by_id[workload.key.id]})),
        )
        if location is None:
            return plain
        redirects = host.redirects if host is not None else ()
        tls = host.tls if host is not None else None
        return replace(
            plain,
            tls=tls is not None,
            tls_only=location.tls_only,
            certificate=tls.certificate if tls is not None else "",
            passthrough=bool(host is not None and host.passthrough),
            rewrite=location.rewrite,
            backend_tls=location.backend_tls is not None,
            redirect=next((item.target for item in redirects if item.host == name), ""),
        )

    def _location(self, host: Host | None, name: str, root: str) -> Location | None:
        locations = host.locations if host is not None else ()
        if name == DEFAULT:
            locations = self._desired.site.default
        return next((item for item in locations if item.path == root), None)

    def _serving(self, name: str, workload: Workload) -> tuple[set[str], bool]:
        """Keys of the services behind an upstream that has the workload, or behind its canary.

        Returns:
            Nothing where it is in neither; and whether it is in the canary.
        """
        upstreams = self._desired.membership.upstreams
        found = upstreams.get(name)
        names = [name]
        if found is not None and found.policy.canary is not None:
            names.append(found.policy.canary.upstream)
        for each in names:
            upstream = upstreams.get(each)
            keys = {self._key_of(peer.id) for peer in (upstream.peers if upstream else ())}
            if self._by_id[workload.key.id] in keys:
                return keys, each != name
        return set(), False

    def _key_of(self, peer: str) -> str:
        """The service that a peer is of: one of its tasks, or its virtual IP."""
        return self._by_id.get(peer) or self._by_id[peer.removesuffix("-vip")]

    # what is easily got wrong

    def _why_no_workload(self, service: Service) -> Finding:
        if service.unclear is not None:
            remark = service.unclear
            return Finding(Level.WARNING, "unsupported", remark.message, remark.hint, remark.place)
        return Finding(
            Level.REJECTED,
            "job",
            f"service {service.key} is a job (deploy.mode: {service.mode}), which is never routed.",
            "Make it replicated or global.",
            service.place,
        )

    def _open_questions(self, service: Service, examined: Examined) -> Iterator[Finding]:
        if service.replicas == 0:
            yield Finding(
                Level.NOTE,
                "no_replicas",
                "It wants no replicas: until it is scaled up its requests get 503.",
                f"docker service scale {self._name(service)}=1",
                service.place,
            )
        for route in examined.routes:
            yield from self._secrets_not_there(service, route.claim)
            if (
                route.claim.declaration.port is None
                and route.reach.way is Way.NETWORK
                and examined.workload.kind is WorkloadKind.CONTAINER
            ):
                yield Finding(
                    Level.WARNING,
                    "port_of_image",
                    f"{route.claim.declaration.what}: port {route.reach.port} is the lowest one "
                    "that the file declares; if its image exposes a lower one, that is taken.",
                    f"Name the port in the label {route.claim.declaration.label('port')}.",
                    service.place,
                )

    def _secrets_not_there(self, service: Service, claim: Claim) -> Iterator[Finding]:
        """Docker secrets that a route names and that OpenResty, in these files, does not have."""
        directory = self._settings.extension.secret_path("")
        mounted = {path for proxy in self._proxies for path in proxy.secrets}
        tls, backend = claim.tls, claim.backend_tls
        paths = [tls.certificate, tls.key, tls.client_ca] if tls is not None else []
        paths += [backend.ca, backend.certificate, backend.key] if backend is not None else []
        lost = sorted({path for path in paths if path.startswith(directory)} - mounted)
        if lost and self._proxies:
            yield Finding(
                Level.WARNING,
                "secret_not_mounted",
                f"{claim.declaration.what}: OpenResty has no secret at {', '.join(lost)}.",
                "Mount it in OpenResty's service, under secrets.",
                self._labels(service).get(claim.declaration.label("ssl_cert"), service).place,
            )

    def _stumbles(self, service: Service) -> Iterator[Finding]:
        if self._stack:
            yield from self._stack_stumbles(service)
        else:
            yield from self._compose_stumbles(service)
        marks = self._labels(service).get(PROXY_LABEL)
        if marks is not None and marks.value not in PROXY_VALUES:
            yield Finding(
                Level.WARNING,
                "not_openresty",
                f"{PROXY_LABEL}={marks.value} marks no OpenResty: the agent looks for "
                f"{PROXY_LABEL}=nginx (or haproxy, as Interlock had it).",
                f"Write {PROXY_LABEL}=nginx on the service that is OpenResty.",
                marks.place,
            )

    def _stack_stumbles(self, service: Service) -> Iterator[Finding]:
        on_container = _routing(service.labels)
        for name in sorted(on_container & _routing(service.deploy_labels)):
            mine, other = service.labels[name], service.deploy_labels[name]
            if mine.value != other.value:
                yield Finding(
                    Level.WARNING,
                    "label_twice",
                    f"{name} is under labels ({mine.value}) and under deploy.labels "
                    f"({other.value}): the one under deploy.labels counts.",
                    "Remove one of the two.",
                    mine.place,
                )
        if self._asks(service) and on_container - _routing(service.deploy_labels):
            first = min((service.labels[name].place for name in on_container), key=_line_of)
            yield Finding(
                Level.NOTE,
                "container_labels",
                "In a stack, labels are those of the containers. They are read, but changing them "
                "restarts every task; deploy.labels does not.",
                "Move them under deploy.labels.",
                first,
            )
        if self._asks(service) and service.expose:
            yield Finding(
                Level.NOTE,
                "expose",
                "`docker stack deploy` leaves expose out, so it says nothing about the port.",
                f"Name the port in the label {self._dialect(service).label('port')}.",
                service.place,
            )
        if self._asks(service) and service.network_mode:
            yield Finding(
                Level.WARNING,
                "network_mode",
                "`docker stack deploy` leaves network_mode out.",
                "Name the network host (external: true) under networks.",
                service.place,
            )

    def _compose_stumbles(self, service: Service) -> Iterator[Finding]:
        if lost := _routing(service.deploy_labels) - _routing(service.labels):
            first = min((service.deploy_labels[name].place for name in lost), key=_line_of)
            yield Finding(
                Level.WARNING,
                "deploy_labels",
                "Docker Compose puts deploy.labels on no container, so "
                f"{', '.join(sorted(lost))} would never be seen.",
                "Move them under labels, or deploy the file as a stack (--kind stack).",
                first,
            )


def _line_of(place: Place) -> tuple[str, int]:
    return place.file, place.line


def _routing(labels: Iterable[str]) -> set[str]:
    return {name for name in labels if _dialect_of(name) is not None}


def _dialect_of(label: str) -> Dialect | None:
    return next((item for item in _DIALECTS if label.lower().startswith(item.prefix)), None)


def _asks(label: str) -> bool:
    """Whether a label is about a route."""
    dialect = _dialect_of(label)
    if dialect is None:
        return False
    return label[len(dialect.prefix) :].split(".", 1)[0] not in dialect.silent


def _over(route: Route) -> str:
    reach = route.reach
    port = "its own port" if reach.port is None else f"port {reach.port}"
    if reach.way is Way.NETWORK:
        return f"{port} over {reach.network}"
    return f"{port}, as published on its node"
