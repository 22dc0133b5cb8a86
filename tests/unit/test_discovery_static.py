"""The static file: what it becomes, what is refused, and how changes are noticed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.discovery import static
from agent.discovery.base import NullObserver
from agent.discovery.static import StaticSource
from agent.errors import StaticFileError
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    PublishedPort,
    Rejection,
    WorkloadKey,
    WorkloadKind,
)
from tests.unit.discovery_fakes import Following, following, named, only

pytestmark = pytest.mark.timeout(30)

WEB = """
[[service]]
name = "web"
labels = { "interlock.hostname" = "demo", "interlock.port" = 80, "interlock.ssl_only" = false }
[[service.peer]]
address = "127.0.0.1"
port = 9001
weight = 2
[[service.peer]]
address = "::1"
port = 9002
state = "draining"
id = "second"
"""
API = """
[[service]]
name = "api"
[[service.peer]]
address = "127.0.0.1"
port = %d
"""


def source(path: Path) -> StaticSource:
    return StaticSource(str(path), observer=NullObserver())


def replace_file(path: Path, text: str) -> None:
    """The way that never shows half a file."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def rejections(tmp_path: Path, text: str) -> tuple[Rejection, ...]:
    path = tmp_path / "static.toml"
    path.write_text(text)
    return source(path).read_once().rejections


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "static.toml"
    path.write_text(WEB + API % 9003)
    return path


@pytest.fixture(name="running")
def _running(path: Path) -> Iterator[Following]:
    with following(source(path)) as follower:
        follower.until(lambda: follower.snapshots)
        yield follower


class TestContent:
    def test_a_mark_in_front_and_lines_as_windows_writes_them(self, path: Path) -> None:
        path.write_bytes(b"\xef\xbb\xbf" + WEB.replace("\n", "\r\n").encode())
        snapshot = source(path).read_once()
        assert snapshot.rejections == ()
        assert named(snapshot, "web") is not None

    def test_a_service_with_its_peers(self, path: Path) -> None:
        snapshot = source(path).read_once()
        web = named(snapshot, "web")
        assert web is not None
        assert web.key == WorkloadKey("static", "web")
        assert web.kind is WorkloadKind.STATIC
        assert web.labels == {
            "interlock.hostname": "demo",
            "interlock.port": "80",
            "interlock.ssl_only": "false",
        }
        assert web.wanted == 2
        assert web.instances == (
            Instance(
                id="127.0.0.1:9001",
                name="web 127.0.0.1:9001",
                state=InstanceState.UP,
                attachments=(Attachment("static", "127.0.0.1"),),
                published=(PublishedPort(9001, 9001, "127.0.0.1"),),
                weight=2,
            ),
            Instance(
                id="second",
                name="web second",
                state=InstanceState.DRAINING,
                attachments=(Attachment("static", "::1"),),
                published=(PublishedPort(9002, 9002, "::1"),),
                detail="the file says so",
            ),
        )
        assert snapshot.rejections == ()

    def test_who_comes_first_in_the_file_is_older(self, path: Path) -> None:
        web, api = source(path).read_once().workloads.values()
        assert web.created < api.created

    def test_a_service_without_peers_wants_none(self, tmp_path: Path) -> None:
        path = tmp_path / "static.toml"
        path.write_text('[[service]]\nname = "web"\n')
        web = named(source(path).read_once(), "web")
        assert web is not None
        assert (web.instances, web.wanted) == ((), 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("9003", "0"), "service[1].peer[0].port: expected 1 to 65535, got 0"),
            (("9003", "true"), "service[1].peer[0].port: expected 1 to 65535, got True"),
            (("port = 9003", ""), "service[1].peer[0].port: expected 1 to 65535, got None"),
            (("9003", "9003\nweight = 1001"), "peer[0].weight: expected 0 to 1000, got 1001"),
            (("9003", '9003\nstate = "down"'), 'peer[0].state: expected "up" or "draining"'),
            (("9003", '9003\nid = "a b"'), "peer[0].id: expected 1 to 128 printable"),
            (("9003", "9003\nwieght = 1"), "peer[0].wieght: unknown key; did you mean weight?"),
            (('"api"', '"api"\nlables = {}'), "service[1].lables: unknown key; did you mean lab"),
            (('"api"', '"api"\nlabels = {a.b = "c"}'), "service[1].labels.a: got a table; quote"),
            (('"api"', '"api"\nlabels = {a = [1]}'), "service[1].labels.a: expected text"),
            (('"api"', '""'), "service[1].name: expected a name, got ''"),
            (('"api"', '"web"'), "service[1].name: 'web' is taken by an earlier service"),
            (('name = "api"', ""), "service[1].name: expected a name, got None"),
        ],
    )
    def test_one_bad_service_is_refused_alone(
        self, path: Path, change: tuple[str, str], message: str
    ) -> None:
        path.write_text(WEB + (API % 9003).replace(*change))
        snapshot = source(path).read_once()
        assert [w.name for w in snapshot.workloads.values()] == ["web"]
        (rejection,) = snapshot.rejections
        assert f"{path}: {message}" in rejection.message or message in rejection.message
        assert rejection.reason == "static_service_invalid"
        assert rejection.source == "static"
        assert rejection.hint

    @pytest.mark.parametrize("address", ["backend.local", "0.0.0.0", "::", "224.0.0.1", "", "1.2"])
    def test_only_addresses_of_servers_are_taken(self, tmp_path: Path, address: str) -> None:
        text = (API % 9003).replace("127.0.0.1", address)
        (rejection,) = rejections(tmp_path, text)
        assert rejection.subject == "service api"
        assert "service[0].peer[0].address" in rejection.message

    def test_two_peers_need_two_ids(self, tmp_path: Path) -> None:
        peer = '[[service.peer]]\naddress = "127.0.0.1"\nport = 1\n'
        (rejection,) = rejections(tmp_path, '[[service]]\nname = "web"\n' + peer + peer)
        assert "id '127.0.0.1:1' is given twice" in rejection.message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"[[service]\n", "not valid TOML: .*line 1"),
            (b"\xff", "not UTF-8"),
            (b"", "the file is empty"),
            (b" \n", "the file is empty"),
            (b"[service]\n", "expected a list of tables"),
            (b'[[services]]\nname = "web"\n', "unknown key services"),
        ],
    )
    def test_a_file_that_is_not_valid_is_an_error(
        self, path: Path, content: bytes, message: str
    ) -> None:
        path.write_bytes(content)
        with pytest.raises(StaticFileError, match=message):
            source(path).read_once()

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StaticFileError, match="No such file"):
            source(tmp_path / "none.toml").read_once()


