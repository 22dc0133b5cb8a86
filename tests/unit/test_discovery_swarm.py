"""The Swarm's source: the watch's recipe, what it does when the watch breaks, and polling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from agent.config.settings import Settings
from agent.discovery import swarm, swarm_rest
from agent.discovery.cluster import Change, Task, TaskState
from agent.discovery.swarm import SwarmSource
from agent.errors import (
    DiscoveryError,
    DockerRefused,
    DockerUnavailable,
    WatchCompacted,
    WatchUnavailable,
)
from agent.model import InstanceState
from tests.unit.discovery_fakes import (
    FakeEngine,
    FakeManager,
    FakeWatch,
    Following,
    Heard,
    following,
    named,
    only,
    rest_task,
    swarm_engine,
    touched,
)

pytestmark = pytest.mark.timeout(30)


class Rig:
    """A source between a fake engine and a fake manager."""

    def __init__(self, **settings: Any) -> None:
        self.engine: FakeEngine = swarm_engine()
        self.manager = FakeManager()
        self.heard = Heard()
        values: dict[str, Any] = {"poll_interval": 0.02, "resync_interval": 60.0}
        self.source = SwarmSource(
            Settings(**(values | settings)),
            observer=self.heard,
            connect=self.engine.connect,
            open_watch=self.manager.open,
        )

    @property
    def last_error(self) -> str:
        return self.source.status.last_error

    def task(self, service: str, **fields: Any) -> Task:
        """The source's view of a running task, changed."""
        record = swarm_rest.task(rest_task(self.engine, service))
        return replace(record, **({"version": record.version + 1000} | fields))

    def draining(self, service: str, **fields: Any) -> Change:
        return Change("task", self.task(service, desired=TaskState.SHUTDOWN, **fields))


@pytest.fixture(name="rig")
def _rig() -> Rig:
    return Rig()


@pytest.fixture(name="watching")
def _watching(rig: Rig) -> Iterator[Following]:
    with following(rig.source) as follower:
        follower.until(lambda: rig.source.status.mode == "watch" and follower.snapshots)
        yield follower


@pytest.fixture(name="no_wait", autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "DOUBT_INTERVAL", 0.02)


class TestWatching:
    def test_the_watch_stands_before_anything_is_listed(self, rig: Rig) -> None:
        listed_before: list[bool] = []
        rig.manager.before = lambda watch: listed_before.append("/tasks" in rig.engine.calls)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
        assert listed_before == [False]
        assert rig.manager.attempts == [0]
        assert rig.manager.watches[0].root.startswith("-----BEGIN CERTIFICATE-----")

    def test_a_change_between_watch_and_list_is_neither_lost_nor_undone(self, rig: Rig) -> None:
        def change_at_once(watch: FakeWatch) -> None:
            watch.send(rig.draining("meshed"))
            # Heard of late: the list has a newer version already.
            watch.send(Change("task", rig.task("proxy", version=1, desired=TaskState.SHUTDOWN)))

        rig.manager.before = change_at_once
        with following(rig.source) as follower:
            follower.until(lambda: follower.states("meshed") == ["draining"])
            assert follower.states("proxy") == ["up"]

    def test_the_end_of_a_task_is_published_when_it_is_decided(
        self, rig: Rig, watching: Following
    ) -> None:
        before = watching.last
        heard_at = rig.manager.watch.send(rig.draining("meshed"))
        after = watching.until(lambda: watching.states("meshed") == ["draining"])
        assert after.changed_at == heard_at
        assert named(after, "shop_web") is named(before, "shop_web")

    def test_what_one_transaction_changes_is_one_snapshot(
        self, rig: Rig, watching: Following
    ) -> None:
        count = len(watching.snapshots)
        new = rig.task("meshed", id="new", version=5000)
        rig.manager.watch.send(rig.draining("meshed"), Change("task", new))
        watching.until(lambda: len(watching.snapshots) > count)
        assert sorted(watching.states("meshed")) == ["draining", "up"]
        assert len(watching.snapshots) == count + 1

    def test_a_service_comes_changes_and_goes(self, rig: Rig, watching: Following) -> None:
        raw = next(s for s in rig.engine.answers["/services"] if s["Spec"]["Name"] == "zero")
        service = replace(swarm_rest.service(raw), version=5000, labels={"a": "b"}, replicas=4)
        rig.manager.watch.send(Change("service", service))
        snapshot = watching.until(lambda: getattr(watching.workload("zero"), "wanted", 0) == 4)
        changed = named(snapshot, "zero")
        assert changed is not None
        assert changed.labels == {"a": "b"}
        rig.manager.watch.send(Change("service", service, removed=True))
        watching.until(lambda: watching.workload("zero") is None)

    def test_events_are_counted_by_kind(self, rig: Rig, watching: Following) -> None:
        rig.manager.watch.send(rig.draining("meshed"))
        watching.until(lambda: watching.states("meshed") == ["draining"])
        assert rig.heard.events == [("swarm", "task")]
        assert rig.source.status.events == 1
        assert rig.heard.modes == ["watch"]
        assert rig.heard.syncs == [True]

    def test_while_it_follows_what_it_knows_stays_fresh(
        self, rig: Rig, watching: Following
    ) -> None:
        first = rig.source.status
        time.sleep(0.05)
        second = rig.source.status
        assert second.connected
        assert second.last_success > first.last_success
        assert second.last_change == first.last_change


