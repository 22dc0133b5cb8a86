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
