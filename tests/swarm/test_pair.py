"""The promise on a real two-node Swarm: backends change with no reload and no failed request.

Constant load runs through both OpenResty nodes, with and without keep-alive and never with a
client's retry, while the cluster is changed. Retries of nginx are off (`proxy_next_upstream off`)
but for `kill -9`, in watch mode and in poll mode.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from bench.load import Result
from tests.lab import Lab
from tests.swarm.pair import Pair

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def built(lab: Lab) -> Pair:
    lab.reset()
    pair = Pair(lab)
    pair.build()
    return pair


@pytest.fixture(scope="module", params=["watch", "poll"])
def pair(request: pytest.FixtureRequest, built: Pair) -> Pair:
    """The pair in one of its two modes, with the retries of nginx switched off."""
    built.deploy(watch="on" if request.param == "watch" else "off", next_upstream="off")
    return built


@pytest.fixture
def app(pair: Pair) -> Iterator[str]:
    name = "app"
    yield name
    pair.remove_app(name)


def assert_nothing_failed(results: list[Result], at_least: int = 50) -> None:
    for result in results:
        assert result.failed == 0, (result.failures, result.statuses, result.details)
        assert result.requests >= at_least


@contextlib.contextmanager
def undisturbed(pair: Pair) -> Iterator[None]:
    """Neither a reload nor a worker's death within the block."""
    # A reload is confirmed by the first new worker; the old ones hear of it a moment later.
    pair.lab.wait_for(pair.is_settled, 30, "the last reload is over")
    before = pair.disturbance()
    yield
    assert pair.disturbance() == before


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("order", ["stop-first", "start-first"])
def test_rolling_update_fails_no_request(pair: Pair, app: str, order: str, replicas: int) -> None:
    pair.create_app(app, f"--update-order={order}", "--update-parallelism=2", replicas=replicas)
    with undisturbed(pair), pair.load(app) as results:
        pair.lab.docker(
            pair.lab.manager,
            *("service", "update", "--detach", "--no-resolve-image", "--env-add=VERSION=2", app),
        )
        pair.lab.wait_for(
            lambda: pair.update_done(app, "2", replicas), 120, "the update is done", interval=0.3
        )
        pair.wait_peers(app, replicas)
    assert_nothing_failed(results)
    # Old and new tasks have both served, so the load was there while it happened.
    assert sum(len(result.backends) for result in results) > replicas


def test_task_that_is_slow_to_listen_gets_nothing_before_it_does(pair: Pair, app: str) -> None:
    pair.create_app(app, "--update-order=start-first", replicas=2)
    with undisturbed(pair), pair.load(app) as results:
        pair.lab.docker(
            pair.lab.manager,
            *("service", "update", "--detach", "--no-resolve-image", "--env-add=VERSION=2"),
            *("--env-add=START_DELAY=2", app),
        )
        pair.lab.wait_for(
            lambda: pair.update_done(app, "2", 2), 120, "the update is done", interval=0.3
        )
        pair.wait_peers(app, 2)
    assert_nothing_failed(results)


def test_scale_up_and_down_fails_no_request(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=2)
    with undisturbed(pair), pair.load(app) as results:
        for replicas in (5, 1, 3):
            pair.lab.docker(pair.lab.manager, "service", "scale", "--detach", f"{app}={replicas}")
            pair.wait_peers(app, replicas)
    assert_nothing_failed(results)


def test_global_service_is_routed_on_all_nodes(pair: Pair, app: str) -> None:
    pair.lab.docker(
        pair.lab.manager,
        *("service", "create", "--detach", "--no-resolve-image", "--name", app, "--mode=global"),
        *("--network", "tidegate", "--container-label", f"interlock.hostname={app}"),
        *("--container-label", "interlock.domain=test", "--label", "interlock.port=8080"),
        "tidegate-test/app",
    )
    pair.wait_peers(app, len(pair.lab.nodes))


def test_node_drain_fails_no_request(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=4)
    manager, drained = pair.lab.nodes[:2]
    # The drained node's own OpenResty goes too, so the load is on the other one.
    workers = pair.workers(manager)
    try:
        with pair.load(app, nodes=(manager,)) as results:
            pair.lab.docker(manager, "node", "update", "--availability=drain", drained.name)
            pair.lab.wait_for(
                lambda: not pair.lab.docker(drained, "ps", "--quiet").split(),
                60,
                "the drained node is empty",
            )
            pair.wait_peers(app, 4)
        assert_nothing_failed(results)
        assert pair.workers(manager) == workers
    finally:
        pair.lab.docker(manager, "node", "update", "--availability=active", drained.name)
        pair.lab.wait_for(pair.in_step, 60, "the drained node's OpenResty is back", interval=0.3)


def test_service_removal_and_return_needs_no_reload_and_harms_nobody(pair: Pair, app: str) -> None:
    pair.create_app("bystander", replicas=2)
    try:
        pair.create_app(app, replicas=2)
        with (
            undisturbed(pair),
            pair.load("bystander") as bystander,
            pair.load(app, expect=(200, 503)) as results,
        ):
            pair.remove_app(app)
            pair.lab.wait_for(lambda: not pair.peers(app), 60, "the removed peers are gone")
            pair.create_app(app, replicas=2)
        assert_nothing_failed(bystander)
        # While nobody serves the host it is 503, never a reset, a 404 or a 502.
        assert_nothing_failed(results)
        assert all(set(result.statuses) <= {"200", "503"} for result in results)
    finally:
        pair.remove_app("bystander")


def test_service_without_the_shared_network_is_rejected_with_the_candidates(
    pair: Pair, app: str
) -> None:
    pair.lab.docker(
        pair.lab.manager,
        *("service", "create", "--detach", "--no-resolve-image", "--name", app),
        *("--network", "tidegate", "--label", f"interlock.hostname={app}"),
        *("--label", "interlock.port=8080", "--label", "interlock.network=no-such-net"),
        "tidegate-test/app",
    )

    def rejected() -> list[dict[str, str]]:
        return [r for r in pair.state()["rejections"] if r["subject"] == f"service {app}"]

    rejections = pair.lab.wait_for(rejected, 30, "the service is rejected")
    assert "no-such-net" in rejections[0]["message"]
    assert "tidegate" in rejections[0]["message"] + rejections[0]["hint"]
    assert "no-such-net" in pair.explain(app)


def test_host_mode_ports_are_reached_at_the_node(pair: Pair, app: str) -> None:
    pair.lab.docker(
        pair.lab.manager,
        *("service", "create", "--detach", "--no-resolve-image", "--name", app, "--mode=global"),
        *("--publish", "mode=host,target=8080,published=18080"),
        *("--label", f"interlock.hostname={app}", "--label", "interlock.domain=test"),
        "tidegate-test/app",
    )
    pair.wait_peers(app, len(pair.lab.nodes))
    addresses = {(peer["address"], peer["port"]) for peer in pair.peers(app)}
    assert addresses == {(node.address, 18080) for node in pair.lab.nodes}


def test_change_to_routed_is_measured(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=2)
    pair.lab.docker(pair.lab.manager, "service", "scale", "--detach", f"{app}=4")
    pair.wait_peers(app, 4)
    buckets = re.findall(
        r'^tidegate_change_to_applied_seconds_bucket\{kind="membership",le="([^"]+)"\} (\S+)$',
        pair.agent_metrics(),
        re.MULTILINE,
    )
    counts = {le: float(count) for le, count in buckets}
    assert counts["+Inf"] > 0, "each push of a change is timed"
    within = ", ".join(f"{le} s: {count:.0f}" for le, count in counts.items())
    print(f"change to applied, pushes within {within}")
