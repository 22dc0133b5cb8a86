"""The loop: what the sources see is compiled and handed to the fleet, for as long as we run.

Why one loop: compile remembers what it saw, and order matters. Everything slow is elsewhere: each
source waits in its own thread, each instance is pushed to from its own. A mailbox with the newest
snapshot of each source stands between, so a burst coalesces without a timer. Nothing is pushed
before **every** configured source has published once: an incomplete view would take away what
another source knows of. This module must not know Docker's API or nginx' syntax.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from agent import policies, render
from agent.compile import DEFAULT, Compiler
from agent.config.settings import Settings
from agent.discovery.base import Observer, Source, SourceStatus
from agent.driver.fleet import Fleet, InstanceState, InstanceView, Options
from agent.driver.openresty import Build, connector
from agent.driver.parts import Rendered
from agent.driver.targets import Target, targets
from agent.errors import SettingsError
from agent.metrics import InstanceSeries, Metrics, SourceView, version
from agent.model import (
    Desired,
    Host,
    Location,
    Membership,
    Rejection,
    Site,
    Snapshot,
    SourceSnapshot,
)

log = logging.getLogger(__name__)

BuildSources = Callable[[Settings, Observer], Sequence[Source]]

SOURCE_RESTART = 1.0
"""Seconds until a source that ended unexpectedly is started again."""

SOURCE_PATIENCE = 0.5
"""Seconds that the end waits for sources. One may be in the middle of a call that cannot be cut
short, of an engine that is silent; it has nothing to finish, and ends with the process."""

SHORTEST_HEARTBEAT = 0.1
"""Seconds; a shorter one in the settings would only burn time."""

IDLE = 30.0
"""Seconds between looks when nothing has been heard of: a safety net, not a poll."""


class SiteRenderer:
    """The renderer as the driver wants it: with these settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def render(self, site: Site, build: Build) -> Rendered:
        """The files for that nginx. Raises RenderError."""
        known = build.nginx_version or render.Capabilities().nginx_version
        capabilities = render.Capabilities(nginx_version=known, features=build.features)
        return Rendered(
            files=render.render(site, self._settings, capabilities),
            hosts=render.hosts_of_files(site),
            settings=render.SETTINGS_OF_FILES,
        )

    def generation(self, files: Mapping[str, str]) -> str:
        """The generation that these files are."""
        return render.generation(files)


def options(settings: Settings) -> Options:
    """The driver's times."""
    return Options(
        heartbeat=max(SHORTEST_HEARTBEAT, settings.openresty.heartbeat),
        site_quiet=settings.site_quiet,
        site_max_wait=settings.site_max_wait,
        http3=settings.extension.http3,
    )


def writer_id() -> str:
    """This agent's name in leases: unique for each start, so that two never take turns as one."""
    host = "".join(char for char in socket.gethostname() if char.isascii() and char.isprintable())
    return f"{host[:80] or 'agent'}-{secrets.token_hex(4)}"


