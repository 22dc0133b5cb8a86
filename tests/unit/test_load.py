"""The load generator tells the truth: what fails is counted, what does not is not."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.load import LoadProcess, Plan, UsageError, percentile, run

Handler = Callable[[socket.socket, int, int], bool]
"""Called for each request with connection, its number over all, and its number on the connection.
False closes the connection."""


class ToyServer:
    """A threaded HTTP server that does to each request what the test says."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[bytes] = []
        self.connections = 0
        self.body_bytes = 0
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            buffer, count = b"", 0
            while True:
                while b"\r\n\r\n" not in buffer:
                    data = connection.recv(65536)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                size = int(length.group(1)) if length else 0
                while len(buffer) < size:
                    buffer += connection.recv(1 << 20)
                self.body_bytes += size
                buffer = buffer[size:]
                with self._lock:
                    self.requests.append(head)
                    number = len(self.requests) - 1
                if not self.handler(connection, number, count):
                    return
                if b"connection: close" in head.lower():
                    return
                count += 1

    def close(self) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()


def answer(
    connection: socket.socket, body: bytes = b"ok", status: int = 200, head: str = ""
) -> bool:
    text = f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    connection.sendall(text.encode() + body)
    return True


@pytest.fixture
def serve() -> Iterator[Callable[[Handler], ToyServer]]:
    servers: list[ToyServer] = []

    def start(handler: Handler) -> ToyServer:
        servers.append(ToyServer(handler))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("keepalive", [True, False])
def test_all_is_well(serve, keepalive):
    server = serve(lambda c, n, k: answer(c))
    result = run(Plan(urls=(server.url,), rate=200, seconds=0.5, keepalive=keepalive))
    assert result.requests == 100 == len(server.requests)
    assert result.failed == 0
    assert result.statuses == {"200": 100}
    assert result.connections == server.connections == (16 if keepalive else 100)
    assert result.reconnects == 0
    assert 0 < result.p50_ms <= result.p99_ms <= result.p999_ms <= result.max_ms


def test_rate_is_kept_however_slow_the_answers_are(serve):
    server = serve(lambda c, n, k: time.sleep(0.3) or answer(c))
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.5, connections=64))
    assert result.requests == 50
    assert result.failed == 0
    assert result.seconds < 50 * 0.3


def test_latency_counts_from_the_time_due_not_from_the_time_sent(serve):
    """One connection, 50 ms each, a request due every 10 ms: the last one waits for all others."""
    server = serve(lambda c, n, k: time.sleep(0.05) or answer(c))
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.2, connections=1))
    assert result.failed == 0
    assert result.max_ms > 20 * 50 - 200


def test_urls_and_hosts_in_rotation(serve):
    server = serve(lambda c, n, k: answer(c))
    hosts = ("a.localhost", "b.localhost")
    urls = (f"{server.url}x?y=1", f"{server.url}z")
    run(Plan(urls=urls, hosts=hosts, rate=200, seconds=0.2, headers=("X-Own: 1",)))
    lines = [head.decode().split("\r\n")[:3] for head in server.requests]
    for path in ("/x?y=1", "/z"):
        for host in hosts:
            want = [f"GET {path} HTTP/1.1", f"Host: {host}", "X-Own: 1"]
            assert lines.count(want) == 10


def test_backend_by_header(serve):
    server = serve(lambda c, n, k: answer(c, head=f"x-backend: b{n % 2}\r\n"))
    plan = Plan(urls=(server.url,), rate=100, seconds=0.2, backend_header="X-Backend")
    assert run(plan).backends == {"b0": 10, "b1": 10}


def test_backend_by_json(serve):
    server = serve(lambda c, n, k: answer(c, json.dumps({"hostname": "web"}).encode()))
    plan = Plan(urls=(server.url,), rate=100, seconds=0.2, backend_json="hostname")
    assert run(plan).backends == {"web": 20}


def test_bad_gateway_is_a_failure_and_is_told(serve):
    server = serve(lambda c, n, k: answer(c, b"<h1>down</h1>", 502 if n == 7 else 200))
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.2, connections=1))
    assert result.failed == 1
    assert result.failures == {"status": 1}
    assert result.statuses == {"200": 19, "502": 1}
    [failure] = result.details
    assert failure.kind == "status"
    assert failure.status == 502
    assert failure.detail == "<h1>down</h1>"
    assert failure.offset == pytest.approx(0.07)
    assert failure.reused


def test_expected_status_is_what_counts(serve):
    server = serve(lambda c, n, k: answer(c, status=308 if n % 2 else 200))
    plan = Plan(urls=(server.url,), rate=100, seconds=0.2, expect=(308,))
    assert run(plan).failures == {"status": 10}


def test_details_are_limited_but_counts_are_not(serve):
    server = serve(lambda c, n, k: answer(c, status=503))
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.5, details=3))
    assert result.failed == 50
    assert len(result.details) == 3


