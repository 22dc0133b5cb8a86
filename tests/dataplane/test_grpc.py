"""gRPC through the proxy, with a real client and real servers: over TLS and without."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from agent.model import BackendTls, Location, Protocol, Site, Tls
from tests.dataplane.harness import Backend, Proxy, free_port, peer, request, upstream, wait_until
from tests.dataplane.rendered import host, make_certificate, push

G = "a.test/test.Echo"
OPTIONS = [
    ("grpc.default_authority", "a.test"),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
HOLD = 'tidegate_held_requests_total{upstream="a.test/test.Echo",result="resumed"}'


class Server:
    """A gRPC server of bytes: `Say` answers once, `Count` streams, `Chat` answers each message."""

    def __init__(self, name: str, port: int = 0, *, tls: tuple[str, str] | None = None) -> None:
        self.name = name.encode()
        self.metadata: list[dict[str, str]] = []
        self.release = threading.Event()
        handlers = {
            "Say": grpc.unary_unary_rpc_method_handler(self._say),
            "Count": grpc.unary_stream_rpc_method_handler(self._count),
            "Collect": grpc.stream_unary_rpc_method_handler(self._collect),
            "Chat": grpc.stream_stream_rpc_method_handler(self._chat),
            "Wait": grpc.unary_unary_rpc_method_handler(self._wait),
        }
        self._server = grpc.server(
            ThreadPoolExecutor(16),
            handlers=[grpc.method_handlers_generic_handler("test.Echo", handlers)],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)],
        )
        address = f"127.0.0.1:{port}"
        if tls is None:
            self.port = self._server.add_insecure_port(address)
        else:
            certificate, key = (Path(path).read_bytes() for path in tls)
            credentials = grpc.ssl_server_credentials([(key, certificate)])
            self.port = self._server.add_secure_port(address, credentials)

    def __enter__(self) -> Server:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.stop(0).wait(10)

    def peer(self) -> dict[str, object]:
        return peer(self.port, id=self.name.decode())

    def _say(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata()})
        if message == b"fail":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as asked")
        return self.name + b":" + message

    def _count(self, message: bytes, _context: object) -> Iterator[bytes]:
        for n in range(int(message)):
            yield b"%d" % n

    def _collect(self, messages: Iterator[bytes], _context: object) -> bytes:
        return b"%d" % sum(len(message) for message in messages)

    def _chat(self, messages: Iterator[bytes], _context: object) -> Iterator[bytes]:
        for message in messages:
            yield self.name + b":" + message

    def _wait(self, _message: bytes, _context: object) -> bytes:
        self.release.wait(30)
        return b"late"


class Client:
    """Calls to the service of `Server`."""

    def __init__(self, channel: grpc.Channel, prefix: str = "") -> None:
        self._prefix = prefix
        self.channel = channel

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def _path(self, method: str) -> str:
        return f"{self._prefix}/test.Echo/{method}"

    def say(self, message: bytes, *, method: str = "Say", timeout: float = 20) -> bytes:
        answer: bytes = self.channel.unary_unary(self._path(method))(message, timeout=timeout)
        return answer

    def count(self, n: int) -> list[bytes]:
        return list(self.channel.unary_stream(self._path("Count"))(b"%d" % n, timeout=20))

    def collect(self, messages: list[bytes]) -> bytes:
        call = self.channel.stream_unary(self._path("Collect"))
        answer: bytes = call(iter(messages), timeout=20)
        return answer

    def chat(self) -> Chat:
        return Chat(self.channel.stream_stream(self._path("Chat")))


class Chat:
    """A stream in both directions, kept open."""

    def __init__(self, call: Callable[..., Iterator[bytes]]) -> None:
        self._sent: queue.Queue[bytes | None] = queue.Queue()
        self._answers = call(iter(self._sent.get, None), timeout=60)

    def say(self, message: bytes) -> bytes:
        self._sent.put(message)
        return next(self._answers)

    def end(self) -> list[bytes]:
        self._sent.put(None)
        return list(self._answers)


def status_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """How a call fails."""
    with pytest.raises(grpc.RpcError) as failed:
        call()
    return failed.value.code(), failed.value.details()


def location(
    path: str = "/test.Echo", *, rewrite: bool = False, tls: BackendTls | None = None
) -> Location:
    return Location(path, G, rewrite=rewrite, protocol=Protocol.GRPC, backend_tls=tls)


@pytest.fixture
def plain(proxy: Proxy) -> Iterator[Client]:
    """A client over HTTP/2 without TLS."""
    port = free_port()
    assert (
        push(proxy, Site((host(location()),)), grpc_port=port, proxy_read_timeout=3).status == 200
    )
    with Client(grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS)) as client:
        yield client


@pytest.fixture
def secure(proxy: Proxy, tmp_path: Path) -> Iterator[Client]:
    """A client over TLS."""
    certificate, key = make_certificate(tmp_path, "a.test")
    port = free_port()
    site = Site((host(location(), tls=Tls(certificate, key)),))
    assert push(proxy, site, ssl_port=port).status == 200
    credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
    with Client(grpc.secure_channel(f"127.0.0.1:{port}", credentials, OPTIONS)) as client:
        yield client


@pytest.mark.parametrize("front", ["plain", "secure"])
def test_all_four_kinds_of_calls(proxy: Proxy, front: str, request: pytest.FixtureRequest) -> None:
    client: Client = request.getfixturevalue(front)
    with Server("s0") as server:
        proxy.admin.put({G: upstream(server.peer())})
        assert client.say(b"hello") == b"s0:hello"
        assert client.count(200) == [b"%d" % n for n in range(200)]
        assert client.collect([b"x" * 100_000] * 30) == b"3000000"
        chat = client.chat()
        assert [chat.say(word) for word in (b"a", b"b")] == [b"s0:a", b"s0:b"]
        assert chat.end() == []
        assert status_of(lambda: client.say(b"fail")) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "as asked",
        )
        told = server.metadata[0]
    assert told["x-real-ip"] == told["x-forwarded-for"] == "127.0.0.1"
    assert told["x-forwarded-proto"] == ("https" if front == "secure" else "http")
    assert told["x-forwarded-host"] == "a.test"
    assert re.fullmatch(r"[0-9a-f]{16}-\d+-\d+", told["x-request-id"])


def test_calls_are_spread_and_counted(proxy: Proxy, plain: Client) -> None:
    with Server("s0") as one, Server("s1") as two:
        proxy.admin.put({G: upstream(one.peer(), two.peer())})
        names = [plain.say(b"")[:2] for _ in range(20)]
        assert names.count(b"s0") in range(8, 13)
    counted = f'tidegate_requests_total{{upstream="{G}",method="write",code="2xx"}}'
    wait_until(lambda: proxy.admin.metrics().get(counted) == 20)


def test_a_stream_outlives_changes_of_its_peers(proxy: Proxy, plain: Client) -> None:
    with Server("s0") as old, Server("s1") as new:
        proxy.admin.put({G: upstream(old.peer())})
        chat = plain.chat()
        assert chat.say(b"1") == b"s0:1"
        for n in range(30):
            proxy.admin.patch({G: upstream(new.peer()) if n % 2 else upstream()})
            assert chat.say(b"%d" % n) == b"s0:%d" % n
        wait_until(lambda: proxy.admin.live(G) == {"s1": "up"})
        assert plain.say(b"") == b"s1:"
        assert chat.end() == []


def test_a_stream_outlives_a_reload(proxy: Proxy, secure: Client, tmp_path: Path) -> None:
    with Server("s0") as server:
        proxy.admin.put({G: upstream(server.peer())})
        chat = secure.chat()
        assert chat.say(b"1") == b"s0:1"
        old = proxy.workers()
        assert push(proxy, Site((host(location()),))).json()["reloaded"] is True
        assert chat.say(b"2") == b"s0:2"
        assert chat.end() == []
        wait_until(lambda: not old & proxy.workers())


def test_no_peer_is_unavailable(proxy: Proxy, plain: Client) -> None:
    proxy.admin.put({G: upstream()})
    code, details = status_of(lambda: plain.say(b""))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "No instance" in details


def test_peers_that_all_refuse_are_unavailable(proxy: Proxy, plain: Client) -> None:
    proxy.admin.put({G: upstream(peer(free_port()), peer(free_port()))})
    code, details = status_of(lambda: plain.say(b""))
    assert (code, "did not answer properly" in details) == (grpc.StatusCode.UNAVAILABLE, True)


def test_a_peer_that_is_too_slow_is_a_deadline_and_not_tried_again(
    proxy: Proxy, plain: Client
) -> None:
    with Server("s0") as server:
        proxy.admin.put({G: upstream(server.peer())})
        code, _ = status_of(lambda: plain.say(b"", method="Wait"))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_call_finds_another_peer_where_one_refuses(proxy: Proxy, plain: Client) -> None:
    with Server("s0") as server:
        dead = [peer(free_port(), id=f"dead{n}") for n in range(3)]
        proxy.admin.put({G: upstream(server.peer(), *dead)})
        assert {plain.say(b"") for _ in range(10)} == {b"s0:"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_is_held_until_a_peer_comes(proxy: Proxy, plain: Client, streaming: bool) -> None:
    proxy.admin.put({G: upstream(hold=20)})
    in_flight = f'tidegate_requests_in_flight{{upstream="{G}"}}'
    with ThreadPoolExecutor() as pool, Server("new") as server:
        answer: Future[bytes] = (
            pool.submit(plain.collect, [b"x" * 50_000] * 10)
            if streaming
            else pool.submit(plain.say, b"held")
        )
        wait_until(lambda: proxy.admin.metrics().get(in_flight) == 1)
        proxy.admin.patch({G: upstream(server.peer(), hold=20)})
        assert answer.result(10) == (b"500000" if streaming else b"new:held")
    wait_until(lambda: proxy.admin.metrics().get(HOLD) == 1)


def test_a_held_call_that_is_cancelled_frees_its_place(
    make_proxy: Callable[..., Proxy],
) -> None:
    proxy = make_proxy(workers=1, env={"TIDEGATE_MAX_HELD": "1"})
    proxy.start()
    port = free_port()
    push(proxy, Site((host(location()),)), grpc_port=port)
    proxy.admin.put({G: upstream(hold=20)})
    with Client(grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS)) as client:
        for _ in range(3):  # without a place they would be UNAVAILABLE at once
            code, _ = status_of(lambda: client.say(b"", timeout=0.5))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_context_root_is_taken_off(proxy: Proxy) -> None:
    port = free_port()
    push(proxy, Site((host(location("/v1", rewrite=True)),)), grpc_port=port)
    with (
        Server("s0") as server,
        Client(grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS), "/v1") as client,
    ):
        proxy.admin.put({G: upstream(server.peer())})
        assert client.say(b"x") == b"s0:x"


def test_peers_are_spoken_to_over_tls_and_verified(proxy: Proxy, tmp_path: Path) -> None:
    """HTTP over the same TLS identity has connections of its own."""
    port = free_port()
    tls = make_certificate(tmp_path, "a.test")
    backend = BackendTls(verify=True, ca=tls[0])
    both = host(Location("/", "a.test/", backend_tls=backend), location(tls=backend))
    assert push(proxy, Site((both,)), grpc_port=port).status == 200
    with (
        Server("s0", tls=tls) as server,
        Client(grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS)) as client,
    ):
        proxy.admin.put({G: upstream(server.peer()), "a.test/": upstream(server.peer())})
        for _ in range(3):
            assert client.say(b"x") == b"s0:x"
            request(proxy.http_port)
        chat = client.chat()
        assert [chat.say(word) for word in (b"a", b"b")] == [b"s0:a", b"s0:b"]
        assert chat.end() == []
    stranger = make_certificate(tmp_path, "b.test")
    with (
        Server("s1", tls=stranger) as server,
        Client(grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS)) as client,
    ):
        proxy.admin.put({G: upstream(server.peer())})
        assert status_of(lambda: client.say(b"x"))[0] is grpc.StatusCode.UNAVAILABLE
        assert server.metadata == []


def test_what_a_client_says_of_its_certificate_does_not_reach_a_peer(
    proxy: Proxy, plain: Client
) -> None:
    with Server("s0") as server:
        proxy.admin.put({G: upstream(server.peer())})
        forged = (("x-ssl-client-verify", "SUCCESS"), ("x-forwarded-for", "192.0.2.1"))
        plain.channel.unary_unary("/test.Echo/Say")(b"", metadata=forged, timeout=20)
        assert "x-ssl-client-verify" not in server.metadata[0]
        assert server.metadata[0]["x-forwarded-for"] == "127.0.0.1"


def test_http_and_grpc_share_a_host(proxy: Proxy, backend: Backend) -> None:
    port = free_port()
    both = host(Location("/", "a.test/"), location())
    push(proxy, Site((both,)), grpc_port=port)
    with (
        Server("s0") as server,
        Client(grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS)) as client,
    ):
        proxy.admin.put({G: upstream(server.peer()), "a.test/": upstream(backend.peer())})
        assert client.say(b"x") == b"s0:x"
        assert request(proxy.http_port).text == "b0"


def test_the_plain_port_takes_grpc_where_nginx_tells_the_two_apart(proxy: Proxy) -> None:
    """From 1.25.1 on; before, HTTP/1.1 is all that the plain port takes."""
    push(proxy, Site((host(location()),)))
    able = proxy.admin.status()["nginx_version"] >= 1_025_001
    with (
        Server("s0") as server,
        Client(grpc.insecure_channel(f"127.0.0.1:{proxy.http_port}", OPTIONS)) as client,
    ):
        proxy.admin.put({G: upstream(server.peer())})
        if able:
            assert client.say(b"x") == b"s0:x"
        else:
            assert status_of(lambda: client.say(b"x"))[0] is grpc.StatusCode.UNAVAILABLE
        assert request(proxy.http_port, "/elsewhere").status == 404
