"""Requests that find no peer: held where a replacement is expected, else answered 503."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dataplane.harness import (
    Answer,
    Backend,
    Client,
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


def held(proxy: Proxy, result: str) -> float:
    name = f'tidegate_held_requests_total{{upstream="a.test/",result="{result}"}}'
    return proxy.admin.metrics().get(name, 0)


def ended(proxy: Proxy) -> float:
    return sum(
        value
        for name, value in proxy.admin.metrics().items()
        if name.startswith("tidegate_requests_total{")
    )


def in_flight(proxy: Proxy) -> float:
    return proxy.admin.metrics().get('tidegate_requests_in_flight{upstream="a.test/"}', 0)


def is_still(load: Load) -> bool:
    """Whether no request ends for a while."""
    before = load.total
    time.sleep(0.3)
    return load.total == before


@pytest.mark.parametrize("peers", ["none", "unknown", "refusing"])
def test_without_hold_no_peer_is_503_at_once(routed: Proxy, peers: str) -> None:
    if peers == "none":
        routed.admin.put({A: upstream()})
    elif peers == "refusing":
        routed.admin.put({A: upstream()})
        routed.admin.put({A: upstream(peer(free_port(), state="draining"))})
    answer = request(routed.http_port)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "No instance of the application" in answer.text
    if peers != "unknown":  # of which nothing is counted
        wait_until(lambda: ended(routed) == 1)
    assert held(routed, "expired") == held(routed, "resumed") == 0


BODIES = {"GET": None, "POST": b"once"}


@pytest.mark.parametrize("method", BODIES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "reused"])
def test_a_clients_connection_survives_being_held(routed: Proxy, method: str, used: bool) -> None:
    """Nobody's connection is the price of a replacement; neither that of a request in vain."""
    body = BODIES[method]
    with ThreadPoolExecutor() as pool, Backend("old") as old, Backend("new") as new:
        routed.admin.put({A: upstream(old.peer(), hold=20)})
        wait_until(lambda: routed.admin.live(A) == {"old": "up"})
        clients = [Client(routed.http_port) for _ in range(4)]
        if used:
            assert [client.status() for client in clients] == [200] * 4
        routed.admin.patch({A: upstream(hold=20)})
        statuses = [pool.submit(client.status, method, body=body) for client in clients]
        wait_until(lambda: in_flight(routed) == 4)
        routed.admin.patch({A: upstream(new.peer(), hold=20)})
        assert [status.result() for status in statuses] == [200] * 4
        routed.admin.patch({A: upstream(hold=0.1)})
        assert [client.status(method, body=body) for client in clients] == [503] * 4
        routed.admin.patch({A: upstream()})
        assert [client.status(method, body=body) for client in clients] == [503] * 4
        routed.admin.patch({A: upstream(peer(free_port()))})  # refuses: 502
        assert [client.status(method, body=body) for client in clients] == [502] * 4
        routed.admin.patch({A: upstream(new.peer())})
        assert [client.status(method, body=body) for client in clients] == [200] * 4


def test_an_unknown_host_is_503(routed: Proxy) -> None:
    assert request(routed.http_port, host="nobody.test").status == 503


def test_a_refusing_peer_is_502_and_says_so(routed: Proxy) -> None:
    routed.admin.put({A: upstream(peer(free_port()))})
    answer = request(routed.http_port, method="POST", body=b"x")
    assert (answer.status, "retry-after" in answer.headers) == (502, False)


def test_a_peer_that_is_too_slow_is_504(proxy: Proxy, backend: Backend) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, http="proxy_read_timeout 1s;"))
    proxy.admin.put({A: upstream(backend.peer(), hold=5)})
    wait_until(lambda: proxy.admin.live(A) == {"b0": "up"})
    assert request(proxy.http_port, "/sleep/20").status == 504
    assert len(backend.requests) == 1