class TestFollowing:
    def test_a_new_file_in_its_place_is_noticed_at_once(
        self, path: Path, running: Following
    ) -> None:
        before = running.last
        started = time.monotonic()
        replace_file(path, WEB + API % 9999)
        after = running.until(lambda: _port(running) == 9999)
        assert named(after, "web") is named(before, "web")
        assert after.changed_at >= started

    def test_writing_in_place_is_noticed_too(self, path: Path, running: Following) -> None:
        for port in (1111, 2222, 3333):
            path.write_text(WEB + API % port)
            running.until(lambda port=port: _port(running) == port)

    def test_two_writes_in_one_tick_of_the_clock_are_told_apart(
        self, path: Path, running: Following
    ) -> None:
        path.write_text(WEB + API % 1111)
        running.until(lambda: _port(running) == 1111)
        times = path.stat()
        with path.open("r+b") as file:
            file.write((WEB + API % 2222).encode())
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        running.until(lambda: _port(running) == 2222)

    def test_a_file_that_is_being_written_is_not_read_half(
        self, path: Path, running: Following
    ) -> None:
        whole = WEB + API % 4444
        with path.open("w") as file:
            for start in range(0, len(whole), 16):
                file.write(whole[start : start + 16])
                file.flush()
                time.sleep(static.LOOK_INTERVAL / 8)
        running.until(lambda: _port(running) == 4444)
        assert all(named(snapshot, "web") for snapshot in running.snapshots)

    def test_a_bad_file_keeps_the_last_good_one_and_says_so(
        self, path: Path, running: Following
    ) -> None:
        before = running.last
        replace_file(path, "[[service]\n")
        after = running.until(lambda: running.last.rejections)
        assert after.workloads == before.workloads
        (rejection,) = after.rejections
        assert rejection.reason == "static_file_invalid"
        assert "not valid TOML" in rejection.message
        assert "not valid TOML" in running.source.status.last_error
        assert not running.source.status.connected
        replace_file(path, WEB + API % 9999)
        running.until(lambda: _port(running) == 9999)
        assert running.last.rejections == ()
        assert running.source.status.last_error == ""

    def test_the_same_file_as_before_clears_the_complaint(
        self, path: Path, running: Following
    ) -> None:
        good = path.read_text()
        replace_file(path, "[[service]\n")
        running.until(lambda: running.last.rejections)
        replace_file(path, good)
        running.until(lambda: not running.last.rejections)
        assert running.source.status.last_error == ""

    def test_a_deleted_file_takes_nothing_away(self, path: Path, running: Following) -> None:
        before = running.last
        path.unlink()
        running.until(lambda: running.source.status.last_error)
        assert running.last.workloads == before.workloads
        replace_file(path, WEB + API % 9003)
        running.until(lambda: running.source.status.last_error == "")

    def test_it_waits_for_a_file_that_is_not_there_yet(self, tmp_path: Path) -> None:
        path = tmp_path / "static.toml"
        with following(source(path)) as follower:
            follower.until(lambda: "No such file" in follower.source.status.last_error)
            assert follower.snapshots == []
            replace_file(path, API % 9003)
            follower.until(lambda: follower.snapshots)
            assert follower.source.status.mode == "file"

    def test_an_untouched_file_is_published_once(self, running: Following) -> None:
        first = running.source.status.last_success
        time.sleep(5 * static.LOOK_INTERVAL)
        assert len(running.snapshots) == 1
        assert running.source.status.last_success > first


def _port(running: Following) -> int:
    return only(running.workload("api")).published[0].target
