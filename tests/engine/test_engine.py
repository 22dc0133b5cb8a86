"""An engine in no swarm, and then a manager, reached over the network as a user would have it.

What its socket shows as well is in tests/swarm/test_discovery.py.
"""

from __future__ import annotations

import http.client
import json
import re
import socket as unix
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from agent.compile import compile_snapshot
from agent.config.settings import Extension, Settings
from agent.discovery.docker_api import CALLS, Connector, DockerEngine
from agent.errors import DiscoveryError
from agent.model import Desired, InstanceState, Snapshot
from tests.conftest import free_port
from tests.engine.conftest import PORT, checked, following
from tests.lab import machine
from tests.lab.builder import APP
from tests.lab.engine import ADDRESS_6, OTHER_ADDRESS, PlainEngine
from tests.lab.util import wait_for
from tests.swarm import test_discovery as discovery
from tests.swarm.test_discovery import Follower

SETTLE = 30.0

Run = Callable[..., str]


def over_tls(certs: Path, host: str = "", **more: Any) -> Settings:
    """Settings for the engine, with all that is right unless said otherwise."""
    values = {
        "docker_url": f"tcp://{host or machine.node_address(1)}:{PORT}",
        "tls_ca_cert": f"{certs}/ca.pem",
        "tls_cert": f"{certs}/good.pem",
        "tls_key": f"{certs}/good.key",
        "sources": ("engine",),
        "request_timeout": 10.0,
    }
    return Settings(**(values | more))  # type: ignore[arg-type]


def overridden(certs: Path, address: str) -> Settings:
    extension = Extension.model_validate({"BackendOverrideAddress": address})
    return over_tls(certs, extensions=(extension,))


def routed(name: str, port: int = 8080) -> list[str]:
    """Labels of a container that serves NAME.local."""
    return [f"--label=interlock.hostname={name}", f"--label=interlock.port={port}"]


def on(address: str) -> list[str]:
    """What a container is told to listen on all addresses of that kind, as a proxy will use it."""
    return ["--env=LISTEN=:::8080"] if ":" in address else []


def desired(follower: Follower, settings: Settings) -> Desired:
    source = follower.published[-1][1]
    return compile_snapshot(Snapshot({source.source: source}), settings)


def places(follower: Follower, settings: Settings, name: str) -> set[tuple[str, int]]:
    """Where the peers of NAME.local are."""
    upstream = desired(follower, settings).membership.upstreams.get(f"{name}.local/")
    return {(peer.address, peer.port) for peer in upstream.peers} if upstream else set()


def served_by(engine: PlainEngine, place: tuple[str, int], *, near: bool = False) -> str:
    """Id, in short, of the container that answers there, once it does.

    Args:
        near: asked for on the engine's own node, else over the network.
    """

    def ask() -> str:
        connection = http.client.HTTPConnection(*place, timeout=5)
        try:
            connection.request("GET", "/")
            return str(json.loads(connection.getresponse().read())["hostname"])
        finally:
            connection.close()

    def wait() -> str:
        return wait_for(ask, SETTLE, f"{place} answers")

    return engine.seen_from(engine.node if near else engine.client, wait)


def check(engine: PlainEngine, **environment: str) -> dict[str, str]:
    """What `tidegate check` says in the client's network."""
    return checked("nsenter", f"--net={machine.NETNS_DIR / engine.client}", **environment)


