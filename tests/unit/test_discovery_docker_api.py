"""The engine's client: GET and nothing else, whole answers, our own errors."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from agent.config.settings import Settings
from agent.discovery import build_sources, docker_api
from agent.discovery.docker_api import CALLS, Connector, DockerEngine, addresses, elements, read
from agent.discovery.engine import address_of
from agent.discovery.swarm import require_manager
from agent.errors import DiscoveryError, DockerRefused, DockerUnavailable
from tests.unit.discovery_fakes import following, recorded, swarm_engine
from tests.unit.test_driver_tls import authority, certificate

pytestmark = pytest.mark.timeout(30)

VERSION = {"Version": "29.0.1", "ApiVersion": "1.52", "MinAPIVersion": "1.44"}


class Dockerd:
    """Something that speaks HTTP on a unix socket; `answers` says what by path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[str] = []
        self.version = VERSION
        self.answers: dict[str, Callable[[Any], None]] = {}
        self.server: socketserver.ThreadingUnixStreamServer | None = None
        self.start()

    @property
    def settings(self) -> Settings:
        return Settings(docker_url=f"unix://{self.path}", request_timeout=0.5)

    def start(self) -> None:
        dockerd = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *arguments: Any) -> None:
                return

            def do_GET(self) -> None:
                dockerd.requests.append(f"{self.command} {self.path}")
                path = re.sub(r"^/v[\d.]+|\?.*", "", self.path)
                answer = dockerd.answers.get(path)
                if path == "/version":
                    say(dockerd.version)(self)
                elif answer:
                    answer(self)
                else:
                    say({"message": f"page not found: {path}"}, status=404)(self)

            do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815

        class Server(socketserver.ThreadingUnixStreamServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                return

        self.server = Server(str(self.path), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.path.unlink()
            self.server = None


def say(answer: Any, *, status: int = 200) -> Callable[[Any], None]:
    def write(handler: Any) -> None:
        body = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return write


@pytest.fixture(name="dockerd")
def _dockerd(tmp_path: Path) -> Iterator[Dockerd]:
    dockerd = Dockerd(tmp_path / "docker.sock")
    yield dockerd
    dockerd.stop()


def test_it_speaks_the_version_that_the_engine_has(dockerd: Dockerd) -> None:
    dockerd.answers["/info"] = say({"Name": "node1"})
    engine = DockerEngine(dockerd.settings)
    assert (engine.version, engine.api_version, engine.host) == ("29.0.1", "1.52", "")
    assert read(engine, "/info") == {"Name": "node1"}
    assert dockerd.requests[-1] == "GET /v1.52/info"
    engine.close()


def test_filters_are_told_as_the_engine_wants_them(dockerd: Dockerd) -> None:
    dockerd.answers["/tasks"] = say([])
    engine = DockerEngine(dockerd.settings)
    engine.get("/tasks", filters={"desired-state": ("running", "ready")})
    assert dockerd.requests[-1].endswith(
        "/tasks?filters=%7B%22desired-state%22%3A+%5B%22running%22%2C+%22ready%22%5D%7D"
    )
    engine.close()


def test_events_come_as_they_happen_and_end_from_another_thread(dockerd: Dockerd) -> None:
    more = threading.Event()

    def stream(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for number in (1, 2):
            line = json.dumps({"Type": "service", "n": number}).encode() + b"\n"
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            handler.wfile.flush()
            more.wait(10)
        time.sleep(10)

    dockerd.answers["/events"] = stream
    engine = DockerEngine(dockerd.settings)
    events = engine.events({"type": ("service", "node")})
    heard = iter(events)
    assert next(heard)["n"] == 1
    # Silence longer than the timeout of a request is no failure of a stream.
    time.sleep(0.7)
    more.set()
    assert next(heard)["n"] == 2
    threading.Timer(0.05, events.close).start()
    started = time.monotonic()
    assert list(heard) == []
    assert time.monotonic() - started < 5
    assert "%22type%22%3A+%5B%22service%22%2C+%22node%22%5D" in dockerd.requests[-1]
    engine.close()


@pytest.mark.parametrize("source_name", ["swarm", "engine"])
def test_a_source_gets_what_is_promised_and_nothing_else(
    dockerd: Dockerd, source_name: Literal["swarm", "engine"]
) -> None:
    fakes = swarm_engine()
    containers = [recorded(f"engine/{name}") for name in ("web-1", "proxy-1", "checked-1")]
    fakes.answers["/containers/json"] = recorded("engine/containers")
    fakes.answers |= {f"/containers/{raw['Id']}/json": raw for raw in containers}
    dockerd.answers = {path: say(answer) for path, answer in fakes.answers.items()}
    dockerd.answers["/events"] = endless
    settings = dockerd.settings.model_copy(
        update={"sources": (source_name,), "poll_interval": 0.02, "watch_socket": "/nonexistent"}
    )
    (source,) = build_sources(settings)
    with following(source) as follower:
        follower.until(lambda: follower.snapshots)
        follower.until(lambda: any("/events" in request for request in dockerd.requests))
        if source_name == "swarm":
            follower.until(lambda: any("desired-state" in r for r in dockerd.requests))
    promised = "|".join(re.escape(call).replace(r"\{id\}", r"\w+") for call in CALLS)
    for request in dockerd.requests:
        assert re.fullmatch(rf"GET (/v1\.52)?({promised})(\?.*)?", request), request


def endless(handler: Any) -> None:
    """A stream without events."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.flush()
    handler.rfile.read(1)


def test_what_the_engine_refuses_is_told_in_its_words(dockerd: Dockerd) -> None:
    dockerd.answers["/swarm"] = say({"message": "This node is not a swarm manager."}, status=503)
    engine = DockerEngine(dockerd.settings)
    with pytest.raises(DockerRefused, match="GET /swarm: This node is not") as refused:
        engine.get("/swarm")
    assert refused.value.status == 503
    engine.close()


def test_half_an_answer_is_none(dockerd: Dockerd) -> None:
    def half(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"[]")
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    dockerd.answers["/tasks"] = half
    engine = DockerEngine(dockerd.settings)
    with pytest.raises(DockerUnavailable):
        engine.get("/tasks")
    engine.close()


def test_what_is_no_json_is_no_answer(dockerd: Dockerd) -> None:
    def html(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        handler.wfile.write(b"<html>")

    dockerd.answers["/tasks"] = html
    engine = DockerEngine(dockerd.settings)
    with pytest.raises(DockerUnavailable, match="/tasks is not JSON"):
        read(engine, "/tasks")
    engine.close()


def test_an_engine_that_hangs_is_given_up(dockerd: Dockerd) -> None:
    dockerd.answers["/tasks"] = lambda handler: time.sleep(3)
    engine = DockerEngine(dockerd.settings)
    with pytest.raises(DockerUnavailable, match="did not answer in time"):
        engine.get("/tasks")
    engine.close()


def test_a_restarted_engine_is_found_by_its_path(dockerd: Dockerd) -> None:
    dockerd.answers["/info"] = say({})
    first = DockerEngine(dockerd.settings)
    first.get("/info")
    first.close()
    dockerd.stop()
    with pytest.raises(DockerUnavailable, match="there is no such socket; mount it"):
        DockerEngine(dockerd.settings)
    dockerd.start()
    again = DockerEngine(dockerd.settings)
    assert again.get("/info") == b"{}"
    again.close()


def test_a_socket_without_a_listener_tells_about_mounted_socket_files(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(DockerUnavailable, match="mount its directory instead"):
        DockerEngine(Settings(docker_url=f"unix://{path}"))


def test_a_refused_tcp_connection_names_the_engine(free_port: Callable[[], int]) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(DockerUnavailable, match=rf"{url} cannot be reached: Connection refused"):
        DockerEngine(Settings(docker_url=url))


@pytest.mark.parametrize(
    "settings",
    [
        {"docker_url": "gopher://engine"},
        {"docker_url": "tcp://127.0.0.1:1", "tls_ca_cert": "/nonexistent/ca.pem"},
    ],
)
def test_what_can_never_work_is_told(settings: dict[str, str]) -> None:
    with pytest.raises(DiscoveryError, match="cannot be") as caught:
        DockerEngine(Settings(**settings))  # type: ignore[arg-type]
    assert settings["docker_url"] in str(caught.value)


def test_dockers_environment_counts_where_the_settings_are_silent(
    dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{dockerd.path}")
    engine = DockerEngine(Settings())
    assert engine.version == "29.0.1"
    engine.close()


@pytest.mark.parametrize(
    ("told", "spoken"),
    [
        ({"ApiVersion": "1.24"}, "1.24"),
        ({"ApiVersion": "1.41", "MinAPIVersion": "1.12"}, "1.41"),
        ({"ApiVersion": "1.52", "MinAPIVersion": "1.44"}, "1.52"),
        ({"ApiVersion": "1.70", "MinAPIVersion": "1.44"}, "1.52"),
        ({"ApiVersion": "1.70", "MinAPIVersion": "1.60"}, "1.60"),
    ],
)
def test_the_newest_version_that_both_know_is_spoken(
    dockerd: Dockerd, told: dict[str, str], spoken: str
) -> None:
    dockerd.version = told
    dockerd.answers["/info"] = say({})
    engine = DockerEngine(dockerd.settings)
    engine.get("/info")
    assert dockerd.requests[-1] == f"GET /v{spoken}/info"
    engine.close()


def test_an_engine_that_is_too_old_is_told(dockerd: Dockerd) -> None:
    dockerd.version = {"ApiVersion": "1.22"}
    with pytest.raises(DiscoveryError, match=r"speaks API 1\.22, and 1\.24 is the oldest"):
        DockerEngine(dockerd.settings)


class TestAddresses:
    def test_settings_come_first_then_the_environment_then_the_socket(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        assert addresses(Settings()) == ("unix:///var/run/docker.sock",)
        monkeypatch.setenv("DOCKER_HOST", "tcp://a:1,tcp://b:1")
        assert addresses(Settings()) == ("tcp://a:1", "tcp://b:1")
        assert addresses(Settings(docker_url="tcp://c:1, tcp://d:1,")) == ("tcp://c:1", "tcp://d:1")
        assert addresses(Settings(docker_url="e:1,/f.sock")) == ("tcp://e:1", "/f.sock")

    def test_the_next_is_tried_when_one_fails_and_then_kept(
        self, dockerd: Dockerd, tmp_path: Path
    ) -> None:
        (tmp_path / "other").mkdir()
        other = Dockerd(tmp_path / "other" / "docker.sock")
        try:
            urls = f"unix:///nonexistent,unix://{dockerd.path},unix://{other.path}"
            connect = Connector(Settings(docker_url=urls, request_timeout=0.5))
            assert connect().url == connect().url == f"unix://{dockerd.path}"
            dockerd.answers["/info"] = say({"message": "No elected primary"}, status=500)
            with pytest.raises(DockerRefused):
                connect().get("/info")
            assert connect().url == f"unix://{other.path}"
        finally:
            other.stop()

    def test_one_that_is_not_fit_gives_way_to_the_next(
        self, dockerd: Dockerd, tmp_path: Path
    ) -> None:
        """A manager that was demoted goes on answering, as a worker."""
        (tmp_path / "other").mkdir()
        other = Dockerd(tmp_path / "other" / "docker.sock")
        try:
            urls = f"unix://{dockerd.path},unix://{other.path}"
            states = {dockerd: False, other: True}
            for engine, manager in states.items():
                swarm = {"LocalNodeState": "active", "ControlAvailable": manager}
                engine.answers["/info"] = say({"Swarm": swarm})
            connect = Connector(Settings(docker_url=urls))
            assert connect(require_manager).url == f"unix://{other.path}"
            assert connect().url == f"unix://{other.path}", "and that is kept"
            other.answers["/info"] = dockerd.answers["/info"]
            with pytest.raises(DockerUnavailable, match=r"a worker of its swarm.*; .*a worker"):
                connect(require_manager)
            alone = Connector(Settings(docker_url=f"unix://{dockerd.path}"))
            with pytest.raises(DiscoveryError, match="run the agent on a manager"):
                alone(require_manager)
        finally:
            other.stop()

    def test_where_none_answers_all_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(DockerUnavailable, match=r"unix:///a cannot.*; .*unix:///b cannot"):
            Connector(Settings(docker_url="unix:///a,unix:///b"))()


@pytest.mark.parametrize(
    ("known", "address"),
    [
        (["2001:db8::1", "192.0.2.1"], "192.0.2.1"),
        (["2001:db8::1"], "2001:db8::1"),
        ([], ""),
    ],
)
def test_an_engine_s_name_is_looked_up_in_both_families(
    monkeypatch: pytest.MonkeyPatch, known: list[str], address: str
) -> None:
    def look_up(*_: object, **__: object) -> list[Any]:
        if not known:
            raise socket.gaierror(-2, "Name or service not known")
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in one], socket.SOCK_STREAM, 6, "", (one, 0)) for one in known]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert address_of("engine.example") == address


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine-certs")
    authority(directory, "ca")
    authority(directory, "other")
    certificate(directory, "server", ca="ca", names="IP:127.0.0.1")
    certificate(directory, "cert", ca="ca", names="DNS:agent")
    certificate(directory, "late", ca="ca", names="DNS:agent", days=-1)
    (directory / "key.pem").write_bytes((directory / "cert.key").read_bytes())
    return directory


class TestTls:
    @pytest.fixture(name="url")
    def _url(self, files: Path) -> Iterator[str]:
        """An engine that wants to see a client's certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files / "server.pem", files / "server.key")
        context.load_verify_locations(files / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED

        class Handler(BaseHTTPRequestHandler):
            do_GET = say(VERSION)  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                return

        server = Server(("127.0.0.1", 0), Handler)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("DOCKER_HOST", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY"):
            monkeypatch.delenv(name, raising=False)

    def settings(self, files: Path, url: str, **more: Any) -> Settings:
        pair = {"tls_cert": f"{files}/cert.pem", "tls_key": f"{files}/key.pem"}
        return Settings(**({"docker_url": url, "request_timeout": 5.0} | pair | more))

    def test_with_the_ca_the_server_is_verified(self, files: Path, url: str) -> None:
        good = self.settings(files, url, tls_ca_cert=f"{files}/ca.pem")
        assert DockerEngine(good).version == "29.0.1"
        wrong = self.settings(files, url, tls_ca_cert=f"{files}/other.pem")
        with pytest.raises(DockerUnavailable, match=r"not of TLSCACert \S*other.pem"):
            DockerEngine(wrong)

    def test_without_a_ca_public_ones_count(self, files: Path, url: str) -> None:
        with pytest.raises(DockerUnavailable, match=r"not of a public CA .*; name the CA"):
            DockerEngine(self.settings(files, url))

    @pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
    def test_allow_insecure_verifies_nothing(self, files: Path, url: str) -> None:
        wrong = {"tls_ca_cert": f"{files}/other.pem", "allow_insecure": True}
        assert DockerEngine(self.settings(files, url, **wrong)).version == "29.0.1"

    @pytest.mark.parametrize("verify", ["", "1"])
    def test_dockers_environment_gives_the_files_and_they_are_used_to_verify(
        self, files: Path, url: str, verify: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", url)
        monkeypatch.setenv("DOCKER_CERT_PATH", str(files))
        monkeypatch.setenv("DOCKER_TLS_VERIFY", verify)
        assert DockerEngine(Settings()).version == "29.0.1"
        ca = (files / "ca.pem").read_bytes()
        try:
            (files / "ca.pem").write_bytes((files / "other.pem").read_bytes())
            with pytest.raises(DockerUnavailable, match=r"not of ca\.pem of DOCKER_CERT_PATH"):
                DockerEngine(Settings())
        finally:
            (files / "ca.pem").write_bytes(ca)

    def test_the_environments_ca_bundle_is_not_the_engines(
        self, files: Path, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{files}/other.pem")
        good = self.settings(files, url, tls_ca_cert=f"{files}/ca.pem")
        assert DockerEngine(good).version == "29.0.1"

    def test_an_engine_that_speaks_no_tls_is_told(
        self, files: Path, free_port: Callable[[], int]
    ) -> None:
        class Plain(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                return

        with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            url = f"tcp://127.0.0.1:{server.server_address[1]}"
            with pytest.raises(DockerUnavailable, match="it speaks no TLS there; name the port"):
                DockerEngine(self.settings(files, url, tls_ca_cert=f"{files}/ca.pem"))
            server.shutdown()

    @pytest.mark.parametrize(
        ("shown", "says"),
        [
            ({}, r"closes the connection without a word; .*cert.pem is not of a CA"),
            (
                {"tls_cert": "{files}/late.pem", "tls_key": "{files}/late.key"},
                "late.pem has expired",
            ),
            ({"tls_cert": "", "tls_key": ""}, "if it wants to see a certificate, set TLSCert"),
        ],
    )
    def test_one_that_closes_without_a_word_has_its_reason_in_our_certificate(
        self, files: Path, shown: dict[str, str], says: str
    ) -> None:
        """What it said of the certificate may be lost with the connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files / "server.pem", files / "server.key")

        def close(server: socket.socket) -> None:
            plain, _ = server.accept()
            with context.wrap_socket(plain, server_side=True) as tls:
                tls.recv(65536)
                tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=close, args=(server,), daemon=True).start()
            url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            given = {key: value.format(files=files) for key, value in shown.items()}
            settings = self.settings(files, url, tls_ca_cert=f"{files}/ca.pem", **given)
            with pytest.raises(DockerUnavailable, match=says):
                DockerEngine(settings)

    def test_allow_insecure_alone_asks_for_no_tls(self, files: Path, url: str) -> None:
        plain = Settings(docker_url=url, allow_insecure=True, request_timeout=5.0)
        with pytest.raises(DockerUnavailable):
            DockerEngine(plain)
        assert DockerEngine(self.settings(files, url, tls_ca_cert=f"{files}/ca.pem"))


@pytest.mark.parametrize("between", ["", "\n", "\r\n  "])
def test_objects_come_out_whole_whatever_lies_between_them(between: str) -> None:
    events = [{"n": 1, "name": "h\u00e9\u2514"}, {"n": 2, "in": {"a": "}{"}}]
    raw = between.join(json.dumps(e, ensure_ascii=False) for e in events).encode()
    for size in (1, 2, 3, 7, 1000):
        chunks = (raw[at : at + size] for at in range(0, len(raw), size))
        assert list(docker_api._objects(chunks, "there")) == events


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"n": 1', "cut in the middle"),
        (b"<html>", "something odd"),
        (b"17 ", "something odd"),
        (b'{"n": "' + b"x" * (1 << 20), "something odd"),
    ],
)
def test_what_is_no_object_ends_the_stream(raw: bytes, message: str) -> None:
    with pytest.raises(DockerUnavailable, match=message):
        list(docker_api._objects(iter([raw]), "there"))


def test_the_one_call_that_writes(dockerd: Dockerd) -> None:
    dockerd.answers["/networks/shop_net/connect"] = say({})
    dockerd.answers["/networks/had/connect"] = say(
        {"message": "endpoint with name web already exists in network had"}, status=403
    )
    engine = DockerEngine(dockerd.settings)
    engine.connect_network("shop_net", "abc")
    assert dockerd.requests[-1] == "POST /v1.52/networks/shop_net/connect"
    engine.connect_network("had", "abc")
    with pytest.raises(DockerRefused, match="POST /networks/none/connect: page not found"):
        engine.connect_network("none", "abc")
    engine.close()


def in_pieces(text: str, size: int) -> list[bytes]:
    data = text.encode()
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("items", [[], [{}], [{"a": "},{ü]"}, {"b": [{"c": 1}, "]"]}] * 3])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_that_comes_in_pieces_is_read_object_by_object(size, items, indent):
    text = json.dumps(items, indent=indent, ensure_ascii=False) + "\n"
    assert list(elements(in_pieces(text, size), "/tasks")) == items


@pytest.mark.parametrize(
    "text",
    ["", "null", "{}", "[1]", '[{"a":1}', '[{"a":1},', '[{"a":1},]', '[{"a":', "[{}]x", "[{} {}]"],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_no_whole_list_is_no_list(text, size):
    with pytest.raises(DockerUnavailable, match="/tasks"):
        list(elements(in_pieces(text, size), "/tasks"))


def test_a_long_list_is_given_before_it_is_whole():
    assert next(elements(iter([b'[{"a":1},{"b"']), "/tasks")) == {"a": 1}


@pytest.mark.parametrize("url", ["foo", "tcp://", "htp://x:1", "tcp://localhost:abc", "tcp://[::1"])
def test_a_url_that_is_none_is_told_with_what_one_looks_like(url):
    with pytest.raises(DiscoveryError, match=r"cannot be used: .* is like unix:///") as caught:
        DockerEngine(Settings(docker_url=url))
    assert not isinstance(caught.value, DockerUnavailable)  # it is no use to try again


@pytest.mark.parametrize("key", ["TLSCACert", "TLSCert", "TLSKey"])
def test_a_tls_file_that_is_not_there_is_named_with_its_key(tmp_path, key):
    there = tmp_path / "there.pem"
    there.write_text("-")
    files = {"TLSCACert": there, "TLSCert": there, "TLSKey": there, key: tmp_path / "none.pem"}
    given = {name: str(file) for name, file in files.items()}
    with pytest.raises(DiscoveryError, match=f"{key} .*none.pem cannot be read: no such file"):
        DockerEngine(Settings(DockerURL="tcp://127.0.0.1:1", **given))


def test_a_certificate_without_its_key_is_told():
    with pytest.raises(DiscoveryError, match="TLSCert is of no use without TLSKey"):
        DockerEngine(Settings(docker_url="tcp://127.0.0.1:1", tls_cert="/c.pem"))
