"""The whole agent against a recorded classic Swarm manager over HTTP: what its proxy is told.

Sources, controller, compiler and fleet are the real ones; the manager speaks as one was recorded,
and fails as it is told to; the proxy keeps every membership that it was ever given, so that
"nothing was taken away" is about every moment and not only about the end. Time is put forward,
never slept away.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agent.config.settings import OpenResty, Settings
from agent.controller import Controller, State
from agent.discovery import build_sources, classic
from agent.discovery import engine as engine_module
from agent.discovery.classic import ClassicSource
from agent.discovery.docker_api import Connector
from agent.driver.fleet import Fleet, Options
from agent.metrics import Metrics
from agent.model import Membership
from tests.unit.classic_manager import ClassicManager, event, recorded_events
from tests.unit.openresty_fake import FakeOpenResty, FakeRenderer, eventually

pytestmark = pytest.mark.timeout(60)

URL = "http://nginx"
HOST, WEB = "web.example.test", "web.example.test/"
HERE, THERE = "127.0.0.1", "127.0.0.2"
ALL = [f"{HERE}:18081 up", f"{HERE}:18083 up", f"{THERE}:18082 up"]
SURVIVORS = [peer for peer in ALL if HERE in peer]


class Proxy(FakeOpenResty):
    """An OpenResty that remembers the peers of the web after every push."""

    def __init__(self) -> None:
        super().__init__(URL)
        self.seen: list[list[str]] = []

    def _pushed_to(self, membership: Membership) -> None:
        self.seen.append(peers_of(membership))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "membership" and hasattr(self, "seen"):
            self._pushed_to(value)

    @property
    def peers(self) -> list[str]:
        return peers_of(self.membership)


def peers_of(membership: Membership) -> list[str]:
    upstream = membership.upstreams.get(WEB)
    return sorted(
        f"{peer.address}:{peer.port} {peer.state}" for peer in (upstream.peers if upstream else ())
    )


class Clock:
    """Time that can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Agent:
    """An agent that pushes to one proxy what the manager tells."""

    def __init__(self, manager: ClassicManager, proxy: Proxy, **more: Any) -> None:
        self.manager = manager
        self.proxy = proxy
        self.clock = more.pop("clock", None)
        values = {
            "docker_url": manager.url,
            "request_timeout": 5.0,
            "openresty": OpenResty(urls=(URL,)),
        }
        self.settings = Settings(**(values | more))
        metrics = Metrics()
        self.controller = Controller(
            settings=self.settings,
            settings_from="test",
            build_sources=self._sources,
            fleet=Fleet(
                writer="agent",
                connect=lambda target: proxy.client(),
                renderer=FakeRenderer(),
                options=Options(heartbeat=0.1, site_quiet=0.01, site_max_wait=0.1),
                sink=metrics,
            ),
            metrics=metrics,
        )

    def _sources(self, settings: Settings, observer: Any) -> list[Any]:
        if self.clock is None:
            return build_sources(settings, observer)
        return [
            ClassicSource(
                settings, observer=observer, connect=Connector(settings), clock=self.clock
            )
        ]

    @property
    def state(self) -> State:
        return self.controller.state()

    def until(self, peers: list[str]) -> None:
        eventually(lambda: self.proxy.peers == peers)

    def until_in_touch(self, streams: int = 1) -> None:
        """Wait until the manager's events are listened to, by that many streams so far."""
        eventually(lambda: len(self.manager.streams) >= streams)
        eventually(lambda: self.state.sources[0].connected and not self.state.sources[0].last_error)


@contextmanager
def running(agent: Agent) -> Iterator[Agent]:
    agent.controller.start()
    try:
        yield agent
    finally:
        agent.controller.stop(5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "DOUBT_INTERVAL", 0.05)
    monkeypatch.setattr(engine_module, "STOP_CHECK", 0.05)


@pytest.fixture(name="manager")
def _manager() -> Iterator[ClassicManager]:
    manager = ClassicManager()
    yield manager
    manager.stop()


@pytest.fixture(name="proxy")
def _proxy() -> Proxy:
    return Proxy()