class FilteringProxy:
    """Passes on GET of the paths allowed, by a connection each, and remembers what it denied."""

    def __init__(self, socket: Path) -> None:
        self.allowed = set(CALLS)
        self.denied: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = re.sub(r"^/v[0-9.]+(?=/)", "", urlsplit(self.path).path)
                form = re.sub(r"^/(containers|networks)/(?!json$)[^/]+", r"/\1/{id}", path)
                if form not in proxy.allowed:
                    proxy.denied.append(path)
                    self.send_error(403)
                    return
                self.close_connection = True
                with closing(unix.socket(unix.AF_UNIX)) as engine:
                    engine.connect(str(socket))
                    engine.sendall(
                        f"GET {self.path} HTTP/1.1\r\nHost: engine\r\n"
                        "Connection: close\r\n\r\n".encode()
                    )
                    with suppress(OSError):
                        while data := engine.recv(65536):
                            self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Nothing: the tests look at `denied`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False

    @property
    def settings(self) -> Settings:
        """Those of an agent that has this proxy for its engine."""
        port = self._server.server_address[1]
        return Settings(docker_url=f"tcp://127.0.0.1:{port}", sources=("engine",))

    def __enter__(self) -> FilteringProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class TestTls:
    def test_list_and_events_come_over_it_and_what_is_published_is_reached(
        self, engine: PlainEngine, certs: Path, run: Run
    ) -> None:
        first = run("first", "--publish=18061:8080", *routed("first"), APP)
        settings = over_tls(certs)
        with following(engine, settings) as follower:
            assert follower.up(1, "first"), "it was listed"
            assert follower.source.status.mode == "events"
            second = run("second", "--publish=18062:8080", *routed("second"), APP)
            wait_for(lambda: follower.up(1, "second"), SETTLE, "it was heard of")
            for name, identity, port in (("first", first, 18061), ("second", second, 18062)):
                (place,) = places(follower, settings, name)
                assert place == (engine.address, port)
                assert identity.startswith(served_by(engine, place))
            engine.docker("stop", "--time=5", "second")
            wait_for(lambda: follower.workload("second") is None, SETTLE, "it is gone")
            assert follower.first_seen(second, InstanceState.DRAINING)
            assert follower.source.status.last_error == ""

    @pytest.mark.parametrize(
        "given",
        [
            {"DOCKER_CERT_PATH": "{certs}"},
            {"DOCKER_CERT_PATH": "{certs}", "DOCKER_TLS_VERIFY": "1"},
            {"DOCKER_TLS_VERIFY": "1", "HOME": "{home}"},
        ],
        ids=["path", "path-and-verify", "verify"],
    )
    def test_dockers_environment_is_enough(
        self, engine: PlainEngine, certs: Path, tmp_path: Path, given: dict[str, str]
    ) -> None:
        (tmp_path / ".docker").symlink_to(certs)
        environment = {k: v.format(certs=certs, home=tmp_path) for k, v in given.items()}
        host = f"tcp://{engine.address}:{PORT}"
        told = check(engine, DOCKER_HOST=host, **environment)
        assert told["engine"].startswith("ok: version ")
        told = check(engine, DOCKER_HOST=f"tcp://{OTHER_ADDRESS}:{PORT}", **environment)
        assert told["engine"].startswith("failed: ")
        assert "its certificate is for another name" in told["engine"], "it was verified"

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (
                {"tls_ca_cert": "{certs}/other.pem"},
                r"certificate is not of TLSCACert \S*other.pem .*; name the CA that signed it as "
                "TLSCACert, or set AllowInsecure",
            ),
            ({"tls_ca_cert": ""}, "certificate is not of a public CA .*; name the CA"),
            ({"host": OTHER_ADDRESS}, "is for another name .*198.18.0.200.*; connect by a name"),
            (
                {"tls_cert": "{certs}/late.pem", "tls_key": "{certs}/late.key"},
                r"TLSCert \S*/late.pem has expired; renew it",
            ),
            (
                {"tls_cert": "{certs}/foreign.pem", "tls_key": "{certs}/foreign.key"},
                r"TLSCert \S*/foreign.pem .*of a CA that it trusts",
            ),
            ({"tls_cert": "", "tls_key": ""}, "set TLSCert and TLSKey"),
            ({"tls_key": ""}, "TLSCert is of no use without TLSKey; give both"),
            ({"tls_key": "{certs}/late.key"}, r"TLSKey \S*late.key is not the key of TLSCert"),
            ({"tls_ca_cert": "{certs}/none.pem"}, r"TLSCACert \S*none.pem cannot be read: no such"),
            ({"tls_ca_cert": "{certs}/good.key"}, "holds no certificate in PEM form"),
            (
                {"tls_ca_cert": "", "tls_cert": "", "tls_key": ""},
                "it speaks TLS there; set TLSCACert, TLSCert and TLSKey",
            ),
        ],
        ids=[
            *("wrong-ca", "no-ca", "wrong-name", "expired", "foreign", "no-certificate"),
            *("no-key", "other-key", "no-file", "no-pem", "no-tls"),
        ],
    )
    def test_what_is_wrong_is_told_with_the_place_and_the_cure(
        self, engine: PlainEngine, certs: Path, wrong: dict[str, str], says: str
    ) -> None:
        given = {key: value.format(certs=certs) for key, value in wrong.items()}
        settings = over_tls(certs, **given)
        with pytest.raises(DiscoveryError, match=says) as caught:
            engine.seen_from(engine.client, lambda: DockerEngine(settings))
        assert settings.docker_url in str(caught.value)

    def test_allow_insecure_verifies_nothing_and_is_told_once(
        self, engine: PlainEngine, certs: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = over_tls(certs, tls_ca_cert=f"{certs}/other.pem", allow_insecure=True)

        def ask() -> str:
            connected = Connector(settings)()
            for _ in range(3):
                connected.get("/info")
            connected.close()
            return connected.version

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert engine.seen_from(engine.client, ask)
        assert [str(one.message) for one in said] == []
        assert caplog.text.count("AllowInsecure") == 1

    def test_an_engine_can_be_reached_by_ipv6(
        self, engine: PlainEngine, certs: Path, run: Run
    ) -> None:
        identity = run("six", "--publish=18063:8080", *routed("six"), *on(ADDRESS_6), APP)
        settings = over_tls(certs, f"[{ADDRESS_6}]")
        with following(engine, settings) as follower:
            assert places(follower, settings, "six") == {(ADDRESS_6, 18063)}
        assert identity.startswith(served_by(engine, (ADDRESS_6, 18063)))

    def test_an_address_where_nobody_is_gives_way_to_the_next(
        self, engine: PlainEngine, certs: Path, run: Run
    ) -> None:
        run("kept", "--publish=18064:8080", *routed("kept"), APP)
        nobody = f"tcp://{engine.address}:{free_port()}"
        stranger = f"tcp://{OTHER_ADDRESS}:{PORT}"
        good = f"tcp://{engine.address}:{PORT}"
        settings = over_tls(certs, docker_url=f"{nobody},{stranger},{good}")
        with following(engine, settings) as follower:
            assert follower.up(1, "kept")
        settings = over_tls(certs, docker_url=f"{nobody},{stranger}")
        with pytest.raises(DiscoveryError, match=f"{nobody} .*; .*{stranger} .* another name"):
            engine.seen_from(engine.client, lambda: Connector(settings)())


class TestWhereContainersAreReached:
    @pytest.fixture(name="follower")
    def _follower(self, engine: PlainEngine, certs: Path) -> Iterator[Follower]:
        with following(engine, over_tls(certs)) as follower:
            yield follower

    @pytest.mark.parametrize("address", [OTHER_ADDRESS, ADDRESS_6])
    def test_the_override_address_takes_the_place_of_the_nodes(
        self, engine: PlainEngine, certs: Path, run: Run, follower: Follower, address: str
    ) -> None:
        identity = run("over", "--publish=18065:8080", *routed("over"), *on(address), APP)
        wait_for(lambda: follower.up(1, "over"), SETTLE, "it is up")
        place = (address, 18065)
        assert places(follower, overridden(certs, address), "over") == {place}
        assert identity.startswith(served_by(engine, place))

    def test_a_port_that_is_bound_to_one_address_is_reached_at_that(
        self, engine: PlainEngine, certs: Path, run: Run, follower: Follower
    ) -> None:
        bound = {"four": OTHER_ADDRESS, "six": ADDRESS_6, "loop": "::1"}
        made = {}
        for port, (name, address) in enumerate(bound.items(), 18066):
            host = f"[{address}]" if ":" in address else address
            publish = f"--publish={host}:{port}:8080"
            made[name] = run(name, publish, *routed(name), *on(address), APP)
            wait_for(lambda name=name: follower.up(1, name), SETTLE, f"{name} is up")
        # The override is for ports that are bound to all addresses, as it was in Interlock.
        settings = overridden(certs, "192.0.2.1")
        for port, (name, address) in enumerate(bound.items(), 18066):
            assert places(follower, settings, name) == {(address, port)}
            assert made[name].startswith(served_by(engine, (address, port), near=name == "loop"))

    def test_udp_is_no_port(self, certs: Path, run: Run, follower: Follower) -> None:
        run("udp", "--publish=18069:8080/udp", *routed("udp"), APP)
        run("both", "--publish=18070:8080/udp", "--publish=18071:8080", *routed("both"), APP)
        wait_for(lambda: follower.up(1, "udp") and follower.up(1, "both"), SETTLE, "they are up")
        settings = over_tls(certs)
        assert places(follower, settings, "both") == {("198.18.0.11", 18071)}
        assert places(follower, settings, "udp") == set()
        (rejection,) = desired(follower, settings).rejections
        assert "udp" in rejection.subject

    def test_in_the_hosts_network_it_is_reached_at_its_node(
        self, engine: PlainEngine, certs: Path, run: Run, follower: Follower
    ) -> None:
        run("hosted", "--network=host", "--env=LISTEN=18072", *routed("hosted", 18072), APP)
        wait_for(lambda: follower.up(1, "hosted"), SETTLE, "it is up")
        (place,) = places(follower, over_tls(certs), "hosted")
        assert place == (engine.address, 18072)
        assert served_by(engine, place)

    def test_membership_follows_pause_health_kill_and_a_new_name(
        self, engine: PlainEngine, certs: Path, run: Run, follower: Follower
    ) -> None:
        """What takes a container out of its upstream, and what brings it back."""
        settings = over_tls(certs)
        checked = ("--health-cmd=test ! -e /tmp/bad", "--health-interval=500ms")
        publish = "--publish=18073:8080"
        run("moody", publish, *routed("moody"), *checked, "--health-retries=1", APP)

        def serves() -> bool:
            return places(follower, settings, "moody") == {(engine.address, 18073)}

        def comes_back(after: str) -> None:
            wait_for(serves, SETTLE, f"it serves again after {after}")

        wait_for(serves, SETTLE, "its check has passed")
        for out, back in (
            (("pause", "moody"), ("unpause", "moody")),
            (("exec", "moody", "touch", "/tmp/bad"), ("exec", "moody", "rm", "/tmp/bad")),
            (("kill", "moody"), ("start", "moody")),
        ):
            engine.docker(*out)
            wait_for(lambda: not serves(), SETTLE, f"{' '.join(out)} takes it out")
            engine.docker(*back)
            comes_back(" ".join(back))
        engine.docker("rename", "moody", "merry")
        wait_for(lambda: follower.workload("merry"), SETTLE, "its new name")
        assert serves(), "which changes nothing for its upstream"
        engine.docker("rename", "merry", "moody")

    def test_membership_follows_the_network_that_is_named(
        self, engine: PlainEngine, certs: Path, run: Run, follower: Follower
    ) -> None:
        settings = over_tls(certs)
        engine.docker("network", "create", "named")
        try:
            labels = (*routed("netted"), "--label=interlock.network=named")
            identity = run("netted", "--network=named", *labels, APP)
            (place,) = wait_for(lambda: places(follower, settings, "netted"), SETTLE, "it is up")
            assert identity.startswith(served_by(engine, place, near=True))
            engine.docker("network", "connect", "bridge", "netted")
            engine.docker("network", "disconnect", "named", "netted")
            wait_for(
                lambda: not places(follower, settings, "netted"), SETTLE, "it is off the network"
            )
            engine.docker("network", "connect", "named", "netted")
            (place,) = wait_for(
                lambda: places(follower, settings, "netted"), SETTLE, "it is on it again"
            )
            assert identity.startswith(served_by(engine, place, near=True))
        finally:
            engine.docker("rm", "--force", "netted", check=False)
            engine.docker("network", "rm", "named")


class TestThroughAFilteringProxy:
    """A proxy in front of the engine's socket that lets by what docs/discovery.md asks for."""

    @pytest.fixture(name="proxy")
    def _proxy(self, engine: PlainEngine) -> Iterator[FilteringProxy]:
        with FilteringProxy(engine.socket) as proxy:
            yield proxy

    def test_what_is_promised_is_enough(
        self, engine: PlainEngine, run: Run, proxy: FilteringProxy
    ) -> None:
        with discovery.following(proxy.settings) as follower:
            run("let", "--publish=18075:8080", *routed("let"), APP)
            wait_for(lambda: follower.up(1, "let"), SETTLE, "it was heard of")
            assert follower.source.status.mode == "events"
            assert places(follower, proxy.settings, "let") == {("127.0.0.1", 18075)}
        assert proxy.denied == []

    def test_where_events_are_cut_polling_is_the_way_out(
        self, engine: PlainEngine, run: Run, proxy: FilteringProxy
    ) -> None:
        proxy.allowed -= {"/events"}
        options = proxy.settings.model_copy(update={"poll_interval": 0.3})
        with discovery.following(options) as follower:
            status = follower.source.status
            assert status.mode == "poll"
            assert "refuses GET /events" in status.mode_reason
            run("polled", "--publish=18076:8080", *routed("polled"), APP)
            wait_for(lambda: follower.up(1, "polled"), SETTLE, "it was listed")
            engine.docker("rm", "--force", "polled")
            wait_for(lambda: follower.workload("polled") is None, SETTLE, "it is gone")
            proxy.allowed |= {"/events"}
            wait_for(lambda: follower.source.status.mode == "events", SETTLE, "events are back")


class TestManagerOverTheNetwork:
    @pytest.fixture(name="manager")
    def _manager(self, engine: PlainEngine) -> Iterator[PlainEngine]:
        engine.docker("swarm", "init", f"--advertise-addr={engine.address}")
        yield engine
        engine.docker("swarm", "leave", "--force")

    @pytest.mark.parametrize("sources", [("swarm",), ("auto",)])
    def test_it_is_polled_for_its_watch_is_a_local_socket_and_that_is_said(
        self, manager: PlainEngine, certs: Path, tmp_path: Path, sources: tuple[str, ...]
    ) -> None:
        socket = str(tmp_path / "control.sock")
        settings = over_tls(certs, sources=sources, watch_socket=socket)
        with following(manager, settings) as follower:
            status = follower.source.status
            assert (status.name, status.mode) == ("swarm", "poll")
            assert f"there is no socket {socket}" in status.mode_reason
            manager.docker(
                *("service", "create", "--detach", "--no-resolve-image", "--name=web"),
                *("--publish=mode=host,target=8080,published=18074", APP),
            )
            wait_for(lambda: follower.up(1, "web"), 30, "its task")
            manager.docker("service", "rm", "web")
            wait_for(lambda: follower.workload("web") is None, 30, "it is gone")
            wait_for(lambda: not manager.docker("ps", "--quiet"), 30, "and its container")
