"""The agent's listener: pages for GET and HEAD, nothing for anything else."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import struct
import threading
import time

import pytest

from agent import http as module
from agent.errors import SettingsError
from agent.http import Listener, Page, as_json, parse_listen


@pytest.fixture
def listener():
    def broken() -> Page:
        raise RuntimeError("boom")

    made = Listener(
        "127.0.0.1:0",
        {
            "/metrics": lambda: Page(200, "text/plain", b"tidegate_x 1\n"),
            "/healthz": lambda: as_json({"alive": True}),
            "/readyz": lambda: as_json({"ready": False, "reasons": ["é"]}, status=503),
            "/broken": broken,
        },
    )
    made.start()
    yield made
    made.stop()


def ask(listener: Listener, path: str, method: str = "GET"):
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_a_page_is_served_with_its_type(listener):
    response, body = ask(listener, "/metrics")
    assert (response.status, response.headers["Content-Type"]) == (200, "text/plain")
    assert body == b"tidegate_x 1\n"


def test_a_query_is_ignored(listener):
    assert ask(listener, "/healthz?x=1")[0].status == 200


def test_a_page_may_say_no_with_reasons(listener):
    response, body = ask(listener, "/readyz")
    assert response.status == 503
    assert json.loads(body) == {"ready": False, "reasons": ["é"]}


def test_head_has_the_length_and_no_body(listener):
    response, body = ask(listener, "/metrics", "HEAD")
    assert (response.status, response.headers["Content-Length"], body) == (200, "13", b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(listener, method):
    response, _ = ask(listener, "/healthz", method)
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


def test_an_unknown_path_lists_the_known_ones(listener):
    response, body = ask(listener, "/")
    assert response.status == 404
    assert json.loads(body)["paths"] == ["/broken", "/healthz", "/metrics", "/readyz"]


def test_a_page_that_breaks_does_not_break_the_others(listener):
    assert ask(listener, "/broken")[0].status == 500
    assert ask(listener, "/healthz")[0].status == 200


def test_a_connection_serves_more_than_one_request(listener):
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
    for _ in range(3):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
    connection.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":8080", ("", 8080)),
        ("8080", ("", 8080)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:8080", ("::1", 8080)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_listen_addresses_as_interlock_had_them(text, expected):
    assert parse_listen(text) == expected


@pytest.mark.parametrize("text", ["", "x", ":x", ":99999", "[::1]"])
def test_a_listen_address_that_is_none_says_what_is_expected(text):
    with pytest.raises(SettingsError, match="expected something like"):
        parse_listen(text)


def test_an_address_that_is_taken_is_named_with_a_cure():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingsError, match=r"cannot be listened on.*another agent"):
            Listener(listen, {})


def test_without_a_host_every_address_is_listened_on():
    listener = Listener(":0", {"/healthz": lambda: as_json({})})
    listener.start()
    try:
        assert ask(listener, "/healthz")[0].status == 200
    finally:
        listener.stop()


def test_a_host_that_cannot_be_one_is_told_like_an_address_that_is_taken():
    with pytest.raises(SettingsError, match='é:0" cannot be listened on'):
        Listener("é" * 80 + ":0", {})


def test_a_client_that_goes_away_leaves_no_traceback(caplog, capfd):
    caplog.set_level(logging.DEBUG, "agent.http")
    gone = threading.Event()

    def long() -> Page:
        gone.wait(10)
        return Page(200, "text/plain", b"x" * 50_000_000)

    listener = Listener("127.0.0.1:0", {"/long": long})
    listener.start()
    try:
        client = socket.create_connection(("127.0.0.1", listener.port))
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        gone.set()
        deadline = time.monotonic() + 30
        while "has gone away" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        listener.stop()
    assert "has gone away" in caplog.text
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_who_stops_it_does_not_wait_for_its_next_look(monkeypatch):
    monkeypatch.setattr(module, "LOOK_INTERVAL", 3600.0)
    listener = Listener("127.0.0.1:0", {"/healthz": lambda: as_json({})})
    listener.start()
    assert ask(listener, "/healthz")[0].status == 200
    listener.stop()  # or the limit on the test's time
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", listener.port))
