"""What is in front of the peers: whose word counts on the client, redirects, the default backend,
raw directives, error pages and nginx's own status."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.model import Location, Redirect, Site, Tls, VerifyClient
from tests.dataplane.harness import (
    Answer,
    Backend,
    Proxy,
    free_port,
    peer,
    request,
    upstream,
    wait_until,
)
from tests.dataplane.rendered import A, host, make_certificate, push

FORGED = {
    "X-Forwarded-For": "203.0.113.9",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.test",
    "X-Forwarded-Port": "4711",
    "X-Real-IP": "203.0.113.9",
    "Forwarded": 'for=203.0.113.9;host="evil.test";proto=https',
}


@pytest.fixture
def serving(proxy: Proxy, backend: Backend) -> Proxy:
    """A proxy without a site that has a peer for upstream `a.test/`."""
    proxy.admin.put({A: upstream(backend.peer())})
    return proxy


def ask(
    proxy: Proxy,
    path: str = "/",
    *,
    source: str = "127.0.0.1",
    headers: Mapping[str, str] | None = None,
    name: str = "a.test",
    preface: bytes = b"",
) -> Answer:
    """A request from a loopback address of its own, with something in front of it."""
    client = http.client.HTTPConnection("127.0.0.1", proxy.http_port, timeout=10)
    client.sock = socket.create_connection(
        ("127.0.0.1", proxy.http_port), timeout=10, source_address=(source, 0)
    )
    client.sock.sendall(preface)
    try:
        client.request("GET", path, headers={"Host": name, **(headers or {})})
        answer = client.getresponse()
        lower = {key.lower(): value for key, value in answer.getheaders()}
        return Answer(answer.status, lower, answer.read())
    finally:
        client.close()


# --- whose word counts


@pytest.mark.parametrize("upgrade", [False, True], ids=["plain", "websocket"])
@pytest.mark.parametrize("trusted", [(), ("127.0.0.9", "10.0.0.0/8")], ids=["nobody", "others"])
def test_what_an_untrusted_client_says_of_itself_is_overwritten(
    serving: Proxy, backend: Backend, trusted: tuple[str, ...], upgrade: bool
) -> None:
    push(serving, Site((host(),)), trusted_proxies=trusted)
    more = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "eA=="}
    ask(serving, source="127.0.0.5", headers={**FORGED, **(more if upgrade else {})})
    seen = backend.requests[-1].headers
    assert ("upgrade" in seen) is upgrade
    assert {key: seen[key.lower()] for key in FORGED} == {
        "X-Forwarded-For": "127.0.0.5",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "a.test",
        "X-Forwarded-Port": str(serving.http_port),
        "X-Real-IP": "127.0.0.5",
        "Forwarded": "for=127.0.0.5;proto=http",
    }


def test_what_a_trusted_proxy_says_is_kept_and_added_to(serving: Proxy, backend: Backend) -> None:
    push(serving, Site((host(),)), trusted_proxies=("127.0.0.5",))
    ask(serving, source="127.0.0.5", headers=FORGED)
    seen = backend.requests[-1].headers
    assert {key: seen[key.lower()] for key in FORGED} == {
        "X-Forwarded-For": "203.0.113.9, 127.0.0.5",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.test",
        "X-Forwarded-Port": "4711",
        "X-Real-IP": "203.0.113.9",
        "Forwarded": 'for=203.0.113.9;host="evil.test";proto=https, for=127.0.0.5',
    }


def test_the_client_is_the_last_address_that_no_trusted_proxy_has(
    serving: Proxy, backend: Backend
) -> None:
    """What the client itself has put in front of the list makes no difference."""
    push(serving, Site((host(),)), trusted_proxies=("127.0.0.5", "10.1.0.0/16"))
    listed = "192.0.2.66, 198.51.100.7, 10.1.2.3"
    ask(serving, source="127.0.0.5", headers={"X-Forwarded-For": listed})
    seen = backend.requests[-1].headers
    assert seen["x-real-ip"] == "198.51.100.7"
    assert seen["x-forwarded-for"] == f"{listed}, 127.0.0.5"
    assert seen["forwarded"] == "for=198.51.100.7;proto=http"


def test_a_trusted_proxy_that_says_nothing_is_the_client(serving: Proxy, backend: Backend) -> None:
    push(serving, Site((host(),)), trusted_proxies=("127.0.0.5",))
    ask(serving, source="127.0.0.5")
    seen = backend.requests[-1].headers
    assert (seen["x-real-ip"], seen["x-forwarded-for"]) == ("127.0.0.5", "127.0.0.5")
    assert (seen["x-forwarded-proto"], seen["x-forwarded-host"]) == ("http", "a.test")


def test_several_headers_of_one_name_are_all_untrusted(serving: Proxy, backend: Backend) -> None:
    push(serving, Site((host(),)), trusted_proxies=("127.0.0.9",))
    with socket.create_connection(("127.0.0.1", serving.http_port), timeout=10) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n"
            b"X-Forwarded-For: 192.0.2.1\r\nx-forwarded-for: 192.0.2.2\r\nForwarded: for=x\r\n"
            b"forwarded: for=y\r\nX_Forwarded_For: 192.0.2.3\r\n\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert "192.0.2" not in str(backend.requests[-1].headers)
    assert backend.requests[-1].headers["forwarded"] == "for=127.0.0.1;proto=http"


def test_a_host_cannot_break_out_of_the_forwarded_header(serving: Proxy, backend: Backend) -> None:
    push(serving, Site((), default=(Location("/", A),)))
    ask(serving)
    status = ask(serving, name='x";for=192.0.2.1').status
    # Current nginx refuses such a name.
    assert len(backend.requests) == (1 if status == 400 else 2)
    assert {seen.headers["forwarded"] for seen in backend.requests} == {"for=127.0.0.1;proto=http"}


def test_the_access_log_has_the_real_client(
    make_proxy: Callable[..., Proxy], tmp_path: Path, backend: Backend
) -> None:
    log = tmp_path / "access.log"
    proxy = make_proxy(env={"TIDEGATE_ACCESS_LOG": str(log)})
    proxy.start()
    proxy.admin.put({A: upstream(backend.peer())})
    push(proxy, Site((host(),)), trusted_proxies=("127.0.0.5",))
    for source in ("127.0.0.5", "127.0.0.6"):
        ask(proxy, source=source, headers=FORGED)
    wait_until(lambda: log.exists() and log.read_text().count("\n") == 2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["client"] for line in lines] == ["203.0.113.9", "127.0.0.6"]


def test_the_headers_are_the_same_for_a_request_that_was_held(proxy: Proxy) -> None:
    push(proxy, Site((host(),)), trusted_proxies=("127.0.0.5",))
    late = Backend("late", port=free_port())
    proxy.admin.put({A: upstream(late.peer(), hold=20)})
    in_flight = 'tidegate_requests_in_flight{upstream="a.test/"}'
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, proxy, source=f"127.0.0.{n}", headers=FORGED) for n in (5, 6)]
        wait_until(lambda: proxy.admin.metrics().get(in_flight) == 2)
        with late:
            assert [answer.result().text for answer in answers] == ["late", "late"]
    forwarded = {seen.headers["x-forwarded-for"] for seen in late.requests}
    assert forwarded == {"203.0.113.9, 127.0.0.5", "127.0.0.6"}


@pytest.mark.parametrize(
    ("source", "proto", "status"),
    [
        ("127.0.0.5", "https", 200),
        ("127.0.0.5", "HTTPS, http", 200),
        ("127.0.0.5", "http", 308),
        ("127.0.0.5", "", 308),
        ("127.0.0.6", "https", 308),
    ],
)
def test_a_trusted_proxy_that_ended_tls_is_not_sent_to_tls_again(
    serving: Proxy, tmp_path: Path, source: str, proto: str, status: int
) -> None:
    tls = Tls(*make_certificate(tmp_path, "a.test"))
    push(
        serving,
        Site((host(Location("/", A, tls_only=True), tls=tls),)),
        trusted_proxies=("127.0.0.5",),
        ssl_port=free_port(),
    )
    answer = ask(serving, source=source, headers={"X-Forwarded-Proto": proto} if proto else {})
    assert answer.status == status


def test_a_trusted_proxy_is_no_way_round_a_client_certificate(
    serving: Proxy, tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path, "a.test")
    tls = Tls(certificate, key, verify_client=VerifyClient.REQUIRED, client_ca=certificate)
    push(serving, Site((host(tls=tls),)), trusted_proxies=("127.0.0.5",), ssl_port=free_port())
    answer = ask(serving, source="127.0.0.5", headers={"X-Forwarded-Proto": "https"})
    assert answer.status == 308


def test_hsts_stays_where_a_location_has_headers_of_its_own(serving: Proxy, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a.test")
    port = free_port()
    raw = Location("/", A, directives=("add_header X-Mine yes;",))
    push(serving, Site((host(raw, tls=Tls(certificate, key, hsts="max-age=9")),)), ssl_port=port)
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    client = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    raw_socket = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sock = context.wrap_socket(raw_socket, server_hostname="a.test")
    client.request("GET", "/", headers={"Host": "a.test"})
    headers = client.getresponse().headers
    client.close()
    assert (headers["X-Mine"], headers["Strict-Transport-Security"]) == ("yes", "max-age=9")
    assert "Strict-Transport-Security" not in ask(serving).headers


# --- PROXY protocol


def proxy_v1(client: str) -> bytes:
    return f"PROXY TCP4 {client} 198.51.100.1 50000 443\r\n".encode()


def proxy_v2(client: str) -> bytes:
    addresses = socket.inet_aton(client) + socket.inet_aton("198.51.100.1")
    return (
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11"
        + struct.pack("!H", 12)
        + addresses
        + struct.pack("!HH", 50000, 443)
    )


@pytest.mark.parametrize("preface", [proxy_v1, proxy_v2])
@pytest.mark.parametrize("trusted", [(), ("127.0.0.5",)], ids=["anybody", "listed"])
def test_the_proxy_protocol_tells_the_client(
    serving: Proxy, backend: Backend, preface: Callable[[str], bytes], trusted: tuple[str, ...]
) -> None:
    push(serving, Site((host(),)), proxy_protocol=True, trusted_proxies=trusted)
    ask(serving, source="127.0.0.5", preface=preface("203.0.113.77"), headers=FORGED)
    seen = backend.requests[-1].headers
    assert seen["x-real-ip"] == seen["x-forwarded-for"] == "203.0.113.77"
    assert seen["x-forwarded-proto"] == "http"  # the client's own word, and it is not trusted
    assert seen["x-forwarded-host"] == "a.test"
    assert seen["x-forwarded-port"] == "443"
    assert seen["forwarded"] == "for=203.0.113.77;proto=http"


def test_the_proxy_protocol_of_one_that_is_not_trusted_is_read_and_not_believed(
    serving: Proxy, backend: Backend
) -> None:
    push(serving, Site((host(),)), proxy_protocol=True, trusted_proxies=("127.0.0.5",))
    ask(serving, source="127.0.0.6", preface=proxy_v1("127.0.0.5"), headers=FORGED)
    seen = backend.requests[-1].headers
    assert seen["x-real-ip"] == seen["x-forwarded-for"] == "127.0.0.6"
    assert seen["x-forwarded-port"] == str(serving.http_port)


def test_headers_of_a_trusted_proxy_behind_the_proxy_protocol_are_kept(
    serving: Proxy, backend: Backend
) -> None:
    push(serving, Site((host(),)), proxy_protocol=True, trusted_proxies=("127.0.0.5", "10.0.0.7"))
    ask(serving, source="127.0.0.5", preface=proxy_v1("10.0.0.7"), headers=FORGED)
    seen = backend.requests[-1].headers
    assert seen["x-forwarded-for"] == "203.0.113.9, 10.0.0.7"
    assert seen["x-forwarded-proto"] == "https"


def test_a_relay_that_does_not_know_the_client_makes_nobody_trusted(
    serving: Proxy, backend: Backend
) -> None:
    push(serving, Site((host(),)), proxy_protocol=True, trusted_proxies=("127.0.0.5",))
    ask(serving, source="127.0.0.5", preface=b"PROXY UNKNOWN\r\n", headers=FORGED)
    assert backend.requests[-1].headers["x-forwarded-for"] == "127.0.0.5"


def test_without_the_proxy_protocol_a_listener_that_wants_it_refuses(serving: Proxy) -> None:
    push(serving, Site((host(),)), proxy_protocol=True)
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(serving)


# --- request ids


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abc-123", True),
        ("01HZX3:span/7=", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("a b", False),
        ('a"b', False),
        ("", False),
    ],
)
def test_a_request_id_is_passed_on_or_made_and_told_to_both_sides(
    serving: Proxy, backend: Backend, sent: str, kept: bool
) -> None:
    push(serving, Site((host(),)))
    answer = ask(serving, headers={"X-Request-ID": sent} if sent else {})
    told = answer.headers["x-request-id"]
    assert told == backend.requests[-1].headers["x-request-id"]
    if kept:
        assert told == sent
    else:
        assert re.fullmatch("[0-9a-f]{16}-[0-9]+-[0-9]+", told)


def test_answers_of_our_own_have_a_request_id_too(serving: Proxy) -> None:
    push(serving, Site((host(Location("/api", A)), host(Location("/", "none/"), name="b.test"))))
    answers = [ask(serving), ask(serving, name="b.test"), ask(serving, name="unknown.test")]
    assert [answer.status for answer in answers] == [404, 503, 503]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


def test_an_application_s_own_request_id_does_not_come_beside_ours(proxy: Proxy) -> None:
    push(proxy, Site((host(),)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        proxy.admin.put({A: upstream(peer(server.getsockname()[1]))})
        with socket.create_connection(("127.0.0.1", proxy.http_port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Request-ID: ours\r\n\r\n")
            connection, _ = server.accept()
            with connection:
                connection.recv(10000)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nX-Request-ID: theirs\r\nContent-Length: 0\r\n\r\n"
                )
                answer = client.recv(10000)
    assert b"X-Request-ID: ours\r\n" in answer
    assert b"theirs" not in answer


# --- redirects and the default backend


def get_tls(port: int, name: str, path: str, certificate: str) -> tuple[int, str]:
    """Status, and the Location header or the body."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sock = context.wrap_socket(raw, server_hostname=name)
    try:
        connection.request("GET", path, headers={"Host": name})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Location") or answer.read().decode()
    finally:
        connection.close()


