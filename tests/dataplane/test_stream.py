"""TCP routes and TLS passthrough on the real thing: needs an nginx with Lua in its stream part."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import socketserver
import ssl
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.config.settings import Extension, Settings
from agent.model import Host, Location, Site, TcpRoute, Tls
from agent.render import Capabilities, render
from tests.certificates import authority, certificate
from tests.dataplane.harness import (
    ROOT,
    Backend,
    Proxy,
    free_port,
    peer,
    request,
    upstream,
    wait_until,
)

pytestmark = pytest.mark.stream

ROUTE = "tcp/9000"


class Greeter(socketserver.ThreadingTCPServer):
    """Says its name to whoever connects, then echoes; over TLS with a context."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, name: str, *, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.name = name
        self.context = context
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Greeting)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port

    def peer(self, **more: Any) -> dict[str, object]:
        return peer(self.port, id=self.name, **more)

    def close(self) -> None:
        """Ends, and what is connected with it, as a killed process does."""
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Greeting(socketserver.BaseRequestHandler):
    server: Greeter

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            connection = self.request
            if self.server.context is not None:
                connection = self.server.context.wrap_socket(connection, server_side=True)
            self.server.open.add(connection)
            connection.sendall(self.server.name.encode() + b"\n")
            while data := connection.recv(65536):
                connection.sendall(data)
            connection.close()


