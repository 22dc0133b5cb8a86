"""What benchmarks write, count and configure: figures as they were found, each proxy as told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import __main__ as command
from bench import first_answer, processes
from bench.backends import Living
from bench.load import Record, Result
from bench.plot import Bar, bars, lines, number_text
from bench.proxies.base import BenchError, Certificate, Peer, Proxy, Setup
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import Nginx, NginxStatic
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import Traefik, TraefikFast
from bench.report import Section, paragraph, quantiles, spread, table, write
from bench.scenes import common
from bench.scenes.common import ALL, Case, Sample
from bench.scenes.push import since_call
from bench.scenes.steady import parse_wrk
from bench.swarm_change import histogram_rows

HOST = "app.localhost"


# The report


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    file = tmp_path / "benchmarks.md"
    file.write_text("# Benchmarks\nBy hand.\n")
    write(Section("one", "One", "first\n"), file=file)
    write(Section("two", "Two", r"back\slash \1"), file=file)
    write(Section("one", "One", "second"), file=file)
    text = file.read_text()
    assert text.startswith("# Benchmarks\nBy hand.\n")
    assert "first" not in text
    assert text.index("## One") < text.index("second") < text.index("## Two")
    assert r"back\slash \1" in text
    assert text.count("Measured on ") == 2


def test_a_missing_file_is_made(tmp_path):
    file = tmp_path / "benchmarks.md"
    write(Section("one", "One", "text"), file=file)
    assert file.read_text().startswith("# Benchmarks\n")


def test_plots_and_figures_lie_beside_the_text(tmp_path):
    file = tmp_path / "benchmarks.md"
    samples = common.as_data([Sample(Case("nginx", {"rate": 10}), 0, {"p99": 1.5})])
    write(Section("churn", "Churn", "text", plots={"churn": "<svg/>"}, data=samples), file=file)
    assert (tmp_path / "benchmarks" / "churn.svg").read_text() == "<svg/>"
    found = json.loads((tmp_path / "benchmarks" / "churn.json").read_text())
    assert found["scene"] == "churn"
    assert found["machine"].startswith("Measured on ")
    assert found["samples"][0]["case"] == {"proxy": "nginx", "variant": {"rate": 10}}
    assert found["samples"][0]["values"] == {"p99": 1.5}


def test_figures():
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0–3.0)"  # noqa: RUF001
    assert quantiles([float(n) for n in range(1, 101)]) == ["100", "50.0", "99.0", "100.0"]
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert max(len(line) for line in paragraph("word " * 100).splitlines()) <= 100


@pytest.mark.parametrize(
    ("after", "rows"),
    [
        (
            {0.005: 1, 0.025: 5, 0.05: 5, float("inf"): 5},
            [["5", "0", "0.0%"], ["25", "4", "100.0%"]],
        ),
        (
            {0.005: 2, 0.025: 2, 0.05: 3, float("inf"): 5},
            [["5", "1", "25.0%"], ["25", "1", "25.0%"], ["50", "2", "50.0%"]],
        ),
        ({0.005: 1, 0.025: 1, 0.05: 1, float("inf"): 1}, []),
    ],
    ids=["all within 25 ms", "some beyond the last bound", "nothing new"],
)
def test_a_histogram_counts_what_came_between_two_looks(after, rows):
    before = {0.005: 1.0, 0.025: 1.0, 0.05: 1.0, float("inf"): 1.0}
    assert histogram_rows(before, after) == rows


# Plots


def _svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_bars_are_as_long_as_their_values():
    root = _svg(bars("CPU <per> request", "µs", [Bar("a & b", 50, 40, 100), Bar("c", 25, 25, 25)]))
    widths = [
        float(element.get("width", "0"))
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
    ][1:]
    assert widths[0] == pytest.approx(2 * widths[1])
    told = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert told == ["CPU <per> request (µs)", "a & b", "50", "c", "25"]


@pytest.mark.parametrize("series", [{}, {"a": [(1, 0.0)]}, {"a": [(1, 2), (10_000, 900)]}])
def test_lines_are_drawn_whatever_the_values(series):
    circles = _svg(lines("p99", "upstreams", "ms", series)).iter(
        "{http://www.w3.org/2000/svg}circle"
    )
    assert len(list(circles)) == sum(len(points) for points in series.values())


def test_numbers_have_the_digits_that_matter():
    assert [number_text(value) for value in (12345.6, 99.94, 0.1234)] == ["12,346", "99.9", "0.123"]


# Samples


def test_rounds_take_turns_in_an_order_that_rotates():
    seen = []
    cases = [Case("a"), Case("b"), Case("c")]
    common.interleaved(cases, 3, lambda case: seen.append(case.proxy) or {})
    assert "".join(seen) == "abcbcacab"


def test_a_run_that_goes_wrong_voids_its_case_and_no_other():
    def run(case: Case) -> dict[str, float]:
        if case.proxy == "bad":
            raise BenchError("it was answered by another\npeer")
        return {"p99": 2.0}

    cases = [Case("good"), Case("bad")]
    samples = common.interleaved(cases, 2, run)
    found = common.rows(
        cases,
        samples,
        lambda case: [case.proxy],
        lambda own: [common.median(own, "p99"), ""],
        width=2,
    )
    assert found == [
        ["good", "2.0 (2.0–2.0)", ""],  # noqa: RUF001
        ["bad", "failed in 2 of 2 rounds: it was answered by another peer", ""],
    ]


def test_one_void_round_is_enough_to_have_no_number():
    samples = [Sample(Case("a"), 0, {"p99": 1.0}), Sample(Case("a"), 1, error="no peers")]
    assert common.void(samples) == "failed in 1 of 2 rounds: no peers"
    assert common.void([]) == "not measured"


def _result(*records: Record) -> Result:
    zero = dict.fromkeys(("p50_ms", "p99_ms", "p999_ms", "max_ms", "lag_ms_p99", "lag_ms_max"), 0.0)
    return Result(
        requests=len(records),
        failed=0,
        failures={},
        statuses={},
        backends={},
        reconnects=0,
        connections=1,
        started_at=1000.0,
        seconds=1.0,
        records=records,
        **zero,
    )


def test_a_window_counts_by_the_time_due_and_tells_closed_connections_apart():
    result = _result(
        Record(0.9, 500.0, 200, "", "a"),
        Record(1.0, 1.0, 200, "", "a"),
        Record(1.5, 3.0, 200, "", "a"),
        Record(1.6, 9.0, 502, "status", ""),
        Record(1.7, 9.0, 0, "reset", ""),
        Record(1.8, 9.0, 200, "closed", ""),
        Record(2.0, 9.0, 0, "refused", ""),
    )
    found = common.window(result, 1001.0, 1002.0)
    # A connection that closed after a part of the answer cannot be hidden by trying again.
    assert (found.requests, found.failed, found.closed) == (5, 3, 1)
    assert (found.p50, found.p99) == (1.0, 3.0)


def test_a_push_is_told_from_the_call_to_first_and_last():
    result = _result(
        Record(0.0, 1.0, 200, "", "one"),
        Record(0.011, 1.0, 200, "", "one"),
        Record(0.012, 2.0, 200, "", "two"),
        Record(0.030, 1.0, 200, "", "three"),
    )
    calls = [(1000.010, "one", "two"), (1000.030, "two", "three")]
    first, last = since_call(result, calls, 1000.1)
    assert first == [pytest.approx(4.0, abs=0.01), pytest.approx(1.0, abs=0.01)]
    assert last == [pytest.approx(1.0, abs=0.01), 0.0]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([Record(0.0, 1.0, 200, "", "one")], "a new peer had not answered"),
        (
            [Record(0.01, 1.0, 200, "", "two"), Record(0.2, 1.0, 200, "", "one")],
            "an old peer still answered",
        ),
    ],
)
def test_a_push_that_is_not_in_force_is_no_number(records, message):
    with pytest.raises(BenchError, match=message):
        since_call(_result(*records), [(1000.0, "one", "two")], 1000.1)


WRK = """\
Running 3s test @ http://localhost:1/
  Latency Distribution
     50%  512.00us
     99%    {p99}
  {requests} requests in 3.00s, {size} read
