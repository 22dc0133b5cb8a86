"""What requests meet while backends come, go, drain and die."""

from __future__ import annotations

import base64
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataplane.harness import (
    Backend,
    Load,
    Proxy,
    backends,
    free_port,
    peer,
    request,
    site,
    upstream,
    wait_until,
)

A = "a.test/"


def test_a_request_reaches_the_peer_as_it_was_sent(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    answer = request(
        routed.http_port,
        "/echo/a%20b/../c?x=%2F&y",
        method="POST",
        body=b"payload",
        host=f"a.test:{routed.http_port}",
        headers={
            "X-Forwarded-For": "203.0.113.9",
            "X-Forwarded-Proto": "https",
            "X-Request-ID": "mine",
        },
    )
    seen = backend.requests[-1]
    assert (answer.status, answer.body) == (200, b"payload")
    assert answer.headers["x-request-id"] == "mine"
    assert (seen.method, seen.path, seen.body) == ("POST", "/echo/a%20b/../c?x=%2F&y", b"payload")
    assert {name: seen.headers.get(name) for name in seen.headers if name != "accept-encoding"} == {
        "host": f"a.test:{routed.http_port}",
        "x-real-ip": "127.0.0.1",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "http",
        "x-forwarded-host": f"a.test:{routed.http_port}",
        "x-forwarded-port": str(routed.http_port),
        "forwarded": "for=127.0.0.1;proto=http",
        "x-request-id": "mine",
        "content-length": "7",
    }


def test_a_request_id_is_made_and_connections_are_kept(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    with Load(routed.http_port, connections=1) as load:
        wait_until(lambda: load.total >= 50)
    assert load.failed == {}
    assert len({seen.headers["x-request-id"] for seen in backend.requests}) == len(backend.requests)
    assert backend.connections <= 2  # one per worker


def test_a_context_root_is_taken_off(proxy: Proxy, backend: Backend) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/app/!": "up"}}))
    proxy.admin.put({"up": upstream(backend.peer())})
    request(proxy.http_port, "/app/x/y%20z?q=1")
    assert backend.requests[-1].path == "/x/y%20z?q=1"


@pytest.mark.parametrize(
    ("weights", "total"), [((1, 1, 1), 600), ((3, 1, 2), 600), ((1000, 1), 1001)]
)
def test_peers_get_their_share(routed: Proxy, weights: tuple[int, ...], total: int) -> None:
    with backends(len(weights)) as peers:
        routed.admin.put(
            {A: upstream(*(b.peer(weight=w) for b, w in zip(peers, weights, strict=True)))}
        )
        with Load(routed.http_port, connections=4) as load:
            wait_until(lambda: load.total >= total)
        for backend, weight in zip(peers, weights, strict=True):
            share = load.total * weight / sum(weights)
            assert load.names[backend.name] == pytest.approx(share, abs=8)


def test_weight_zero_takes_no_traffic(routed: Proxy) -> None:
    with backends(2) as (zero, one):
        routed.admin.put({A: upstream(zero.peer(weight=0), one.peer())})
        assert {request(routed.http_port).text for _ in range(10)} == {one.name}
        routed.admin.put({A: upstream(zero.peer(weight=0))})
        assert request(routed.http_port).status == 503


def test_ipv6_peers_are_reached(routed: Proxy) -> None:
    with Backend("six", address="::1") as six:
        routed.admin.put({A: upstream(six.peer(), peer(free_port(), address="::1", id="dead"))})
        assert [request(routed.http_port).text for _ in range(4)] == ["six"] * 4


def test_a_push_is_in_force_in_every_worker_when_it_is_acknowledged(routed: Proxy) -> None:
    with backends(2) as both:
        for n in range(30):
            routed.admin.put({A: upstream(both[n % 2].peer())})
            answers = Counter(request(routed.http_port).text for _ in range(8))
            assert answers == {both[n % 2].name: 8}


def test_a_draining_peer_gets_no_new_request_and_ends_what_it_has(routed: Proxy) -> None:
    with backends(2) as (old, new):
        routed.admin.put({A: upstream(old.peer())})
        slow: list[str] = []
        thread = threading.Thread(
            target=lambda: slow.append(request(routed.http_port, "/sleep/1").text)
        )
        thread.start()
        wait_until(lambda: old.requests)
        routed.admin.patch({A: upstream(old.peer(state="draining"), new.peer())})
        wait_until(lambda: routed.admin.live(A)[new.name] == "up")
        with Load(routed.http_port) as load:
            wait_until(lambda: load.total >= 200)
        thread.join()
        assert slow == [old.name]
        assert (load.failed, set(load.names)) == ({}, {new.name})


def test_a_draining_peer_serves_as_the_last_resort(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    routed.admin.patch({A: upstream(backend.peer(state="draining"))})
    assert request(routed.http_port).text == "b0"


def test_an_address_under_two_ids_is_one_peer_and_up_wins(routed: Proxy) -> None:
    with backends(2) as (one, two):
        routed.admin.put({A: upstream(one.peer(id="new"), one.peer(id="newer"), two.peer())})
        with Load(routed.http_port, connections=2) as load:
            wait_until(lambda: load.total >= 200)
        assert load.names[one.name] == pytest.approx(load.total / 2, abs=4)
        routed.admin.put({A: upstream(one.peer(id="old", state="draining"), one.peer(id="new"))})
        metrics = routed.admin.metrics()
        assert metrics['tidegate_peers{upstream="a.test/",state="up"}'] == 1
        assert 'tidegate_peers{upstream="a.test/",state="draining"}' not in metrics


@pytest.mark.parametrize(("dead", "alive"), [(1, 1), (2, 1), (4, 1)])
@pytest.mark.parametrize("keep_alive", [True, False])
def test_dead_peers_fail_no_request(routed: Proxy, dead: int, alive: int, keep_alive: bool) -> None:
    with backends(alive) as living:
        peers = [b.peer() for b in living]
        peers += [peer(free_port(), id=f"dead{n}") for n in range(dead)]
        routed.admin.put({A: upstream(*peers)})
        with Load(routed.http_port, connections=32, keep_alive=keep_alive) as load:
            wait_until(lambda: load.total >= 2000, timeout=30)
        assert load.failed == {}


def test_a_peer_killed_under_load_fails_no_request(routed: Proxy) -> None:
    with backends(3) as peers:
        routed.admin.put({A: upstream(*(b.peer() for b in peers))})
        with Load(routed.http_port, connections=16) as load:
            wait_until(lambda: load.total >= 300)
            peers[0].kill()
            at = load.total
            wait_until(lambda: load.total >= at + 1000)
        assert load.failed == {}


def test_a_dead_peer_is_left_alone_for_a_while(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer(), peer(free_port(), id="dead"))})
    started = time.monotonic()
    with Load(routed.http_port, connections=4) as load:
        wait_until(lambda: load.total >= 400)
    taken = time.monotonic() - started
    name = 'tidegate_upstream_connect_failures_total{upstream="a.test/"}'
    wait_until(lambda: routed.admin.metrics().get(name, 0) > 0)
    # Two workers, each ejects it for a second at least; four may ask at the same time.
    assert routed.admin.metrics()[name] <= 2 * 4 * (taken + 1)


def test_nothing_is_sent_twice_with_retries_off(proxy: Proxy) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, retries="off"))
    with backends(2) as peers:
        proxy.admin.put({A: upstream(*(b.peer() for b in peers), hold=5)})
        wait_until(lambda: set(proxy.admin.live(A).values()) == {"up"})
        assert request(proxy.http_port, "/reset").status == 502
        assert sum(len(b.requests) for b in peers) == 1


