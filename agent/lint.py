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
from agent.compile import Examined, Route, Way, compile_snapshot, examine, proxy_containers
from agent.composefile import Kind, Label, Place, Project, Service
from agent.config.settings import Settings
from agent.discovery.cluster import PROXY_LABEL, PROXY_VALUES, STACK_LABEL
from agent.discovery.containers import PROJECT_LABEL
from agent.labels import Reason, subject_of
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
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

_ROUTING = ("interlock.", "com.docker.lb.")
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
        over: how its instances are reached, and on which port, for people.
        shared_with: keys of other services whose instances serve the very same.
    """

    host: str
    path: str
    port: int | None
    network: str
    over: str
    tls: bool = False
    tls_only: bool = False
    certificate: str = ""
    rewrite: bool = False
    backend_tls: bool = False
    shared_with: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "host": self.host,
            "path": self.path,
            "port": self.port,
            "network": self.network,
            "tls": self.tls,
            "tls_only": self.tls_only,
            "certificate": self.certificate,
            "rewrite": self.rewrite,
            "backend_tls": self.backend_tls,
            "shared_with": list(self.shared_with),
        }

    def __str__(self) -> str:
        scheme = "https" if self.tls else "http"
        parts = [f"{scheme}://{self.host}{self.path} -> {self.over}"]
        if self.tls_only:
            parts.append("plain HTTP is redirected to TLS")
        elif self.tls:
            parts.append("plain HTTP too")
        if self.rewrite:
            parts.append(f"{self.path} is taken off")
        if self.backend_tls:
            parts.append("TLS to the backend")
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
        self._by_id = {work.instances[0].id: key for key, work in self._workloads.items()}
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
            told = [self._finding(service, workload, item) for item in self._refused(examined)]
            findings += told
            findings += self._open_questions(service, examined)
            outcome = Outcome.ROUTED if routes else Outcome.REJECTED
            if not routes and not any(item.level is Level.REJECTED for item in told):
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
        return any(
            label.lower().startswith(_ROUTING) and label not in (PROXY_LABEL, "interlock.app")
            for label in self._labels(service)
        )

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
        if rejection.reason == Reason.LABEL_IGNORED:
            level = Level.WARNING
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
        routing = [item.place for name, item in labels.items() if name.startswith(_ROUTING)]
        return min(routing, key=lambda place: place.line) if routing else service.place

    def _lines(self, workload: Workload, examined: Examined) -> Iterator[Line]:
        for route in examined.routes:
            for name in route.claim.names:
                line = self._line(workload, route, name)
                if line is not None:
                    yield line

    def _line(self, workload: Workload, route: Route, name: str) -> Line | None:
        """The route by one of its names, None where others hold that."""
        host = self._hosts.get(name)
        root = route.claim.declaration.context_root
        location = (
            next((item for item in host.locations if item.path == root), None) if host else None
        )
        upstream = self._desired.membership.upstreams.get(location.upstream) if location else None
        if host is None or location is None or upstream is None:
            return None
        serving = [peer.id for peer in upstream.peers]
        if workload.instances[0].id not in serving:
            return None
        return Line(
            host=name,
            path=root,
            port=route.reach.port,
            network=route.reach.network,
            over=_over(route),
            tls=host.tls is not None,
            tls_only=location.tls_only,
            certificate=host.tls.certificate if host.tls else "",
            rewrite=location.rewrite,
            backend_tls=location.backend_tls is not None,
            shared_with=tuple(
                sorted(
                    self._by_id[peer]
                    for peer in serving
                    if peer in self._by_id and peer != workload.instances[0].id
                )
            ),
        )

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
            if (
                route.claim.declaration.port is None
                and route.reach.way is Way.NETWORK
                and examined.workload.kind is WorkloadKind.CONTAINER
            ):
                yield Finding(
                    Level.WARNING,
                    "port_of_image",
                    f"{route.claim.declaration.host}: port {route.reach.port} is the lowest one "
                    "that the file declares; if its image exposes a lower one, that is taken.",
                    "Name the port in the label interlock.port.",
                    service.place,
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
        if on_container - _routing(service.deploy_labels):
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
                "Name the port in the label interlock.port.",
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
    return {name for name in labels if name.lower().startswith(_ROUTING)}


def _over(route: Route) -> str:
    reach = route.reach
    port = "its own port" if reach.port is None else f"port {reach.port}"
    if reach.way is Way.NETWORK:
        return f"{port} over {reach.network}"
    return f"{port}, as published on its node"
