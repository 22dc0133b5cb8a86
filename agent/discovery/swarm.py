"""Services and tasks of a Swarm: SwarmKit's Watch where its socket is at hand, else tight polling.

With the watch: open the stream, wait until it stands, list over REST, then apply what the stream
brings, newer versions only. Without: list the live tasks at short intervals, and everything when a
`service`, `node` or `network` event says so. Either way a full list at each resync interval is the
safety net, and a list that fails changes nothing.

There is no debounce: what one transaction of the manager changed is one snapshot, at once.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing

from agent.config.settings import Settings
from agent.discovery.base import (
    STOP_CHECK,
    Backoff,
    Observer,
    Publish,
    Reporter,
    SourceStatus,
)
from agent.discovery.classic_nodes import is_classic
from agent.discovery.cluster import Change, Cluster, Listing, Network, Task, TaskState
from agent.discovery.docker_api import Connect, Engine, EventStream, read
from agent.discovery.swarm_rest import LIVE, list_all, tasks_of
from agent.discovery.swarm_watch import OpenWatch, Transaction, Watch
from agent.errors import (
    DiscoveryError,
    DockerRefused,
    DockerUnavailable,
    WatchCompacted,
    WatchUnavailable,
)
from agent.model import SourceSnapshot

NAME = "swarm"

_log = logging.getLogger(__name__)

PATIENCE = 15.0
"""Seconds after a reconnect for which lists may be older than what was known.

A manager that has just started answers from a store that it is still filling. A cluster that was
restored from a backup is really older, and believed after this.
"""

POLL_INTERVAL = 0.5
"""Seconds between polls where PollInterval is empty, as it is in Interlock's own sample."""

DOUBT_INTERVAL = 2.0
"""Seconds between lists while they are in doubt."""

CATCH_UP_QUIET = 0.05
"""A resumed stream has caught up when nothing has come for so many seconds,"""

CATCH_UP_LIMIT = 1.0
"""or after so many, whatever still comes."""

STEADY = 5.0
"""Seconds that a watch must have stood for its end to be no sign of a standing fault."""

MANY_IDS = 200
"""More tasks than this are looked up by listing all rather than by id."""

_EVENT_TYPES = {"type": ("service", "node", "network")}


