"""Site changes: tested, switched, confirmed, and taken back where they do not work."""

from __future__ import annotations

import os
import re
import socket
import subprocess
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
    free_port,
    generation_of,
    request,
    site,
    upstream,
    wait_until,
)

A = "a.test/"
HOSTS = {"a.test": {"/": A}}


@pytest.fixture
def serving(routed: Proxy, backend: Backend) -> Proxy:
    routed.admin.put({A: upstream(backend.peer())})
    assert request(routed.http_port).text == "b0"
    wait_until(lambda: len(routed.workers()) == 2, what="the old workers have ended")
    return routed


def assert_unharmed(proxy: Proxy, workers: set[int]) -> None:
    assert proxy.admin.status()["generation"] == generation_of(site(proxy.http_port, HOSTS))
    assert request(proxy.http_port).text == "b0"
    assert proxy.workers() == workers
    assert not list(proxy.state_dir.glob("site/*.staging"))
    current = os.readlink(proxy.state_dir / "site" / "current")
    assert current == proxy.admin.status()["generation"]


def test_the_site_that_runs_can_be_read_back(proxy: Proxy) -> None:
    assert proxy.admin.call("GET", "/v1/site").json() == {"generation": "", "files": {}}
    files = site(proxy.http_port, HOSTS)
    proxy.admin.site(files)
    read = proxy.admin.call("GET", "/v1/site").json()
    assert read == {"generation": generation_of(files), "files": files}


def test_a_site_is_confirmed_by_a_new_worker(serving: Proxy) -> None:
    old = serving.workers()
    files = site(serving.http_port, {**HOSTS, "b.test": {"/": A}})
    answer = serving.admin.site(files)
    assert (answer.status, answer.json()) == (
        200,
        {"generation": generation_of(files), "reloaded": True},
    )
    for _ in range(10):
        assert request(serving.http_port, host="b.test").text == "b0"
    wait_until(lambda: not old & serving.workers())


def test_the_generation_that_runs_is_not_loaded_again(serving: Proxy) -> None:
    workers = serving.workers()
    answer = serving.admin.site(site(serving.http_port, HOSTS))
    assert (answer.status, answer.json()["reloaded"]) == (200, False)
    assert serving.workers() == workers


def test_the_site_that_runs_can_be_read(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy()
    proxy.start()
    assert proxy.admin.call("GET", "/v1/site").json() == {"generation": "", "files": {}}
    files = site(proxy.http_port, HOSTS)
    assert proxy.admin.site(files).status == 200
    running = {"generation": generation_of(files), "files": files}
    assert proxy.admin.call("GET", "/v1/site").json() == running
    assert proxy.admin.site({**files, "bad.conf": "evil;"}).status == 422
    assert proxy.admin.call("GET", "/v1/site").json() == running


def test_a_membership_change_is_no_reload(serving: Proxy, backend: Backend) -> None:
    workers, generation = serving.workers(), serving.admin.status()["generation"]
    for n in range(50):
        serving.admin.patch({A: upstream(backend.peer(id=str(n))), f"u{n}": upstream()})
    assert (serving.workers(), serving.admin.status()["generation"]) == (workers, generation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server {\n    evil;\n}\n", 'unknown directive "evil"'),
        ("server {\n    listen 127.0.0.1:99999;\n}\n", "invalid port"),
    ],
)
def test_nginx_names_file_and_line(serving: Proxy, text: str, message: str) -> None:
    workers = serving.workers()
    answer = serving.admin.site({**site(serving.http_port, HOSTS), "bad.example.conf": text})
    body = answer.json()
    assert (answer.status, body["error"], body["stage"]) == (422, "site_refused", "test")
    assert (body["file"], body["line"]) == ("bad.example.conf", 2)
    assert message in body["message"]
    assert str(serving.directory) not in body["message"]
    assert_unharmed(serving, workers)


def test_a_missing_certificate_names_the_file_that_wants_it(serving: Proxy) -> None:
    workers = serving.workers()
    text = (
        f"server {{\n listen {free_port()} ssl;\n ssl_certificate /nowhere/x.pem;\n"
        " ssl_certificate_key /nowhere/x.key;\n}\n"
    )
    body = serving.admin.site({**site(serving.http_port, HOSTS), "tls.conf": text}).json()
    assert (body["stage"], body["file"], body["line"]) == ("test", "tls.conf", 3)
    assert "/nowhere/x.pem" in body["message"]
    assert_unharmed(serving, workers)


