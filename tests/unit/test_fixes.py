"""What was broken in Interlock and works here, each defect by its number in docs/migration.md.

Those that only a running nginx can prove are in tests/dataplane/test_fixes.py; a test here compares
the table with the names of both.
"""

from __future__ import annotations

import copy
import random
import re
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.compile import compile_snapshot
from agent.config.settings import Settings, load
from agent.controller import writer_id
from agent.discovery.containers import container
from agent.discovery.docker_api import DockerEngine
from agent.driver.fleet import Options
from agent.errors import DockerUnavailable
from agent.metrics import Metrics
from agent.model import (
    Attachment,
    Desired,
    ProxyInstance,
    Snapshot,
    SourceSnapshot,
    Workload,
)
from agent.render import Capabilities, render
from tests.certificates import authority, certificate
from tests.unit import test_controller, test_discovery_docker_api, test_discovery_engine, test_fleet
from tests.unit.classic_manager import ClassicManager
from tests.unit.clusters import instance, labels, service, settings, snapshot
from tests.unit.discovery_fakes import Following, following, named, recorded
from tests.unit.openresty_fake import FakeOpenResty, desired, eventually
from tests.unit.test_fixture_engine import ALL, DRAINED, Agent, Proxy, event, running

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(60)


def compiled(*workloads: Workload, **extension: Any) -> Desired:
    return compile_snapshot(snapshot(*workloads), settings(**extension))


def files_of(what: Desired, nginx_version: int = 1_027_004, **extension: Any) -> dict[str, str]:
    return render(what.site, settings(**extension), Capabilities(nginx_version=nginx_version))


def app(name: str, *tasks: str, **more: str) -> Workload:
    wants = labels(hostname=name, domain="test", **more)
    return service(name, wants, *(instance(f"{name}-{task}", task) for task in tasks))


def as_engine_tells(ports: dict[str, Any], **wants: str) -> Workload:
    """A recorded container with other published ports and labels, without networks to share."""
    raw = copy.deepcopy(recorded("engine/web-1"))
    raw["NetworkSettings"]["Ports"] = ports
    raw["Config"]["ExposedPorts"] = {port: {} for port in ports}
    raw["Config"]["Labels"] = labels(hostname="web", domain="test", **wants)
    found = container(raw, source="engine", node="n1", node_address="192.0.2.7")
    assert found is not None
    return found.workload


def peers(workload: Workload, **extension: Any) -> list[str]:
    seen = SourceSnapshot("engine", {workload.key: workload}, proxy_networks=("elsewhere",))
    what = compile_snapshot(Snapshot({"engine": seen}), settings(**extension))
    upstream = what.membership.upstreams.get("web.test/")
    return [f"{peer.address} {peer.port}" for peer in upstream.peers] if upstream else []


# --- configuration -----------------------------------------------------------------------------


def test_fix_no_pid_path_is_no_invalid_file() -> None:
    """FIX-7: without PidPath Interlock wrote a `pid` directive without a value."""
    found, remarks = load('[[Extensions]]\nName = "nginx"\n', where="test")
    assert remarks == ()
    files = render(compiled(app("a", "10.0.0.1")).site, found, Capabilities())
    assert not any(re.search(r"^\s*pid\b", text, re.MULTILINE) for text in files.values())


def test_fix_dh_param_without_a_path_is_a_warning() -> None:
    """FIX-8: DHParam = true without DHParamPath made the whole file invalid."""
    found, remarks = load('[[Extensions]]\nName = "nginx"\nDHParam = true\n', where="test")
    assert any("DHParamPath" in str(remark) for remark in remarks)
    files = render(compiled(app("a", "10.0.0.1")).site, found, Capabilities())
    assert not any("dhparam" in text for text in files.values())