@pytest.fixture
def greeters() -> Iterator[Callable[..., Greeter]]:
    made: list[Greeter] = []

    def make(name: str, **more: Any) -> Greeter:
        made.append(Greeter(name, **more))
        return made[-1]

    yield make
    for greeter in made:
        greeter.close()


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path: that of a unix socket has its limit."""
    path = Path(tempfile.mkdtemp(prefix="tg"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def proxy(short: Path) -> Iterator[Proxy]:
    with Proxy(short) as running:
        yield running


def push(proxy: Proxy, site: Site, *, ssl_port: int = 0) -> None:
    answer = proxy.admin.site(files_of(proxy, site, ssl_port=ssl_port))
    assert answer.status == 200, answer.text


def files_of(proxy: Proxy, site: Site, *, ssl_port: int = 0) -> dict[str, str]:
    options = Settings(
        extensions=(Extension(name="nginx", port=proxy.http_port, ssl_port=ssl_port),)
    )
    status = proxy.admin.status()
    features = frozenset(status["features"])
    return render(site, options, Capabilities(status["nginx_version"], features))


@pytest.fixture
def port(proxy: Proxy) -> int:
    """The port of a TCP route to the upstream ROUTE."""
    number = free_port()
    assert proxy.admin.put({ROUTE: upstream()}).status == 200
    push(proxy, Site((), tcp=(TcpRoute(number, ROUTE),)))
    return number


def connect(port: int, *, source: str = "127.0.0.1") -> tuple[socket.socket, str]:
    """A connection, and the name that greeted; "" where it was closed at once."""
    connection = socket.create_connection(("127.0.0.1", port), 10, (source, 0))
    try:
        return connection, connection.makefile("rb").readline().decode().strip()
    except ConnectionResetError:
        return connection, ""


def greeting(port: int, *, source: str = "127.0.0.1") -> str:
    connection, name = connect(port, source=source)
    connection.close()
    return name


def echoes(connection: socket.socket, text: bytes) -> bool:
    connection.sendall(text)
    received = b""
    while len(received) < len(text):
        data = connection.recv(65536)
        if not data:
            return False
        received += data
    return received == text


def test_the_instance_says_that_it_can(proxy: Proxy) -> None:
    assert "stream" in proxy.admin.status()["features"]


def test_connections_go_to_the_peers_in_turn(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    peers = [greeters(f"p{index}").peer() for index in range(4)]
    proxy.admin.patch({ROUTE: upstream(*peers)})
    seen = Counter(greeting(port) for _ in range(80))
    assert set(seen) == {"p0", "p1", "p2", "p3"}
    # Two workers, each strictly in turn.
    assert all(18 <= count <= 22 for count in seen.values()), seen


def test_an_acknowledged_change_is_in_force_for_the_next_connection(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    both = [greeters("a"), greeters("b")]
    for turn in range(60):
        here = both[turn % 2]
        assert proxy.admin.patch({ROUTE: upstream(here.peer())}).status == 200
        assert [greeting(port) for _ in range(4)] == [here.name] * 4


def test_a_change_of_membership_cuts_no_connection_and_reloads_nothing(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, b = greeters("a"), greeters("b")
    proxy.admin.patch({ROUTE: upstream(a.peer())})
    workers = proxy.workers()
    connection, name = connect(port)
    assert name == "a"
    for peers in ([b.peer()], [], [a.peer(state="draining"), b.peer()]):
        proxy.admin.patch({ROUTE: upstream(*peers)})
        assert echoes(connection, b"still there " * 1000)
    proxy.admin.patch(remove=[ROUTE])
    assert echoes(connection, b"and now")
    assert not proxy.workers() - workers, "none is new"


def test_a_client_that_has_said_all_still_gets_its_answer(proxy: Proxy, port: int) -> None:
    """And the other way round: each direction ends by itself."""
    said = os.urandom(3_000_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy.admin.put({ROUTE: upstream(peer(server.getsockname()[1]))})
        for last in ("client", "peer"):
            client = socket.create_connection(("127.0.0.1", port), 10)
            behind, _ = server.accept()
            behind.settimeout(10)
            first, second = (client, behind) if last == "peer" else (behind, client)
            with client, behind:
                for sender, receiver in ((second, first), (first, second)):
                    sending = threading.Thread(target=sender.sendall, args=(said,))
                    sending.start()
                    got = b""
                    while len(got) < len(said) and (chunk := receiver.recv(65536)):
                        got += chunk
                    sending.join()
                    assert got == said
                    sender.shutdown(socket.SHUT_WR)
                    assert receiver.recv(1) == b""


def test_a_draining_peer_gets_no_new_connection(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, b = greeters("a"), greeters("b")
    proxy.admin.patch({ROUTE: upstream(a.peer(state="draining"), b.peer())})
    assert {greeting(port) for _ in range(20)} == {"b"}
    proxy.admin.patch({ROUTE: upstream(a.peer(state="draining"))})
    assert greeting(port) == "a", "there is nobody else"


def test_a_backup_gets_connections_only_while_nobody_else_can(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, b = greeters("a"), greeters("b")
    backup = {**b.peer(), "backup": True}
    proxy.admin.patch({ROUTE: upstream(a.peer(), backup)})
    assert {greeting(port) for _ in range(20)} == {"a"}
    a.close()
    assert {greeting(port) for _ in range(20)} == {"b"}


def test_a_peer_that_refuses_is_passed_over_and_left_alone(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, dead = greeters("a"), free_port()
    proxy.admin.patch({ROUTE: upstream(a.peer(), peer(dead, id="dead"))})
    assert {greeting(port) for _ in range(60)} == {"a"}

    def failures() -> float:
        return proxy.admin.metrics().get(
            f'tidegate_tcp_connect_failures_total{{upstream="{ROUTE}"}}', 0
        )

    # Once or twice by each of the two workers, and not with every other connection.
    assert 1 <= wait_until(failures, what="failures counted") <= 6


def test_with_no_peer_a_connection_is_closed(proxy: Proxy, port: int) -> None:
    assert greeting(port) == ""
    series = f'tidegate_tcp_connections_total{{upstream="{ROUTE}",result="no_peer"}}'
    wait_until(lambda: proxy.admin.metrics().get(series) == 1, what="it is counted")


def test_where_a_peer_is_expected_a_connection_waits_for_it(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    proxy.admin.patch({ROUTE: upstream(hold=20)})
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(greeting(port))) for _ in range(10)]
    for thread in threads:
        thread.start()
    proxy.admin.patch({ROUTE: upstream(greeters("late").peer(), hold=20)})
    for thread in threads:
        thread.join(20)
    assert names == ["late"] * 10


def test_a_peer_that_is_new_has_to_listen_first(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, later = greeters("a"), free_port()
    proxy.admin.patch({ROUTE: upstream(a.peer())})
    proxy.admin.patch({ROUTE: upstream(a.peer(), peer(later, id="later"))})
    assert {greeting(port) for _ in range(20)} == {"a"}
    greeters("later", port=later)
    wait_until(lambda: proxy.admin.live(ROUTE)["later"] == "up", what="it is admitted")
    assert {greeting(port) for _ in range(20)} == {"a", "later"}


@pytest.mark.parametrize(
    "policy",
    [
        {"algorithm": "hash", "hash_key": "ip"},
        {"algorithm": "round_robin", "sticky": {"kind": "ip"}},
    ],
)
def test_by_client_address_a_client_stays_and_few_move(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter], policy: dict[str, object]
) -> None:
    peers = [greeters(f"p{index}").peer() for index in range(4)]
    clients = [f"127.0.1.{number}" for number in range(1, 61)]

    def all_of(some: list[dict[str, object]]) -> dict[str, str]:
        proxy.admin.patch({ROUTE: {**upstream(*some), "policy": policy}})
        return {client: greeting(port, source=client) for client in clients}

    before = all_of(peers)
    assert all_of(peers) == before
    assert min(Counter(before.values()).values()) >= 2, "each has a share"
    after = all_of(peers[:3])
    moved = [client for client in clients if after[client] != before[client]]
    assert moved == [client for client in clients if before[client] == "p3"]


def test_least_conn_counts_open_connections(short: Path, greeters: Callable[..., Greeter]) -> None:
    policy = {"algorithm": "least_conn"}
    number = free_port()
    with Proxy(short / "one", workers=1) as proxy, contextlib.ExitStack() as stack:
        a, b = greeters("a"), greeters("b")
        proxy.admin.put({ROUTE: {**upstream(a.peer()), "policy": policy}})
        push(proxy, Site((), tcp=(TcpRoute(number, ROUTE),)))
        for _ in range(5):
            stack.enter_context(connect(number)[0])
        proxy.admin.patch({ROUTE: {**upstream(a.peer(), b.peer()), "policy": policy}})
        wait_until(lambda: proxy.admin.live(ROUTE)["b"] == "up", what="it is admitted")
        names = []
        for _ in range(5):
            connection, name = connect(number)
            stack.enter_context(connection)
            names.append(name)
        assert names == ["b"] * 5


def test_weights_count(proxy: Proxy, port: int, greeters: Callable[..., Greeter]) -> None:
    a, b, c = greeters("a"), greeters("b"), greeters("c")
    peers = (a.peer(weight=3), b.peer(weight=1), c.peer(weight=0))
    proxy.admin.patch({ROUTE: upstream(*peers)})
    seen = Counter(greeting(port) for _ in range(200))
    assert set(seen) == {"a", "b"}
    assert 140 <= seen["a"] <= 160, seen


def test_connections_are_counted(proxy: Proxy, port: int, greeters: Callable[..., Greeter]) -> None:
    proxy.admin.patch({ROUTE: upstream(greeters("a").peer())})
    connection, _ = connect(port)
    tag = f'upstream="{ROUTE}"'

    def value(name: str, labels: str = "") -> float:
        return proxy.admin.metrics().get(f"tidegate_tcp_{name}{{{tag}{labels}}}", 0)

    wait_until(lambda: value("connections_open") == 1, what="one is open")
    assert echoes(connection, b"12345")
    connection.close()
    wait_until(lambda: value("connections_total", ',result="ok"') == 1, what="it has ended")
    assert value("bytes_total", ',direction="received"') == 5
    assert value("bytes_total", ',direction="sent"') == len("a\n12345")
    assert value("connections_open") == 0
    proxy.admin.patch(remove=[ROUTE])
    wait_until(lambda: tag not in str(proxy.admin.metrics()), what="its series vanish")


def test_a_worker_that_is_killed_leaves_the_others_and_its_successor_at_work(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, b = greeters("a"), greeters("b")
    proxy.admin.patch({ROUTE: upstream(a.peer())})
    wait_until(lambda: len(proxy.workers()) == 2, what="those before the route are gone")
    before = proxy.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda gone=pid: gone not in proxy.workers(), what="it is gone")
    wait_until(lambda: len(proxy.workers() - before) == 2, what="both have successors")
    proxy.admin.patch({ROUTE: upstream(b.peer())})
    assert {greeting(port) for _ in range(20)} == {"b"}


def test_the_time_outs_of_a_policy_count(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    policy = {"algorithm": "round_robin", "timeouts": {"read": 1, "send": 1}}
    proxy.admin.patch({ROUTE: {**upstream(greeters("a").peer()), "policy": policy}})
    connection, name = connect(port)
    assert name == "a"
    assert connection.recv(1) == b"", "silent for too long, so it is closed"


def test_after_a_restart_it_serves_without_anybodys_help(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    proxy.admin.patch({ROUTE: upstream(greeters("a").peer())})
    wait_until(
        lambda: (status := proxy.admin.status())["persisted_revision"] == status["revision"],
        what="it is on disk",
    )
    proxy.stop()
    proxy.start()
    assert greeting(port) == "a"


def test_a_reload_leaves_connections_open(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    a, b, other = greeters("a"), greeters("b"), free_port()
    proxy.admin.patch({ROUTE: upstream(a.peer())})
    connection, _ = connect(port)
    push(proxy, Site((), tcp=(TcpRoute(port, ROUTE), TcpRoute(other, ROUTE))))
    proxy.admin.patch({ROUTE: upstream(b.peer())})
    assert echoes(connection, b"x" * 100_000)
    assert greeting(port) == greeting(other) == "b"
    connection.close()


def test_a_port_that_is_taken_is_named_and_the_rest_serves_on(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter]
) -> None:
    proxy.admin.patch({ROUTE: upstream(greeters("a").peer())})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        site = Site((), tcp=(TcpRoute(port, ROUTE), TcpRoute(number, ROUTE)))
        answer = proxy.admin.site(files_of(proxy, site))
    assert answer.status == 422
    assert answer.json()["file"] == f"tcp-{number}.stream"
    assert "Address already in use" in answer.json()["message"]
    assert greeting(port) == "a"


def test_a_library_that_declares_its_functions_differently_is_not_called(short: Path) -> None:
    home = short / "home"
    shutil.copytree(ROOT / "nginx", home)
    bridge = home / "lua" / "tidegate" / "bridge.lua"
    text = bridge.read_text()
    assert text.count("int get_stale") == 1
    bridge.write_text(text.replace("int get_stale", "long get_stale"))
    with Proxy(short / "other", home=home) as proxy:
        assert "stream" not in proxy.admin.status()["features"]
        assert "ngx_http_lua_ffi_shdict_get in a way that is not known here" in proxy.output


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    authority(directory, "ca")
    certificate(directory, "front", ca="ca", names="DNS:open.test,DNS:app.wild.test")
    certificate(directory, "behind", ca="ca", names="DNS:raw.test,DNS:*.wild.test")
    return directory


def tls(directory: Path) -> Tls:
    return Tls(certificate=f"{directory}/front.pem", key=f"{directory}/front.key")


def shake(
    port: int, name: str, directory: Path, *, source: str = "127.0.0.1", alpn: str = ""
) -> ssl.SSLSocket:
    """A TLS connection whose certificate is good for `name`."""
    context = ssl.create_default_context(cafile=f"{directory}/ca.pem")
    if alpn:
        context.set_alpn_protocols([alpn])
    plain = socket.create_connection(("127.0.0.1", port), 10, (source, 0))
    return context.wrap_socket(plain, server_hostname=name)


def get(connection: ssl.SSLSocket, host: str) -> int:
    client = http.client.HTTPConnection(host)
    client.sock = connection
    client.request("GET", "/")
    status = client.getresponse().status
    client.close()
    return status


class Front:
    """A proxy with hosts whose TLS is opened here, and others whose TLS is not."""

    def __init__(self, proxy: Proxy, backend: Backend, behind: Greeter, directory: Path) -> None:
        self.proxy = proxy
        self.ssl_port = free_port()
        self.directory = directory
        self.opened = Host("open.test", (), (Location("/", "open.test/"),), tls=tls(directory))
        self.raw = Host("raw.test", (), (), passthrough="raw.test/")
        self.upstreams: Mapping[str, object] = {
            "open.test/": upstream(backend.peer()),
            "raw.test/": upstream(behind.peer()),
        }
        assert proxy.admin.put(self.upstreams).status == 200

    def push(self, *hosts: Host) -> None:
        push(self.proxy, Site(tuple(hosts)), ssl_port=self.ssl_port)

    def subject(self, name: str) -> str:
        """Whose certificate is shown for `name`."""
        with shake(self.ssl_port, name, self.directory) as connection:
            certificate: Any = connection.getpeercert()
            (((_, subject),),) = certificate["subject"]
            return str(subject)


@pytest.fixture
def front(
    proxy: Proxy, backend: Backend, greeters: Callable[..., Greeter], certificates: Path
) -> Front:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(f"{certificates}/behind.pem", f"{certificates}/behind.key")
    return Front(proxy, backend, greeters("behind", context=context), certificates)


def test_passthrough_goes_to_its_upstream_unopened_and_all_else_is_served(
    front: Front, backend: Backend, certificates: Path
) -> None:
    front.push(front.opened, front.raw)
    assert front.subject("raw.test") == "behind"
    assert front.subject("open.test") == "front"
    with shake(front.ssl_port, "raw.test", certificates) as connection:
        assert connection.recv(100) == b"behind\n"
        assert echoes(connection, b"x" * 200_000)
    connection = shake(front.ssl_port, "open.test", certificates, source="127.0.3.7")
    assert get(connection, "open.test") == 200
    headers = backend.requests[-1].headers
    assert headers["x-real-ip"] == "127.0.3.7"
    assert headers["x-forwarded-for"] == "127.0.3.7"
    assert headers["x-forwarded-proto"] == "https"
    assert headers["x-forwarded-port"] == str(front.ssl_port)
    with shake(front.ssl_port, "open.test", certificates, alpn="h2") as connection:
        assert connection.selected_alpn_protocol() == "h2"


def test_a_name_that_nobody_claims_is_refused_as_ever(front: Front, certificates: Path) -> None:
    front.push(front.opened, front.raw)
    with pytest.raises(ssl.SSLError):
        shake(front.ssl_port, "nobody.test", certificates)


def test_passthrough_follows_the_membership(
    front: Front, greeters: Callable[..., Greeter], certificates: Path
) -> None:
    front.push(front.opened, front.raw)
    held = shake(front.ssl_port, "raw.test", certificates)
    assert held.recv(100) == b"behind\n"
    other = greeters("other")
    front.proxy.admin.patch({"raw.test/": upstream(other.peer())})
    connection = socket.create_connection(("127.0.0.1", front.ssl_port), 10)
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLError):  # it does not speak TLS: it is the other one
        context.wrap_socket(connection, server_hostname="raw.test")
    assert echoes(held, b"still the old one")
    held.close()


def test_a_wildcard_takes_no_host_that_is_opened_here(front: Front) -> None:
    app = Host("app.wild.test", (), (Location("/", "open.test/"),), tls=tls(front.directory))
    wild = Host("*.wild.test", ("default",), (), passthrough="raw.test/")
    front.push(wild, app)
    assert front.subject("any.wild.test") == "behind"
    assert front.subject("app.wild.test") == "front"


def test_without_passthrough_nothing_stands_before_the_tls_listener(front: Front) -> None:
    front.push(front.opened)
    assert "passthrough.stream" not in front.proxy.admin.call("GET", "/v1/site").json()["files"]
    assert front.subject("open.test") == "front"


def test_coming_and_going_of_passthrough_refuses_nobody(front: Front) -> None:
    front.push(front.opened)
    failed: list[BaseException] = []
    done = threading.Event()
    count = 0

    def load() -> None:
        nonlocal count
        while not done.is_set():
            try:
                assert front.subject("open.test") == "front"
                count += 1
            except (OSError, AssertionError) as error:
                failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for hosts in 2 * [(front.opened, front.raw), (front.opened,)]:
        front.push(*hosts)
        before = count
        wait_until(lambda seen=before: count > seen + 5, what="it is asked again")
    done.set()
    for thread in threads:
        thread.join(20)
    assert failed == []


@pytest.mark.parametrize("whose", ["http_port", "admin_port"])
def test_a_port_that_is_the_proxy_s_own_is_named_and_the_rest_serves_on(
    proxy: Proxy, port: int, greeters: Callable[..., Greeter], whose: str
) -> None:
    proxy.admin.patch({ROUTE: upstream(greeters("a").peer())})
    number = getattr(proxy, whose)
    answer = proxy.admin.site(
        files_of(proxy, Site((), tcp=(TcpRoute(port, ROUTE), TcpRoute(number, ROUTE))))
    )
    assert answer.status == 422
    assert answer.json()["file"] == f"tcp-{number}.stream"
    assert greeting(port) == "a"
    assert request(proxy.http_port).status == 503
