"""Discovery on a real Swarm and on a real engine: in both modes, through restarts."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import pytest

from agent.compile import compile_snapshot
from agent.config.settings import Settings
from agent.discovery import Source, build_sources
from agent.model import Instance, InstanceState, Snapshot, SourceSnapshot, Workload
from tests.lab import Lab, Node, wait_for
from tests.lab.builder import APP, docker_command

pytestmark = pytest.mark.timeout(240)

NET = "discovery-net"
WEB = "discovery-web"


class Follower:
    """A running source, and when it published what."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.published: list[tuple[float, SourceSnapshot]] = []

    def publish(self, snapshot: SourceSnapshot) -> None:
        self.published.append((time.time(), snapshot))

    def workload(self, name: str = WEB) -> Workload | None:
        if not self.published:
            return None
        workloads = self.published[-1][1].workloads.values()
        return next((w for w in workloads if w.name == name), None)

    def instances(self, state: InstanceState, name: str = WEB) -> list[Instance]:
        workload = self.workload(name)
        return [i for i in workload.instances if i.state is state] if workload else []

    def up(self, count: int, name: str = WEB) -> bool:
        """That many are up, and nothing drains."""
        return len(self.instances(InstanceState.UP, name)) == count and not self.instances(
            InstanceState.DRAINING, name
        )

    def first_seen(self, identity: str, state: InstanceState) -> float:
        """Unix time at which an instance was first published in a state."""
        for at, snapshot in self.published:
            for workload in snapshot.workloads.values():
                for instance in workload.instances:
                    if (instance.id, instance.state) == (identity, state):
                        return at
        raise AssertionError(f"{identity} was never {state}")


def settings(node: Node, **fields: object) -> Settings:
    values = {"docker_url": f"unix://{node.socket}", "watch_socket": str(node.control_socket)}
    return Settings(**(values | fields))  # type: ignore[arg-type]


