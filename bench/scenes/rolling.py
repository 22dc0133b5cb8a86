"""A rolling update on a real two-node Swarm: Tidegate's pair beside Traefik's Swarm provider.

The same service carries the labels of both, and both run all the time: the pair from its own stack,
Traefik as a process in the network of a task of its own on the manager, with the manager's Docker
socket. Each update (`docker service update --force`, one task after the other) has the load through
one of them only. A task is in the manager's store when it has become RUNNING there (`UpdatedAt`, by
the same clock as ours), and routed when it first answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.load import LoadProcess, Plan, Result
from bench.proxies.base import BenchError, find_program
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import Traefik
from bench.report import Section, paragraph, quantiles, table
from bench.scenes.common import (
    Case,
    Options,
    Sample,
    as_data,
    directory,
    interleaved,
    middle,
    of,
    pooled,
    say,
    values,
    void,
    window,
)
from bench.swarm_change import first_answers, running_tasks
from demo.pair import Process
from tests.lab import LabError
from tests.lab.builder import APP as IMAGE
from tests.swarm.pair import NETWORK, Pair

APP = "rolling"
REPLICAS = 4
KEPT_RATE = 200.0
NEW_RATE = 50.0


@dataclass(frozen=True)
class Way:
    """One way to the service: a URL on the manager's node."""

    name: str
    url: str


@contextlib.contextmanager
def _traefik(pair: Pair, port: int, *, refresh: str) -> Iterator[Way]:
    """Traefik in the network of a task on the manager, published on `port` of its node."""
    lab, manager = pair.lab, pair.lab.manager
    box = f"traefik-{port}"
    lab.docker(
        manager,
        *("service", "create", "--detach", "--no-resolve-image", "--name", box),
        *("--network", NETWORK, "--constraint", f"node.hostname=={manager.name}"),
        *("--publish", f"mode=host,target=80,published={port}"),
        IMAGE,
    )

    def container() -> str:
        ids = lab.docker(
            manager, "ps", "--quiet", "--filter", f"name={box}", "--filter", "status=running"
        )
        return (ids.split() or [""])[0]

    try:
        lab.wait_for(lambda: bool(container()), 30, f"the task of {box} runs")
        words = [
            f"--providers.swarm.endpoint=unix://{manager.socket}",
            f"--providers.swarm.network={NETWORK}",
            "--providers.swarm.exposedbydefault=false",
            f"--providers.swarm.refreshseconds={refresh}",
            "--entrypoints.web.address=:80",
            "--log.level=ERROR",
            "--global.checknewversion=false",
            "--global.sendanonymoususage=false",
        ]
        pid = lab.task_pid(container(), manager)
        with directory() as home:
            command = ["nsenter", "--net", "--target", str(pid), find_program("traefik"), *words]
            process = Process("Traefik", command, log=home / "traefik.log")
            try:
                name = f"Traefik, Swarm provider, {refresh} s"
                yield Way(name, f"http://{manager.address}:{port}/")
                process.check()
            finally:
                process.stop()
    finally:
        lab.docker(manager, "service", "rm", box, check=False)


def _create(pair: Pair) -> None:
    pair.create_app(
        APP,
        *("--label", "traefik.enable=true"),
        *("--label", f"traefik.http.routers.{APP}.rule=Host(`{APP}.test`)"),
        *("--label", f"traefik.http.services.{APP}.loadbalancer.server.port=8080"),
        replicas=REPLICAS,
    )


def _load(pair: Pair, way: Way, rate: float, *, keepalive: bool) -> LoadProcess:
    plan = Plan(
        urls=(way.url,),
        hosts=(f"{APP}.test",),
        rate=rate,
        connections=16,
        keepalive=keepalive,
        backend_header="X-Backend",
        keep_records=True,
    )
    return LoadProcess(plan, prefix=tuple(pair.lab.client_command()))


def _settled(pair: Pair, way: Way) -> None:
    """Wait until the tasks that run, and no others, answer through it."""
    wanted = {container[:12] for container in running_tasks(pair, APP)}

    def seen() -> bool:
        plan = Plan(
            urls=(way.url,),
            hosts=(f"{APP}.test",),
            rate=200,
            seconds=0.2,
            backend_header="X-Backend",
        )
        with LoadProcess(plan, prefix=tuple(pair.lab.client_command())) as running:
            result = running.wait(timeout=30)
        return not result.failed and set(result.backends) == wanted

    pair.lab.wait_for(seen, 60, f"the tasks of {APP} answer through {way.name}", interval=0.5)