def test_fix_two_extensions_in_one_configuration_work() -> None:
    """FIX-38: with nginx and haproxy both configured, one of them got no configuration."""
    text = '[[Extensions]]\nName = "{}"\nPort = {}\n[[Extensions]]\nName = "{}"\nPort = {}\n'
    for first, second in (("nginx", "haproxy"), ("haproxy", "nginx")):
        found, remarks = load(text.format(first, 8080, second, 9090), where="test")
        assert found.extension.port == 8080
        assert any(second in str(remark) for remark in remarks), "that one of them counts is told"


# --- hosts and their order ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_fix_order_of_hosts_is_sorted(seed: int) -> None:
    """FIX-20: hosts came out in another order at each reload, so that which was first varied."""
    workloads = [app(f"host-{number}", f"10.0.0.{number}") for number in range(30)]
    expected = compiled(*workloads)
    random.Random(seed).shuffle(workloads)
    shuffled = compiled(*workloads)
    assert shuffled == expected
    assert list(files_of(shuffled).items()) == list(files_of(expected).items())
    names = [host.name for host in shuffled.site.hosts]
    assert names == sorted(names)


def test_fix_aliases_have_what_their_host_has() -> None:
    """FIX-27: an alias in HAProxy lost balancing, checks, options, ssl_only and ssl_backend."""
    what = compiled(
        app(
            "shop",
            "10.0.0.1",
            alias_domain="one.test",
            alias_domain__1="two.test",
            ssl_only="true",
            ssl_cert="a.pem",
            ssl_cert_key="a.key",
            context_root="/app",
        )
    )
    (host,) = what.site.hosts
    assert (host.name, host.aliases) == ("shop.test", ("one.test", "two.test"))
    assert list(what.membership.upstreams) == ["shop.test/app"], "the same peers and policy"
    # One file says it all once, for all of its names together.
    text = files_of(what)["shop.test.conf"]
    named_together = re.findall(r"server_name (.*);", text)
    assert named_together
    assert all({"shop.test", "one.test", "two.test"} <= set(re.findall(r"[\w.]+", line))
               for line in named_together)  # fmt: skip


def test_fix_tls_needs_no_directive_that_current_nginx_has_not() -> None:
    """FIX-12: `ssl on`, which nginx 1.25.1 removed, made any host with TLS unloadable."""
    what = compiled(app("a", "10.0.0.1", ssl="true", ssl_cert="a.pem", ssl_cert_key="a.key"))
    for version in (1_022_001, 1_025_001, 1_031_001):
        for text in files_of(what, version).values():
            assert not re.search(r"^\s*ssl\s+on", text, re.MULTILINE)


# --- peers -------------------------------------------------------------------------------------

UDP_FIRST = {
    "53/udp": [{"HostIp": "0.0.0.0", "HostPort": "5353"}],
    "8080/tcp": [{"HostIp": "0.0.0.0", "HostPort": "32769"}],
}


def test_fix_an_unpublished_port_is_no_port_0() -> None:
    """FIX-9: an unpublished first port became port 0, which froze the whole configuration."""
    published = {"80/tcp": None, "8080/tcp": [{"HostIp": "0.0.0.0", "HostPort": "32769"}]}
    assert peers(as_engine_tells(published)) == ["192.0.2.7 32769"]
    assert peers(as_engine_tells({"80/tcp": None})) == []
    assert peers(as_engine_tells({"80/tcp": None}), backend_override_address="192.0.2.9") == []


def test_fix_an_ipv6_binding_listed_first_is_an_address() -> None:
    """FIX-9: a port published on IPv6 first became `:::32768`, which nginx refuses."""
    both = {"80/tcp": [{"HostIp": "::", "HostPort": "2"}, {"HostIp": "0.0.0.0", "HostPort": "1"}]}
    assert peers(as_engine_tells(both)) == ["192.0.2.7 1"]
    alone = {"80/tcp": [{"HostIp": "2001:db8::5", "HostPort": "32768"}]}
    assert peers(as_engine_tells(alone)) == ["2001:db8::5 32768"]


def test_fix_udp_ports_are_no_peers() -> None:
    """FIX-17: the first port in the list was taken, though it was UDP."""
    assert peers(as_engine_tells(UDP_FIRST)) == ["192.0.2.7 32769"]
    assert peers(as_engine_tells({"53/udp": UDP_FIRST["53/udp"]})) == []


