"""Which sources the settings make, and what "auto" turns out to be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agent.config.settings import Settings
from agent.discovery import build_sources
from agent.discovery.base import Backoff
from agent.errors import DiscoveryError, DockerUnavailable, SettingsError
from tests.unit.discovery_fakes import (
    FakeEngine,
    Heard,
    following,
    named,
    recorded,
    swarm_engine,
)

pytestmark = pytest.mark.timeout(30)


def plain_engine() -> FakeEngine:
    return FakeEngine({"/info": recorded("engine/info"), "/containers/json": []})


@pytest.fixture(name="static_file")
def _static_file(tmp_path: Path) -> str:
    path = tmp_path / "static.toml"
    path.write_text('[[service]]\nname = "outside"\n')
    return str(path)


def test_auto_on_a_manager_is_the_swarm() -> None:
    engine = swarm_engine()
    (source,) = build_sources(Settings(watch="off"), connect=engine.connect)
    assert source.name == "auto"
    snapshot = source.read_once()
    assert (source.name, snapshot.source) == ("swarm", "swarm")
    assert named(snapshot, "shop_web")


def test_auto_on_a_plain_engine_is_its_containers() -> None:
    (source,) = build_sources(Settings(), connect=plain_engine().connect)
    assert source.read_once().source == source.name == "engine"


def test_auto_on_a_worker_says_what_to_do() -> None:
    engine = swarm_engine()
    engine.answers["/info"]["Swarm"]["ControlAvailable"] = False
    (source,) = build_sources(Settings(), connect=engine.connect)
    with pytest.raises(DiscoveryError, match="run the agent on a manager"):
        source.read_once()


def test_auto_waits_for_an_engine_that_is_down_at_the_start() -> None:
    engine = plain_engine()
    engine.down = DockerUnavailable("connection refused")
    heard = Heard()
    (source,) = build_sources(Settings(), heard, connect=engine.connect)
    with following(source) as follower:
        follower.until(lambda: source.status.last_error == "connection refused")
        assert source.status.name == "auto"
        assert follower.snapshots == []
        engine.down = None
        follower.until(lambda: follower.snapshots)
        assert source.status.name == source.name == "engine"
        assert source.status.last_error == ""
    assert heard.modes == ["events"]


def test_a_manager_that_is_still_starting_is_not_taken_for_a_plain_engine() -> None:
    engine = swarm_engine()
    engine.answers["/info"]["Swarm"] |= {"LocalNodeState": "pending", "ControlAvailable": False}
    (source,) = build_sources(Settings(watch="off"), connect=engine.connect)
    with following(source) as follower:
        follower.until(lambda: "pending" in source.status.last_error)
        engine.answers["/info"]["Swarm"] |= {"LocalNodeState": "active", "ControlAvailable": True}
        follower.until(lambda: follower.snapshots)
        assert source.name == "swarm"


def test_a_static_file_joins_auto(static_file: str) -> None:
    sources = build_sources(Settings(static_file=static_file), connect=plain_engine().connect)
    assert [source.name for source in sources] == ["auto", "static"]
    assert named(sources[1].read_once(), "outside")


def test_static_alone_never_touches_the_engine(static_file: str) -> None:
    settings = Settings(sources=("static",), static_file=static_file)
    engine = plain_engine()
    (source,) = build_sources(settings, connect=engine.connect)
    with following(source) as follower:
        follower.until(lambda: follower.snapshots)
    assert engine.connections == 0


def test_static_needs_a_file() -> None:
    with pytest.raises(SettingsError, match="StaticFile"):
        build_sources(Settings(sources=("static",)))


def test_each_source_is_made_once() -> None:
    engine = swarm_engine()
    named_ones = Settings(sources=("swarm", "engine", "swarm"))
    sources = build_sources(named_ones, connect=engine.connect)
    assert [source.name for source in sources] == ["swarm", "engine"]
    both = build_sources(Settings(sources=("auto", "swarm", "engine")), connect=engine.connect)
    assert [source.name for source in both] == ["auto"]


def test_with_the_swarm_beside_it_the_engine_leaves_tasks_alone() -> None:
    engine = plain_engine()
    raw = recorded("engine/web-1")
    raw["Config"]["Labels"]["com.docker.swarm.service.id"] = "abc"
    engine.answers |= {
        "/containers/json": recorded("engine/containers")[2:],
        f"/containers/{raw['Id']}/json": raw,
    }
    listed = {item["Id"] for item in engine.answers["/containers/json"]}
    assert listed == {raw["Id"]}
    _, beside = build_sources(Settings(sources=("swarm", "engine")), connect=engine.connect)
    (alone,) = build_sources(Settings(sources=("engine",)), connect=engine.connect)
    assert named(beside.read_once(), "web-1") is None
    assert named(alone.read_once(), "web-1")


def test_waits_grow_up_to_a_cap_and_never_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff(first=0.1, cap=0.5)
    assert [backoff.wait() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.reset()
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    assert backoff.wait() == 0.05