Requests/sec:  33333.00
Transfer/sec:      9.53MB
"""


@pytest.mark.parametrize(("p99", "ms"), [("812.00us", 0.812), ("3.50ms", 3.5), ("1.20s", 1200.0)])
def test_wrk_is_read_in_any_unit(p99, ms):
    found = parse_wrk(WRK.format(p99=p99, requests=100_000, size="9.31GB"))
    assert found["p99_ms"] == pytest.approx(ms)
    assert found["rate"] == 33333.0
    assert found["requests"] == 100_000
    # As it was rounded, this may have been so much.
    assert found["bytes"] >= 100_000 * 100_000 * 0.9997


@pytest.mark.parametrize(
    "text", ["Non-2xx or 3xx responses: 4\n", "Socket errors: connect 0, read 3\n", "usage: wrk"]
)
def test_wrk_with_failed_requests_is_no_number(text):
    with pytest.raises(BenchError):
        parse_wrk(text)


# Proxies


def _prepared(proxy: Proxy, home: Path, *, peers: int = 3, **setup: object) -> Proxy:
    routes = {HOST: tuple(Peer(f"b{n}", 10_000 + n) for n in range(peers))}
    proxy.prepare(Setup(home, routes, **setup))
    return proxy


def _certificate(home: Path) -> Certificate:
    return Certificate(home / "tls.crt", home / "tls.key", home / "tls.pem")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.key)
def test_every_proxy_is_told_all_peers_and_its_ports(kind, tmp_path):
    proxy = _prepared(kind(), tmp_path, tls=_certificate(tmp_path))
    text = proxy.configuration()
    if not issubclass(kind, Tidegate):  # its peers are pushed, never configured
        for port in (10_000, 10_001, 10_002):
            assert f"127.0.0.1:{port}" in text
    assert str(proxy.port) in text
    assert str(proxy.tls_port) in text
    assert str(tmp_path / ("tls.pem" if kind is HAProxy else "tls.key")) in text


RETRIES = {
    NginxStatic: ("proxy_next_upstream error timeout;", "proxy_next_upstream off;"),
    HAProxy: ("    retries 3\n", "    retries 0\n"),
    Caddy: ('"retries": 3', '"policy": "round_robin"\n'),
    Traefik: ('"attempts": 3', '"loadBalancer"'),
    Tidegate: ('proxy_next_upstream "error" "timeout";', 'proxy_next_upstream "off";'),
}


@pytest.mark.parametrize("kind", RETRIES, ids=lambda kind: kind.key)
def test_retries_are_as_asked_and_by_default_as_the_proxy_has_them(kind, tmp_path):
    def text(retries: bool | None) -> str:
        proxy = _prepared(kind(), tmp_path, retries=retries)
        found = proxy.configuration()
        # Ports differ from one to the next, and nothing else may.
        ports = {str(proxy.port), str(proxy.admin_port)}
        for port in sorted(ports):
            found = found.replace(port, "PORT")
        return found

    with_retries, without = RETRIES[kind]
    assert with_retries in text(True)
    assert with_retries not in text(False)
    assert without in text(False)
    assert text(None) == text(kind.retries_by_default)


def test_nginx_has_room_for_an_idle_connection_to_each_of_many_peers(tmp_path):
    assert "keepalive 2000;" in _prepared(Nginx(), tmp_path, peers=1000).configuration()


def test_haproxy_checks_few_peers_and_not_thousands(tmp_path):
    few = _prepared(HAProxy(), tmp_path).configuration()
    assert "pool-max-conn 512 pool-purge-delay 60s check inter 1s" in few
    many = _prepared(HAProxy(), tmp_path, peers=1000).configuration()
    assert "pool-max-conn 512 pool-purge-delay 60s\n" in many
    assert "check inter" not in many


def test_only_the_fast_traefik_has_another_throttle(tmp_path):
    assert "throttleduration" not in _prepared(Traefik(), tmp_path).configuration()
    fast = _prepared(TraefikFast(), tmp_path).configuration()
    assert "--providers.providersthrottleduration=50ms" in fast


class RuntimeApi:
    """HAProxy's socket as far as it is used: keeps what it was told, deletes when it may."""

    def __init__(self, path: Path) -> None:
        self.commands: list[str] = []
        self.busy: set[str] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _address = self._listener.accept()
        with connection, connection.makefile("r") as lines_in:
            for line in lines_in:
                command_text = line.strip()
                self.commands.append(command_text)
                connection.sendall(f"{self._answer(command_text)}\n> ".encode())

    def _answer(self, text: str) -> str:
        if text.startswith("add server"):
            return "New server registered.\n"
        if text.startswith("del server"):
            busy = text.split()[-1] in self.busy
            return "Server still has connections attached to it.\n" if busy else "Server deleted.\n"
        return ""


