"""A classic Swarm, from its manager's recorded answers to the peers that are pushed."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agent.compile import compile_snapshot
from agent.config.settings import Settings
from agent.discovery import build_sources, classic
from agent.discovery import engine as engine_module
from agent.discovery.classic import ClassicSource, as_inspected, names_of
from agent.discovery.classic_nodes import NodeView, is_classic, nodes_of
from agent.discovery.docker_api import Connector
from agent.errors import DiscoveryError
from agent.model import InstanceState, PublishedPort, Snapshot, SourceSnapshot
from tests.unit.classic_manager import ClassicManager, event, recorded_events
from tests.unit.discovery_fakes import Following, Heard, following, named, only, recorded

pytestmark = pytest.mark.timeout(30)

WEB = "web.example.test/"
HERE, THERE = "127.0.0.1", "127.0.0.2"
ALL = [f"{HERE}:18081 up", f"{HERE}:18083 up", f"{THERE}:18082 up"]


@pytest.fixture(name="manager")
def _manager() -> Iterator[ClassicManager]:
    manager = ClassicManager()
    yield manager
    manager.stop()


@pytest.fixture(name="quick", autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "DOUBT_INTERVAL", 0.05)


class Clock:
    """Time that can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Agent:
    """The source of a manager, followed, and what is compiled from it."""

    def __init__(self, manager: ClassicManager, **settings: Any) -> None:
        values = {"docker_url": manager.url, "request_timeout": 5.0}
        self.settings = Settings(**(values | settings))
        self.heard = Heard()
        self.clock = Clock()
        self.source = ClassicSource(
            self.settings,
            observer=self.heard,
            connect=Connector(self.settings),
            clock=self.clock,
        )

    def peers(self, snapshot: SourceSnapshot, upstream: str = WEB) -> list[str]:
        desired = compile_snapshot(Snapshot({"classic": snapshot}), self.settings)
        found = desired.membership.upstreams.get(upstream)
        return sorted(
            f"{peer.address}:{peer.port} {peer.state}" for peer in (found.peers if found else ())
        )


class Driven:
    """An agent that follows, and what it has pushed."""

    def __init__(self, agent: Agent, follower: Following) -> None:
        self.agent = agent
        self.follower = follower

    @property
    def peers(self) -> list[str]:
        return self.agent.peers(self.follower.last)

    def until(self, peers: list[str]) -> None:
        self.follower.until(lambda: self.peers == peers, f"{peers} and not {self.peers}")

    def pushed(self, since: int = 0) -> list[list[str]]:
        return [self.agent.peers(snapshot) for snapshot in self.follower.snapshots[since:]]


@pytest.fixture(name="driven")
def _driven(manager: ClassicManager) -> Iterator[Driven]:
    agent = Agent(manager)
    with following(agent.source) as follower:
        driven = Driven(agent, follower)
        driven.until(ALL)
        follower.until(lambda: manager.streams)
        yield driven


def of_node(action: str, node: str) -> dict[str, Any]:
    """A recorded event of a node."""
    found = copy.deepcopy(recorded_events("events-engine-down")[-1])
    assert found["Action"] == "engine_disconnect"
    found |= {"Action": action, "status": action}
    found["Actor"]["Attributes"]["node.name"] = found["node"]["Name"] = node
    return found