def test_what_a_peer_answers_is_passed_on(routed: Proxy) -> None:
    """A 503 of the application is the application's: no page of ours, no second attempt."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        routed.admin.put({A: upstream(peer(server.getsockname()[1]))})
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(request(routed.http_port)))
        thread.start()
        connection, _ = server.accept()
        connection.recv(10000)
        connection.sendall(b"HTTP/1.1 503 Mine\r\nContent-Length: 4\r\n\r\nmine")
        thread.join()
        connection.close()
    assert (answers[0].status, answers[0].text) == (503, "mine")
    assert "retry-after" not in answers[0].headers


def test_the_operators_error_page_is_shown(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>sorry: {{status}} {{reason}}</p>")
    proxy = make_proxy(env={"TIDEGATE_ERROR_PAGE": str(page)})
    proxy.start()
    assert request(proxy.http_port).text == "<p>sorry: 503 Service Unavailable</p>"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_is_held_until_a_peer_comes(routed: Proxy, method: str) -> None:
    body = os.urandom(2_000_000) if method == "POST" else None
    routed.admin.put({A: upstream(hold=20)})
    with ThreadPoolExecutor() as pool, Backend("new") as new:
        answers = [
            pool.submit(request, routed.http_port, "/echo?x=1", method=method, body=body)
            for _ in range(5)
        ]
        wait_until(lambda: in_flight(routed) == 5)
        routed.admin.patch({A: upstream(new.peer(), hold=20)})
        for answer in answers:
            assert answer.result().status == 200
            assert answer.result().body == (body or b"")
        assert {seen.path for seen in new.requests} == {"/echo?x=1"}
    wait_until(lambda: held(routed, "resumed") == 5)
    wait_until(lambda: in_flight(routed) == 0)


def test_a_held_request_loses_its_context_root_once(proxy: Proxy) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/app/!": A}}))
    late = Backend("late", port=free_port())
    proxy.admin.put({A: upstream(late.peer(), hold=20)})
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(request, proxy.http_port, "/app/app/x%20y?q=%2F")
        wait_until(lambda: in_flight(proxy) == 1)
        with late:
            assert answer.result().text == "late"
            assert late.requests[-1].path == "/app/x%20y?q=%2F"


def test_a_held_request_goes_on_when_the_peer_listens(routed: Proxy) -> None:
    late = Backend("late", port=free_port())
    routed.admin.put({A: upstream(late.peer(), hold=20)})
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(request, routed.http_port)
        wait_until(lambda: in_flight(routed) == 1)
        assert routed.admin.live(A) == {"late": "probing"}
        with late:
            assert answer.result().text == "late"


def test_the_hold_ends(routed: Proxy) -> None:
    routed.admin.put({A: upstream(hold=0.5)})
    started = time.monotonic()
    answer = request(routed.http_port)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert time.monotonic() - started >= 0.49
    wait_until(lambda: held(routed, "expired") == 1)


def test_the_hold_ends_when_it_is_taken_back(routed: Proxy) -> None:
    routed.admin.put({A: upstream(hold=60)})
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(request, routed.http_port)
        wait_until(lambda: in_flight(routed) == 1)
        routed.admin.patch({A: upstream(hold=0)})
        assert answer.result(5).status == 503


def test_the_only_peer_killed_and_replaced_fails_no_get(routed: Proxy) -> None:
    with Backend("old") as old, Backend("new") as new:
        routed.admin.put({A: upstream(old.peer(), hold=20)})
        wait_until(lambda: routed.admin.live(A) == {"old": "up"})
        with Load(routed.http_port, connections=8) as load:
            wait_until(lambda: load.total >= 100)
            old.kill()
            time.sleep(0.2)  # the agent has not heard of it yet
            routed.admin.patch({A: upstream(hold=20)})
            time.sleep(0.3)  # the replacement is being scheduled
            routed.admin.patch({A: upstream(new.peer(), hold=20)})
            wait_until(lambda: load.names["new"] >= 100)
        assert load.failed == {}


def test_stop_first_update_of_one_replica_fails_nothing_with_retries_off(proxy: Proxy) -> None:
    """Draining is seen before SIGTERM: requests are held from a while before the old one ends."""
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, retries="off"))
    with Backend("old") as old:
        proxy.admin.put({A: upstream(old.peer(), hold=20)})
        wait_until(lambda: proxy.admin.live(A) == {"old": "up"})
        with Load(proxy.http_port, connections=4) as load:
            wait_until(lambda: load.names["old"] > 50)
            proxy.admin.patch({A: upstream(old.peer(state="draining"), hold=20)})
            at = load.names["old"]
            wait_until(lambda: load.names["old"] > at + 50)  # the last resort, for now
            wait_until(lambda: is_still(load), what="all requests held")
            old.kill()
            proxy.admin.patch({A: upstream(hold=20)})
            with Backend("new") as new:
                proxy.admin.patch({A: upstream(new.peer(), hold=20)})
                wait_until(lambda: load.names["new"] > 50)
                load.stop()
        assert load.failed == {}


def test_a_client_that_leaves_frees_its_place(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(workers=1, env={"TIDEGATE_MAX_HELD": "1"})
    proxy.start()
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}))
    proxy.admin.put({A: upstream(hold=60)})
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", proxy.http_port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            wait_until(lambda: in_flight(proxy) == 1)
        wait_until(lambda: in_flight(proxy) == 0, timeout=5)
    assert held(proxy, "refused") == 0


def test_as_many_are_held_as_the_setting_says(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(workers=1, env={"TIDEGATE_MAX_HELD": "2"})
    proxy.start()
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}))
    proxy.admin.put({A: upstream(hold=20)})
    with ThreadPoolExecutor() as pool, Backend("new") as new:
        answers = [pool.submit(request, proxy.http_port) for _ in range(2)]
        wait_until(lambda: in_flight(proxy) == 2)
        assert request(proxy.http_port).status == 503
        assert not any(answer.done() for answer in answers)
        proxy.admin.patch({A: upstream(new.peer(), hold=20)})
        assert [answer.result().text for answer in answers] == ["new", "new"]
    wait_until(lambda: held(proxy, "refused") == 1)


@pytest.mark.parametrize("retries", ["error timeout", "off"])
def test_a_draining_peer_that_goes_on_serving_gets_requests_held_in_vain(
    proxy: Proxy, retries: str
) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, retries=retries))
    gone = peer(free_port(), id="gone", state="draining")
    with Backend("old") as old, ThreadPoolExecutor(8) as pool:
        proxy.admin.put({A: upstream(old.peer(), hold=15)})
        wait_until(lambda: proxy.admin.live(A) == {"old": "up"})
        proxy.admin.patch({A: upstream(old.peer(state="draining"), gone, hold=15)})
        time.sleep(2)  # draining for so long that it might have ended
        started = time.monotonic()
        answers = [
            pool.submit(request, proxy.http_port, "/echo", method="POST", body=b"once")
            for _ in range(8)
        ]
        assert [answer.result().body for answer in answers] == [b"once"] * 8
        assert (
            time.monotonic() - started > 2.5
        )  # and with 15 s the hold is not over, or it were 503
        assert len(old.requests) == 8
        first = started
        with Load(proxy.http_port, connections=4) as load:  # what comes now is not held as long
            wait_until(lambda: load.total >= 10)
            at = load.total
            wait_until(lambda: load.total > at + 200)  # with 3 s each it would be a dozen
            with Backend("new") as new:
                proxy.admin.patch({A: upstream(old.peer(state="draining"), new.peer(), hold=15)})
                wait_until(lambda: proxy.admin.live(A)["new"] == "up")
                seen = len(old.requests)
                wait_until(lambda: load.names["new"] > 50)
                load.stop()
        assert load.failed == {}
        assert len(old.requests) <= seen + 4  # those that were under way
        # Two workers with 4 checks a second each, and the connections that requests took.
        assert old.connections <= 2 * 4 * (time.monotonic() - first + 1) + 20


def test_a_draining_peer_that_refuses_leaves_requests_held_until_another_comes(
    proxy: Proxy,
) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, retries="off"))
    with Backend("old") as old:
        proxy.admin.put({A: upstream(old.peer(), hold=15)})
        wait_until(lambda: proxy.admin.live(A) == {"old": "up"})
    draining = old.peer(state="draining")
    proxy.admin.patch({A: upstream(draining, hold=15)})
    time.sleep(2)
    with ThreadPoolExecutor() as pool, Backend("new") as new:
        answers = [
            pool.submit(request, proxy.http_port, "/echo", method="POST", body=b"once")
            for _ in range(4)
        ]
        time.sleep(4.5)  # longer than what a request waits for a replacement alone
        assert not any(answer.done() for answer in answers)
        proxy.admin.patch({A: upstream(draining, new.peer(), hold=15)})
        assert [answer.result().status for answer in answers] == [200] * 4
        assert len(new.requests) == 4
    wait_until(lambda: held(proxy, "resumed") == 4)


def test_a_draining_peer_that_ends_while_it_is_the_last_resort_fails_nothing(
    routed: Proxy,
) -> None:
    with Backend("old") as old:
        routed.admin.put({A: upstream(old.peer(), hold=15)})
        wait_until(lambda: routed.admin.live(A) == {"old": "up"})
        routed.admin.patch({A: upstream(old.peer(state="draining"), hold=15)})
        time.sleep(2)
        with Load(routed.http_port, connections=4, keep_alive=False) as load:
            wait_until(lambda: load.names["old"] > 50)
            old.kill()
            wait_until(lambda: is_still(load), what="all requests held")
            with Backend("new") as new:
                routed.admin.patch({A: upstream(new.peer(), hold=15)})
                wait_until(lambda: load.names["new"] > 50)
                load.stop()
        assert load.failed == {}


def test_without_hold_a_draining_peer_serves_at_once_however_long_it_has_been(
    routed: Proxy, backend: Backend
) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    routed.admin.patch({A: upstream(backend.peer(state="draining"))})
    time.sleep(2)
    assert request(routed.http_port).text == "b0"
    wait_until(lambda: ended(routed) == 1)
    assert held(routed, "resumed") == 0


def test_refusing_peers_are_not_waited_for_as_long(routed: Proxy) -> None:
    with Backend("gone") as gone:
        routed.admin.put({A: upstream(gone.peer(), hold=60)})
        wait_until(lambda: routed.admin.live(A) == {"gone": "up"})
    started = time.monotonic()
    assert request(routed.http_port).status == 502
    assert 2 < time.monotonic() - started < 30  # half of what the upstream holds


def test_a_refusing_peer_that_comes_back_within_the_hold_fails_nothing(routed: Proxy) -> None:
    with Backend("back") as back:
        routed.admin.put({A: upstream(back.peer(), hold=60)})
        wait_until(lambda: routed.admin.live(A) == {"back": "up"})
        back.kill()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(request, routed.http_port, "/echo", method="POST", body=b"once")
            wait_until(lambda: in_flight(routed) == 1)
            back.listen()
            assert (answer.result().status, answer.result().body) == (200, b"once")
        assert len(back.requests) == 1


class StandIn:
    """Accepts for a peer that does not listen yet, and closes: as Docker's proxy does."""

    def __init__(self, port: int) -> None:
        self.met = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(5)
                    self.met += bool(connection.recv(10000))

    def close(self) -> None:
        # A thread that waits in `accept` would keep the port.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_a_new_peer_that_something_accepts_for_is_waited_for(routed: Proxy) -> None:
    """The probe finds a listener, and the request is closed without a byte until the app is up."""
    port = free_port()
    stand_in = StandIn(port)
    routed.admin.put({A: upstream(peer(port, id="new"), hold=60)})
    wait_until(lambda: routed.admin.live(A) == {"new": "up"})
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(request, routed.http_port)
        wait_until(lambda: stand_in.met > 0)
        stand_in.close()
        with Backend("new", port=port) as new:
            assert answer.result().text == "new"
            assert len(new.requests) == 1