def test_a_post_that_reached_a_peer_is_not_sent_again(routed: Proxy) -> None:
    with backends(2) as peers:
        routed.admin.put({A: upstream(*(b.peer() for b in peers))})
        assert request(routed.http_port, "/reset", method="POST", body=b"x").status == 502
        assert sum(len(b.requests) for b in peers) == 1


def test_the_body_of_a_post_survives_a_retry(routed: Proxy, backend: Backend) -> None:
    dead = [peer(free_port(), id=f"dead{n}") for n in range(3)]
    routed.admin.put({A: upstream(backend.peer(), *dead)})
    body = os.urandom(3_000_000)
    for _ in range(4):
        answer = request(routed.http_port, "/echo", method="POST", body=body)
        assert (answer.status, answer.body == body) == (200, True)


def websocket(port: int, path: str = "/") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive, Upgrade\r\n"
        "Upgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    return connection


def say(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
    answer = b""
    while len(answer) < len(text) + 2:
        answer += connection.recv(100)
    return answer[2:]


def test_websockets_work_without_being_asked_for(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    with websocket(routed.http_port, "/any/where") as connection:
        assert say(connection, b"hello") == b"hello"
        routed.admin.patch({A: upstream(backend.peer(state="draining"))})
        routed.admin.patch({A: upstream()})
        assert say(connection, b"still here") == b"still here"


def test_an_answer_reaches_the_client_as_it_comes(routed: Proxy) -> None:
    """Server-sent events: the head and each event at once, not when a buffer is full."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        routed.admin.put({A: upstream(peer(server.getsockname()[1]))})
        with socket.create_connection(("127.0.0.1", routed.http_port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
            connection, _ = server.accept()
            with connection:
                connection.recv(10000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                text = b""
                for event in (b"data: one\n\n", b"data: two\n\n"):
                    connection.sendall(event)
                    while event not in text:
                        chunk = client.recv(1000)
                        assert chunk, text
                        text += chunk
    assert text.startswith(b"HTTP/1.1 200 ")


def test_no_other_upgrade_gets_through(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    request(routed.http_port, headers={"Connection": "Upgrade", "Upgrade": "h2c"})
    assert "upgrade" not in backend.requests[-1].headers


def test_a_peer_that_does_not_listen_yet_gets_no_request(routed: Proxy, backend: Backend) -> None:
    late = Backend("late", port=free_port())
    routed.admin.put({A: upstream(backend.peer())})
    routed.admin.patch({A: upstream(backend.peer(), late.peer())})
    assert routed.admin.live(A) == {"b0": "up", "late": "probing"}
    with Load(routed.http_port) as load:
        wait_until(lambda: load.total >= 200)
        assert set(load.names) == {"b0"}
        with late:
            wait_until(lambda: load.names["late"] > 10)
            load.stop()
    assert load.failed == {}
    failures = 'tidegate_upstream_connect_failures_total{upstream="a.test/"}'
    assert failures not in routed.admin.metrics()


def test_a_probed_peer_that_is_taken_away_stays_away(routed: Proxy, backend: Backend) -> None:
    late = Backend("late", port=free_port())
    routed.admin.put({A: upstream(backend.peer())})
    routed.admin.patch({A: upstream(backend.peer(), late.peer())})
    routed.admin.patch({A: upstream(backend.peer())})
    with late:
        time.sleep(0.3)  # long enough for a probe that is still running
        assert routed.admin.live(A) == {"b0": "up"}
        assert late.requests == []


def test_probing_goes_on_when_its_worker_is_killed(routed: Proxy, backend: Backend) -> None:
    late = Backend("late", port=free_port())
    routed.admin.put({A: upstream(backend.peer())})
    routed.admin.patch({A: upstream(backend.peer(), late.peer())})
    for pid in routed.workers():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(routed.workers()) == 2)
    with late:
        wait_until(lambda: routed.admin.live(A)["late"] == "up")


def test_the_first_peers_of_an_upstream_serve_at_once(routed: Proxy, backend: Backend) -> None:
    for n in range(20):
        routed.admin.put({A: upstream(backend.peer(id=str(n)))})
        assert request(routed.http_port).text == "b0"
        routed.admin.put({A: upstream()})


def push_until_applied(proxy: Proxy, base: int, wanted: dict[str, object]) -> int:
    """Sends a delta again until it is applied; a full push where the base is not right any more.

    Returns the revision that was acknowledged.
    """
    frame = {"writer": "test", "revision": base + 1}
    full = False
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if full:
                push = {**frame, "upstreams": wanted}
                answer = proxy.admin.call("PUT", "/v1/membership", push)
            else:
                push = {**frame, "base_revision": base, "upsert": wanted}
                answer = proxy.admin.call("PATCH", "/v1/membership", push)
        except OSError:
            continue
        if answer.status == 200:
            revision: int = answer.json()["revision"]
            return revision
        if answer.status == 409:
            frame["revision"] = answer.json()["revision"] + 1
            full = True
    raise TimeoutError("the push is not applied")


def test_workers_killed_during_pushes_cost_no_membership(routed: Proxy) -> None:
    admin = routed.admin
    with backends(2) as both:
        admin.put({A: upstream(both[0].peer(), both[1].peer())})
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(0.15):
                for pid in list(routed.workers())[:1]:
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            base = 1
            for n in range(200):
                others = {f"u{k}": upstream(peer(80, id=f"{n}-{k}")) for k in range(50)}
                wanted = {A: upstream(both[n % 2].peer(id=f"p{n}")), **others}
                base = push_until_applied(routed, base, wanted)
        finally:
            stop.set()
            killer.join()
        wait_until(lambda: len(routed.workers()) == 2)
        state = admin.call("GET", "/v1/membership").json()
        assert state["revision"] == base
        assert len(state["upstreams"]) == 51 == admin.status()["upstreams"]
        assert admin.status()["peers"] == 51
        ids = {p["id"] for item in state["upstreams"].values() for p in item["peers"]}
        assert {i.split("-")[0] for i in ids} == {"199", "p199"}
        wait_until(lambda: request(routed.http_port).text == both[1].name)


def test_two_writers_that_race_leave_one_of_both_states(proxy: Proxy) -> None:
    answers: Counter[int] = Counter()

    def write(who: str) -> None:
        for revision in range(1, 100):
            body = {
                "writer": "same lease",
                "revision": revision,
                "upstreams": {f"u{n}": upstream(peer(80, id=who)) for n in range(20)},
            }
            answers[proxy.admin.call("PUT", "/v1/membership", body).status] += 1

    threads = [threading.Thread(target=write, args=(who,)) for who in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 409}
    state = proxy.admin.call("GET", "/v1/membership").json()
    assert state["revision"] == 99
    assert len({item["peers"][0]["id"] for item in state["upstreams"].values()}) == 1


def test_a_reload_lets_requests_under_way_end(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    old = routed.workers()
    answers: list[str] = []
    thread = threading.Thread(
        target=lambda: answers.append(request(routed.http_port, "/sleep/2").text)
    )
    thread.start()
    wait_until(lambda: backend.requests)
    files = site(routed.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
    with Load(routed.http_port, keep_alive=False) as load:
        assert routed.admin.site(files).json()["reloaded"] is True
        assert request(routed.http_port, host="b.test").text == "b0"
        wait_until(lambda: load.total >= 100)
    thread.join()
    assert answers == ["b0"]
    assert load.failed == {}
    wait_until(lambda: not old & routed.workers())


def test_an_old_worker_routes_by_the_newest_membership(routed: Proxy) -> None:
    with backends(2) as (one, two):
        routed.admin.put({A: upstream(one.peer())})
        connection = websocket(routed.http_port)  # keeps its worker alive over the reload
        slow = socket.create_connection(("127.0.0.1", routed.http_port))
        slow.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\n")
        time.sleep(0.1)  # accepted; by an old worker
        files = site(routed.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
        assert routed.admin.site(files).status == 200
        routed.admin.put({A: upstream(two.peer())})
        wait_until(lambda: routed.admin.live(A) == {two.name: "up"})
        slow.sendall(b"Connection: close\r\n\r\n")
        slow.settimeout(10)
        text = b""
        while chunk := slow.recv(1000):
            text += chunk
        assert text.endswith(two.name.encode())
        connection.close()


def test_it_runs_unprivileged_with_nothing_writable_but_its_directories(
    make_proxy: Callable[..., Proxy], tmp_path: Path, backend: Backend
) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    for path in (tmp_path, *tmp_path.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)
    proxy = make_proxy(env={"TIDEGATE_USER": "nobody"})
    proxy.start()
    status = Path(f"/proc/{proxy.pid}/status").read_text()
    assert f"Uid:\t{65534}" in status
    assert proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}})).status == 200
    proxy.admin.put({A: upstream(backend.peer())})
    big = b"x" * 3_000_000  # goes through a temporary file
    assert request(proxy.http_port, "/echo", method="POST", body=big).body == big


@pytest.mark.parametrize("name", ["RUN", "STATE"])
def test_a_directory_that_it_cannot_write_to_is_named_with_the_user(
    make_proxy: Callable[..., Proxy], name: str
) -> None:
    # Nobody may make a directory there, not even root; and it has to stay as it is.
    proxy = make_proxy(env={f"TIDEGATE_{name}_DIR": "/proc/tidegate"})
    assert proxy.launch().wait(20) == 1
    said = f"tidegate: TIDEGATE_{name}_DIR /proc/tidegate cannot be written to by user "
    assert f"{said}{os.getuid()}" in proxy.output


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TIDEGATE_ADMIN_TOKEN_FILE", "/none/token", "is not there for user"),
        ("TIDEGATE_SESSION_SECRET_FILE", "/none/secret", "is not there for user"),
        ("TIDEGATE_STATUS_PASSWORD_FILE", os.devnull, "is empty"),
        ("TIDEGATE_LEASE_TTL", "0.0", "expected seconds above 0"),
        ("TIDEGATE_LEASE_TTL", "1.2.3", "expected seconds"),
        ("TIDEGATE_DICT_SIZE", "m", "expected a number with k, m or g"),
        ("TIDEGATE_DICT_SIZE", "6m4", "expected a number with k, m or g"),
        ("TIDEGATE_DICT_SIZE", "8k", "at least 64k is needed"),
    ],
)
def test_an_environment_that_cannot_be_used_is_told_in_one_line(
    make_proxy: Callable[..., Proxy], name: str, value: str, said: str
) -> None:
    proxy = make_proxy(env={name: value})
    assert proxy.launch().wait(20) == 1
    (line,) = proxy.output.splitlines()
    assert line.startswith(f"tidegate: {name} ")
    assert said in line


def test_operators_files_are_included(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy()
    port = free_port()
    directory = Path(proxy.env["TIDEGATE_CONF_DIR"])
    directory.mkdir(parents=True)
    (directory / "mine.conf").write_text(
        f"server {{ listen 127.0.0.1:{port}; location / {{ return 200 mine; }} }}"
    )
    proxy.start()
    assert request(port).text == "mine"
