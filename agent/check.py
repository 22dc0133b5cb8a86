"""`tidegate check`: is everything as it has to be, and if not, what is wrong and what cures it?

Each part looks at one thing that the agent needs and reports it as findings; nothing is changed
anywhere, no lease is taken. Where one part fails the others still look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from agent.compile import compile_snapshot
from agent.config.settings import Settings
from agent.config.stores import BUILT_IN, Loaded
from agent.controller import SiteRenderer
from agent.discovery import build_sources
from agent.discovery.classic_nodes import is_classic, nodes_of
from agent.discovery.docker_api import Connector, Engine, addresses, read, whatever
from agent.discovery.swarm import require_manager
from agent.discovery.swarm_watch import opener
from agent.driver.openresty import Build, Token, connector
from agent.driver.parts import AdminClient
from agent.driver.targets import Target, targets
from agent.errors import (
    DiscoveryError,
    DriverError,
    InstanceUnauthorized,
    RenderError,
    SettingsError,
    StoreUnavailable,
    WatchCompacted,
    WatchUnavailable,
)
from agent.metrics import version
from agent.model import Rejection, Site, Snapshot, SourceSnapshot


class Level(StrEnum):
    """How a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, how it is, and the cure if it is not well."""

    level: Level
    subject: str
    text: str
    cure: str = ""


class EngineLike(Protocol):
    """What is needed of the engine."""

    version: str
    api_version: str

    def get(self, path: str, *, params: Any = None) -> bytes:
        """The body of an answer."""

    def close(self) -> None:
        """Close the connection."""


def check(
    loaded: Loaded,
    *,
    strict: bool = False,
    refusals: Sequence[Rejection] = (),
    unknown: Sequence[str] = (),
) -> Iterator[Finding]:
    """All findings, as they are made.

    Args:
        strict: a key that is not known is a failure.
        refusals: what OpenResty refused, by the word of the running agent.
        unknown: what is not known of that, a sentence each.
    """
    settings = loaded.settings
    yield from _settings(loaded, strict=strict)
    yield from _token(settings)
    yield from _templates(settings)
    yield from _tls(settings)
    yield from _engine(settings)
    snapshots: list[SourceSnapshot] = []
    yield from _sources(settings, snapshots)
    yield from _instances(settings, snapshots)
    yield from _refusals(refusals, unknown)


def no_store(error: StoreUnavailable) -> Iterator[Finding]:
    """The one finding there can be when the store with the settings does not answer."""
    yield Finding(
        Level.FAILED,
        "settings",
        str(error),
        "Is the URL of -k right, and the store up? An agent that runs goes on with what it has; "
        "one that starts waits.",
    )


def _ok(subject: str, text: str) -> Finding:
    return Finding(Level.OK, subject, text)


def _settings(loaded: Loaded, *, strict: bool) -> Iterator[Finding]:
    for warning in loaded.warnings:
        if warning.unknown:
            level = Level.FAILED if strict else Level.WARNING
            yield Finding(level, "settings", str(warning), "Mend the spelling, or remove the key.")
        else:
            yield Finding(
                Level.WARNING, "settings", str(warning), "docs/migration.md has every key."
            )
    if loaded.where == BUILT_IN:
        yield Finding(
            Level.WARNING,
            "settings",
            "none given, the built-in defaults are in force",
            "Give a file with -c, the text in TIDEGATE_CONFIG or INTERLOCK_CONFIG, or a "
            "key-value store with -k.",
        )
    elif loaded.text.strip():
        yield _ok("settings", f"read from {loaded.where}")
    for place in loaded.passed_over:
        yield Finding(
            Level.WARNING,
            "settings",
            f"{loaded.where} beats {place}, which is not read",
            "A key-value store comes before the environment, and that before a file: give one.",
        )


def _token(settings: Settings) -> Iterator[Finding]:
    driver = settings.openresty
    try:
        token = Token(token=driver.token, file=driver.token_file).read()
    except InstanceUnauthorized as error:
        yield Finding(
            Level.FAILED,
            "token",
            str(error),
            "Put the token there, or mount the secret, so that this user may read it.",
        )
        return
    if token:
        yield _ok("token", f"read from {driver.token_file or 'OpenResty.Token'}")
    else:
        yield Finding(
            Level.WARNING,
            "token",
            "OpenResty.TokenFile and OpenResty.Token are both empty; an instance that listens "
            "beyond loopback does not start without one",
            "Put a long random text into a Docker secret and name its file in OpenResty.TokenFile.",
        )


def _templates(settings: Settings) -> Iterator[Finding]:
    path = settings.extension.template_path
    if not path:
        return
    try:
        SiteRenderer(settings).render(Site(()), Build())
    except RenderError as error:
        yield Finding(Level.FAILED, "templates", str(error), "Mend the template; see docs.")
    else:
        yield _ok("templates", f"{path} can be used")


def _tls(settings: Settings) -> Iterator[Finding]:
    extension = settings.extension
    old = [word for word in extension.ssl_protocols.split() if word in _OLD_PROTOCOLS]
    if old and extension.ssl_port and "@SECLEVEL=0" not in extension.ssl_ciphers.upper():
        yield Finding(
            Level.WARNING,
            "TLS",
            f"SSLProtocols has {' and '.join(old)}, which OpenSSL 3 does not speak with the "
            f"ciphers {extension.ssl_ciphers or 'that it takes by itself'}",
            'Add "@SECLEVEL=0" to SSLCiphers, as in "DEFAULT@SECLEVEL=0", or do without them.',
        )


_OLD_PROTOCOLS = ("TLSv1", "TLSv1.1")


def _engine(settings: Settings) -> Iterator[Finding]:
    if set(settings.sources) <= {"static"}:
        return
    several = len(addresses(settings)) > 1 and {"auto", "swarm"} & set(settings.sources)
    try:
        engine = Connector(settings)(_no_worker if several else whatever)
    except DiscoveryError as error:
        yield Finding(
            Level.FAILED,
            "engine",
            str(error),
            "Start the engine, mount its socket, or set DockerURL; if there is none, set "
            'Sources = ["static"].',
        )
        return
    with closing(engine):
        yield _ok("engine", f"version {engine.version}, API {engine.api_version}")
        try:
            info = read(engine, "/info")
        except DiscoveryError as error:
            yield Finding(Level.FAILED, "engine", str(error), "Look into the engine's log.")
            return
        if is_classic(info):
            yield from _classic(settings, info)
        else:
            yield from _swarm(settings, engine, info.get("Swarm") or {})


def _no_worker(engine: Engine) -> None:
    """Of several addresses the agent takes the first that is no worker's."""
    info = read(engine, "/info")
    state = (info.get("Swarm") or {}).get("LocalNodeState", "inactive")
    if state != "inactive" and not is_classic(info):
        require_manager(engine)


