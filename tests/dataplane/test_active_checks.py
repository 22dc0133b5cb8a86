"""Active health checks: by one worker for all, through its end and through reloads."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import authority, certificate
from tests.dataplane.harness import (
    Backend,
    Load,
    Proxy,
    backends,
    request,
    site,
    wait_until,
)
from tests.dataplane.test_passive_health import A, state, with_policy

HTTP = {"kind": "http", "path": "/check", "interval": 0.1, "timeout": 0.5, "rise": 2, "fall": 2}
TCP = {"kind": "tcp", "interval": 0.1, "timeout": 0.5, "rise": 1, "fall": 2}


def check_of(proxy: Proxy, name: str) -> dict[str, object]:
    peers = proxy.admin.shown(A)["peers"]
    found: dict[str, object] = next(p["live"].get("check", {}) for p in peers if p["id"] == name)
    return found


def test_a_peer_that_fails_its_check_gets_no_request_until_it_passes_again(routed: Proxy) -> None:
    with backends(3) as (bad, *good):
        routed.admin.put({A: with_policy(*(b.peer() for b in (bad, *good)), check=HTTP)})
        wait_until(lambda: check_of(routed, "b0").get("healthy"))
        assert check_of(routed, "b0")["status"] == 200
        bad.health = 404
        wait_until(lambda: state(routed, "b0") == "unhealthy")
        shown = check_of(routed, "b0")
        assert (shown["healthy"], shown["status"]) == (False, 404)
        assert shown["message"] == "status 404, expected 200-399"
        seen = len(bad.traffic)
        assert {request(routed.http_port).text for _ in range(30)} == {"b1", "b2"}
        assert len(bad.traffic) == seen
        metrics = routed.admin.metrics()
        assert metrics['tidegate_peers{upstream="a.test/",state="unhealthy"}'] == 1
        bad.health = 302
        wait_until(lambda: state(routed, "b0") == "up")
        assert "message" not in check_of(routed, "b0")
        wait_until(lambda: request(routed.http_port).text == "b0")
        series = 'tidegate_checks_total{upstream="a.test/",result="failed"}'
        wait_until(lambda: routed.admin.metrics().get(series, 0) >= 2)


def test_the_verdict_changes_after_so_many_results_in_a_row(routed: Proxy) -> None:
    with backends(2) as (bad, good):
        check = {**HTTP, "rise": 3, "fall": 4, "status": "200,204"}
        routed.admin.put({A: with_policy(bad.peer(), good.peer(), check=check)})
        wait_until(lambda: check_of(routed, "b0").get("healthy"))
        bad.health, before = 201, len(bad.checks)
        wait_until(lambda: state(routed, "b0") == "unhealthy")
        assert 4 <= len(bad.checks) - before <= 5
        bad.health, before = 204, len(bad.checks)
        wait_until(lambda: state(routed, "b0") == "up")
        assert 3 <= len(bad.checks) - before <= 4


def test_a_check_asks_as_the_policy_says(routed: Proxy, backend: Backend) -> None:
    check = {**HTTP, "method": "HEAD", "path": "/check?deep=1", "host": "health.test"}
    routed.admin.put({A: with_policy(backend.peer(), check=check)})
    wait_until(lambda: backend.checks)
    seen = backend.checks[-1]
    assert (seen.method, seen.path, seen.headers["host"]) == (
        "HEAD",
        "/check?deep=1",
        "health.test",
    )
    routed.admin.put({A: with_policy(backend.peer(), check=HTTP)})
    wait_until(lambda: backend.checks[-1].headers["host"] == "a.test")


def test_a_tcp_check_finds_a_peer_that_is_gone_and_one_that_is_back(routed: Proxy) -> None:
    with backends(2) as (gone, good):
        routed.admin.put({A: with_policy(gone.peer(), good.peer(), check=TCP)})
        wait_until(lambda: check_of(routed, "b0").get("healthy"))
        gone.kill()
        wait_until(lambda: state(routed, "b0") == "unhealthy")
        assert "refused" in str(check_of(routed, "b0")["message"])
        gone.listen()
        wait_until(lambda: state(routed, "b0") == "up")
        assert gone.requests == []


def test_a_peer_that_accepts_and_never_answers_is_unhealthy(routed: Proxy) -> None:
    with backends(1) as (good,), socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        stuck = {"id": "mute", "address": "127.0.0.1", "port": mute.getsockname()[1]}
        check = {**HTTP, "timeout": 0.1}
        routed.admin.put({A: with_policy(stuck, good.peer(), check=check)})
        wait_until(lambda: state(routed, "mute") == "unhealthy")
        assert "timeout" in str(check_of(routed, "mute")["message"])


def test_checks_are_made_once_not_once_per_worker(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: with_policy(backend.peer(), check={**HTTP, "interval": 0.2})})
    wait_until(lambda: len(backend.checks) >= 2)
    started, before = time.monotonic(), len(backend.checks)
    wait_until(lambda: len(backend.checks) >= before + 8)
    assert time.monotonic() - started > 8 * 0.2 * 0.9 - 0.2


def worker_that_checks(proxy: Proxy, backend: Backend) -> int:
    """Process id of the worker that makes the checks, as the connection shows it."""
    found: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        spy = {"id": "spy", "address": "127.0.0.1", "port": server.getsockname()[1]}
        proxy.admin.put({"spy": with_policy(spy, check=HTTP)})
        while not found:
            connection, (_, port) = server.accept()
            with connection:
                found = [pid for pid in proxy.workers() if port in local_ports(pid)]
    return found[0]


def local_ports(pid: int) -> set[int]:
    """Local ports of the TCP connections of a process."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    ports = set()
    with open(f"/proc/{pid}/net/tcp") as table:
        for line in table.read().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


