"""Brings a new site to all instances, one at a time, each confirmed before the next.

Why one thread for the whole fleet: a site that breaks something in spite of `nginx -t` must not
break all instances at once, and a reload costs every client its idle connections. Changes coalesce
over a quiet time with a longest wait. Membership comes first: an instance gets a site when it
knows all upstreams that the site names. This module must not push membership.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from agent.driver.openresty import Build
from agent.driver.parts import AdminClient, Connect, Options, Rendered, Renderer, Sink
from agent.driver.worker import Worker, result
from agent.errors import DriverError, SiteRefused, TidegateError
from agent.model import Site

log = logging.getLogger(__name__)

IDLE = 60.0
"""Seconds between looks when nothing has been heard of: a safety net, not a poll."""

FEW = 3
"""Hosts of a running site that may be refused at once whatever their share. Beyond it, more than
half of them refused is the fault of a template or a setting, and the old site is better."""


class Rollout:
    """The thread that pushes sites.

    Args:
        writer: this agent's name in leases.
        renderer: makes files of a site.
        options: quiet time and longest wait.
        sink: is told what happens.
        workers: the instances, in the order in which they get a new site.
    """

    def __init__(
        self,
        *,
        writer: str,
        renderer: Renderer,
        options: Options,
        sink: Sink,
        workers: Callable[[], tuple[Worker, ...]],
    ) -> None:
        self._writer = writer
        self._renderer = renderer
        self._options = options
        self._sink = sink
        self._workers = workers

        self._changed = threading.Condition()
        self._poked = False
        self._stopping = False
        self._pending: Site | None = None
        self._first_change = 0.0
        self._last_change = 0.0
        self._pending_since: float | None = None
        self._site: Site | None = None
        self._since: float | None = None
        self._looked_at = 0.0
        self._rendered: dict[Build, Rendered] = {}
        self._rendered_of: tuple[Site, Renderer] | None = None
        self._clients: dict[Worker, tuple[Connect, AdminClient]] = {}
        self._thread = threading.Thread(target=self._run, name="site rollout", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end after the push that is under way; `join` waits for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait for the thread; returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def want(self, site: Site, since: float | None) -> None:
        """Note the site that all instances shall run; `since` as in `Worker.apply`."""
        with self._changed:
            newest = self._pending if self._pending is not None else self._site
            if newest is site or newest == site:
                return
            now = time.monotonic()
            if self._pending is None:
                self._first_change = now
                self._pending_since = since
            self._last_change = now
            self._pending = site
            self._changed.notify_all()

    def reconfigure(self, renderer: Renderer, options: Options) -> None:
        """Take other settings; the workers have to be told too."""
        with self._changed:
            self._renderer = renderer
            self._options = options
        self.poke()

    def poke(self) -> None:
        """Look again: an instance came, or is further than it was."""
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._poked, timeout=self._until_next()
                )
                if self._stopping:
                    break
                self._poked = False
                self._take_due()
            try:
                while self._one():
                    pass
                self._close_gone()
            except Exception:
                self._sink.loop_error("rollout")
                log.exception("site rollout: unexpected error; the loop goes on")
                time.sleep(1.0)
        for _, client in self._clients.values():
            client.close()

    def _due_at(self) -> float:
        """When the pending site is pushed: the very first at once, there is nothing to gather."""
        if self._site is None:
            return self._first_change
        quiet = self._last_change + self._options.site_quiet
        return min(quiet, self._first_change + self._options.site_max_wait)

    def _until_next(self) -> float:
        """Seconds until there is something to do without being poked."""
        times = [time.monotonic() + IDLE]
        if self._pending is not None:
            times.append(self._due_at())
        wakes = (worker.site_wake_at() for worker in self._workers())
        # One that was due at the last look waits for something else, which will poke us.
        times += [at for at in wakes if at is not None and at > self._looked_at]
        return max(0.0, min(times) - time.monotonic())

    def _take_due(self) -> None:
        if self._pending is not None and time.monotonic() >= self._due_at():
            self._site, self._pending = self._pending, None
            self._since = self._pending_since

    def _one(self) -> bool:
        """Push the site to one instance that lacks it; returns whether there was one."""
        with self._changed:
            self._take_due()
            site, since, renderer = self._site, self._since, self._renderer
            stopping = self._stopping
        if site is None or stopping:
            return False
        now = self._looked_at = time.monotonic()
        worker = next((item for item in self._workers() if item.wants_site(site, now)), None)
        if worker is None:
            return False
        self._roll(worker, site, since, renderer)
        return True

    def _roll(self, worker: Worker, site: Site, since: float | None, renderer: Renderer) -> None:
        build, running, connect = worker.begin_site()
        error: TidegateError | None = None
        try:
            rendered = self._render(site, build, renderer)
            client = self._client(worker, connect)
            running = self._push(worker, client, rendered, running, since, renderer)
        except TidegateError as caught:
            error = caught
        except Exception as caught:
            self._sink.loop_error("rollout")
            log.exception("OpenResty %s: unexpected error at the site", worker.target.name)
            error = DriverError(f"unexpected: {caught!r}")
        worker.end_site(site if error is None else None, running, error)

    def _push(
        self,
        worker: Worker,
        client: AdminClient,
        rendered: Rendered,
        running: str,
        since: float | None,
        renderer: Renderer,
    ) -> str:
        """Push until nginx accepts, each refused host put apart; returns what runs then."""
        name = worker.target.name
        fresh_refusals = 0
        while True:
            files = worker.quarantine.select(rendered)
            generation = renderer.generation(files)
            if generation == running:
                worker.quarantine.accepted(files, rendered)
                return generation
            if running and not worker.quarantine.knows_accepted:
                # What runs was accepted, by whichever agent: a host that is refused keeps it.
                worker.quarantine.accepted(client.site(), rendered)
            log.info(
                "OpenResty %s: pushing site %s, %d hosts",
                name,
                generation[:12],
                sum(file in rendered.hosts for file in files),
            )
            began = time.monotonic()
            try:
                reloaded = client.put_site(writer=self._writer, generation=generation, files=files)
            except SiteRefused as error:
                self._sink.push(name, "site", "refused")
                self._sink.reload(name, "refused", time.monotonic() - began)
                if error.file is not None and error.file in rendered.settings:
                    raise SiteRefused(
                        f"{rendered.settings[error.file]} of the settings does not work, and all "
                        f"other changes of the site wait for it: {error}",
                        file=error.file,
                    ) from error
                if error.file is None or error.file not in rendered.hosts:
                    raise
                if error.file not in files:
                    raise
                if not worker.quarantine.knows(error.file, rendered):
                    fresh_refusals += 1
                if running and fresh_refusals > max(FEW, len(rendered.hosts) // 2):
                    raise SiteRefused(
                        f"more than half of the hosts were refused, which is no matter of one "
                        f"host; the last one was {rendered.hosts[error.file]}: {error}",
                        file=None,
                    ) from error
                log.warning(
                    "OpenResty %s: host %s put in quarantine, the others go live: %s",
                    name,
                    rendered.hosts[error.file],
                    error,
                )
                worker.quarantine.refuse(error.file, files[error.file], rendered, str(error))
                continue
            except DriverError as error:
                self._sink.push(name, "site", result(error))
                raise
            self._sink.push(name, "site", "ok")
            if reloaded:
                self._sink.reload(name, "ok", time.monotonic() - began)
                log.info("OpenResty %s: runs site %s", name, generation[:12])
                if since is not None:
                    self._sink.applied("site", time.monotonic() - since)
            worker.quarantine.accepted(files, rendered)
            return generation

    def _render(self, site: Site, build: Build, renderer: Renderer) -> Rendered:
        """Rendered once for all instances of the same nginx."""
        of = self._rendered_of
        if of is None or of[0] is not site or of[1] is not renderer:
            self._rendered = {}
            self._rendered_of = (site, renderer)
        if build not in self._rendered:
            self._rendered[build] = renderer.render(site, build)
        return self._rendered[build]

    def _client(self, worker: Worker, connect: Connect) -> AdminClient:
        """A connection of our own, so that a long push does not hold up membership."""
        known = self._clients.get(worker)
        if known is not None and known[0] is connect:
            return known[1]
        if known is not None:
            known[1].close()
        client = connect(worker.target)
        self._clients[worker] = (connect, client)
        return client

    def _close_gone(self) -> None:
        """Close the connections to instances that are gone."""
        gone = self._clients.keys() - set(self._workers())
        for worker in gone:
            self._clients.pop(worker)[1].close()