def test_fix_a_port_that_is_not_there_is_told_and_not_replaced() -> None:
    """FIX-17: where interlock.port matched nothing, another port was taken without a word."""
    workload = as_engine_tells(UDP_FIRST, port="9999")
    assert peers(workload) == []
    seen = SourceSnapshot("engine", {workload.key: workload}, proxy_networks=("elsewhere",))
    (told,) = compile_snapshot(Snapshot({"engine": seen}), settings()).rejections
    assert (told.reason, "9999" in told.message, "8080" in told.message) == (
        "not_published",
        True,
        True,
    )


def test_fix_the_override_address_counts_with_a_port_label() -> None:
    """FIX-18: BackendOverrideAddress was lost as soon as interlock.port matched."""
    workload = as_engine_tells(UDP_FIRST, port="8080")
    assert peers(workload, backend_override_address="192.0.2.9") == ["192.0.2.9 32769"]


def test_fix_on_an_overlay_the_private_port_counts() -> None:
    """FIX-19: the port published on the node was taken for the container's on the overlay."""
    raw = copy.deepcopy(recorded("engine/web-1"))
    raw["Config"]["Labels"] = labels(hostname="web", domain="test", network="n1")
    found = container(raw, source="engine", node="n1", node_address="192.0.2.7")
    assert found is not None
    workload = found.workload
    assert {port.published for port in workload.instances[0].published} - {8080, 9000}
    seen = SourceSnapshot("engine", {workload.key: workload}, proxy_networks=("n1",))
    what = compile_snapshot(Snapshot({"engine": seen}), settings())
    (peer,) = what.membership.upstreams["web.test/"].peers
    assert (peer.address, peer.port) == ("198.18.131.2", 8080)


# --- watching ----------------------------------------------------------------------------------


@pytest.fixture(name="manager")
def _manager() -> Iterator[ClassicManager]:
    manager = ClassicManager()
    yield manager
    manager.stop()


def test_fix_a_reconnect_is_one_subscription_and_events_count_after_it(
    manager: ClassicManager,
) -> None:
    """FIX-13: after the stream had ended it subscribed in a hot loop and never reloaded again."""
    proxy = Proxy()
    with running(Agent(manager, proxy)) as agent:
        agent.until(ALL)
        agent.until_in_touch()
        manager.stop()
        manager.start()
        agent.until_in_touch(streams=2)
        asked = len(manager.requests)
        manager.say(event("kill", signal="15"))
        agent.until(DRAINED)
        assert len(manager.streams) == 2
        assert len(manager.requests) - asked <= 2, "it does not ask in a loop"


def test_fix_starvation_has_a_maximum_wait() -> None:
    """FIX-14: one event a second put every reload off for as long as the events lasted."""
    nginx = FakeOpenResty()
    options = Options(heartbeat=10.0, site_quiet=0.3, site_max_wait=0.6)
    with test_fleet.running(nginx, options=options) as rig:
        hosts: dict[str, tuple[str, ...]] = {"first.test": ("10.0.0.1",)}
        rig.fleet.apply(desired(hosts), None)
        eventually(lambda: nginx.reloads == 1)
        deadline = time.monotonic() + 10
        while nginx.reloads == 1 and time.monotonic() < deadline:
            # Never quiet: another host each 50 ms.
            hosts[f"h{len(hosts)}.test"] = ("10.0.0.1",)
            rig.fleet.apply(desired(hosts), time.monotonic())
            time.sleep(0.05)
        assert nginx.reloads > 1, "the site went out while hosts kept coming"
        assert "h1.test/" in nginx.membership.upstreams, "and peers had waited for nothing"