@pytest.mark.parametrize("end", ["killed", "reloaded"])
def test_p9_p11_checks_go_on_when_their_worker_ends(routed: Proxy, end: str) -> None:
    """No timer of a worker that is gone is needed, and verdicts stay."""
    with backends(3) as (bad, *good):
        elected = worker_that_checks(routed, bad)
        peers = [b.peer() for b in (bad, *good)]
        routed.admin.put({A: with_policy(*peers, check=HTTP)})
        bad.health = 500
        wait_until(lambda: state(routed, "b0") == "unhealthy")
        seen = len(bad.traffic)
        with Load(routed.http_port, connections=2):
            if end == "killed":
                os.kill(elected, signal.SIGKILL)
            else:
                hosts = {"a.test": {"/": A}, "b.test": {"/": A}}
                assert routed.admin.site(site(routed.http_port, hosts)).status == 200
            before = len(good[0].checks)
            wait_until(lambda: len(good[0].checks) >= before + 5)
            assert state(routed, "b0") == "unhealthy"
        assert len(bad.traffic) == seen
        bad.health, good[0].health = 200, 500
        wait_until(lambda: routed.admin.live(A) == {"b0": "up", "b1": "unhealthy", "b2": "up"})


def test_a_new_peer_is_admitted_when_its_first_check_passes(routed: Proxy) -> None:
    with backends(2) as (old, new):
        policy = {"check": {**HTTP, "rise": 5}}
        routed.admin.put({A: with_policy(old.peer(), **policy)})
        new.health = 503
        routed.admin.patch({A: with_policy(old.peer(), new.peer(), **policy)})
        wait_until(lambda: len(new.checks) >= 3)
        assert state(routed, "b1") == "probing"
        assert check_of(routed, "b1")["message"] == "status 503, expected 200-399"
        assert {request(routed.http_port).text for _ in range(8)} == {"b0"}
        new.health, before = 200, len(new.checks)
        wait_until(lambda: state(routed, "b1") == "up")
        assert len(new.checks) - before <= 3  # one is enough, whatever `rise` says


def test_panic_when_all_checks_fail_requests_are_served_all_the_same(routed: Proxy) -> None:
    with backends(2) as both:
        for backend in both:
            backend.health = 500
        routed.admin.put({A: with_policy(*(b.peer() for b in both), check=HTTP)})
        wait_until(lambda: set(routed.admin.live(A).values()) == {"unhealthy"})
        assert {request(routed.http_port).text for _ in range(8)} == {"b0", "b1"}


def test_panic_where_there_are_only_backups_it_goes_by_them(routed: Proxy) -> None:
    with backends(4) as four:
        peers = [b.peer(backup=True) for b in four]
        routed.admin.put({A: with_policy(*peers, check=HTTP)})
        for out in (2, 3, 4):
            for backend in four[:out]:
                backend.health = 500
            wait_until(
                lambda out=out: list(routed.admin.live(A).values()).count("unhealthy") == out  # type: ignore[misc]
            )
            names = {request(routed.http_port).text for _ in range(24)}
            assert names == ({"b2", "b3"} if out == 2 else {"b0", "b1", "b2", "b3"})