def build_fleet(settings: Settings, metrics: Metrics) -> Fleet:
    """The fleet over HTTP."""
    return Fleet(
        writer=writer_id(),
        connect=connector(settings.openresty),
        renderer=SiteRenderer(settings),
        options=options(settings),
        sink=metrics,
    )


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the agent does its work, and if not, each reason in a sentence."""

    ready: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    """All that `/api/state` shows, of one moment."""

    version: str
    settings_from: str
    readiness: Readiness
    sources: tuple[SourceStatus, ...]
    waiting_for: tuple[str, ...]
    desired: Desired
    rejections: tuple[Rejection, ...]
    instances: tuple[InstanceView, ...]

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes; docs/cli.md has an example."""
        now = time.time()
        return {
            "version": self.version,
            "settings_from": self.settings_from,
            "ready": self.readiness.ready,
            "reasons": list(self.readiness.reasons),
            "waiting_for": list(self.waiting_for),
            "sources": [
                {
                    "name": source.name,
                    "mode": source.mode,
                    "mode_reason": source.mode_reason,
                    "connected": source.connected,
                    "age_seconds": _age(now, source.last_success),
                    "error": source.last_error,
                    "engine_version": source.engine_version,
                    "events": source.events,
                }
                for source in self.sources
            ],
            "routes": _routes(self.desired),
            "tcp": [
                {"port": route.port, "upstream": route.upstream} for route in self.desired.site.tcp
            ],
            "upstreams": [
                {
                    "name": upstream.name,
                    "policy": policies.to_json(upstream.policy),
                    "hold_seconds": upstream.hold,
                    "peers": [
                        {
                            "id": peer.id,
                            "address": peer.address,
                            "port": peer.port,
                            "weight": peer.weight,
                            "state": peer.state.value,
                        }
                        for peer in upstream.peers
                    ],
                }
                for _, upstream in sorted(self.desired.membership.upstreams.items())
            ],
            "rejections": [
                {
                    "subject": item.subject,
                    "reason": item.reason,
                    "message": item.message,
                    "hint": item.hint,
                    "source": item.source,
                    "served": item.served,
                }
                for item in self.rejections
            ],
            "instances": [
                {
                    "name": view.name,
                    "id": view.id,
                    "url": view.url,
                    "state": view.state.value,
                    "in_sync": view.in_sync,
                    "error": view.error,
                    "revision": view.revision,
                    "generation": view.generation,
                    "instance": view.instance,
                    "writer": view.writer,
                    "upstreams": view.upstreams,
                    "peers": view.peers,
                    "versions": dict(view.versions),
                    "age_seconds": _age(now, view.last_seen),
                    "quarantined": list(view.quarantined),
                }
                for view in self.instances
            ],
        }


def _age(now: float, at: float) -> float | None:
    """Seconds since `at`, None for never."""
    return round(max(0.0, now - at), 3) if at else None


def _routes(desired: Desired) -> list[dict[str, object]]:
    upstreams = desired.membership.upstreams
    unclaimed = Host(DEFAULT, (), desired.site.default)
    return [
        {
            "host": host.name,
            "aliases": list(host.aliases),
            "path": location.path,
            "upstream": location.upstream,
            "peers": len(upstreams[location.upstream].peers)
            if location.upstream in upstreams
            else 0,
            "tls": host.tls is not None,
            "tls_only": location.tls_only,
            "rewrite": location.rewrite,
            "location": _LOCATION.dump_python(location, mode="json", exclude_defaults=True),
        }
        for host in (*desired.site.hosts, unclaimed)
        for location in host.locations
    ]


_LOCATION = TypeAdapter(Location)
"""What of a location differs from the defaults; `plan` makes the location of it again."""


class _SourceSet:
    """The sources of one version of the settings, each in a thread of its own."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        publish: Callable[[_SourceSet, int, SourceSnapshot], None],
        metrics: Metrics,
    ) -> None:
        self.sources = tuple(sources)
        self.snapshots: dict[int, SourceSnapshot] = {}
        self._publish = publish
        self._metrics = metrics
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._guard, args=(index, source), name=f"source {source.name}", daemon=True
            )
            for index, source in enumerate(self.sources)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the sources that have not published yet."""
        return tuple(
            source.name for index, source in enumerate(self.sources) if index not in self.snapshots
        )

    def _guard(self, index: int, source: Source) -> None:
        """Keep a source running: it never ends by itself, so an end is a defect to be survived."""
        while not self._stop.is_set():
            try:
                source.run(lambda snapshot: self._publish(self, index, snapshot), self._stop)
            except Exception:
                log.exception("source %s: unexpected error; it is started again", source.name)
            else:
                if self._stop.is_set():
                    return
                log.error("source %s ended by itself; it is started again", source.name)
            self._metrics.loop_error("source")
            self._stop.wait(SOURCE_RESTART)