def _classic(settings: Settings, info: dict[str, Any]) -> Iterator[Finding]:
    if not {"auto", "classic"} & set(settings.sources):
        yield Finding(
            Level.FAILED,
            "swarm",
            "the engine is a classic Swarm's manager, and Sources does not name it",
            'Set Sources = ["auto"], or ["classic"].',
        )
        return
    nodes = nodes_of(info)
    lost = sorted(name for name, node in nodes.items() if not node.healthy)
    if lost or not nodes:
        yield Finding(
            Level.WARNING,
            "swarm",
            f"a classic Swarm's manager of {len(nodes)} nodes; not healthy: "
            f"{', '.join(lost) or 'none'}",
            "Look into the manager's log; what runs on those nodes takes no traffic.",
        )
    else:
        yield _ok("swarm", f"a classic Swarm's manager of {len(nodes)} nodes, all healthy")


def _swarm(settings: Settings, engine: EngineLike, info: dict[str, Any]) -> Iterator[Finding]:
    state = info.get("LocalNodeState", "inactive")
    named = "swarm" in settings.sources
    if state == "inactive":
        if named:
            yield Finding(
                Level.FAILED,
                "swarm",
                "Sources names swarm, but the engine is in none",
                'Run `docker swarm init`, or set Sources = ["auto"].',
            )
        else:
            yield _ok("swarm", "the engine is in none: its containers are the source")
        return
    if not info.get("ControlAvailable"):
        if "engine" in settings.sources and not named:
            yield _ok("swarm", "the engine is a worker; its own containers are the source")
        else:
            yield Finding(
                Level.FAILED,
                "swarm",
                f"the engine is no manager of its swarm (state {state})",
                "Run the agent on a manager, or set DockerURL to one.",
            )
        return
    yield _ok("swarm", "the engine is a manager")
    yield from _watch(settings, engine)


