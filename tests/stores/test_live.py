"""`tidegate run` follows its settings: the store late, changed, wrong, gone and back again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import free_port
from tests.stores.servers import Consul, Etcd, ZooKeeper

ROOT = Path(__file__).resolve().parents[2]

SERVICE = """\
[[service]]
name = "web"
[service.labels]
"interlock.hostname" = "{host}"
"interlock.domain" = "test"
[[service.peer]]
address = "192.0.2.1"
port = 80
"""


class Agent:
    """A `tidegate run` in a process of its own, asked over HTTP."""

    def __init__(self, home: Path, *arguments: str, **env: str) -> None:
        self.home = home
        self.port = free_port()
        self.arguments = arguments
        self.env = env
        for host in ("one", "two", "three"):
            (home / f"{host}.toml").write_text(SERVICE.format(host=host))

    def settings(self, host: str) -> str:
        """Settings that serve `host`.test."""
        return (
            f'ListenAddr = "127.0.0.1:{self.port}"\nSources = ["static"]\n'
            f'StaticFile = "{self.home}/{host}.toml"\nHostLinger = "0s"\n'
        )

    def start(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.endswith("_CONFIG")}
        self.log = (self.home / "agent.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", "run", *self.arguments],
            cwd=ROOT,
            env=env | self.env,
            stdout=self.log,
            stderr=self.log,
        )

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(15) == 0, self.told()

    def told(self) -> str:
        return (self.home / "agent.log").read_text()

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=5)

    def hosts(self) -> list[str]:
        return [route["host"] for route in self.get("/api/state").json()["routes"]]

    def metric(self, name: str) -> float:
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def eventually(self, what: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if what():
                    return
            except requests.ConnectionError:
                pass
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)


OK = 'tidegate_settings_reloads_total{result="ok"}'
REFUSED = 'tidegate_settings_reloads_total{result="refused"}'
UP = "tidegate_settings_store_up"


@pytest.fixture(params=[Etcd, ZooKeeper, Consul], ids=["etcd", "zookeeper", "consul"])
def server(request: Any, tmp_path: Path) -> Iterator[Any]:
    home = tmp_path / "store"
    home.mkdir()
    server = request.param(home)
    yield server
    server.stop()


def test_a_store_that_comes_late_changes_is_wrong_goes_and_comes_back(server, tmp_path):
    bootstrap = tmp_path / "config.toml"
    agent = Agent(tmp_path, "-c", str(bootstrap), "-k", server.url)
    bootstrap.write_text(agent.settings("three"))
    agent.start()
    try:
        # Down at the start: it waits, says so, and serves nothing that the file says.
        agent.eventually(lambda: "cannot be reached" in agent.get("/readyz").text)
        assert agent.get("/readyz").status_code == 503
        assert agent.get("/healthz").status_code == 200
        assert agent.hosts() == []
        assert agent.metric(UP) == 0

        # There, without the key: the same.
        server.start()
        agent.eventually(lambda: "missing or empty" in agent.get("/readyz").text, 45)
        assert agent.metric(UP) == 1

        # The key comes.
        server.put(agent.settings("one"))
        agent.eventually(lambda: agent.hosts() == ["one.test"])
        agent.eventually(lambda: agent.get("/readyz").status_code == 200)
        state = agent.get("/api/state").json()
        assert (state["settings_from"], state["settings_problem"]) == (
            f"{server.url}/interlock/v1/config",
            "",
        )

        # It changes.
        began = time.monotonic()
        server.put(agent.settings("two"))
        agent.eventually(lambda: agent.hosts() == ["two.test"])
        assert time.monotonic() - began < 10, "not by itself, but by the reading every 20 s"

        # It is wrong, and gone: the old one stays, and that is counted and told.
        refused, good = agent.metric(REFUSED), agent.metric(OK)
        server.put("ListenAddr = 5")
        agent.eventually(lambda: agent.metric(REFUSED) == refused + 1)
        problem = agent.get("/api/state").json()["settings_problem"]
        assert "line 1: ListenAddr: got 5, expected a string" in problem
        assert "settings refused" in agent.told()
        server.remove()
        agent.eventually(lambda: agent.metric(REFUSED) == refused + 2)
        assert agent.hosts() == ["two.test"]
        assert agent.metric(OK) == good

        # The store dies: it runs on with what it has.
        server.stop()
        agent.eventually(lambda: agent.metric(UP) == 0, 60)
        assert agent.hosts() == ["two.test"]
        assert agent.get("/readyz").status_code == 200

        # And is back, with something new.
        server.start()
        server.put(agent.settings("three"))
        agent.eventually(lambda: agent.hosts() == ["three.test"], 60)
        assert agent.metric(UP) == 1
    finally:
        agent.stop()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Agent, Path]]:
    path = tmp_path / "config.toml"
    agent = Agent(tmp_path, "-c", str(path))
    path.write_text(agent.settings("one"))
    agent.start()
    agent.eventually(lambda: agent.hosts() == ["one.test"])
    yield agent, path
    agent.stop()


def test_a_file_that_is_written_in_place_or_replaced_takes_effect_by_itself(file):
    agent, path = file
    path.write_text(agent.settings("two"))
    agent.eventually(lambda: agent.hosts() == ["two.test"])
    new = path.with_suffix(".new")
    new.write_text(agent.settings("three"))
    new.rename(path)
    agent.eventually(lambda: agent.hosts() == ["three.test"])
    assert agent.metric(OK) == 2


def test_a_file_that_is_wrong_emptied_or_gone_leaves_the_old_settings(file):
    agent, path = file
    path.write_text("nonsense")
    agent.eventually(lambda: agent.metric(REFUSED) == 1)
    path.write_text('Sources = ["static"]\n')
    agent.eventually(lambda: "StaticFile" in agent.get("/api/state").json()["settings_problem"])
    path.write_text("")
    agent.eventually(lambda: agent.metric(REFUSED) == 3)
    path.unlink()
    agent.eventually(lambda: agent.metric(UP) == 0)
    assert agent.hosts() == ["one.test"]
    path.write_text(agent.settings("two"))
    agent.eventually(lambda: agent.hosts() == ["two.test"])
    assert agent.get("/api/state").json()["settings_problem"] == ""


def test_sighup_still_reads_at_once_and_counts_each_time(file):
    agent, path = file
    path.write_text("nonsense")
    agent.eventually(lambda: agent.metric(REFUSED) == 1)
    agent.process.send_signal(signal.SIGHUP)
    agent.eventually(lambda: agent.metric(REFUSED) == 2)
    path.write_text(agent.settings("two"))
    agent.process.send_signal(signal.SIGHUP)
    agent.eventually(lambda: agent.hosts() == ["two.test"])


def test_sigterm_ends_an_agent_that_still_waits(tmp_path):
    agent = Agent(tmp_path, "-k", f"etcd://127.0.0.1:{free_port()}", TIDEGATE_CONFIG="x = 1")
    agent.env["TIDEGATE_CONFIG"] = agent.settings("one")
    agent.start()
    agent.eventually(lambda: agent.get("/readyz").status_code == 503)
    agent.stop()
    assert "which beats environment variable TIDEGATE_CONFIG" in agent.told()
