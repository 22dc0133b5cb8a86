"""Several addresses of one cluster: managers that die, are demoted, or have lost their quorum."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from agent.discovery import build_sources
from agent.errors import DiscoveryError
from agent.model import InstanceState
from tests.engine.conftest import checked
from tests.lab import Lab, Node, wait_for
from tests.lab.builder import APP
from tests.swarm.pair import own_lab
from tests.swarm.test_discovery import WEB, Follower, following, settings

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def managers(possible: None) -> Iterator[Lab]:
    """Three managers, and a service of two tasks on the last of them."""
    own = Lab.up(own_lab("managers"), nodes=3, managers=3, fresh=True)
    try:
        own.docker(
            own.manager,
            *("service", "create", "--detach", "--no-resolve-image", f"--name={WEB}"),
            *("--replicas=2", "--constraint=node.hostname==node3"),
            *("--label=interlock.hostname=web", "--publish=mode=host,target=8080", APP),
        )
        yield own
    finally:
        Lab.down(own.name)


def urls(*nodes: Node) -> str:
    return ",".join(f"unix://{node.socket}" for node in nodes)


def scale(lab: Lab, by: Node, count: int) -> None:
    """As soon as there is a leader that takes it."""

    def done() -> bool:
        lab.docker(by, "service", "scale", "--detach", f"{WEB}={count}", timeout=15)
        return True

    wait_for(done, 60, f"{by.name} scales to {count}", interval=0.5)


def assert_never_below(follower: Follower, count: int, since: int) -> None:
    for _, snapshot in follower.published[since:]:
        (web,) = [w for w in snapshot.workloads.values() if w.name == WEB]
        up = [i for i in web.instances if i.state is InstanceState.UP]
        assert len(up) >= count


def test_the_leader_dies_and_the_next_manager_is_followed_until_its_watch_is_back(
    managers: Lab,
) -> None:
    first, second, _ = managers.nodes
    options = settings(first, docker_url=urls(first, second), request_timeout=5.0)
    with following(options) as follower:
        wait_for(lambda: follower.up(2), 40, "two tasks up")
        assert follower.source.status.mode == "watch"
        since = len(follower.published)
        managers.stop_dockerd(first, signal.SIGKILL)
        scale(managers, second, 3)
        wait_for(lambda: follower.up(3), 40, "the change is heard of from the second manager")
        status = follower.source.status
        assert (status.mode, status.connected) == ("poll", True)
        assert str(first.control_socket) in status.mode_reason
        managers.start_dockerd(first)
        managers.wait_ready()
        wait_for(lambda: follower.source.status.mode == "watch", 60, "the watch is back")
        assert_never_below(follower, 2, since)
        scale(managers, second, 2)
        wait_for(lambda: follower.up(2), 30, "and heard")


def test_a_manager_that_is_demoted_gives_way_to_the_next(managers: Lab) -> None:
    first, second, _ = managers.nodes
    options = settings(second, docker_url=urls(second, first), watch="off")
    with following(options) as follower:
        wait_for(lambda: follower.up(2), 40, "two tasks up")
        since = len(follower.published)
        managers.docker(first, "node", "demote", second.name)
        try:
            scale(managers, first, 3)
            wait_for(lambda: follower.up(3), 30, "it is heard of from the other manager")
            assert_never_below(follower, 2, since)
            # And whoever starts now passes the worker by.
            (source,) = build_sources(options)
            assert source.read_once().workloads
            told = checked(DOCKER_HOST=urls(second, first))
            assert told["swarm"].startswith("ok: ")
            (alone,) = build_sources(settings(second, watch="off"))
            with pytest.raises(DiscoveryError, match="worker of its swarm"):
                alone.read_once()
        finally:
            managers.docker(first, "node", "promote", second.name)
            scale(managers, first, 2)


def test_a_manager_that_hangs_gives_way_to_the_next(managers: Lab) -> None:
    first, second, _ = managers.nodes
    options = settings(second, docker_url=urls(second, first), watch="off", request_timeout=2.0)
    with following(options) as follower:
        wait_for(lambda: follower.up(2), 40, "two tasks up")
        since = len(follower.published)
        with managers.pause_dockerd(second):
            scale(managers, first, 3)
            wait_for(lambda: follower.up(3), 40, "it is heard of from the other manager")
        assert_never_below(follower, 2, since)
    scale(managers, first, 2)


def test_without_a_quorum_all_that_was_known_stays_and_it_goes_on_with_it(managers: Lab) -> None:
    first, second, third = managers.nodes
    # A dockerd that starts again ends what ran, so the tasks are on the one that stays.
    options = settings(
        third, docker_url=urls(third, second, first), watch="off", request_timeout=3.0
    )
    with following(options) as follower:
        wait_for(lambda: follower.up(2), 40, "two tasks up")
        since = len(follower.published)
        for node in (first, second):
            managers.stop_dockerd(node, signal.SIGKILL)
        wait_for(lambda: follower.source.status.last_error, 60, "the loss is told")
        for node in (first, second):
            managers.start_dockerd(node)
        scale(managers, third, 3)
        wait_for(lambda: follower.up(3), 60, "it goes on")
        assert follower.source.status.last_error == ""
        assert_never_below(follower, 2, since)
