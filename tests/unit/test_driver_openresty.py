"""The HTTP client of one instance: each answer of the admin API becomes what it stands for."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent.config.settings import OpenResty
from agent.driver.openresty import Build, Instance, Token, decode, encode, version_of
from agent.driver.targets import Target
from agent.errors import (
    DriverError,
    InstanceBusy,
    InstanceUnauthorized,
    InstanceUnreachable,
    LeaseHeld,
    PushRefused,
    RevisionConflict,
    SiteRefused,
)
from agent.model import Membership, Peer, PeerState, Policy, Upstream

STATUS = {
    "instance": "run-1",
    "revision": 7,
    "generation": "ab" * 32,
    "writer": "agent-a",
    "lease_expires_in": 12.5,
    "upstreams": 1,
    "peers": 2,
    "source": "push",
    "persisted_revision": 7,
    "dict": {"capacity_bytes": 1000, "free_bytes": 900},
    "versions": {"tidegate": "0.1.0", "nginx": "1.22.1"},
    "nginx_version": 1022001,
    "features": ["http_ssl", "stream"],
    "certificates_serial": 3,
}
WEB = Upstream(
    "a.example.com/",
    (
        Peer("t1", "10.0.0.1", 80),
        Peer("t2", "fd00::2", 8080, weight=5, state=PeerState.DRAINING),
    ),
    hold=15.0,
)


class Server:
    """Answers with what the test says, and keeps what it was asked."""

    def __init__(self, server: HTTPServer) -> None:
        self.http = server
        self.status = 200
        self.body: object = STATUS
        self.raw: bytes | None = None
        self.requests: list[tuple[str, str, dict[str, str], object]] = []
        self.connections = 0
        self.close_after_each = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"


def make_handler(state: dict[str, Server]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            state["server"].connections += 1

        def address_string(self) -> str:
            return "client"

        def _serve(self) -> None:
            server = state["server"]
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            server.requests.append((self.command, self.path, dict(self.headers), body))
            data = server.raw if server.raw is not None else json.dumps(server.body).encode()
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            # Closed without saying so, as a kept connection is when nginx is told to reload.
            self.close_connection = server.close_after_each

        do_GET = do_PUT = do_PATCH = do_POST = do_DELETE = _serve  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server():
    state: dict[str, Server] = {}
    http = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(state))
    http.daemon_threads = True
    state["server"] = Server(http)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state["server"]
    http.shutdown()
    thread.join()
    http.server_close()


def instance(*urls: str, token: Token | None = None, **settings) -> Instance:
    return Instance(
        Target(id="x", name="x", urls=urls, static=True),
        OpenResty(**settings),
        token or Token(token="s3cret", file=""),
    )


def test_the_status_is_read(server):
    status = instance(server.url).status()
    assert (status.instance, status.revision, status.generation) == ("run-1", 7, "ab" * 32)
    assert (status.dict_free, status.writer) == (900, "agent-a")
    assert status.build == Build(nginx_version=1022001, features=frozenset({"http_ssl", "stream"}))


def test_the_token_goes_with_every_call(server):
    client = instance(server.url)
    client.status()
    client.renew("agent-a")
    assert [headers["Authorization"] for _, _, headers, _ in server.requests] == [
        "Bearer s3cret",
        "Bearer s3cret",
    ]


def test_one_connection_serves_all_calls(server):
    client = instance(server.url)
    for _ in range(20):
        client.status()
    assert server.connections == 1


def test_a_kept_connection_that_was_closed_is_made_anew_without_an_error(server):
    server.close_after_each = True
    client = instance(server.url)
    for _ in range(20):
        assert client.status().revision == 7


def test_a_delta_goes_out_as_the_contract_says(server):
    server.body = {"revision": 8, "upserted": 1, "removed": 1, "unsupported": []}
    instance(server.url).patch(
        writer="agent-a",
        base_revision=7,
        revision=8,
        upsert={WEB.name: WEB},
        remove=("b.example.com/",),
    )
    ((method, path, _, body),) = server.requests
    assert (method, path) == ("PATCH", "/v1/membership")
    assert body == {
        "writer": "agent-a",
        "base_revision": 7,
        "revision": 8,
        "upsert": {
            "a.example.com/": {
                "policy": {"algorithm": "round_robin"},
                "hold": 15.0,
                "peers": [
                    {"id": "t1", "address": "10.0.0.1", "port": 80, "weight": 1, "state": "up"},
                    {
                        "id": "t2",
                        "address": "fd00::2",
                        "port": 8080,
                        "weight": 5,
                        "state": "draining",
                    },
                ],
                "version": version_of(WEB),
            }
        },
        "remove": ["b.example.com/"],
    }


def test_a_full_push_and_a_site_go_out_as_the_contract_says(server):
    server.body = {"revision": 8, "generation": "c" * 64, "reloaded": True}
    client = instance(server.url)
    client.put(writer="agent-a", revision=8, membership=Membership({WEB.name: WEB}))
    assert client.put_site(writer="agent-a", generation="c" * 64, files={"a.conf": "x"}) is True
    assert server.requests[0][3] == {
        "writer": "agent-a",
        "revision": 8,
        "upstreams": {WEB.name: json.loads(encode(WEB))},
    }
    assert server.requests[1][3] == {
        "writer": "agent-a",
        "generation": "c" * 64,
        "files": {"a.conf": "x"},
    }


def test_the_membership_that_an_instance_holds_is_read_as_it_was_pushed(server):
    item = json.loads(encode(WEB))
    for peer in item["peers"]:
        peer["live"] = {"state": "up", "in_flight": 3}
    server.body = {"revision": 7, "upstreams": {WEB.name: item}}
    assert instance(server.url).membership() == (7, Membership({WEB.name: WEB}))


def test_peers_of_the_wire_are_sorted_as_ours_are():
    item = json.loads(encode(WEB))
    item["peers"].reverse()
    assert decode(WEB.name, item) == WEB


def test_the_version_of_an_upstream_follows_all_that_is_pushed_of_it():
    changes = [
        replace(WEB, hold=1.0),
        replace(WEB, policy=Policy(slow_start=5.0)),
        replace(WEB, peers=WEB.peers[1:]),
        replace(WEB, peers=(replace(WEB.peers[0], backup=True), *WEB.peers[1:])),
    ]
    versions = {version_of(WEB), *(version_of(item) for item in changes)}
    assert len(versions) == len(changes) + 1
    assert version_of(replace(WEB)) == version_of(WEB)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, {"error": "unauthorized", "message": "no"}, InstanceUnauthorized),
        (503, {"error": "busy", "message": "later"}, InstanceBusy),
        (413, {"error": "too_large", "message": "64 MiB"}, PushRefused),
        (507, {"error": "dict_full", "message": "full", "free_bytes": 1}, PushRefused),
        (400, {"error": "bad_json", "message": "no"}, PushRefused),
        (404, {"error": "not_found", "message": "no"}, DriverError),
        (500, {}, DriverError),
        (200, [], DriverError),
    ],
)
def test_each_refusal_is_the_error_that_it_stands_for(server, status, body, error):
    server.status, server.body = status, body
    with pytest.raises(error):
        instance(server.url).put(writer="w", revision=1, membership=Membership({}))


def test_a_conflict_carries_the_current_revision(server):
    server.status, server.body = 409, {"error": "revision", "message": "no", "revision": 41}
    with pytest.raises(RevisionConflict) as caught:
        instance(server.url).put(writer="w", revision=1, membership=Membership({}))
    assert caught.value.current == 41


def test_a_held_lease_carries_who_and_for_how_long(server):
    server.status = 423
    server.body = {"error": "lease_held", "message": "no", "writer": "b", "expires_in": 4.5}
    with pytest.raises(LeaseHeld) as caught:
        instance(server.url).renew("a")
    assert (caught.value.writer, caught.value.expires_in) == ("b", 4.5)


def test_a_refused_push_carries_the_reason_per_upstream(server):
    server.status = 422
    server.body = {
        "error": "invalid",
        "message": "1 error",
        "errors": [{"upstream": "a/", "field": "peers[0].address", "message": "no address"}],
    }
    with pytest.raises(PushRefused) as caught:
        instance(server.url).put(writer="w", revision=1, membership=Membership({}))
    assert caught.value.reasons == {"a/": "peers[0].address: no address"}


@pytest.mark.parametrize("file", ["a.conf", None])
def test_a_refused_site_carries_the_file_that_nginx_named(server, file):
    server.status = 422
    server.body = {"error": "site_refused", "message": "unknown directive", "stage": "test"}
    if file:
        server.body = {**server.body, "file": file, "line": 3}
    with pytest.raises(SiteRefused) as caught:
        instance(server.url).put_site(writer="w", generation="a" * 64, files={"a.conf": ""})
    assert caught.value.file == file
    assert "unknown directive" in str(caught.value)


def test_an_answer_that_is_no_admin_api_says_so(server):
    server.raw = b"<html>hello</html>"
    with pytest.raises(DriverError, match="admin port"):
        instance(server.url).status()


def test_an_answer_without_the_expected_fields_says_so(server):
    server.body = {"instance": "x"}
    with pytest.raises(DriverError, match="revision"):
        instance(server.url).status()


def test_nobody_there_is_unreachable_with_a_plain_reason(free_port):
    with pytest.raises(InstanceUnreachable, match="Connection refused"):
        instance(f"http://127.0.0.1:{free_port()}").status()


def test_silence_is_unreachable_within_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InstanceUnreachable, match=r"no answer within 0\.2 s"):
            instance(url, timeout="200ms").status()


def test_each_address_is_tried_and_the_one_that_answers_is_remembered(server, free_port):
    client = instance(f"http://127.0.0.1:{free_port()}", server.url)
    client.status()
    assert client.url == server.url
    with socket.create_server(("127.0.0.1", 0)):
        client.status()
    assert len(server.requests) == 2


def test_no_address_at_all_says_what_is_missing():
    with pytest.raises(InstanceUnreachable, match="ingress"):
        instance(admin_network="ingress").status()


def test_proxies_of_the_environment_never_see_the_token(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert instance(server.url).status().revision == 7


def test_a_redirect_is_not_followed(server):
    server.status = 302
    with pytest.raises(DriverError):
        instance(server.url).status()


def test_a_unix_socket_works_like_a_port(tmp_path):
    state: dict[str, Server] = {}

    class UnixServer(ThreadingHTTPServer):
        address_family = socket.AF_UNIX
        daemon_threads = True

        def server_bind(self) -> None:
            self.socket.bind(self.server_address)
            self.server_name, self.server_port = "unix", 0

        def get_request(self):
            connection, _ = super().get_request()
            return connection, ("unix", 0)

    path = tmp_path / "admin.sock"
    http = UnixServer(str(path), make_handler(state))
    state["server"] = Server(http)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        client = instance(f"unix:{path}")
        for _ in range(5):
            assert client.status().revision == 7
        client.renew("agent-a")
        assert state["server"].connections == 1
        assert state["server"].requests[-1][:2] == ("POST", "/v1/lease")
        client.close()
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_a_missing_unix_socket_is_unreachable(tmp_path):
    with pytest.raises(InstanceUnreachable, match="No such file"):
        instance(f"unix:{tmp_path}/none").status()


def test_a_token_file_is_read_again_when_it_changes(server, tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("first\n")
    client = instance(server.url, token=Token(token="", file=str(file)))
    client.status()
    file.write_text("second\n")
    os.utime(file, ns=(1, 1))
    client.status()
    tokens = [headers["Authorization"] for _, _, headers, _ in server.requests]
    assert tokens == ["Bearer first", "Bearer second"]


def test_a_token_file_that_cannot_be_read_is_named(server, tmp_path: Path):
    token = Token(token="", file=str(tmp_path / "none"))
    with pytest.raises(InstanceUnauthorized, match="none cannot be read"):
        instance(server.url, token=token).status()


@pytest.mark.parametrize("text", ["two\nlines", "ü"])
def test_a_token_that_cannot_be_sent_is_told_and_not_sent(server, tmp_path: Path, text: str):
    (tmp_path / "token").write_text(text)
    for token in (Token(token=text, file=""), Token(token="", file=str(tmp_path / "token"))):
        with pytest.raises(InstanceUnauthorized, match="is no token"):
            instance(server.url, token=token).status()
    assert server.requests == []


def test_a_host_that_cannot_be_one_is_an_instance_that_cannot_be_reached():
    with pytest.raises(InstanceUnreachable, match=r"http://a\.\.b:1"):
        instance("http://a..b:1").status()