def test_fix_a_late_proxy_gets_everything() -> None:
    """FIX-15: a proxy that started after Interlock got no configuration until another event."""
    source = test_controller.FakeSource("swarm")
    rig = test_controller.Rig(source)
    late = rig.servers["late"] = FakeOpenResty("late")
    proxy = ProxyInstance(id="late", name="late", attachments=(Attachment("n", "10.9.9.9"),))
    with test_controller.running(rig):
        web = test_controller.workload("swarm", "a.test", "10.0.0.1")
        source.publish(web)
        eventually(lambda: "a.test/" in rig.nginx.membership.upstreams)
        source.publish(web, proxies=(proxy,))
        eventually(lambda: "a.test/" in late.membership.upstreams and late.generation)


class TestContainersThatEnd:
    @pytest.fixture(name="rig")
    def _rig(self) -> test_discovery_engine.Rig:
        return test_discovery_engine.Rig()

    @pytest.fixture(name="follower")
    def _follower(self, rig: test_discovery_engine.Rig) -> Iterator[Following]:
        with following(rig.source) as follower:
            follower.until(lambda: follower.states("web-1") == ["up"])
            yield follower

    @pytest.mark.parametrize("before", [[], ["oom"]])
    def test_fix_a_container_that_dies_is_taken_out(
        self, rig: test_discovery_engine.Rig, follower: Following, before: list[str]
    ) -> None:
        """FIX-16: `die` and `oom` were not listened to: a crashed container stayed a peer."""
        for action in (*before, "die"):
            rig.say("web-1", action)
        follower.until(lambda: named(follower.last, "web-1") is None)

    def test_fix_health_counts(self, rig: test_discovery_engine.Rig, follower: Following) -> None:
        """FIX-16: `health_status` was not listened to."""
        rig.raw("web-1")["State"]["Health"] = {"Status": "unhealthy"}
        rig.say("web-1", "health_status: unhealthy")
        follower.until(lambda: follower.states("web-1") == ["waiting"])
        rig.raw("web-1")["State"]["Health"] = {"Status": "healthy"}
        rig.say("web-1", "health_status: healthy")
        follower.until(lambda: follower.states("web-1") == ["up"])


