"""Retries as the policy of an upstream says; its circuit; its timeouts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.dataplane.harness import (
    Backend,
    Client,
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
from tests.dataplane.test_passive_health import A, with_policy

NEVER = {"failures": 0}


def push(proxy: Proxy, peers: list[Backend], **policy: object) -> None:
    policy = {"passive": NEVER, **policy}
    proxy.admin.put({A: with_policy(*(b.peer() for b in peers), **policy)})


def seen(peers: list[Backend]) -> list[int]:
    return [len(b.requests) for b in peers]


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_as_many_peers_are_asked_as_the_policy_says_each_once(routed: Proxy, tries: int) -> None:
    with backends(5) as peers:
        push(routed, peers, retry={"tries": tries})
        assert request(routed.http_port, "/reset").status == 502
        assert sorted(seen(peers)) == [0] * (5 - tries) + [1] * tries


def test_with_retries_off_at_the_site_a_policy_can_ask_for_them(proxy: Proxy) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, retries="off"))
    with backends(3) as peers:
        push(proxy, peers, retry={"on": ["error"]})
        assert request(proxy.http_port, "/reset").status == 502
        assert seen(peers) == [1, 1, 1]
        push(proxy, peers)
        assert request(proxy.http_port, "/reset").status == 502
        assert sum(seen(peers)) == 4


@pytest.mark.parametrize(
    ("on", "path", "status", "asked"),
    [
        (["timeout"], "/reset", 502, 1),
        (["error"], "/reset", 502, 3),
        (["error"], "/sleep/3", 504, 1),
        (["timeout"], "/sleep/3", 504, 3),
        (["error"], "/garbage", 502, 1),
        (["invalid_header"], "/garbage", 502, 3),
    ],
)
def test_only_what_the_policy_names_is_tried_again(
    routed: Proxy, on: list[str], path: str, status: int, asked: int
) -> None:
    with backends(3) as peers:
        push(routed, peers, retry={"on": on}, timeouts={"read": 0.05})
        assert request(routed.http_port, path).status == status
        assert sum(seen(peers)) == asked


def test_statuses_that_the_policy_names_are_tried_again(routed: Proxy) -> None:
    with backends(3) as peers:
        push(routed, peers, retry={"on": ["error", "http_503"]})
        peers[0].status = 503
        with Load(routed.http_port, "/x?y=1", connections=4) as load:
            wait_until(lambda: load.total >= 200)
        assert load.failed == {}
        assert {one.path for b in peers for one in b.requests} == {"/x?y=1"}
        assert len(peers[0].requests) > 30
        peers[0].status = 200
        for backend in peers:
            backend.status = 503
        before = sum(seen(peers))
        answer = request(routed.http_port)
        assert (answer.status, answer.text[0]) == (503, "b")  # the last one's own answer
        assert sum(seen(peers)) == before + 3


def test_a_status_that_the_policy_does_not_name_is_not_tried_again(routed: Proxy) -> None:
    with backends(3) as peers:
        push(routed, peers, retry={"on": ["http_503"]})
        for backend in peers:
            backend.status = 500
        assert request(routed.http_port).status == 500
        assert sum(seen(peers)) == 1


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("on", [["http_503"], ["error", "http_500", "http_502", "http_504"]])
def test_a_common_answer_that_the_policy_does_not_name_is_passed_on(
    routed: Proxy, method: str, on: list[str]
) -> None:
    with backends(3) as peers:
        push(routed, peers, retry={"on": on})
        for status in (403, 404, 429):
            for backend in peers:
                backend.status = status
            before = sum(seen(peers))
            for _ in range(4):
                answer = request(routed.http_port, method=method)
                assert (answer.status, answer.text[0]) == (status, "b")
            assert sum(seen(peers)) == before + 4


def test_common_answers_that_the_policy_names_are_tried_again(proxy: Proxy) -> None:
    """Also where a peer is dead, with a context root and a body, and by whoever had to wait."""
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/app/!": A}}))
    dead = peer(free_port(), id="dead")
    retry = {"on": ["error", "http_404", "http_429"]}
    with backends(3) as peers, ThreadPoolExecutor() as pool:

        def ask(path: str = "/app/echo?q=1") -> tuple[int, bytes]:
            answer = request(proxy.http_port, path, method="PUT", body=b"x" * 100_000)
            return answer.status, answer.body

        every = [b.peer() for b in peers]
        proxy.admin.put({A: with_policy(*every, dead, passive=NEVER, retry=retry)})
        peers[0].status, peers[1].status = 404, 429
        for _ in range(12):
            assert ask() == (200, b"x" * 100_000)
        assert {one.path for b in peers for one in b.requests} == {"/echo?q=1"}
        assert min(seen(peers)) > 0
        peers[2].status = 404
        proxy.admin.patch({A: with_policy(*every, passive=NEVER, retry=retry)})
        before = sum(seen(peers))
        status, body = ask()
        assert (status in (404, 429), body) == (True, b"x" * 100_000)  # the last one's own answer
        assert sum(seen(peers)) == before + 3
        for status in (500, 503):
            for backend in peers:
                backend.status = status
            before = sum(seen(peers))
            assert ask()[0] == status
            assert sum(seen(peers)) == before + 1
        # Through a hold, and through a queue.
        peers[2].status = 200
        proxy.admin.put({A: with_policy(hold=20.0, passive=NEVER, retry=retry)})
        held = pool.submit(ask)
        wait_until(
            lambda: proxy.admin.metrics().get('tidegate_requests_in_flight{upstream="a.test/"}')
        )
        proxy.admin.put({A: with_policy(peers[2].peer(), hold=20.0, passive=NEVER, retry=retry)})
        assert held.result() == (200, b"x" * 100_000)
        proxy.admin.put({})
        peers[0].status = 404
        both = [peers[0].peer(), peers[2].peer()]
        limits = {"max_conns": 1, "queue": 5, "queue_timeout": 20}
        proxy.admin.put({A: with_policy(*both, passive=NEVER, retry=retry, **limits)})
        answers = [pool.submit(ask) for _ in range(5)]
        assert {a.result() for a in answers} == {(200, b"x" * 100_000)}


@pytest.mark.parametrize(
    ("method", "on", "site_has"),
    [
        ("POST", ["error", "http_503"], "error timeout"),
        ("POST", ["error", "http_503"], "off"),
        ("GET", ["error", "timeout"], "off"),
        ("PUT", ["error", "timeout"], "off"),
    ],
)
def test_an_answer_that_cannot_be_asked_for_again_is_passed_on(
    proxy: Proxy, method: str, on: list[str], site_has: str
) -> None:
    """Whatever its status is, and also where another peer has failed before."""
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}, retries=site_has))
    dead = [peer(free_port(), id=f"dead{n}") for n in range(2)]
    with Backend("b0") as backend:
        for status in (403, 404, 429, 500, 502, 503, 504):
            proxy.admin.put({})
            proxy.admin.put(
                {A: with_policy(backend.peer(), *dead, passive=NEVER, retry={"on": on})}
            )
            backend.status = status
            for _ in range(6):
                answer = request(proxy.http_port, method=method)
                assert (answer.status, answer.text) == (status, "b0")
        assert len(backend.requests) == 7 * 6


def test_a_context_root_and_a_body_survive_a_retry_on_a_status(proxy: Proxy) -> None:
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/app/!": A}}))
    with backends(2) as peers:
        peers[0].status = 503
        push(proxy, peers, retry={"on": ["http_503"]})
        for _ in range(4):
            answer = request(proxy.http_port, "/app/echo?q=1", method="PUT", body=b"x" * 100_000)
            assert (answer.status, len(answer.body)) == (200, 100_000)
        assert {one.path for b in peers for one in b.requests} == {"/echo?q=1"}
        assert len(peers[0].requests) > 0


@pytest.mark.parametrize("on", [["error", "http_503"], ["error", "http_503", "non_idempotent"]])
def test_a_post_that_was_sent_is_not_sent_again_unless_the_policy_says_so(
    routed: Proxy, on: list[str]
) -> None:
    allowed = "non_idempotent" in on
    with backends(2) as peers:
        push(routed, peers, retry={"on": on})
        assert request(routed.http_port, "/reset", method="POST", body=b"x").status == 502
        assert sum(seen(peers)) == (2 if allowed else 1)
        peers[0].status = peers[1].status = 503
        before = sum(seen(peers))
        assert request(routed.http_port, method="POST", body=b"x").status == 503
        assert sum(seen(peers)) == before + (2 if allowed else 1)


def test_a_post_that_was_not_sent_goes_to_another_peer(routed: Proxy, backend: Backend) -> None:
    dead = [peer(free_port(), id=f"dead{n}") for n in range(3)]
    for on in ([], ["error"], ["error", "http_500"]):
        retry = {"on": on, "tries": 4}
        routed.admin.put({})
        routed.admin.put({A: with_policy(backend.peer(), *dead, retry=retry)})
        for _ in range(4):
            answer = request(routed.http_port, "/echo", method="POST", body=b"once")
            assert (answer.status, answer.body) == (200, b"once")
    assert len(backend.requests) == 12


def test_no_peer_that_has_seen_a_request_gets_it_again_also_when_it_was_held(
    routed: Proxy,
) -> None:
    with backends(2) as peers, ThreadPoolExecutor() as pool:
        routed.admin.put({A: {**with_policy(peers[0].peer(), passive=NEVER), "hold": 2.0}})
        wait_until(lambda: routed.admin.live(A) == {"b0": "up"})
        answer = pool.submit(request, routed.http_port, "/reset")
        wait_until(lambda: peers[0].requests)
        every = [b.peer() for b in peers]
        routed.admin.patch({A: {**with_policy(*every, passive=NEVER), "hold": 2.0}})
        assert answer.result().status == 502
        assert seen(peers) == [1, 1]


def test_no_other_try_begins_when_the_time_is_over(routed: Proxy) -> None:
    with backends(4) as peers:
        push(
            routed,
            peers,
            retry={"on": ["timeout"], "timeout": 0.25},
            timeouts={"read": 0.2},
        )
        assert request(routed.http_port, "/sleep/5").status == 504
        assert sum(seen(peers)) == 2
        series = 'tidegate_retries_refused_total{upstream="a.test/",reason="timeout"}'
        wait_until(lambda: routed.admin.metrics().get(series) == 1)


def test_retries_stay_within_their_budget(make_proxy: Callable[..., Proxy]) -> None:
    """In each worker its share of the requests, rounded up."""
    proxy = make_proxy(workers=2)
    proxy.start()
    proxy.admin.site(site(proxy.http_port, {"a.test": {"/": A}}))
    with backends(4) as peers:
        push(proxy, peers, retry={"on": ["error", "http_503"], "budget": 0.2})
        for backend in peers:
            backend.status = 503
        for number in range(60):
            path = "/reset" if number % 2 else "/"
            assert request(proxy.http_port, path).status in (502, 503)
        assert 60 < sum(seen(peers)) <= 60 + 12 + 2
        series = 'tidegate_retries_refused_total{upstream="a.test/",reason="budget"}'
        wait_until(lambda: proxy.admin.metrics().get(series, 0) > 10)


def test_retried_requests_are_counted_by_how_they_end(routed: Proxy) -> None:
    with backends(2) as peers:
        push(routed, peers, retry={"on": ["http_503"]})
        peers[0].status = 503
        for _ in range(6):
            assert request(routed.http_port).status == 200
        peers[1].status = 503
        for _ in range(4):
            assert request(routed.http_port).status == 503

        def count(result: str) -> float:
            name = f'tidegate_retried_requests_total{{upstream="a.test/",result="{result}"}}'
            return routed.admin.metrics().get(name, 0)

        retries = 'tidegate_upstream_retries_total{upstream="a.test/"}'
        wait_until(lambda: count("failed") == 4)
        wait_until(lambda: count("ok") + count("failed") == routed.admin.metrics().get(retries))


def test_an_upstreams_timeouts_are_its_own(routed: Proxy) -> None:
    with backends(2) as (quick, patient):
        hosts = {"a.test": {"/": A}, "b.test": {"/": "b"}}
        routed.admin.site(site(routed.http_port, hosts))
        routed.admin.put(
            {
                A: with_policy(quick.peer(), timeouts={"read": 0.1}),
                "b": with_policy(patient.peer()),
            }
        )
        assert request(routed.http_port, "/sleep/0.6").status == 504
        assert request(routed.http_port, "/sleep/0.6", host="b.test").status == 200
        routed.admin.patch({A: with_policy(quick.peer(), timeouts={"read": 5})})
        assert request(routed.http_port, "/sleep/0.6").status == 200


CIRCUIT = {"error_ratio": 0.5, "min_requests": 10, "window": 60, "open": 0.5}


def circuit(proxy: Proxy) -> str:
    state: str = proxy.admin.shown(A)["live"]["circuit"]
    return state


def test_a_circuit_opens_tries_one_request_at_a_time_and_closes(routed: Proxy) -> None:
    with backends(2) as peers, ThreadPoolExecutor() as pool:
        push(routed, peers, circuit=CIRCUIT)
        for backend in peers:
            backend.status = 500
        for _ in range(9):
            assert request(routed.http_port).status == 500
        assert circuit(routed) == "closed"
        assert request(routed.http_port).status == 500
        wait_until(lambda: circuit(routed) == "open")
        before = sum(seen(peers))
        for _ in range(20):  # in every worker, at once, and by none of the peers
            answer = request(routed.http_port)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"
            assert "Service Unavailable" in answer.text
        assert sum(seen(peers)) == before
        wait_until(lambda: circuit(routed) == "half_open")
        answers = [pool.submit(request, routed.http_port, "/sleep/0.2") for _ in range(12)]
        assert sorted({a.result().status for a in answers}) == [500, 503]
        assert sum(seen(peers)) == before + 1
        wait_until(lambda: circuit(routed) == "open")  # the one that tried has failed
        for backend in peers:
            backend.status = 200
        wait_until(lambda: request(routed.http_port).status == 200)
        wait_until(lambda: circuit(routed) == "closed")
        assert {request(routed.http_port).status for _ in range(20)} == {200}
        metrics = routed.admin.metrics()
        assert metrics['tidegate_circuit_state{upstream="a.test/",state="closed"}'] == 1
        wait_until(
            lambda: (
                routed.admin.metrics().get('tidegate_circuit_opened_total{upstream="a.test/"}') == 2
            )
        )


def test_a_circuit_stays_closed_below_its_ratio(routed: Proxy) -> None:
    with backends(3) as peers:
        push(routed, peers, circuit=CIRCUIT, retry={"tries": 1})
        peers[0].status = 503
        for _ in range(45):
            request(routed.http_port)
        assert circuit(routed) == "closed"


def test_a_circuit_stays_open_through_pushes_and_goes_with_the_upstream(routed: Proxy) -> None:
    with backends(2) as peers:
        push(routed, peers, circuit={**CIRCUIT, "open": 60})
        for backend in peers:
            backend.status = 500
        for _ in range(10):
            request(routed.http_port)
        wait_until(lambda: circuit(routed) == "open")
        push(routed, peers[:1], circuit={**CIRCUIT, "open": 60})
        assert request(routed.http_port).status == 503
        routed.admin.put({})
        push(routed, peers, circuit={**CIRCUIT, "open": 60})
        assert (circuit(routed), request(routed.http_port).status) == ("closed", 500)


def test_a_canary_serves_while_the_circuit_of_where_its_requests_come_from_is_open(
    routed: Proxy,
) -> None:
    with backends(2) as (old, new):
        old.status = 500
        policy = {"circuit": {**CIRCUIT, "open": 60}}
        routed.admin.put({A: with_policy(old.peer(), **policy), "next": upstream(new.peer())})
        for _ in range(10):
            request(routed.http_port)
        wait_until(lambda: circuit(routed) == "open")
        rule = {"upstream": "next", "weight": 100}
        routed.admin.patch({A: with_policy(old.peer(), canary=rule, **policy)})
        assert {request(routed.http_port).text for _ in range(10)} == {new.name}
        assert circuit(routed) == "open"


def test_a_request_that_tries_a_canarys_circuit_says_nothing_of_the_other_one(
    routed: Proxy,
) -> None:
    """It fails there, goes back, and is no verdict on the upstream that it came from."""
    with backends(2) as (old, new):
        new.status = 500
        rule = {"upstream": "next", "weight": 100}
        canary = {"circuit": {**CIRCUIT, "open": 0.3}, "retry": {"on": ["error"]}, "passive": NEVER}
        main = {"circuit": CIRCUIT, "passive": NEVER, "canary": rule}
        routed.admin.put(
            {A: with_policy(old.peer(), **main), "next": with_policy(new.peer(), **canary)}
        )

        def of_canary() -> str:
            state: str = routed.admin.shown("next")["live"]["circuit"]
            return state

        for _ in range(10):
            assert request(routed.http_port).status == 500
        wait_until(lambda: of_canary() == "open")
        assert {request(routed.http_port).text for _ in range(6)} == {old.name}
        wait_until(lambda: of_canary() == "half_open")
        old.status = 500
        assert request(routed.http_port, "/reset").status == 502
        assert new.requests[-1].path == "/reset"
        assert circuit(routed) == "closed"
        wait_until(lambda: of_canary() == "open")


def test_a_circuit_counts_no_request_that_found_no_peer(routed: Proxy) -> None:
    routed.admin.put(
        {A: {**upstream(), "policy": {"algorithm": "round_robin", "circuit": CIRCUIT}}}
    )
    for _ in range(12):
        assert request(routed.http_port).headers["retry-after"] == "5"
    assert circuit(routed) == "closed"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_clients_connection_is_closed_whatever_keeps_a_request_from_a_peer(
    routed: Proxy, method: str
) -> None:
    """A policy's own retries, no other peer, an open circuit, a limit with and without a queue."""
    client = Client(routed.http_port)
    with backends(2) as peers:
        push(routed, peers, retry={"on": ["error", "http_503"]})
        peers[0].status = 503
        for _ in range(4):
            assert client.status(method) in ((200,) if method == "GET" else (200, 503))
        assert [client.status(method, "/reset") for _ in range(3)] == [502] * 3
        peers[0].status = 200
        push(routed, peers)
        assert [client.status(method, "/reset") for _ in range(3)] == [502] * 3
        push(routed, peers, circuit={**CIRCUIT, "open": 60})
        for _ in range(10):
            assert request(routed.http_port, "/reset", method="POST").status == 502
        wait_until(lambda: circuit(routed) == "open")
        assert [client.status(method) for _ in range(3)] == [503] * 3
    with Backend("slow", delay=0.2) as slow, ThreadPoolExecutor() as pool:
        routed.admin.put({})
        for queue, status in ((0, 503), (5, 200)):
            push(routed, [slow], max_conns=1, queue=queue)
            first = pool.submit(request, routed.http_port)
            wait_until(lambda: slow.busy == 1)
            assert client.status(method) == status
            assert first.result().status == 200
