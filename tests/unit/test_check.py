"""`tidegate check` on engines of every kind: what is wrong, and what cures it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent import check as checks
from agent.check import Finding, Level
from agent.config.settings import Settings
from agent.driver.openresty import Status
from agent.driver.targets import Target
from agent.errors import InstanceUnauthorized, InstanceUnreachable, WatchUnavailable
from agent.model import Rejection
from tests.unit.discovery_fakes import recorded


class FakeEngine:
    version, api_version = "26.1.5", "1.45"

    def get(self, path: str, *, params: Any = None) -> bytes:
        assert path == "/swarm"
        return json.dumps({"TLSInfo": {"TrustRoot": "PEM"}}).encode()

    def close(self) -> None:
        pass


MANAGER = {"LocalNodeState": "active", "ControlAvailable": True}
WORKER = {"LocalNodeState": "active", "ControlAvailable": False}
NONE = {"LocalNodeState": "inactive"}


def swarm(info: dict[str, Any], **settings: Any) -> list[Finding]:
    return list(checks._swarm(Settings(**settings), FakeEngine(), info))


@pytest.fixture
def watch(monkeypatch):
    """The watch answers, or not."""

    class Opened:
        def close(self) -> None:
            pass

    state: dict[str, Exception | None] = {"error": None}

    def opener(socket: str, *, timeout: float):
        def open_watch(root: str, resume_from: int) -> Opened:
            assert root == "PEM"
            if state["error"] is not None:
                raise state["error"]
            return Opened()

        return open_watch

    monkeypatch.setattr(checks, "opener", opener)
    return state


def test_a_manager_with_its_watch_is_well(watch):
    assert [finding.level for finding in swarm(MANAGER)] == [Level.OK, Level.OK]


def test_a_watch_that_is_missing_is_a_warning_that_names_the_polling(watch):
    watch["error"] = WatchUnavailable("there is no socket /x")
    finding = swarm(MANAGER)[1]
    assert finding.level is Level.WARNING
    assert "there is no socket /x; instead tasks are polled every 0.5 s" in finding.text
    assert "/var/run/docker/swarm" in finding.cure


def test_a_watch_that_is_missing_but_required_is_a_failure(watch):
    watch["error"] = WatchUnavailable("there is no socket /x")
    assert swarm(MANAGER, watch="on")[1].level is Level.FAILED


def test_a_watch_that_is_off_is_well():
    finding = swarm(MANAGER, watch="off")[1]
    assert (finding.level, finding.subject) == (Level.OK, "watch")


def test_a_worker_is_a_failure_with_the_cure():
    (finding,) = swarm(WORKER)
    assert finding.level is Level.FAILED
    assert "Run the agent on a manager" in finding.cure


def test_a_worker_whose_containers_are_asked_for_is_well():
    assert swarm(WORKER, sources=("engine",))[0].level is Level.OK


def test_an_engine_in_no_swarm_is_well_unless_swarm_was_asked_for():
    assert swarm(NONE)[0].level is Level.OK
    (finding,) = swarm(NONE, sources=("swarm",))
    assert finding.level is Level.FAILED
    assert "docker swarm init" in finding.cure


def test_a_classic_swarms_manager_is_well_where_it_is_a_source():
    info = recorded("classic-swarm/info")
    (finding,) = checks._classic(Settings(), info)
    assert (finding.level, finding.text) == (
        Level.OK,
        "a classic Swarm's manager of 2 nodes, all healthy",
    )
    (finding,) = checks._classic(Settings(sources=("swarm",)), info)
    assert finding.level is Level.FAILED
    assert '["classic"]' in finding.cure


def test_a_classic_swarms_lost_node_is_a_warning():
    (finding,) = checks._classic(Settings(), recorded("classic-swarm/info-engine-down"))
    assert finding.level is Level.WARNING
    assert "not healthy: node2" in finding.text


class FakeInstance:
    url = "http://10.0.0.9:8081"

    def __init__(self, answer: Status | Exception) -> None:
        self._answer = answer

    def status(self) -> Status:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def instance(answer: Status | Exception) -> list[Finding]:
    return list(checks._instance(Target("x", "nginx.1", ()), FakeInstance(answer)))


def test_an_instance_that_answers_tells_who_it_is_and_who_writes():
    (finding,) = instance(Status("run-1", 7, "ab", writer="agent-a", versions={"nginx": "1.22.1"}))
    assert finding.level is Level.OK
    assert "nginx 1.22.1; revision 7, agent agent-a writes" in finding.text


@pytest.mark.parametrize("error", [InstanceUnauthorized("no"), InstanceUnreachable("no")])
def test_an_instance_that_cannot_be_used_is_a_failure_with_a_cure(error):
    (finding,) = instance(error)
    assert finding.level is Level.FAILED
    assert "TIDEGATE_ADMIN" in finding.cure


def test_an_instance_of_another_version_is_a_warning():
    finding = instance(Status("run-1", 7, "ab", versions={"tidegate": "9.9.9"}))[1]
    assert finding.level is Level.WARNING
    assert "9.9.9" in finding.text


def test_a_dict_that_is_nearly_full_is_a_warning():
    finding = instance(Status("run-1", 7, "ab", dict_capacity=1000, dict_free=50))[1]
    assert finding.level is Level.WARNING
    assert "TIDEGATE_DICT_SIZE" in finding.cure


def test_what_openresty_refused_is_a_warning_with_its_message_and_cure():
    refusal = Rejection("host b.test", "host_quarantined", "nginx refused: no b.pem", "Mend it.")
    (finding,) = checks._refusals([refusal], [])
    assert (finding.level, finding.subject) == (Level.WARNING, "host b.test")
    assert finding.text == "nginx refused: no b.pem (host_quarantined)"
    assert finding.cure == "Mend it."


def test_not_knowing_what_openresty_refused_is_a_warning():
    (finding,) = checks._refusals([], ["the agent could not be asked"])
    assert (finding.level, finding.text) == (Level.WARNING, "the agent could not be asked")
    assert "--url" in finding.cure