def test_fix_the_engine_is_verified_though_the_environment_does_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIX-34: the server was verified only if the environment had DOCKER_TLS_VERIFY."""
    for name in ("DOCKER_HOST", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ca", "other"):
        authority(tmp_path, name)
    certificate(tmp_path, "server", ca="ca", names="IP:127.0.0.1")
    with tls_engine(tmp_path) as url:
        believed = Settings(docker_url=url, tls_ca_cert=f"{tmp_path}/ca.pem", request_timeout=5.0)
        assert DockerEngine(believed).version == "29.0.1"
        other = Settings(docker_url=url, tls_ca_cert=f"{tmp_path}/other.pem", request_timeout=5.0)
        with pytest.raises(DockerUnavailable, match="certificate is not of TLSCACert"):
            DockerEngine(other)


class tls_engine:  # noqa: N801 - used as a verb: with tls_engine(files) as url
    """An engine over TLS that answers /version."""

    def __init__(self, files: Path) -> None:
        class Handler(BaseHTTPRequestHandler):
            do_GET = test_discovery_docker_api.say(test_discovery_docker_api.VERSION)  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                return

        self._server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files / "server.pem", files / "server.key")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return f"tcp://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_fix_the_api_version_is_negotiated(tmp_path: Path) -> None:
    """FIX-37: pinned to API 1.26, Interlock cannot talk to Engine 29, which takes 1.44 and up."""
    dockerd = test_discovery_docker_api.Dockerd(tmp_path / "docker.sock")
    try:
        dockerd.answers["/info"] = test_discovery_docker_api.say({})
        for lowest, highest, spoken in (("1.44", "1.52", "1.52"), ("1.12", "1.26", "1.26")):
            dockerd.version = {"ApiVersion": highest, "MinAPIVersion": lowest}
            DockerEngine(dockerd.settings).get("/info")
            assert dockerd.requests[-1] == f"GET /v{spoken}/info"
    finally:
        dockerd.stop()


# --- pushing -----------------------------------------------------------------------------------


def test_fix_what_is_the_same_is_not_reloaded() -> None:
    """FIX-21: an identical configuration was written and reloaded at every event."""
    nginx = FakeOpenResty()
    with test_fleet.running(nginx) as rig:
        first = desired({"a.test": ("10.0.0.1",)})
        rig.fleet.apply(first, None)
        eventually(lambda: nginx.reloads == 1 and rig.in_sync())
        calls = nginx.pushes()
        for _ in range(20):
            rig.fleet.apply(desired({"a.test": ("10.0.0.1",)}, keep=first), time.monotonic())
        more = desired({"a.test": ("10.0.0.1", "10.0.0.2")}, keep=first)
        rig.fleet.apply(more, time.monotonic())
        eventually(lambda: len(nginx.membership.upstreams["a.test/"].peers) == 2)
        assert nginx.pushes() == [*calls, "patch"]
        assert nginx.reloads == 1


def test_fix_the_duration_of_the_last_reload_is_measured() -> None:
    """FIX-35: interlock_system_last_reload_duration was always 0."""
    metrics = Metrics()
    name = "interlock_system_last_reload_duration"
    assert f"\n{name} 0.0\n" in metrics.exposition().decode()
    nginx = FakeOpenResty()
    with test_fleet.running(nginx) as rig:
        rig.sink.reload = metrics.reload  # type: ignore[method-assign]
        rig.fleet.apply(desired({"a.test": ("10.0.0.1",)}), None)
        eventually(lambda: nginx.reloads == 1 and rig.in_sync())
    (value,) = re.findall(rf"^{name} (.*)$", metrics.exposition().decode(), re.MULTILINE)
    assert 0 < float(value) < 60e9, "nanoseconds"


def test_fix_who_writes_is_told_by_a_lease_and_not_by_cgroups() -> None:
    """FIX-36: with two Interlocks whose own id was not found in /proc nobody reloaded anything."""
    assert writer_id() != writer_id(), "no two agents have one name, wherever they run"
    nginx = FakeOpenResty()
    nginx.lease_ttl = 0.5
    with test_fleet.running(nginx, writer="one") as one:
        one.fleet.apply(desired({"a.test": ("10.0.0.1",)}), None)
        eventually(lambda: "a.test/" in nginx.membership.upstreams)
        with test_fleet.running(nginx, writer="two") as two:
            two.fleet.apply(desired({"a.test": ("10.0.0.2",)}), None)
            eventually(lambda: two.state().value == "standby")
            assert nginx.membership.upstreams["a.test/"].peers[0].address == "10.0.0.1"
            one.fleet.stop(5)
            eventually(lambda: nginx.membership.upstreams["a.test/"].peers[0].address == "10.0.0.2")


def test_fix_nothing_on_the_machine_is_touched() -> None:
    """FIX-31: new connections were dropped with iptables around a restart, and stayed dropped."""
    for path in (ROOT / "agent").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) subprocess|os\.system|os\.popen", text, re.M), path
        assert "iptables" not in text, path
    assert "privileged" not in (ROOT / "stack.yml").read_text()


# --- the table ---------------------------------------------------------------------------------


def test_every_fix_of_the_table_has_its_test_and_every_test_its_row() -> None:
    """docs/migration.md is the list; a test names its number first in its docstring."""
    table = (ROOT / "docs" / "migration.md").read_text()
    rows = dict(re.findall(r"^\| FIX-(\d+) \|.*?\| `(test_fix_\w+)", table, re.MULTILINE))
    tests: dict[str, set[str]] = {}
    for file in ("tests/unit/test_fixes.py", "tests/dataplane/test_fixes.py"):
        found = re.findall(
            r"def (test_fix_\w+)\([^)]*\) -> None:\n\s+\"\"\"FIX-(\d+):",
            (ROOT / file).read_text(),
        )
        for name, number in found:
            tests.setdefault(number, set()).add(name)
    assert [int(number) for number in rows] == list(range(1, len(rows) + 1))
    assert set(rows) == set(tests)
    assert {number: name for number, name in rows.items() if name not in tests[number]} == {}
