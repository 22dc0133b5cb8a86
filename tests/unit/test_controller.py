"""The loop: nothing before every source has spoken, everything after, and no way to stop it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import pytest
from openresty_fake import FakeOpenResty, FakeRenderer, eventually

from agent.compile import Compiler
from agent.config.settings import OpenResty, Settings
from agent.controller import Controller, writer_id
from agent.discovery.base import SourceStatus
from agent.driver.fleet import Fleet, Options
from agent.errors import DockerUnavailable, SettingsError
from agent.metrics import Metrics
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    ProxyInstance,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

FAST = Options(heartbeat=0.1, site_quiet=0.01, site_max_wait=0.1)


def workload(source: str, host: str, *addresses: str) -> Workload:
    name, _, domain = host.partition(".")
    return Workload(
        key=WorkloadKey(source, name),
        kind=WorkloadKind.SERVICE,
        name=name,
        created=1.0,
        labels=MappingProxyType({"interlock.hostname": name, "interlock.domain": domain}),
        networks=("net",),
        ports=(80,),
        instances=tuple(
            Instance(
                id=f"{name}-{address}",
                name=f"{name}.1",
                state=InstanceState.UP,
                attachments=(Attachment("net", address),),
            )
            for address in addresses
        ),
    )


class FakeSource:
    """Publishes what the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status = SourceStatus(name)
        self.runs = 0
        self.faults: list[Exception] = []
        self._publish = None
        self._ready = threading.Event()

    def run(self, publish, stop) -> None:
        self.runs += 1
        if self.faults:
            raise self.faults.pop()
        self._publish = publish
        self._ready.set()
        stop.wait()

    def read_once(self):
        raise DockerUnavailable("not in this test")

    def publish(self, *workloads: Workload, proxies=(), changed_at: float = 0.0) -> None:
        assert self._ready.wait(10)
        self.status = replace(self.status, mode="poll", last_success=time.time())
        self._publish(
            SourceSnapshot(
                source=self.name,
                workloads=MappingProxyType({item.key: item for item in workloads}),
                proxies=proxies,
                proxy_networks=("net",),
                changed_at=changed_at,
            )
        )


class Rig:
    def __init__(self, *sources: FakeSource, settings: Settings | None = None) -> None:
        self.nginx = FakeOpenResty("http://nginx")
        self.servers: dict[str, FakeOpenResty] = {"http://nginx": self.nginx}
        self.metrics = Metrics()
        self.sources: dict[str, list[FakeSource]] = {"": list(sources)}
        self.fleet = Fleet(
            writer="agent-a",
            connect=lambda target: self.servers[target.id].client(),
            renderer=FakeRenderer(),
            options=FAST,
            sink=self.metrics,
        )
        self.settings = settings or Settings(openresty=OpenResty(urls=("http://nginx",)))
        self.controller = Controller(
            settings=self.settings,
            settings_from="test",
            build_sources=self.build,
            fleet=self.fleet,
            metrics=self.metrics,
            compiler=Compiler(),
        )

    def build(self, settings: Settings, observer: object) -> list[FakeSource]:
        """Sources by static_file, so that a reload can have others."""
        return self.sources[settings.static_file]

    def served(self) -> Mapping[str, list[str]]:
        return {
            name: [peer.address for peer in upstream.peers]
            for name, upstream in self.nginx.membership.upstreams.items()
        }

    def series(self, start: str) -> float | None:
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in self.metrics.exposition().decode().splitlines()
            if line.startswith(start)
        ]
        return sum(found) if found else None


@contextmanager
def running(rig: Rig) -> Iterator[Rig]:
    # The fakes answer; the settings' URL is never opened.
    rig.fleet.reconfigure = lambda **_: None  # type: ignore[method-assign]
    rig.controller.start()
    try:
        yield rig
    finally:
        rig.controller.stop(5)


def test_nothing_is_pushed_before_every_source_has_published():
    one, two = FakeSource("swarm"), FakeSource("static")
    with running(Rig(one, two)) as rig:
        one.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: "status" in rig.nginx.names())
        time.sleep(0.2)
        assert rig.nginx.pushes() == []
        readiness = rig.controller.readiness()
        assert not readiness.ready
        assert readiness.reasons[0] == "source static has not published yet"
        two.publish(workload("static", "b.test", "10.0.0.2"))
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.1"], "b.test/": ["10.0.0.2"]})
        assert rig.nginx.pushes() == ["put"]
        eventually(lambda: rig.controller.readiness().ready)