def _watch(settings: Settings, engine: EngineLike) -> Iterator[Finding]:
    polling = f"tasks are polled every {settings.poll_interval:g} s"
    if settings.watch == "off":
        yield _ok("watch", f"off: {polling}")
        return
    try:
        root = str(read(engine, "/swarm")["TLSInfo"]["TrustRoot"])  # type: ignore[arg-type]
        opener(settings.watch_socket, timeout=settings.request_timeout)(root, 0).close()
    except (DiscoveryError, KeyError, WatchUnavailable, WatchCompacted) as error:
        needed = settings.watch == "on"
        yield Finding(
            Level.FAILED if needed else Level.WARNING,
            "watch",
            f"{error}" + ("" if needed else f"; instead {polling}"),
            "Mount the manager's /var/run/docker/swarm into the agent, and run it as a user who "
            "may open control.sock.",
        )
    else:
        yield _ok("watch", f"SwarmKit's Watch answers on {settings.watch_socket}")


def _sources(settings: Settings, snapshots: list[SourceSnapshot]) -> Iterator[Finding]:
    try:
        sources = build_sources(settings)
    except SettingsError as error:
        yield Finding(Level.FAILED, "sources", str(error), "Mend Sources.")
        return
    for source in sources:
        try:
            snapshot = source.read_once()
        except DiscoveryError as error:
            yield Finding(
                Level.FAILED,
                f"source {source.name}",
                str(error),
                "Mend what it names. What an agent that runs has published before serves on.",
            )
            continue
        snapshots.append(snapshot)
        yield _ok(
            f"source {snapshot.source}",
            f"{len(snapshot.workloads)} workloads, {len(snapshot.proxies)} OpenResty instances",
        )
    if not snapshots:
        return
    found = Snapshot(sources={item.source: item for item in snapshots})
    desired = compile_snapshot(found, settings)
    yield _ok(
        "routes",
        f"{len(desired.site.hosts)} hosts, {len(desired.membership.upstreams)} upstreams",
    )
    for item in desired.rejections:
        yield Finding(Level.WARNING, item.subject, f"{item.message} ({item.reason})", item.hint)


def _instances(settings: Settings, snapshots: list[SourceSnapshot]) -> Iterator[Finding]:
    found = targets((p for item in snapshots for p in item.proxies), settings.openresty)
    if not found:
        yield Finding(
            Level.WARNING,
            "OpenResty",
            "no instance is known",
            "Deploy one with the label interlock.ext.name=nginx (or set OpenResty.ServiceName), "
            "or name it in OpenResty.URLs.",
        )
        return
    connect = connector(settings.openresty)
    for target in found:
        with closing(connect(target)) as client:
            yield from _instance(target, client)


def _refusals(refusals: Sequence[Rejection], unknown: Sequence[str]) -> Iterator[Finding]:
    for item in refusals:
        yield Finding(Level.WARNING, item.subject, f"{item.message} ({item.reason})", item.hint)
    for text in unknown:
        yield Finding(
            Level.WARNING,
            "agent",
            text,
            "Ask the agent that runs and writes: start it, or say with --url where it listens.",
        )


def _instance(target: Target, client: AdminClient) -> Iterator[Finding]:
    subject = f"OpenResty {target.name}"
    try:
        status = client.status()
    except InstanceUnauthorized as error:
        yield Finding(
            Level.FAILED,
            subject,
            str(error),
            "Give agent and OpenResty the same token (OpenResty.TokenFile here, "
            "TIDEGATE_ADMIN_TOKEN_FILE there).",
        )
        return
    except DriverError as error:
        yield Finding(
            Level.FAILED,
            subject,
            str(error),
            "Is it running, is TIDEGATE_ADMIN_LISTEN an address that the agent reaches, and do "
            "both share a network?",
        )
        return
    versions = ", ".join(f"{name} {text}" for name, text in sorted(status.versions.items()))
    lease = f"agent {status.writer} writes" if status.writer else "no agent writes"
    yield _ok(
        subject,
        f"at {client.url}: {versions or 'versions unknown'}; revision {status.revision}, {lease}",
    )
    theirs = status.versions.get("tidegate", "")
    if theirs and theirs != version():
        yield Finding(
            Level.WARNING,
            subject,
            f"it is of Tidegate {theirs}, this agent of {version()}",
            "Update the older one.",
        )
    if status.dict_capacity and status.dict_free < status.dict_capacity / 10:
        yield Finding(
            Level.WARNING,
            subject,
            f"its shared dict has {status.dict_free} of {status.dict_capacity} bytes left",
            "Raise TIDEGATE_DICT_SIZE.",
        )