@pytest.fixture(name="agent")
def _agent(manager: ClassicManager, proxy: Proxy) -> Iterator[Agent]:
    """An agent that found out by itself what the manager is, in step with it."""
    with running(Agent(manager, proxy)) as agent:
        agent.until(ALL)
        agent.until_in_touch()
        yield agent


def node_lost(node: str) -> dict[str, Any]:
    found = copy.deepcopy(recorded_events("events-engine-down")[-1])
    found["Actor"]["Attributes"]["node.name"] = found["node"]["Name"] = node
    return found


DRAINED = [f"{HERE}:18081 draining", *ALL[1:]]


def still_hears(agent: Agent) -> None:
    """The next event counts at once: whatever went wrong before is over."""
    agent.manager.say(event("kill", signal="15"))
    agent.until(DRAINED)


class TestStart:
    def test_the_recorded_swarm_is_served_with_one_push_and_one_reload(
        self, agent: Agent, proxy: Proxy
    ) -> None:
        eventually(lambda: proxy.reloads == 1)
        assert proxy.pushes() == ["put"]
        assert proxy.seen == [ALL]
        assert f"{HOST}.conf" in proxy.files
        eventually(lambda: agent.state.readiness.ready)
        assert [source.name for source in agent.state.sources] == ["classic"]

    def test_half_of_the_cluster_is_never_pushed_for_all_of_it(
        self, manager: ClassicManager, proxy: Proxy
    ) -> None:
        manager.forgets("node2", status="Pending")
        with running(Agent(manager, proxy)) as agent:
            eventually(lambda: sum("containers/json" in item for item in manager.requests) > 3)
            assert proxy.pushes() == []
            assert agent.state.waiting_for
            manager.shows("containers", "info")
            agent.until(ALL)
        assert proxy.seen == [ALL]

    def test_an_agent_that_starts_anew_takes_nothing_away_from_a_manager_that_does_too(
        self, manager: ClassicManager, proxy: Proxy
    ) -> None:
        with running(Agent(manager, proxy)) as agent:
            agent.until(ALL)
        manager.forgets("node2", status="Pending")
        with running(Agent(manager, proxy)) as agent:
            eventually(lambda: sum("containers/json" in item for item in manager.requests) > 5)
            manager.shows("containers", "info")
            eventually(lambda: agent.state.readiness.ready)
        assert set(map(tuple, proxy.seen)) == {tuple(ALL)}

    def test_a_manager_that_is_not_there_is_waited_for_and_told(
        self, manager: ClassicManager, proxy: Proxy
    ) -> None:
        manager.stop()
        with running(Agent(manager, proxy)) as agent:
            eventually(lambda: agent.state.sources[0].last_error)
            assert not agent.state.readiness.ready
            assert proxy.pushes() == []
            manager.start()
            agent.until(ALL)