def test_what_is_not_idempotent_is_not_sent_again_to_a_new_peer_either(routed: Proxy) -> None:
    port = free_port()
    stand_in = StandIn(port)
    routed.admin.put({A: upstream(peer(port, id="new"), hold=60)})
    wait_until(lambda: routed.admin.live(A) == {"new": "up"})
    assert request(routed.http_port, method="POST", body=b"once").status == 502
    assert stand_in.met == 1
    stand_in.close()


def test_held_requests_survive_a_reload(routed: Proxy) -> None:
    routed.admin.put({A: upstream(hold=30)})
    with ThreadPoolExecutor() as pool, Backend("new") as new:
        answer = pool.submit(request, routed.http_port)
        wait_until(lambda: in_flight(routed) == 1)
        files = site(routed.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
        assert routed.admin.site(files).status == 200
        routed.admin.patch({A: upstream(new.peer(), hold=30)})
        assert answer.result().text == "new"


def test_held_over_http2(proxy: Proxy) -> None:
    import shutil
    import subprocess

    from tests.conftest import require

    require(shutil.which("curl"), "curl")
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout
    require("HTTP2" in version, "curl with HTTP/2")
    port = free_port()
    files = site(proxy.http_port, {"a.test": {"/": A}})
    files["two.conf"] = f"""
server {{
    listen {port} http2;
    server_name a.test;
    include conf.d/server.inc;
    location / {{
        set $tidegate_upstream "{A}";
        include conf.d/proxy.inc;
        proxy_pass http://tidegate;
    }}
}}
"""
    assert proxy.admin.site(files).status == 200
    proxy.admin.put({A: upstream(hold=30)})
    command = ["curl", "-s", "--http2-prior-knowledge", "-H", "Host: a.test", "--data", "two"]
    command += [f"http://127.0.0.1:{port}/echo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client, backends(1) as (new,):
        wait_until(lambda: in_flight(proxy) == 1)
        proxy.admin.patch({A: upstream(new.peer(), hold=30)})
        assert client.communicate(timeout=20)[0] == b"two"
