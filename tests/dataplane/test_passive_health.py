"""Peers that fail requests: left alone by all workers, for longer each time, never all of them."""

from __future__ import annotations

import os
import signal
from collections import Counter

from tests.dataplane.harness import (
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

A = "a.test/"


def with_policy(
    *peers: dict[str, object], hold: float = 0.0, **policy: object
) -> dict[str, object]:
    return {
        **upstream(*peers, hold=hold),
        "policy": {"algorithm": "round_robin", **policy},
    }


def state(proxy: Proxy, name: str) -> str:
    return proxy.admin.live(A)[name]


def ejections(proxy: Proxy) -> float:
    return proxy.admin.metrics().get('tidegate_ejections_total{upstream="a.test/"}', 0)


def send_until_ejected(proxy: Proxy, name: str) -> int:
    """Sends requests until peer `name` is ejected; gives how many."""
    for sent in range(1, 200):
        request(proxy.http_port)
        if state(proxy, name) == "ejected":
            return sent
    raise AssertionError(f"{name} is still {state(proxy, name)}")


def test_a_peer_that_answers_with_errors_is_ejected_in_every_worker(routed: Proxy) -> None:
    with backends(3) as (bad, *good):
        passive = {"failures": 3, "eject": 60}
        routed.admin.put({A: with_policy(*(b.peer() for b in (bad, *good)), passive=passive)})
        bad.status = 503
        send_until_ejected(routed, "b0")
        assert len(bad.requests) == 3
        answers = Counter(request(routed.http_port).text for _ in range(60))
        assert (answers["b0"], len(bad.requests)) == (0, 3)
        wait_until(lambda: ejections(routed) == 1)
        metrics = routed.admin.metrics()
        assert metrics['tidegate_peers{upstream="a.test/",state="ejected"}'] == 1
        assert metrics['tidegate_peers{upstream="a.test/",state="up"}'] == 2


def test_a_success_takes_failures_back(routed: Proxy) -> None:
    with backends(2) as (bad, good):
        routed.admin.put({A: with_policy(bad.peer(), good.peer(), passive={"failures": 3})})
        for _ in range(10):
            for status in (503, 200):
                bad.status = status
                seen = len(bad.requests)
                while len(bad.requests) < seen + 2:
                    request(routed.http_port)
        assert (state(routed, "b0"), ejections(routed)) == ("up", 0)
        bad.status = 503
        send_until_ejected(routed, "b0")


def test_errors_that_do_not_count_eject_nobody(routed: Proxy) -> None:
    with backends(2) as (bad, good):
        routed.admin.put({A: with_policy(bad.peer(), good.peer(), passive={"failures": 1})})
        for status in (500, 404):
            bad.status = status
            for _ in range(8):
                request(routed.http_port)
        assert state(routed, "b0") == "up"
        routed.admin.put({A: with_policy(bad.peer(), good.peer(), passive={"failures": 0})})
        bad.status = 503
        for _ in range(20):
            request(routed.http_port)
        assert state(routed, "b0") == "up"


def test_timeouts_and_resets_count(routed: Proxy) -> None:
    for path in ("/sleep/5", "/reset", "/garbage"):
        with backends(2) as (slow, good):
            limits = {"timeouts": {"read": 0.05}, "passive": {"failures": 1, "eject": 60}}
            routed.admin.put({A: upstream()})
            routed.admin.put({A: with_policy(slow.peer(id="s"), good.peer(), **limits)})
            wait_until(
                lambda path=path: (
                    request(routed.http_port, path, method="POST").status
                    and "ejected" in routed.admin.live(A).values()
                )
            )


def test_ejections_survive_changes_of_the_membership_a_reload_and_the_workers(
    routed: Proxy,
) -> None:
    with backends(4) as (bad, one, two, three):
        passive = {"failures": 2, "eject": 60}
        routed.admin.put({A: with_policy(bad.peer(), one.peer(), two.peer(), passive=passive)})
        bad.status = 502
        send_until_ejected(routed, "b0")
        seen = len(bad.requests)
        routed.admin.patch({A: with_policy(bad.peer(), one.peer(), three.peer(), passive=passive)})
        wait_until(lambda: state(routed, "b3") == "up")
        assert state(routed, "b0") == "ejected"
        hosts = {"a.test": {"/": A}, "b.test": {"/": A}}
        assert routed.admin.site(site(routed.http_port, hosts)).status == 200
        for pid in routed.workers():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(routed.workers()) == 2)
        wait_until(lambda: request(routed.http_port).status == 200)
        for _ in range(30):
            request(routed.http_port)
        assert (state(routed, "b0"), len(bad.requests)) == ("ejected", seen)