def test_haproxy_puts_peers_in_and_out_and_deletes_them_when_it_can(tmp_path):
    proxy = _prepared(HAProxy(), tmp_path)
    proxy.configuration()
    api = RuntimeApi(tmp_path / "haproxy.sock")
    api.busy.add("u0/b0")
    first, second, _third = proxy.routes[HOST]
    proxy.change(HOST, add=[Peer("n1", 9001)], remove=[first])
    added = "add server u0/n1 127.0.0.1:9001 pool-max-conn 512 pool-purge-delay 60s check"
    assert api.commands[1].startswith(added)
    assert api.commands[2:] == [
        "enable health u0/n1",
        "enable server u0/n1",
        "set server u0/b0 state maint",
        "del server u0/b0",
    ]
    api.busy.clear()
    proxy.change(HOST, remove=[second])
    assert api.commands[-2:] == ["del server u0/b0", "del server u0/b1"]
    proxy.change(HOST, add=[Peer("n2", 9002)])
    assert not api.commands[-1].startswith("del server")
    assert [peer.id for peer in proxy.routes[HOST]] == ["b2", "n1", "n2"]
    proxy.stop()


# Backends, probers, processes


def test_a_backend_answers_its_name_until_it_is_killed(tmp_path):
    backends = Living(tmp_path)
    try:
        one, two = backends.start(), backends.start()
        for peer in (one, two):
            with socket.create_connection(("127.0.0.1", peer.port), 5) as sock:
                message = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
                assert first_answer.ask(sock, message) == (200, peer.id)
                assert first_answer.ask(sock, message) == (200, peer.id)
        backends.kill(one)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", one.port), 5).close()
        found = first_answer.wait(f"http://127.0.0.1:{two.port}/", "x", 1000, 5, {one.id})
        assert found["backend"] == two.id
        assert found["failed"] == 0
    finally:
        backends.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", two.port), 5).close()


