"""Promises of the fleet: every instance ends up with what is desired, at the least cost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from openresty_fake import (
    CountingSink,
    FakeOpenResty,
    FakeRenderer,
    desired,
    eventually,
    upstream,
)

from agent.driver.fleet import Fleet, InstanceState, Options
from agent.driver.openresty import CertificateProblem
from agent.driver.targets import Target
from agent.errors import PushRefused, SiteRefused
from agent.model import (
    BackendTls,
    Desired,
    Host,
    Location,
    Membership,
    Peer,
    Site,
    TcpRoute,
    Upstream,
)

FAST = Options(heartbeat=0.1, site_quiet=0.02, site_max_wait=0.2)


class Rig:
    """A fleet over fakes."""

    def __init__(self, *servers: FakeOpenResty, writer: str = "agent-a", options=FAST) -> None:
        self.servers = {server.name: server for server in servers}
        self.sink = CountingSink()
        self.renderer = FakeRenderer()
        self.fleet = Fleet(
            writer=writer,
            connect=self.connect,
            renderer=self.renderer,
            options=options,
            sink=self.sink,
        )
        self.present(*servers)

    def connect(self, target: Target):
        return self.servers[target.id].client()

    def present(self, *servers: FakeOpenResty) -> None:
        self.servers.update({server.name: server for server in servers})
        self.fleet.set_instances(
            tuple(Target(id=s.name, name=s.name, urls=(f"http://{s.name}",)) for s in servers)
        )

    def state(self, name: str = "nginx.1") -> InstanceState:
        return next(view.state for view in self.fleet.views() if view.name == name)

    def in_sync(self) -> bool:
        return all(view.in_sync for view in self.fleet.views())


@contextmanager
def running(*servers: FakeOpenResty, **options) -> Iterator[Rig]:
    rig = Rig(*servers, **options)
    rig.fleet.start()
    try:
        yield rig
    finally:
        for server in servers:
            server.site_takes.set()
        rig.fleet.stop(5)
    assert rig.sink.errors == []


@pytest.fixture
def nginx() -> FakeOpenResty:
    return FakeOpenResty()


def settle(rig: Rig, wanted: Desired) -> None:
    rig.fleet.apply(wanted)
    eventually(rig.in_sync)


def test_a_fresh_instance_gets_everything_at_once_membership_before_site(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a.example.com": ("10.0.0.1",)}))
    assert nginx.names()[:2] == ["status", "lease"] or nginx.names()[:2] == ["lease", "status"]
    assert [n for n in nginx.names() if n in ("put", "site")] == ["put", "site"]
    assert list(nginx.membership.upstreams) == ["a.example.com/"]
    assert set(nginx.files) == {"00-ground.conf", "a.example.com.conf"}


def test_a_peer_that_comes_costs_its_own_upstream_and_no_reload(nginx):
    first = desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)})
    second = desired({"a": ("10.0.0.1", "10.0.0.3"), "b": ("10.0.0.2",)}, keep=first)
    with running(nginx) as rig:
        settle(rig, first)
        settle(rig, second)
    assert ("patch", (["a/"], [])) in nginx.calls
    assert nginx.pushes() == ["put", "patch"]
    assert nginx.reloads == 1


def test_a_change_is_measured_from_when_it_was_heard_of(nginx):
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx) as rig:
        settle(rig, first)
        assert rig.sink.applies == []
        rig.fleet.apply(desired({"a": ("10.0.0.2",)}, keep=first), time.monotonic() - 0.5)
        eventually(rig.in_sync)
    ((kind, seconds),) = rig.sink.applies
    assert kind == "membership"
    assert 0.5 <= seconds < 60


def test_a_burst_coalesces_and_the_last_one_wins(nginx):
    wanted = first = desired({"a": ("10.0.0.1",)})
    with running(nginx) as rig:
        settle(rig, first)
        with nginx.lock:
            for number in range(2, 202):
                wanted = desired({"a": (f"10.0.0.{number}",)}, keep=wanted)
                rig.fleet.apply(wanted)
        eventually(rig.in_sync)
    assert nginx.membership.upstreams["a/"].peers[0].address == "10.0.0.201"
    assert len(nginx.pushes()) <= 4


def test_an_agent_that_comes_back_changes_nothing_when_nothing_has_changed(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
    before = nginx.revision, nginx.generation
    nginx.calls.clear()
    with running(nginx, writer="agent-b") as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
    assert nginx.pushes() == []
    assert nginx.names("site") == []
    assert (nginx.revision, nginx.generation) == before
    assert nginx.reloads == 1


def test_an_agent_that_comes_back_pushes_only_what_changed_meanwhile(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)}))
    revision = nginx.revision
    nginx.calls.clear()
    with running(nginx, writer="agent-b") as rig:
        settle(rig, desired({"a": ("10.0.0.1",), "b": ("10.0.0.9",)}))
    assert [call for call in nginx.calls if call[0] in ("patch", "put")] == [
        ("patch", (["b/"], []))
    ]
    assert nginx.revision > revision
    assert nginx.reloads == 1


def test_an_instance_that_restarted_empty_gets_everything_again(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        nginx.restart(forget=True)
        eventually(lambda: nginx.generation)
        eventually(rig.in_sync)
    assert nginx.pushes() == ["put", "put"]
    assert list(nginx.membership.upstreams) == ["a/"]


def test_an_instance_that_restarted_from_disk_is_compared_and_left_alone(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        nginx.restart()
        eventually(lambda: "versions" in nginx.names())
        eventually(lambda: nginx.writer == "agent-a")
        eventually(rig.in_sync)
    assert nginx.pushes() == ["put"]
    assert nginx.reloads == 1


def crowd(count: int, *, port: int = 80) -> Desired:
    """Enough upstreams that they do not go in one push."""
    peers = tuple(Peer(f"t{n}", "10.0.0.1", port) for n in range(50))
    upstreams = {f"{n}/": Upstream(f"{n}/", peers) for n in range(count)}
    return Desired(Membership(upstreams), Site(()), ())


def test_a_large_membership_goes_in_parts(nginx):
    with running(nginx) as rig:
        settle(rig, crowd(500))
        assert len(nginx.names("patch")) > 2
        assert "put" not in nginx.names()
        settle(rig, crowd(300, port=81))
    assert nginx.membership == crowd(300, port=81).membership
    removed = [detail[1] for name, detail in nginx.calls if name == "patch"]
    assert [len(names) for names in removed if names] == [200]
    assert removed[-1]


def test_an_agent_that_comes_back_to_a_large_membership_reads_what_differs_alone(nginx):
    with running(nginx) as rig:
        settle(rig, crowd(500))
    before = crowd(500).membership.upstreams
    changed = {**before, "7/": replace(before["7/"], hold=3.0)}
    nginx.calls.clear()
    with running(nginx, writer="agent-b") as rig:
        settle(rig, Desired(Membership(changed), Site(()), ()))
    assert [detail for name, detail in nginx.calls if name == "upstream"] == ["7/"]
    assert [detail for name, detail in nginx.calls if name == "patch"] == [(["7/"], [])]
    assert "membership" not in nginx.names()


def test_a_dict_that_fills_up_is_told_before_it_is_full(nginx):
    nginx.dict_capacity, nginx.dict_free = 64 << 20, 20 << 20
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        assert rig.fleet.rejections() == ()
        nginx.dict_free = 10 << 20
        (told,) = eventually(rig.fleet.rejections)
    assert (told.reason, told.subject) == ("dict_nearly_full", "OpenResty nginx.1")
    assert "10240 kB of 65536 kB" in told.message
    assert "TIDEGATE_DICT_SIZE" in told.hint


def test_what_an_instance_says_of_certificates_is_told_until_it_is_cured(nginx, caplog):
    caplog.set_level(logging.INFO)
    tls = BackendTls(verify=True, ca="/ca.pem")
    secure = Location("/api", "a/api", backend_tls=tls)
    site = Site((Host("a", (), (Location("/", "a/"), secure)),))
    names = Membership({name: upstream(name, "10.0.0.1") for name in ("a/", "a/api")})
    nginx.certificate_problems = (
        CertificateProblem("a", "", "certificate_missing", "it is not there", refused=True),
        CertificateProblem("", "", "certificate_expires_soon", "it ends", refused=False),
        CertificateProblem(None, tls.identity("a"), "backend_ca_missing", "no CA", refused=True),
        CertificateProblem(None, "of an earlier site", "backend_ca_missing", "no", refused=True),
    )
    with running(nginx) as rig:
        settle(rig, Desired(names, site, ()))
        assert rig.fleet.rejections() == ()
        nginx.certificates_serial = 1
        told = eventually(rig.fleet.rejections)
        assert [(item.subject, item.reason) for item in told] == [
            ("host a", "certificate_missing"),
            ("default certificate", "certificate_expires_soon"),
            ("upstream a/api", "backend_ca_missing"),
        ]
        assert "refused until" in told[0].message
        assert "served nevertheless" in told[1].message
        assert all(item.hint for item in told)
        nginx.certificate_problems, nginx.certificates_serial = (), 2
        eventually(lambda: rig.fleet.rejections() == ())
        assert nginx.names("certificates") == ["certificates"] * 2
        # The log has it too, once when it comes and once when it goes.
        eventually(lambda: "default certificate: over (certificate_expires_soon)" in caplog.text)
        logged = [record.getMessage() for record in caplog.records]
        assert sum("host a: it is not there (certificate_missing)" in line for line in logged) == 1
        assert sum("host a: over (certificate_missing)" in line for line in logged) == 1


def test_http3_that_an_instance_cannot_do_is_told(nginx):
    wanted = desired({"a": ("10.0.0.1",)})
    with running(nginx, options=replace(FAST, http3=True)) as rig:
        settle(rig, wanted)
        (told,) = rig.fleet.rejections()
        assert (told.subject, told.reason) == ("OpenResty nginx.1", "http3_unavailable")
        nginx.features = frozenset({"http_v3"})
        eventually(lambda: rig.fleet.rejections() == ())


def test_drift_of_membership_is_found_by_the_heartbeat_and_mended(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        with nginx.lock:
            nginx.membership, nginx.revision = Membership({}), nginx.revision + 5
        eventually(lambda: "a/" in nginx.membership.upstreams)


def test_drift_of_the_site_is_found_by_the_heartbeat_and_mended(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        good = nginx.generation
        with nginx.lock:
            nginx.generation = "f" * 64
        eventually(lambda: nginx.generation == good)
        eventually(rig.in_sync)


def test_a_push_whose_answer_was_lost_is_not_done_twice(nginx):
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx) as rig:
        settle(rig, first)
        nginx.lose_answers = 1
        settle(rig, desired({"a": ("10.0.0.2",)}, keep=first))
    assert nginx.pushes() == ["put", "patch"]


def test_a_conflict_is_resolved_by_comparing(nginx):
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx, options=Options(heartbeat=30, site_quiet=0.02)) as rig:
        settle(rig, first)
        with nginx.lock:
            nginx.revision += 7
            nginx.membership = Membership({"x/": upstream("x/", "10.9.9.9")})
        settle(rig, desired({"a": ("10.0.0.2",)}, keep=first))
    assert list(nginx.membership.upstreams) == ["a/"]
    assert ("nginx.1", "delta", "conflict") in rig.sink.pushes


def test_an_instance_that_is_away_is_waited_for_and_does_not_hold_up_the_others(nginx):
    other = FakeOpenResty("nginx.2")
    nginx.down = True
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx, other) as rig:
        rig.fleet.apply(first)
        eventually(lambda: rig.state("nginx.2") is InstanceState.IN_SYNC)
        assert eventually(lambda: rig.state("nginx.1")) is InstanceState.UNREACHABLE
        nginx.down = False
        eventually(rig.in_sync)
    assert nginx.generation == other.generation


def test_a_busy_instance_is_asked_again(nginx):
    nginx.busy = 3
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
    assert ("nginx.1", "full", "busy") in rig.sink.pushes


def test_a_slow_site_does_not_hold_up_membership(nginx):
    first = desired({"a": ("10.0.0.1",)})
    second = desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)}, keep=first)
    third = desired({"a": ("10.0.0.3",), "b": ("10.0.0.2",)}, keep=second)
    with running(nginx) as rig:
        settle(rig, first)
        nginx.site_takes.clear()
        rig.fleet.apply(second)
        eventually(lambda: len(nginx.names("site")) == 2)
        rig.fleet.apply(third)
        eventually(lambda: nginx.membership.upstreams["a/"].peers[0].address == "10.0.0.3")
        assert nginx.reloads == 1
        nginx.site_takes.set()
        eventually(rig.in_sync)
    assert nginx.reloads == 2


def test_an_upstream_goes_only_after_the_site_that_named_it(nginx):
    first = desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)})
    second = desired({"a": ("10.0.0.1",)}, keep=first)
    with running(nginx) as rig:
        settle(rig, first)
        nginx.site_takes.clear()
        rig.fleet.apply(second)
        eventually(lambda: len(nginx.names("site")) == 2)
        assert "b/" in nginx.membership.upstreams
        nginx.site_takes.set()
        eventually(lambda: "b/" not in nginx.membership.upstreams)
    order = [call for call in nginx.calls if call[0] in ("site", "patch")]
    assert order[-1] == ("patch", ([], ["b/"]))


def test_a_retired_upstream_keeps_only_peers_that_still_live(nginx):
    first = desired({"a": ("10.0.0.1", "10.0.0.2")})
    moved = Membership({"z/": upstream("z/", "10.0.0.1")})
    second = Desired(moved, desired({"z": ()}).site, ())
    with running(nginx) as rig:
        settle(rig, first)
        nginx.site_takes.clear()
        rig.fleet.apply(second)
        eventually(lambda: len(nginx.names("site")) == 2)
        kept = nginx.membership.upstreams["a/"].peers
        nginx.site_takes.set()
        eventually(lambda: list(nginx.membership.upstreams) == ["z/"])
    assert [peer.address for peer in kept] == ["10.0.0.1"]


def test_a_new_site_goes_to_one_instance_after_the_other(nginx):
    other = FakeOpenResty("nginx.2")
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx, other) as rig:
        settle(rig, first)
        nginx.site_takes.clear()
        other.site_takes.clear()
        rig.fleet.apply(desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)}, keep=first))
        eventually(lambda: len(nginx.names("site")) + len(other.names("site")) == 3)
        time.sleep(0.1)
        assert len(nginx.names("site")) + len(other.names("site")) == 3
        nginx.site_takes.set()
        other.site_takes.set()
        eventually(rig.in_sync)
    assert (nginx.reloads, other.reloads) == (2, 2)


def test_site_changes_coalesce_over_the_quiet_time(nginx):
    wanted = first = desired({"a": ("10.0.0.1",)})
    options = Options(heartbeat=0.1, site_quiet=0.15, site_max_wait=10)
    with running(nginx, options=options) as rig:
        settle(rig, first)
        for number in range(10):
            wanted = desired({"a": ("10.0.0.1",), f"b{number}": ()}, keep=wanted)
            rig.fleet.apply(wanted)
            time.sleep(0.02)
        eventually(rig.in_sync)
    assert nginx.reloads == 2


def test_site_changes_wait_no_longer_than_the_maximum(nginx):
    wanted = first = desired({"a": ("10.0.0.1",)})
    options = Options(heartbeat=0.1, site_quiet=30, site_max_wait=0.2)
    with running(nginx, options=options) as rig:
        settle(rig, first)
        wanted = desired({"a": ("10.0.0.1",), "b": ()}, keep=wanted)
        rig.fleet.apply(wanted)
        eventually(lambda: nginx.reloads == 2, within=5)


def test_a_site_that_comes_back_to_what_it_was_reloads_nothing(nginx):
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx) as rig:
        settle(rig, first)
        rig.fleet.apply(desired({"a": ("10.0.0.1",), "b": ()}, keep=first))
        settle(rig, desired({"a": ("10.0.0.1",)}, keep=first))
        time.sleep(0.1)
        eventually(rig.in_sync)
    assert nginx.reloads == 1


def refuses(file: str, when=lambda text: True):
    def check(files):
        if file in files and when(files[file]):
            return SiteRefused("cannot load certificate /certs/b.pem", file=file)
        return None

    return check


def test_a_refused_host_is_put_apart_and_the_others_go_live(nginx):
    nginx.refuse_site = refuses("b.conf")
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",), "c": ("10.0.0.3",)}))
        (rejection,) = rig.fleet.rejections()
    assert set(nginx.files) == {"00-ground.conf", "a.conf", "c.conf"}
    assert nginx.reloads == 1
    assert rejection.subject == "host b"
    assert rejection.reason == "host_quarantined"
    assert "cannot load certificate" in rejection.message


def test_several_refused_hosts_are_put_apart_one_by_one(nginx):
    first, second = refuses("b.conf"), refuses("c.conf")
    nginx.refuse_site = lambda files: first(files) or second(files)
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",), "b": (), "c": ()}))
    assert set(nginx.files) == {"00-ground.conf", "a.conf"}


def test_a_host_that_turns_bad_serves_on_as_it_was(nginx):
    first = desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)})
    with running(nginx) as rig:
        settle(rig, first)
        good = nginx.files["b.conf"]
        nginx.refuse_site = refuses("b.conf", lambda text: text != good)
        hosts = tuple(
            host if host.name == "a" else type(host)(host.name, ("alias.b",), host.locations)
            for host in first.site.hosts
        )
        settle(rig, Desired(first.membership, type(first.site)(hosts), ()))
        assert rig.fleet.rejections()
    assert nginx.files["b.conf"] == good
    assert nginx.reloads == 1


def test_a_fresh_agent_keeps_what_a_refused_host_had_before(nginx):
    first = desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)})
    with running(nginx) as rig:
        settle(rig, first)
    good = nginx.files["b.conf"]
    nginx.refuse_site = refuses("b.conf", lambda text: text != good)
    hosts = tuple(
        host if host.name == "a" else type(host)(host.name, ("alias.b",), host.locations)
        for host in first.site.hosts
    )
    with running(nginx, writer="agent-b") as rig:
        settle(rig, Desired(first.membership, type(first.site)(hosts), ()))
        assert rig.fleet.rejections()
    assert nginx.files["b.conf"] == good
    assert nginx.reloads == 1


def broken_template(files):
    """Every host is refused, whichever it is."""
    hosts = sorted(set(files) - {"00-ground.conf"})
    return SiteRefused("unknown directive", file=hosts[0]) if hosts else None


def test_a_template_that_breaks_every_host_takes_nothing_away_from_a_running_site(nginx):
    names = {f"h{number}": () for number in range(20)}
    with running(nginx) as rig:
        settle(rig, desired(names))
    good = nginx.generation
    nginx.refuse_site = broken_template
    with running(nginx, writer="agent-b") as rig:
        rig.renderer.ground = "other"
        rig.fleet.apply(desired(names))
        eventually(lambda: rig.state() is InstanceState.REFUSED)
        assert "more than half of the hosts" in rig.fleet.views()[0].error
    assert nginx.generation == good


def test_a_fresh_instance_serves_the_few_hosts_that_it_accepts(nginx):
    nginx.refuse_site = lambda files: broken_template(
        {k: v for k, v in files.items() if k != "h7.conf"}
    )
    with running(nginx) as rig:
        settle(rig, desired({f"h{number}": () for number in range(20)}))
    assert set(nginx.files) == {"00-ground.conf", "h7.conf"}


def test_a_refused_host_is_tried_again_when_its_text_changes(nginx):
    nginx.refuse_site = refuses("b.conf", lambda text: "alias" not in text)
    first = desired({"a": (), "b": ()})
    with running(nginx) as rig:
        settle(rig, first)
        hosts = tuple(
            host if host.name == "a" else type(host)(host.name, ("alias.b",), host.locations)
            for host in first.site.hosts
        )
        settle(rig, Desired(first.membership, type(first.site)(hosts), ()))
        assert rig.fleet.rejections() == ()
    assert "b.conf" in nginx.files


def test_a_refused_host_is_tried_again_when_the_settings_change(nginx):
    nginx.refuse_site = refuses("b.conf")
    with running(nginx) as rig:
        settle(rig, desired({"a": (), "b": ()}))
        nginx.refuse_site = lambda files: None
        rig.fleet.reconfigure(connect=rig.connect, renderer=rig.renderer, options=FAST)
        eventually(lambda: "b.conf" in nginx.files)
        eventually(lambda: rig.fleet.rejections() == ())


def test_a_site_refused_without_a_file_leaves_the_old_one_and_is_tried_again(nginx):
    first = desired({"a": ("10.0.0.1",)})
    with running(nginx) as rig:
        settle(rig, first)
        good = nginx.generation
        nginx.refuse_site = lambda files: SiteRefused("bind() to 0.0.0.0:80 failed", file=None)
        rig.fleet.apply(desired({"a": ("10.0.0.1",), "b": ()}, keep=first))
        eventually(lambda: rig.state() is InstanceState.REFUSED)
        assert nginx.generation == good
        assert "bind()" in rig.fleet.views()[0].error
        nginx.refuse_site = lambda files: None
        eventually(rig.in_sync)
    assert nginx.reloads == 2


def test_a_setting_that_nginx_refuses_is_named_and_no_host_is_put_apart(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        good = nginx.generation
        nginx.refuse_site = lambda files: (
            SiteRefused("128 worker_connections are not enough", file="00-limits.events")
            if "00-limits.events" in files
            else None
        )
        rig.renderer.limits = {"00-limits.events": "worker_connections 128;\n"}
        rig.fleet.apply(desired({"a": ("10.0.0.1",), "b": ()}))
        eventually(lambda: rig.state() is InstanceState.REFUSED)
        told = rig.fleet.views()[0].error
        assert "MaxConn of the settings does not work" in told
        assert "128 worker_connections are not enough" in told
        assert rig.fleet.rejections() == ()
        assert nginx.generation == good


def test_a_refused_upstream_does_not_hold_up_the_others(nginx):
    def refuse(upstreams):
        if "b/" in upstreams and upstreams["b/"].peers[0].address == "10.0.0.66":
            return PushRefused("invalid", status=422, reasons={"b/": "address: not one of ours"})
        return None

    nginx.refuse_push = refuse
    first = desired({"a": ("10.0.0.1",), "b": ("10.0.0.2",)})
    with running(nginx) as rig:
        settle(rig, first)
        second = desired({"a": ("10.0.0.9",), "b": ("10.0.0.66",)}, keep=first)
        settle(rig, second)
        (rejection,) = rig.fleet.rejections()
        addresses = {n: u.peers[0].address for n, u in nginx.membership.upstreams.items()}
        assert addresses == {"a/": "10.0.0.9", "b/": "10.0.0.2"}
        assert (rejection.subject, rejection.reason) == ("upstream b/", "upstream_refused")
        settle(rig, desired({"a": ("10.0.0.9",), "b": ("10.0.0.3",)}, keep=second))
        assert rig.fleet.rejections() == ()


def test_a_full_dict_is_reported_and_mended_when_there_is_room(nginx):
    nginx.refuse_push = lambda u: PushRefused("no room", status=507, reasons={})
    with running(nginx) as rig:
        rig.fleet.apply(desired({"a": ()}))
        eventually(lambda: rig.state() is InstanceState.REFUSED)
        nginx.refuse_push = lambda u: None
        eventually(rig.in_sync)


def test_a_second_agent_stands_by_and_takes_over_when_the_lease_lapses(nginx):
    nginx.lease_ttl = 0.4
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        with running(nginx, writer="agent-b") as second:
            second.fleet.apply(desired({"a": ("10.0.0.2",)}))
            eventually(lambda: second.state() is InstanceState.STANDBY)
            assert nginx.pushes() == ["put"]
            # The first agent dies: nobody renews, nobody gives the lease up.
            rig.fleet.set_instances(())
            eventually(lambda: second.in_sync())
    assert nginx.membership.upstreams["a/"].peers[0].address == "10.0.0.2"


def test_a_clean_end_gives_the_lease_up(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ()}))
        assert nginx.writer == "agent-a"
    assert nginx.writer == ""


def test_a_standby_that_ends_leaves_the_lease_alone(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ()}))
        with running(nginx, writer="agent-b") as second:
            second.fleet.apply(desired({"a": ()}))
            eventually(lambda: second.state() is InstanceState.STANDBY)
        assert nginx.writer == "agent-a"


def test_an_agent_that_has_nothing_to_say_yet_takes_no_lease(nginx):
    with running(nginx):
        eventually(lambda: len(nginx.names("status")) > 2)
        assert nginx.writer == ""
    assert nginx.pushes() == []


def test_an_instance_that_joins_gets_everything_without_waiting_for_a_change(nginx):
    other = FakeOpenResty("nginx.2")
    with running(nginx) as rig:
        settle(rig, desired({"a": ("10.0.0.1",)}))
        rig.present(nginx, other)
        eventually(lambda: other.generation == nginx.generation)
        eventually(rig.in_sync)
    assert other.revision == nginx.revision
    assert nginx.reloads == 1


def test_an_instance_that_is_gone_is_forgotten(nginx):
    other = FakeOpenResty("nginx.2")
    with running(nginx, other) as rig:
        settle(rig, desired({"a": ()}))
        rig.present(nginx)
        assert [view.name for view in rig.fleet.views()] == ["nginx.1"]
        calls = len(other.calls)
        settle(rig, desired({"b": ()}))
        assert rig.sink.forgotten == ["nginx.2"]
        assert len(other.calls) <= calls + 1


def test_a_task_replaced_under_the_same_name_keeps_its_series(nginx):
    with running(nginx) as rig:
        settle(rig, desired({"a": ()}))
        rig.servers["task-2"] = FakeOpenResty("nginx.1")
        rig.fleet.set_instances((Target(id="task-2", name="nginx.1", urls=("http://x",)),))
        eventually(rig.in_sync)
        assert rig.sink.forgotten == []


def test_revisions_only_grow(nginx):
    wanted = desired({"a": ("10.0.0.1",)})
    nginx.revision = 41
    seen = []
    with running(nginx) as rig:
        for number in range(2, 12):
            settle(rig, wanted)
            seen.append(nginx.revision)
            wanted = desired({"a": (f"10.0.0.{number}",)}, keep=wanted)
    assert seen == sorted(set(seen))
    assert seen[0] == 42


def test_the_end_does_not_wait_for_an_instance_that_hangs(nginx):
    rig = Rig(nginx)
    rig.fleet.start()
    settle(rig, desired({"a": ()}))
    nginx.site_takes.clear()
    rig.fleet.apply(desired({"b": ()}))
    eventually(lambda: len(nginx.names("site")) == 2)
    rig.fleet.stop(0.3)
    assert not nginx.site_takes.is_set()
    assert nginx.writer == ""
    nginx.site_takes.set()


def test_an_idle_fleet_costs_a_heartbeat_and_nothing_else(nginx):
    with running(nginx, options=Options(heartbeat=0.2)) as rig:
        settle(rig, desired({"a": ()}))
        nginx.calls.clear()
        renders = rig.renderer.renders
        time.sleep(1.0)
        assert set(nginx.names()) == {"lease", "status"}
        assert len(nginx.names("status")) <= 6
        assert rig.renderer.renders == renders
    assert threading.active_count() < 50


def unopened() -> Desired:
    """One host as ever, one whose TLS is passed on, and a TCP port."""
    plain = desired({"a": ("10.0.0.1",)})
    more = {name: upstream(name, "10.0.0.2") for name in ("raw/", "tcp/5432")}
    hosts = (*plain.site.hosts, Host("raw", (), (), passthrough="raw/"))
    return Desired(
        Membership({**plain.membership.upstreams, **more}),
        Site(hosts, tcp=(TcpRoute(5432, "tcp/5432"),)),
        (),
    )


def test_what_takes_stream_lua_is_rejected_one_by_one_where_there_is_none(nginx):
    with running(nginx) as rig:
        settle(rig, unopened())
        rejections = {item.subject: item for item in rig.fleet.rejections()}
    assert set(rejections) == {"host raw", "TCP port 5432"}
    for rejection in rejections.values():
        assert rejection.reason == "stream_unavailable"
        assert "this build of nginx" in rejection.message
        assert "has no stream Lua module" in rejection.message
    assert "a.conf" in nginx.files, "all else is served"
    assert set(nginx.membership.upstreams) == {"a/", "raw/", "tcp/5432"}


def test_where_there_is_stream_lua_nothing_is_rejected(nginx):
    nginx.features = frozenset({"stream"})
    with running(nginx) as rig:
        settle(rig, unopened())
        assert rig.fleet.rejections() == ()


def test_a_refused_tcp_port_is_put_apart_under_its_own_name(nginx):
    nginx.refuse_site = refuses("TCP port 5432.conf")
    wanted = unopened()
    with running(nginx) as rig:
        rig.renderer.tcp = True
        settle(rig, wanted)
        (subject,) = [
            item.subject for item in rig.fleet.rejections() if item.reason == "host_quarantined"
        ]
    assert subject == "TCP port 5432"
    assert "a.conf" in nginx.files


def test_the_site_waits_until_the_upstreams_of_tcp_ports_are_there(nginx):
    with running(nginx) as rig:
        settle(rig, unopened())
    names = nginx.names()
    first_push = min(names.index(name) for name in ("put", "patch") if name in names)
    assert first_push < names.index("site")