def test_without_panic_503_with_retry_after_when_all_checks_fail(routed: Proxy) -> None:
    with backends(2) as both:
        for backend in both:
            backend.health = 500
        policy = {"check": HTTP, "panic": 0}
        routed.admin.put({A: with_policy(*(b.peer() for b in both), **policy)})
        wait_until(lambda: set(routed.admin.live(A).values()) == {"unhealthy"})
        answer = request(routed.http_port)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        both[1].health = 200
        wait_until(lambda: request(routed.http_port).text == "b1")


def test_checks_of_what_is_gone_stop_and_changes_take_effect(routed: Proxy) -> None:
    with backends(2) as (one, two):
        routed.admin.put({A: with_policy(one.peer(), two.peer(), check=HTTP)})
        wait_until(lambda: one.checks and two.checks)
        routed.admin.patch({A: with_policy(one.peer(), check={**HTTP, "path": "/check/new"})})
        wait_until(lambda: one.checks[-1].path == "/check/new")
        seen = len(two.checks)
        before = len(one.checks)
        wait_until(lambda: len(one.checks) >= before + 5)
        assert len(two.checks) <= seen + 1
        routed.admin.patch({A: with_policy(one.peer())})
        wait_until(lambda: "check" not in routed.admin.shown(A)["peers"][0]["live"])
        time.sleep(0.5)  # the plan is made anew
        seen = len(one.checks)
        time.sleep(0.4)
        assert len(one.checks) == seen


def test_a_slow_peer_does_not_delay_the_checks_of_others(routed: Proxy) -> None:
    with backends(1) as (good,), socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        port = mute.getsockname()[1]
        slow = [{"id": f"s{n}", "address": "127.0.0.1", "port": port} for n in range(20)]
        check = {**HTTP, "timeout": 5, "interval": 0.2}
        routed.admin.put(
            {
                "slow": with_policy(*slow, check=check),
                A: with_policy(good.peer(), check={**HTTP, "interval": 0.2}),
            }
        )
        # One after the other, the slow ones alone would take 100 s for a round.
        wait_until(lambda: len(good.checks) >= 10, timeout=30)


class Raw(Backend):
    """Answers with these bytes and, where they are `endless`, with a byte now and then for ever."""

    said: bytes = b""
    endless: bool = False

    async def _answer(self, method: str, path: str, *rest: Any) -> bool:
        writer: asyncio.StreamWriter = rest[-1]
        writer.write(self.said)
        while self.endless:
            await asyncio.sleep(0.02)
            writer.write(b"x")
            await writer.drain()
        return False


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200"])
def test_an_answer_that_never_ends_does_not_keep_a_peer_from_its_next_check(
    routed: Proxy, head: bytes
) -> None:
    """Nor does a byte now and then make an answer of what is none within its time."""
    with Raw("endless") as peer, backends(1) as (good,):
        peer.said, peer.endless = head, True
        routed.admin.put({A: with_policy(peer.peer(), good.peer(), check=HTTP, panic=0)})
        wait_until(lambda: len(peer.checks) >= 4)
        assert state(routed, peer.name) == "up"
        peer.said = b""
        wait_until(lambda: state(routed, peer.name) == "unhealthy")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_comes_before_an_answer_is_not_taken_for_it(routed: Proxy, said: bytes) -> None:
    with Raw("hints") as peer:
        peer.said = said
        routed.admin.put({A: with_policy(peer.peer(), check={**HTTP, "status": "200"}, panic=0)})
        wait_until(lambda: len(peer.checks) >= 5)
        assert check_of(routed, peer.name)["status"] == 200
        assert state(routed, peer.name) == "up"
        peer.said = said.replace(b" 200 ", b" 500 ")
        wait_until(lambda: check_of(routed, peer.name).get("status") == 500)


def test_a_check_speaks_tls_where_its_peers_do(routed: Proxy, tmp_path: Path) -> None:
    authority(tmp_path, "ca")
    certificate(tmp_path, "peer", ca="ca", names="DNS:other.test")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "peer.pem", tmp_path / "peer.key")
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    with Backend("tls", tls=context) as backend:
        routed.admin.put({A: with_policy(backend.peer(), check={**HTTP, "tls": True})})
        wait_until(lambda: check_of(routed, "tls").get("healthy"))
        assert (backend.checks[-1].headers["host"], names[-1]) == ("a.test", "a.test")
        backend.health = 500
        wait_until(lambda: state(routed, "tls") == "unhealthy")
        routed.admin.patch({A: with_policy(backend.peer(), check=HTTP)})
        wait_until(lambda: "answer" in str(check_of(routed, "tls").get("message")))
