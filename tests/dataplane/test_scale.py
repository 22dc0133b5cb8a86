"""What a change costs, counted in calls to shared memory: by what changes, not by what there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataplane.harness import Proxy, peer, upstream, wait_until
from tests.dataplane.hooks import Hooked


@pytest.fixture
def hooked(make_proxy: Callable[..., Proxy], tmp_path: Path) -> Hooked:
    return Hooked(make_proxy, tmp_path, workers=1)


def test_a_delta_costs_no_more_among_thousands_of_upstreams(hooked: Hooked) -> None:
    """In all phases: what answers it, and what follows it in timers."""
    admin = hooked.proxy.admin

    def in_step() -> bool:
        status = admin.status()
        return bool(status["persisted_revision"] == status["revision"])

    def cost_among(count: int) -> int:
        assert admin.put({f"u{n}": item(n) for n in range(count)}).status == 200
        wait_until(in_step, timeout=30)
        # So that the checks, which follow a quarter of a second later, have seen it too.
        wait_until(lambda: "check" in admin.shown("u0")["policy"])
        wait_until(lambda: admin.live("u0")["p0"] == "up")
        assert admin.patch({"u1": item(1, "before")}).status == 200
        wait_until(in_step)
        hooked.seen()
        for turn in range(8):
            assert admin.patch({"u1": item(1, f"turn{turn}")}).status == 200
            wait_until(in_step)
        return sum(number for what, number in hooked.seen().items() if what != "largest")

    assert cost_among(3000) < cost_among(30) + 3000


def item(number: int, first: str = "p0") -> dict[str, object]:
    peers = [peer(80, id=first), *(peer(80, id=f"p{k}-of-upstream-{number}") for k in range(1, 6))]
    return upstream(*peers, check={"kind": "tcp", "interval": 3600})


READ = """
    local balancer, records = require "tidegate.balancer", require "tidegate.records"
    local dict = ngx.shared.tidegate_health
    local original, reads = dict.get, 0
    rawset(dict, "get", function(...)
        reads = reads + 1
        return original(...)
    end)
    local upstream = balancer.lookup("u")
    rawset(dict, "get", nil)
    local out = {}
    for index = 0, upstream.up - 1 do
        if upstream.health.ejected and upstream.health.ejected[index] then
            out[#out + 1] = require("tidegate.codec").id(upstream.blob, upstream.head.count, index)
        end
    end
    return { reads = reads, out = out }
"""
FAIL = """
    local upstream = require("tidegate.balancer").lookup("u")
    for _ = 1, upstream.policy.passive.failures do
        require("tidegate.records").failed(upstream, %d)
    end
"""


def test_health_that_changes_is_read_by_what_changes(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    hooked = Hooked(make_proxy, tmp_path, workers=1)
    peers = [
        peer(80, id=f"p{n:04}", address=f"127.0.{n // 200}.{1 + n % 200}") for n in range(3000)
    ]
    assert hooked.proxy.admin.put({"u": upstream(*peers)}).status == 200
    assert hooked.run(READ)["out"] == {}
    reads = []
    for number in range(0, 3000, 300):
        hooked.run(FAIL % number)
        found = hooked.run(READ)
        assert found["out"] == [f"p{n:04}" for n in range(0, number + 1, 300)]
        reads.append(found["reads"])
    # A version that follows takes over what is known.
    assert hooked.proxy.admin.patch({"u": upstream(*peers[1:])}).status == 200
    found = hooked.run(READ)
    assert found["out"] == [f"p{n:04}" for n in range(300, 3000, 300)]
    assert max(*reads, found["reads"]) < 200


def test_health_whose_news_were_missed_is_read_as_a_whole(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    hooked = Hooked(make_proxy, tmp_path, workers=1)
    peers = [peer(80, id=f"p{n:03}", address=f"127.0.0.{n + 1}") for n in range(180)]
    assert hooked.proxy.admin.put({"u": upstream(*peers)}).status == 200
    hooked.run(READ)
    fail_all = """
        local upstream = require("tidegate.balancer").lookup("u")
        for index = 0, 79 do
            for _ = 1, upstream.policy.passive.failures do
                require("tidegate.records").failed(upstream, index)
            end
        end
    """
    hooked.run(fail_all)
    assert hooked.run(READ)["out"] == [f"p{n:03}" for n in range(80)]
