"""What would be done, line by line, and nothing done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from openresty_fake import FakeOpenResty, FakeRenderer, desired, site, upstream

from agent.driver.targets import Target
from agent.model import Desired, Membership, Policy
from agent.plan import InstancePlan, plan

TARGET = Target(id="x", name="nginx.1", urls=("http://x",))


@pytest.fixture
def nginx() -> FakeOpenResty:
    return FakeOpenResty()


def planned(nginx: FakeOpenResty, wanted: Desired) -> InstancePlan:
    (result,) = plan(wanted, [TARGET], connect=nginx.client, renderer=FakeRenderer())
    return result


def test_a_fresh_instance_would_get_everything_and_a_reload(nginx):
    result = planned(nginx, desired({"a": ("10.0.0.1",)}))
    ((change),) = result.upstreams
    assert (change.name, change.change) == ("a/", "added")
    assert change.lines == ("+ task-10.0.0.1 10.0.0.1:8080 up",)
    assert result.reload
    assert set(result.files) == {"00-ground.conf", "a.conf"}
    assert dict(result.file_changes) == {"00-ground.conf": "added", "a.conf": "added"}


def test_files_that_would_change_are_named(nginx):
    nginx.files = {"00-ground.conf": "ground", "a.conf": "another text", "b.conf": "gone soon"}
    result = planned(nginx, desired({"a": ("10.0.0.1",)}))
    assert dict(result.file_changes) == {"a.conf": "changed", "b.conf": "removed"}


def test_an_instance_in_step_would_get_nothing(nginx):
    wanted = desired({"a": ("10.0.0.1",)})
    renderer = FakeRenderer()
    nginx.membership = wanted.membership
    nginx.generation = renderer.generation(renderer.render(wanted.site, 1022001).files)
    assert not planned(nginx, wanted).changes


def test_each_kind_of_change_has_its_line(nginx):
    before = upstream("a/", "10.0.0.1", "10.0.0.2")
    nginx.membership = Membership({"a/": before, "b/": upstream("b/", "10.0.0.9")})
    one = replace(before.peers[0], weight=5)
    new = upstream("a/", "10.0.0.3", draining=()).peers[0]
    after = replace(before, peers=(one, new), policy=Policy("least_conn"), hold=15.0)
    result = planned(nginx, Desired(Membership({"a/": after}), site("a"), ()))
    changed, removed = result.upstreams
    assert changed.lines == (
        "~ task-10.0.0.1 10.0.0.1:8080 up -> task-10.0.0.1 10.0.0.1:8080 up weight 5",
        "- task-10.0.0.2 10.0.0.2:8080 up",
        "+ task-10.0.0.3 10.0.0.3:8080 up",
        "~ policy round_robin -> least_conn",
        "~ hold 0 s -> 15 s",
    )
    assert (removed.name, removed.change) == ("b/", "removed")


def test_only_questions_are_asked(nginx):
    planned(nginx, desired({"a": ("10.0.0.1",)}))
    assert nginx.names() == ["status", "membership", "get site"]


def test_an_instance_that_is_away_is_told_and_the_others_are_planned(nginx):
    nginx.down = True
    result = planned(nginx, desired({"a": ()}))
    assert "Connection refused" in result.error