class TestBrokenWatch:
    def test_it_resumes_from_the_newest_version_without_a_list(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=7000))
        watching.until(lambda: watching.states("meshed") == ["draining"])
        lists = rig.engine.calls.count("/tasks")
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: len(rig.manager.watches) == 2)
        assert rig.manager.attempts == [0, 7000]
        rig.manager.watch.send(rig.draining("proxy", version=7001), version=7002)
        watching.until(lambda: watching.states("proxy") == ["draining"])
        assert rig.engine.calls.count("/tasks") == lists
        assert rig.manager.watches[0].closed

    def test_what_a_resumed_stream_replays_is_history_and_no_news(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=7000))
        watching.until(lambda: watching.states("meshed") == ["draining"])
        count = len(watching.snapshots)

        def replay(watch: FakeWatch) -> None:
            # It came up and went while nobody listened: it must never be seen as up.
            for version, state in ((7001, TaskState.RUNNING), (7002, TaskState.FAILED)):
                task = rig.task("meshed", id="short-lived", version=version, state=state)
                watch.send(Change("task", task))
            watch.send(Change("task", rig.task("meshed", version=7003), removed=True))

        rig.manager.before = replay
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: watching.states("meshed") == [])
        assert len(watching.snapshots) == count + 1
        watching.until(lambda: not rig.last_error)
        assert rig.source.status.connected

    def test_a_watch_that_keeps_breaking_is_not_opened_over_and_over(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=7000))
        watching.until(lambda: watching.states("meshed") == ["draining"])
        rig.manager.before = lambda watch: watch.fail(WatchUnavailable("it breaks at once"))
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: rig.source.status.mode == "poll")
        assert rig.source.status.mode_reason == "it breaks at once"
        attempts = len(rig.manager.attempts)
        time.sleep(0.5)
        assert len(rig.manager.attempts) < attempts + 8

    def test_a_version_that_comes_with_the_transaction_counts_too(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=7000), version=7009)
        watching.until(lambda: watching.states("meshed") == ["draining"])
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: len(rig.manager.watches) == 2)
        assert rig.manager.attempts[-1] == 7009

    def test_when_the_manager_has_compacted_everything_is_listed_anew(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=7000))
        watching.until(lambda: watching.states("meshed") == ["draining"])
        ended = rest_task(rig.engine, "meshed")
        touched(ended, 7001, Status={"State": "shutdown"}, DesiredState="shutdown")
        rig.manager.refuse.append(WatchCompacted("forgotten"))
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: watching.states("meshed") == [])
        assert rig.manager.attempts == [0, 7000, 0]

    def test_without_a_new_watch_it_polls_until_there_is_one(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.closed = WatchUnavailable("no socket")
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: rig.source.status.mode == "poll")
        assert rig.source.status.mode_reason == "no socket"
        touched(rest_task(rig.engine, "meshed"), 7000, DesiredState="shutdown")
        watching.until(lambda: watching.states("meshed") == ["draining"])
        rig.manager.closed = None
        watching.until(lambda: rig.source.status.mode == "watch")
        rig.manager.watch.send(rig.draining("proxy", version=8000))
        watching.until(lambda: watching.states("proxy") == ["draining"])
        assert rig.heard.modes == ["watch", "poll", "watch"]

    def test_after_a_rotation_of_the_ca_the_new_root_is_used(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.engine.answers["/swarm"]["TLSInfo"]["TrustRoot"] = "the new root"
        rig.manager.watch.fail(WatchUnavailable("handshake failed"))
        watching.until(lambda: len(rig.manager.watches) == 2)
        assert rig.manager.watch.root == "the new root"

    def test_an_engine_that_does_not_tell_the_ca_is_polled(self, rig: Rig) -> None:
        rig.engine.failing["/swarm"] = DockerRefused("forbidden by the socket proxy", status=403)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            assert rig.source.status.mode == "poll"
            assert "forbidden by the socket proxy" in rig.source.status.mode_reason

    def test_watch_on_never_polls(self) -> None:
        rig = Rig(watch="on")
        rig.manager.closed = WatchUnavailable("there is no socket")
        with following(rig.source) as follower:
            follower.until(lambda: rig.last_error == "there is no socket")
            assert follower.snapshots == []
            rig.manager.closed = None
            follower.until(lambda: follower.snapshots)
        assert rig.heard.modes == ["watch"]


class TestResync:
    def test_a_list_finds_what_the_stream_did_not_tell(self) -> None:
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            touched(rest_task(rig.engine, "meshed"), 7000, DesiredState="shutdown")
            follower.until(lambda: follower.states("meshed") == ["draining"])

    def test_changes_are_applied_while_a_list_is_read_and_survive_it(self) -> None:
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            old = rest_task(rig.engine, "proxy")
            new = dict(rest_task(rig.engine, "meshed")) | {"ID": "born", "Version": {"Index": 5000}}
            heard: list[int] = []

            def hear_meanwhile(path: str) -> None:
                if path == "/services" and not heard:
                    rig.manager.watch.send(
                        Change("task", swarm_rest.task(new)),
                        Change("task", swarm_rest.task(old), removed=True),
                    )
                    follower.until(lambda: follower.states("meshed") == ["up", "up"])
                    heard.append(len(follower.snapshots))
                elif path == "/nodes" and heard:
                    # The next list has it; the one under way did not.
                    tasks = [task for task in rig.engine.answers["/tasks"] if task is not old]
                    rig.engine.answers["/tasks"] = [*tasks, new]
                    old.clear()

            rig.engine.before = hear_meanwhile
            follower.until(lambda: not old)
            count = len(rig.heard.syncs)
            follower.until(lambda: len(rig.heard.syncs) > count)
        for snapshot in follower.snapshots[heard[0] - 1 :]:
            assert len(_instances(snapshot, "meshed")) == 2
            assert _instances(snapshot, "proxy") == ()

    def test_a_failed_list_changes_nothing_and_the_stream_goes_on(self) -> None:
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            before = follower.until(lambda: follower.snapshots)
            change = rig.draining("meshed")
            rig.engine.answers["/services"] = []
            rig.engine.failing["/tasks"] = DockerUnavailable("half a list")
            follower.until(lambda: rig.last_error == "half a list")
            assert follower.last.workloads.keys() == before.workloads.keys()
            rig.manager.watch.send(change)
            follower.until(lambda: follower.states("meshed") == ["draining"])
            assert not rig.manager.watch.closed
            assert not rig.source.status.connected

    def test_the_age_of_the_last_good_sync_grows_while_lists_fail(self) -> None:
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            rig.engine.failing["/tasks"] = DockerUnavailable("half a list")
            follower.until(lambda: rig.last_error == "half a list")
            first = rig.source.status.last_success
            time.sleep(0.05)
            assert rig.source.status.last_success == first
            rig.engine.failing.clear()
            follower.until(lambda: rig.last_error == "")
            assert rig.source.status.last_success > first


class TestReconnect:
    def test_a_restarted_engine_is_found_again_and_its_short_list_takes_nothing_away(
        self, rig: Rig, watching: Following
    ) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=7000))
        before = watching.until(lambda: watching.states("meshed") == ["draining"])
        whole = {path: rig.engine.answers[path] for path in ("/services", "/tasks")}
        rig.engine.down = DockerUnavailable("connection refused")
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: rig.last_error == "connection refused")
        # It is back, but fills its store still.
        rig.engine.answers |= {"/services": [], "/tasks": []}
        rig.engine.down = None
        watching.until(lambda: rig.engine.calls.count("/tasks") > 3)
        assert rig.engine.connections > 1
        assert watching.last.workloads.keys() == before.workloads.keys()
        rig.engine.answers |= whole
        count = len(rig.heard.syncs)
        watching.until(lambda: len(rig.heard.syncs) > count)
        assert watching.last.workloads.keys() == before.workloads.keys()

    def test_a_list_that_stays_older_is_believed_in_the_end(
        self, rig: Rig, watching: Following, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(swarm, "PATIENCE", 0.1)
        rig.engine.down = DockerUnavailable("connection refused")
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: rig.last_error == "connection refused")
        rig.engine.answers |= {"/services": [], "/tasks": []}
        rig.engine.down = None
        watching.until(lambda: not watching.last.workloads, "the restored cluster is empty")

    def test_another_cluster_is_another_world(self, rig: Rig, watching: Following) -> None:
        rig.manager.watch.send(rig.draining("meshed", version=700000))
        watching.until(lambda: watching.states("meshed") == ["draining"])
        rig.engine.down = DockerUnavailable("connection refused")
        rig.manager.watch.fail(WatchUnavailable("it broke"))
        watching.until(lambda: rig.last_error == "connection refused")
        rig.engine.answers["/info"]["Swarm"]["Cluster"]["ID"] = "another"
        rig.engine.answers |= {"/services": [], "/tasks": []}
        rig.engine.down = None
        watching.until(lambda: not watching.last.workloads)
        assert rig.manager.attempts[-1] == 0

    def test_an_answer_of_the_wrong_shape_is_no_answer(self, rig: Rig) -> None:
        whole = rig.engine.answers["/tasks"]
        rig.engine.answers["/tasks"] = [{"no": "task"}]
        with following(rig.source) as follower:
            follower.until(lambda: "/tasks is not what it should be" in rig.last_error)
            assert follower.snapshots == []
            rig.engine.answers["/tasks"] = whole
            follower.until(lambda: follower.snapshots)

    def test_a_fault_of_ours_does_not_end_it(self, rig: Rig) -> None:
        def stumble(path: str) -> None:
            raise ZeroDivisionError("a fault")

        rig.engine.before = stumble
        with following(rig.source) as follower:
            follower.until(lambda: "a fault" in rig.last_error)
            assert ("swarm", "fault") in rig.heard.events
            rig.engine.before = lambda path: None
            follower.until(lambda: follower.snapshots)