def test_a_port_that_is_taken_is_found_after_the_test_and_rolled_back(serving: Proxy) -> None:
    """`nginx -t` passes here; only the reload fails."""
    workers = serving.workers()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = f"server {{ listen 127.0.0.1:{port}; return 204; }}"
        with Load(serving.http_port, connections=2) as load:
            answer = serving.admin.site({**site(serving.http_port, HOSTS), "port.conf": text})
        body = answer.json()
        assert (answer.status, body["error"], body["stage"]) == (422, "site_refused", "reload")
        assert f"127.0.0.1:{port}" in body["message"]
        assert "Address already in use" in body["message"]
        assert load.failed == {}
        assert_unharmed(serving, workers)
    assert serving.admin.site({**site(serving.http_port, HOSTS), "port.conf": text}).status == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"generation": "A" * 64}, "generation"),
        ({"generation": "a" * 63}, "generation"),
        ({"generation": "../../../" + "a" * 55}, "generation"),
        ({"generation": None}, "generation"),
        ({"files": None}, "files"),
        ({"files": {"../x.conf": ""}}, "files"),
        ({"files": {"/etc/x.conf": ""}}, "files"),
        ({"files": {"a/b.conf": ""}}, "files"),
        ({"files": {".conf": ""}}, "files"),
        ({"files": {"x.txt": ""}}, "files"),
        ({"files": {"X.conf": ""}}, "files"),
        ({"files": {"x\n.conf": ""}}, "files"),
        ({"files": {"a" * 251 + ".conf": ""}}, "files"),
        ({"files": {"x.conf": 7}}, "files.x.conf"),
        ({"files": {"x.conf": "a\0b"}}, "files.x.conf"),
    ],
)
def test_the_frame_of_a_site_is_checked(
    proxy: Proxy, change: dict[str, object], field: str
) -> None:
    body = {"writer": "test", "generation": "a" * 64, "files": {}, **change}
    answer = proxy.admin.call("PUT", "/v1/site", body)
    assert (answer.status, answer.json()["error"]) == (422, "invalid")
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert sorted(os.listdir(proxy.state_dir / "site")) == ["builtin", "current"]


def test_one_site_change_at_a_time(serving: Proxy) -> None:
    answers: Counter[str] = Counter()

    def push(n: int) -> None:
        answer = serving.admin.site(site(serving.http_port, {**HOSTS, f"h{n}.test": {"/": A}}))
        answers[str(answer.status) + str(answer.json().get("error", ""))] += 1
        if answer.status == 503:
            assert int(answer.headers["retry-after"]) >= 1

    threads = [threading.Thread(target=push, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {"200", "503busy"}
    assert request(serving.http_port).text == "b0"


def test_many_site_changes_leave_two_directories_and_no_failed_request(serving: Proxy) -> None:
    with Load(serving.http_port, connections=4, keep_alive=False) as load:
        for n in range(5):
            files = site(serving.http_port, {**HOSTS, f"h{n}.test": {"/": A}})
            assert serving.admin.site(files).json()["reloaded"] is True
    assert load.failed == {}
    generation = generation_of(files)

    def kept() -> bool:
        return sum(len(name) == 64 for name in os.listdir(serving.state_dir / "site")) == 2

    wait_until(kept)
    assert os.readlink(serving.state_dir / "site" / "current") == generation
    wait_until(lambda: len(serving.workers()) == 2)


def test_going_back_to_the_site_before_works(serving: Proxy) -> None:
    first = site(serving.http_port, HOSTS)
    second = site(serving.http_port, {"b.test": {"/": A}})
    for files, host in ((second, "b.test"), (first, "a.test"), (second, "b.test")):
        assert serving.admin.site(files).json() == {
            "generation": generation_of(files),
            "reloaded": True,
        }
        assert request(serving.http_port, host=host).text == "b0"


def test_a_thousand_hosts(serving: Proxy) -> None:
    files = site(serving.http_port, {**HOSTS, **{f"h{n}.test": {"/": A} for n in range(1000)}})
    assert serving.admin.site(files).status == 200
    assert request(serving.http_port, host="h999.test").text == "b0"


def test_other_requests_of_the_worker_do_not_wait_for_the_test(
    make_proxy: Callable[..., Proxy], backend: Backend
) -> None:
    proxy = make_proxy(workers=1)
    proxy.start()
    proxy.admin.site(site(proxy.http_port, HOSTS))
    proxy.admin.put({A: upstream(backend.peer())})
    files = site(proxy.http_port, {**HOSTS, **{f"h{n}.test": {"/": A} for n in range(1000)}})
    slowest, done, begun = 0.0, threading.Event(), time.monotonic()

    def push() -> None:
        proxy.admin.site(files)
        done.set()

    thread = threading.Thread(target=push)
    thread.start()
    while not done.is_set():
        started = time.monotonic()
        assert request(proxy.http_port).text == "b0"
        slowest = max(slowest, time.monotonic() - started)
    thread.join()
    # Reading and writing a thousand files takes a moment, nginx -t and the reload much longer.
    assert slowest < max(0.3, (time.monotonic() - begun) / 3)


def test_the_sites_own_retry_setting_counts(proxy: Proxy) -> None:
    """Our default for $tidegate_retry gives way to the site's."""
    proxy.admin.site(site(proxy.http_port, HOSTS, retries="off"))
    with Backend("b") as backend:
        proxy.admin.put({A: upstream(backend.peer(), hold=5)})
        wait_until(lambda: proxy.admin.live(A) == {"b": "up"})
        assert request(proxy.http_port, "/reset").status == 502
        assert len(backend.requests) == 1


def test_a_stored_site_that_does_not_load_any_more_gives_way_to_the_one_before(
    serving: Proxy, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "x.key", tmp_path / "x.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    text = (
        f"server {{ listen {free_port()} ssl; ssl_certificate {certificate};"
        f" ssl_certificate_key {key}; }}"
    )
    assert serving.admin.site({**site(serving.http_port, HOSTS), "tls.conf": text}).status == 200
    serving.stop()
    certificate.unlink()
    serving.start()
    assert request(serving.http_port).text == "b0"
    assert "does not load" in serving.output
    assert serving.admin.status()["generation"] == generation_of(site(serving.http_port, HOSTS))


def test_no_template_mark_is_left(proxy: Proxy) -> None:
    directives = [
        line
        for line in (proxy.run_dir / "nginx.conf").read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    assert not [line for line in directives if re.search("@[A-Z_]+@", line)]
