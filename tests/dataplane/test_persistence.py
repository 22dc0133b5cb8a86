"""The last known good state: what is there after a restart, whatever happened to the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataplane.harness import (
    Backend,
    Load,
    Proxy,
    peer,
    request,
    upstream,
    wait_until,
)

A = "a.test/"


def persisted(proxy: Proxy) -> bool:
    status = proxy.admin.status()
    return bool(status["persisted_revision"] == status["revision"])


@pytest.fixture
def saved(routed: Proxy, backend: Backend) -> Proxy:
    """A proxy that has revision 2 on disk and revision 1 as the one before."""
    for n in range(2):
        others = {f"u{k}": upstream(peer(80, id=f"{n}-{k}", weight=k + 1)) for k in range(20)}
        routed.admin.put({A: upstream(backend.peer()), **others})
        wait_until(lambda: persisted(routed))
    return routed


def test_a_restart_serves_before_anybody_pushes(saved: Proxy) -> None:
    before = saved.admin.call("GET", "/v1/membership").body
    saved.stop()
    saved.start()
    assert request(saved.http_port).text == "b0"
    status = saved.admin.status()
    assert (status["source"], status["revision"], status["persisted_revision"]) == ("disk", 2, 2)
    assert (status["upstreams"], status["peers"]) == (21, 21)
    assert saved.admin.call("GET", "/v1/membership").body == before
    assert saved.admin.call("GET", "/readyz").status == 200
    saved.admin.revision = 2
    assert saved.admin.patch({"new": upstream()}).status == 200
    assert saved.admin.status()["source"] == "push"


def test_the_very_first_request_is_routed(saved: Proxy) -> None:
    saved.stop()
    process = saved.launch()

    def first() -> str:
        assert process.poll() is None
        try:
            return request(saved.http_port).text
        except ConnectionError:
            return ""

    assert wait_until(first) == "b0"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT])
def test_the_last_push_before_the_end_is_not_lost(
    routed: Proxy, backend: Backend, how: signal.Signals
) -> None:
    for n in range(30):
        routed.admin.put({A: upstream(backend.peer(id=str(n)))})
    routed.stop(how=how)
    routed.start()
    assert routed.admin.status()["revision"] == 30
    wait_until(lambda: routed.admin.live(A) == {"29": "up"})


def test_all_killed_loses_at_most_the_last_moment(saved: Proxy) -> None:
    pid, workers = saved.pid, saved.workers()
    os.kill(pid, signal.SIGKILL)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    saved.stop()
    saved.start()
    assert request(saved.http_port).text == "b0"
    assert saved.admin.status()["revision"] == 2


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def damage_head(path: Path) -> None:
    path.write_bytes(b'{"format":2,"revision":9,"writer":"x"}\n\0\0\0\0\5\0\0\0')


def damage_remove(path: Path) -> None:
    path.unlink()


DAMAGES: list[Callable[[Path], None]] = [
    damage_cut, damage_cut_short, damage_flip, damage_empty, damage_garbage, damage_head,
    damage_remove,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gives_way_to_the_one_before(
    saved: Proxy, damage: Callable[[Path], None]
) -> None:
    saved.stop()
    damage(saved.state_dir / "membership")
    saved.start()
    assert request(saved.http_port).text == "b0"
    status = saved.admin.status()
    assert (status["source"], status["revision"], status["upstreams"]) == ("disk", 1, 21)
    if damage is not damage_remove:
        assert f"{saved.state_dir}/membership cannot be used" in saved.output


@pytest.mark.parametrize("damage", [damage_cut, damage_garbage])
def test_with_both_files_damaged_it_starts_empty(
    saved: Proxy, damage: Callable[[Path], None]
) -> None:
    saved.stop()
    damage(saved.state_dir / "membership")
    damage(saved.state_dir / "membership.prev")
    saved.start()
    status = saved.admin.status()
    assert (status["source"], status["revision"], status["upstreams"]) == ("none", 0, 0)
    assert request(saved.http_port).status == 503
    assert saved.admin.put({}).status == 200


def test_a_disk_that_takes_nothing_stops_no_push(routed: Proxy, backend: Backend) -> None:
    (routed.state_dir / "membership.new").mkdir()
    routed.admin.put({A: upstream(backend.peer())})
    assert request(routed.http_port).text == "b0"
    wait_until(lambda: "cannot be kept on disk" in routed.output)
    (routed.state_dir / "membership.new").rmdir()
    wait_until(lambda: persisted(routed))


def test_a_burst_of_pushes_is_written_in_the_end(routed: Proxy, backend: Backend) -> None:
    with Load(routed.http_port) as load:
        routed.admin.put({A: upstream(backend.peer())})
        wait_until(lambda: load.results["200"] > 0)
        for n in range(200):
            routed.admin.patch({f"u{n}": upstream(peer(80))})
    assert set(load.failed) <= {"503"}  # before the first push
    wait_until(lambda: persisted(routed))
    routed.stop()
    routed.start()
    assert routed.admin.status()["upstreams"] == 201


def test_a_draining_peer_is_still_draining_after_a_restart(routed: Proxy, backend: Backend) -> None:
    with Backend("old") as old:
        routed.admin.put({A: upstream(old.peer(state="draining"), backend.peer())})
        routed.stop()
        routed.start()
        assert routed.admin.live(A) == {"old": "draining", "b0": "up"}
        assert {request(routed.http_port).text for _ in range(6)} == {"b0"}


def many(*, first: str = "p", count: int = 600) -> dict[str, object]:
    """Upstreams that take enough of the disk for a log beside the file."""
    return {
        f"u{n}": upstream(*(peer(80, id=f"{first}{k}-of-upstream-{n}") for k in range(10)))
        for n in range(count)
    }


@pytest.fixture
def logged(routed: Proxy, backend: Backend) -> Proxy:
    """A proxy whose file has revision 1 and its log revisions 2 to 4, one by one."""
    routed.admin.put({A: upstream(), **many()})
    wait_until(lambda: persisted(routed), what="the first")
    for change, remove in (
        ({"u1": upstream(peer(80, id="two"))}, ["u2"]),
        ({"u2": upstream(peer(80, id="three")), "u3": upstream()}, ["u1"]),
        ({A: upstream(backend.peer()), "new": upstream()}, ["u4"]),
    ):
        assert routed.admin.patch(change, remove).status == 200
        wait_until(lambda: persisted(routed), what="a change")
    return routed


def content(proxy: Proxy) -> bytes:
    return proxy.admin.call("GET", "/v1/membership").body


def killed(proxy: Proxy) -> None:
    """Ends it without a chance to write anything."""
    # The master first, or it starts a worker for one that is gone.
    for pid in (proxy.pid, *proxy.workers()):
        os.kill(pid, signal.SIGKILL)
    proxy.stop()


@pytest.mark.parametrize("end", [killed, Proxy.stop])
def test_what_changes_of_a_large_membership_is_added_to_a_log(
    logged: Proxy, end: Callable[[Proxy], None]
) -> None:
    before = content(logged)
    end(logged)
    assert (logged.state_dir / "membership.log").stat().st_size < 4000
    logged.start()
    assert content(logged) == before
    status = logged.admin.status()
    assert (status["source"], status["revision"], status["upstreams"]) == ("disk", 4, 600)
    assert request(logged.http_port).text == "b0"
    assert logged.admin.patch({"u5": upstream()}).status == 200
    wait_until(lambda: persisted(logged))


def test_a_log_that_is_torn_is_good_up_to_there(logged: Proxy) -> None:
    killed(logged)
    log = logged.state_dir / "membership.log"
    whole = log.read_bytes()
    for cut, revision in ((len(whole) - 1, 3), (60, 1), (3, 1), (0, 1)):
        log.write_bytes(whole[:cut])
        logged.start()
        assert logged.admin.status()["revision"] == revision, cut
        killed(logged)
    log.write_bytes(whole[:-5] + b"nails")
    logged.start()
    assert logged.admin.status()["revision"] == 3


def test_what_follows_a_torn_log_is_not_lost(logged: Proxy) -> None:
    log = logged.state_dir / "membership.log"
    with log.open("ab") as file:
        file.write(b"half of a batch")
    assert logged.admin.patch({"u7": upstream()}).status == 200
    wait_until(lambda: persisted(logged))
    before = content(logged)
    killed(logged)
    logged.start()
    assert (logged.admin.status()["revision"], content(logged)) == (5, before)


def test_a_damaged_file_gives_way_to_the_one_before_with_its_log(logged: Proxy) -> None:
    before = content(logged)
    assert logged.admin.put(many(first="q")).status == 200
    wait_until(lambda: persisted(logged))
    assert logged.admin.patch({"u7": upstream()}).status == 200
    wait_until(lambda: persisted(logged))
    killed(logged)
    damage_flip(logged.state_dir / "membership")
    logged.start()
    assert (logged.admin.status()["revision"], content(logged)) == (4, before)


def test_the_log_does_not_grow_for_ever(logged: Proxy) -> None:
    file = logged.state_dir / "membership"
    inode = file.stat().st_ino
    some = [dict(list(many(first=f"turn{turn}-").items())[:200]) for turn in range(3)]
    for upserted in some:
        assert logged.admin.patch(upserted).status == 200
        wait_until(lambda: persisted(logged))
    assert file.stat().st_ino != inode
    before = content(logged)
    killed(logged)
    logged.start()
    assert content(logged) == before


def test_what_a_change_writes_does_not_depend_on_how_much_there_is(logged: Proxy) -> None:
    def written() -> int:
        return sum(
            int(line.split()[1])
            for pid in logged.workers()
            for line in Path(f"/proc/{pid}/io").read_text().splitlines()
            if line.startswith("wchar:")
        )

    before = written()
    for turn in range(20):
        assert logged.admin.patch({"u9": upstream(peer(80, id=f"turn{turn}"))}).status == 200
        wait_until(lambda: persisted(logged))
    assert written() - before < (logged.state_dir / "membership").stat().st_size
