"""A change of hosts, the one thing for which Tidegate reloads: with 1, 100 and 1,000 hosts.

One host more is served. Meanwhile requests for it come on new connections: the first that is
answered tells when some worker has it, the last that is not when all have. Idle client connections
that stand open before are looked at afterwards.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from bench import processes
from bench.backends import Standing
from bench.load import LoadProcess, Plan
from bench.proxies.base import BenchError, Peer, Proxy, Setup, free_port
from bench.proxies.caddy import Caddy
from bench.proxies.haproxy import HAProxy
from bench.proxies.nginx import Nginx
from bench.proxies.tidegate import Tidegate
from bench.proxies.traefik import TraefikFast
from bench.report import Section, paragraph, table
from bench.scenes.common import (
    Case,
    Options,
    Sample,
    answered_at,
    as_data,
    attempt,
    directory,
    interleaved,
    median,
    middle,
    place,
    rows,
    say,
    values,
)

SIZES = (1, 100, 1_000)
IDLE = 20
RATE = 400.0
FIRST = "h0.localhost"


@contextlib.contextmanager
def _idle_connections(port: int) -> Iterator[list[socket.socket]]:
    """Client connections that have had an answer and stand open."""
    with ExitStack() as stack:
        found = []
        for _ in range(IDLE):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {FIRST}\r\n\r\n".encode())
            if not sock.recv(65536).startswith(b"HTTP/1.1 200"):
                raise BenchError("a client connection was not answered before the reload")
            found.append(sock)
        yield found


def _closed(connections: list[socket.socket]) -> int:
    count = 0
    for sock in connections:
        sock.setblocking(False)
        try:
            while sock.recv(65536):
                pass
            count += 1
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


def _reload(proxy: Proxy, peer: Peer) -> Mapping[str, Any]:
    """Add a host, and see how it goes."""
    host = f"new{len(proxy.routes)}.localhost"
    plan = Plan(
        urls=(f"http://127.0.0.1:{proxy.port}/",),
        hosts=(host,),
        rate=RATE,
        keepalive=False,
        backend_header="X-Backend",
        keep_records=True,
    )
    before = processes.pss_mb(proxy.roots())
    limit = 8.0 + 2 * proxy.long_wait
    with _idle_connections(proxy.port) as connections, LoadProcess(plan) as running:
        time.sleep(0.2)
        cpu = processes.cpu_seconds(proxy.roots())
        called = time.time()
        proxy.reload(proxy.routes | {host: (peer,)})
        returned = time.time()
        during = processes.pss_mb(proxy.roots())
        # Long enough for the slowest, and looked at while old and new workers are both there.
        settled = returned
        while time.time() < called + limit:
            time.sleep(0.1)
            during = max(during, processes.pss_mb(proxy.roots()))
            if proxy.answers(host):
                if time.time() > settled + 0.5 + proxy.long_wait / 4:
                    break
            else:
                settled = time.time()
        cpu = processes.cpu_seconds(proxy.roots()) - cpu
        closed = _closed(connections)
        result = running.stop()
    good = [r for r in result.records if not r.kind]
    bad = [r for r in result.records if r.kind and result.started_at + r.due > called]
    if not good:
        raise BenchError(f"{host} was not served within {limit:.0f} s of the change")
    first = min(answered_at(result, record) for record in good)
    last = max((result.started_at + record.due for record in bad), default=called)
    if last > result.started_at + result.records[-1].due - 0.1:
        raise BenchError(f"{host} was not served by all workers within {limit:.0f} s")
    if first < called:
        raise BenchError(f"{host} was served before it was added")
    wrong = {record.backend for record in good} - {f"b{peer.port}"}
    if wrong:
        raise BenchError(f"{host} was answered by {wrong}")
    cut = [record for record in bad if record.kind != "status"]
    return {
        "first_ms": (first - called) * 1000,
        "all_ms": max((last - called) * 1000, (first - called) * 1000),
        "call_ms": (returned - called) * 1000,
        "cpu_s": cpu,
        "pss_before": before,
        "pss_during": during,
        "closed": closed,
        "cut": len(cut),
    }


def _measure(options: Options, count: int, kinds: Mapping[str, type[Proxy]]) -> list[Sample]:
    variant = {"hosts": count}
    with directory() as home, ExitStack() as stack:
        backends = Standing(home, [free_port()])
        stack.callback(backends.stop)
        peer = backends.peers[0]
        routes = {f"h{number}.localhost": (peer,) for number in range(count)}
        held: dict[str, Proxy] = {}

        def start(case: Case) -> Mapping[str, Any]:
            kind = kinds[case.proxy]
            proxy = kind()
            stack.callback(proxy.stop)
            proxy.start(Setup(place(home, kind.key), routes))
            held[case.proxy] = proxy
            return {}

        started = [attempt(Case(name, variant), -1, start) for name in kinds]
        samples = [sample for sample in started if sample.error]
        time.sleep(1.0)
        cases = [Case(name, variant) for name in held]
        samples += interleaved(cases, options.rounds, lambda case: _reload(held[case.proxy], peer))
    return samples


def run(options: Options) -> Section:
    """Measure every size."""
    chosen_kinds = options.among(Tidegate, Nginx, HAProxy, Caddy, TraefikFast)
    kinds = {kind.name: kind for kind in chosen_kinds}
    samples: list[Sample] = []
    sizes = SIZES[:2] if options.quick else SIZES
    for count in sizes:
        say(f" reload with {count} hosts")
        samples += _measure(options, count, kinds)
    chosen = [Case(name, {"hosts": count}) for count in sizes for name in kinds]

    def cells(own: list[Sample]) -> list[str]:
        return [
            median(own, "first_ms", 0),
            median(own, "all_ms", 0),
            f"{middle(values(own, 'call_ms')):.0f}",
            f"{middle(values(own, 'cpu_s')):.2f}",
            f"{middle(values(own, 'pss_before')):.0f} → {middle(values(own, 'pss_during')):.0f}",
            f"{middle(values(own, 'closed')):.0f} of {IDLE}",
            f"{sum(values(own, 'cut')):.0f}",
        ]

    head = ["hosts", "proxy", "first worker ms", "all workers ms", "call ms", "CPU s", "PSS MB"]
    head += ["idle client connections closed", "new connections failed"]
    found = table(
        head,
        rows(
            chosen,
            samples,
            lambda case: [f"{case.variant['hosts']:,}", case.proxy],
            cells,
            width=7,
        ),
    )
    about = paragraph(
        f"One host is added. Milliseconds from the call; {RATE:.0f} requests a second for the new",
        "host, each on a new connection, tell when it is served. CPU time and memory until half a",
        f"second after that. {IDLE} idle client connections stand open. {options.rounds}",
        "interleaved rounds, medians and range; failed new connections are summed. 2 workers or",
        "threads each. `bench/scenes/reload.py`.",
    )
    return Section("reload", "(g) A change of hosts", f"{about}\n\n{found}", data=as_data(samples))
