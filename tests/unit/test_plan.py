"""What would be done, line by line, and nothing done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from openresty_fake import FakeOpenResty, FakeRenderer, desired, site, upstream

from agent.driver.openresty import Build
from agent.driver.targets import Target
from agent.model import Algorithm, Desired, Host, Location, Membership, Policy, Site, TcpRoute
from agent.plan import InstancePlan, Running, _with_lingering, plan

TARGET = Target(id="x", name="nginx.1", urls=("http://x",))
BUILD = Build(nginx_version=1022001)


@pytest.fixture
def nginx() -> FakeOpenResty:
    return FakeOpenResty()


def planned(nginx: FakeOpenResty, wanted: Desired, **state: object) -> InstancePlan:
    """The plan, with the running agent's state as far as it matters."""
    (result,) = plan(
        wanted,
        [TARGET],
        connect=nginx.client,
        renderer=FakeRenderer(),
        running=Running.model_validate(state),
    )
    return result


def runs(nginx: FakeOpenResty, site: Site, *membership: str) -> None:
    """Let it run this site with these upstreams, empty but for "a/"."""
    renderer = FakeRenderer()
    nginx.files = dict(renderer.render(site, BUILD).files)
    nginx.generation = renderer.generation(nginx.files)
    nginx.membership = Membership(
        {name: upstream(name, *(("10.0.0.1",) if name == "a/" else ())) for name in membership}
    )


def lingers(host: str, path: str, name: str) -> dict[str, object]:
    return {
        "routes": [{"host": host, "path": path, "upstream": name}],
        "upstreams": [{"name": "a/", "peers": [{}]}, {"name": name, "peers": []}],
    }


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
    nginx.generation = renderer.generation(renderer.render(wanted.site, BUILD).files)
    assert not planned(nginx, wanted).changes


def test_each_kind_of_change_has_its_line(nginx):
    before = upstream("a/", "10.0.0.1", "10.0.0.2")
    nginx.membership = Membership({"a/": before, "b/": upstream("b/", "10.0.0.9")})
    one = replace(before.peers[0], weight=5)
    new = upstream("a/", "10.0.0.3", draining=()).peers[0]
    after = replace(
        before, peers=(one, new), policy=Policy(Algorithm.LEAST_CONN, slow_start=5.0), hold=15.0
    )
    result = planned(nginx, Desired(Membership({"a/": after}), site("a"), ()))
    changed, removed = result.upstreams
    assert changed.lines == (
        "~ task-10.0.0.1 10.0.0.1:8080 up -> task-10.0.0.1 10.0.0.1:8080 up weight 5",
        "- task-10.0.0.2 10.0.0.2:8080 up",
        "+ task-10.0.0.3 10.0.0.3:8080 up",
        '~ policy round_robin -> least_conn {"slow_start": 5.0}',
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


def test_a_host_that_lingers_is_neither_removed_nor_a_reload(nginx):
    runs(nginx, site("a", "gone"), "a/", "gone/")
    result = planned(nginx, desired({"a": ("10.0.0.1",)}), **lingers("gone", "/", "gone/"))
    assert not result.changes
    assert result.file_changes == ()
    assert result.lingering == ("gone/",)


def test_without_the_running_agent_what_lingers_is_removed(nginx):
    runs(nginx, site("a", "gone"), "a/", "gone/")
    result = planned(nginx, desired({"a": ("10.0.0.1",)}))
    assert result.reload
    assert [(item.name, item.change) for item in result.upstreams] == [("gone/", "removed")]


def test_a_context_root_that_lingers_beside_others_is_no_reload(nginx):
    (host,) = site("a").hosts
    whole = replace(host, locations=(*host.locations, Location("/old", "a/old")))
    runs(nginx, Site((whole,)), "a/", "a/old")
    result = planned(nginx, desired({"a": ("10.0.0.1",)}), **lingers("a", "/old", "a/old"))
    assert not result.changes
    assert result.lingering == ("a/old",)


def test_all_of_a_lingering_location_is_as_it_was(nginx):
    old = Location("/old", "a/old", mirror="s/", directives=("proxy_buffering off;",))
    (host,) = site("a").hosts
    runs(nginx, Site((replace(host, locations=(*host.locations, old)),)), "a/", "a/old")
    state = lingers("a", "/old", "a/old")
    state["routes"][0]["location"] = {
        "path": "/old",
        "upstream": "a/old",
        "mirror": "s/",
        "directives": ["proxy_buffering off;"],
    }
    assert not planned(nginx, desired({"a": ("10.0.0.1",)}), **state).changes


def test_the_default_backend_and_ports_stay_and_linger_like_hosts():
    default, tcp = (Location("/", "*/"),), (TcpRoute(5432, ":5432/"),)
    ours = Site(site("a").hosts, default, tcp)
    past = (Host("*", (), (Location("/old", "*/old"),)),)
    merged, gone = _with_lingering(ours, past, (TcpRoute(25, ":25/"),))
    assert merged.hosts == ours.hosts
    assert [item.path for item in merged.default] == ["/", "/old"]
    assert [route.port for route in merged.tcp] == [25, 5432]
    assert gone == Site(())


def test_what_is_asked_for_without_peers_does_not_linger(nginx):
    runs(nginx, site("a"), "a/")
    state = lingers("gone", "/", "gone/")
    result = planned(nginx, desired({"a": ("10.0.0.1",), "gone": ()}), **state)
    assert result.lingering == ()
    assert result.reload


@pytest.mark.parametrize("accepted_before", [True, False])
def test_a_host_in_quarantine_stays_as_it_runs_and_is_no_reload(nginx, accepted_before):
    runs(nginx, site("a"), "a/", "bad/")
    if accepted_before:
        nginx.files["bad.conf"] = "the last accepted text"
        nginx.generation = FakeRenderer().generation(nginx.files)
    state = [{"id": "x", "quarantined": ["bad"]}]
    result = planned(nginx, desired({"a": ("10.0.0.1",), "bad": ()}), instances=state)
    assert not result.changes
    assert result.quarantined == ("bad",)
    elsewhere = [{"id": "another", "quarantined": ["bad"]}]
    assert planned(nginx, desired({"a": ("10.0.0.1",), "bad": ()}), instances=elsewhere).reload
