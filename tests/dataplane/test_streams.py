"""What lives longer than a request, or is not kept whole: websockets, uploads, copies."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.model import Location, Site
from tests.dataplane.harness import (
    Backend,
    Load,
    Proxy,
    backends,
    free_port,
    generation_of,
    peer,
    request,
    site,
    upstream,
    wait_until,
)
from tests.dataplane.rendered import A, host, push
from tests.dataplane.test_traffic import say, websocket

SHADOW = "shadow.test/"
HELD = 'tidegate_held_requests_total{upstream="a.test/",result="resumed"}'
IN_FLIGHT = 'tidegate_requests_in_flight{upstream="a.test/"}'


def site_of(location: Location) -> Site:
    return Site((host(location),))


# --- websockets and reloads


def test_a_websocket_outlives_a_hundred_membership_changes(routed: Proxy) -> None:
    with backends(3) as peers:
        routed.admin.put({A: upstream(peers[0].peer())})
        with websocket(routed.http_port) as connection:
            for n in range(100):
                left = peers[n % 3] if n % 4 else None
                routed.admin.patch({A: upstream(*([left.peer(id=f"p{n}")] if left else []))})
                assert say(connection, b"%d" % n) == b"%d" % n
        assert sum(one.connections for one in peers) >= 1


def test_a_websocket_outlives_a_reload_until_the_time_for_that_is_over(
    make_proxy: Callable[..., Proxy], backend: Backend
) -> None:
    proxy = make_proxy(env={"TIDEGATE_WORKER_SHUTDOWN_TIMEOUT": "3s"})
    proxy.start()
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}))
    proxy.admin.put({A: upstream(backend.peer())})
    old = proxy.workers()
    with websocket(proxy.http_port) as connection:
        files = site(proxy.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
        assert proxy.admin.site(files).json()["reloaded"] is True
        reloaded = time.monotonic()
        assert proxy.admin.status()["generation"] == generation_of(files)
        proxy.admin.patch({A: upstream()})
        assert say(connection, b"still") == b"still"
        assert connection.recv(100) == b""  # the end, when the time is over
        assert 1.5 < time.monotonic() - reloaded < 10
    wait_until(lambda: not old & proxy.workers())


# --- uploads


class Upload:
    """A POST whose body is sent in steps."""

    def __init__(self, port: int, size: int, *, path: str = "/echo") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n"
            f"Content-Length: {size}\r\n\r\n".encode()
        )

    def finish(self) -> bytes:
        text = b""
        while chunk := self.socket.recv(100_000):
            text += chunk
        self.socket.close()
        return text


def first_bytes(server: socket.socket, *, until: bytes) -> bytes:
    connection, _ = server.accept()
    connection.settimeout(10)
    text = b""
    with connection:
        while until not in text:
            chunk = connection.recv(10_000)
            assert chunk, text
            text += chunk
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    return text


@pytest.mark.parametrize("how", ["location", "setting"])
def test_an_upload_goes_on_to_the_peer_as_it_comes(proxy: Proxy, how: str) -> None:
    push(
        proxy,
        site_of(Location("/", A, request_buffering=how == "setting")),
        request_buffering=how == "location",
    )
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        server.settimeout(10)
        proxy.admin.put({A: upstream(peer(server.getsockname()[1]))})
        seen = pool.submit(first_bytes, server, until=b"first part")
        upload = Upload(proxy.http_port, 1_000_000)
        upload.socket.sendall(b"first part")
        assert seen.result(10).endswith(b"first part")  # and the rest was never sent
        upload.socket.close()


@pytest.mark.parametrize("buffered", [True, False])
def test_an_upload_is_held_until_a_peer_comes(proxy: Proxy, buffered: bool) -> None:
    push(proxy, site_of(Location("/", A, request_buffering=buffered)))
    proxy.admin.put({A: upstream(hold=20)})
    body = os.urandom(3_000_000)
    with ThreadPoolExecutor() as pool, Backend("new") as new:
        answer = pool.submit(request, proxy.http_port, "/echo?x=1", method="POST", body=body)
        wait_until(lambda: proxy.admin.metrics().get(IN_FLIGHT) == 1)
        proxy.admin.patch({A: upstream(new.peer(), hold=20)})
        assert (answer.result().status, answer.result().body == body) == (200, True)
        assert len(new.requests) == 1
    wait_until(lambda: proxy.admin.metrics().get(HELD) == 1)


def test_an_upload_finds_another_peer_before_any_of_it_is_sent(
    proxy: Proxy, backend: Backend
) -> None:
    push(proxy, site_of(Location("/", A, request_buffering=False)))
    dead = [peer(free_port(), id=f"dead{n}") for n in range(3)]
    proxy.admin.put({A: upstream(backend.peer(), *dead)})
    body = os.urandom(1_000_000)
    for _ in range(6):
        answer = request(proxy.http_port, "/echo", method="POST", body=body)
        assert (answer.status, answer.body == body) == (200, True)


def test_half_an_upload_is_never_sent_again(proxy: Proxy) -> None:
    """The only peer refuses: what was read of the body is gone, so it fails at once."""
    push(proxy, site_of(Location("/", A, request_buffering=False)))
    with Backend("gone") as gone:
        proxy.admin.put({A: upstream(gone.peer(), hold=20)})
        wait_until(lambda: proxy.admin.live(A) == {"gone": "up"})
        gone.kill()
        upload = Upload(proxy.http_port, 100)
        upload.socket.sendall(b"x" * 10)
        assert upload.finish().startswith(b"HTTP/1.1 502 ")
        # All counts are in the metrics within a second.
        counted = f'tidegate_requests_total{{upstream="{A}",method="write",code="5xx"}}'
        wait_until(lambda: proxy.admin.metrics().get(counted) == 1)
        gone.listen()
        assert gone.requests == []
    assert "held_requests" not in str(proxy.admin.metrics())


def test_a_get_is_held_where_bodies_are_not_kept_too(proxy: Proxy) -> None:
    push(proxy, site_of(Location("/", A, request_buffering=False)))
    with Backend("back") as back:
        proxy.admin.put({A: upstream(back.peer(), hold=20)})
        wait_until(lambda: proxy.admin.live(A) == {"back": "up"})
        back.kill()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(request, proxy.http_port)
            wait_until(lambda: proxy.admin.metrics().get(IN_FLIGHT) == 1)
            back.listen()
            assert answer.result().text == "back"


def test_an_upload_waits_in_the_queue_before_any_of_it_is_sent(
    proxy: Proxy, backend: Backend
) -> None:
    push(proxy, site_of(Location("/", A, request_buffering=False)))
    policy = {"max_conns": 1, "queue": 1, "queue_timeout": 20}
    proxy.admin.put({A: upstream(backend.peer(), **policy)})

    def waiting() -> float:
        return proxy.admin.metrics().get(f'tidegate_queue_length{{upstream="{A}"}}', 0)

    body = os.urandom(1_000_000)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(request, proxy.http_port, "/sleep/1")
        wait_until(lambda: backend.busy == 1)
        upload = pool.submit(request, proxy.http_port, "/echo", method="POST", body=body)
        wait_until(lambda: waiting() == 1)
        assert request(proxy.http_port, method="POST", body=b"x").status == 503
        assert slow.result().status == 200
        assert (upload.result().status, upload.result().body == body) == (200, True)
        assert [seen.path for seen in backend.requests] == ["/sleep/1", "/echo"]
        # One that leaves frees its place, and what is done leaves nothing behind.
        slow = pool.submit(request, proxy.http_port, "/sleep/1")
        wait_until(lambda: backend.busy == 1)
        leaves = Upload(proxy.http_port, 10)
        wait_until(lambda: waiting() == 1)
        leaves.socket.close()
        wait_until(lambda: waiting() == 0)
        assert request(proxy.http_port, "/echo", method="POST", body=b"x").body == b"x"
        for _ in range(4):
            assert request(proxy.http_port, "/echo", method="POST", body=b"x").body == b"x"
    counted = f'tidegate_queue_requests_total{{upstream="{A}",result="admitted"}}'
    wait_until(lambda: proxy.admin.metrics().get(counted) == 2)
    wait_until(lambda: proxy.admin.shown(A)["peers"][0]["live"]["in_flight"] == 0)


# --- copies


def mirrored(proxy: Proxy, *, path: str = "/", rewrite: bool = False) -> None:
    push(proxy, site_of(Location(path, A, rewrite=rewrite, mirror=SHADOW)))


def test_each_request_is_copied_to_the_mirror_and_answered_by_the_peer(
    proxy: Proxy, backend: Backend
) -> None:
    mirrored(proxy)
    with Backend("shadow") as shadow:
        proxy.admin.put({A: upstream(backend.peer()), SHADOW: upstream(shadow.peer())})
        body = os.urandom(100_000)
        for n in range(10):
            answer = request(
                proxy.http_port,
                f"/echo/{n}?q=%2F",
                method="POST",
                body=body,
                headers={"X-Request-ID": f"r{n}"},
            )
            assert (answer.status, answer.body == body) == (200, True)
        wait_until(lambda: len(shadow.requests) == 10)
        for seen, copy in zip(backend.requests, shadow.requests, strict=True):
            assert (seen.method, seen.path, seen.body) == (copy.method, copy.path, copy.body)
            assert seen.headers["x-request-id"] == copy.headers["x-request-id"]
            assert copy.headers["host"] == "a.test"
    counted = 'tidegate_requests_total{upstream="%s",method="write",code="2xx"}'
    wait_until(lambda: proxy.admin.metrics().get(counted % A) == 10)
    wait_until(lambda: proxy.admin.metrics().get(counted % SHADOW) == 10)
    metrics = proxy.admin.metrics()
    assert f'tidegate_requests_in_flight{{upstream="{SHADOW}"}}' not in metrics
    assert not [name for name in metrics if 'upstream="",' in name]


def test_a_copy_loses_the_context_root_too(proxy: Proxy, backend: Backend) -> None:
    mirrored(proxy, path="/app", rewrite=True)
    with Backend("shadow") as shadow:
        proxy.admin.put({A: upstream(backend.peer()), SHADOW: upstream(shadow.peer())})
        request(proxy.http_port, "/app/x%20y?q=%2F")
        wait_until(lambda: shadow.requests)
        assert shadow.requests[0].path == backend.requests[0].path == "/x%20y?q=%2F"


@pytest.mark.parametrize("mirror", ["none", "unknown", "refusing", "silent"])
def test_a_mirror_that_fails_harms_no_request(proxy: Proxy, backend: Backend, mirror: str) -> None:
    mirrored(proxy)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        shadow: dict[str, object] = {
            "none": {SHADOW: upstream()},
            "unknown": {},
            "refusing": {SHADOW: upstream(peer(free_port()))},
            "silent": {SHADOW: upstream(peer(silent.getsockname()[1]))},
        }[mirror]
        proxy.admin.put({A: upstream(backend.peer()), **shadow})
        for _ in range(5):
            answer = request(proxy.http_port)
            assert (answer.status, answer.text) == (200, "b0")
    name = f'tidegate_requests_total{{upstream="{A}",method="read",code="2xx"}}'
    wait_until(lambda: proxy.admin.metrics().get(name) == 5)
    assert not [key for key in proxy.admin.metrics() if "no_peer" in key and f'"{A}"' in key]


def test_a_slow_mirror_holds_up_the_next_request_of_a_connection_for_two_seconds_at_most(
    proxy: Proxy, backend: Backend
) -> None:
    mirrored(proxy)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_peer = peer(silent.getsockname()[1])
        proxy.admin.put({A: upstream(backend.peer()), SHADOW: upstream(silent_peer)})
        with Load(proxy.http_port, connections=1) as load:
            wait_until(lambda: load.total >= 3)
        assert load.failed == {}


def test_a_websocket_is_not_opened_at_the_mirror(proxy: Proxy, backend: Backend) -> None:
    mirrored(proxy)
    with Backend("shadow") as shadow:
        proxy.admin.put({A: upstream(backend.peer()), SHADOW: upstream(shadow.peer())})
        with websocket(proxy.http_port) as connection:
            assert say(connection, b"hello") == b"hello"
            wait_until(lambda: shadow.requests)
            assert "upgrade" not in shadow.requests[0].headers
            assert say(connection, b"again") == b"again"


def test_nobody_reaches_the_copies_from_outside(proxy: Proxy, backend: Backend) -> None:
    mirrored(proxy)
    proxy.admin.put({A: upstream(backend.peer()), SHADOW: upstream(backend.peer())})
    assert request(proxy.http_port, "/.tidegate/mirror").status == 404
    assert backend.requests == []


def test_a_held_request_is_copied_once(proxy: Proxy) -> None:
    mirrored(proxy)
    with Backend("shadow") as shadow, Backend("new") as new, ThreadPoolExecutor() as pool:
        proxy.admin.put({A: upstream(hold=20), SHADOW: upstream(shadow.peer())})
        answer = pool.submit(request, proxy.http_port, "/echo", method="POST", body=b"once")
        wait_until(lambda: proxy.admin.metrics().get(IN_FLIGHT) == 1)
        proxy.admin.patch({A: upstream(new.peer(), hold=20)})
        assert answer.result().body == b"once"
        wait_until(lambda: shadow.requests)
        assert [seen.body for seen in (*shadow.requests, *new.requests)] == [b"once", b"once"]