def test_a_change_reaches_the_instance_and_is_measured():
    source = FakeSource("swarm")
    with running(Rig(source)) as rig:
        source.publish(workload("swarm", "a.test", "10.0.0.1"), changed_at=time.monotonic())
        eventually(lambda: rig.controller.readiness().ready)
        measured = "tidegate_change_to_applied_seconds_count"
        assert not rig.series(measured)
        source.publish(
            workload("swarm", "a.test", "10.0.0.1", "10.0.0.2"), changed_at=time.monotonic()
        )
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.1", "10.0.0.2"]})
        eventually(lambda: rig.series(measured) == 1)
        assert rig.series("tidegate_change_to_applied_seconds_sum") < 5


def test_a_resync_that_brings_nothing_new_pushes_nothing():
    source = FakeSource("swarm")
    with running(Rig(source)) as rig:
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.controller.readiness().ready)
        for _ in range(20):
            source.publish(workload("swarm", "a.test", "10.0.0.1"), changed_at=time.monotonic())
        time.sleep(0.2)
        assert rig.nginx.pushes() == ["put"]
        assert rig.nginx.reloads == 1


def test_proxies_that_a_source_finds_are_kept_in_step_and_forgotten_when_gone():
    source = FakeSource("swarm")
    rig = Rig(source)
    second = rig.servers["task-9"] = FakeOpenResty("task-9")
    found = ProxyInstance(id="task-9", name="nginx.2", attachments=(Attachment("n", "10.9.9.9"),))
    with running(rig):
        source.publish(workload("swarm", "a.test", "10.0.0.1"), proxies=(found,))
        eventually(lambda: "a.test/" in second.membership.upstreams)
        assert {v.name for v in rig.fleet.views()} == {"http://nginx", "nginx.2"}
        eventually(lambda: rig.series('tidegate_instance_in_sync{instance="nginx.2"}') == 1)
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: {v.name for v in rig.fleet.views()} == {"http://nginx"})
        assert rig.series('tidegate_instance_in_sync{instance="nginx.2"}') is None
        eventually(lambda: rig.series('tidegate_pushes_total{instance="nginx.2"') is None)


def test_a_source_that_breaks_is_started_again_and_counted(caplog, monkeypatch):
    monkeypatch.setattr("agent.controller.SOURCE_RESTART", 0.05)
    source = FakeSource("swarm")
    source.faults.append(RuntimeError("boom"))
    with running(Rig(source)) as rig:
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.1"]})
        assert source.runs == 2
        assert rig.series('tidegate_loop_errors_total{loop="source"}') == 1
    assert "boom" in caplog.text


def test_a_turn_that_breaks_is_logged_counted_and_followed_by_the_next(monkeypatch, caplog):
    source = FakeSource("swarm")
    rig = Rig(source)
    compile_it, faults = Compiler.compile, [RuntimeError("boom")]

    def broken(self, snapshot, settings):
        if faults:
            raise faults.pop()
        return compile_it(self, snapshot, settings)

    monkeypatch.setattr(Compiler, "compile", broken)
    with running(rig):
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.series('tidegate_loop_errors_total{loop="controller"}') == 1)
        source.publish(workload("swarm", "a.test", "10.0.0.2"))
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.2"]})


def test_a_host_that_lingered_long_enough_goes_without_being_told():
    source = FakeSource("swarm")
    settings = Settings(
        host_linger=0.3, site_quiet=0.01, openresty=OpenResty(urls=("http://nginx",))
    )
    with running(Rig(source, settings=settings)) as rig:
        source.publish(
            workload("swarm", "a.test", "10.0.0.1"), workload("swarm", "b.test", "10.0.0.2")
        )
        eventually(lambda: len(rig.served()) == 2)
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.served().get("b.test/") == [])
        assert "b.test.conf" in rig.nginx.files
        eventually(lambda: "b.test.conf" not in rig.nginx.files)
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.1"]})


def test_new_settings_take_over_when_their_sources_have_published_and_nothing_shrinks():
    old, new = FakeSource("swarm"), FakeSource("swarm")
    rig = Rig(old)
    rig.sources["new"] = [new]
    with running(rig):
        old.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.controller.readiness().ready)
        changed = rig.settings.model_copy(update={"static_file": "new"})
        rig.controller.reload(changed, "test")
        old.publish(workload("swarm", "a.test", "10.0.0.2"))
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.2"]})
        new.publish(workload("swarm", "a.test", "10.0.0.3"))
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.3"]})
        old.publish(workload("swarm", "a.test", "10.0.0.4"))
        time.sleep(0.1)
        assert rig.served() == {"a.test/": ["10.0.0.3"]}