class TestPolling:
    @pytest.fixture(name="rig")
    def _rig(self) -> Rig:
        return Rig(watch="off")

    @pytest.fixture(name="polling")
    def _polling(self, rig: Rig) -> Iterator[Following]:
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            yield follower

    def test_no_watch_is_ever_opened(self, rig: Rig, polling: Following) -> None:
        polling.until(lambda: rig.engine.calls.count("/tasks") > 5)
        assert rig.manager.attempts == []
        assert rig.source.status.mode == "poll"
        assert rig.source.status.mode_reason == "Watch is off in the settings"

    def test_a_task_that_is_told_to_stop_drains_then_is_gone(
        self, rig: Rig, polling: Following
    ) -> None:
        task = rest_task(rig.engine, "meshed")
        touched(task, 7000, DesiredState="shutdown")
        before = polling.last
        after = polling.until(lambda: polling.states("meshed") == ["draining"])
        assert after.changed_at > before.changed_at
        assert named(after, "shop_web") is named(before, "shop_web")
        touched(task, 7001, Status={"State": "shutdown"})
        polling.until(lambda: polling.states("meshed") == [])

    def test_a_task_that_is_removed_at_once_is_gone(self, rig: Rig, polling: Following) -> None:
        rig.engine.answers["/tasks"].remove(rest_task(rig.engine, "meshed"))
        polling.until(lambda: polling.states("meshed") == [])

    def test_a_failed_task_is_shown_with_its_error(self, rig: Rig, polling: Following) -> None:
        task = rest_task(rig.engine, "meshed")
        failed = {"State": "failed", "Err": "task: non-zero exit (137)"}
        touched(task, 7000, DesiredState="shutdown", Status=failed)
        polling.until(lambda: polling.states("meshed") == ["gone"])
        assert only(polling.workload("meshed")).detail == "task: non-zero exit (137)"

    def test_its_replacement_and_its_end_are_one_snapshot(
        self, rig: Rig, polling: Following
    ) -> None:
        old = rest_task(rig.engine, "meshed")
        new = dict(old) | {"ID": "new", "Version": {"Index": 7000}}
        tasks = rig.engine.answers["/tasks"]
        rig.engine.answers["/tasks"] = [
            *(task for task in tasks if task is not old),
            touched(dict(old), 7000, DesiredState="shutdown"),
            new,
        ]
        polling.until(lambda: len(polling.states("meshed")) == 2)
        seen = [sorted(str(i.state) for i in _instances(s, "meshed")) for s in polling.snapshots]
        assert seen == [["up"], ["draining", "up"]]

    def test_an_unchanged_answer_publishes_nothing(self, rig: Rig, polling: Following) -> None:
        polling.until(lambda: rig.engine.calls.count("/tasks") > 5)
        assert len(polling.snapshots) == 1
        assert rig.source.status.last_success > 0

    def test_an_event_has_everything_listed_at_once(self) -> None:
        rig = Rig(watch="off", poll_interval=30.0)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            service = next(
                s for s in rig.engine.answers["/services"] if s["Spec"]["Name"] == "zero"
            )
            touched(service, 7000, Spec=service["Spec"] | {"Mode": {"Replicated": {"Replicas": 2}}})
            rig.engine.say({"Type": "service", "Action": "update"})
            follower.until(lambda: getattr(follower.workload("zero"), "wanted", 0) == 2)
        assert rig.heard.events == [("swarm", "service")]
        assert rig.engine.event_filters == [{"type": ("service", "node", "network")}]

    def test_a_failed_poll_takes_nothing_away(self, rig: Rig, polling: Following) -> None:
        before = polling.last
        rig.engine.failing["/tasks"] = DockerUnavailable("timed out")
        polling.until(lambda: rig.last_error == "timed out")
        assert not rig.source.status.connected
        assert polling.last is before
        rig.engine.failing.clear()
        polling.until(lambda: rig.last_error == "")
        assert polling.last is before

    def test_an_ended_event_stream_is_opened_again(self, rig: Rig, polling: Following) -> None:
        rig.engine.say(None)
        polling.until(lambda: len(rig.engine.streams) > 1)

    def test_a_job_that_runs_is_not_asked_about_over_and_over(
        self, rig: Rig, polling: Following
    ) -> None:
        asked: list[bool] = []
        real = rig.engine.get

        def get(path: str, **options: Any) -> bytes:
            asked.append("id" in (options.get("filters") or {}))
            return real(path, **options)

        rig.engine.get = get  # type: ignore[method-assign]
        polling.until(lambda: len(asked) > 5)
        assert not any(asked)