def test_a_name_is_sent_elsewhere_on_both_listeners(serving: Proxy, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a.test", "old.test", "older.test")
    tls_port = free_port()
    redirects = (Redirect("old.test", "a.test"), Redirect("older.test", "https://a.test:8443/new/"))
    pushed = host(
        aliases=("old.test", "older.test", "www.test"),
        tls=Tls(certificate, key),
        redirects=redirects,
    )
    assert push(serving, Site((pushed,)), ssl_port=tls_port).status == 200
    path = "/x/y%20z?q=1&r=%2F"
    for name, over_http, over_tls in [
        ("old.test", f"http://a.test{path}", f"https://a.test{path}"),
        ("older.test", f"https://a.test:8443/new{path}", f"https://a.test:8443/new{path}"),
    ]:
        answer = ask(serving, path, name=name)
        assert (answer.status, answer.headers["location"]) == (302, over_http)
        assert get_tls(tls_port, name, path, certificate) == (302, over_tls)
    for name in ("a.test", "www.test"):
        assert ask(serving, path, name=name).text == "b0"
        assert get_tls(tls_port, name, path, certificate) == (200, "b0")


def test_a_name_that_is_sent_to_its_own_tls_at_another_port_serves_there(
    serving: Proxy, tmp_path: Path
) -> None:
    """The port that the world sees is not always SSLPort: 8443 in front of 443, as in UCP."""
    certificate, key = make_certificate(tmp_path, "a.test")
    tls_port = free_port()
    redirects = (Redirect("a.test", "https://a.test:8443"),)
    pushed = host(tls=Tls(certificate, key), redirects=redirects)
    assert push(serving, Site((pushed,)), ssl_port=tls_port).status == 200
    assert ask(serving, "/p?q").headers["location"] == "https://a.test:8443/p?q"
    assert get_tls(tls_port, "a.test", "/p", certificate) == (200, "b0")


def test_a_host_of_which_all_names_are_sent_elsewhere(serving: Proxy) -> None:
    push(serving, Site((host(redirects=(Redirect("a.test", "http://b.test/"),)),)))
    assert ask(serving, "/p").headers["location"] == "http://b.test/p"
    assert ask(serving, name="b.test").status == 503


def test_unknown_hosts_go_to_the_default_backend(serving: Proxy, tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path, "a.test")
    tls_port = free_port()
    default = (Location("/", A), Location("/old", A, rewrite=True))
    options = {"ssl_port": tls_port, "ssl_cert_path": str(tmp_path)}
    with Backend("claimed") as claimed, Backend("other") as other:
        serving.admin.put(
            {A: upstream(other.peer()), "c.test/": upstream(claimed.peer())},
        )
        site = Site((host(Location("/", "c.test/"), name="c.test"),), default=default)
        push(
            serving,
            site,
            ssl_default_cert="a.test.pem",
            ssl_default_cert_key="a.test.key",
            **options,
        )
        assert ask(serving, name="c.test").text == "claimed"
        assert ask(serving, name="whatever.test").text == "other"
        assert ask(serving, "/old/x", name="192.0.2.1").text == "other"
        assert other.requests[-1].path == "/x"
        assert get_tls(tls_port, "nobody.test", "/", certificate) == (200, "other")
        # Without a default certificate there is no handshake with those that nobody claims.
        push(serving, site, **options)
        assert ask(serving, name="whatever.test").text == "other"
        with pytest.raises(OSError):
            get_tls(tls_port, "nobody.test", "/", certificate)


def test_without_a_default_backend_unknown_hosts_get_503(serving: Proxy) -> None:
    push(serving, Site((host(),), default=(Location("/only", A),)))
    answer = ask(serving, name="unknown.test")
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert ask(serving, "/only/this", name="unknown.test").text == "b0"


# --- raw directives, nginx_status, settings, error pages


def test_raw_directives_hold_in_their_location_alone(serving: Proxy) -> None:
    raw = ('add_header X-Mine "a b" always;', "proxy_buffering on;", "proxy_read_timeout 1s;")
    push(serving, Site((host(Location("/", A), Location("/raw", A, directives=raw)),)))
    answer = ask(serving, "/raw/x", headers={"X-Request-ID": "r1"})
    assert (answer.headers["x-mine"], answer.headers["x-request-id"]) == ("a b", "r1")
    assert "x-mine" not in ask(serving, "/other").headers


def test_nginx_status_is_on_the_admin_listener_behind_a_password(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    proxy = make_proxy(env={"TIDEGATE_STATUS_PASSWORD_FILE": str(secret)}, token="a-long-token")
    proxy.start()
    push(proxy, Site((host(),)))

    def status(authorization: str = "") -> Answer:
        headers = {"Authorization": authorization} if authorization else {}
        return request(proxy.admin_port, "/nginx_status", headers=headers)

    def basic(pair: str) -> str:
        return "Basic " + base64.b64encode(pair.encode()).decode()

    for right in (basic("admin:s3cret"), basic(":s3cret"), "Bearer a-long-token"):
        assert status(right).text.startswith("Active connections: ")
    for wrong in (
        "",
        basic("admin:"),
        basic("s3cret"),
        basic("admin:S3cret"),
        "Bearer s3cret",
        "Basic ???",
        basic("admin:a-long-token"),
    ):
        answer = status(wrong)
        assert (answer.status, "Basic" in answer.headers["www-authenticate"]) == (401, True)
        assert "Active" not in answer.text
    # The password is for nothing else, and no host has the page.
    answer = request(proxy.admin_port, "/v1/status", headers={"Authorization": basic("a:s3cret")})
    assert answer.status == 401
    assert ask(proxy, "/nginx_status", name="unknown.test").status == 503


def test_nginx_status_without_any_password_is_for_nobody(proxy: Proxy) -> None:
    answer = request(proxy.admin_port, "/nginx_status")
    assert (answer.status, answer.json()["error"]) == (403, "no_password")


def test_nginx_status_on_the_hosts_is_for_those_who_are_named(serving: Proxy) -> None:
    sites = (host(), host(Location("/nginx_status", A), name="own.test"))
    push(serving, Site(sites), nginx_status_from=("127.0.0.5",), trusted_proxies=("127.0.0.8",))
    for name in ("a.test", "unknown.test"):
        assert (
            "Active connections"
            in ask(serving, "/nginx_status", source="127.0.0.5", name=name).text
        )
        assert ask(serving, "/nginx_status", source="127.0.0.6", name=name).status == 403
    # Who comes through a trusted proxy is who it says.
    forwarded = {"X-Forwarded-For": "127.0.0.6"}
    assert ask(serving, "/nginx_status", source="127.0.0.8", headers=forwarded).status == 403
    assert ask(serving, "/nginx_status", name="own.test").text == "b0"


def test_settings_for_connections_of_clients_are_in_force(serving: Proxy, backend: Backend) -> None:
    push(
        serving,
        Site((host(),)),
        underscores_in_headers=True,
        hide_info_headers=True,
        client_header_buffer_size="1k",
        large_client_header_buffers="2 2k",
        client_body_buffer_size="8k",
        keepalive_timeout=0.2,
        client_body_timeout=1.0,
    )
    ask(serving, headers={"X_Team": "blue"})
    assert backend.requests[-1].headers["x_team"] == "blue"
    assert ask(serving, headers={"X-Long": "a" * 3000}).status == 400
    with socket.create_connection(("127.0.0.1", serving.http_port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        text = b""
        while chunk := client.recv(1000):  # ends long before 75 s
            text += chunk
    assert text.startswith(b"HTTP/1.1 200")


def test_the_operator_has_a_page_for_each_status(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "503.html").write_text("away: {{status}}")
    (pages / "error.html").write_text("broken: {{status}} {{reason}}")
    proxy = make_proxy(env={"TIDEGATE_ERROR_PAGE": str(pages)})
    proxy.start()
    push(proxy, Site((host(),)))
    assert ask(proxy).text == "away: 503"
    proxy.admin.put({A: upstream(peer(free_port()))})
    assert ask(proxy).text == "broken: 502 Bad Gateway"
    (pages / "error.html").unlink()
    proxy.stop()
    proxy.start()
    assert "<html" in ask(proxy).text
