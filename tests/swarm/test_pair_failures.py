"""What dies, and what goes on: tasks killed, agent gone, OpenResty restarted, dockerd restarted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import Lab
from tests.swarm.pair import STACK, Pair, own_lab
from tests.swarm.test_pair import assert_nothing_failed, undisturbed

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[Pair]:
    """The pair as the stack file has it, with nothing changed, on a Swarm of its own.

    A dockerd that comes and goes leaves marks on the overlay's gossip; other tests shall not see
    these, nor these tests those of others.
    """
    own = Lab.up(own_lab("failures"), nodes=2, fresh=True)
    try:
        pair = Pair(own)
        pair.build()
        pair.deploy()
        yield pair
    finally:
        Lab.down(own.name)


@pytest.fixture
def app(pair: Pair) -> Iterator[str]:
    name = "app"
    yield name
    pair.remove_app(name)


def first_container(pair: Pair, app: str) -> str:
    for node in pair.lab.nodes:
        ids = pair.lab.docker(node, "ps", "--quiet", "--filter", f"name={app}.").split()
        if ids:
            return ids[0]
    raise AssertionError(f"no container of {app}")


def test_kill_9_of_a_task_fails_no_request(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=4)
    with undisturbed(pair), pair.load(app) as results:
        for _ in range(3):
            victim = first_container(pair, app)
            pair.lab.kill_task(victim)
            pair.lab.wait_for(
                lambda victim=victim: all(
                    victim not in pair.lab.docker(node, "ps", "--quiet") for node in pair.lab.nodes
                ),
                30,
                "the killed container is gone",
            )
            pair.wait_peers(app, 4)
    assert_nothing_failed(results)


def test_update_of_a_host_mode_service_fails_no_request(pair: Pair, app: str) -> None:
    """Such a task gets no two seconds between its withdrawal and its SIGTERM."""
    pair.lab.docker(
        pair.lab.manager,
        *("service", "create", "--detach", "--no-resolve-image", "--name", app),
        *("--publish", "mode=host,target=8080,published=18080", "--env", "VERSION=1"),
        *("--label", f"interlock.hostname={app}", "--label", "interlock.domain=test"),
        *("--update-monitor=100ms", "tidegate-test/app"),
    )
    pair.wait_peers(app, 1)
    with undisturbed(pair), pair.load(app) as results:
        pair.lab.docker(
            pair.lab.manager,
            *("service", "update", "--detach", "--no-resolve-image", "--env-add=VERSION=2", app),
        )
        pair.lab.wait_for(
            lambda: pair.update_done(app, "2", 1), 60, "the update is done", interval=0.3
        )
        pair.wait_peers(app, 1)
    assert_nothing_failed(results)


def test_joining_another_network_takes_nothing_down(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=2)
    pair.lab.create_overlay("extra")
    with undisturbed(pair), pair.load(app) as results:
        pair.lab.docker(
            pair.lab.manager,
            *("service", "update", "--detach", "--no-resolve-image", "--network-add=extra", app),
        )
        pair.lab.wait_for(
            lambda: pair.update_done(app, "1", 2), 60, "the update is done", interval=0.3
        )
        pair.wait_peers(app, 2)
    assert_nothing_failed(results)


def test_traffic_goes_on_without_the_agent_and_it_converges_when_it_is_back(
    pair: Pair, app: str
) -> None:
    pair.create_app(app, replicas=2)
    try:
        with undisturbed(pair), pair.load(app) as results:
            pair.scale_agent(0)
            pair.lab.docker(pair.lab.manager, "service", "scale", "--detach", f"{app}=4")
            pair.lab.wait_for(
                lambda: (
                    pair.lab.docker(
                        pair.lab.manager,
                        *("service", "ps", "--filter=desired-state=running"),
                        *("--format={{.CurrentState}}", app),
                    ).count("Running")
                    == 4
                ),
                60,
                "the app is scaled without the agent",
            )
            pair.scale_agent(1)
            pair.wait_peers(app, 4)
        assert_nothing_failed(results)
    finally:
        pair.scale_agent(1)


def test_openresty_restarted_without_the_agent_serves_at_once(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=2)
    node = pair.lab.nodes[1]
    old = pair.openresty_container(node)
    pair.scale_agent(0)
    try:
        pair.lab.docker(node, "kill", old)

        def fresh() -> str:
            container = pair.openresty_container(node)
            return container if container != old else ""

        pair.lab.wait_for(fresh, 60, "OpenResty runs again")
        status = pair.lab.wait_for(lambda: pair.admin(node, "/v1/status"), 30, "it answers")
        assert status["source"] == "disk"
        answer = pair.lab.client_exec(
            *("curl", "--silent", "--include", "--header", f"Host: {app}.test"),
            f"http://{node.address}/",
        )
        assert answer.stdout.startswith("HTTP/1.1 200"), answer.stdout
    finally:
        pair.scale_agent(1)
        pair.lab.wait_for(pair.in_step, 60, "all are in step again", interval=0.3)


def test_hanging_engine_leaves_traffic_alone(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=2)
    with undisturbed(pair), pair.load(app) as results:
        with pair.lab.pause_dockerd(pair.lab.manager):
            answers = [
                pair.lab.client_exec(
                    *("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"),
                    *("--header", f"Host: {app}.test", pair.urls()[0]),
                ).stdout
                for _ in range(40)
            ]
        pair.lab.wait_for(pair.in_step, 60, "all are in step again", interval=0.3)
    assert answers == ["200"] * 40
    assert_nothing_failed(results, at_least=10)


def test_containers_are_confined(pair: Pair) -> None:
    """No Docker socket in the proxy, no root in it, a read-only root file system in both."""
    for node in pair.lab.nodes:
        container = pair.openresty_container(node)
        mounts = pair.lab.docker(node, "inspect", "--format={{json .Mounts}}", container)
        assert "docker.sock" not in mounts
        user = pair.lab.docker(node, "exec", container, "id", "-u").strip()
        assert user != "0"
        touched = pair.lab.docker(node, "exec", container, "sh", "-c", "touch /x 2>&1 || true")
        assert "Read-only" in touched
    services = pair.lab.docker(
        pair.lab.manager, "service", "inspect", f"{STACK}_agent", "--format={{json .Spec}}"
    )
    assert '"ReadOnly":true' in services


def test_restart_of_the_managers_dockerd_heals_by_itself(pair: Pair, app: str) -> None:
    pair.create_app(app, replicas=4)
    pair.lab.restart_dockerd(pair.lab.manager)
    # Docker itself takes a minute: a worker looks for a lost manager in the overlay's gossip
    # every 60 s, and until then no node reaches the other one's tasks.
    pair.lab.wait_for(pair.in_step, 150, "all are in step again", interval=0.5)
    pair.wait_peers(app, 4, timeout=90)
    with undisturbed(pair), pair.load(app) as results:
        pair.lab.docker(pair.lab.manager, "service", "scale", "--detach", f"{app}=2")
        pair.wait_peers(app, 2)
    assert_nothing_failed(results)