class TestReadOnce:
    def test_it_reads_everything_without_the_watch(self, rig: Rig) -> None:
        snapshot = rig.source.read_once()
        assert only(named(snapshot, "meshed")).state is InstanceState.UP
        assert rig.manager.attempts == []

    @pytest.mark.parametrize(
        ("swarm_info", "cure"),
        [
            ({"LocalNodeState": "inactive"}, "docker swarm init"),
            ({"LocalNodeState": "active", "ControlAvailable": False}, "run the agent on a manager"),
            ({"LocalNodeState": "pending", "Error": "no quorum"}, "pending: no quorum"),
        ],
    )
    def test_what_is_no_manager_is_told_with_the_cure(
        self, rig: Rig, swarm_info: dict[str, Any], cure: str
    ) -> None:
        rig.engine.answers["/info"]["Swarm"] = swarm_info
        with pytest.raises(DiscoveryError, match=cure):
            rig.source.read_once()

    def test_one_failed_list_is_no_snapshot(self, rig: Rig) -> None:
        rig.engine.failing["/nodes"] = DockerRefused("no leader", status=503)
        with pytest.raises(DockerRefused, match="no leader"):
            rig.source.read_once()

    def test_a_network_that_is_gone_is_no_reason_to_fail(self, rig: Rig) -> None:
        services = rig.engine.answers["/services"]
        zero = next(s for s in services if s["Spec"]["Name"] == "zero")
        zero["Spec"]["TaskTemplate"]["Networks"] = [{"Target": "removed"}]
        found = named(rig.source.read_once(), "zero")
        assert found is not None
        assert found.networks == ()


def _instances(snapshot: Any, name: str) -> Any:
    workload = named(snapshot, name)
    return workload.instances if workload else ()
