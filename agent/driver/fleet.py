"""All OpenResty instances: one worker each for membership, one rollout for the site.

Why: the controller says what shall be served and who the instances are, and the fleet sees to it,
for ever, whatever an instance does. It hands each what the controller ordered and decides nothing
about content. Nothing here knows Docker.
"""

from __future__ import annotations

import logging
import threading
import time

from agent.driver.parts import (
    Connect,
    InstanceState,
    InstanceView,
    Options,
    Order,
    Renderer,
    Revisions,
    Sink,
)
from agent.driver.rollout import Rollout
from agent.driver.targets import Target
from agent.driver.worker import Worker
from agent.model import Desired, Rejection

log = logging.getLogger(__name__)

__all__ = ["Fleet", "InstanceState", "InstanceView", "Options"]


class Fleet:
    """Keeps every instance in step with the newest Desired.

    Its methods may be called from any thread and return at once.

    Args:
        writer: this agent's name in leases: 1 to 128 printable ASCII characters, unique.
        connect: makes a client for a target.
        renderer: makes files of a site.
        options: times.
        sink: is told what happens.
    """

    def __init__(
        self,
        *,
        writer: str,
        connect: Connect,
        renderer: Renderer,
        options: Options,
        sink: Sink,
    ) -> None:
        self._writer = writer
        self._connect = connect
        self._options = options
        self._sink = sink
        self._revisions = Revisions()
        self._lock = threading.Lock()
        self._workers: dict[str, Worker] = {}
        self._order: Order | None = None
        self._running = False
        self._rollout = Rollout(
            writer=writer, renderer=renderer, options=options, sink=sink, workers=self._all
        )

    def start(self) -> None:
        """Start the threads."""
        with self._lock:
            self._running = True
            for worker in self._workers.values():
                worker.start()
        self._rollout.start()

    def stop(self, timeout: float) -> None:
        """End all threads and give up the leases; waits for them at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self._rollout.stop()
        with self._lock:
            workers = tuple(self._workers.values())
            self._running = False
        for worker in workers:
            worker.stop(give_up_lease=True)
        threads: tuple[Worker | Rollout, ...] = (*workers, self._rollout)
        ended = [item.join(max(0.0, deadline - time.monotonic())) for item in threads]
        if not all(ended):
            log.warning("some pushes did not end within %g s; the leases will lapse", timeout)

    def set_instances(self, targets: tuple[Target, ...]) -> None:
        """Say who the instances are; a new one gets everything at once."""
        with self._lock:
            wanted = {target.id: target for target in targets}
            gone = [
                key for key, worker in self._workers.items() if wanted.get(key) != worker.target
            ]
            leaving = [self._workers.pop(key) for key in gone]
            for key, target in wanted.items():
                if key not in self._workers:
                    self._add(target)
            staying = {worker.target.name for worker in self._workers.values()}
        for worker in leaving:
            log.info("OpenResty %s: gone", worker.target.name)
            worker.stop(give_up_lease=False)
            if worker.target.name not in staying:
                self._sink.forget_instance(worker.target.name)
        if leaving:
            self._rollout.poke()

    def apply(self, desired: Desired, since: float | None = None) -> None:
        """Say what every instance shall serve.

        Args:
            desired: replaces what was said before.
            since: monotonic time at which the change behind it was heard of; None if it is not to
                be measured.
        """
        with self._lock:
            before = self._order
            if (
                before is not None
                and before.membership is desired.membership
                and before.site is desired.site
            ):
                return
            order = Order(membership=desired.membership, site=desired.site)
            self._order = order
            for worker in self._workers.values():
                worker.apply(order, since)
        self._rollout.want(desired.site, since)

    def reconfigure(self, *, connect: Connect, renderer: Renderer, options: Options) -> None:
        """Take other settings; connections are made anew, and nothing is lost."""
        with self._lock:
            self._connect, self._options = connect, options
            for worker in self._workers.values():
                worker.reconfigure(connect, options)
        self._rollout.reconfigure(renderer, options)

    def views(self) -> tuple[InstanceView, ...]:
        """How the instances stand, by name."""
        return tuple(sorted((item.view() for item in self._all()), key=lambda view: view.name))

    def rejections(self) -> tuple[Rejection, ...]:
        """What instances refused or warn of, once per subject and reason."""
        found: dict[tuple[str, str], Rejection] = {}
        for worker in self._all():
            for rejection in worker.rejections():
                found.setdefault((rejection.subject, rejection.reason), rejection)
        return tuple(found.values())

    def _all(self) -> tuple[Worker, ...]:
        with self._lock:
            return tuple(self._workers.values())

    def _add(self, target: Target) -> None:
        log.info("OpenResty %s: new, at %s", target.name, ", ".join(target.urls) or "no address")
        worker = Worker(
            target,
            writer=self._writer,
            connect=self._connect,
            options=self._options,
            revisions=self._revisions,
            sink=self._sink,
            progress=self._rollout.poke,
        )
        self._workers[target.id] = worker
        if self._order is not None:
            worker.apply(self._order, None)
        if self._running:
            worker.start()