class TestStart:
    def test_auto_finds_out_that_it_is_a_classic_manager(self, manager: ClassicManager) -> None:
        (source,) = build_sources(Settings(docker_url=manager.url))
        assert source.read_once().source == source.name == "classic"

    def test_containers_of_all_nodes_are_peers_at_their_nodes_address(
        self, manager: ClassicManager
    ) -> None:
        agent = Agent(manager)
        snapshot = agent.source.read_once()
        assert agent.peers(snapshot) == ALL
        web1 = only(named(snapshot, "web1"))
        assert (web1.node, web1.node_address) == ("node1", HERE)
        assert web1.published == (PublishedPort(8080, 18081, HERE),)
        assert [a.network for a in web1.attachments] == ["node1/bridge"]

    def test_only_reading_calls_are_made(self, manager: ClassicManager, driven: Driven) -> None:
        paths = {request.split("?")[0].removeprefix("/v1.40") for request in manager.requests}
        assert paths == {"/version", "/info", "/containers/json", "/networks", "/events"}

    def test_it_waits_for_a_manager_that_has_just_started(self, manager: ClassicManager) -> None:
        manager.forgets("node2", status="Pending")
        agent = Agent(manager)
        with following(agent.source) as follower:
            follower.until(lambda: len(manager.requests) > 8, "some lists")
            assert follower.snapshots == [], "half of the cluster is no snapshot"
            manager.shows("containers", "info")
            driven = Driven(agent, follower)
            driven.until(ALL)
            assert driven.pushed() == [ALL]

    def test_but_not_for_ever(
        self, manager: ClassicManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(classic, "PATIENCE", 0.3)
        manager.forgets("node2", status="Pending")
        agent = Agent(manager)
        with following(agent.source) as follower:
            Driven(agent, follower).until([peer for peer in ALL if HERE in peer])

    def test_another_kind_of_engine_is_told(self, manager: ClassicManager) -> None:
        manager.answers["/info"] = recorded("engine/info")
        with pytest.raises(DiscoveryError, match="no classic Swarm's manager; set Sources"):
            Agent(manager).source.read_once()

    def test_named_for_swarm_mode_it_says_what_to_name(self, manager: ClassicManager) -> None:
        (source,) = build_sources(Settings(docker_url=manager.url, sources=("swarm",), watch="off"))
        with pytest.raises(DiscoveryError, match=r"classic Swarm's manager.* set Sources to"):
            source.read_once()


class TestEvents:
    def test_the_recorded_stop_drains_and_ends(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        killed = [item for item in recorded_events("events") if item["Action"] in ("kill", "die")]
        manager.say(killed[0])
        rest = [peer for peer in ALL if "18081" not in peer]
        driven.until([f"{HERE}:18081 draining", *rest])
        manager.say(*killed[1:3])
        driven.until(rest)

    def test_an_event_in_pieces_is_one_event(self, manager: ClassicManager, driven: Driven) -> None:
        raw = json.dumps(event("kill", signal="15", note="h\u00e9"), ensure_ascii=False).encode()
        for number in range(len(raw)):
            manager.send(raw[number : number + 1])
        driven.until([f"{HERE}:18081 draining", *ALL[1:]])

    def test_one_that_starts_is_listed(self, manager: ClassicManager, driven: Driven) -> None:
        new = copy.deepcopy(manager.line("web1"))
        new |= {"Id": "f" * 64, "Names": ["/node2/web4"]}
        new["Ports"][0] |= {"IP": THERE, "PublicPort": 18084}
        manager.answers["/containers/json"].append(new)
        manager.say(event("start"))
        driven.until([*ALL, f"{THERE}:18084 up"])

    def test_its_own_stop_signal_is_asked_for(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        inspected = manager.answers[f"/containers/{manager.line('web1')['Id']}/json"]
        inspected["Config"]["StopSignal"] = "SIGUSR1"
        manager.say(event("kill", signal="1"))
        manager.say(event("kill", signal="10"))
        driven.until([f"{HERE}:18081 draining", *ALL[1:]])

    def test_health_and_pause_count(self, manager: ClassicManager, driven: Driven) -> None:
        for status, state in (
            ("Up 5 seconds (unhealthy)", "waiting"),
            ("Up 5 seconds (healthy)", "up"),
            ("Up 5 seconds (health: starting)", "waiting"),
            ("Up 6 seconds", "up"),
            ("Up 5 seconds (Paused)", "waiting"),
        ):
            manager.line("web1")["Status"] = status
            manager.say(event("health_status: whatever"))
            driven.follower.until(
                lambda state=state: driven.follower.states("web1") == [state], status
            )


class TestNodeLost:
    def test_its_peers_go_with_the_event_though_the_manager_answers_nothing(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        with manager.hanging("/containers/json", "/info"):
            manager.say(of_node("engine_disconnect", "node2"))
            driven.until([peer for peer in ALL if HERE in peer])
        gone = only(driven.follower.workload("web2"))
        assert (gone.state, gone.detail) == (InstanceState.GONE, "node node2 is down")

    def test_as_recorded_and_back_again(self, manager: ClassicManager) -> None:
        manager.shows("containers-engine-down", "info-engine-dead")
        manager.line("dn2").update(
            State="running",
            Status="Up 2 minutes",
            Ports=[{"IP": THERE, "PrivatePort": 8080, "PublicPort": 18092, "Type": "tcp"}],
        )
        agent, upstream = Agent(manager), "web.local/"
        both = [f"{HERE}:18091 up", f"{THERE}:18092 up"]
        with following(agent.source) as follower:
            # Failing, and not given up yet: what runs there is still told as running, and serves.
            follower.until(lambda: agent.peers(follower.last, upstream) == both)
            back = copy.deepcopy(manager.answers)
            manager.shows("containers-engine-down", "info-engine-down")
            manager.say(recorded_events("events-engine-down")[-1])
            follower.until(lambda: agent.peers(follower.last, upstream) == both[:1])
            manager.answers |= back
            manager.say(of_node("engine_reconnect", "node2"))
            follower.until(lambda: agent.peers(follower.last, upstream) == both)

    def test_told_by_the_list_alone_it_is_lost_too(self, manager: ClassicManager) -> None:
        agent = Agent(manager, resync_interval=0.05)
        with following(agent.source) as follower:
            driven = Driven(agent, follower)
            driven.until(ALL)
            # As it is with an engine that died without a word: still "running", with its ports.
            manager.line("web2")["Status"] = "Host Down"
            driven.until([peer for peer in ALL if HERE in peer])
            assert follower.states("web2") == ["gone"], "and `explain` can tell why"

    def test_what_was_moved_away_from_a_lost_node_is_no_longer_there(
        self, manager: ClassicManager
    ) -> None:
        agent = Agent(manager, resync_interval=0.05)
        with following(agent.source) as follower:
            driven = Driven(agent, follower)
            driven.until(ALL)
            manager.forgets("node2", status="Unhealthy")
            pairs = manager.answers["/info"]["SystemStatus"]
            next(pair for pair in pairs if pair[0] == " (unknown)")[0] = " node2"
            driven.until([peer for peer in ALL if HERE in peer])


class TestIncompleteLists:
    def restart(self, manager: ClassicManager, driven: Driven, *, settled: int = 3) -> None:
        """Restart the manager and wait until it has been asked several times."""
        manager.stop()
        driven.follower.until(lambda: not driven.agent.source.status.connected, "the loss")
        asked = len(manager.requests)
        manager.start()
        driven.follower.until(
            lambda: (
                sum("containers/json" in request for request in manager.requests[asked:]) >= settled
            ),
            "some lists",
        )

    @pytest.mark.parametrize("known", ["nothing", "pending", "count", "one list"])
    def test_a_manager_that_restarts_takes_nothing_away(
        self, manager: ClassicManager, driven: Driven, known: str
    ) -> None:
        since = len(driven.follower.snapshots)
        match known:
            case "nothing":
                manager.answers["/info"]["SystemStatus"] = [["Role", "primary"], ["Nodes", "0"]]
                manager.answers["/containers/json"] = []
            case "pending":
                manager.forgets("node1", status="Pending")
            case "count":
                # The node is healthy already when the list does not have all of it yet.
                manager.answers["/containers/json"].remove(manager.line("web3"))
            case "one list":
                manager.answers["/containers/json"] = []
        self.restart(manager, driven)
        assert driven.peers == ALL
        manager.shows("containers", "info")
        driven.follower.until(lambda: driven.agent.source.status.last_error == "")
        assert all(peers == ALL for peers in driven.pushed(since))

    def test_what_really_ended_meanwhile_is_gone(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        manager.shows("containers-after-stop", "info")
        manager.answers["/containers/json"].remove(manager.line("web1"))
        pairs = manager.answers["/info"]["SystemStatus"]
        next(pair for pair in pairs if pair[1].startswith("2 (2"))[1] = "1 (1 Running)"
        self.restart(manager, driven, settled=1)
        driven.until([f"{HERE}:18083 up"])

    def test_an_event_ends_what_the_list_leaves_open(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        manager.forgets("node1", status="Pending")
        self.restart(manager, driven)
        manager.say(event("die", "web3"))
        driven.until([ALL[0], ALL[2]])

    def test_a_node_that_stays_unseen_is_the_last_resort_and_never_dropped(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        manager.forgets("node2", status="Pending")
        self.restart(manager, driven)
        assert driven.peers == ALL
        driven.agent.clock.ahead += classic.UNSEEN_LIMIT
        driven.until([*ALL[:2], f"{THERE}:18082 draining"])
        driven.agent.clock.ahead += 10_000
        driven.follower.until(lambda: driven.agent.source.status.connected)
        assert driven.peers == [*ALL[:2], f"{THERE}:18082 draining"]
        manager.shows("containers", "info")
        driven.until(ALL)


class TestBadConnections:
    def test_cut_in_the_middle_of_an_event_the_stream_is_opened_anew(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        since = len(driven.follower.snapshots)
        manager.send(json.dumps(event("die")).encode()[:-40])
        manager.cut()
        driven.follower.until(lambda: len(manager.streams) > 1, "a new stream")
        driven.follower.until(lambda: driven.agent.source.status.connected)
        assert all(peers == ALL for peers in driven.pushed(since)), "half an event says nothing"
        manager.say(event("kill", signal="15"))
        driven.until([f"{HERE}:18081 draining", *ALL[1:]])

    def test_ten_minutes_of_silence_are_no_failure_but_the_stream_is_not_trusted_further(
        self, manager: ClassicManager, driven: Driven
    ) -> None:
        since, source = len(driven.follower.snapshots), driven.agent.source
        driven.agent.clock.ahead += engine_module.SILENCE_LIMIT - 30
        lists = sum(driven.agent.heard.syncs)
        driven.follower.until(lambda: sum(driven.agent.heard.syncs) > lists, "it lists meanwhile")
        assert len(manager.streams) == 1
        assert source.status.connected
        driven.agent.clock.ahead += 60
        driven.follower.until(lambda: len(manager.streams) == 2, "a new stream")
        manager.say(event("kill", signal="15"))
        driven.until([f"{HERE}:18081 draining", *ALL[1:]])
        assert source.status.last_error == ""
        assert len(driven.follower.snapshots) == since + 1

    def test_a_slow_answer_delays_no_event(self, manager: ClassicManager, driven: Driven) -> None:
        with manager.hanging("/containers/json"):
            manager.say(event("start"))
            driven.follower.until(lambda: "containers/json" in manager.requests[-1])
            manager.say(event("kill", signal="15"))
            driven.until([f"{HERE}:18081 draining", *ALL[1:]])
            manager.say(event("die", "web3"))
            driven.until([f"{HERE}:18081 draining", ALL[2]])
            # What is listed now was true before that event.
        driven.follower.until(lambda: len(driven.agent.heard.syncs) > 1)
        assert driven.peers == [f"{HERE}:18081 draining", ALL[2]]

    def test_an_answer_that_never_comes_takes_nothing_away(self, manager: ClassicManager) -> None:
        agent = Agent(manager, request_timeout=0.3, resync_interval=0.1)
        with following(agent.source) as follower:
            driven = Driven(agent, follower)
            driven.until(ALL)
            with manager.hanging("/containers/json"):
                follower.until(lambda: "did not answer in time" in agent.source.status.last_error)
                assert driven.peers == ALL
            follower.until(lambda: agent.source.status.last_error == "")
            assert driven.pushed() == [ALL]

    def test_where_one_manager_fails_the_next_is_tried(self, manager: ClassicManager) -> None:
        other = ClassicManager()
        try:
            agent = Agent(manager, docker_url=f"{manager.url},{other.url}")
            with following(agent.source) as follower:
                driven = Driven(agent, follower)
                driven.until(ALL)
                assert other.requests == []
                manager.stop()
                follower.until(lambda: other.streams, "the other one is listened to")
                other.say(event("kill", signal="15"))
                driven.until([f"{HERE}:18081 draining", *ALL[1:]])
        finally:
            other.stop()


class TestNodes:
    def test_the_recorded_nodes(self) -> None:
        nodes = nodes_of(recorded("classic-swarm/info"))
        assert nodes == {
            "node1": NodeView("127.0.0.1:2376", "Healthy", 2),
            "node2": NodeView("127.0.0.2:2376", "Healthy", 1),
        }
        failing = nodes_of(recorded("classic-swarm/info-engine-dead"))["node2"]
        assert failing.healthy, "three failures are needed before a node is lost"
        lost = nodes_of(recorded("classic-swarm/info-engine-down"))["node2"]
        assert lost.lost
        assert lost.containers == 1

    def test_old_clients_were_told_as_of_a_storage_driver(self) -> None:
        info = recorded("classic-swarm/info")
        old = {"DriverStatus": [["\x08Nodes", "1"], ["node1", "h:1"], [" \u2514 Containers", "3"]]}
        assert is_classic(info)
        assert is_classic(old)
        assert nodes_of(old) == {"node1": NodeView("h:1", "Healthy", 3)}
        assert not is_classic(recorded("engine/info"))
        assert not is_classic(recorded("swarm/info"))

    def test_of_nodes_with_one_name_the_worst_counts(self) -> None:
        info = recorded("classic-swarm/info-engine-down")
        for pair in info["SystemStatus"]:
            pair[0] = pair[0].replace(" node2", " node1")
        assert nodes_of(info) == {"node1": NodeView("127.0.0.1:2376", "Unhealthy", 2, alone=False)}

    def test_one_of_two_nodes_with_one_name_is_lost_by_the_list_only(
        self, manager: ClassicManager
    ) -> None:
        for pair in manager.answers["/info"]["SystemStatus"]:
            pair[0] = pair[0].replace(" node2", " node1")
        for line in manager.answers["/containers/json"]:
            line["Names"] = [name.replace("node2", "node1") for name in line["Names"]]
        agent = Agent(manager)
        with following(agent.source) as follower:
            driven = Driven(agent, follower)
            driven.until(ALL)
            manager.line("web2")["Status"] = "Host Down"
            manager.say(of_node("engine_disconnect", "node1"))
            driven.until([peer for peer in ALL if HERE in peer])

    def test_links_are_further_names(self) -> None:
        assert names_of({"Names": ["/node1/web/db", "/node1/db"]}) == ("node1", "db")
        assert names_of({"Names": ["/alone"]}) == ("", "alone")

    def test_networks_of_one_node_are_told_with_it_and_shared_ones_as_they_are(
        self, manager: ClassicManager
    ) -> None:
        networks = manager.line("web2")["NetworkSettings"]["Networks"]
        networks["net"] = {"NetworkID": "overlay", "IPAddress": "10.0.0.5"}
        manager.answers["/networks"].append({"Id": "overlay", "Name": "net", "Scope": "global"})
        manager.line("web2")["Labels"]["interlock.network"] = "net"
        agent = Agent(manager)
        snapshot = agent.source.read_once()
        workload = named(snapshot, "web2")
        assert workload is not None
        assert workload.networks == ("net", "node2/bridge")
        assert "10.0.0.5:8080 up" in agent.peers(snapshot)

    def test_a_proxys_bridge_is_not_shared_with_another_nodes(
        self, manager: ClassicManager
    ) -> None:
        manager.line("web3")["Labels"]["interlock.ext.name"] = "nginx"
        agent = Agent(manager)
        snapshot = agent.source.read_once()
        assert snapshot.proxy_networks == ("node1/bridge",)
        assert f"{HERE}:18081 up" in agent.peers(snapshot), "not its address on the bridge"

    def test_in_its_nodes_network_a_container_is_reached_there(
        self, manager: ClassicManager
    ) -> None:
        manager.line("web1")["HostConfig"]["NetworkMode"] = "host"
        agent = Agent(manager)
        assert f"{HERE}:8080 up" in agent.peers(agent.source.read_once())

    def test_an_unpublished_port_is_declared(self) -> None:
        line = recorded("classic-swarm/containers")[0]
        line["Ports"] = [{"PrivatePort": 9000, "Type": "tcp"}]
        made = as_inspected(line, node="node1", name="web3", shared={})
        assert list(made["Config"]["ExposedPorts"]) == ["9000/tcp"]
        assert made["NetworkSettings"]["Ports"] == {"9000/tcp": []}