class Controller:
    """Runs sources, compiler and fleet.

    Args:
        settings: as read at start.
        settings_from: where they came from, for people.
        build_sources: makes the sources that settings name.
        fleet: not yet started.
        metrics: is told, and asks back at each scrape.
        compiler: its own by default.

    Raises:
        SettingsError: the sources cannot be made of these settings.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        settings_from: str,
        build_sources: BuildSources,
        fleet: Fleet,
        metrics: Metrics,
        compiler: Compiler | None = None,
    ) -> None:
        self._settings = settings
        self._settings_from = settings_from
        self._build_sources = build_sources
        self._fleet = fleet
        self._metrics = metrics
        self._compiler = compiler or Compiler()

        self._changed = threading.Condition()
        self._news = False
        self._stopping = False
        self._since: float | None = None
        self._active = self._source_set(settings)
        self._next: _SourceSet | None = None

        self._desired = Desired(Membership({}), Site(()), ())
        self._targets: tuple[Target, ...] = ()
        self._told_missing: tuple[str, ...] = ()
        self._complete = False
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

        metrics.sources_from(self._source_views)
        metrics.instances_from(self._instance_series)
        metrics.rejections_from(self.rejections)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    def start(self) -> None:
        """Start all threads."""
        self._set_targets(targets((), self._settings.openresty))
        self._fleet.start()
        self._active.start()
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End cleanly: sources, loop, then the fleet, whose leases are given up."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        sets = [item for item in (self._active, self._next) if item is not None]
        for item in sets:
            item.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._fleet.stop(max(0.5, deadline - time.monotonic()))
        patience = min(deadline, time.monotonic() + SOURCE_PATIENCE)
        for item in sets:
            item.join(patience)

    def reload(self, settings: Settings, settings_from: str) -> None:
        """Go on with other settings.

        New sources start beside the old ones, which are followed until all new ones have
        published; so nothing is missed and nothing shrinks.

        Raises:
            SettingsError: the sources cannot be made of them; the old settings stay in force.
        """
        if settings == self._settings:
            log.info("settings reread from %s: nothing has changed", settings_from)
            return
        new = self._source_set(settings)
        if settings.listen_addr != self._settings.listen_addr:
            log.warning("ListenAddr has changed: that takes effect at the next start")
        with self._changed:
            if self._next is not None:
                self._next.stop()
            self._next = new
            self._settings, self._settings_from = settings, settings_from
        self._fleet.reconfigure(
            connect=connector(settings.openresty),
            renderer=SiteRenderer(settings),
            options=options(settings),
        )
        new.start()
        self._notify()
        log.info("settings reread from %s: in force", settings_from)

    def rejections(self) -> tuple[Rejection, ...]:
        """Everything that asked to be served and is not, or not fully."""
        return self._desired.rejections + self._fleet.rejections()

    def readiness(self) -> Readiness:
        """Whether sources are fresh and at least one instance is in step.

        An agent that stands by is ready; so is one that knows of no instance at all yet.
        """
        with self._changed:
            current = self._active
        reasons = [f"source {name} has not published yet" for name in current.missing]
        now = time.time()
        limit = self._settings.ready_limit
        for source in current.sources:
            status = source.status
            age = now - status.last_success
            if status.last_success and age > limit:
                reasons.append(
                    f"source {source.name}: last good sync {age:.0f} s ago, the limit is "
                    f"{limit:g} s{': ' + status.last_error if status.last_error else ''}"
                )
        views = self._fleet.views()
        good = (InstanceState.IN_SYNC, InstanceState.STANDBY)
        if views and not any(view.state in good for view in views):
            reasons += [
                f"OpenResty {view.name} is {view.state.value}"
                + (f": {view.error}" if view.error else "")
                for view in views
            ]
        return Readiness(not reasons, tuple(reasons))

    def state(self) -> State:
        """Everything as of now."""
        with self._changed:
            current = self._active
        return State(
            version=version(),
            settings_from=self._settings_from,
            readiness=self.readiness(),
            sources=tuple(source.status for source in current.sources),
            waiting_for=current.missing,
            desired=self._desired,
            rejections=self.rejections(),
            instances=self._fleet.views(),
        )

    def _source_set(self, settings: Settings) -> _SourceSet:
        sources = self._build_sources(settings, self._metrics)
        if not sources:
            raise SettingsError("Sources: names no source")
        return _SourceSet(sources, publish=self._published, metrics=self._metrics)

    def _published(self, origin: _SourceSet, index: int, snapshot: SourceSnapshot) -> None:
        """Called in a source's thread: leave the snapshot in the mailbox."""
        with self._changed:
            if origin is not self._active and origin is not self._next:
                return
            first = index not in origin.snapshots
            origin.snapshots[index] = snapshot
            if not first and snapshot.changed_at and origin is self._active:
                at = snapshot.changed_at
                self._since = at if self._since is None else min(self._since, at)
            self._news = True
            self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._news, timeout=self._until_expiry()
                )
                if self._stopping:
                    return
                self._news = False
                retired = self._switch()
                snapshots = tuple(self._active.snapshots.values())
                missing = self._active.missing
                since, self._since = self._since, None
                settings = self._settings
            if retired is not None:
                retired.stop()
            try:
                self._turn(snapshots, missing, since, settings)
            except Exception:
                self._metrics.loop_error("controller")
                log.exception("controller: unexpected error; the loop goes on")
                time.sleep(1.0)

    def _switch(self) -> _SourceSet | None:
        """Take the sources of the new settings once all have published; returns the old ones."""
        if self._next is None or self._next.missing:
            return None
        retired, self._active, self._next = self._active, self._next, None
        return retired

    def _until_expiry(self) -> float:
        expiry = self._compiler.next_expiry
        return IDLE if expiry is None else min(IDLE, max(0.01, expiry - time.monotonic()))

    def _turn(
        self,
        snapshots: tuple[SourceSnapshot, ...],
        missing: tuple[str, ...],
        since: float | None,
        settings: Settings,
    ) -> None:
        """Compile what is known and hand it on."""
        if missing:
            if missing != self._told_missing:
                log.info("waiting for the first look of: %s", ", ".join(missing))
            self._told_missing = missing
            return
        if not self._complete:
            self._complete = True
            log.info("all sources have published: %s", ", ".join(s.source for s in snapshots))
        before = self._desired
        desired = self._compiler.compile(
            Snapshot(sources={item.source: item for item in snapshots}), settings
        )
        self._desired = desired
        proxies = tuple(proxy for item in snapshots for proxy in item.proxies)
        self._set_targets(targets(proxies, settings.openresty))
        self._fleet.apply(desired, since)
        self._metrics.desired(desired.membership)
        if desired.rejections is not before.rejections:
            _tell(before.rejections, desired.rejections)

    def _set_targets(self, wanted: tuple[Target, ...]) -> None:
        if wanted != self._targets:
            self._targets = wanted
            self._fleet.set_instances(wanted)

    def _source_views(self) -> list[SourceView]:
        with self._changed:
            sources = self._active.sources
        return [
            SourceView(source.name, status.mode, status.last_success)
            for source in sources
            for status in (source.status,)
        ]

    def _instance_series(self) -> list[InstanceSeries]:
        return [
            InstanceSeries(view.name, view.revision, view.generation, view.in_sync, view.last_seen)
            for view in self._fleet.views()
        ]


def _tell(before: tuple[Rejection, ...], after: tuple[Rejection, ...]) -> None:
    """Log rejections when they come and when they go, not all the time."""
    for item in sorted(set(after) - set(before), key=lambda item: item.subject):
        # Not "is not served": a label without effect is one of these, and takes nothing away.
        log.warning("%s: %s (%s) %s", item.subject, item.message, item.reason, item.hint)
    for item in sorted(set(before) - set(after), key=lambda item: item.subject):
        log.info("%s: no longer rejected (%s)", item.subject, item.reason)
