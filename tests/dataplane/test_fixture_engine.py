"""A recorded classic Swarm manager, `tidegate run`, and the real OpenResty side under load.

What the manager does wrong must not be seen by one client. Here nothing is faked but the engine:
its containers are real backends, of two nodes that are two loopback addresses.
"""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dataplane.harness import Backend, Load, Proxy, wait_until
from tests.dataplane.test_agent_pair import TOKEN, Agent
from tests.unit.classic_manager import ClassicManager, recorded_events

pytestmark = pytest.mark.dataplane

HOST = "web.example.test"
NODES = {"web1": "127.0.0.1", "web2": "127.0.0.2", "web3": "127.0.0.1"}


class ClassicAgent(Agent):
    """The agent of a classic Swarm."""

    def __init__(self, directory: Path, proxy: Proxy, manager: ClassicManager) -> None:
        self._url = manager.url
        super().__init__(directory, proxy)

    def configure(self, *, top: str = "", extension: str = "") -> None:
        self.config.write_text(
            textwrap.dedent(
                f"""\
                ListenAddr = "127.0.0.1:{self.port}"
                DockerURL = "{self._url}"
                SiteQuiet = "50ms"
                {top}
                [[Extensions]]
                Name = "nginx"
                Port = {self.proxy.http_port}
                {extension}
                [OpenResty]
                URLs = ["http://127.0.0.1:{self.proxy.admin_port}"]
                Token = "{TOKEN}"
                Heartbeat = "300ms"
                """
            )
        )


@pytest.fixture
def backends() -> Iterator[dict[str, Backend]]:
    made = {name: Backend(name, address) for name, address in NODES.items()}
    for backend in made.values():
        backend.listen()
    yield made
    for backend in made.values():
        backend.kill()


@pytest.fixture
def manager(backends: dict[str, Backend]) -> Iterator[ClassicManager]:
    manager = ClassicManager()
    for name, backend in backends.items():
        manager.line(name)["Ports"][0]["PublicPort"] = backend.port
    yield manager
    manager.stop()


@pytest.fixture
def proxy(make_proxy: Any) -> Proxy:
    proxy: Proxy = make_proxy(token=TOKEN)
    proxy.start()
    return proxy


def event(action: str, name: str, **attributes: str) -> dict[str, Any]:
    found = next(
        copy.deepcopy(item)
        for item in recorded_events("events")
        if item["Type"] == "container" and item["Actor"]["Attributes"]["name"] == name
    )
    found |= {"Action": action, "status": action}
    found["Actor"]["Attributes"] |= attributes
    return found


def test_no_client_sees_what_goes_wrong_with_the_manager(
    tmp_path: Path, proxy: Proxy, manager: ClassicManager, backends: dict[str, Backend]
) -> None:
    agent = ClassicAgent(tmp_path, proxy, manager)

    def states() -> dict[str, str]:
        live = proxy.admin.call("GET", f"/v1/membership/{HOST}%2F").json()["peers"]
        names = {(item.address, item.port): item.name for item in backends.values()}
        return {names[peer["address"], peer["port"]]: peer["state"] for peer in live}

    def connected() -> bool:
        return bool(agent.state()["sources"][0]["connected"])

    def listening(streams: int) -> None:
        wait_until(lambda: len(manager.streams) >= streams, timeout=20, what="a new stream")
        wait_until(connected, timeout=20, what="connected")

    everything = dict.fromkeys(NODES, "up")
    agent.start()
    try:
        agent.wait_in_sync()
        wait_until(lambda: states() == everything, timeout=20, what="all are served")
        wait_until(lambda: len(proxy.workers()) == 2, what="old workers gone")
        workers = proxy.workers()
        with Load(proxy.http_port, host=HOST, connections=4, pause=0.005) as load:
            manager.send(json.dumps(event("die", "web1")).encode()[:-40])
            manager.cut()
            listening(2)

            manager.stop()
            manager.forgets("node1", status="Pending")
            wait_until(lambda: not connected(), what="the manager is away")
            manager.start()
            listening(3)
            manager.shows("containers", "info")
            for name, backend in backends.items():
                manager.line(name)["Ports"][0]["PublicPort"] = backend.port
            assert states() == everything

            with manager.hanging("/containers/json"):
                manager.say(event("kill", "web1", signal="15"))
                wait_until(lambda: states()["web1"] == "draining", what="draining")
                manager.say(event("die", "web1"))
                wait_until(lambda: "web1" not in states(), what="gone")
            backends["web1"].kill()

            lost = copy.deepcopy(recorded_events("events-engine-down")[-1])
            lost["Actor"]["Attributes"]["node.name"] = lost["node"]["Name"] = "node2"
            with manager.hanging("/containers/json", "/info"):
                backends["web2"].kill()
                manager.say(lost)
                wait_until(lambda: states() == {"web3": "up"}, what="the node's peers are gone")
            served = load.total
            wait_until(lambda: load.total > served + 50, what="the rest serves on")
        assert load.failed == {}
        assert set(load.names) == set(NODES)
        assert proxy.workers() == workers, "no reload"
        assert agent.metric("tidegate_reloads_total") == 1
    finally:
        agent.end()