def test_settings_whose_sources_cannot_be_made_leave_the_old_ones_in_force():
    source = FakeSource("swarm")
    rig = Rig(source)
    rig.sources["none"] = []
    with running(rig):
        with pytest.raises(SettingsError):
            rig.controller.reload(rig.settings.model_copy(update={"static_file": "none"}), "test")
        assert rig.controller.settings is rig.settings
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.served() == {"a.test/": ["10.0.0.1"]})


def test_readiness_names_a_stale_source_and_an_instance_that_is_away():
    source = FakeSource("swarm")
    with running(Rig(source)) as rig:
        source.publish(workload("swarm", "a.test", "10.0.0.1"))
        eventually(lambda: rig.controller.readiness().ready)
        source.status = replace(
            source.status, last_success=time.time() - 100, last_error="engine is away"
        )
        (reason,) = rig.controller.readiness().reasons
        assert "source swarm: last good sync 100 s ago, the limit is 60 s" in reason
        assert "engine is away" in reason
        source.status = replace(source.status, last_success=time.time())
        rig.nginx.down = True
        eventually(lambda: not rig.controller.readiness().ready)
        assert "http://nginx is unreachable" in rig.controller.readiness().reasons[0]


def test_an_agent_that_knows_of_no_instance_is_ready_once_synced():
    source = FakeSource("swarm")
    with running(Rig(source, settings=Settings())) as rig:
        source.publish()
        eventually(lambda: rig.controller.readiness().ready)


def test_the_state_shows_all_that_there_is():
    source = FakeSource("swarm")
    bad = replace(
        workload("swarm", "b.test", "10.0.0.2"),
        labels=MappingProxyType({"interlock.hostname": "b", "interlock.domain": "x y"}),
    )
    with running(Rig(source)) as rig:
        source.publish(workload("swarm", "a.test", "10.0.0.1"), bad)
        eventually(lambda: rig.controller.readiness().ready)
        state = rig.controller.state().as_dict()
        assert state["ready"] is True
        assert state["sources"][0]["name"] == "swarm"
        assert state["sources"][0]["mode"] == "poll"
        assert state["sources"][0]["age_seconds"] < 60
        assert state["routes"] == [
            {
                "host": "a.test",
                "aliases": [],
                "path": "/",
                "upstream": "a.test/",
                "peers": 1,
                "tls": False,
                "tls_only": False,
                "rewrite": False,
                "location": {"path": "/", "upstream": "a.test/"},
            }
        ]
        assert state["tcp"] == []
        assert state["upstreams"][0]["peers"][0]["address"] == "10.0.0.1"
        assert state["rejections"][0]["subject"] == "service b"
        assert state["instances"][0]["in_sync"] is True
        assert rig.series("tidegate_rejections{") == 1
        assert rig.series('tidegate_peers{state="up",upstream="a.test/"}') == 1


def test_a_rejection_is_logged_when_it_comes_and_when_it_goes(caplog):
    caplog.set_level(logging.INFO)
    source = FakeSource("swarm")
    good = workload("swarm", "b.test", "10.0.0.2")
    bad = replace(
        good, labels=MappingProxyType({"interlock.hostname": "b", "interlock.domain": "x y"})
    )
    with running(Rig(source)) as rig:
        source.publish(bad)
        eventually(lambda: "service b: interlock.hostname=" in caplog.text)
        source.publish(good)
        eventually(lambda: "service b: no longer rejected" in caplog.text)
        assert rig.controller.rejections() == ()


def test_two_starts_never_share_a_name():
    first, second = writer_id(), writer_id()
    assert first != second
    assert first.isascii()
    assert first.isprintable()
    assert len(first) <= 128


def test_the_end_does_not_wait_for_a_source_that_hangs():
    released = threading.Event()

    class Hanging(FakeSource):
        def run(self, publish, stop) -> None:
            self._ready.set()
            released.wait()

    source = Hanging("swarm")
    rig = Rig(source)
    rig.controller.start()
    assert source._ready.wait(10)
    rig.controller.stop(3600)  # or the limit on the test's time
    released.set()