def test_a_prober_does_not_take_a_known_backend_for_a_new_one(tmp_path):
    backends = Living(tmp_path)
    try:
        peer = backends.start()
        found = first_answer.wait(f"http://127.0.0.1:{peer.port}/", "x", 1000, 0.05, {peer.id})
        assert found["backend"] == ""
        assert found["requests"] > 0
    finally:
        backends.stop()


def test_cpu_time_is_that_of_the_whole_tree_with_children_that_have_ended():
    burn = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"
    parent = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
        "child.kill()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert sorted(processes.tree([process.pid])) == sorted([process.pid, child])
        assert processes.cpu_seconds([process.pid]) >= 0.1
        assert processes.pss_mb([process.pid]) > processes.memory_mb(child, "Pss") > 0
    finally:
        process.communicate("", timeout=10)
    assert processes.tree([process.pid]) == []
    assert processes.cpu_seconds([process.pid]) == 0.0


# The command line


def test_an_unknown_scene_or_proxy_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["chrun"])
    assert ended.value.code == 2
    assert "chrun" in capsys.readouterr().err
    with pytest.raises(BenchError, match="unknown: envoy"):
        command.chosen_proxies("tidegate,envoy")


def test_a_proxy_that_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(Caddy, "missing", classmethod(lambda _kind: "not installed"))
    monkeypatch.setattr(Tidegate, "missing", classmethod(lambda _kind: ""))
    assert command.chosen_proxies("tidegate,caddy") == ((Tidegate,), ["Caddy (not installed)"])
