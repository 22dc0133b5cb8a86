"""What /metrics says, against what really happened."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import threading

import pytest

from tests.dataplane.harness import (
    Backend,
    Load,
    Proxy,
    free_port,
    generation_of,
    peer,
    request,
    site,
    upstream,
    wait_until,
)

A = "a.test/"


def series(proxy: Proxy, name: str, **labels: str) -> float:
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return proxy.admin.metrics().get(
        f"tidegate_{name}{{{text}}}" if text else f"tidegate_{name}", 0
    )


def test_requests_are_counted_by_method_and_status_class(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    for method, count in (("GET", 5), ("HEAD", 2), ("POST", 3), ("DELETE", 1), ("PROPFIND", 1)):
        for _ in range(count):
            assert request(routed.http_port, method=method).status == 200
    routed.admin.put({A: upstream()})
    request(routed.http_port)

    def counted() -> dict[tuple[str, str], float]:
        return {
            (method, code): value
            for method in ("read", "write", "other")
            for code in ("1xx", "2xx", "3xx", "4xx", "5xx")
            if (value := series(routed, "requests_total", upstream=A, method=method, code=code))
        }

    expected = {("read", "2xx"): 7, ("write", "2xx"): 4, ("other", "2xx"): 1, ("read", "5xx"): 1}
    wait_until(lambda: counted() == expected)
    assert series(routed, "no_peer_total", upstream=A) == 1


def test_counts_add_up_over_workers_that_have_ended(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    with Load(routed.http_port, connections=8) as load:
        wait_until(lambda: load.total >= 500)
        files = site(routed.http_port, {"a.test": {"/": A}, "b.test": {"/": A}})
        assert routed.admin.site(files).status == 200
        wait_until(lambda: load.total >= 1000)
    served = load.results["200"]
    wait_until(
        lambda: series(routed, "requests_total", upstream=A, method="read", code="2xx") == served
    )
    assert series(routed, "request_duration_seconds_count", upstream=A) == served


def test_durations_fall_into_their_buckets(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    request(routed.http_port, "/sleep/0.3")
    request(routed.http_port, "/sleep/0.06")

    def buckets() -> dict[str, float]:
        pattern = re.compile(
            r'tidegate_request_duration_seconds_bucket\{upstream="a.test/",le="(.*)"\}'
        )
        found = ((pattern.fullmatch(name), value) for name, value in routed.admin.metrics().items())
        return {match[1]: value for match, value in found if match}

    wait_until(lambda: buckets().get("+Inf") == 2)
    assert buckets() == {
        "0.005": 0, "0.01": 0, "0.025": 0, "0.05": 0, "0.1": 1, "0.25": 1, "0.5": 2, "1": 2,
        "2.5": 2, "5": 2, "10": 2, "+Inf": 2,
    }  # fmt: skip
    total = series(routed, "request_duration_seconds_sum", upstream=A)
    assert total == pytest.approx(0.36, abs=0.1)


def test_requests_under_way_are_seen(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    threads = [
        threading.Thread(target=request, args=(routed.http_port, "/sleep/2.5")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: series(routed, "requests_in_flight", upstream=A) == 3)
    for thread in threads:
        thread.join()
    wait_until(lambda: series(routed, "requests_in_flight", upstream=A) == 0)


def test_a_killed_worker_leaves_nothing_in_flight(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})

    def ask() -> None:
        with pytest.raises(OSError, match=r"."):
            request(routed.http_port, "/sleep/20")

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: series(routed, "requests_in_flight", upstream=A) == 1)
    for pid in routed.workers():
        os.kill(pid, signal.SIGKILL)
    thread.join()
    wait_until(lambda: series(routed, "requests_in_flight", upstream=A) == 0, timeout=15)


def test_failed_connects_and_retries_are_counted_once_each(routed: Proxy, backend: Backend) -> None:
    dead = [peer(free_port(), id=f"dead{n}") for n in range(2)]
    routed.admin.put({A: upstream(backend.peer(), *dead)})
    for _ in range(12):
        assert request(routed.http_port).status == 200
    failures = 'tidegate_upstream_connect_failures_total{upstream="a.test/"}'
    retries = 'tidegate_upstream_retries_total{upstream="a.test/"}'

    def agreed() -> float:
        seen = routed.admin.metrics()
        return seen.get(failures, 0) if seen.get(failures) == seen.get(retries) else 0

    # Per worker and dead peer, and once more after a second.
    assert 2 <= wait_until(agreed) <= 2 * 2 * 2


def test_peers_by_state(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer(), peer(81, id="d", state="draining"))})
    routed.admin.patch(
        {
            A: upstream(
                backend.peer(),
                peer(81, id="d", state="draining"),
                peer(free_port(), id="p"),
                peer(82, id="z", weight=0),
            )
        }
    )
    for state in ("up", "draining", "probing", "idle"):
        assert series(routed, "peers", upstream=A, state=state) == 1


def test_series_of_removed_upstreams_vanish(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer()), 'odd"na\\me': upstream()})
    request(routed.http_port)
    wait_until(lambda: series(routed, "request_duration_seconds_count", upstream=A) == 1)
    assert 'upstream="odd\\"na\\\\me"' in routed.admin.call("GET", "/metrics").text
    routed.admin.patch(remove=[A, 'odd"na\\me'])
    assert not [name for name in routed.admin.metrics() if A in name or "odd" in name]
    routed.admin.patch({A: upstream(backend.peer())})
    assert series(routed, "request_duration_seconds_count", upstream=A) == 0


def test_the_state_of_the_instance(routed: Proxy) -> None:
    routed.admin.put({A: upstream(peer(81))})
    files = site(routed.http_port, {"a.test": {"/": A}})
    routed.admin.site({**files, "bad.conf": "evil;"})
    assert series(routed, "membership_revision") == 1
    assert series(routed, "membership_upstreams") == 1
    assert series(routed, "site_generation_info", generation=generation_of(files)) == 1
    assert series(routed, "site_changes_total") == 1
    assert series(routed, "site_refusals_total") == 1
    assert series(routed, "workers") == 2
    assert series(routed, "last_push_timestamp_seconds") > 1.6e9
    capacity = series(routed, "shared_dict_capacity_bytes", dict="membership")
    assert capacity == 64 << 20
    assert 0 < series(routed, "shared_dict_free_bytes", dict="membership") < capacity
    assert series(routed, "nginx_connections", state="active") >= 1
    wait_until(lambda: series(routed, "membership_persisted_revision") == 1)


def test_the_text_is_well_formed(routed: Proxy, backend: Backend) -> None:
    routed.admin.put({A: upstream(backend.peer())})
    request(routed.http_port)
    wait_until(lambda: series(routed, "request_duration_seconds_count", upstream=A) == 1)
    line = re.compile(
        r'# (HELP|TYPE) tidegate_\w+ .+|tidegate_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [\d.e+-]+'
    )
    text = routed.admin.call("GET", "/metrics").text
    assert [x for x in text.splitlines() if not line.fullmatch(x)] == []
    typed = re.findall(r"# TYPE (\w+) ", text)
    assert len(typed) == len(set(typed))


def test_a_long_text_is_sent_as_it_is_made_and_in_order(routed: Proxy, backend: Backend) -> None:
    """No worker holds all of it, which for ten thousand upstreams is many MB."""
    names = [f"h{number}.test/" for number in range(3000)]
    routed.admin.put({name: upstream(backend.peer()) for name in [A, *names]})
    request(routed.http_port)
    head, sizes, body = b"", [], b""
    with socket.create_connection(("127.0.0.1", routed.admin.port), timeout=30) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")
        stream = connection.makefile("rb")
        while (line := stream.readline()) != b"\r\n":
            head += line
        while size := int(stream.readline(), 16):
            body += stream.read(size)
            sizes.append(size)
            assert stream.readline() == b"\r\n"
    assert b"chunked" in head
    assert max(sizes) < 100_000
    lines = body.decode().splitlines()
    assert sum(line.startswith("tidegate_peers{") for line in lines) == 1 + len(names)
    families = [
        re.match(r"(?:# HELP )?(tidegate_\w+?)(_bucket|_sum|_count)?[ {]", x)
        for x in lines
        if not x.startswith("# TYPE ")
    ]
    order = [found[1] for found in families if found]
    assert len([name for name, _ in itertools.groupby(order)]) == len(set(order))


def test_admin_calls_are_not_traffic(proxy: Proxy) -> None:
    for _ in range(5):
        proxy.admin.status()
    assert not [name for name in proxy.admin.metrics() if "requests_total" in name]