class TestNodeLost:
    def test_its_peers_leave_the_proxy_and_nothing_else_changes(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        eventually(lambda: proxy.reloads == 1)
        with manager.hanging("/containers/json", "/info"):
            manager.say(node_lost("node2"))
            agent.until(SURVIVORS)
        assert proxy.seen == [ALL, SURVIVORS], "one push, of that node's peers only"
        assert proxy.reloads == 1

    def test_it_comes_back(self, agent: Agent, manager: ClassicManager) -> None:
        back = copy.deepcopy(manager.answers)
        manager.line("web2")["Status"] = classic.HOST_DOWN
        manager.say(node_lost("node2"))
        agent.until(SURVIVORS)
        manager.answers.update(back)
        returned = node_lost("node2") | {"Action": "engine_reconnect", "status": "engine_reconnect"}
        manager.say(returned)
        agent.until(ALL)

    def test_the_last_node_lost_leaves_the_host_in_the_site(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        eventually(lambda: proxy.reloads == 1)
        with manager.hanging("/containers/json", "/info"):
            manager.say(node_lost("node1"), node_lost("node2"))
            agent.until([])
        assert proxy.reloads == 1
        assert f"{HOST}.conf" in proxy.files


class TestManagerRestart:
    def test_nothing_is_pushed_while_it_is_away_and_events_count_afterwards(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        manager.stop()
        eventually(lambda: not agent.state.sources[0].connected)
        eventually(lambda: agent.state.sources[0].last_error)
        manager.start()
        agent.until_in_touch(streams=2)
        assert proxy.seen == [ALL], "the proxy has heard nothing of it"
        still_hears(agent)

    @pytest.mark.parametrize("knows", ["no node", "one node", "too few containers"])
    def test_what_it_does_not_know_yet_stays_served(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy, knows: str
    ) -> None:
        manager.stop()
        if knows == "no node":
            manager.answers["/info"]["SystemStatus"] = [["Role", "primary"], ["Nodes", "0"]]
            manager.answers["/containers/json"] = []
        elif knows == "one node":
            manager.forgets("node1", status="Pending")
        else:
            manager.answers["/containers/json"].remove(manager.line("web3"))
        asked = len(manager.requests)
        manager.start()
        eventually(lambda: sum("containers/json" in item for item in manager.requests[asked:]) >= 4)
        manager.shows("containers", "info")
        agent.until_in_touch(streams=2)
        assert proxy.seen == [ALL]
        still_hears(agent)

    def test_what_ended_meanwhile_goes(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        manager.stop()
        manager.answers["/containers/json"].remove(manager.line("web1"))
        pairs = manager.answers["/info"]["SystemStatus"]
        next(pair for pair in pairs if pair[1].startswith("2 (2"))[1] = "1 (1 Running)"
        manager.start()
        agent.until([peer for peer in ALL if "18081" not in peer])

    def test_many_restarts_leak_no_connections(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        """Interlock re-subscribed thirty times a second after one, and never reloaded again."""
        for number in range(3):
            manager.stop()
            manager.start()
            agent.until_in_touch(streams=number + 2)
        requests = len(manager.requests)
        still_hears(agent)
        assert len(manager.streams) == 4, "one stream for each time that it was there"
        assert len(manager.requests) - requests < 5
        assert proxy.seen == [ALL, DRAINED]


class TestEventStream:
    def test_cut_in_mid_line_half_an_event_says_nothing(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        manager.send(json.dumps(event("die")).encode()[:-40])
        manager.cut()
        agent.until_in_touch(streams=2)
        assert proxy.seen == [ALL]
        still_hears(agent)

    def test_an_event_in_pieces_and_two_in_one_piece_are_events(
        self, agent: Agent, manager: ClassicManager
    ) -> None:
        raw = json.dumps(event("kill", signal="15")).encode()
        manager.send(raw[:17])
        manager.send(raw[17:] + json.dumps(event("die", "web3")).encode())
        agent.until([DRAINED[0], DRAINED[2]])

    def test_ten_minutes_of_silence_change_nothing_and_the_stream_is_opened_anew(
        self, manager: ClassicManager, proxy: Proxy
    ) -> None:
        clock = Clock()
        with running(Agent(manager, proxy, clock=clock)) as agent:
            agent.until(ALL)
            agent.until_in_touch()
            clock.ahead += engine_module.SILENCE_LIMIT + 1
            agent.until_in_touch(streams=2)
            assert proxy.seen == [ALL]
            assert agent.state.readiness.ready
            still_hears(agent)
            assert len(manager.streams) == 2


class TestSlowAnswers:
    def test_events_reach_the_proxy_while_a_list_takes_its_time(
        self, agent: Agent, manager: ClassicManager, proxy: Proxy
    ) -> None:
        with manager.hanging("/containers/json"):
            manager.say(event("start"))
            eventually(lambda: "containers/json" in manager.requests[-1])
            manager.say(event("kill", signal="15"))
            agent.until(DRAINED)
            manager.say(event("die", "web3"))
            agent.until([DRAINED[0], DRAINED[2]])
        # The list was made before those events, and does not undo them.
        eventually(lambda: agent.state.sources[0].connected)
        assert proxy.seen[-1] == [DRAINED[0], DRAINED[2]]

    def test_an_answer_that_never_comes_takes_nothing_away(
        self, manager: ClassicManager, proxy: Proxy
    ) -> None:
        quick = {"request_timeout": 0.3, "resync_interval": 0.1}
        with running(Agent(manager, proxy, **quick)) as agent:
            agent.until(ALL)
            with manager.hanging("/containers/json"):
                eventually(lambda: "did not answer in time" in agent.state.sources[0].last_error)
            agent.until_in_touch(streams=2)
            assert proxy.seen == [ALL]
            still_hears(agent)
