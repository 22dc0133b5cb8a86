"""One thread per OpenResty: keeps its membership in step, holds its lease, notices drift.

Why a thread each: a slow or dead instance must not hold up the others. The mailbox keeps only the
newest order, so a burst of changes coalesces by itself, and without a timer. The site is rolled
out by another thread (`rollout`): a reload takes its time, and a peer that dies meanwhile must not
wait for it. This module must not render and must not decide when a site is pushed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from agent.driver import certificates, shortfalls
from agent.driver.openresty import Build, CertificateProblem, Status, version_of
from agent.driver.parts import (
    AdminClient,
    Backoff,
    Connect,
    InstanceState,
    InstanceView,
    Options,
    Order,
    Revisions,
    Sink,
    diff,
    named,
    split,
    survivors,
)
from agent.driver.quarantine import Quarantine
from agent.driver.targets import Target
from agent.errors import (
    DriverError,
    InstanceBusy,
    InstanceUnauthorized,
    InstanceUnreachable,
    LeaseHeld,
    PushRefused,
    RevisionConflict,
    SiteRefused,
    TidegateError,
)
from agent.model import Membership, Rejection, Site, Upstream

log = logging.getLogger(__name__)

MOST_READ = 100
"""Upstreams that are read one by one; of more than that, all are read in one go."""

BUSY_WAIT = 0.05
"""Seconds until a push is tried again that met another one."""

FIRST_WAIT = 0.05
"""Seconds until the first retry; doubles up to the heartbeat."""


@dataclass(frozen=True, slots=True)
class Held:
    """What an instance is known to hold; `membership` is None where only the revision is known."""

    instance: str
    revision: int
    membership: Membership | None


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An upstream that the instance refused, and why."""

    upstream: Upstream
    reason: str