def test_a_peer_that_comes_back_as_another_one_is_not_burdened(routed: Proxy) -> None:
    with backends(3) as (bad, one, two):
        passive = {"failures": 1, "eject": 60}
        both = [one.peer(), two.peer()]
        routed.admin.put({A: with_policy(bad.peer(), *both, passive=passive)})
        bad.status = 503
        send_until_ejected(routed, "b0")
        bad.status = 200
        routed.admin.patch({A: with_policy(*both, passive=passive)})
        routed.admin.patch({A: with_policy(bad.peer(), *both, passive=passive)})
        wait_until(lambda: state(routed, "b0") == "up")
        assert "b0" in {request(routed.http_port).text for _ in range(9)}


def test_a_flapping_peer_is_left_alone_for_longer_each_time(routed: Proxy) -> None:
    with backends(3) as (bad, one, two):
        passive = {"failures": 3, "eject": 0.3, "max_eject": 1.0}
        peers = [b.peer() for b in (bad, one, two)]
        routed.admin.put({A: with_policy(*peers, passive=passive)})
        bad.status = 503
        seen, lengths = [], []
        for _ in range(4):
            before = len(bad.requests)
            send_until_ejected(routed, "b0")
            seen.append(len(bad.requests) - before)
            live = next(p["live"] for p in routed.admin.shown(A)["peers"] if p["id"] == "b0")
            lengths.append((live["ejections"], live["ejected_for"]))
            wait_until(lambda: state(routed, "b0") == "up")
        assert seen == [3, 1, 1, 1]  # when it is back, one failure is enough
        for (count, left), (number, length) in zip(
            lengths, [(1, 0.3), (2, 0.6), (3, 1.0), (4, 1.0)], strict=True
        ):
            assert count == number
            assert length - 0.25 < left <= length
        bad.status = 200
        wait_until(lambda: request(routed.http_port).text == "b0")


def test_panic_when_less_than_the_share_is_well_health_is_ignored(routed: Proxy) -> None:
    with backends(4) as peers:
        every = [b.peer() for b in peers]
        policy = {"passive": {"failures": 1, "eject": 60}, "panic": 0.5}
        routed.admin.put({A: with_policy(*every, **policy)})
        for bad in peers[:2]:
            bad.status = 503
            send_until_ejected(routed, bad.name)
        seen = [len(b.requests) for b in peers]
        for _ in range(20):
            request(routed.http_port)
        assert [len(b.requests) for b in peers[:2]] == seen[:2]  # half is enough
        peers[2].status = 503
        send_until_ejected(routed, "b2")
        for _ in range(20):
            request(routed.http_port)
        for bad, before in zip(peers[:2], seen[:2], strict=True):
            assert len(bad.requests) > before


def test_the_last_peer_is_never_ejected(routed: Proxy) -> None:
    with backends(2) as (one, two):
        policy = {"passive": {"failures": 1, "eject": 60}, "panic": 0}
        routed.admin.put({A: with_policy(one.peer(), two.peer(), **policy)})
        one.status = two.status = 503
        for _ in range(20):
            answer = request(routed.http_port)
            assert (answer.status, answer.text[:1]) == (503, "b")  # always the application's
        assert sorted(routed.admin.live(A).values()) == ["ejected", "up"]
        routed.admin.put({A: with_policy(one.peer(), **policy)})
        one.status = 200
        assert request(routed.http_port).status == 200


def test_p5_with_dead_peers_no_request_fails_whatever_the_policy_ejects(routed: Proxy) -> None:
    """Retries never go to the same dead peer, and a dead one is soon left alone, also in panic."""
    for dead in (1, 2, 4):
        with Backend("alive") as alive:
            peers = [alive.peer(), *(peer(free_port(), id=f"dead{n}") for n in range(dead))]
            routed.admin.put({A: with_policy(*peers, passive={"failures": 2, "eject": 1})})
            with Load(routed.http_port, connections=32) as load:
                wait_until(lambda load=load: load.total >= 2000, timeout=30)
            assert load.failed == {}


def test_p12_health_leaves_no_series_behind(routed: Proxy) -> None:
    """Peers are no labels, and with an upstream all that was counted about it goes."""
    with backends(3) as (bad, *good):
        for round_ in range(5):
            peers = [b.peer(id=f"{b.name}-{round_}") for b in (bad, *good)]
            routed.admin.put({A: with_policy(*peers, passive={"failures": 1, "eject": 60})})
            bad.status = 503
            wait_until(lambda r=round_: state(routed, f"b1-{r}") == "up")
            wait_until(lambda r=round_: state(routed, f"b2-{r}") == "up")
            bad.status = 503
            wait_until(
                lambda: request(routed.http_port) and "ejected" in routed.admin.live(A).values()
            )
        wait_until(lambda: ejections(routed) == 5)
        series = [name for name in routed.admin.metrics() if "a.test/" in name]
        assert not [name for name in series if "b0" in name or str(bad.port) in name]
        routed.admin.put({})
        wait_until(lambda: not [n for n in routed.admin.metrics() if "a.test/" in n])
