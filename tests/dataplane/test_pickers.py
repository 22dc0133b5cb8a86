"""Which peer each algorithm picks: shares, order, keys, and what a change of peers does to them.

The pickers are asked inside a running nginx, thousands of times per test, without any traffic.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.dataplane.harness import (
    Proxy,
    free_port,
    nginx_is_installed,
    peer,
    request,
    upstream,
    wait_until,
)

SERVER = """
server {{
    listen 127.0.0.1:{port};
    client_max_body_size 8m;
    client_body_buffer_size 8m;
    location / {{
        content_by_lua_block {{
            ngx.req.read_body()
            local code = assert(loadstring(ngx.req.get_body_data()))
            ngx.print(require("cjson").encode(code()))
        }}
    }}
}}
"""
PICK = """
    local balancer, name, count = require "tidegate.balancer", ...
    name, count = "{name}", {count}
    local upstream = balancer.lookup(name)
    math.randomseed({seed})
    local picks = {{}}
    for number = 1, count do
        {each}
        picks[number] = upstream.picker:{call}
    end
    return picks
"""


class Engine:
    """A proxy with one worker that runs Lua for us."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.proxy = Proxy(directory, workers=1)
        conf = Path(self.proxy.env["TIDEGATE_CONF_DIR"])
        conf.mkdir(parents=True)
        (conf / "lua.conf").write_text(SERVER.format(port=self.port))

    def run(self, code: str, *, path: str = "/", headers: Mapping[str, str] | None = None) -> Any:
        """What Lua `code` returns."""
        answer = request(
            self.port, path, method="POST", body=code.encode(), headers=headers, timeout=60
        )
        assert answer.status == 200, self.proxy.output[-2000:]
        return answer.json()

    def push(self, *peers: Mapping[str, object], **policy: object) -> None:
        """The one upstream there is, all of its peers admitted."""
        answer = self.proxy.admin.put({"u": upstream(*peers, **policy)})
        assert answer.status == 200, answer.text
        assert answer.json()["unsupported"] == []
        self.run("""
            local store = require "tidegate.store"
            store.admit("u", require("tidegate.codec").decode((store.get("u"))).peers)
            return 1
        """)

    def picks(
        self, count: int, *, seed: int = 1, call: str = "next()", each: str = "", **how: Any
    ) -> list[int]:
        """Indexes of the picks; in an upstream the peers are sorted by id."""
        code = PICK.format(name="u", count=count, seed=seed, call=call, each=each)
        picks: list[int] = self.run(code, **how)
        return picks

    def picks_by_key(self, keys: Sequence[str]) -> list[str]:
        """Id of the peer that the hash picker has for each key."""
        code = f"""
            local upstream = require("tidegate.balancer").lookup("u")
            local codec = require "tidegate.codec"
            local key
            upstream.picker.key = function() return key end
            local ids = {{}}
            for _, value in ipairs(require("cjson").decode([==[{json.dumps(list(keys))}]==])) do
                key = value
                local index = upstream.picker:next()
                ids[#ids + 1] = codec.id(upstream.blob, upstream.head.count, index)
            end
            return ids
        """
        ids: list[str] = self.run(code)
        return ids


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for all tests of this file: each pushes its own peers."""
    require(nginx_is_installed(), "nginx with libnginx-mod-http-lua, or OpenResty")
    engine = Engine(tmp_path_factory.mktemp("engine"))
    with engine.proxy:
        yield engine


def peers_of(weights: Sequence[int]) -> list[dict[str, object]]:
    return [peer(1000 + n, id=f"p{n:05}", weight=weight) for n, weight in enumerate(weights)]


def chi_square_limit(freedom: int) -> float:
    """What a right one stays below but in one of some million cases (Wilson and Hilferty)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 5 * spread**0.5) ** 3)


def assert_shares(picks: Sequence[object], shares: Mapping[object, float]) -> None:
    """Picks are as random as they may be: no peer is preferred."""
    counts, total = Counter(picks), sum(shares.values())
    assert set(counts) <= {who for who, share in shares.items() if share}
    expected = {who: len(picks) * share / total for who, share in shares.items() if share}
    assert min(expected.values()) >= 5
    distance = sum((counts[who] - amount) ** 2 / amount for who, amount in expected.items())
    assert distance < chi_square_limit(max(1, len(expected) - 1)), counts