class Worker:
    """Membership, lease and heartbeat of one instance.

    Args:
        target: the instance.
        writer: this agent's name in leases.
        connect: makes a client.
        options: times.
        revisions: where revisions come from, one for all workers.
        sink: is told what happens.
        progress: called when something changed that a rollout may have waited for.
    """

    def __init__(
        self,
        target: Target,
        *,
        writer: str,
        connect: Connect,
        options: Options,
        revisions: Revisions,
        sink: Sink,
        progress: Callable[[], None],
    ) -> None:
        self.target = target
        self._writer = writer
        self._connect = connect
        self._options = options
        self._revisions = revisions
        self._sink = sink
        self._progress = progress

        # Guarded by _changed: the mailbox, and what the rollout's thread reads and writes.
        self._changed = threading.Condition()
        self._order: Order | None = None
        self._since: float | None = None
        self._poked = False
        self._stopping = False
        self._give_up_lease = False
        self._reconnect = False
        self._status: Status | None = None
        self._generation = ""
        self._site: Site | None = None
        self._rolling = False
        self._site_error = ""
        self._site_retry_at = 0.0
        self._site_backoff = Backoff(first=1.0, cap=60.0)
        self._last_seen = 0.0
        self._url = target.urls[0] if target.urls else ""
        self._problems: tuple[CertificateProblem, ...] = ()
        self.quarantine = Quarantine()

        # The thread's own; others read them, a stale one does no harm.
        self._held: Held | None = None
        self._in_flight: Held | None = None
        self._problems_of: tuple[str, int] | None = None
        self._done: Order | None = None
        self._refused: dict[str, _Refusal] = {}
        self._state = InstanceState.CONNECTING
        self._error = ""
        self._leased = False
        self._beat_at = 0.0
        self._due_at = 0.0
        self._backing_off = False
        self._backoff = Backoff(first=FIRST_WAIT, cap=options.heartbeat)
        self._client: AdminClient | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"openresty {target.name}", daemon=True
        )

    # For the fleet.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, give_up_lease: bool) -> None:
        """Tell the thread to end; `join` waits for it."""
        with self._changed:
            self._stopping = True
            self._give_up_lease = give_up_lease
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait for the thread; returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def apply(self, order: Order, since: float | None) -> None:
        """Put the newest order into the mailbox.

        Args:
            order: replaces the one that may wait there.
            since: monotonic time at which the change was heard of; None if it is not to be
                measured.
        """
        with self._changed:
            self._order = order
            if since is not None:
                self._since = since if self._since is None else min(self._since, since)
            self._poke()

    def reconfigure(self, connect: Connect, options: Options) -> None:
        """Take other settings: the connection is made anew, the site looked at again."""
        with self._changed:
            self._connect = connect
            self._options = options
            self._backoff = Backoff(first=FIRST_WAIT, cap=options.heartbeat)
            self._reconnect = True
            self._site = None
            self._site_retry_at = 0.0
            self.quarantine.retry_all()
            self._poke()

    def view(self) -> InstanceView:
        """How the instance stands."""
        with self._changed:
            status, order, held = self._status, self._order, self._held
            state, error = self._state, self._error or self._site_error
            if state is InstanceState.IN_SYNC:
                if self._site_error:
                    state = InstanceState.REFUSED
                elif order is None or self._done is not order or not self._has_site(order.site):
                    state = InstanceState.BEHIND
            return InstanceView(
                id=self.target.id,
                name=self.target.name,
                url=self._url,
                state=state,
                error=error,
                instance=status.instance if status else "",
                revision=held.revision if held else status.revision if status else 0,
                generation=self._generation,
                writer=status.writer if status else "",
                upstreams=status.upstreams if status else 0,
                peers=status.peers if status else 0,
                versions=status.versions if status else {},
                last_seen=self._last_seen,
                quarantined=self.quarantine.hosts,
            )

    def rejections(self) -> tuple[Rejection, ...]:
        """What this instance refused of what was asked for."""
        refused = tuple(
            Rejection(
                subject=f"upstream {name}",
                reason="upstream_refused",
                message=f"OpenResty {self.target.name} refused it: {item.reason}",
                hint="Its former peers serve on, if it had any; compare the versions of agent and "
                "OpenResty with `tidegate check`.",
            )
            for name, item in self._refused.items()
        )
        with self._changed:
            status, order, problems = self._status, self._order, self._problems
            http3 = self._options.http3
        site = order.site if order is not None else Site(())
        lacking: tuple[Rejection, ...] = ()
        if status is not None:
            lacking = shortfalls.rejections(status, site, self.target.name, http3=http3)
        return (
            refused
            + self.quarantine.rejections(self.target.name)
            + certificates.rejections(problems, site, self.target.name)
            + lacking
        )

    # For the rollout.

    def wants_site(self, site: Site, now: float) -> bool:
        """Whether `site` can be pushed now: the instance is ours, lacks it, and knows its peers."""
        with self._changed:
            held = self._held
            if (
                self._stopping
                or held is None
                or held.membership is None
                or self._state in _AWAY
                or now < self._site_retry_at
            ):
                return False
            if self._has_site(site) and not self.quarantine.due(now):
                return False
            known = held.membership.upstreams
            return all(name in known or name in self._refused for name in named(site))

    def site_wake_at(self) -> float | None:
        """When the rollout has to look again by itself (monotonic); None if never."""
        with self._changed:
            return self._site_retry_at if self._site_error else self.quarantine.due_at()

    def begin_site(self) -> tuple[Build, str, Connect]:
        """A push of the site begins; returns the nginx, generation and the client's maker."""
        with self._changed:
            self._rolling = True
            build = self._status.build if self._status else Build()
            return build, self._generation, self._connect

    def end_site(self, site: Site | None, generation: str, error: TidegateError | None) -> None:
        """A push of the site has ended.

        Args:
            site: the one that runs now, None if it could not be brought about.
            generation: what runs now, as far as known.
            error: what went wrong.
        """
        with self._changed:
            self._rolling = False
            self._generation = generation
            before = self._site_error
            if error is None:
                self._site = site
                self._site_error = ""
                self._site_backoff.reset()
            elif isinstance(error, InstanceUnreachable | LeaseHeld | InstanceBusy):
                # The heartbeat finds out what has become of it, and what runs there now.
                self._site_retry_at = time.monotonic() + BUSY_WAIT
                self._beat_at = self._due_at = 0.0
            else:
                self._site_error = str(error)
                self._site_retry_at = time.monotonic() + self._site_backoff.wait()
            self._poke()
        if error is not None and str(error) != before:
            verb = "refused the site" if isinstance(error, SiteRefused) else "did not get the site"
            log.warning("OpenResty %s %s, the old one serves on: %s", self.target.name, verb, error)

    # The thread.

    def _poke(self) -> None:
        """Let the thread look again, unless it is backing off."""
        self._poked = True
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    self._is_awake, timeout=max(0.0, self._due_at - time.monotonic())
                )
                if self._stopping:
                    break
                if self._reconnect:
                    self._reconnect = False
                    self._close()
                    self._beat_at = 0.0
                self._poked = False
                order, since, self._since = self._order, self._since, None
            if self._step(order, since):
                self._done = order
            elif since is not None and self._state is not InstanceState.STANDBY:
                with self._changed:
                    self._since = since if self._since is None else min(self._since, since)
            self._progress()
        self._say_goodbye()

    def _is_awake(self) -> bool:
        return self._stopping or self._reconnect or (self._poked and not self._backing_off)

    def _step(self, order: Order | None, since: float | None) -> bool:
        """One turn: heartbeat if it is due, then push what is not there yet.

        Returns whether the instance holds what was ordered.
        """
        complete = True
        try:
            if self._client is None:
                self._client = self._connect(self.target)
            if self._held is None or self._in_flight or time.monotonic() >= self._beat_at:
                self._beat(order)
            if order is not None:
                if not self._leased:
                    self._beat(order)
                complete = self._push(order, since)
        except LeaseHeld as error:
            self._stand_by(error)
            return False
        except InstanceBusy as error:
            self._fail(error, wait=BUSY_WAIT)
            return False
        except DriverError as error:
            self._fail(error, wait=self._backoff.wait())
            return False
        except Exception as error:
            self._sink.loop_error("openresty")
            log.exception("OpenResty %s: unexpected error; the loop goes on", self.target.name)
            self._held = None
            self._fail(DriverError(f"unexpected: {error!r}"), wait=self._backoff.wait())
            return False
        self._backoff.reset()
        self._backing_off = False
        self._due_at = self._beat_at
        now = InstanceState.IN_SYNC if order is not None else InstanceState.BEHIND
        if now is not self._state:
            what = "membership in step" if order is not None else "answers"
            log.info("OpenResty %s: %s", self.target.name, what)
        self._state, self._error = now, ""
        return complete

    def _beat(self, order: Order | None) -> None:
        """Renew the lease, ask for the status, and find out what the instance holds.

        Raises:
            LeaseHeld: another agent writes.
        """
        client = self._open_client
        if order is not None:  # who has nothing to say must not keep another agent from it
            try:
                client.renew(self._writer)
            except LeaseHeld:
                self._leased = False
                self._saw(client.status())
                raise
            if not self._leased:
                log.info("OpenResty %s: the writer lease is ours", self.target.name)
            self._leased = True
        status = client.status()
        self._saw(status)
        self._look_at_certificates(status)
        in_flight, self._in_flight = self._in_flight, None
        held = self._held
        if held is not None and (held.instance, held.revision) == (
            status.instance,
            status.revision,
        ):
            pass
        elif in_flight is not None and (in_flight.instance, in_flight.revision) == (
            status.instance,
            status.revision,
        ):
            self._held = in_flight
        elif order is None:
            self._held = None
        else:
            if held is not None:
                was = "restarted" if held.instance != status.instance else "changed by another"
                log.warning(
                    "OpenResty %s was %s (revision %d, we had %d): comparing",
                    self.target.name,
                    was,
                    status.revision,
                    held.revision,
                )
            self._held = self._read(status, order)
        self._beat_at = time.monotonic() + self._options.heartbeat

    def _look_at_certificates(self, status: Status) -> None:
        """Ask what is wrong with certificates, if that has changed."""
        of = (status.instance, status.certificates_serial)
        if of == self._problems_of:
            return
        # Where nothing has changed yet, nothing has been looked at.
        known = status.certificates_serial > 0
        problems = self._open_client.certificate_problems() if known else ()
        with self._changed:
            before, self._problems = self._problems, problems
        self._problems_of = of
        for item in problems:
            if item not in before:
                log.warning(
                    "OpenResty %s: %s: %s (%s)",
                    self.target.name,
                    certificates.whose(item),
                    item.message,
                    item.reason,
                )
        for item in before:
            if item not in problems:
                whose = certificates.whose(item)
                log.info("OpenResty %s: %s: over (%s)", self.target.name, whose, item.reason)

    def _saw(self, status: Status) -> None:
        """Take note of a status: where it differs from what we know, reality wins."""
        with self._changed:
            restarted = self._status is not None and self._status.instance != status.instance
            self._status = status
            self._last_seen = time.time()
            self._url = self._open_client.url
            if restarted:
                self.quarantine.retry_all()
            if not self._rolling and (restarted or status.generation != self._generation):
                self._generation = status.generation
                self._site = None
                self._site_retry_at = 0.0

    def _read(self, status: Status, order: Order) -> Held:
        """What the instance holds: read rather than replaced, so that nothing changes needlessly.

        An agent that comes back thus pushes only what has changed while it was away. Versions tell
        what has not; the peers are read of the others alone.
        """
        if status.revision == 0 and status.upstreams == 0:
            return Held(status.instance, 0, None)
        client = self._open_client
        try:
            revision, versions = client.versions()
            wanted = order.membership.upstreams
            same = {
                name: wanted[name]
                for name, version in versions.items()
                if name in wanted and version and version == version_of(wanted[name])
            }
            others = versions.keys() - same.keys()
            if len(others) > MOST_READ:
                revision, membership = client.membership()
                found = membership.upstreams
            else:
                found = {name: client.upstream(name) for name in others}
        except (InstanceUnreachable, InstanceUnauthorized, InstanceBusy):
            raise
        except DriverError as error:
            log.warning("OpenResty %s: %s; pushing everything", self.target.name, error)
            return Held(status.instance, status.revision, None)
        return Held(status.instance, revision, Membership({**found, **same}))

    def _push(self, order: Order, since: float | None) -> bool:
        """Make the instance hold what was ordered; returns at once if it does.

        A large change goes in parts, and a newer order does not wait for the parts of an older
        one. What is removed goes last, so that nothing is missing in between.

        Returns:
            Whether it holds all of it now.
        """
        while True:
            held = self._held
            if held is None:
                raise InstanceBusy("what it holds is not known yet")
            content = self._content(order, held)
            try:
                known = held.membership
                if known is None and held.revision == 0 and len(split(content.upstreams)) > 1:
                    known = Membership({})
                if known is None:
                    self._put(held, content)
                    break
                upsert, remove = diff(known, content)
                if not upsert and not remove:
                    self._held = Held(held.instance, held.revision, content)
                    return True
                part, *rest = split(upsert)
                if rest:
                    content = Membership({**known.upstreams, **part})
                self._patch(held, part, () if rest else remove, content)
                if not rest:
                    break
            except PushRefused as error:
                if not self._set_apart(error, order):
                    raise
                continue
            if self._order is not order:
                return False
        if since is not None:
            self._sink.applied("membership", time.monotonic() - since)
        return True

    def _put(self, held: Held, content: Membership) -> None:
        """Replace all that the instance holds."""
        revision = self._revisions.stamp(content, above=held.revision)
        with self._pushing("full", Held(held.instance, revision, content)):
            self._open_client.put(writer=self._writer, revision=revision, membership=content)

    def _patch(
        self,
        held: Held,
        upsert: Mapping[str, Upstream],
        remove: tuple[str, ...],
        content: Membership,
    ) -> None:
        """Push a change, or a part of one, that makes what the instance holds `content`."""
        revision = self._revisions.stamp(content, above=held.revision)
        with self._pushing("delta", Held(held.instance, revision, content)):
            self._open_client.patch(
                writer=self._writer,
                base_revision=held.revision,
                revision=revision,
                upsert=upsert,
                remove=remove,
            )

    @contextmanager
    def _pushing(self, kind: str, candidate: Held) -> Iterator[None]:
        """While a push is under way: if it comes through, the instance holds the candidate."""
        self._in_flight = candidate
        try:
            yield
        except DriverError as error:
            if not isinstance(error, InstanceUnreachable):
                self._in_flight = None
            if isinstance(error, RevisionConflict):
                # Somebody else wrote, or our last push came through after all.
                self._held = None
            self._sink.push(self.target.name, kind, result(error))
            raise
        self._in_flight = None
        self._held = candidate
        self._sink.push(self.target.name, kind, "ok")

    def _content(self, order: Order, held: Held) -> Membership:
        """What to push for an order.

        That is the ordered membership itself, but for upstreams that the instance refused (they
        stay as they were) and for retired ones that the running site still names.
        """
        wanted = order.membership.upstreams
        known = held.membership.upstreams if held.membership is not None else {}
        self._refused = {
            name: item for name, item in self._refused.items() if wanted.get(name) == item.upstream
        }
        with self._changed:
            retired = () if self._has_site(order.site) else tuple(known.keys() - wanted.keys())
        if not retired and not self._refused:
            return order.membership
        merged = dict(wanted)
        for name in self._refused:
            del merged[name]
            if name in known:
                merged[name] = known[name]
        for name in retired:
            merged[name] = survivors(known[name], order.membership)
        return Membership(merged)

    def _set_apart(self, error: PushRefused, order: Order) -> bool:
        """Leave out the upstreams that a refusal names; returns whether there was a new one."""
        new = {
            name: _Refusal(order.membership.upstreams[name], reason)
            for name, reason in error.reasons.items()
            if name in order.membership.upstreams and name not in self._refused
        }
        for name, item in new.items():
            log.warning(
                "OpenResty %s refused upstream %s, the others are not held up by it: %s",
                self.target.name,
                name,
                item.reason,
            )
        self._refused = {**self._refused, **new}
        return bool(new)

    def _has_site(self, site: Site) -> bool:
        return self._site is site or self._site == site

    def _stand_by(self, error: LeaseHeld) -> None:
        """Another agent writes: wait until its lease has lapsed."""
        self._leased = False
        self._beat_at = 0.0
        if self._state is not InstanceState.STANDBY:
            log.warning(
                "OpenResty %s: agent %s holds the writer lease; standing by",
                self.target.name,
                error.writer,
            )
        self._state = InstanceState.STANDBY
        self._error = f"agent {error.writer} holds the writer lease"
        wait = min(self._options.heartbeat, max(BUSY_WAIT, error.expires_in + BUSY_WAIT))
        self._due_at = time.monotonic() + Backoff(first=wait, cap=wait).wait()
        self._backing_off = True

    def _fail(self, error: DriverError, *, wait: float) -> None:
        """Take note of a failure, and try again after `wait` seconds, for ever."""
        state = _STATES.get(type(error), InstanceState.FAILED)
        text = str(error)
        if isinstance(error, InstanceBusy | RevisionConflict):
            log.debug("OpenResty %s: %s", self.target.name, text)
            state, text = InstanceState.BEHIND, ""
        elif (state, text) != (self._state, self._error):
            log.warning("OpenResty %s is %s: %s", self.target.name, state.value, text)
        self._state, self._error = state, text
        self._due_at = time.monotonic() + wait
        self._backing_off = True

    def _say_goodbye(self) -> None:
        """Give the lease up, so that the next agent need not wait for it to lapse."""
        if self._leased and self._give_up_lease and self._client is not None:
            try:
                self._client.release(self._writer)
            except DriverError as error:
                log.info(
                    "OpenResty %s: lease not given up, it will lapse: %s", self.target.name, error
                )
        self._close()

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    @property
    def _open_client(self) -> AdminClient:
        assert self._client is not None, "a step opens it first"
        return self._client


_AWAY = (
    InstanceState.CONNECTING,
    InstanceState.STANDBY,
    InstanceState.UNREACHABLE,
    InstanceState.UNAUTHORIZED,
)
"""In these states a site push would be in vain."""

_STATES: dict[type[DriverError], InstanceState] = {
    InstanceUnreachable: InstanceState.UNREACHABLE,
    InstanceUnauthorized: InstanceState.UNAUTHORIZED,
    PushRefused: InstanceState.REFUSED,
}


def result(error: DriverError) -> str:
    """Why a push failed, as a label of a metric."""
    return {
        InstanceUnreachable: "unreachable",
        InstanceUnauthorized: "unauthorized",
        InstanceBusy: "busy",
        RevisionConflict: "conflict",
        LeaseHeld: "lease_held",
        PushRefused: "refused",
        SiteRefused: "refused",
    }.get(type(error), "failed")
