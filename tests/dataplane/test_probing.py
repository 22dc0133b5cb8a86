"""The admission of many new peers at once: paced, those that are waited for first, nothing lost."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dataplane.harness import (
    HOME,
    Answer,
    Backend,
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

CHECK = {"kind": "http", "path": "/check", "interval": 60, "timeout": 60}
RUNNING = 128
"""Probes under way at a time, at most: see `nginx/lua/tidegate/probe.lua`."""
BURST = 16
"""Probes that may begin in one go."""

SPY = """
-- Counts how many sockets are opened before time goes on, which it does once per turn of nginx's
-- event loop.
local tcp, now, spy = ngx.socket.tcp, ngx.now, ngx.shared.spy
ngx.socket.tcp = function()
    spy:incr("all", 1, 0)
    if spy:get("now") ~= now() then
        spy:set("now", now())
        spy:set("turn", 0)
    end
    local turn = spy:incr("turn", 1)
    if turn > (spy:get("most") or 0) then
        spy:set("most", turn)
    end
    return tcp()
end
"""
SPY_SERVER = """
lua_shared_dict spy 1m;
server {{
    listen 127.0.0.1:{port};
    location / {{
        content_by_lua_block {{ ngx.print(ngx.shared.spy:get(string.sub(ngx.var.uri, 2)) or 0) }}
    }}
}}
"""


class Gate(Backend):
    """Any number of peers, at all addresses of loopback, whose checks are answered when told to."""

    def __init__(self) -> None:
        super().__init__("gate", address="0.0.0.0")
        self._may = 0
        self._turn = asyncio.Condition()

    def let(self, count: int) -> None:
        """Has so many more checks answered, the oldest first."""
        self._may += count

    def addresses(self, count: int) -> list[dict[str, object]]:
        """So many peers; the host of the check says which one it is."""
        return [
            peer(self.port, id=f"n{n:04}", address=f"127.0.{1 + n // 200}.{1 + n % 200}")
            for n in range(count)
        ]

    @property
    def asked(self) -> list[str]:
        """Hosts of the checks that have come, in order."""
        return [seen.headers["host"] for seen in self.checks]

    async def _answer(self, method: str, path: str, *more: Any) -> bool:
        if path == "/check":
            number = len(self.checks)
            while self._may < number:
                await asyncio.sleep(0.005)
        return await super()._answer(method, path, *more)


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate() as running:
        yield running


def states(proxy: Proxy, name: str) -> set[str]:
    return set(proxy.admin.live(name).values())


def test_a_bounded_number_of_probes_is_under_way(
    make_proxy: Callable[..., Proxy], gate: Gate
) -> None:
    proxy = make_proxy(workers=1)
    proxy.start()
    new = {f"u{n}": upstream(one, hold=1, check=CHECK) for n, one in enumerate(gate.addresses(300))}
    proxy.admin.put(new)
    wait_until(lambda: gate.busy == RUNNING, what="as many as may be")
    for answered in range(1, 11):
        gate.let(1)
        # Those that are admitted are checked again before long, so each counts once.
        wait_until(lambda n=answered: len(set(gate.asked)) >= RUNNING + n)  # type: ignore[misc]
        assert len(set(gate.asked)) == RUNNING + answered
    gate.let(10_000)
    wait_until(lambda: all(states(proxy, name) == {"up"} for name in new), timeout=60)


def test_few_begin_in_one_turn_of_the_event_loop(
    make_proxy: Callable[..., Proxy], tmp_path: Path, gate: Gate
) -> None:
    home = Path(shutil.copytree(HOME, tmp_path / "home"))
    (home / "lua/tidegate/spy.lua").write_text(SPY)
    first = home / "lua/tidegate/init.lua"
    first.write_text('require "tidegate.spy"\n' + first.read_text())
    port = free_port()
    proxy = make_proxy(workers=1, home=home)
    conf = Path(proxy.env["TIDEGATE_CONF_DIR"])
    conf.mkdir(parents=True)
    (conf / "spy.conf").write_text(SPY_SERVER.format(port=port))
    proxy.start()
    proxy.admin.put({"u": upstream(*gate.addresses(1000), hold=1)})
    wait_until(lambda: states(proxy, "u") == {"up"}, timeout=60)
    assert int(request(port, "/all").text) == 1000  # each once
    # The time may go on once more between a push and the end of its turn.
    assert int(request(port, "/most").text) <= 2 * BURST


def test_the_peers_of_a_usual_update_are_all_probed_at_once(
    make_proxy: Callable[..., Proxy], gate: Gate
) -> None:
    proxy = make_proxy(workers=1)
    proxy.start()
    proxy.admin.put({"u": upstream(*gate.addresses(10), hold=1, check=CHECK)})
    wait_until(lambda: gate.busy == 10)
    gate.let(10)
    wait_until(lambda: states(proxy, "u") == {"up"})


def test_a_peer_that_a_request_waits_for_is_probed_first(
    make_proxy: Callable[..., Proxy], gate: Gate
) -> None:
    proxy = make_proxy(workers=1)
    proxy.start()
    names = [f"u{n:03}.test" for n in range(300)]
    files = site(proxy.http_port, {name: {"/": f"{name}/"} for name in names})
    assert proxy.admin.site(files).status == 200
    members = zip(names, gate.addresses(len(names)), strict=True)
    proxy.admin.put({f"{name}/": upstream(one, hold=60, check=CHECK) for name, one in members})
    wait_until(lambda: gate.busy == RUNNING)
    # Whatever order the others have, it is neither the first nor the last.
    waited = [name for name in names if name not in gate.asked][50]
    answers: list[Answer] = []
    asking = threading.Thread(
        target=lambda: answers.append(request(proxy.http_port, host=waited, timeout=60))
    )
    before = len(gate.asked)
    asking.start()
    held = f'tidegate_requests_in_flight{{upstream="{waited}/"}}'
    wait_until(lambda: proxy.admin.metrics().get(held) == 1)
    gate.let(1)
    wait_until(lambda: len(gate.asked) > before)
    assert gate.asked[before] == waited
    gate.let(10_000)
    asking.join()
    assert [answer.text for answer in answers] == ["gate"]


def test_a_new_peer_does_not_wait_for_those_that_refuse(routed: Proxy, backend: Backend) -> None:
    dead = [
        peer(free_port(), id=f"dead{n}", address=f"127.0.{1 + n // 200}.{1 + n % 200}")
        for n in range(600)
    ]
    routed.admin.put({"a.test/": upstream(*dead, hold=10)})
    assert routed.admin.patch({"a.test/": upstream(*dead, backend.peer(), hold=10)}).status == 200
    assert request(routed.http_port).text == "b0"
    assert routed.admin.live("a.test/")["b0"] == "up"


def test_renewing_all_peers_of_all_upstreams_at_once_fails_no_request(proxy: Proxy) -> None:
    names = [f"h{n}.test" for n in range(40)]
    assert proxy.admin.site(site(proxy.http_port, {n: {"/": f"{n}/"} for n in names})).status == 200
    with backends(8) as running:

        def members(turn: int) -> dict[str, object]:
            peers = [backend.peer(id=f"{backend.name}-{turn}") for backend in running]
            return {f"{name}/": upstream(*peers, hold=20) for name in names}

        proxy.admin.put(members(0))
        first, last = Load(proxy.http_port, host=names[0]), Load(proxy.http_port, host=names[-1])
        with first as one, last as other:
            for turn in range(1, 4):
                assert proxy.admin.put(members(turn)).status == 200
                wait_until(lambda: all(states(proxy, f"{n}/") == {"up"} for n in names), timeout=30)
                seen = one.total, other.total
                wait_until(lambda s=seen: one.total > s[0] and other.total > s[1])  # type: ignore[misc]
    assert (one.failed, other.failed) == ({}, {})


def test_a_probed_peer_that_moves_meanwhile_is_probed_at_its_new_address(
    routed: Proxy, gate: Gate, backend: Backend
) -> None:
    stuck = {"a.test/": upstream(gate.peer(id="it", address="127.0.1.1"), hold=30, check=CHECK)}
    routed.admin.put(stuck)
    wait_until(lambda: gate.busy == 1)
    moved = upstream(backend.peer(id="it"), hold=30, check=CHECK)
    assert routed.admin.patch({"a.test/": moved}).status == 200
    assert request(routed.http_port).text == "b0"
    gate.let(1)
    wait_until(lambda: gate.busy == 0)
    assert [p["port"] for p in routed.admin.shown("a.test/")["peers"]] == [backend.port]
