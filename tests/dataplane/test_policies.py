"""What requests meet under each policy: limits, queues, sessions, canaries, backups, slow starts.

One proxy with two workers serves most of these tests: a change of policy is a push, so each of
them brings its own.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.cookies import SimpleCookie

import pytest

from tests.conftest import require
from tests.dataplane.harness import (
    Answer,
    Backend,
    Load,
    Proxy,
    backends,
    free_port,
    nginx_is_installed,
    peer,
    request,
    site,
    upstream,
    wait_until,
)

A = "a.test/"
ALGORITHMS = ["round_robin", "least_conn", "ewma", "hash", "random", "first"]
COOKIE = {"kind": "cookie", "cookie": "route"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with two workers whose host a.test is routed to upstream `a.test/`."""
    require(nginx_is_installed(), "nginx with libnginx-mod-http-lua, or OpenResty")
    proxy = Proxy(tmp_path_factory.mktemp("shared"), workers=2, token="secret")
    with proxy:
        route(proxy)
        yield proxy


def route(proxy: Proxy) -> None:
    hosts = {"a.test": {"/": A}, "counted.test": {"/": "counted"}}
    assert proxy.admin.site(site(proxy.http_port, hosts)).status == 200


def serve(proxy: Proxy, *peers: dict[str, object], hold: float = 0.0, **policy: object) -> None:
    """Pushes these peers as the first ones of their upstream: they need not prove anything."""
    assert proxy.admin.put({}).status == 200
    answer = proxy.admin.put({A: upstream(*peers, hold=hold, **policy)})
    assert answer.status == 200, answer.text
    assert answer.json()["unsupported"] == []


def change(proxy: Proxy, *peers: dict[str, object], **policy: object) -> None:
    """Pushes a change of the peers, and waits until those that are up are admitted."""
    assert proxy.admin.patch({A: upstream(*peers, **policy)}).status == 200
    wait_until(lambda: "probing" not in proxy.admin.live(A).values())


def in_flight(proxy: Proxy) -> dict[str, int]:
    """Requests in flight by peer, over all workers."""
    answer = proxy.admin.call("GET", "/v1/membership/a.test%2F").json()
    return {peer["id"]: peer["live"]["in_flight"] for peer in answer["peers"]}


