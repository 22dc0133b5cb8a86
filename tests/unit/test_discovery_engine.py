"""Containers of a plain engine: what they become, and what each event does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from agent.compile import compile_snapshot
from agent.config.settings import Settings
from agent.discovery import engine as engine_module
from agent.discovery.engine import EngineSource, signal_number
from agent.errors import DockerRefused, DockerUnavailable
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    PublishedPort,
    Snapshot,
    WorkloadKind,
)
from tests.unit.discovery_fakes import (
    FakeEngine,
    Following,
    Heard,
    following,
    named,
    only,
    recorded,
)

pytestmark = pytest.mark.timeout(30)

NAMES = ("web-1", "proxy-1", "checked-1")


class Rig:
    """A source and the engine that was recorded, with three containers."""

    def __init__(self, *, skip_tasks: bool = False, **settings: Any) -> None:
        inspected = {name: recorded(f"engine/{name}") for name in NAMES}
        self.ids = {name: raw["Id"] for name, raw in inspected.items()}
        self.engine = FakeEngine(
            {
                "/info": recorded("engine/info"),
                "/containers/json": recorded("engine/containers"),
                **{f"/containers/{raw['Id']}/json": raw for raw in inspected.values()},
            }
        )
        self.heard = Heard()
        self.source = EngineSource(
            Settings(**settings),
            observer=self.heard,
            connect=self.engine.connect,
            skip_tasks=skip_tasks,
        )

    def raw(self, name: str) -> dict[str, Any]:
        """What inspecting a container says, to be changed in place."""
        found: dict[str, Any] = self.engine.answers[f"/containers/{self.ids[name]}/json"]
        return found

    def summary(self, name: str) -> dict[str, Any]:
        """What the list says of a container, to be changed in place."""
        listed = self.engine.answers["/containers/json"]
        found: dict[str, Any] = next(raw for raw in listed if raw["Id"] == self.ids[name])
        return found

    def say(self, name: str, action: str, **attributes: str) -> None:
        """An event of a container."""
        actor = {"ID": self.ids[name], "Attributes": {"name": name, **attributes}}
        self.engine.say({"Type": "container", "Action": action, "Actor": actor})

    def inspections(self) -> int:
        return sum(call.endswith("/json") and "containers/json" not in call for call in self.calls)

    @property
    def calls(self) -> list[str]:
        return self.engine.calls


@pytest.fixture(name="rig")
def _rig() -> Rig:
    return Rig()


@pytest.fixture(name="running")
def _running(rig: Rig) -> Iterator[Following]:
    with following(rig.source) as follower:
        follower.until(lambda: follower.snapshots)
        yield follower


class TestWhatContainersBecome:
    def test_a_container_is_a_workload_with_one_instance(self, rig: Rig) -> None:
        web = named(rig.source.read_once(), "web-1")
        assert web is not None
        assert web.kind is WorkloadKind.CONTAINER
        assert web.key == ("engine", rig.ids["web-1"])
        assert web.labels["interlock.hostname"] == "web"
        assert web.networks == ("n1",)
        assert web.ports == (8080, 9000)
        assert web.wanted is None
        assert web.stack == "shop"
        assert not web.host_ports_only
        assert web.created == pytest.approx(1795363617.702951)
        assert only(web) == Instance(
            id=rig.ids["web-1"],
            name="web-1",
            state=InstanceState.UP,
            node="node2",
            attachments=(Attachment("n1", "198.18.131.2"),),
            published=(PublishedPort(8080, 18081), PublishedPort(9000, 18082, "127.0.0.1")),
        )

    def test_the_name_that_a_container_has_for_itself_is_told(self, rig: Rig) -> None:
        rig.raw("web-1")["Config"] |= {"Hostname": "web", "Domainname": "example.com"}
        web = named(rig.source.read_once(), "web-1")
        assert web is not None
        assert (web.hostname, web.domainname) == ("web", "example.com")

    def test_on_the_host_network_every_port_is_the_nodes(self, rig: Rig) -> None:
        rig.engine.host = "198.18.0.12"
        proxy = named(rig.source.read_once(), "proxy-1")
        assert proxy is not None
        assert proxy.host_ports_only
        assert only(proxy).host_network
        assert only(proxy).node_address == "198.18.0.12"
        assert only(proxy).attachments == ()

    def test_until_its_health_check_passes_a_container_waits(self, rig: Rig) -> None:
        instance = only(named(rig.source.read_once(), "checked-1"))
        assert instance.state is InstanceState.WAITING
        assert instance.detail == "its health check has not passed yet"
        assert [a.network for a in instance.attachments] == ["bridge"]

    def test_openresty_is_known_by_its_label_even_before_it_is_healthy(self, rig: Rig) -> None:
        rig.raw("checked-1")["Config"]["Labels"]["interlock.ext.name"] = "nginx"
        snapshot = rig.source.read_once()
        assert {proxy.name for proxy in snapshot.proxies} == {"proxy-1", "checked-1"}
        assert snapshot.proxy_networks == ("bridge",)
        on_host = next(proxy for proxy in snapshot.proxies if proxy.name == "proxy-1")
        assert on_host.published == (PublishedPort(8081, 8081),)

    def test_with_ipv6_alone_its_address_is_taken(self, rig: Rig) -> None:
        endpoint = rig.raw("web-1")["NetworkSettings"]["Networks"]["n1"]
        endpoint |= {"IPAddress": "", "GlobalIPv6Address": "fd00::2"}
        web = named(rig.source.read_once(), "web-1")
        assert only(web).attachments == (Attachment("n1", "fd00::2"),)

    def test_tasks_are_left_to_the_swarms_source(self) -> None:
        rig = Rig(skip_tasks=True)
        rig.raw("web-1")["Config"]["Labels"]["com.docker.swarm.service.id"] = "abc"
        assert named(rig.source.read_once(), "web-1") is None

    def test_one_that_ended_between_list_and_inspection_is_not_there(self, rig: Rig) -> None:
        del rig.engine.answers[f"/containers/{rig.ids['web-1']}/json"]
        snapshot = rig.source.read_once()
        assert {w.name for w in snapshot.workloads.values()} == {"proxy-1", "checked-1"}

    def test_a_failed_inspection_is_no_snapshot(self, rig: Rig) -> None:
        path = f"/containers/{rig.ids['web-1']}/json"
        rig.engine.failing[path] = DockerRefused("broken", status=500)
        with pytest.raises(DockerRefused):
            rig.source.read_once()


class TestEvents:
    def test_it_listens_before_it_lists(self, rig: Rig, running: Following) -> None:
        assert rig.calls.index("/events") < rig.calls.index("/containers/json")
        assert rig.source.status.mode == "events"
        (filters,) = rig.engine.event_filters
        assert set(filters["event"]) >= {"kill", "die", "health_status", "connect"}
        assert not any(event.startswith("exec") for event in filters["event"])

    @pytest.mark.parametrize("signal", ["15", "2", "3", "9", "SIGTERM"])
    def test_a_stop_signal_is_the_start_of_draining(
        self, rig: Rig, running: Following, signal: str
    ) -> None:
        inspections = rig.inspections()
        before = running.last
        rig.say("web-1", "kill", signal=signal)
        after = running.until(lambda: running.states("web-1") == ["draining"])
        assert rig.inspections() == inspections, "nothing needs to be asked first"
        assert named(after, "proxy-1") is named(before, "proxy-1")
        rig.say("web-1", "die")
        running.until(lambda: running.workload("web-1") is None)

    def test_its_own_stop_signal_counts_and_others_do_not(
        self, rig: Rig, running: Following
    ) -> None:
        rig.raw("web-1")["Config"]["StopSignal"] = "SIGUSR1"
        rig.say("web-1", "die")
        rig.say("web-1", "start")
        rig.say("web-1", "kill", signal="1")
        rig.say("web-1", "rename")
        running.until(lambda: rig.source.status.events == 4)
        running.until(lambda: running.states("web-1") == ["up"])
        rig.say("web-1", "kill", signal="10")
        running.until(lambda: running.states("web-1") == ["draining"])

    def test_while_it_drains_other_events_do_not_bring_it_back(
        self, rig: Rig, running: Following
    ) -> None:
        rig.say("web-1", "kill", signal="15")
        rig.raw("web-1")["Name"] = "/renamed"
        rig.say("web-1", "rename")
        running.until(lambda: running.states("renamed") == ["draining"])

    def test_a_restarted_container_is_up_again(self, rig: Rig, running: Following) -> None:
        rig.say("web-1", "kill", signal="15")
        rig.say("web-1", "die")
        rig.say("web-1", "start")
        running.until(lambda: [named(s, "web-1") is None for s in running.snapshots][-2:] == [1, 0])
        assert running.states("web-1") == ["up"]

    def test_health_decides(self, rig: Rig, running: Following) -> None:
        for status, state in (("healthy", "up"), ("unhealthy", "waiting"), ("healthy", "up")):
            rig.raw("checked-1")["State"]["Health"]["Status"] = status
            rig.say("checked-1", f"health_status: {status}")
            running.until(lambda state=state: running.states("checked-1") == [state])

    def test_a_paused_container_takes_no_traffic(self, rig: Rig, running: Following) -> None:
        rig.raw("web-1")["State"] |= {"Status": "paused", "Paused": True}
        rig.say("web-1", "pause")
        running.until(lambda: running.states("web-1") == ["waiting"])
        rig.raw("web-1")["State"] |= {"Status": "running", "Paused": False}
        rig.say("web-1", "unpause")
        running.until(lambda: running.states("web-1") == ["up"])

    def test_the_kernel_killing_a_child_does_not_end_the_container(
        self, rig: Rig, running: Following
    ) -> None:
        rig.say("web-1", "oom")
        running.until(lambda: rig.source.status.events == 1)
        assert running.states("web-1") == ["up"]

    def test_networks_come_and_go(self, rig: Rig, running: Following) -> None:
        networks = rig.raw("web-1")["NetworkSettings"]["Networks"]
        networks["n2"] = {"IPAddress": "198.18.140.2"}
        actor = {"ID": "the network's", "Attributes": {"container": rig.ids["web-1"]}}
        rig.engine.say({"Type": "network", "Action": "connect", "Actor": actor})
        running.until(lambda: getattr(running.workload("web-1"), "networks", ()) == ("n1", "n2"))
        del networks["n1"]
        rig.engine.say({"Type": "network", "Action": "disconnect", "Actor": actor})
        running.until(lambda: getattr(running.workload("web-1"), "networks", ()) == ("n2",))

    def test_openrestys_networks_stay_known_while_it_restarts(
        self, rig: Rig, running: Following
    ) -> None:
        rig.raw("web-1")["Config"]["Labels"]["interlock.ext.name"] = "nginx"
        rig.say("web-1", "update")
        running.until(lambda: running.last.proxy_networks == ("n1",))
        rig.say("web-1", "die")
        rig.say("proxy-1", "die")
        running.until(lambda: not running.last.proxies)
        assert running.last.proxy_networks == ("n1",)


class TestListing:
    def test_a_resync_finds_what_no_event_told_and_inspects_nothing_else(self) -> None:
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            before = follower.until(lambda: follower.snapshots)
            count = rig.inspections()
            rig.raw("web-1")["Name"] = "/renamed"
            rig.summary("web-1")["Names"] = ["/renamed"]
            rig.summary("proxy-1")["Status"] = "Up 3 hours"
            after = follower.until(lambda: follower.workload("renamed"))
            rig.engine.answers["/containers/json"].remove(rig.summary("web-1"))
            follower.until(lambda: follower.workload("renamed") is None)
        assert rig.inspections() == count + 1
        assert named(after, "proxy-1") is named(before, "proxy-1")

    def test_a_failed_list_takes_nothing_away_and_it_reconnects(self) -> None:
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            before = follower.until(lambda: follower.snapshots)
            rig.engine.failing["/containers/json"] = DockerUnavailable("timed out")
            follower.until(lambda: rig.source.status.last_error == "timed out")
            assert follower.last is before
            rig.engine.failing.clear()
            follower.until(lambda: rig.source.status.last_error == "")
            assert follower.last is before
            assert rig.engine.connections > 1
        assert False in rig.heard.syncs

    def test_an_ended_event_stream_is_opened_again(self, rig: Rig, running: Following) -> None:
        rig.engine.say(None)
        running.until(lambda: len(rig.engine.streams) > 1)
        rig.say("web-1", "kill", signal="15")
        running.until(lambda: running.states("web-1") == ["draining"])

    def test_one_that_survives_its_signal_is_up_again_after_a_while(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "DRAIN_LIMIT", 0.5)
        rig = Rig(resync_interval=0.02)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            rig.say("web-1", "kill", signal="15")
            follower.until(lambda: follower.states("web-1") == ["draining"])
            follower.until(lambda: follower.states("web-1") == ["up"])


class TestSlowAnswers:
    def test_an_inspection_that_hangs_delays_no_other_event(
        self, rig: Rig, running: Following
    ) -> None:
        slow, gate = f"/containers/{rig.ids['checked-1']}/json", threading.Event()
        rig.engine.before = lambda path: gate.wait(10) if path == slow else None
        try:
            rig.raw("checked-1")["State"]["Health"]["Status"] = "healthy"
            rig.say("checked-1", "health_status: healthy")
            rig.say("web-1", "kill", signal="15")
            running.until(lambda: running.states("web-1") == ["draining"])
            rig.say("web-1", "die")
            running.until(lambda: running.workload("web-1") is None)
            assert running.states("checked-1") == ["waiting"]
        finally:
            gate.set()
        running.until(lambda: running.states("checked-1") == ["up"])

    def test_a_list_that_is_older_than_an_event_does_not_undo_it(self) -> None:
        rig, gate = Rig(resync_interval=0.05), threading.Event()
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            listing = threading.Event()

            def hang(path: str) -> None:
                if path == "/containers/json" and not gate.is_set():
                    listing.set()
                    gate.wait(10)

            rig.engine.before = hang
            assert listing.wait(10)
            since = len(follower.snapshots)
            rig.say("web-1", "die")
            follower.until(lambda: follower.workload("web-1") is None)
            del rig.engine.answers[f"/containers/{rig.ids['web-1']}/json"]
            syncs = len(rig.heard.syncs)
            gate.set()
            follower.until(lambda: len(rig.heard.syncs) > syncs + 1)
            assert all(named(s, "web-1") is None for s in follower.snapshots[since:])

    def test_an_inspection_that_is_older_than_its_end_does_not_undo_it(
        self, rig: Rig, running: Following
    ) -> None:
        gate, asked = threading.Event(), threading.Event()

        def hang(path: str) -> None:
            if rig.ids["web-1"] in path:
                asked.set()
                gate.wait(10)

        rig.engine.before = hang
        rig.say("web-1", "update")
        assert asked.wait(10)
        rig.say("web-1", "die")
        running.until(lambda: running.workload("web-1") is None)
        since = len(running.snapshots)
        gate.set()
        rig.raw("checked-1")["State"]["Health"]["Status"] = "healthy"
        rig.say("checked-1", "health_status: healthy")
        running.until(lambda: running.states("checked-1") == ["up"])
        assert all(named(s, "web-1") is None for s in running.snapshots[since:])

    @pytest.mark.parametrize("signal", ["15", "10"])
    @pytest.mark.parametrize("hanging", ["inspection", "list"])
    def test_one_that_is_signalled_while_it_is_first_asked_for_drains(
        self, hanging: str, signal: str
    ) -> None:
        rig = Rig(resync_interval=0.1 if hanging == "list" else 60.0)
        rig.raw("web-1")["Config"]["StopSignal"] = "SIGUSR1"
        with following(rig.source) as running:
            line, listed = rig.summary("web-1"), rig.engine.answers["/containers/json"]
            listed.remove(line)
            rig.say("web-1", "die")
            running.until(lambda: running.workload("web-1") is None)
            path = f"/containers/{rig.ids['web-1']}/json"
            gate, asked = threading.Event(), threading.Event()

            def hang(called: str) -> None:
                if called == (path if hanging == "inspection" else "/containers/json"):
                    if asked.is_set() and line not in listed:
                        listed.append(line)
                    asked.set()
                    gate.wait(10)

            rig.engine.before = hang
            if hanging == "list":
                assert asked.wait(10)
            rig.say("web-1", "start")
            rig.say("web-1", "kill", signal=signal)
            running.until(lambda: rig.source.status.events == 3)
            since = len(running.snapshots)
            # What is listed now was so before it started.
            gate.set()
            running.until(lambda: running.states("web-1") == ["draining"])
            assert all(
                [str(i.state) for i in workload.instances] == ["draining"]
                for snapshot in running.snapshots[since:]
                if (workload := named(snapshot, "web-1"))
            )


class TestPolling:
    def test_set_explicitly_it_lists_that_often_beside_the_events(self) -> None:
        rig = Rig(poll_interval=0.02)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            assert rig.source.status.mode == "events"
            rig.summary("web-1")["Names"] = ["/renamed"]
            rig.raw("web-1")["Name"] = "/renamed"
            follower.until(lambda: follower.workload("renamed"))
            rig.say("web-1", "kill", signal="15")
            follower.until(lambda: follower.states("renamed") == ["draining"])

    @pytest.mark.parametrize("interval", [None, 0.0])
    def test_otherwise_the_events_tell_all(self, interval: float | None) -> None:
        rig = Rig() if interval is None else Rig(poll_interval=interval)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            rig.say("web-1", "update")
            follower.until(lambda: rig.source.status.events == 1)
        assert len(rig.heard.syncs) == 1

    def test_without_events_it_goes_on_polling_and_says_why(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "DEAF_FIRST", 0.05)
        rig = Rig(poll_interval=0.02)
        rig.engine.deaf = DockerRefused("GET /events: forbidden", status=403)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            status = rig.source.status
            assert (status.mode, status.mode_reason) == ("poll", "GET /events: forbidden")
            assert status.connected
            rig.engine.answers["/containers/json"].remove(rig.summary("web-1"))
            follower.until(lambda: follower.workload("web-1") is None)
            rig.engine.deaf = None
            follower.until(lambda: rig.source.status.mode == "events")
            assert rig.engine.connections == 1

    def test_a_cut_stream_is_no_failure_where_it_polls(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "DEAF_FIRST", 0.05)
        rig = Rig(poll_interval=0.02)
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            for number in (1, 2, 3):
                follower.until(lambda number=number: len(rig.engine.streams) == number)
                rig.engine.say(None)
            follower.until(lambda: len(rig.engine.streams) == 4)
            assert rig.engine.connections == 1
            assert rig.source.status.last_error == ""


class TestAttaching:
    def rig(self, **settings: Any) -> Rig:
        """web-1 names its network; checked-1 is a proxy that is not on it."""
        rig = Rig(**settings)
        rig.raw("web-1")["Config"]["Labels"]["interlock.network"] = "n1"
        rig.raw("checked-1")["Config"]["Labels"]["interlock.ext.name"] = "nginx"
        return rig

    def test_by_default_nothing_is_ever_attached_and_the_hint_names_the_command(self) -> None:
        rig = self.rig()
        del rig.raw("proxy-1")["Config"]["Labels"]["interlock.ext.name"]
        with following(rig.source) as follower:
            snapshot = follower.until(lambda: follower.snapshots)
        assert rig.engine.attached == []
        desired = compile_snapshot(Snapshot({"engine": snapshot}), Settings())
        (rejection,) = desired.rejections
        assert rejection.reason == "network_not_shared"
        assert "docker network connect n1 checked-1" in rejection.hint
        assert "AttachNetworks = true" in rejection.hint

    def test_switched_on_proxies_are_attached_but_not_those_in_the_hosts_network(self) -> None:
        rig = self.rig(attach_networks=True)

        def attach(path: str) -> None:
            if rig.engine.attached:
                networks = rig.raw("checked-1")["NetworkSettings"]["Networks"]
                networks["n1"] = {"IPAddress": "198.18.131.9"}

        rig.engine.before = attach
        with following(rig.source) as follower:
            follower.until(lambda: follower.snapshots)
            follower.until(lambda: "n1" in (follower.last.proxy_networks or ()))
            for _ in range(3):
                rig.say("web-1", "update")
            follower.until(lambda: rig.source.status.events == 3)
        assert rig.engine.attached == [("n1", rig.ids["checked-1"])]

    def test_what_is_refused_is_a_rejection_with_the_command_and_not_tried_all_the_time(
        self,
    ) -> None:
        rig = self.rig(attach_networks=True, resync_interval=0.02)
        rig.engine.failing["/networks/n1/connect"] = DockerRefused("forbidden", status=403)
        with following(rig.source) as follower:
            snapshot = follower.until(lambda: follower.snapshots and follower.last.rejections)
            (rejection,) = snapshot.rejections
            assert rejection.reason == "attach_refused"
            assert rejection.hint.endswith("docker network connect n1 checked-1")
            follower.until(lambda: len(rig.heard.syncs) > 5)
        assert len(rig.engine.attached) == 1

    def test_compose_projects_name_their_networks_with_the_project(self) -> None:
        rig = self.rig(attach_networks=True)
        networks = rig.raw("web-1")["NetworkSettings"]["Networks"]
        networks["shop_n2"] = networks.pop("n1")
        rig.raw("web-1")["Config"]["Labels"]["interlock.network"] = "n2"
        with following(rig.source) as follower:
            follower.until(lambda: rig.engine.attached)
        assert rig.engine.attached[0] == ("shop_n2", rig.ids["checked-1"])


def test_a_port_on_every_ipv6_address_alone_is_told_as_such(rig: Rig) -> None:
    rig.raw("web-1")["NetworkSettings"]["Ports"] = {
        "8080/tcp": [{"HostIp": "::", "HostPort": "18081"}],
        "9000/tcp": [{"HostIp": "::", "HostPort": "2"}, {"HostIp": "0.0.0.0", "HostPort": "2"}],
        "53/udp": [{"HostIp": "0.0.0.0", "HostPort": "3"}],
    }
    assert only(named(rig.source.read_once(), "web-1")).published == (
        PublishedPort(8080, 18081, "::"),
        PublishedPort(9000, 2),
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [("15", 15), ("SIGTERM", 15), ("term", 15), ("SIGWINCH", 28), ("", 0), ("SIGNONE", 0)],
)
def test_signals_are_told_as_numbers_or_by_name(text: str, number: int) -> None:
    assert signal_number(text) == number
