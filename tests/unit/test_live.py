"""Following a store: what is applied, refused, told and tried again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest
from openresty_fake import eventually

from agent.config.live import Follower
from agent.config.stores import Choice, Content, Loaded
from agent.errors import SettingsError, StoreUnavailable

GOOD, BETTER, BAD = 'ListenAddr = ":1"', 'ListenAddr = ":2"', "ListenAddr = 5"


class FakeStore:
    where, remote, longest_wait = "the store", True, 0.01

    def __init__(self, now: str | Exception) -> None:
        self.now = now
        self.news: queue.Queue[None] = queue.Queue()
        self.reads = 0

    def put(self, now: str | Exception) -> None:
        self.now = now
        self.news.put(None)

    def read(self) -> Content:
        self.reads += 1
        if isinstance(self.now, Exception):
            raise self.now
        return Content(self.now, self.reads)

    def watch(self, content: Content, timeout: float) -> None:
        self.news.get(timeout=20)

    def close(self) -> None:
        self.news.put(None)


class Rig:
    """A follower, what it applied, and what it told."""

    def __init__(self, now: str | Exception, in_force: str | None = None) -> None:
        self.store = FakeStore(now)
        self.applied: list[str] = []
        self.results: list[str] = []
        self.connected: bool | None = None
        self.errors: list[str] = []
        self.fault: Exception | None = None
        self.follower = Follower(
            Choice(self.store), apply=self.apply, observer=self, in_force=in_force
        )

    def apply(self, loaded: Loaded) -> None:
        if self.fault is not None:
            raise self.fault
        self.applied.append(loaded.settings.listen_addr)

    def settings_reload(self, result: str) -> None:
        self.results.append(result)

    def settings_store(self, *, connected: bool) -> None:
        self.connected = connected

    def loop_error(self, loop: str) -> None:
        self.errors.append(loop)


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.follower.stop()


def running(rigs: list[Rig], now: str | Exception, in_force: str | None = None) -> Rig:
    rig = Rig(now, in_force)
    rigs.append(rig)
    rig.follower.start()
    return rig


def test_what_is_there_first_is_applied(rigs):
    rig = running(rigs, GOOD)
    eventually(lambda: rig.results == ["ok"])
    assert (rig.applied, rig.follower.problem, rig.connected) == ([":1"], "", True)


def test_what_is_in_force_already_is_not_applied_again(rigs):
    rig = running(rigs, GOOD, in_force=GOOD)
    rig.store.put(GOOD)
    eventually(lambda: rig.store.reads >= 2)
    assert rig.results == []


def test_a_change_is_applied(rigs):
    rig = running(rigs, GOOD)
    rig.store.put(BETTER)
    eventually(lambda: rig.applied == [":1", ":2"])


def test_a_bad_change_is_refused_once_and_the_old_one_stays(rigs):
    rig = running(rigs, GOOD)
    rig.store.put(BAD)
    eventually(lambda: rig.results == ["ok", "refused"])
    reads = rig.store.reads
    rig.store.put(BAD)
    eventually(lambda: rig.store.reads > reads)
    assert rig.results == ["ok", "refused"]
    assert rig.applied == [":1"]
    assert "got 5" in rig.follower.problem
    assert rig.follower.problem.endswith("the settings in force stay")


def test_going_back_to_what_is_in_force_clears_the_problem(rigs):
    rig = running(rigs, GOOD)
    rig.store.put(BAD)
    eventually(lambda: rig.follower.problem)
    rig.store.put(GOOD)
    eventually(lambda: not rig.follower.problem)
    assert rig.applied == [":1"]


def test_what_cannot_be_applied_is_refused_and_tried_with_the_next_change(rigs):
    rig = running(rigs, GOOD, in_force="")
    rig.fault = SettingsError("no source")
    rig.store.put(BETTER)
    eventually(lambda: "no source" in rig.follower.problem)
    rig.fault = None
    rig.store.put(GOOD)
    eventually(lambda: rig.applied[-1:] == [":1"])


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_a_missing_key_never_takes_anything_back(rigs, nothing):
    rig = running(rigs, GOOD)
    rig.store.put(nothing)
    eventually(lambda: rig.results == ["ok", "refused"])
    assert "missing or empty; the settings in force stay" in rig.follower.problem


def test_nothing_is_applied_before_there_is_a_key(rigs):
    rig = running(rigs, "")
    eventually(lambda: rig.follower.problem.endswith("waiting for it"))
    assert rig.applied == []


def test_a_store_that_is_away_is_told_once_and_tried_again_until_it_is_back(rigs, caplog):
    rig = running(rigs, StoreUnavailable("no route"))
    eventually(lambda: rig.store.reads > 5)
    assert rig.follower.problem == "no route; waiting for it"
    assert rig.connected is False
    assert [record.message for record in caplog.records] == ["settings: no route; waiting for it"]
    rig.store.put(GOOD)
    eventually(lambda: rig.applied == [":1"])
    assert (rig.follower.problem, rig.connected) == ("", True)


def test_a_value_that_is_no_text_is_refused_once(rigs):
    rig = running(rigs, GOOD)
    eventually(lambda: rig.applied)
    rig.store.put(SettingsError("not UTF-8"))
    eventually(lambda: rig.store.reads > 5)
    assert rig.results == ["ok", "refused"]


def test_an_unexpected_error_is_counted_and_the_loop_goes_on(rigs):
    rig = running(rigs, RuntimeError("a defect"))
    eventually(lambda: rig.errors)
    rig.store.put(GOOD)
    eventually(lambda: rig.applied == [":1"])
    assert set(rig.errors) == {"settings"}


def test_a_reread_that_was_asked_for_applies_and_counts_each_time(rigs):
    rig = running(rigs, GOOD)
    eventually(lambda: rig.results == ["ok"])
    rig.follower.reread()
    assert rig.results == ["ok", "ok"]
    rig.store.now = StoreUnavailable("no route")
    rig.follower.reread()
    assert rig.results == ["ok", "ok", "refused"]


def test_the_thread_ends(rigs):
    rig = running(rigs, GOOD)
    eventually(lambda: rig.applied)
    rig.follower.stop(5)
    assert not any(thread.name == "settings" for thread in threading.enumerate())