def together(port: int, count: int, path: str = "/sleep/0.3") -> list[Answer]:
    """That many requests at a time, each on a connection of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: request(port, path), range(count)))


def metric(proxy: Proxy, name: str, *, of: str = A, **labels: str) -> float:
    tags = "".join(f',{key}="{value}"' for key, value in labels.items())
    return proxy.admin.metrics().get(f'tidegate_{name}{{upstream="{of}"{tags}}}', 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_request_fails_while_peers_come_and_go(shared: Proxy, algorithm: str) -> None:
    with backends(4) as some:
        policy = {"algorithm": algorithm, "hash_key": "uri", "hash_balance": 1.25}
        serve(shared, *(b.peer() for b in some), **policy)
        with Load(shared.http_port) as load:
            for number in range(30):
                left = [b for n, b in enumerate(some) if n != number % 4]
                weights = [number % 3 + 1, 1, 1000]
                peers = [b.peer(weight=w) for b, w in zip(left, weights, strict=True)]
                assert shared.admin.patch({A: upstream(*peers, **policy)}).status == 200
                at = load.total
                wait_until(lambda at=at: load.total >= at + 20)  # type: ignore[misc]
        assert load.failed == {}
        wait_until(lambda: not any(b.busy for b in some))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_peer_no_peer_and_only_dead_peers(
    shared: Proxy, algorithm: str, backend: Backend
) -> None:
    policy = {"algorithm": algorithm, "hash_key": "ip", "max_conns": 100}
    serve(shared, backend.peer(), **policy)
    assert {request(shared.http_port).text for _ in range(4)} == {"b0"}
    serve(shared, backend.peer(weight=0), **policy)
    assert request(shared.http_port).status == 503
    serve(shared, **policy)
    assert request(shared.http_port).status == 503
    dead = [peer(free_port(), id=f"dead{n}") for n in range(3)]
    serve(shared, *dead, **policy)
    assert {request(shared.http_port).status for _ in range(8)} == {502}
    change(shared, *dead, backend.peer(), **policy)
    with Load(shared.http_port, connections=4) as load:
        wait_until(lambda: load.total >= 100)
    assert (load.failed, set(load.names)) == ({}, {"b0"})
    if algorithm in ("least_conn", "ewma"):
        # A client has its answer a moment before the worker has counted its end.
        wait_until(lambda: set(in_flight(shared).values()) == {0})


def test_a_change_of_policy_is_a_push_and_no_reload(shared: Proxy) -> None:
    workers = shared.workers()
    with backends(3) as three:
        serve(shared, *(b.peer() for b in three))
        with Load(shared.http_port) as load:
            for algorithm in ALGORITHMS * 2:
                peers = [b.peer() for b in three]
                answer = shared.admin.patch(
                    {A: upstream(*peers, algorithm=algorithm, sticky=COOKIE, max_conns=50)}
                )
                assert answer.json()["unsupported"] == []
                at = load.total
                wait_until(lambda at=at: load.total >= at + 20)  # type: ignore[misc]
        assert load.failed == {}
    assert shared.workers() == workers


def test_least_conn_counts_over_all_workers(shared: Proxy) -> None:
    with backends(3) as three, ThreadPoolExecutor(9) as pool:
        serve(shared, *(b.peer() for b in three), algorithm="least_conn")
        for number in range(9):
            pool.submit(request, shared.http_port, "/sleep/0.8")
            wait_until(lambda number=number: sum(b.busy for b in three) > number)
        assert in_flight(shared) == {"b0": 3, "b1": 3, "b2": 3}
    wait_until(lambda: in_flight(shared) == {"b0": 0, "b1": 0, "b2": 0})


@pytest.mark.parametrize("algorithm", ["least_conn", "ewma"])
def test_a_slow_peer_gets_fewer_requests(shared: Proxy, algorithm: str) -> None:
    with backends(3) as (slow, one, two):
        slow.delay = 0.2
        serve(shared, slow.peer(), one.peer(), two.peer(), algorithm=algorithm)
        with Load(shared.http_port, connections=12) as load:
            wait_until(lambda: load.total >= 1500)
        assert load.failed == {}
        assert load.names[slow.name] < load.total / 10
        assert min(load.names[one.name], load.names[two.name]) > load.total / 5


def test_whatever_ends_a_request_ends_its_being_counted(shared: Proxy) -> None:
    with backends(2) as (one, two):
        dead = peer(free_port(), id="dead")
        serve(shared, one.peer(), two.peer(), dead, algorithm="least_conn")
        for path in ("/", "/reset", "/sleep/0.1"):
            assert {a.status for a in together(shared.http_port, 8, path)} <= {200, 502}
        client = socket.create_connection(("127.0.0.1", shared.http_port))
        client.sendall(b"GET /sleep/20 HTTP/1.1\r\nHost: a.test\r\n\r\n")
        wait_until(lambda: sum(in_flight(shared).values()) == 1)
        client.close()
        wait_until(lambda: set(in_flight(shared).values()) == {0})


def test_hash_sends_a_key_to_the_same_peer_through_every_worker(shared: Proxy) -> None:
    with backends(5) as five:
        serve(shared, *(b.peer() for b in five), algorithm="hash", hash_key="header:X-User")
        for user in range(12):
            answers = {
                request(shared.http_port, headers={"X-User": f"u{user}"}).text for _ in range(6)
            }
            assert len(answers) == 1


# Limits and queues.


def test_max_conns_holds_over_all_workers_and_more_get_503(shared: Proxy) -> None:
    with backends(2) as both:
        serve(shared, *(b.peer() for b in both), max_conns=2)
        for _ in range(3):
            answers = together(shared.http_port, 16)
            assert Counter(a.status for a in answers) == {200: 4, 503: 12}
            assert {a.headers.get("retry-after") is None for a in answers if a.status == 503} == {
                False
            }
        assert [b.busiest for b in both] == [2, 2]
        assert metric(shared, "no_peer_total") == 0


def test_max_conns_is_never_exceeded_under_load(shared: Proxy) -> None:
    with backends(3) as three:
        for backend in three:
            backend.delay = 0.002
        serve(shared, *(b.peer() for b in three), max_conns=2, queue=100, queue_timeout=10)
        with Load(shared.http_port, connections=24) as load:
            wait_until(lambda: load.total >= 2000, timeout=30)
        assert load.failed == {}
        assert max(b.busiest for b in three) == 2


def test_a_request_waits_in_the_queue_and_too_many_are_refused(shared: Proxy) -> None:
    policy = {"max_conns": 2, "queue": 5, "queue_timeout": 10}
    with backends(1) as (only,):
        assert shared.admin.put({"counted": upstream(only.peer(), **policy)}).status == 200

        def ask_late(_: int) -> int:
            return request(shared.http_port, "/sleep/0.4", host="counted.test").status

        with ThreadPoolExecutor(12) as pool:
            statuses = pool.map(ask_late, range(12))
            wait_until(lambda: metric(shared, "queue_length", of="counted") == 5)
            assert Counter(statuses) == {200: 7, 503: 5}
        assert only.busiest == 2
        assert metric(shared, "queue_length", of="counted") == 0

        def told(result: str) -> float:
            return metric(shared, "queue_requests_total", of="counted", result=result)

        wait_until(lambda: (told("admitted"), told("refused")) == (5, 5))
        policy["queue_timeout"] = 0.1
        assert shared.admin.put({"counted": upstream(only.peer(), **policy)}).status == 200
        with ThreadPoolExecutor(3) as pool:
            assert Counter(pool.map(ask_late, range(3))) == {200: 2, 503: 1}
        wait_until(lambda: told("expired") == 1)


def test_a_request_waits_no_longer_than_queue_timeout(shared: Proxy) -> None:
    with backends(1) as (only,):
        serve(shared, only.peer(), max_conns=1, queue=5, queue_timeout=0.3)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(request, shared.http_port, "/sleep/5")
            wait_until(lambda: only.busy == 1)
            started = time.monotonic()
            answer = request(shared.http_port)
            assert answer.status == 503
            assert time.monotonic() - started > 0.25
            assert not first.done()
            assert first.result().status == 200


def test_the_queue_is_in_order(make_proxy: Callable[..., Proxy], backend: Backend) -> None:
    proxy = make_proxy(workers=1)
    proxy.start()
    route(proxy)
    backend.delay = 0.05
    serve(proxy, backend.peer(), max_conns=1, queue=20, queue_timeout=10)
    with ThreadPoolExecutor(10) as pool:
        futures: list[Future[Answer]] = [pool.submit(request, proxy.http_port, "/sleep/0.3")]
        wait_until(lambda: backend.busy == 1)
        for number in range(8):
            futures.append(pool.submit(request, proxy.http_port, f"/{number}"))
            wait_until(lambda number=number: metric(proxy, "queue_length") == number + 1)
        assert {future.result().status for future in futures} == {200}
    assert [seen.path for seen in backend.requests[1:]] == [f"/{n}" for n in range(8)]


def test_a_client_that_leaves_frees_its_place_in_the_queue(shared: Proxy) -> None:
    with backends(1) as (only,):
        serve(shared, only.peer(), max_conns=1, queue=1, queue_timeout=10)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(request, shared.http_port, "/sleep/1")
            wait_until(lambda: only.busy == 1)
            client = socket.create_connection(("127.0.0.1", shared.http_port))
            client.sendall(b"GET /left HTTP/1.1\r\nHost: a.test\r\n\r\n")
            wait_until(lambda: metric(shared, "queue_length") == 1)
            assert request(shared.http_port).status == 503
            client.close()
            wait_until(lambda: metric(shared, "queue_length") == 0)
            assert request(shared.http_port, "/waited").status == 200
            assert first.result().status == 200
        assert [seen.path for seen in only.requests] == ["/sleep/1", "/waited"]


def test_a_push_lets_those_that_wait_go_on(shared: Proxy) -> None:
    with backends(2) as (one, two):
        serve(shared, one.peer(), max_conns=1, queue=9, queue_timeout=20)
        with ThreadPoolExecutor(6) as pool:
            slow = pool.submit(request, shared.http_port, "/sleep/3")
            wait_until(lambda: one.busy == 1)
            waiting = [pool.submit(request, shared.http_port) for _ in range(5)]
            wait_until(lambda: metric(shared, "queue_length") == 5)
            change(shared, one.peer(), two.peer(), max_conns=1, queue=9, queue_timeout=20)
            assert {future.result().text for future in waiting} == {two.name}
            assert not slow.done()
            # And one that takes the limit away.
            waiting = [pool.submit(request, shared.http_port, "/sleep/3") for _ in range(2)]
            wait_until(lambda: metric(shared, "queue_length") == 1)
            shared.admin.patch({A: upstream(one.peer(), two.peer())})
            wait_until(lambda: one.busy + two.busy == 3)


def test_a_body_survives_the_queue(shared: Proxy, backend: Backend) -> None:
    serve(shared, backend.peer(), max_conns=1, queue=9, queue_timeout=20)
    body = os.urandom(200_000)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(request, shared.http_port, "/sleep/0.3")
        wait_until(lambda: backend.busy == 1)
        answer = request(shared.http_port, "/echo", method="POST", body=body)
        assert (answer.status, answer.body == body) == (200, True)


def test_a_request_that_has_failed_waits_where_all_other_peers_are_full(shared: Proxy) -> None:
    """And is not sent to the one that has failed it again, whoever has room first."""
    policy = {"max_conns": 1, "queue": 9, "queue_timeout": 20, "passive": {"failures": 0}}
    with backends(2) as (bad, good), ThreadPoolExecutor(2) as pool:
        bad.status = 503
        retry = {"on": ["error", "http_503"]}
        serve(shared, bad.peer(), good.peer(backup=True), retry=retry, **policy)
        for number in range(4):
            slow = pool.submit(request, shared.http_port, "/sleep/0.5")
            wait_until(lambda: good.busy == 1)
            answer = request(shared.http_port, f"/{number}")
            assert (answer.status, answer.text) == (200, good.name)
            assert slow.result().text == good.name
        asked = Counter(seen.path for seen in bad.requests)
        assert [asked[f"/{number}"] for number in range(4)] == [1] * 4


def test_a_peer_killed_while_all_others_are_full_fails_no_request(shared: Proxy) -> None:
    with backends(3) as three:
        for backend in three:
            backend.delay = 0.01
        serve(shared, *(b.peer() for b in three), max_conns=2, queue=100, queue_timeout=20)
        with Load(shared.http_port, connections=12) as load:
            wait_until(lambda: load.total >= 200)
            three[0].kill()
            at = load.total
            # Long enough for it to be tried again by each worker.
            wait_until(lambda: load.total >= at + 1200, timeout=60)
        assert load.failed == {}


def test_killed_workers_leave_no_connection_counted(
    make_proxy: Callable[..., Proxy], backend: Backend
) -> None:
    proxy = make_proxy()
    proxy.start()
    route(proxy)
    serve(proxy, backend.peer(), max_conns=3)
    clients = []
    for number in range(3):
        client = socket.create_connection(("127.0.0.1", proxy.http_port))
        client.sendall(b"GET /sleep/60 HTTP/1.1\r\nHost: a.test\r\n\r\n")
        clients.append(client)
        wait_until(lambda number=number: in_flight(proxy) == {"b0": number + 1})
    assert request(proxy.http_port).status == 503
    for pid in proxy.workers():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(proxy.workers()) == 2)
    wait_until(lambda: in_flight(proxy) == {"b0": 0})
    assert request(proxy.http_port).status == 200
    for client in clients:
        client.close()


def test_requests_in_old_workers_count_after_a_reload(
    make_proxy: Callable[..., Proxy], backend: Backend
) -> None:
    proxy = make_proxy()
    proxy.start()
    route(proxy)
    serve(proxy, backend.peer(), max_conns=1)
    old = proxy.workers()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(request, proxy.http_port, "/sleep/1.5")
        wait_until(lambda: backend.busy == 1)
        files = site(proxy.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
        assert proxy.admin.site(files).status == 200
        assert request(proxy.http_port, host="b.test").status == 503
        assert slow.result().status == 200
    wait_until(lambda: not old & proxy.workers())
    assert request(proxy.http_port).status == 200
    assert in_flight(proxy) == {"b0": 0}


# Sessions.


def session_of(answer: Answer, name: str = "route") -> str:
    """The cookie that an answer sets; empty for none."""
    cookie = SimpleCookie(answer.headers.get("set-cookie", ""))
    return cookie[name].value if name in cookie else ""


def ask(proxy: Proxy, session: str, name: str = "route", path: str = "/") -> Answer:
    headers = {"Cookie": f"{name}={session}"} if session else {}
    return request(proxy.http_port, path, headers=headers)


def begin_sessions(proxy: Proxy, count: int) -> dict[str, str]:
    """Peer by session."""
    answers = [ask(proxy, "") for _ in range(count)]
    assert all(a.status == 200 for a in answers)
    return {session_of(a): a.text for a in answers}


def test_a_session_stays_with_its_peer_in_every_worker(shared: Proxy) -> None:
    with backends(4) as four:
        serve(shared, *(b.peer() for b in four), sticky=COOKIE)
        sessions = begin_sessions(shared, 40)
        assert set(sessions.values()) == {b.name for b in four}
        for session, who in sessions.items():
            for _ in range(4):
                answer = ask(shared, session)
                assert (answer.text, session_of(answer)) == (who, "")


def test_the_cookie_has_its_attributes_and_tells_nothing(shared: Proxy) -> None:
    with backends(1) as (only,):
        sticky = {
            "kind": "cookie", "cookie": "sid", "max_age": 3600, "secure": True,
            "http_only": False, "same_site": "Strict", "path": "/shop",
        }  # fmt: skip
        serve(shared, only.peer(id="task-4711"), sticky=sticky)
        cookie = ask(shared, "").headers["set-cookie"]
        value = session_of(ask(shared, ""), "sid")
        assert cookie == f"sid={value}; Path=/shop; Max-Age=3600; Secure; SameSite=Strict"
        assert len(value) == 16
        for secret in ("4711", "127", str(only.port)):
            assert secret not in value
        serve(shared, only.peer(), sticky={"kind": "cookie"})
        cookie = ask(shared, "").headers["set-cookie"]
        assert cookie.startswith("TIDEGATE_")
        assert cookie.endswith("; Path=/; HttpOnly; SameSite=Lax")


def test_the_applications_own_cookies_get_through(shared: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        serve(shared, peer(server.getsockname()[1]), sticky=COOKIE)

        def answer_one() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10000)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
                    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
                )

        thread = threading.Thread(target=answer_one)
        thread.start()
        with socket.create_connection(("127.0.0.1", shared.http_port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
            text = b""
            while chunk := client.recv(1000):
                text += chunk
        thread.join()
    lines = [line for line in text.decode().split("\r\n") if line.startswith("Set-Cookie")]
    assert len(lines) == 3
    assert {line.split("=")[0].split()[1] for line in lines} == {"a", "b", "route"}


def test_made_up_and_foreign_cookies_are_new_sessions(shared: Proxy) -> None:
    with backends(2) as both:
        serve(shared, *(b.peer() for b in both), sticky=COOKIE)
        for session in ("nonsense", "b0", "A" * 16, '"; Path=/x', "127.0.0.1"):
            answer = ask(shared, session)
            assert answer.status == 200
            assert session_of(answer) not in ("", session)


def test_a_session_is_found_behind_another_cookie_of_its_name(shared: Proxy) -> None:
    """A client sends one for each path and domain that it was ever set for."""
    with backends(3) as three:
        serve(shared, *(b.peer() for b in three), sticky=COOKIE)
        first = ask(shared, "")
        route = f"route={session_of(first)}"
        for cookies in (
            f"route=gone; {route}",
            f"a=1; route=; {route}; b=2",
            f"subroute=x;{route}",
        ):
            answers = [request(shared.http_port, headers={"Cookie": cookies}) for _ in range(6)]
            assert {(a.text, session_of(a)) for a in answers} == {(first.text, "")}
        stranger = request(shared.http_port, headers={"Cookie": f"sub{route}; x=route={route}"})
        assert session_of(stranger)


def test_sessions_survive_changes_of_the_peers(shared: Proxy) -> None:
    with backends(4) as (a, b, c, d):
        serve(shared, a.peer(), b.peer(), c.peer(), sticky=COOKIE)
        sessions = begin_sessions(shared, 30)
        change(shared, d.peer(), c.peer(weight=7), a.peer(), sticky=COOKIE, algorithm="random")
        for session, who in sessions.items():
            answer = ask(shared, session)
            if who == b.name:  # its peer is gone: it moves, once
                moved = session_of(answer)
                assert moved
                assert answer.text != b.name
                again = ask(shared, moved)
                assert (again.text, session_of(again)) == (answer.text, "")
            else:
                assert (answer.text, session_of(answer)) == (who, "")


def test_draining_peers_and_weight_0_keep_their_sessions_and_get_no_new_ones(
    shared: Proxy,
) -> None:
    with backends(3) as (old, idle, new):
        serve(shared, old.peer(), idle.peer(), sticky=COOKIE, hold=10)
        wait_until(lambda: set(shared.admin.live(A).values()) == {"up"})
        sessions = begin_sessions(shared, 20)
        change(shared, old.peer(state="draining"), idle.peer(weight=0), new.peer(), sticky=COOKIE)
        time.sleep(1.6)  # longer than a draining peer is taken without a session
        for session, who in sessions.items():
            assert ask(shared, session).text == who
        assert set(begin_sessions(shared, 20).values()) == {new.name}
        change(shared, new.peer(), sticky=COOKIE)
        for session in sessions:
            assert ask(shared, session).text == new.name


def test_a_session_moves_when_its_peer_dies_and_comes_to_stay_there(shared: Proxy) -> None:
    with backends(3) as three:
        serve(shared, *(b.peer() for b in three), sticky=COOKIE)
        answer = ask(shared, "")
        session = session_of(answer)
        dead = next(b for b in three if b.name == answer.text)
        dead.kill()
        moved = ask(shared, session)
        assert moved.status == 200
        assert moved.text != dead.name
        assert moved.headers["set-cookie"].count("route=") == 1
        for _ in range(6):
            answer = ask(shared, session_of(moved))
            assert (answer.text, session_of(answer)) == (moved.text, "")


def test_no_session_is_promised_by_an_error(shared: Proxy) -> None:
    serve(shared, peer(free_port()), sticky=COOKIE)
    answer = ask(shared, "")
    assert (answer.status, answer.headers.get("set-cookie")) == (502, None)


def test_sessions_survive_a_restart_and_a_reload(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(token="secret")
    proxy.start()
    route(proxy)
    with backends(4) as four:
        serve(proxy, *(b.peer() for b in four), sticky=COOKIE)
        sessions = begin_sessions(proxy, 20)
        files = site(proxy.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
        assert proxy.admin.site(files).json()["reloaded"] is True
        assert {s: ask(proxy, s).text for s in sessions} == sessions
        wait_until(lambda: proxy.admin.status()["persisted_revision"] == proxy.admin.revision)
        proxy.stop()
        proxy.start()
        assert proxy.admin.status()["source"] == "disk"
        assert {s: ask(proxy, s).text for s in sessions} == sessions


def test_instances_with_one_secret_know_each_others_sessions(
    make_proxy: Callable[..., Proxy], tmp_path: object
) -> None:
    same = [make_proxy(token="one") for _ in range(2)]
    other = make_proxy(token="two")
    named = make_proxy(token="three", env={"TIDEGATE_SESSION_SECRET": "mine"})
    with backends(4) as four:
        for proxy in (*same, other, named):
            proxy.start()
            route(proxy)
            serve(proxy, *(b.peer() for b in four), sticky=COOKIE)
        sessions = begin_sessions(same[0], 12)
        assert {s: ask(same[1], s).text for s in sessions} == sessions
        assert all(session_of(ask(other, s)) for s in sessions)
        assert all(session_of(ask(named, s)) for s in sessions)


@pytest.mark.parametrize("name", ["connect.sid", ".AspNetCore.Session"])
def test_an_applications_cookie_may_have_dots_in_its_name(shared: Proxy, name: str) -> None:
    with backends(4) as four:
        for policy in (
            {"sticky": {"kind": "app_cookie", "cookie": name}},
            {"algorithm": "hash", "hash_key": f"cookie:{name}"},
        ):
            serve(shared, *(b.peer() for b in four), **policy)
            homes = {f"s{n}": ask(shared, f"s{n}", name).text for n in range(40)}
            assert set(homes.values()) == {b.name for b in four}
            assert {s: ask(shared, s, name).text for s in homes} == homes


def test_sessions_by_an_applications_cookie(shared: Proxy) -> None:
    with backends(4) as four:
        sticky = {"kind": "app_cookie", "cookie": "JSESSIONID"}
        serve(shared, *(b.peer() for b in four), sticky=sticky)
        homes = {f"s{n}": ask(shared, f"s{n}", "JSESSIONID").text for n in range(40)}
        assert set(homes.values()) == {b.name for b in four}
        for session, who in homes.items():
            answer = ask(shared, session, "JSESSIONID")
            assert (answer.text, answer.headers.get("set-cookie")) == (who, None)
        # Without the cookie it is nobody's session.
        assert len({ask(shared, "").text for _ in range(16)}) == 4
        # A draining one keeps its sessions, and only those of the one that goes move.
        first, *rest = four
        change(shared, first.peer(state="draining"), *(b.peer() for b in rest), sticky=sticky)
        assert {s: ask(shared, s, "JSESSIONID").text for s in homes} == homes
        change(shared, *(b.peer() for b in rest), sticky=sticky)
        for session, who in homes.items():
            now = ask(shared, session, "JSESSIONID").text
            assert now == who if who != first.name else now != first.name


def test_sessions_by_address(shared: Proxy) -> None:
    with backends(4) as four:
        serve(shared, *(b.peer() for b in four), sticky={"kind": "ip"})
        assert len({request(shared.http_port).text for _ in range(20)}) == 1


def test_a_full_peers_session_waits_for_it_where_there_is_a_queue(shared: Proxy) -> None:
    with backends(2) as both:
        policy = {"sticky": COOKIE, "max_conns": 1, "queue": 5, "queue_timeout": 10}
        serve(shared, *(b.peer() for b in both), **policy)
        first = ask(shared, "")
        session = session_of(first)
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(ask, shared, session, path="/sleep/0.5")
            wait_until(lambda: sum(b.busy for b in both) == 1)
            second = pool.submit(ask, shared, session)
            wait_until(lambda: metric(shared, "queue_length") == 1)
            assert slow.result().text == second.result().text == first.text
        serve(shared, *(b.peer() for b in both), sticky=COOKIE, max_conns=1)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(ask, shared, session, path="/sleep/0.5")
            wait_until(lambda: sum(b.busy for b in both) == 1)
            # Without a queue it is served elsewhere, and remains what it is.
            answer = ask(shared, session)
            assert answer.text not in ("", first.text)
            assert not session_of(answer)
            assert slow.result().text == first.text
        assert ask(shared, session).text == first.text


# Backups, slow start, canaries.


def test_backups_serve_only_while_no_other_peer_can(shared: Proxy) -> None:
    with backends(3) as (main, spare, second):
        policy = {"algorithm": "least_conn"}
        serve(shared, main.peer(), spare.peer(backup=True), second.peer(backup=True), **policy)
        assert {request(shared.http_port).text for _ in range(20)} == {main.name}
        main.kill()
        with Load(shared.http_port, connections=4) as load:
            wait_until(lambda: load.total >= 200)
        assert (load.failed, set(load.names)) == ({}, {spare.name, second.name})
        change(shared, spare.peer(backup=True), second.peer(backup=True), **policy)
        assert {request(shared.http_port).text for _ in range(10)} == {spare.name, second.name}
        main.listen()
        change(
            shared, main.peer(id="m2"), spare.peer(backup=True), second.peer(backup=True), **policy
        )
        wait_until(lambda: request(shared.http_port).text == main.name)
        assert {request(shared.http_port).text for _ in range(10)} == {main.name}


def test_backups_help_out_when_the_others_are_full(shared: Proxy) -> None:
    with backends(2) as (main, spare):
        serve(shared, main.peer(), spare.peer(backup=True), max_conns=2)
        answers = together(shared.http_port, 6)
        assert Counter(a.text for a in answers if a.status == 200) == {"b0": 2, "b1": 2}


@pytest.mark.parametrize("algorithm", ["round_robin", "least_conn", "random", "ewma"])
def test_a_peer_that_joins_starts_slowly(shared: Proxy, algorithm: str) -> None:
    with backends(3) as (one, two, late):
        policy = {"algorithm": algorithm, "slow_start": 3600}
        serve(shared, one.peer(), two.peer(), **policy)
        with Load(shared.http_port, connections=2) as load:
            wait_until(lambda: load.total >= 300)
        # Those that were there first do not.
        assert min(load.names[one.name], load.names[two.name]) > load.total / 4
        change(shared, one.peer(), two.peer(), late.peer(), **policy)
        with Load(shared.http_port, connections=2) as load:
            wait_until(lambda: load.total >= 900)
        assert 0 < load.names[late.name] < load.total / 10
        # It is taken if there is nobody else, at once and whole.
        change(shared, late.peer(), **policy)
        assert {request(shared.http_port).text for _ in range(5)} == {late.name}


def test_a_slow_start_comes_to_its_end(shared: Proxy) -> None:
    with backends(2) as (one, late):
        serve(shared, one.peer(), slow_start=0.5)
        change(shared, one.peer(), late.peer(), slow_start=0.5)
        time.sleep(0.6)
        with Load(shared.http_port, connections=2) as load:
            wait_until(lambda: load.total >= 400)
        assert load.names[late.name] == pytest.approx(load.total / 2, abs=8)


def test_a_set_that_is_loaded_at_start_does_not_start_slowly(
    make_proxy: Callable[..., Proxy],
) -> None:
    proxy = make_proxy()
    proxy.start()
    route(proxy)
    with backends(2) as (one, late):
        serve(proxy, one.peer(), slow_start=3600)
        change(proxy, one.peer(), late.peer(), slow_start=3600)
        status = proxy.admin.status
        wait_until(lambda: status()["persisted_revision"] == status()["revision"])
        proxy.stop()
        proxy.start()
        wait_until(lambda: set(proxy.admin.live(A).values()) == {"up"})
        with Load(proxy.http_port, connections=2) as load:
            wait_until(lambda: load.total >= 400)
        assert load.names[late.name] == pytest.approx(load.total / 2, abs=8)


def canary(
    proxy: Proxy, main: list[Backend], other: list[dict[str, object]], **fields: object
) -> None:
    assert proxy.admin.put({}).status == 200
    answer = proxy.admin.put(
        {
            A: upstream(*(b.peer() for b in main), canary={"upstream": "next", **fields}),
            "next": upstream(*other),
        }
    )
    assert answer.status == 200, answer.text


def test_a_canary_gets_its_share(shared: Proxy) -> None:
    with backends(3) as (one, two, new):
        for weight in (0, 10, 50, 100):
            canary(shared, [one, two], [new.peer()], weight=weight)
            with Load(shared.http_port, connections=4) as load:
                wait_until(lambda load=load: load.total >= 400)
            assert load.failed == {}
            assert load.names[new.name] == pytest.approx(load.total * weight / 100, abs=8)


def test_a_canary_by_header_and_cookie(shared: Proxy) -> None:
    with backends(2) as (old, new):
        canary(shared, [old], [new.peer()], header="X-Canary", cookie="canary", weight=0)

        def who(**headers: str) -> str:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return request(shared.http_port, headers=sent).text

        assert who(X_Canary="always") == new.name
        assert who(X_Canary="never", Cookie="canary=always") == old.name
        assert who(X_Canary="other", Cookie="canary=always") == new.name
        assert who(Cookie="canary=never") == old.name
        assert who() == old.name
        canary(shared, [old], [new.peer()], header="X-Team", header_value="blue", weight=100)
        assert who(X_Team="blue") == new.name
        canary(shared, [old], [new.peer()], header="X-Team", header_value="blue")
        assert who(X_Team="always") == old.name
        canary(shared, [old], [new.peer()], cookie="canary", weight=100)
        assert who(Cookie="canary=never") == old.name


def test_a_canary_without_peers_gets_nothing_and_a_dead_one_fails_nothing(shared: Proxy) -> None:
    with backends(2) as (one, two):
        canary(shared, [one, two], [], weight=100)
        assert {request(shared.http_port).status for _ in range(4)} == {200}
        assert shared.admin.patch(remove=["next"]).status == 200
        assert {request(shared.http_port).status for _ in range(4)} == {200}
        canary(shared, [one, two], [peer(free_port(), id="dead")], weight=100)
        with Load(shared.http_port, connections=8) as load:
            wait_until(lambda: load.total >= 400)
        assert load.failed == {}


def test_a_canary_is_counted_under_its_own_name(shared: Proxy) -> None:
    with backends(2) as (old, new):
        rule = {"upstream": "next of counted", "header": "X-Canary"}
        shared.admin.put(
            {
                "counted": upstream(old.peer(), canary=rule),
                "next of counted": upstream(new.peer()),
            }
        )
        name = "next of counted"
        for _ in range(5):
            headers = {"X-Canary": "always"}
            assert request(shared.http_port, host="counted.test", headers=headers).text == "b1"
        assert request(shared.http_port, host="counted.test").text == "b0"
        wait_until(
            lambda: metric(shared, "requests_total", of=name, method="read", code="2xx") == 5
        )


def test_a_session_stays_on_its_side_of_a_canary(shared: Proxy) -> None:
    with backends(4) as (a, b, c, d):
        sticky = {"kind": "cookie", "cookie": "route"}
        assert shared.admin.put({}).status == 200
        shared.admin.put(
            {
                A: upstream(
                    a.peer(), b.peer(), sticky=sticky, canary={"upstream": "next", "weight": 50}
                ),
                "next": upstream(c.peer(), d.peer(), sticky=sticky),
            }
        )
        sessions = begin_sessions(shared, 40)
        assert set(sessions.values()) == {"b0", "b1", "b2", "b3"}
        for session, who in sessions.items():
            for _ in range(3):
                answer = ask(shared, session)
                assert (answer.text, session_of(answer)) == (who, "")


def test_a_session_without_a_cookie_of_ours_stays_on_its_side_of_a_canary(shared: Proxy) -> None:
    """What tells the session tells the side: no request of it is on its own."""
    with backends(4) as (a, b, c, d):
        sticky = {"kind": "app_cookie", "cookie": "JSESSIONID"}

        def sides(weight: int) -> dict[str, str]:
            rule = {"upstream": "next", "weight": weight}
            assert shared.admin.put({}).status == 200
            main = upstream(a.peer(), b.peer(), sticky=sticky, canary=rule)
            shared.admin.put({A: main, "next": upstream(c.peer(), d.peer(), sticky=sticky)})
            found = {}
            for number in range(60):
                texts = {ask(shared, f"s{number}", "JSESSIONID").text for _ in range(3)}
                assert len(texts) == 1
                found[f"s{number}"] = texts.pop()
            return found

        none, some, more = sides(0), sides(30), sides(70)
        assert set(none.values()) == {"b0", "b1"}
        assert set(some.values()) == {"b0", "b1", "b2", "b3"}
        # Those that are on the canary stay there when its share grows.
        moved = {session for session, who in some.items() if who in ("b2", "b3")}
        assert {session: more[session] for session in moved} == {s: some[s] for s in moved}
        assert sum(who in ("b2", "b3") for who in more.values()) > len(moved)
        # What belongs to no session goes by turns.
        assert len({ask(shared, "").text for _ in range(40)}) == 4