def _update(pair: Pair, way: Way) -> Mapping[str, Any]:
    lab = pair.lab
    _settled(pair, way)
    before = set(running_tasks(pair, APP))
    with (
        _load(pair, way, KEPT_RATE, keepalive=True) as kept,
        _load(pair, way, NEW_RATE, keepalive=False) as new,
    ):
        started = time.time()
        time.sleep(2.0)
        began = time.time()
        lab.docker(lab.manager, "service", "update", "--detach", "--force", APP)
        lab.wait_for(
            lambda: pair.update_done(APP, "1", REPLICAS), 120, "the update is done", interval=1.0
        )
        # The last task removed is told to stop when the update is over already; and who has not
        # noticed by now fails in these seconds.
        time.sleep(4.0)
        ended = time.time()
        results = [kept.stop(), new.stop()]
    calm = [window(result, started + 0.5, began) for result in results]
    during = [window(result, began, ended) for result in results]
    if any(one.failed for one in calm):
        raise BenchError("requests failed before the update")
    store = {k: at for k, at in running_tasks(pair, APP).items() if k not in before}
    if len(store) != REPLICAS:
        raise BenchError(f"{len(store)} of {REPLICAS} tasks were replaced")
    routed, never = _routed(store, results)
    return {
        "requests": sum(one.requests for one in during),
        "failed": sum(one.failed for one in during),
        "closed": sum(one.closed for one in during),
        "reconnects": sum(1 for at in results[0].reconnected if began <= at < ended),
        "p99": during[0].p99,
        "p99_without": calm[0].p99,
        "seconds": ended - began,
        "never": never,
        "routed_ms": routed,
    }


def _routed(store: Mapping[str, float], results: list[Result]) -> tuple[list[float], int]:
    """Milliseconds from the store to the first answer of each task, and how many never answered."""
    first: dict[str, float] = {}
    for result in results:
        for backend, at in first_answers(result).items():
            first[backend] = min(at, first.get(backend, at))
    known = [(first[task] - at) * 1000 for task, at in store.items() if task in first]
    return known, len(store) - len(known)


def measure(pair: Pair, options: Options) -> Section:
    """Update the service that many times through each way."""
    pair.remove_app(APP)
    with contextlib.ExitStack() as stack:
        ways = [Way(Tidegate.name, pair.urls((pair.lab.manager,))[0])]
        _create(pair)
        stack.callback(pair.remove_app, APP)
        left_out = ""
        if Traefik not in options.proxies or (left_out := Traefik.missing()):
            say(f"  Traefik is left out: {left_out or 'not asked for'}")
        else:
            refreshes = ("15",) if options.quick else ("15", "1")
            for port, refresh in zip((8090, 8091), refreshes, strict=False):
                ways.append(stack.enter_context(_traefik(pair, port, refresh=refresh)))
        by_name = {way.name: way for way in ways}
        cases = [Case(way.name) for way in ways]

        def run(case: Case) -> Mapping[str, Any]:
            try:
                return _update(pair, by_name[case.proxy])
            except LabError as problem:
                raise BenchError(str(problem)) from problem

        samples = interleaved(cases, options.rounds, run)
    return _section(cases, samples, options)


def _section(cases: list[Case], samples: list[Sample], options: Options) -> Section:
    rows = []
    for case in cases:
        own = of(samples, case)
        if bad := void(own):
            rows.append([case.proxy, bad, *[""] * 9])
            continue
        failed, requests = sum(values(own, "failed")), sum(values(own, "requests"))
        count, p50, p99, largest = quantiles(pooled(own, "routed_ms"))
        rows.append(
            [
                case.proxy,
                f"{failed:,.0f} of {requests:,.0f}",
                f"{sum(values(own, 'closed')):,.0f}",
                f"{sum(values(own, 'reconnects')):,.0f}",
                f"{middle(values(own, 'p99')):.1f}",
                f"{middle(values(own, 'p99_without')):.1f}",
                count,
                p50,
                p99,
                largest,
                f"{sum(values(own, 'never')):.0f}",
            ]
        )
    head = ["proxy", "failed", "of them: connection closed", "idle connections closed", "p99 ms"]
    head += ["p99 without", "tasks", "store to routed p50 ms", "p99", "max", "never routed"]
    about = paragraph(
        f"`docker service update --force` of {REPLICAS} tasks on two nodes, one after the other,",
        "no health check: a task is RUNNING some time before it listens.",
        f"{KEPT_RATE:.0f} requests a second on kept connections and {NEW_RATE:.0f} on new ones,",
        "through the proxy on the manager; nobody but the proxy retries, and Traefik has no",
        f"retries by default. {options.rounds} interleaved updates each; failures summed, and",
        "counted to 4 s after the update. From the task's being RUNNING in the manager's store to",
        "its first answer, its own start included. `bench/scenes/rolling.py`.",
    )
    text = f"{about}\n\n{table(head, rows)}"
    return Section("rolling", "(e) A rolling update on a real Swarm", text, data=as_data(samples))
