"""Workers that are killed in the middle of a push: what is in force is whole, whatever the moment.

Once at every single write that a push makes to shared memory, by a build of the store that kills
itself there; and many times at random, under load.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.dataplane.harness import (
    Answer,
    Backend,
    Proxy,
    backends,
    request,
    site,
    upstream,
    wait_until,
)
from tests.dataplane.hooks import Hooked

HOSTS = {f"{name}.test": {"/": f"{name}.test/"} for name in ("a", "b", "gone", "new")}


def push(hooked: Hooked, base: int, upsert: Mapping[str, object], remove: list[str]) -> int:
    """A delta; status of its answer, 0 if there is none since its worker died."""
    try:
        return delta(hooked.proxy, base, upsert, remove).status
    except (OSError, HTTPException):
        return 0


def delta(proxy: Proxy, base: int, upsert: Mapping[str, object], remove: list[str]) -> Answer:
    frame = {"writer": "test", "base_revision": base, "revision": base + 1}
    push = {**frame, "upsert": upsert, "remove": remove}
    return proxy.admin.call("PATCH", "/v1/membership", push)


def mended(proxy: Proxy, base: int, upsert: Mapping[str, object], remove: list[str]) -> int:
    """Pushes as the agent does after a push without an answer; gives the revision in force."""
    answer = delta(proxy, base, upsert, remove)
    if answer.status == 409:
        known = answer.json()["revision"]
        assert known > base  # or a delta would be built on what nobody has
        full = {"writer": "test", "revision": known + 1, "upstreams": upsert}
        answer = proxy.admin.call("PUT", "/v1/membership", full)
    assert answer.status == 200, answer.text
    revision: int = answer.json()["revision"]
    return revision


def ids(proxy: Proxy) -> dict[str, list[str]]:
    state = proxy.admin.call("GET", "/v1/membership").json()
    return {
        name.partition(".")[0]: [peer["id"] for peer in item["peers"]]
        for name, item in state["upstreams"].items()
    }


def served(proxy: Proxy) -> dict[str, str]:
    answers = {host.partition(".")[0]: request(proxy.http_port, host=host) for host in HOSTS}
    return {name: a.text if a.status == 200 else str(a.status) for name, a in answers.items()}


@pytest.mark.parametrize("how", ["die", "lock"], ids=["between_writes", "with_the_memory_locked"])
def test_a_worker_may_be_killed_at_every_write_of_a_push(
    make_proxy: Callable[..., Proxy], tmp_path: Path, how: str
) -> None:
    hooked = Hooked(make_proxy, tmp_path)
    proxy = hooked.proxy
    assert proxy.admin.site(site(proxy.http_port, HOSTS)).status == 200
    with backends(6) as (a0, a1, b0, b1, gone, new):
        before = {
            "a.test/": upstream(a0.peer()),
            "b.test/": upstream(b0.peer(), algorithm="least_conn"),
            "gone.test/": upstream(gone.peer(), algorithm="least_conn"),
        }
        after = {
            "a.test/": upstream(a1.peer()),
            "b.test/": upstream(b1.peer(), algorithm="least_conn"),
            "new.test/": upstream(new.peer(), algorithm="least_conn"),
        }
        possible = {
            "a": {(a0.name,), (a1.name,)},
            "b": {(b0.name,), (b1.name,)},
            "gone": {(gone.name,), None},
            "new": {(new.name,), None},
        }
        initial = {"a": a0.name, "b": b0.name, "gone": gone.name, "new": "503"}
        final = {"a": a1.name, "b": b1.name, "gone": "503", "new": new.name}
        revision = proxy.admin.put(before).json()["revision"]
        free, cells = proxy.admin.status()["dict"]["free_bytes"], cells_taken(proxy)
        killed = 0
        while True:
            hooked.arm(killed + 1, how)
            if status := push(hooked, revision, after, ["gone.test/"]):
                assert status == 200
                assert hooked.survived()
                break
            killed += 1
            # Nobody has mended anything yet. Each upstream is there, as it was or as it was to be.
            found, answers = ids(proxy), served(proxy)
            for name, choices in possible.items():
                shown = tuple(found[name]) if name in found else None
                assert shown in choices, (killed, name)
                assert answers[name] == (shown[0] if shown else "503"), (killed, name)
            # The revision that was to be comes last. One above it is that of a mixture: whoever
            # wrote next, to admit a peer, has found the dead one's work half done.
            known = proxy.admin.status()["revision"]
            assert known in (revision, revision + 1, revision + 2)
            assert known != revision + 1 or answers == final
            if known == revision and answers != initial:
                # What is in force is not what deltas of this base are made from.
                assert delta(proxy, revision, {}, []).status == 409
            revision = mended(proxy, revision, after, ["gone.test/"])
            assert served(proxy) == final
            assert proxy.admin.status()["revision"] == revision
            revision = proxy.admin.put(before).json()["revision"]
            assert served(proxy) == initial
        assert killed > 15  # three versions beside those in force, three flips, and what follows
        assert served(proxy) == final
        proxy.admin.put(before)
        # And what the killed ones had staged is not there any more.
        assert proxy.admin.status()["dict"]["free_bytes"] == free
        assert cells_taken(proxy) == cells


def cells_taken(proxy: Proxy) -> float:
    return proxy.admin.metrics()["tidegate_load_cells"]


class Watcher(threading.Thread):
    """Asks hosts one after the other, on new connections, and notes what is wrong.

    Right is a 200 of one of the host's own backends. A connection without an answer is what a
    killed worker leaves; anything else is a fault.
    """

    def __init__(self, port: int, hosts: list[str]) -> None:
        super().__init__()
        self.results: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ended = threading.Event()
        self._port, self._hosts = port, hosts

    def run(self) -> None:
        while not self.ended.is_set():
            host = random.choice(self._hosts)
            try:
                answer = request(self._port, host=host)
            except (OSError, HTTPException):
                self.results["no answer"] += 1
                continue
            self.results[str(answer.status)] += 1
            if answer.status != 200 or not answer.text.startswith(host.partition(".")[0] + "-"):
                self.wrong.append(f"{host}: {answer.status} {answer.text[:40]}")


def test_workers_killed_under_load_and_pushes_lose_tear_and_mix_up_nothing(
    make_proxy: Callable[..., Proxy],
) -> None:
    """Four workers; one is killed every 100 ms while each push moves ten upstreams at once."""
    proxy = make_proxy(workers=4)
    proxy.start()
    hosts = [f"h{n}" for n in range(10)]
    routes = {f"{host}.test": {"/": f"{host}.test/"} for host in hosts}
    assert proxy.admin.site(site(proxy.http_port, routes)).status == 200
    both = {host: (Backend(f"{host}-0"), Backend(f"{host}-1")) for host in hosts}
    for pair in both.values():
        for backend in pair:
            backend.listen()
    ended = threading.Event()
    deaths: Counter[str] = Counter()

    def kill() -> None:
        while not ended.wait(0.1):
            for pid in random.sample(sorted(proxy.workers()), 1):
                os.kill(pid, signal.SIGKILL)
                deaths["killed"] += 1

    def wanted(turn: int) -> dict[str, object]:
        return {f"{host}.test/": upstream(both[host][turn % 2].peer()) for host in hosts}

    proxy.admin.put(wanted(0))
    watchers = [Watcher(proxy.http_port, [f"{host}.test" for host in hosts]) for _ in range(3)]
    killer = threading.Thread(target=kill)
    revision, turn = proxy.admin.status()["revision"], 0
    try:
        for thread in (killer, *watchers):
            thread.start()
        while deaths["killed"] < 25 or turn < 40:
            turn += 1
            revision = acknowledged(proxy, revision, wanted(turn))
            # In force for whoever asks from now on, in every worker, also in those just born.
            for host in random.sample(hosts, 3):
                assert answered(proxy, f"{host}.test") == f"{host}-{turn % 2}"
    finally:
        ended.set()
        killer.join()
        for watcher in watchers:
            watcher.ended.set()
            watcher.join()
        for pair in both.values():
            for backend in pair:
                backend.kill()
    assert [item for watcher in watchers for item in watcher.wrong] == []
    assert sum(watcher.results["200"] for watcher in watchers) > 100
    wait_until(lambda: len(proxy.workers()) == 4)
    assert proxy.admin.status()["revision"] == revision
    assert set(ids(proxy)) == set(hosts)


def acknowledged(proxy: Proxy, base: int, upsert: dict[str, object]) -> int:
    """Sends a delta until it is acknowledged, in full where its base is not right any more."""

    def attempt() -> int:
        try:
            return mended(proxy, base, upsert, [])
        except (OSError, HTTPException):
            return 0

    return wait_until(attempt, timeout=20, what="an acknowledgement")


def answered(proxy: Proxy, host: str) -> str:
    """Who answers; asked again where a worker was killed with the question."""

    def attempt() -> str:
        try:
            return request(proxy.http_port, host=host).text
        except (OSError, HTTPException):
            return ""

    return wait_until(attempt, timeout=20, what="an answer")
