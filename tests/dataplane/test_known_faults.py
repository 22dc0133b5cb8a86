"""Faults that dynamic upstreams inside nginx are known for: none of them is ours.

Eighteen, each by its number in docs/testing.md. Each test makes the scene in which the fault
shows, on several workers, some of them shutting down after a reload where these would have it.
Other files show many of them in more depth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from agent.model import BackendTls, Host, Location, Site
from bench.processes import memory_mb
from tests.certificates import authority, certificate
from tests.dataplane import rendered
from tests.dataplane.harness import (
    Answer,
    Backend,
    Load,
    Proxy,
    Seen,
    backends,
    free_port,
    peer,
    request,
    site,
    upstream,
    wait_until,
)
from tests.dataplane.hooks import Hooked
from tests.dataplane.tls import Front, server

A, B = "a.test/", "b.test/"
HOSTS = {"a.test": {"/": A}, "b.test": {"/": B}}


class Old:
    """Workers that are shutting down, each kept by a request that ends with this.

    Of some requests they have got a part before the reload; `ask` sends the rest of one.
    """

    def __init__(self, proxy: Proxy, requests: int = 4, *, method: str = "GET") -> None:
        self._proxy = proxy
        self._open: list[socket.socket] = []
        before = proxy.workers()
        for _ in range(requests):
            connection = socket.create_connection(("127.0.0.1", proxy.http_port), timeout=20)
            connection.sendall(f"{method} /half HTTP/1.1\r\nHost: a.test\r\n".encode())
            self._open.append(connection)
        wait_until(lambda: proxy.admin.metrics()[READING] >= requests)
        reload(proxy)
        self.pids = before & proxy.workers()
        assert self.pids

    def ask(self) -> str:
        """Ends one of the requests; gives the body of the answer, or its status if not 200."""
        connection = self._open.pop()
        with connection:
            connection.sendall(b"Connection: close\r\n\r\n")
            text = b""
            while received := connection.recv(65536):
                text += received
        head, _, body = text.partition(b"\r\n\r\n")
        return body.decode() if head.startswith(b"HTTP/1.1 200") else head[9:12].decode()

    def __enter__(self) -> Old:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()


READING = 'tidegate_nginx_connections{state="reading"}'


def reload(proxy: Proxy) -> None:
    """A site change that changes nothing for the hosts of these tests."""
    extra = {f"reload-{time.monotonic_ns()}.test": {"/": "nobody"}}
    answer = proxy.admin.site(site(proxy.http_port, {**HOSTS, **extra}))
    assert answer.json()["reloaded"] is True


@pytest.fixture
def routed(proxy: Proxy) -> Proxy:
    assert proxy.admin.site(site(proxy.http_port, HOSTS)).status == 200
    return proxy


def many(count: int, **of: object) -> dict[str, dict[str, object]]:
    peers = [peer(80 + k, id=f"peer-{k}", **of) for k in range(10)]  # type: ignore[arg-type]
    return {f"u{n:05}": upstream(*peers) for n in range(count)}


def answers(proxy: Proxy, count: int, **how: object) -> Counter[str]:
    found = (request(proxy.http_port, **how) for _ in range(count))  # type: ignore[arg-type]
    return Counter(item.text if item.status == 200 else str(item.status) for item in found)


def test_p01_two_pushes_in_one_moment_are_both_in_force(routed: Proxy) -> None:
    with backends(2) as both:
        routed.admin.put({A: upstream(both[0].peer())})
        with Old(routed, 8) as old:
            for turn in range(100):  # many in each second
                routed.admin.put({A: upstream(both[turn % 2].peer())})
                wanted = both[turn % 2].name
                assert answers(routed, 3) == {wanted: 3}
                if turn % 13 == 0:
                    assert old.ask() == wanted


def test_p02_a_push_that_does_not_fit_costs_nothing(
    make_proxy: Callable[..., Proxy], backend: Backend
) -> None:
    proxy = make_proxy(env={"TIDEGATE_DICT_SIZE": "512k"})
    proxy.start()
    proxy.admin.site(site(proxy.http_port, HOSTS))
    proxy.admin.put({A: upstream(backend.peer())})
    with Old(proxy) as old:
        huge = upstream(*(peer(80, id=f"{n:0100}", address="10.0.0.1") for n in range(6000)))
        for push in ({A: upstream(), "huge": huge}, many(2000)):
            assert proxy.admin.put(push).status == 507
            proxy.admin.revision = 1
            assert proxy.admin.patch(push).status == 507
            assert old.ask() == "b0"
            assert answers(proxy, 5) == {"b0": 5}
    reload(proxy)  # new workers have nothing but what is in the dict
    assert answers(proxy, 5) == {"b0": 5}
    proxy.stop()
    proxy.start()
    assert answers(proxy, 5) == {"b0": 5}


def test_p03_garbage_is_refused_and_harms_nobody(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer()), B: upstream(backend.peer())})
    before = routed.admin.call("GET", "/v1/membership").body
    nowhere = {"id": "x", "port": 80, "weight": 1, "state": "up"}
    faulty = {A: upstream(peer(1)), "c": upstream(nowhere), B: upstream(peer(1))}
    for raw in (b"this is not json", b"[]", b"", b"null", b"{}", b'"', b"[[[[", b"\xff\xfe"):
        for method in ("PUT", "PATCH"):
            answer = routed.admin.call(method, "/v1/membership", raw=raw)
            assert 400 <= answer.status < 500, raw
    refused = routed.admin.put(faulty)
    assert refused.status == 422
    assert {error["upstream"] for error in refused.json()["errors"]} == {"c"}
    for _ in range(2):
        assert routed.admin.call("GET", "/v1/membership").body == before
        for host in HOSTS:
            assert answers(routed, 4, host=host) == {"b0": 4}
        reload(routed)
    routed.admin.revision = 1
    assert routed.admin.patch({"c": upstream(peer(81))}).status == 200
    assert "[error]" not in routed.output


def test_p04_a_large_push_is_read_wherever_nginx_has_put_it(
    routed: Proxy, backend: Backend
) -> None:
    """Also when its worker is told to end in the middle of it."""
    wanted = {**many(3000), A: upstream(backend.peer())}
    frame = {"writer": "test", "revision": 7, "upstreams": wanted}
    body = json.dumps(frame).encode()
    assert len(body) > 2 << 20
    with socket.create_connection(("127.0.0.1", routed.admin_port), timeout=30) as connection:
        head = f"PUT /v1/membership HTTP/1.1\r\nHost: admin\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: 1 << 20])
        wait_until(lambda: routed.admin.metrics()[READING.replace("reading", "writing")] >= 2)
        reload(routed)
        connection.sendall(body[1 << 20 :])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    status = routed.admin.status()
    assert (status["revision"], status["upstreams"], status["peers"]) == (7, 3001, 30001)
    assert answers(routed, 5) == {"b0": 5}
    assert [p["id"] for p in routed.admin.shown("u02999")["peers"]] == [
        f"peer-{k}" for k in range(10)
    ]


class Breaker(Backend):
    """Reads each request and closes, after its `delay`."""

    async def _answer(self, *_: object) -> bool:
        await asyncio.sleep(self.delay)
        return False


def test_p05_no_request_asks_a_peer_that_has_failed_it_again(routed: Proxy) -> None:
    """Where requests come in parallel, whose turn it is has nothing to do with who has failed."""
    with Backend("good") as good, Breaker("bad0") as bad0, Breaker("bad1") as bad1:
        peers = [item.peer() for item in (good, bad0, bad1)]
        routed.admin.put({A: upstream(*peers, passive={"failures": 0})})

        def ask(number: int) -> Answer:
            return request(routed.http_port, f"/{number}")

        with Old(routed) as old, ThreadPoolExecutor(32) as pool:
            assert {a.text for a in pool.map(ask, range(400))} == {"good"}
            assert [old.ask() for _ in range(4)] == ["good"] * 4
        for bad in (bad0, bad1):
            paths = Counter(seen.path for seen in bad.requests if seen.path != "/half")
            assert len(paths) > 50
            assert max(paths.values()) == 1


def test_p06_whose_turn_it_is_survives_a_change(routed: Proxy) -> None:
    """A start at the first peer, or at a random one, after each change would be uneven."""
    with backends(3) as three:
        peers = [item.peer() for item in three]
        leaving = peer(80, id="z", state="draining")
        for turn in range(120):
            routed.admin.put({A: upstream(*peers, *([leaving] if turn % 2 else []))})
            request(routed.http_port)
        counts = [len(item.requests) for item in three]
        assert sum(counts) == 120
        # Each of the two workers has asked each peer as often as the others, give or take one.
        assert max(counts) - min(counts) <= 2


def test_p07_a_connection_verified_for_one_service_is_not_used_for_another(
    proxy: Proxy, tmp_path: Path
) -> None:
    authority(tmp_path, "ca")
    for name in ("one", "two"):
        certificate(tmp_path, name, ca="ca", names=f"DNS:{name}.internal")
    names = {f"{name}.internal": tmp_path / f"{name}.pem" for name in ("one", "two")}
    ca = str(tmp_path / "ca.pem")

    def asked(seen: Seen) -> str:
        return str(seen.tls.asked)  # type: ignore[union-attr]

    with Backend("both", tls=server(names)) as both:
        hosts = ("one", "two", "three")
        proxy.admin.put({f"{host}/": upstream(both.peer()) for host in hosts})
        front = Front(proxy)
        front.push(
            *(
                Host(
                    f"{host}.test",
                    (),
                    (
                        Location(
                            "/",
                            f"{host}/",
                            backend_tls=BackendTls(verify=True, ca=ca, name=f"{host}.internal"),
                        ),
                    ),
                )
                for host in hosts
            )
        )
        for _ in range(10):
            for host in ("one", "two"):
                assert request(proxy.http_port, host=f"{host}.test").text == "both"
                assert asked(both.requests[-1]) == f"{host}.internal"
            # Right address, wrong name: whatever connections are open to it.
            assert request(proxy.http_port, host="three.test").status == 502


def test_p08_a_peer_that_is_removed_gets_nothing_and_is_let_go(routed: Proxy) -> None:
    port = free_port()
    with Backend("stays") as stays, Backend("was a", port=port) as was:
        routed.admin.put({A: upstream(stays.peer(), was.peer())})
        with Load(routed.http_port) as load:
            wait_until(lambda: load.total >= 200)
        routed.admin.put({A: upstream(), B: upstream()})
        asked = len(stays.requests)
        was.kill()
        # The address is another service's at once; not a request meets what is left of the first.
        with Backend("is b", port=port) as now:
            routed.admin.put({A: upstream(), B: upstream(now.peer())})
            for _ in range(40):
                answer = request(routed.http_port, host="b.test", method="POST", body=b"x")
                assert (answer.status, answer.text) == (200, "is b")
            assert answers(routed, 10) == {"503": 10}
            assert len(now.requests) == 40
        wait_until(lambda: not stays._writers, what="idle connections closed")
        assert len(stays.requests) == asked


def test_p09_old_workers_route_retry_and_leave(routed: Proxy) -> None:
    """They know the newest peers, for retries too, and nothing of ours keeps them."""
    mute = socket.create_server(("127.0.0.1", 0))
    slow, other = Breaker("slow", delay=1.0), Breaker("other", delay=1.0)
    with mute, slow, other, backends(2) as (one, two):
        check = {"kind": "http", "path": "/", "interval": 0.1, "timeout": 30.0}
        silent = peer(mute.getsockname()[1], id="mute")
        failing = upstream(slow.peer(), other.peer())
        routed.admin.put({A: failing, "c": upstream(silent, check=check)})
        routed.admin.patch({"c": upstream(silent, peer(free_port(), id="late"), check=check)})
        retried: list[str] = []
        under_way = threading.Thread(
            target=lambda: retried.append(request(routed.http_port, "/retried").text)
        )
        under_way.start()
        wait_until(lambda: slow.requests or other.requests)
        with Old(routed) as old:
            routed.admin.put({A: upstream(one.peer())})
            assert old.ask() == one.name
            routed.admin.put({A: upstream(two.peer())})
            assert old.ask() == two.name
            under_way.join()
            assert retried == [two.name]
        wait_until(lambda: not old.pids & routed.workers(), what="old workers have left")


def test_p09_generations_of_workers_take_little_memory(routed: Proxy, backend: Backend) -> None:
    with contextlib.ExitStack() as stack:
        routed.admin.put({**many(2000), A: upstream(backend.peer())})
        answers(routed, 20)
        pids, totals = set[int](), []
        for _ in range(4):
            pids |= stack.enter_context(Old(routed, 4)).pids
            answers(routed, 20)
            totals.append(sum(memory_mb(pid, "Pss") for pid in routed.workers()))
        assert len(pids) >= 4  # a worker at least of each generation is still there
        # Each further one has two workers; those that hold the whole membership take 30 MB here.
        assert (totals[-1] - totals[0]) / 3 < 16, totals


@pytest.fixture
def hooked(make_proxy: Callable[..., Proxy], tmp_path: Path) -> Hooked:
    hooked = Hooked(make_proxy, tmp_path)
    assert hooked.proxy.admin.site(site(hooked.proxy.http_port, HOSTS)).status == 200
    return hooked


def test_p10_nothing_large_is_held_under_a_lock(hooked: Hooked, backend: Backend) -> None:
    """Values are of one upstream each, and requests read only what is new to their worker."""
    proxy = hooked.proxy
    proxy.admin.put({**many(2000), A: upstream(backend.peer()), B: upstream(backend.peer())})
    answers(proxy, 20), answers(proxy, 20, host="b.test")
    hooked.seen()
    proxy.admin.patch({B: upstream(backend.peer(weight=2))})
    assert answers(proxy, 20) == answers(proxy, 20, host="b.test") == {"b0": 20}
    seen = hooked.seen()
    assert seen["largest"] < 4096
    # After a push each worker looks at each upstream once, and once more with the content where
    # that is new to it; requests where nothing has changed read nothing.
    assert 1 <= seen["balancer get dat"] <= 2 * 2
    assert seen["balancer get ptr"] <= 2 * 2 + seen["balancer get dat"]
    assert not [what for what in seen if "get_keys" in what and "balancer" in what]
    assert seen["content safe_add dat"] == 1


def test_p10_a_worker_keeps_the_upstreams_in_use_and_lets_others_go(
    hooked: Hooked, backend: Backend
) -> None:
    """Of thousands that are asked for once, memory is left to those that are asked for again."""
    proxy = hooked.proxy
    proxy.admin.put({**many(1500), A: upstream(backend.peer())})
    kept = hooked.run(
        """
        local lookup = require("tidegate.balancer").lookup
        local used, once = lookup("a.test/"), lookup("u00000")
        for number = 1, 1499 do
            lookup(("u%05d"):format(number))
            assert(lookup("a.test/") == used)
        end
        return { used = lookup("a.test/") == used, once = lookup("u00000") == once }
        """
    )
    assert kept == {"used": True, "once": False}
    assert answers(proxy, 20) == {"b0": 20}
    series = 'tidegate_requests_total{upstream="a.test/",method="read",code="2xx"}'
    wait_until(lambda: proxy.admin.metrics().get(series) == 20)


def test_p11_no_timer_is_needed_for_what_is_in_force(hooked: Hooked) -> None:
    """Where nginx refuses every further timer, pushes hold all the same and work goes on later."""
    proxy = hooked.proxy
    fill = "while ngx.timer.at(5, function() end) do end"
    full = "return ngx.timer.at(5, function() end) == nil"
    with backends(3) as (one, two, three):
        proxy.admin.put({A: upstream(one.peer(), two.peer())})
        for _ in range(20):
            hooked.run(fill)
        for chosen, spared in [(one, two), (two, one)] * 5:
            proxy.admin.put({A: upstream(chosen.peer(), spared.peer(weight=0))})
            assert answers(proxy, 4) == {chosen.name: 4}
        peers = [one.peer(weight=0), two.peer(), three.peer()]
        proxy.admin.put({A: upstream(*peers)})
        assert proxy.admin.live(A)[three.name] == "probing"
        assert answers(proxy, 4) == {two.name: 4}
        assert all(hooked.run(full) for _ in range(10))
        # What could not even begin is taken up when there are timers again, by itself.
        wait_until(lambda: proxy.admin.live(A)[three.name] == "up")
        assert set(answers(proxy, 8)) == {two.name, three.name}
        series = 'tidegate_requests_total{upstream="a.test/",method="read",code="2xx"}'
        wait_until(lambda: proxy.admin.metrics().get(series, 0) >= 52)


def test_p12_series_are_bounded_whatever_is_asked_and_whoever_comes_and_goes(
    routed: Proxy, backend: Backend
) -> None:
    def series() -> set[str]:
        return set(routed.admin.metrics())

    routed.admin.put({A: upstream(backend.peer())})
    answers(routed, 10)
    request(routed.http_port, host="unknown.test")
    wait_until(lambda: len([name for name in series() if 'code="5xx"' in name]) == 1)
    before, free = series(), free_bytes(routed, "metrics")
    counted = 0
    for turn in range(120):
        # Requests are counted under the name of the canary, which is gone with the next turn.
        name, came = f"u{turn}.test/", backend.peer(id=f"p{turn}")
        canary = {"upstream": name, "weight": 50}
        routed.admin.put({A: upstream(came, canary=canary), name: upstream(came)})
        for _ in range(3):
            request(routed.http_port, f"/path/{turn}?a={turn}", headers={"User-Agent": f"{turn}"})
        request(routed.http_port, host=f"unknown-{turn}.test")
        counted += any("requests_total" in item and name in item for item in series())
    assert counted > 20
    routed.admin.put({A: upstream(backend.peer())})
    wait_until(lambda: series() <= before, what="no series is left over")
    assert free_bytes(routed, "metrics") >= free - 8192


def free_bytes(proxy: Proxy, name: str) -> float:
    return proxy.admin.metrics()[f'tidegate_shared_dict_free_bytes{{dict="{name}"}}']


def test_p13_two_writers_do_not_mix(routed: Proxy) -> None:
    with backends(2) as both:
        first, second = routed.admin, type(routed.admin)(routed.admin_port, writer="second")
        first.put({A: upstream(both[0].peer())})
        with Old(routed) as old:
            for _ in range(5):
                assert second.put({A: upstream(both[1].peer())}).status == 423
                assert second.patch({A: upstream(both[1].peer())}).status == 423
            assert old.ask() == both[0].name
            assert answers(routed, 5) == {both[0].name: 5}
            assert first.call("DELETE", "/v1/lease", {"writer": "test"}).status == 200
            assert second.put({A: upstream(both[1].peer())}).status == 200
            # The first one comes back with what it has in mind: it is not its turn any more.
            assert first.patch({A: upstream(both[0].peer())}).status == 423
            assert second.call("DELETE", "/v1/lease", {"writer": "second"}).status == 200
            stale = first.patch({A: upstream(both[0].peer())})
            assert (stale.status, stale.json()["revision"]) == (409, second.revision)
            assert old.ask() == both[1].name
            assert answers(routed, 5) == {both[1].name: 5}


def test_p14_nobody_keeps_what_was_read_in_the_middle_of_a_push(hooked: Hooked) -> None:
    """At each write of a push its worker stands still, while another one serves from what is there.

    Were a number told before its content, that one would keep the old content under the new number.
    """
    proxy = hooked.proxy
    with backends(2) as both, ThreadPoolExecutor(1) as pool:
        proxy.admin.put({A: upstream(both[0].peer())})
        names, stops, turn = {back.name for back in both}, 0, 0
        while True:
            turn += 1
            back = both[turn % 2]
            hooked.arm(stops + 1, "stop")
            push = pool.submit(proxy.admin.put, {A: upstream(back.peer())})
            stopped = wait_until(lambda: push.done() or stopped_worker(proxy))  # noqa: B023
            if stopped is True:
                assert hooked.survived()
                break
            stops += 1
            try:
                assert set(answers(proxy, 3)) <= names
            finally:
                os.kill(stopped, signal.SIGCONT)
            assert push.result(20).status == 200
            assert answers(proxy, 8) == {back.name: 8}, stops
        assert stops > 10


def stopped_worker(proxy: Proxy) -> int:
    for pid in proxy.workers():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T":
                return pid
    return 0


def test_p15_a_pick_and_a_change_cost_no_more_among_ten_thousand_peers(hooked: Hooked) -> None:
    """CPU time beside that of fewer peers, with room: as a fault it is 300 times as much."""
    pick = """
        local picker = require("tidegate.balancer").lookup("%s").picker
        picker.key = picker.key and function() return tostring(math.random()) end
        local at = os.clock()
        for _ = 1, 20000 do picker:next() end
        return os.clock() - at
    """
    take_in = """
        local at = os.clock()
        require("tidegate.balancer").lookup("%s")
        return os.clock() - at
    """
    push, run = hooked.proxy.admin.put, hooked.run
    for algorithm in ("round_robin", "least_conn", "ewma", "hash", "random"):
        few, some, lots = (weighted(count, algorithm) for count in (10, 1000, 9999))
        assert push({}).status == 200
        changes = []
        for turn in range(2):
            versions = {"few": few, "some": some, "lots": lots}
            changed = {name: {**item, "hold": turn} for name, item in versions.items()}
            assert push(changed).status == 200
            changes.append((run(take_in % "some"), run(take_in % "lots")))
        smaller, larger = (min(costs) for costs in zip(*changes, strict=True))
        assert larger < 40 * smaller + 0.01, (algorithm, changes)
        quick, slow = (min(run(pick % name) for _ in range(3)) for name in ("few", "lots"))
        assert slow < 100 * quick + 0.01, (algorithm, quick, slow)


def weighted(count: int, algorithm: str) -> dict[str, object]:
    addresses = [f"10.0.{n % 250}.{n // 250}" for n in range(count)]
    peers = (
        peer(1000 + n, id=f"p{n}", address=address, weight=1 + n % 7)
        for n, address in enumerate(addresses)
    )
    return upstream(*peers, algorithm=algorithm)


def test_p16_a_plain_request_runs_lua_twice_and_looks_for_nothing_in_text(
    hooked: Hooked, backend: Backend
) -> None:
    proxy = hooked.proxy
    assert rendered.push(proxy, Site((rendered.host(),))).status == 200
    proxy.admin.put({A: upstream(backend.peer())})
    answers(proxy, 20)
    hooked.seen()
    assert answers(proxy, 50) == {"b0": 50}
    ours = {what: count for what, count in hooked.seen().items() if not idle(what)}
    # Whether anything is new is read from plain memory. The end is counted in the worker.
    assert ours == {}
    current = proxy.state_dir / "site" / "current"
    text = "".join(file.read_text() for file in sorted(current.glob("*.conf")))
    text += (proxy.home / "conf.d" / "http.inc").read_text()
    directives = {word for word in text.split() if word.endswith(("_by_lua_block", "_by_lua"))}
    assert directives <= {"balancer_by_lua_block", "log_by_lua_block"}


def idle(what: str) -> bool:
    """What is no request's: the timers', the calls of this test, the largest value."""
    return what.startswith(("timer", "content", "init", "exit")) or what == "largest"


def test_p17_a_full_dict_throws_nothing_out(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(env={"TIDEGATE_DICT_SIZE": "512k"})
    proxy.start()
    proxy.admin.site(site(proxy.http_port, HOSTS))
    admin = proxy.admin
    with backends(2) as (one, two):
        admin.put({A: upstream(one.peer(), two.peer()), B: upstream(two.peer())})
        count = 0
        for size in (200, 20, 1):
            while True:
                names = range(count, count + size)
                more = {f"u{n:05}.test/": upstream(peer(80, id=f"{n:099}")) for n in names}
                status = admin.patch(more).status
                if status == 507:
                    break
                assert status == 200
                count += size
        assert count > 300
        before = set(admin.call("GET", "/v1/membership").json()["upstreams"])
        assert len(before) == count + 2
        assert admin.status()["dict"]["free_bytes"] < 64 << 10  # what an alarm looks at
        # Counting, ejecting and refused pushes all go on, and need room of their own.
        two.status = 503
        with Load(proxy.http_port) as load, Load(proxy.http_port, host="b.test") as other:
            for n in range(30):
                admin.patch({f"new-{n}-{k}": upstream(peer(80, id="x" * 99)) for k in range(500)})
            wait_until(lambda: load.total >= 500 and other.total >= 100)
        assert set(load.results) <= {"200", "503"}
        assert other.names[one.name] == 0
        assert set(admin.call("GET", "/v1/membership").json()["upstreams"]) == before
        two.status = 200
        for back in (one, two):  # and what is there can still be changed
            assert admin.put({A: upstream(back.peer()), B: upstream(two.peer())}).status == 200
            assert answers(proxy, 4) == {back.name: 4}


def test_p18_a_worker_killed_with_the_memory_locked_stops_nobody(hooked: Hooked) -> None:
    """At every fifth write of a push; `test_killed_applies` does it at each, and mends."""
    proxy = hooked.proxy
    with backends(2) as both:
        proxy.admin.put({A: upstream(both[0].peer()), B: upstream(both[1].peer())})
        locked, at = 0, 1
        while True:
            hooked.arm(at, "lock")
            try:
                answer = proxy.admin.put({A: upstream(both[at % 2].peer()), B: upstream()})
            except (OSError, HTTPException):
                locked, at = locked + 1, at + 5
                assert sum(answers(proxy, 4)[back.name] for back in both) == 4
                assert proxy.admin.metrics()["tidegate_membership_revision"] > 0
                wait_until(lambda: len(proxy.workers()) == 2)
                mended = {A: upstream(both[0].peer()), B: upstream(both[1].peer())}
                wait_until(lambda: proxy.admin.put(mended).status == 200)  # noqa: B023
                assert answers(proxy, 4) == {both[0].name: 4}
                assert answers(proxy, 4, host="b.test") == {both[1].name: 4}
            else:
                assert answer.status == 200
                assert hooked.survived()
                break
        assert locked >= 3
