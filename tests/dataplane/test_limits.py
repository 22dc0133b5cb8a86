"""Connections per worker and the number of workers, as a site sets them, and without."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
from collections.abc import Callable

import pytest

from tests.dataplane.harness import (
    Backend,
    Load,
    Proxy,
    free_port,
    generation_of,
    request,
    site,
    upstream,
    wait_until,
)

A = "a.test/"
HOSTS = {"a.test": {"/": A}}
CONNECTIONS, WORKERS = "00-default.events", "00-default.main"
LEAST = {CONNECTIONS: "worker_connections 128;\n"}


def push(proxy: Proxy, more: dict[str, str]) -> None:
    answer = proxy.admin.site({**site(proxy.http_port, HOSTS), **more})
    assert (answer.status, answer.json().get("reloaded")) == (200, True), answer.text


def settle(proxy: Proxy, workers: int) -> None:
    wait_until(lambda: len(proxy.workers()) == workers, what="old workers gone")


def begin_request(proxy: Proxy, stack: contextlib.ExitStack) -> socket.socket:
    client = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.http_port)))
    client.settimeout(30)
    with contextlib.suppress(ConnectionError):
        client.sendall(b"GET / HTTP/1.1\r\nHost: nobody.test\r\nConnection: close\r\n")
    return client


def connections_when_out_of_them(proxy: Proxy) -> int:
    """How many nginx says a worker has, when ever more clients begin requests and end none."""
    before = len(proxy.output)
    with contextlib.ExitStack() as stack:

        def said() -> str:
            begin_request(proxy, stack)
            found = re.search(r"(\d+) worker_connections are not enough", proxy.output[before:])
            return found[1] if found else ""

        return int(wait_until(said, what="no connection is left"))


def many_are_served(proxy: Proxy) -> bool:
    """Whether 300 clients can begin a request each before the first one ends its own."""
    with contextlib.ExitStack() as stack:
        clients = [begin_request(proxy, stack) for _ in range(300)]
        for client in clients:
            client.sendall(b"\r\n")
        return all(client.recv(12) == b"HTTP/1.1 503" for client in clients)


@pytest.fixture
def single(make_proxy: Callable[..., Proxy]) -> Proxy:
    """One worker, so that what it can take is what there is."""
    proxy = make_proxy(workers=1)
    proxy.start()
    return proxy


def test_a_sites_limit_is_felt_and_the_environments_comes_back_without_it(single: Proxy) -> None:
    push(single, LEAST)
    settle(single, 1)
    assert connections_when_out_of_them(single) == 128
    push(single, {})
    settle(single, 1)
    assert many_are_served(single)


def test_limits_are_files_of_the_site_only_where_it_sets_them(single: Proxy) -> None:
    for more in ({}, LEAST, {WORKERS: "worker_processes auto;\n"}, {}):
        push(single, more)
        files = {**site(single.http_port, HOSTS), **more}
        read = single.admin.call("GET", "/v1/site").json()
        assert read == {"generation": generation_of(files), "files": files}


def test_a_restart_keeps_what_the_site_sets(single: Proxy) -> None:
    push(single, {**LEAST, WORKERS: "worker_processes 2;\n"})
    single.stop()
    single.env["TIDEGATE_WORKER_CONNECTIONS"] = "4096"
    single.start()
    assert single.admin.status()["workers"] == len(single.workers()) == 2
    assert connections_when_out_of_them(single) == 128


def test_a_restart_takes_the_environments_new_values_where_the_site_sets_none(
    single: Proxy,
) -> None:
    push(single, LEAST)
    push(single, {})
    single.stop()
    single.env |= {"TIDEGATE_WORKER_CONNECTIONS": "200", "TIDEGATE_WORKERS": "1"}
    single.start()
    assert connections_when_out_of_them(single) == 200
    single.stop()
    single.env |= {"TIDEGATE_WORKER_CONNECTIONS": "4096", "TIDEGATE_WORKERS": "2"}
    single.start()
    assert many_are_served(single)
    assert len(single.workers()) == 2


def test_a_stored_site_of_a_version_without_such_files_is_served(single: Proxy) -> None:
    push(single, {})
    single.stop()
    directory = single.state_dir / "site" / os.readlink(single.state_dir / "site" / "current")
    for name in (CONNECTIONS, WORKERS):
        (directory / name).unlink()
    single.start()
    assert single.admin.status()["generation"] == directory.name
    assert many_are_served(single)


def test_workers_come_and_go_with_the_site_and_no_request_fails(
    proxy: Proxy, backend: Backend
) -> None:
    push(proxy, {})
    proxy.admin.put({A: upstream(backend.peer())})
    assert request(proxy.http_port).text == "b0"
    with Load(proxy.http_port, connections=4, keep_alive=False) as load:
        for count in (3, 1, 2):
            push(proxy, {WORKERS: f"worker_processes {count};\n"})
            settle(proxy, count)
            assert proxy.admin.status()["workers"] == count
            before = load.total
            wait_until(lambda before=before: load.total > before + 20, what="requests go on")
        push(proxy, {WORKERS: "worker_processes auto;\n"})
        settle(proxy, os.cpu_count() or 1)
        push(proxy, {})
        settle(proxy, 2)
    assert load.failed == {}


def test_requests_that_wait_for_a_peer_leave_room_for_the_push_that_brings_it(
    single: Proxy,
) -> None:
    """Held requests of all connections would keep everybody out, the agent first."""
    push(single, LEAST)
    settle(single, 1)
    single.admin.put({A: upstream(hold=60)})
    with contextlib.ExitStack() as stack, Backend("b") as late:
        clients = []
        for _ in range(100):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", single.http_port)))
            client.settimeout(30)
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
            clients.append(client)
        # Each takes a second connection to its peer, and the worker has 64 for itself. All others
        # have their answer at once.
        wait_until(lambda: len(select.select(clients, [], [], 0)[0]) == 100 - 32)
        single.admin.put({A: upstream(late.peer(), hold=60)})
        answers = [client.recv(12) for client in clients]
    assert answers.count(b"HTTP/1.1 200") == 32
    assert answers.count(b"HTTP/1.1 503") == 68


def test_too_few_connections_for_the_listeners_are_refused_by_the_name_of_their_file(
    single: Proxy,
) -> None:
    push(single, {})
    settle(single, 1)
    workers = single.workers()
    listens = "".join(f"listen 127.0.0.1:{free_port()};\n" for _ in range(130))
    more = {**LEAST, "many.conf": f"server {{\n{listens}}}\n"}
    answer = single.admin.site({**site(single.http_port, HOSTS), **more})
    body = answer.json()
    assert (answer.status, body["stage"], body["file"]) == (422, "test", CONNECTIONS)
    assert "128 worker_connections are not enough" in body["message"]
    assert single.workers() == workers


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (CONNECTIONS, ""),
        (CONNECTIONS, "worker_connections 127;\n"),
        (CONNECTIONS, "worker_connections 1048577;\n"),
        (CONNECTIONS, "worker_connections 512;"),
        (CONNECTIONS, "worker_connections 512;\nmulti_accept on;\n"),
        (CONNECTIONS, "worker_connections auto;\n"),
        (CONNECTIONS, "worker_connections 0x100;\n"),
        (CONNECTIONS, "use poll;\n"),
        (CONNECTIONS, "include /etc/passwd;\n"),
        (WORKERS, "worker_processes 0;\n"),
        (WORKERS, "worker_processes 129;\n"),
        (WORKERS, "worker_processes autos;\n"),
        (WORKERS, "user root;\n"),
        (WORKERS, "worker_processes 2;\nuser root;\n"),
        ("x.events", "worker_connections 512;\n"),
        ("x.main", "worker_processes 2;\n"),
        ("00-default.eventsx", "worker_connections 512;\n"),
    ],
)
def test_a_file_of_limits_has_its_name_and_its_one_directive(
    proxy: Proxy, name: str, text: str
) -> None:
    answer = proxy.admin.site({name: text})
    assert (answer.status, answer.json()["error"]) == (422, "invalid")
    (fault,) = answer.json()["errors"]
    known = name in (CONNECTIONS, WORKERS)
    assert fault["field"] == (f"files.{name}" if known else "files")
    assert sorted(os.listdir(proxy.state_dir / "site")) == ["builtin", "current"]
