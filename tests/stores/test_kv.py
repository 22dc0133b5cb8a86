"""Each kind of store: what it has is read, a change is heard of, its absence is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import zookeeper
from agent.config.kv import open_store
from agent.config.stores import Content, Discovery, Store
from agent.errors import SettingsError, StoreUnavailable
from tests.conftest import free_port
from tests.stores.servers import Consul, Etcd, ZooKeeper, encoded

KINDS = {"etcd": Etcd, "zk": ZooKeeper, "consul": Consul}


@pytest.fixture(scope="module", params=KINDS)
def server(request: Any, tmp_path_factory: Any) -> Iterator[Any]:
    server = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    server = Etcd(tmp_path, v2=True)
    server.start()
    yield server
    server.stop()


def heard(store: Store, content: Content, change: Any) -> float:
    """Seconds from the change to the end of the watch."""
    ended: list[float] = []

    def watch() -> None:
        store.watch(content, 30)
        ended.append(time.monotonic())

    thread = threading.Thread(target=watch)
    thread.start()
    time.sleep(0.5)  # the watch is on its way
    assert not ended, "it ended before there was a change"
    began = time.monotonic()
    change()
    thread.join(40)
    return ended[0] - began


def test_a_key_comes_changes_and_goes_and_each_is_heard_of_at_once(server):
    store = open_store(Discovery(f"{server.url}/a/key"))
    content = store.read()
    assert content.text == ""
    assert heard(store, content, lambda: server.put("one", "a/key")) < 5
    content = store.read()
    assert content.text == "one"
    assert heard(store, content, lambda: server.put("zwei ü", "a/key")) < 5
    content = store.read()
    assert content.text == "zwei ü"
    assert heard(store, content, lambda: server.remove("a/key")) < 5
    assert store.read().text == ""
    store.close()


def test_the_key_is_interlocks_where_the_url_has_no_path(server):
    server.put("here")
    store = open_store(Discovery(server.url))
    assert store.read().text == "here"
    store.close()


def test_a_watch_of_what_has_changed_meanwhile_ends_at_once(server):
    store = open_store(Discovery(f"{server.url}/race"))
    server.put("one", "race")
    content = store.read()
    server.put("two", "race")
    began = time.monotonic()
    store.watch(content, 30)
    assert time.monotonic() - began < 5
    assert store.read().text == "two"
    store.close()


def test_a_watch_without_a_change_ends_after_its_time(server):
    store = open_store(Discovery(f"{server.url}/quiet"))
    server.put("one", "quiet")
    began = time.monotonic()
    store.watch(store.read(), 1)
    assert 0.9 < time.monotonic() - began < 10
    store.close()


def test_the_next_endpoint_is_asked_when_one_is_away(server):
    server.put("here", "ends")
    scheme, _, good = server.url.partition("://")
    store = open_store(Discovery(f"{scheme}://127.0.0.1:{free_port()},{good}/ends"))
    assert store.read().text == "here"
    store.close()


@pytest.mark.parametrize("scheme", ["etcd", "consul", "zk"])
def test_a_store_that_is_away_says_where_it_should_be(scheme):
    port = free_port()
    store = open_store(Discovery(f"{scheme}://user:s3cret@127.0.0.1:{port}"))
    with pytest.raises(StoreUnavailable, match=rf"127.0.0.1:{port} cannot be reached") as caught:
        store.read()
    assert "s3cret" not in str(caught.value)
    store.close()


# etcd


def test_a_v3_key_with_a_slash_in_front_is_found_too_and_the_one_without_wins(etcd):
    store = open_store(Discovery(etcd.url))
    etcd.put("slash", "/interlock/v1/config")
    assert store.read().text == "slash"
    etcd.put("plain")
    assert store.read().text == "plain"


def test_the_v2_key_is_read_and_watched_where_v3_has_none_as_interlock_left_it(etcd):
    etcd.put_v2("two")
    store = open_store(Discovery(etcd.url))
    content = store.read()
    assert content.text == "two"
    assert heard(store, content, lambda: etcd.put_v2("two b")) < 5
    assert store.read().text == "two b"
    etcd.put("three")
    assert store.read().text == "three"


def test_user_and_password_are_etcds_and_a_token_that_ran_out_is_renewed(etcd):
    etcd.put("secret")
    etcd.post("/v3/auth/user/add", name="root", password="p@ss").raise_for_status()
    etcd.post("/v3/auth/role/add", name="root").raise_for_status()
    etcd.post("/v3/auth/user/grant", user="root", role="root").raise_for_status()
    etcd.post("/v3/auth/enable").raise_for_status()
    address = etcd.url.removeprefix("etcd://")
    store = open_store(Discovery(f"etcd://root:p%40ss@{address}"))
    assert store.read().text == "secret"
    store._token = "gone.1"
    content = store.read()
    assert content.text == "secret"
    began = time.monotonic()
    store.watch(content, 1)
    assert time.monotonic() - began > 0.9
    for account in ("", "root:wrong@"):
        with pytest.raises(StoreUnavailable, match="refuses"):
            open_store(Discovery(f"etcd://{account}{address}")).read()


# Consul and ZooKeeper


def test_consul_is_asked_with_the_index_that_was_read_and_with_a_wait():
    server = Consul(token="t0ken")
    server.start()
    server.put("one")
    store = open_store(Discovery(f"consul://:t0ken@127.0.0.1:{server.port}"))
    store.watch(store.read(), 1)
    assert server.requests == [{}, {"index": str(server.index), "wait": "1s"}]
    with pytest.raises(StoreUnavailable, match=r"403.*Permission denied"):
        open_store(Discovery(server.url)).read()
    server.stop()


def test_a_zookeeper_node_for_one_account_only(tmp_path):
    from kazoo.security import make_digest_acl

    server = ZooKeeper(tmp_path)
    server.start()
    try:
        client = server.client()
        client.create("/mine", b"secret", acl=[make_digest_acl("u", "p", all=True)])
        client.stop()
        address = f"127.0.0.1:{server.port}/mine"
        store = open_store(Discovery(f"zk://u:p@{address}"))
        assert store.read().text == "secret"
        store.close()
        stranger = open_store(Discovery(f"zk://{address}"))
        with pytest.raises(StoreUnavailable, match="account"):
            stranger.read()
        stranger.close()
    finally:
        server.stop()


def test_a_value_that_is_no_text_is_an_error_of_the_settings(etcd):
    etcd.post("/v3/kv/put", key=encoded("blob"), value="/w==").raise_for_status()
    with pytest.raises(SettingsError, match="not UTF-8"):
        open_store(Discovery(f"{etcd.url}/blob")).read()


def test_ctrl_c_does_not_wait_for_a_zookeeper_that_is_silent(monkeypatch):
    class Silent:
        def __init__(self, **_: object) -> None:
            pass

        def add_listener(self, _: object) -> None:
            pass

        def start(self, timeout: float) -> None:
            raise KeyboardInterrupt

        def stop(self) -> None:
            raise AssertionError("this takes as long as its session may be silent")

    monkeypatch.setattr(zookeeper, "KazooClient", Silent)
    store = open_store(Discovery("zk://127.0.0.1:1"))
    with pytest.raises(KeyboardInterrupt):
        store.read()
    store.close()


def test_a_zookeeper_that_is_away_is_told_by_us_alone(monkeypatch, caplog):
    monkeypatch.setattr(zookeeper, "ANSWER_TIMEOUT", 1.0)
    store = open_store(Discovery(f"zk://127.0.0.1:{free_port()}"))
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.read()
    assert caplog.records == []