class SwarmSource:
    """The source named "swarm"."""

    name = NAME

    def __init__(
        self,
        settings: Settings,
        *,
        observer: Observer,
        connect: Connect,
        open_watch: OpenWatch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._open_watch = open_watch
        self._clock = clock
        self._report = Reporter(NAME, observer, _log)
        self._cluster = self._new_cluster()
        self._backoff = Backoff()
        self._watch_backoff = Backoff(first=0.1, cap=30.0)
        self._watch_due = 0.0
        self._watch_reason = "Watch is off in the settings" if settings.watch == "off" else ""
        self._quick_breaks = 0
        self._resume_from = 0
        # What a resumed stream replays is history: none of it is news until all of it is in.
        self._catching_up = False
        self._cluster_id = ""
        self._resync_due = 0.0
        self._doubt_until = 0.0
        self._lost = False
        self._listed = False

    @property
    def status(self) -> SourceStatus:
        """Where it stands."""
        return self._report.status

    def read_once(self) -> SourceSnapshot:
        """List everything once, by REST alone.

        Raises:
            DiscoveryError: the engine failed, or is no manager.
        """
        with closing(self._connect(require_manager)) as engine:
            cluster = self._new_cluster()
            cluster.load(list_all(engine))
        snapshot = cluster.snapshot(changed_at=time.monotonic())
        assert snapshot is not None, "the first snapshot is news even if it is empty"
        return snapshot

    def run(self, publish: Publish, stop: threading.Event) -> None:
        """Follow the Swarm until `stop` is set."""
        while not stop.is_set():
            try:
                with closing(self._connect(self._fit)) as engine:
                    self._follow(engine, publish, stop)
            except DiscoveryError as error:
                self._report.failed(error)
            except Exception as error:  # noqa: BLE001
                # The guard of the loop: a fault of ours must not end discovery for good.
                self._report.fault(error)
                self._resync_due = 0.0
            self._lost = True
            self._report.follow(following=False)
            stop.wait(self._backoff.wait())

    def _new_cluster(self) -> Cluster:
        return Cluster(
            source=NAME,
            proxy_service=self._settings.openresty.service_name,
            admin_port=self._settings.openresty.admin_port,
        )

    # --- one connection -------------------------------------------------------------------

    def _follow(self, engine: Engine, publish: Publish, stop: threading.Event) -> None:
        """Watch or poll over one connection until it fails."""
        self._report.engine(version=engine.version, api=engine.api_version)
        if self._lost:
            self._doubt_until = self._clock() + PATIENCE
            self._resync_due = 0.0
        while not stop.is_set():
            watch = self._try_watch(engine) or self._poll(engine, publish, stop)
            if watch is not None:
                with closing(watch):
                    self._follow_watch(engine, watch, publish, stop)

    def _fit(self, engine: Engine) -> None:
        """A manager; whichever of a cluster's it is."""
        self._check_cluster(require_manager(engine))

    def _check_cluster(self, cluster_id: str) -> None:
        """Versions of another cluster mean nothing here."""
        if self._cluster_id and cluster_id != self._cluster_id:
            _log.warning("source swarm: this is another cluster than before: %s", cluster_id)
            self._doubt_until = 0.0
            self._lost = False
            self._resume_from = 0
            self._resync_due = 0.0
        self._cluster_id = cluster_id

    def _sync(self, engine: Engine, publish: Publish, heard_at: float) -> None:
        """List everything, take it in, publish what has changed."""
        self._finish_sync(_ListCall(engine).now(), publish, heard_at)

    def _finish_sync(self, call: _ListCall, publish: Publish, heard_at: float) -> None:
        """Take in a list that has come, with what was heard meanwhile on top."""
        if isinstance(call.result, DiscoveryError):
            self._listed = False
            self._report.list_failed(call.result, call.seconds)
            self._resync_due = self._clock() + self._backoff.wait()
            raise call.result
        self._listed = True
        self._report.synced(call.seconds)
        self._backoff.reset()
        self._resync_due = self._clock() + self._settings.resync_interval
        self._take_in(call.result)
        self._cluster.apply(call.meanwhile)
        self._publish(publish, heard_at)

    def _take_in(self, listing: Listing) -> None:
        if not self._lost:
            self._cluster.load(listing)
        elif self._clock() >= self._doubt_until:
            self._cluster.reset(listing)
            self._lost = False
        elif self._cluster.load(listing, careful=True):
            self._resync_due = self._clock() + DOUBT_INTERVAL
        else:
            self._lost = False

    def _publish(self, publish: Publish, heard_at: float) -> None:
        snapshot = self._cluster.snapshot(changed_at=heard_at)
        if snapshot is not None:
            publish(snapshot)
            self._report.published()

    # --- watch ----------------------------------------------------------------------------

    def _try_watch(self, engine: Engine) -> Watch | None:
        """Open the watch if it is wanted and due; None is to poll for now."""
        if self._settings.watch == "off" or self._clock() < self._watch_due:
            return None
        try:
            root = _trust_root(engine)
            try:
                watch = self._open_watch(root, self._resume_from)
            except WatchCompacted as error:
                _log.info("source swarm: %s; everything is listed anew", error)
                self._resume_from = 0
                self._resync_due = 0.0
                watch = self._open_watch(root, 0)
        except (WatchUnavailable, WatchCompacted) as error:
            if self._settings.watch == "on":
                raise
            self._watch_due = self._clock() + self._watch_backoff.wait()
            self._watch_reason = str(error)
            return None
        if not self._resume_from:
            self._resync_due = 0.0
        self._catching_up = bool(self._resume_from)
        return watch

    def _follow_watch(
        self, engine: Engine, watch: Watch, publish: Publish, stop: threading.Event
    ) -> None:
        """Apply what the stream brings, until it breaks; list whenever that is due."""
        self._report.mode("watch")
        if self._resync_due <= self._clock():
            self._sync(engine, publish, self._clock())
        opened = self._clock()
        call: _ListCall | None = None
        while not stop.is_set():
            self._report.follow(following=self._listed)
            if call is None and self._clock() >= self._resync_due:
                # Beside the stream: no change waits for a list.
                call = _ListCall(engine).in_background()
            try:
                transaction = watch.next(CATCH_UP_QUIET if self._catching_up else STOP_CHECK)
            except WatchUnavailable as error:
                self._watch_broke(error, stood=self._clock() - opened)
                return
            if self._catching_up and (
                transaction is None or self._clock() - opened > CATCH_UP_LIMIT
            ):
                self._catching_up = False
                self._publish(publish, opened)
                if self._listed:
                    self._report.alive()
            if transaction is not None:
                self._apply(transaction, publish)
                if call is not None:
                    call.meanwhile += transaction.changes
            if call is not None and call.done.is_set():
                # The stream still stands: a list that failed is tried again, nothing else.
                with contextlib.suppress(DiscoveryError):
                    self._finish_sync(call, publish, self._clock())
                call = None

    def _watch_broke(self, error: WatchUnavailable, *, stood: float) -> None:
        """Have it opened again: at once, unless it keeps breaking."""
        if self._settings.watch == "on":
            raise error
        self._report.failed(error)
        if stood > STEADY:
            self._watch_backoff.reset()
            self._quick_breaks = 0
        self._quick_breaks += 1
        wait = self._watch_backoff.wait() if self._quick_breaks > 1 else 0.0
        self._watch_due = self._clock() + wait
        self._watch_reason = str(error)

    def _apply(self, transaction: Transaction, publish: Publish) -> None:
        changes = transaction.changes
        for change in changes:
            self._report.heard(change.kind)
            # Objects carry the version before their transaction: it is safe to resume from, and
            # many transactions come without a version of their own.
            self._resume_from = max(self._resume_from, change.record.version)
        self._resume_from = max(self._resume_from, transaction.version)
        self._cluster.apply(changes)
        if not self._catching_up:
            self._publish(publish, transaction.heard_at)

    # --- poll -----------------------------------------------------------------------------

    def _poll(self, engine: Engine, publish: Publish, stop: threading.Event) -> Watch | None:
        """List tasks at each poll interval until the watch can be had, or `stop` is set."""
        self._report.mode("poll", self._watch_reason)
        news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        events = engine.events(_EVENT_TYPES)
        threading.Thread(
            target=_collect, args=(events, news), name="swarm-events", daemon=True
        ).start()
        # What changed while nobody listened is in the list.
        self._resync_due = 0.0
        last = b""
        with closing(events):
            while not stop.is_set():
                started = self._clock()
                if started >= self._resync_due:
                    self._sync(engine, publish, started)
                    last = b""
                else:
                    last = self._poll_tasks(engine, publish, last)
                self._report.follow(following=True)
                watch = self._try_watch(engine)
                if watch is not None:
                    return watch
                self._report.mode("poll", self._watch_reason)
                self._await_news(
                    news, until=started + (self._settings.poll_interval or POLL_INTERVAL), stop=stop
                )
        return None

    def _await_news(
        self, news: queue.SimpleQueue[str | None], *, until: float, stop: threading.Event
    ) -> None:
        """Wait for the next poll; an event makes it a full list, at once."""
        while not stop.is_set():
            wait = min(until - self._clock(), STOP_CHECK)
            try:
                kind = news.get(timeout=wait) if wait > 0 else news.get_nowait()
            except queue.Empty:
                if wait <= 0 or self._clock() >= until:
                    return
                continue
            if kind is None:
                raise DockerUnavailable("the engine ended the event stream")
            self._report.heard(kind)
            self._resync_due = 0.0
            until = self._clock()

    def _poll_tasks(self, engine: Engine, publish: Publish, last: bytes) -> bytes:
        """List the live tasks, and ask for those that went missing from that list.

        A task that is told to stop is in no list of live tasks any more, yet it still runs.
        """
        heard_at = self._clock()
        body = engine.get("/tasks", filters=LIVE)
        known = self._cluster.live_tasks
        asked = {i for i, task in known.items() if task.desired > TaskState.RUNNING}
        tasks: list[Task] = []
        networks: list[Network] = []
        if body != last:
            tasks, networks = tasks_of(body)
            asked |= known.keys() - {task.id for task in tasks}
        if asked:
            filters = {"id": sorted(asked)} if len(asked) <= MANY_IDS else None
            others, more = tasks_of(engine.get("/tasks", filters=filters))
            tasks += [task for task in others if task.id in asked]
            networks += more
        self._report.alive()
        for task in tasks:
            old = known.get(task.id)
            if old is None or old.version < task.version:
                self._report.heard("task")
        self._cluster.apply(Change("network", network) for network in networks)
        self._cluster.apply(Change("task", task) for task in tasks)
        self._cluster.forget_tasks(asked - {task.id for task in tasks})
        self._publish(publish, heard_at)
        return body


def require_manager(engine: Engine) -> str:
    """Make sure that the engine is a manager of a Swarm; returns the id of the cluster.

    Raises:
        DiscoveryError: it is none, with the cure.
    """
    info = read(engine, "/info")
    if is_classic(info):
        raise DiscoveryError(
            "the engine is a classic Swarm's manager, which knows no services; set Sources to "
            "classic, or to auto"
        )
    swarm = info.get("Swarm") or {}
    state = swarm.get("LocalNodeState", "inactive")
    if state == "inactive":
        raise DiscoveryError(
            "the engine is in no swarm; run `docker swarm init`, or set Sources to engine"
        )
    if state != "active":
        raise DockerUnavailable(
            f"the engine's swarm node is {state}: {swarm.get('Error') or 'not ready yet'}"
        )
    if not swarm.get("ControlAvailable"):
        raise DiscoveryError(
            "the engine is a worker of its swarm, and only managers know the services; run the "
            "agent on a manager, or set DockerURL to one"
        )
    return str((swarm.get("Cluster") or {}).get("ID", ""))


class _ListCall:
    """One full list, read here and now or beside the stream.

    Attributes:
        result: the list or what went wrong, once it is `done`.
        seconds: how long it took.
        meanwhile: changes heard of while it was read; they may be older or newer than it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.done = threading.Event()
        self.result: Listing | DiscoveryError = DiscoveryError("the list was not read")
        self.seconds = 0.0
        self.meanwhile: tuple[Change, ...] = ()

    def now(self) -> _ListCall:
        """Read it."""
        started = time.monotonic()
        try:
            self.result = list_all(self._engine)
        except DiscoveryError as error:
            self.result = error
        finally:
            self.seconds = time.monotonic() - started
            self.done.set()
        return self

    def in_background(self) -> _ListCall:
        """Have it read by a thread."""
        threading.Thread(target=self.now, name="swarm-list", daemon=True).start()
        return self


def _trust_root(engine: Engine) -> str:
    """The cluster's CA; asked for anew each time, for it may have been rotated.

    Raises:
        WatchUnavailable: the engine does not tell.
        DockerUnavailable: the engine does not answer.
    """
    try:
        return str(read(engine, "/swarm")["TLSInfo"]["TrustRoot"])
    except DockerRefused as error:
        raise WatchUnavailable(f"the cluster's CA is not to be had: {error}") from error
    except (KeyError, TypeError) as error:
        raise WatchUnavailable("the engine does not tell the cluster's CA") from error


def _collect(events: EventStream, news: queue.SimpleQueue[str | None]) -> None:
    """Hand on the kinds of events; None when there are no more."""
    try:
        for event in events:
            news.put(str(event.get("Type", "")))
    except DockerUnavailable as error:
        _log.info("source swarm: event stream: %s", error)
    finally:
        news.put(None)
