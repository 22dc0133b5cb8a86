"""The admin API over TLS: who is believed, and with what the agent shows itself."""

from __future__ import annotations

import json
import shutil
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent.config.settings import OpenResty
from agent.driver.openresty import Instance, Token
from agent.driver.targets import Target
from agent.errors import InstanceUnreachable
from tests.certificates import authority, certificate


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    if shutil.which("openssl") is None:
        pytest.fail("this test needs the command openssl")
    directory = tmp_path_factory.mktemp("certs")
    authority(directory, "ca")
    authority(directory, "other")
    certificate(directory, "nginx", ca="ca", names="DNS:nginx.example.com")
    certificate(directory, "local", ca="ca", names="IP:127.0.0.1")
    certificate(directory, "agent", ca="ca", names="DNS:agent")
    return directory


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"instance": "run-1", "revision": 7}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(certs):
    """Starts a server with that certificate; returns its URL."""
    servers = []

    def start(name: str, *, client_ca: str = "") -> str:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certs / f"{name}.pem", certs / f"{name}.key")
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(certs / f"{client_ca}.pem")
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
        return f"https://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def instance(url: str, *, static: bool, **settings: str) -> Instance:
    return Instance(
        Target(id="x", name="x", urls=(url,), static=static),
        OpenResty(**settings),
        Token(token="t", file=""),
    )


def test_a_named_instance_must_have_the_name_that_it_is_called_by(serve, certs):
    ca = str(certs / "ca.pem")
    assert instance(serve("local"), static=True, tls_ca=ca).status().revision == 7
    with pytest.raises(InstanceUnreachable, match="certificate"):
        instance(serve("nginx"), static=True, tls_ca=ca).status()


def test_an_instance_found_by_its_address_is_proven_by_the_operators_ca(serve, certs):
    url = serve("nginx")
    assert instance(url, static=False, tls_ca=str(certs / "ca.pem")).status().revision == 7
    with pytest.raises(InstanceUnreachable, match="certificate"):
        instance(url, static=False, tls_ca=str(certs / "other.pem")).status()


@pytest.mark.parametrize("static", [True, False])
def test_without_a_ca_of_ours_only_public_ones_are_believed(serve, static):
    with pytest.raises(InstanceUnreachable, match="certificate"):
        instance(serve("nginx"), static=static).status()


def test_the_agent_shows_its_own_certificate_where_it_is_asked_for(serve, certs):
    url = serve("nginx", client_ca="ca")
    ca = str(certs / "ca.pem")
    with pytest.raises(InstanceUnreachable):
        instance(url, static=False, tls_ca=ca).status()
    shown = instance(
        url,
        static=False,
        tls_ca=ca,
        tls_cert=str(certs / "agent.pem"),
        tls_key=str(certs / "agent.key"),
    )
    assert shown.status().revision == 7


def test_a_ca_file_that_is_missing_is_told_not_raised_as_a_library_error(serve, certs):
    with pytest.raises(InstanceUnreachable, match=r"none\.pem"):
        instance(serve("nginx"), static=False, tls_ca=str(certs / "none.pem")).status()