@contextmanager
def following(options: Settings) -> Iterator[Follower]:
    (source,) = build_sources(options)
    follower, stop = Follower(source), threading.Event()
    thread = threading.Thread(target=source.run, args=(follower.publish, stop))
    thread.start()
    try:
        wait_for(lambda: follower.published, 20, "a first snapshot")
        yield follower
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def signals(lab: Lab) -> Iterator[dict[str, float]]:
    """When each task's container was sent its stop signal, by task id, from the nodes' events."""
    heard: dict[str, float] = {}

    def read(stream: subprocess.Popen[str]) -> None:
        assert stream.stdout is not None
        for line in stream.stdout:
            event = json.loads(line)
            task = event["Actor"]["Attributes"].get("com.docker.swarm.task.id")
            if task:
                heard.setdefault(task, event["timeNano"] / 1e9)

    arguments = ("events", "--filter=event=kill", "--format={{json .}}")
    streams = [
        subprocess.Popen(
            [docker_command(), f"--host=unix://{node.socket}", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in lab.nodes
    ]
    for stream in streams:
        threading.Thread(target=read, args=(stream,), daemon=True).start()
    try:
        yield heard
    finally:
        for stream in streams:
            stream.terminate()
            stream.wait()


@pytest.fixture(scope="module", autouse=True)
def _leave_it_empty(lab: Lab) -> Iterator[None]:
    yield
    lab.reset()


@pytest.fixture(name="swarm")
def _swarm(lab: Lab) -> Lab:
    """A Swarm with one service of two tasks, and nothing else."""
    lab.reset()
    lab.create_overlay(NET)
    create(lab, WEB, "--replicas=2", "--label=interlock.hostname=web")
    return lab


def create(lab: Lab, name: str, *options: str) -> None:
    arguments = ["--no-resolve-image", "--detach", f"--name={name}", f"--network={NET}"]
    lab.docker(lab.manager, "service", "create", *arguments, *options, APP)


def service(lab: Lab, *arguments: str) -> None:
    lab.docker(lab.manager, "service", *arguments)


@pytest.fixture(name="follower", params=["watch", "poll"])
def _follower(swarm: Lab, request: pytest.FixtureRequest) -> Iterator[Follower]:
    watch = "on" if request.param == "watch" else "off"
    with following(settings(swarm.manager, watch=watch)) as follower:
        assert follower.source.status.mode == request.param
        wait_for(lambda: follower.up(2), 40, "two tasks up")
        yield follower


@pytest.mark.parametrize("order", ["stop-first", "start-first"])
def test_in_an_update_every_task_drains_before_it_is_told_to_stop(
    swarm: Lab, follower: Follower, order: str
) -> None:
    old = {instance.id for instance in follower.instances(InstanceState.UP)}
    with signals(swarm) as signalled:
        service(swarm, "update", "--force", "--detach", f"--update-order={order}", WEB)
        wait_for(lambda: follower.up(2) and not old & _ids(follower), 60, "both tasks are replaced")
        wait_for(lambda: old <= signalled.keys(), 10, "both were signalled")
    for task in old:
        lead = signalled[task] - follower.first_seen(task, InstanceState.DRAINING)
        assert lead > 1.0, f"task {task} was known to end only {lead:.2f} s before its signal"


def test_scaling_and_labels(swarm: Lab, follower: Follower) -> None:
    service(swarm, "scale", "--detach", f"{WEB}=3")
    wait_for(lambda: follower.up(3), 30, "three up")
    workload = follower.workload()
    assert workload is not None
    assert workload.wanted == 3
    assert workload.networks == (NET,)
    service(swarm, "scale", "--detach", f"{WEB}=0")
    wait_for(lambda: len(follower.instances(InstanceState.DRAINING)) == 3, 10, "all drain at once")
    wait_for(lambda: _wanted(follower) == 0 and not _ids(follower), 30, "none left")
    service(swarm, "update", "--detach", "--label-add=interlock.weight=7", WEB)
    wait_for(
        lambda: (w := follower.workload()) and w.labels.get("interlock.weight") == "7",
        10,
        "the label",
    )


def test_a_service_that_is_removed_goes_and_comes_back(swarm: Lab, follower: Follower) -> None:
    service(swarm, "rm", WEB)
    wait_for(lambda: follower.workload() is None, 10, "the service is gone")
    create(swarm, WEB, "--replicas=1", "--publish=mode=host,target=8080,published=18099")
    wait_for(lambda: follower.up(1), 30, "it is back")
    (instance,) = follower.instances(InstanceState.UP)
    assert [(p.target, p.published) for p in instance.published] == [(8080, 18099)]
    assert instance.node_address in {node.address for node in swarm.nodes}
    assert [a.network for a in instance.attachments] == [NET]


def test_tasks_of_a_drained_node_drain_and_come_up_elsewhere(
    swarm: Lab, follower: Follower
) -> None:
    create(swarm, "discovery-everywhere", "--mode=global")
    wait_for(lambda: follower.up(2, "discovery-everywhere"), 30, "one on each node")
    worker = swarm.workers[0]
    swarm.docker(swarm.manager, "node", "update", "--availability=drain", worker.name)
    wait_for(
        lambda: any(
            i.node == worker.name
            for i in follower.instances(InstanceState.DRAINING, "discovery-everywhere")
        ),
        10,
        "the worker's task drains",
    )
    wait_for(
        lambda: (
            follower.up(2)
            and follower.up(1, "discovery-everywhere")
            and _wanted(follower, "discovery-everywhere") == 1
        ),
        40,
        "all on the manager",
    )
    nodes = {i.node for i in follower.instances(InstanceState.UP)}
    assert nodes == {swarm.manager.name}


def test_a_restarted_manager_is_found_again_and_nothing_shrinks_meanwhile(
    swarm: Lab, follower: Follower
) -> None:
    names = {w.name for w in follower.published[-1][1].workloads.values()}
    mode = follower.source.status.mode
    since = len(follower.published)
    # Killed, so that its containers go on: all that there was is still there.
    swarm.stop_dockerd(swarm.manager, signal.SIGKILL)
    wait_for(lambda: follower.source.status.last_error, 10, "the loss is noticed")
    assert not follower.source.status.connected
    assert len(follower.published) == since
    swarm.start_dockerd(swarm.manager)
    swarm.wait_ready()
    wait_for(lambda: not follower.source.status.last_error, 30, "it is connected again")
    wait_for(lambda: follower.source.status.mode == mode, 30, f"{mode} mode again")
    service(swarm, "update", "--detach", "--label-add=after=restart", WEB)
    wait_for(
        lambda: (w := follower.workload()) and w.labels.get("after") == "restart", 20, "the label"
    )
    for _, snapshot in follower.published[since:]:
        assert {w.name for w in snapshot.workloads.values()} >= names


def test_without_the_socket_it_polls_and_says_why(swarm: Lab) -> None:
    with following(settings(swarm.manager, watch_socket="/nonexistent/control.sock")) as follower:
        status = follower.source.status
        assert status.mode == "poll"
        assert "there is no socket /nonexistent/control.sock" in status.mode_reason


def test_a_lost_nodes_tasks_are_gone(swarm: Lab) -> None:
    create(swarm, "discovery-everywhere", "--mode=global")
    worker = swarm.workers[0]
    with following(settings(swarm.manager)) as follower:
        wait_for(lambda: follower.up(2, "discovery-everywhere"), 30, "one on each node")
        swarm.stop_dockerd(worker, signal.SIGKILL)
        wait_for(
            lambda: (
                [i.node for i in follower.instances(InstanceState.UP, "discovery-everywhere")]
                == [swarm.manager.name]
            ),
            60,
            "the lost node's task takes no traffic",
        )
        swarm.start_dockerd(worker)
        wait_for(lambda: follower.up(2, "discovery-everywhere"), 60, "it is back")


def test_the_watch_survives_a_rotation_of_the_ca(swarm: Lab) -> None:
    with following(settings(swarm.manager, watch="on")) as before:
        swarm.docker(swarm.manager, "swarm", "ca", "--rotate", "--quiet")
        create(swarm, "discovery-rotated", "--replicas=1")
        wait_for(lambda: before.up(1, "discovery-rotated"), 30, "the old stream goes on")
    # A new stream has to trust the new root, and a manager that no longer offers HTTP/2 by name.
    with following(settings(swarm.manager, watch="on")) as after:
        wait_for(lambda: after.source.status.mode == "watch", 30, "a new stream")
        assert after.up(1, "discovery-rotated")


def test_a_worker_says_where_to_go(swarm: Lab) -> None:
    (source,) = build_sources(settings(swarm.workers[0]))
    with pytest.raises(Exception, match="run the agent on a manager"):
        source.read_once()


class TestPlainEngine:
    """A worker's dockerd, seen as an engine of its own."""

    @pytest.fixture(name="docker")
    def _docker(self, swarm: Lab) -> Callable[..., str]:
        return lambda *arguments: swarm.docker(swarm.workers[0], *arguments)

    @pytest.fixture(name="engine")
    def _engine(self, swarm: Lab) -> Iterator[Follower]:
        with following(settings(swarm.workers[0], sources=("engine",))) as follower:
            yield follower

    def test_a_container_drains_from_its_signal_to_its_end(
        self, docker: Callable[..., str], engine: Follower
    ) -> None:
        docker("run", "--detach", "--name=plain-1", "--publish=18077:8080", APP)
        wait_for(lambda: engine.up(1, "plain-1"), 10, "it is up")
        (instance,) = engine.instances(InstanceState.UP, "plain-1")
        assert [(p.target, p.published, p.host) for p in instance.published] == [(8080, 18077, "")]
        assert [a.network for a in instance.attachments] == ["bridge"]
        docker("stop", "--time=5", "plain-1")
        wait_for(lambda: engine.workload("plain-1") is None, 10, "it is gone")
        assert engine.first_seen(instance.id, InstanceState.DRAINING)
        docker("start", "plain-1")
        wait_for(lambda: engine.up(1, "plain-1"), 10, "it is up again")
        docker("rename", "plain-1", "plain-2")
        wait_for(lambda: engine.up(1, "plain-2"), 10, "its new name")
        docker("network", "connect", NET, "plain-2")
        wait_for(
            lambda: (w := engine.workload("plain-2")) and w.networks == ("bridge", NET),
            10,
            "its second network",
        )

    def test_health_decides(self, docker: Callable[..., str], engine: Follower) -> None:
        check = ("--health-cmd=test -e /tmp/ok", "--health-interval=500ms", "--health-retries=1")
        docker("run", "--detach", "--name=checked", "--health-start-period=60s", *check, APP)
        wait_for(lambda: engine.instances(InstanceState.WAITING, "checked"), 10, "it waits")
        docker("exec", "checked", "touch", "/tmp/ok")
        wait_for(lambda: engine.up(1, "checked"), 10, "healthy")
        docker("exec", "checked", "rm", "/tmp/ok")
        wait_for(lambda: engine.instances(InstanceState.WAITING, "checked"), 10, "unhealthy")

    def test_published_ports_are_tcp_and_told_with_their_address(
        self, docker: Callable[..., str], engine: Follower
    ) -> None:
        docker(
            "run", "--detach", "--name=ports", "--publish=18071:8080", "--publish=18072:53/udp",
            "--publish=127.0.0.1:18073:9000", "--publish=[::]:18074:9001", APP,
        )  # fmt: skip
        wait_for(lambda: engine.up(1, "ports"), 10, "it is up")
        (instance,) = engine.instances(InstanceState.UP, "ports")
        assert {(p.target, p.published, p.host) for p in instance.published} == {
            (8080, 18071, ""),
            (9000, 18073, "127.0.0.1"),
            (9001, 18074, "::"),
        }

    def test_in_the_hosts_network_it_is_its_node_that_is_reached(
        self, swarm: Lab, docker: Callable[..., str], engine: Follower
    ) -> None:
        docker("run", "--detach", "--name=hosted", "--network=host", APP)
        wait_for(lambda: engine.up(1, "hosted"), 10, "it is up")
        (instance,) = engine.instances(InstanceState.UP, "hosted")
        assert instance.host_network
        # In a swarm a node knows its address; that of any other engine is where it was reached.
        assert instance.node_address == swarm.workers[0].address
        assert instance.attachments == ()

    def test_restart_pause_and_kill(self, docker: Callable[..., str], engine: Follower) -> None:
        docker("run", "--detach", "--name=fragile", "--memory=32m", "--restart=always", APP)
        wait_for(lambda: engine.up(1, "fragile"), 10, "it is up")
        docker("pause", "fragile")
        wait_for(lambda: engine.instances(InstanceState.WAITING, "fragile"), 10, "paused")
        docker("unpause", "fragile")
        wait_for(lambda: engine.up(1, "fragile"), 10, "it goes on")
        since = len(engine.published)
        docker("restart", "--time=1", "fragile")
        wait_for(lambda: engine.up(1, "fragile"), 10, "restarted")
        states = [_states(snapshot, "fragile") for _, snapshot in engine.published[since:]]
        told = [state for state, _ in groupby(states)]
        assert told == [["draining"], [], ["up"]], "from its signal until it was gone, and back"
        docker("kill", "--signal=9", "fragile")
        wait_for(lambda: engine.workload("fragile") is None, 10, "gone when it is killed")
        docker("start", "fragile")
        wait_for(lambda: engine.up(1, "fragile"), 10, "it is back")

    def test_a_container_that_the_kernel_kills_for_its_memory_is_gone_and_comes_back(
        self, docker: Callable[..., str], engine: Follower
    ) -> None:
        eat = "import time; time.sleep(2); x = b'x' * 10**8; time.sleep(60)"
        docker(
            "run", "--detach", "--name=greedy", "--memory=24m", "--memory-swap=24m",
            "--restart=always", "--entrypoint=python3", APP, "-c", eat,
        )  # fmt: skip
        wait_for(lambda: engine.up(1, "greedy"), 10, "it is up")
        since = len(engine.published)
        wait_for(
            lambda: any(not _states(s, "greedy") for _, s in engine.published[since:]),
            30,
            "gone with the process",
        )
        wait_for(lambda: engine.up(1, "greedy"), 30, "back with the next one")
        state = docker("inspect", "--format={{.RestartCount}} {{.State.OOMKilled}}", "greedy")
        assert int(state.split()[0]) >= 1
        docker("rm", "--force", "greedy")
        wait_for(lambda: engine.workload("greedy") is None, 10, "removed")

    def test_networks_of_a_compose_project_come_and_go(
        self, docker: Callable[..., str], engine: Follower
    ) -> None:
        for network in ("shop_net", "shop_other"):
            docker("network", "create", network)
        try:
            docker(
                "run", "--detach", "--name=shop-web-1", "--network=shop_net",
                "--label=com.docker.compose.project=shop", "--label=interlock.hostname=shop",
                "--label=interlock.network=net", "--label=interlock.port=8080", APP,
            )  # fmt: skip
            wait_for(lambda: engine.up(1, "shop-web-1"), 10, "it is up")
            (instance,) = engine.instances(InstanceState.UP, "shop-web-1")
            (attachment,) = instance.attachments
            desired = compile_snapshot(
                Snapshot({"engine": engine.published[-1][1]}), Settings(docker_url="unix:///x")
            )
            (peer,) = desired.membership.upstreams["shop.local/"].peers
            assert (peer.address, peer.port) == (attachment.address, 8080)
            docker("network", "connect", "shop_other", "shop-web-1")
            wait_for(lambda: _networks(engine) == ("shop_net", "shop_other"), 10, "attached")
            docker("network", "disconnect", "shop_net", "shop-web-1")
            wait_for(lambda: _networks(engine) == ("shop_other",), 10, "detached")
        finally:
            docker("rm", "--force", "shop-web-1")
            docker("network", "rm", "shop_net", "shop_other")

    def test_attach_networks_attaches_proxies_and_only_when_it_is_on(
        self, swarm: Lab, docker: Callable[..., str], engine: Follower
    ) -> None:
        docker("network", "create", "attached")
        try:
            docker("run", "--detach", "--name=proxy", "--label=interlock.ext.name=nginx", APP)
            docker(
                "run", "--detach", "--name=behind", "--network=attached",
                "--label=interlock.hostname=behind", "--label=interlock.network=attached",
                "--label=interlock.port=8080", APP,
            )  # fmt: skip
            wait_for(lambda: engine.up(1, "behind"), 10, "it is up")
            time.sleep(1)
            snapshot = engine.published[-1][1]
            assert snapshot.proxy_networks == ("bridge",)
            desired = compile_snapshot(Snapshot({"engine": snapshot}), Settings())
            assert "docker network connect attached proxy" in desired.rejections[0].hint
            options = settings(swarm.workers[0], sources=("engine",), attach_networks=True)
            with following(options) as attaching:
                wait_for(
                    lambda: attaching.published[-1][1].proxy_networks == ("attached", "bridge"),
                    10,
                    "the proxy is attached",
                )
                after = attaching.published[-1][1]
                desired = compile_snapshot(Snapshot({"engine": after}), options)
                assert not desired.rejections
                assert desired.membership.upstreams["behind.local/"].peers
        finally:
            docker("rm", "--force", "proxy", "behind")
            docker("network", "rm", "attached")


def _states(snapshot: SourceSnapshot, name: str) -> list[str]:
    return [
        str(instance.state)
        for workload in snapshot.workloads.values()
        if workload.name == name
        for instance in workload.instances
    ]


def _networks(follower: Follower, name: str = "shop-web-1") -> tuple[str, ...]:
    workload = follower.workload(name)
    return workload.networks if workload else ()


def _ids(follower: Follower) -> set[str]:
    workload = follower.workload()
    live = workload.instances if workload else ()
    return {instance.id for instance in live if instance.state is not InstanceState.GONE}


def _wanted(follower: Follower, name: str = WEB) -> int | None:
    workload = follower.workload(name)
    return workload.wanted if workload else None