def test_refused(free_port):
    result = run(Plan(urls=(f"http://127.0.0.1:{free_port()}/",), rate=100, seconds=0.2))
    assert result.requests == result.failed == 20
    assert result.failures == {"refused": 20}
    assert result.p99_ms == 0


def test_close_without_an_answer_is_a_failure(serve):
    server = serve(lambda c, n, k: False)
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.2))
    assert result.failures == {"closed": 20}
    assert result.reconnects == 0


def test_close_on_a_reused_connection_after_the_request_was_sent_is_a_failure_too(serve):
    server = serve(lambda c, n, k: k == 0 and answer(c))
    result = run(Plan(urls=(server.url,), rate=50, seconds=0.2, connections=1))
    assert result.failures == {"closed": 5}
    assert all(failure.reused for failure in result.details)
    assert result.reconnects == 0


def last_answer(connection: socket.socket, *, after: float = 0) -> bool:
    """The answer and the end of the connection in one segment: no request comes between them."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    time.sleep(after)
    answer(connection)
    return False


def test_close_of_an_idle_connection_is_a_reconnect_and_no_failure(serve):
    server = serve(lambda c, n, k: last_answer(c))
    result = run(Plan(urls=(server.url,), rate=50, seconds=0.4, connections=1))
    assert result.failed == 0
    # The last one may be noticed or not before the run ends.
    assert 19 <= result.reconnects <= 20
    assert result.connections == 20


def test_closed_before_a_waiting_request_was_sent_is_a_reconnect_too(serve):
    server = serve(lambda c, n, k: last_answer(c, after=0.05))
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.2, connections=1))
    assert result.failed == 0
    assert 19 <= result.reconnects <= 20
    assert result.connections == 20


def test_connection_close_header_is_neither(serve):
    server = serve(lambda c, n, k: answer(c, head="Connection: close\r\n") and False)
    result = run(Plan(urls=(server.url,), rate=50, seconds=0.4, connections=1))
    assert result.failed == result.reconnects == 0
    assert result.connections == 20


def test_reset_is_a_failure(serve):
    def reset(connection: socket.socket, number: int, count: int) -> bool:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    server = serve(reset)
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.2))
    assert result.failures == {"reset": 20}


def test_half_an_answer_is_a_failure(serve):
    def half(connection: socket.socket, number: int, count: int) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        return False

    server = serve(half)
    result = run(Plan(urls=(server.url,), rate=100, seconds=0.2))
    assert result.failures == {"closed": 20}
    assert result.details[0].status == 200
    assert "part of the answer" in result.details[0].detail


def test_an_unfinished_chunked_answer_is_a_failure(serve):
    def unfinished(connection: socket.socket, number: int, count: int) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        return False

    server = serve(unfinished)
    assert run(Plan(urls=(server.url,), rate=100, seconds=0.1)).failures == {"closed": 10}


def test_no_http_at_all_is_a_failure(serve):
    def gibberish(connection: socket.socket, number: int, count: int) -> bool:
        connection.sendall(b"SSH-2.0-toy\r\n\r\n")
        return False

    server = serve(gibberish)
    assert run(Plan(urls=(server.url,), rate=100, seconds=0.1)).failures == {"bad_response": 10}


def test_too_slow_is_a_failure(serve):
    server = serve(lambda c, n, k: time.sleep(5 if n == 3 else 0) or answer(c))
    result = run(Plan(urls=(server.url,), rate=50, seconds=0.4, timeout=1.5, keepalive=False))
    assert result.failures == {"timeout": 1}
    assert result.requests == 20
    assert result.max_ms < 5000


def test_waiting_for_a_connection_of_the_pool_can_time_out(serve):
    server = serve(lambda c, n, k: time.sleep(20) or answer(c))
    plan = Plan(urls=(server.url,), rate=50, seconds=0.2, timeout=0.3, connections=2)
    result = run(plan)
    assert result.failures == {"timeout": 10}
    assert result.requests == 10


@pytest.mark.parametrize("split", [1, 7])
def test_answers_that_come_in_pieces(serve, split):
    def pieces(connection: socket.socket, number: int, count: int) -> bool:
        body = b'4;x=y\r\n{"ho\r\n6\r\nst":1}\r\n0\r\n\r\n'
        text = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        for start in range(0, len(text + body), split):
            connection.sendall((text + body)[start : start + split])
        return True

    server = serve(pieces)
    plan = Plan(urls=(server.url,), rate=50, seconds=0.2, connections=2, backend_json="host")
    result = run(plan)
    assert result.failed == 0
    assert result.backends == {"1": 10}
    assert result.connections == 2


def test_an_answer_that_ends_with_the_connection(serve):
    def until_close(connection: socket.socket, number: int, count: int) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        return False

    server = serve(until_close)
    result = run(Plan(urls=(server.url,), rate=50, seconds=0.2))
    assert result.failed == result.reconnects == 0


def test_large_bodies_both_ways(serve):
    server = serve(lambda c, n, k: answer(c, b"y" * 3_000_000))
    plan = Plan(
        urls=(server.url,), rate=20, seconds=0.4, method="POST", body_bytes=3_000_000, connections=2
    )
    result = run(plan)
    assert result.failed == 0
    assert result.requests == 8
    assert result.connections == 2
    assert server.body_bytes == 8 * 3_000_000


def test_records_tell_every_request(serve):
    server = serve(lambda c, n, k: answer(c, status=500 if n == 2 else 200))
    plan = Plan(urls=(server.url,), rate=50, seconds=0.1, connections=1, keep_records=True)
    records = run(plan).records
    assert [record.due for record in records] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert [record.status for record in records] == [200, 200, 500, 200, 200]
    assert [record.kind for record in records] == ["", "", "status", "", ""]


def test_percentile_takes_the_nearest_rank():
    values = [float(n) for n in range(1, 1001)]
    assert percentile(values, 0.5) == 500
    assert percentile(values, 0.99) == 990
    assert percentile(values, 0.999) == 999
    assert percentile(values, 1.0) == 1000
    assert percentile([7.0], 0.5) == 7.0


@pytest.mark.parametrize("url", ["https://x/", "ftp://x/", "nonsense", "http://no.such.invalid/"])
def test_a_url_that_cannot_be_loaded_is_named(url):
    with pytest.raises(UsageError, match=url):
        run(Plan(urls=(url,), seconds=0.1))


def test_process_runs_until_it_is_stopped_and_answers_under_way_are_waited_for(serve):
    server = serve(lambda c, n, k: time.sleep(0.2) or answer(c, head="X-Backend: toy\r\n"))
    plan = Plan(
        urls=(server.url,),
        hosts=("a.localhost",),
        rate=100,
        connections=64,
        backend_header="X-Backend",
    )
    with LoadProcess(plan) as load:
        result = load.stop()
    assert result.failed == 0
    assert result.requests == len(server.requests) > 0
    assert result.backends == {"toy": result.requests}


def test_process_reports_failures(serve):
    server = serve(lambda c, n, k: answer(c, b"no", 502 if n % 2 else 200))
    with LoadProcess(Plan(urls=(server.url,), rate=100, seconds=0.2)) as load:
        result = load.wait(timeout=20)
    assert result.failures == {"status": 10}
    assert result.details[0].status == 502


def test_process_hands_over_its_records(serve):
    server = serve(lambda c, n, k: answer(c))
    plan = Plan(urls=(server.url,), rate=50, seconds=0.1, keep_records=True)
    with LoadProcess(plan) as load:
        result = load.wait(timeout=20)
    assert [record.status for record in result.records] == [200] * 5


def test_process_ends_with_whoever_started_it(serve):
    server = serve(lambda c, n, k: answer(c))
    script = (
        "import os, sys\n"
        "from bench.load import LoadProcess, Plan\n"
        f"load = LoadProcess(Plan(urls=({server.url!r},))).start()\n"
        "print(load.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    proc = Path(f"/proc/{int(done.stdout)}")
    end = time.monotonic() + 10
    while proc.exists() and "\nState:\tZ" not in (proc / "status").read_text():
        assert time.monotonic() < end, "the load runs on without its parent"
        time.sleep(0.02)


def test_process_that_cannot_start_says_why():
    with pytest.raises(RuntimeError, match="cannot resolve"):
        LoadProcess(Plan(urls=("http://no.such.invalid/",))).start()


def test_command_line_stops_on_a_file_and_writes_records(serve, tmp_path):
    server = serve(lambda c, n, k: answer(c))
    stop, records = tmp_path / "stop", tmp_path / "records"
    command = [sys.executable, "-m", "bench.load", "--url", server.url, "--rate", "50"]
    command += ["--stop-file", str(stop), "--records", str(records)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as p:
        assert p.stderr is not None
        assert p.stdout is not None
        assert p.stderr.readline() == b"load: under way\n"
        stop.touch()
        assert b" 0 failed" in p.stdout.readline()
        assert p.wait(20) == 0
    assert len(records.read_text().splitlines()) == len(server.requests) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_exit_code_and_result_after_a_signal(serve, number):
    server = serve(lambda c, n, k: answer(c, status=500))
    script = Path(__file__).parents[2] / "bench" / "load.py"
    command = [sys.executable, str(script), "--url", server.url, "--json"]
    # A signal that is blocked here would be blocked there too, and never end it.
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
            assert p.stderr is not None
            p.stderr.readline()
            p.send_signal(number)
            printed = json.loads(p.communicate(timeout=20)[0])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert p.returncode == 1
    assert printed["requests"] == printed["failed"] == len(server.requests)
