"""The demo's own measuring instruments: what it prints can only be as true as these."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.discovery.base import NullObserver
from agent.discovery.static import StaticSource
from agent.model import InstanceState
from demo.__main__ import Report
from demo.pair import (
    Backend,
    DemoError,
    Pair,
    Peer,
    ReloadWatch,
    Service,
    choose_port,
    count_bursts,
    probe,
    static_file,
    temporary_directory,
    worker_starts,
)

FORKS = """
import os, signal, sys
def workers(n):
    for _ in range(n):
        if os.fork() == 0:
            signal.pause()
workers(2)
print(flush=True)
for line in sys.stdin:
    workers(2)
    print(flush=True)
"""


@pytest.fixture
def backend(tmp_path):
    started = Backend("toy", log=tmp_path / "log")
    yield started
    started.stop()


def test_backend_answers_its_name(backend):
    answer = probe(backend.port, "any.localhost")
    assert (answer.status, answer.backend) == (200, "toy")


def test_backend_ends_politely_with_a_connection_open(backend):
    with socket.create_connection(("127.0.0.1", backend.port)) as idle:
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        idle.sendall(request)
        assert idle.recv(65536).endswith(b"toy\n")
        backend.popen.send_signal(signal.SIGTERM)
        # Sent before the backend could say that it goes: answered, and told not to come again.
        idle.sendall(request)
        assert idle.recv(65536).endswith(b"toy\n")
        assert idle.recv(65536) == b""
    assert backend.stop()
    assert backend.popen.returncode == 0
    assert probe(backend.port, "any.localhost").status == 0


def test_probe_without_an_answer(free_port):
    assert probe(free_port(), "any.localhost").status == 0


def test_static_file_is_what_the_agent_reads(tmp_path):
    peers = (Peer("a", 1001), Peer("b", 1002, draining=True))
    file = tmp_path / "services.toml"
    file.write_text(static_file([Service("app.localhost", peers), Service("new.localhost", ())]))
    snapshot = StaticSource(str(file), observer=NullObserver()).read_once()
    assert snapshot.rejections == ()
    app, new = snapshot.workloads.values()
    assert app.labels == {"interlock.hostname": "app", "interlock.domain": "localhost"}
    assert [(i.id, i.published[0].published, i.state) for i in app.instances] == [
        ("a", 1001, InstanceState.UP),
        ("b", 1002, InstanceState.DRAINING),
    ]
    assert new.instances == ()
    file.write_text(static_file([]))
    assert StaticSource(str(file), observer=NullObserver()).read_once().workloads == {}


def test_a_taken_port_is_replaced_and_told():
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        chosen = choose_port(port, "traffic", said.append)
    assert chosen not in (0, port)
    assert said == [f"port {port} is taken, so traffic gets {chosen}"]


def test_a_free_port_is_taken_as_it_is(free_port):
    said: list[str] = []
    port = free_port()
    assert choose_port(port, "traffic", said.append) == port
    assert said == []


@pytest.mark.parametrize(
    ("times", "count"),
    [([], 0), ([5.0], 1), ([5.0, 5.01, 5.02], 1), ([9.0, 5.0, 5.1, 9.2], 2)],
)
def test_workers_that_start_together_are_one_reload(times, count):
    assert count_bursts(times, within=0.3) == count


def test_reloads_are_counted_by_new_children_of_the_master():
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as master:
        assert master.stdin is not None
        assert master.stdout is not None
        children: set[int] = set()
        try:
            master.stdout.readline()
            watch = ReloadWatch(master.pid)
            for _ in range(2):
                time.sleep(0.5)  # workers of two reloads must not look like those of one
                master.stdin.write("\n")
                master.stdout.readline()
            assert watch.count() == 2
            quiet = ReloadWatch(master.pid)
            assert quiet.count() == 0
        finally:
            children.update(worker_starts(master.pid))
            master.kill()
            for pid in children:
                Path(f"/proc/{pid}").exists() and subprocess.run(["kill", "-9", str(pid)])


def test_a_side_that_does_not_start_is_told_with_its_log(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "nginx").mkdir(parents=True)
    (root / "nginx" / "entrypoint.sh").write_text("echo no such module >&2; exit 7\n")
    monkeypatch.setattr("demo.pair.ROOT", root)
    told = r"(?s)OpenResty has ended with code 7.*no such module"
    with temporary_directory() as directory:
        pair = Pair(directory, say=lambda line: None)
        try:
            with pytest.raises(DemoError, match=told):
                pair.start([])
        finally:
            pair.stop()
    assert not directory.exists()


def test_the_report_is_as_promised_only_if_everything_is():
    def report(**changed: object) -> Report:
        fine: dict[str, object] = {
            "requests": 10,
            "membership_changes": 3,
            "reloads_for_site": 1,
            "routed_ms": [1.0, 2.0, 9.0],
        }
        return Report(**(fine | changed))  # type: ignore[arg-type]

    assert report().promised()
    assert report().as_dict() == {
        "requests": 10,
        "failed": 0,
        "membership_changes": 3,
        "reloads_for_membership": 0,
        "reloads_for_site": 1,
        "change_to_routed_ms": {"p50": 2.0, "p99": 9.0},
    }
    assert not report(failed=1).promised()
    assert not report(reloads_for_membership=1).promised()
    assert not report(reloads_for_site=0).promised()
    assert not report(reloads_for_site=2).promised()
    assert not report(problems=["killed"]).promised()


def test_a_bad_probe_is_a_failed_request():
    report = Report()
    report.add_probe(200)
    report.add_probe(502)
    report.add_probe(0)
    assert (report.requests, report.failed) == (3, 2)
    assert not report.promised()