WEIGHTS = [
    pytest.param([1], id="one"),
    pytest.param([1, 1, 1], id="equal"),
    pytest.param([3, 1, 2, 7], id="unequal"),
    pytest.param([1000, 1], id="1000-and-1"),
    pytest.param([5, 0, 5, 0], id="zeros"),
    pytest.param([1000] * 40 + [10] * 3 + [100] * 7, id="many"),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("algorithm", ["round_robin", "random", "ewma"])
def test_every_peer_gets_its_share(engine: Engine, algorithm: str, weights: list[int]) -> None:
    engine.push(*peers_of(weights), algorithm=algorithm)
    shares = dict(enumerate(w for w in weights if w))
    assert_shares(engine.picks(60_000), shares)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_round_robin_is_never_far_from_a_peers_share(engine: Engine, weights: list[int]) -> None:
    engine.push(*peers_of(weights))
    present = [w for w in weights if w]
    counts: Counter[int] = Counter()
    for number, pick in enumerate(engine.picks(20_000), 1):
        counts[pick] += 1
        for who in (pick, 0):
            share = number * present[who] / sum(present)
            assert abs(counts[who] - share) < 4, (number, who)


def test_equal_peers_take_turns(engine: Engine) -> None:
    engine.push(*peers_of([2, 2, 2]))
    picks = engine.picks(12)
    assert all((b - a) % 3 == 1 for a, b in itertools.pairwise(picks))


def test_p6_round_robin_goes_on_where_it_was_when_peers_change(engine: Engine) -> None:
    """A membership that changes after every pick prefers nobody, old or new."""
    three, four = peers_of([1, 1, 1]), peers_of([1, 1, 1, 1])
    last = None
    for number in range(24):
        engine.push(*(four if number % 2 else three))
        pick = engine.picks(1)[0]
        count = 4 if number % 2 else 3
        assert last is None or pick == (last + 1) % max(count, last + 1) % count
        last = pick


def test_p6_workers_start_at_different_peers(make_proxy: Callable[..., Proxy]) -> None:
    """Many workers that each get few requests do not all send them to the same peers."""
    from tests.dataplane.harness import backends, site

    proxy = make_proxy(workers=4)
    proxy.start()
    assert proxy.admin.site(site(proxy.http_port, {"a.test": {"/": "u"}})).status == 200
    first: Counter[str] = Counter()
    with backends(8) as eight:
        peers = [b.peer() for b in eight]
        for _ in range(12):
            # Taken away and pushed again: every worker starts anew.
            assert proxy.admin.put({}).status == 200
            assert request(proxy.http_port).status == 503
            assert proxy.admin.put({"u": upstream(*peers)}).status == 200
            first[request(proxy.http_port).text] += 1
    assert len(first) >= 3


@pytest.mark.parametrize("algorithm", ["round_robin", "random", "least_conn", "ewma", "hash"])
def test_a_search_finds_the_only_peer_that_will_do(engine: Engine, algorithm: str) -> None:
    engine.push(*peers_of([1] * 300), algorithm=algorithm, hash_key="ip", hash_balance=1.25)
    picks = engine.picks(50, call="search(function(_, index) return index == 217 end)")
    assert picks == [217] * 50
    none = engine.run(
        'local u = require("tidegate.balancer").lookup("u")'
        " return {u.picker:search(function() return false end) == nil}"
    )
    assert none == [True]


def test_an_upstream_without_peers_has_nobody_to_pick(engine: Engine) -> None:
    for algorithm in ("round_robin", "random", "least_conn", "ewma", "hash", "first"):
        engine.push(algorithm=algorithm)
        code = (
            'local u = require("tidegate.balancer").lookup("u")'
            ' return {require("tidegate.selection").select(u) == nil}'
        )
        assert engine.run(code) == [True]


def test_first_is_the_first_by_id(engine: Engine) -> None:
    engine.push(*reversed(peers_of([1, 1000, 1])), algorithm="first")
    assert set(engine.picks(100)) == {0}


def keys(count: int, seed: int = 7) -> list[str]:
    source = random.Random(seed)
    return [f"user-{source.getrandbits(48):x}" for _ in range(count)]


@pytest.mark.parametrize(
    "weights", [[1] * 2, [1] * 3, [1] * 10, [1] * 100, [1, 2, 3, 4], [1000, 100, 100]]
)
def test_hash_gives_every_peer_about_its_share_of_the_keys(
    engine: Engine, weights: list[int]
) -> None:
    engine.push(*peers_of(weights), algorithm="hash", hash_key="ip")
    count = 400 * len(weights) + 4000
    picked = Counter(engine.picks_by_key(keys(count)))
    for place, weight in enumerate(weights):
        share = count * weight / sum(weights)
        assert picked[f"p{place:05}"] == pytest.approx(share, rel=0.33)


def test_hash_with_weights_0_1_and_1000(engine: Engine) -> None:
    engine.push(*peers_of([0, 1, 1000]), algorithm="hash", hash_key="ip")
    picked = Counter(engine.picks_by_key(keys(40_000)))
    assert set(picked) == {"p00001", "p00002"}
    assert 10 <= picked["p00001"] <= 110


@pytest.mark.parametrize("count", [2, 5, 10, 64])
def test_hash_moves_one_nth_of_the_keys_when_one_of_n_peers_comes_or_goes(
    engine: Engine, count: int
) -> None:
    some = keys(8000)
    all_of_them = peers_of([1] * count)
    engine.push(*all_of_them, algorithm="hash", hash_key="ip")
    before = engine.picks_by_key(some)
    gone = all_of_them[count // 2]["id"]
    engine.push(*(p for p in all_of_them if p["id"] != gone), algorithm="hash", hash_key="ip")
    without = engine.picks_by_key(some)
    moved = [(a, b) for a, b in zip(before, without, strict=True) if a != b]
    assert {a for a, _ in moved} == {gone}  # nobody else's keys move
    assert len(moved) / len(some) == pytest.approx(1 / count, rel=0.4)
    engine.push(*all_of_them, algorithm="hash", hash_key="ip")
    assert engine.picks_by_key(some) == before  # and they come back


def test_hash_spreads_the_keys_of_a_peer_that_is_out_over_the_others(engine: Engine) -> None:
    engine.push(*peers_of([1] * 5), algorithm="hash", hash_key="arg:k")
    code = """
        local u = require("tidegate.balancer").lookup("u")
        local key
        u.picker.key = function() return key end
        local picks = {}
        for number = 1, 4000 do
            key = "k" .. number
            local first = u.picker:next()
            local second = u.picker:search(function(_, index) return index ~= first end)
            picks[number] = first .. ">" .. second
        end
        return picks
    """
    picks = Counter(engine.run(code))
    assert len(picks) == 20
    assert max(picks.values()) < 3 * min(picks.values())


@pytest.mark.parametrize(
    ("spec", "vary"),
    [
        ("uri", lambda key: {"path": f"/{key}?other={random.random()}"}),
        ("arg:user", lambda key: {"path": f"/x?a={random.random()}&user={key}"}),
        ("header:X-User-Id", lambda key: {"headers": {"X-User-ID": key}}),
        ("cookie:my-session", lambda key: {"headers": {"Cookie": f"a=b; my-session={key}"}}),
    ],
)
def test_hash_keys(engine: Engine, spec: str, vary: Callable[[str], dict[str, Any]]) -> None:
    engine.push(*peers_of([1] * 20), algorithm="hash", hash_key=spec)
    seen = set()
    for key in keys(12):
        first, second = engine.picks(2, **vary(key)), engine.picks(2, **vary(key))
        assert len({*first, *second}) == 1
        seen.add(first[0])
    assert len(seen) > 4


@pytest.mark.parametrize("spec", ["", "header:X-None", "cookie:none", "arg:none", "nonsense:x"])
def test_hash_without_a_key_is_round_robin(engine: Engine, spec: str) -> None:
    engine.push(*peers_of([1] * 4), algorithm="hash", hash_key=spec)
    assert_shares(engine.picks(400), dict.fromkeys(range(4), 1))


def test_hash_by_address_is_one_peer(engine: Engine) -> None:
    engine.push(*peers_of([1] * 9), algorithm="hash", hash_key="ip")
    assert len(set(engine.picks(100))) == 1


def test_bounded_loads_keep_a_hot_key_from_filling_its_peer(engine: Engine) -> None:
    """With 100 requests in flight on 10 peers none has more than 1.25 times the mean."""
    engine.push(*peers_of([1] * 10), algorithm="hash", hash_key="ip", hash_balance=1.25)
    code = """
        local load = require "tidegate.load"
        local u = require("tidegate.balancer").lookup("u")
        local picks = {}
        for number = 1, 100 do
            local index = u.picker:next()
            load.add(u.peers[index].cell, 1)
            load.add(u.head.cell, 1)
            picks[number] = index
        end
        for _, index in ipairs(picks) do
            load.add(u.peers[index].cell, -1)
            load.add(u.head.cell, -1)
        end
        return picks
    """
    counts = Counter(engine.run(code))
    assert max(counts.values()) <= 13
    assert max(counts.values()) > 10  # it prefers its own peer all the same


def test_p15_thousands_of_peers_of_any_weight_cost_no_more_than_light_ones(engine: Engine) -> None:
    """Points, guide entries and looks per pick are bounded by the number of peers alone."""
    for weights in ([1] * 10_000, [1000] * 10_000, [1000, 1] * 5000):
        engine.push(*peers_of(weights), algorithm="hash", hash_key="ip")
        engine.picks(1)
        ring = engine.run('return {require("tidegate.balancer").lookup("u").picker.ring.total}')
        assert ring[0] <= 17 * 10_000
    engine.push(*peers_of([1000, 1] * 5000))
    engine.picks(1)
    code = """
        local u = require("tidegate.balancer").lookup("u")
        local most, total = 0, 0
        for step = 0, u.regular - 1 do
            local width = u.picker.view.guide[step + 1] - u.picker.view.guide[step]
            most, total = math.max(most, width), total + width
        end
        return {most, total}
    """
    assert engine.run(code)[1] < 10_000  # steps over all places together: O(1) on average
    engine.push(*peers_of([1] * 10_000), algorithm="least_conn")
    code = """
        local u = require("tidegate.balancer").lookup("u")
        local load = require "tidegate.load"
        for index = 0, u.regular - 1 do load.add(u.peers[index].cell, 1) end
        local looks = 0
        u.picker:search(function() looks = looks + 1 return false end)
        local all = looks
        looks = 0
        local found = u.picker:search(function(_, index) looks = looks + 1 return true end)
        for index = 0, u.regular - 1 do load.add(u.peers[index].cell, -1) end
        return {all, looks, found}
    """
    everything, looks, _ = engine.run(code)
    assert everything == 10_000
    assert looks <= 1024


def test_least_conn_counts_what_is_in_flight_for_the_weight(engine: Engine) -> None:
    engine.push(*peers_of([1, 2, 4]), algorithm="least_conn")
    code = """
        local load = require "tidegate.load"
        local u = require("tidegate.balancer").lookup("u")
        local picks = {}
        for number = 1, 70 do
            picks[number] = u.picker:next()
            load.add(u.peers[picks[number]].cell, 1)
        end
        for _, index in ipairs(picks) do load.add(u.peers[index].cell, -1) end
        return picks
    """
    assert Counter(engine.run(code)) == {0: 10, 1: 20, 2: 40}


def test_least_conn_takes_turns_among_idle_peers(engine: Engine) -> None:
    engine.push(*peers_of([1] * 5), algorithm="least_conn")
    assert_shares(engine.picks(500), dict.fromkeys(range(5), 1))


def test_ewma_prefers_the_fast_and_the_idle(engine: Engine) -> None:
    engine.push(*peers_of([1] * 4), algorithm="ewma")
    engine.run(
        """
        local u = require("tidegate.balancer").lookup("u")
        local load = require "tidegate.load"
        for index = 0, 3 do
            load.add(u.peers[index].cell, 1)
            load.begin(u.peers[index].cell, 0, true)
            load.finish(false, function() return index == 2 and 1 or 0.01 end)
        end
        return 1
        """
    )
    counts = Counter(engine.picks(6000, seed=3))
    # The slow one is taken by nobody, since two different ones are compared.
    assert counts[2] == 0
    assert min(counts[n] for n in (0, 1, 3)) > 1500


def test_cells_are_given_back_and_given_again(engine: Engine) -> None:
    def used() -> float:
        return engine.proxy.admin.metrics()["tidegate_load_cells"]

    engine.push()
    assert used() == 0
    for number in range(5):
        some = [peer(2000 + n, id=f"{number}-{n}") for n in range(100)]
        engine.push(*some, algorithm="least_conn")
        assert used() == 102
        code = """
            local u, highest = require("tidegate.balancer").lookup("u"), 0
            for index = 0, u.up - 1 do highest = math.max(highest, u.peers[index].cell) end
            return {highest}
        """
        assert engine.run(code)[0] <= 204  # the new ones before the old ones are given back
    engine.push(*some)
    assert used() == 0
    engine.push(*some, max_conns=1)
    assert used() == 102
    engine.proxy.admin.put({})
    wait_until(lambda: used() == 0)
