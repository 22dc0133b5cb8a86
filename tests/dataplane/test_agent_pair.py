"""The real agent with a static file against the real OpenResty side on loopback.

What is checked is what a user of the pair sees: requests served, workers left alone, an agent or
an nginx that dies and comes back. Each test has a pair of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import authority, certificate
from tests.conftest import require
from tests.dataplane.harness import (
    ROOT,
    Answer,
    Backend,
    Load,
    Proxy,
    backends,
    free_port,
    nginx_has_stream_lua,
    nginx_is_installed,
    request,
    wait_until,
)
from tests.dataplane.tls import Front
from tests.dataplane.tls import server as tls_server

pytestmark = pytest.mark.dataplane

TOKEN = "a-long-token"
NO_SERVICE = "service = []\n"


class Agent:
    """`tidegate run` as a process of its own, and the file that it reads."""

    def __init__(self, directory: Path, proxy: Proxy, *, name: str = "agent") -> None:
        self.directory = directory
        self.proxy = proxy
        self.services = directory / "services.toml"
        self.config = directory / f"{name}.toml"
        self.log = directory / f"{name}.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.configure()

    def configure(self, *, top: str = "", extension: str = "") -> None:
        self.config.write_text(
            textwrap.dedent(
                f"""\
                ListenAddr = "127.0.0.1:{self.port}"
                Sources = ["static"]
                StaticFile = "{self.services}"
                SiteQuiet = "50ms"
                {top}
                [[Extensions]]
                Name = "nginx"
                Port = {self.proxy.http_port}
                SSLPort = {self.proxy.tls_port}
                SSLCertPath = "{self.directory}/certs"
                {extension}
                [OpenResty]
                URLs = ["http://127.0.0.1:{self.proxy.admin_port}"]
                Token = "{TOKEN}"
                Heartbeat = "300ms"
                """
            )
        )

    def write(self, *services: str) -> None:
        staged = self.services.with_suffix(".new")
        staged.write_text("\n".join(services))
        staged.replace(self.services)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agent.cli", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent.cli", "run", "-c", str(self.config)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(20)
        self.process = None
        return code

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> dict[str, Any]:
        try:
            answer = request(self.port, "/api/state", host="agent")
        except OSError:
            return {"ready": False, "instances": [], "rejections": [], "upstreams": []}
        found: dict[str, Any] = answer.json()
        return found

    def metric(self, start: str) -> float:
        """Sum of all series that start like that."""
        text = request(self.port, "/metrics", host="agent").text
        lines = [line for line in text.splitlines() if line.startswith(start)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_in_sync(self) -> None:
        def look() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.output
            instances = self.state()["instances"]
            return bool(instances) and all(item["in_sync"] for item in instances)

        wait_until(look, timeout=20, what="in sync")


def service(
    host: str, *backs: Backend, labels: Mapping[str, str] | None = None, **peer: Any
) -> str:
    """A service of the static file; `draining=[…]` names the backends that drain."""
    draining = peer.get("draining", ())
    name, _, domain = host.partition(".")
    lines = ["[[service]]", f'name = "{name}"', "[service.labels]"]
    everything = {"interlock.hostname": name, "interlock.domain": domain, **(labels or {})}
    lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in everything.items()]
    for back in backs:
        lines += [
            "[[service.peer]]",
            f'id = "{back.name}"',
            f'address = "{back.address}"',
            f"port = {back.port}",
        ]
        if back in draining:
            lines.append('state = "draining"')
    return "\n".join(lines) + "\n"


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    require(nginx_is_installed(), "nginx with its Lua module, or OpenResty")
    made = Proxy(tmp_path / "nginx", token=TOKEN, env={"TIDEGATE_LEASE_TTL": "2"})
    made.tls_port = free_port()  # type: ignore[attr-defined]
    with made:
        yield made


@pytest.fixture
def start(tmp_path: Path, proxy: Proxy) -> Iterator[Callable[..., Agent]]:
    """Makes an agent, not yet started; all are ended with the test."""
    made: list[Agent] = []

    def make(name: str = "agent") -> Agent:
        made.append(Agent(tmp_path, proxy, name=name))
        return made[-1]

    yield make
    for agent in made:
        agent.end()


def settled(proxy: Proxy) -> set[int]:
    """The workers, once those of the configuration before have ended."""
    wait_until(lambda: len(proxy.workers()) == 2, what="old workers gone")
    return proxy.workers()


def serving(proxy: Proxy, host: str) -> set[str]:
    """Names of the backends that answer for `host`, of twelve requests."""
    answers = [request(proxy.http_port, host=host) for _ in range(12)]
    return {item.text if item.status == 200 else str(item.status) for item in answers}


def test_peers_come_drain_and_go_without_a_reload_and_without_a_failed_request(proxy, start):
    agent = start()
    with backends(3) as (one, two, three):
        agent.write(service("app.test", one))
        agent.start()
        agent.wait_in_sync()
        workers, status = settled(proxy), proxy.admin.status()
        with Load(proxy.http_port, host="app.test", connections=4, pause=0.002) as load:
            for _ in range(4):
                agent.write(service("app.test", one, two, three))
                wait_until(lambda: serving(proxy, "app.test") == {"b0", "b1", "b2"}, what="added")
                agent.write(service("app.test", one, two, three, draining=[one]))
                wait_until(lambda: serving(proxy, "app.test") == {"b1", "b2"}, what="drained")
                agent.write(service("app.test", two, three))
                wait_until(lambda: len(proxy.admin.live("app.test/")) == 2, what="peer is removed")
                agent.write(service("app.test", one, two))
                wait_until(lambda: serving(proxy, "app.test") == {"b0", "b1"}, what="back again")
        assert load.failed == {}
        assert load.total > 100
        assert proxy.workers() == workers
        after = proxy.admin.status()
        assert after["generation"] == status["generation"]
        assert after["revision"] > status["revision"]
        assert agent.metric("tidegate_reloads_total") == 1
        assert agent.metric("tidegate_change_to_applied_seconds_count") >= 16


def test_a_new_host_costs_one_reload_and_no_failed_request(proxy, start):
    agent = start()
    with backends(2) as (one, two):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        before = proxy.admin.status()["generation"]
        # A reload closes idle client connections, so each request has a connection of its own.
        with Load(proxy.http_port, host="a.test", keep_alive=False, connections=2) as load:
            agent.write(service("a.test", one), service("b.test", two))
            wait_until(lambda: serving(proxy, "b.test") == {"b1"}, what="the new host")
            agent.wait_in_sync()
        assert load.failed == {}
        assert proxy.admin.status()["generation"] != before
        assert agent.metric("tidegate_reloads_total") == 2


def test_the_last_peer_that_leaves_is_a_503_and_no_reload(proxy, start):
    agent = start()
    with backends(1) as (one,):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        workers = settled(proxy)
        agent.write(service("a.test"))
        wait_until(lambda: serving(proxy, "a.test") == {"503"}, what="503")
        agent.write(NO_SERVICE)
        wait_until(lambda: agent.metric("tidegate_events_total") == 3, what="read again")
        assert [item["host"] for item in agent.state()["routes"]] == ["a.test"]
        agent.write(service("a.test", one))
        wait_until(lambda: serving(proxy, "a.test") == {"b0"}, what="served again")
        assert proxy.workers() == workers


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_agent_that_ends_and_comes_back_changes_nothing(proxy, start, how):
    agent = start()
    with backends(2) as (one, two):
        agent.write(service("a.test", one, two))
        agent.start()
        agent.wait_in_sync()
        workers, before = settled(proxy), proxy.admin.status()
        with Load(proxy.http_port, host="a.test", pause=0.002) as load:
            agent.stop(how)
            assert serving(proxy, "a.test") == {"b0", "b1"}
            agent.start()
            agent.wait_in_sync()
        assert load.failed == {}
        assert proxy.workers() == workers
        after = proxy.admin.status()
        assert (after["revision"], after["generation"]) == (
            before["revision"],
            before["generation"],
        )
        assert agent.metric("tidegate_pushes_total") == 0


def test_an_agent_that_comes_back_catches_up_with_what_it_missed(proxy, start):
    agent = start()
    with backends(2) as (one, two):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        workers = settled(proxy)
        agent.stop()
        agent.write(service("a.test", two))
        agent.start()
        agent.wait_in_sync()
        assert serving(proxy, "a.test") == {"b1"}
        assert proxy.workers() == workers


def test_nginx_that_restarts_without_an_agent_serves_at_once_and_is_taken_up_again(proxy, start):
    agent = start()
    with backends(2) as (one, two):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        wait_until(
            lambda: proxy.admin.status()["persisted_revision"] == proxy.admin.status()["revision"],
            what="on disk",
        )
        agent.stop()
        proxy.stop()
        proxy.start()
        assert serving(proxy, "a.test") == {"b0"}
        agent.write(service("a.test", two))
        agent.start()
        agent.wait_in_sync()
        assert serving(proxy, "a.test") == {"b1"}
        assert agent.metric("tidegate_reloads_total") == 0


def test_nginx_that_lost_everything_gets_it_again_by_itself(proxy, start):
    agent = start()
    with backends(1) as (one,):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        proxy.stop()
        shutil.rmtree(proxy.state_dir)
        proxy.start()
        wait_until(lambda: serving(proxy, "a.test") == {"b0"}, timeout=20, what="served again")


def test_a_certificate_that_is_missing_concerns_its_host_alone_until_it_comes(
    proxy, start, tmp_path
):
    agent = start()
    certs = agent.directory / "certs"
    labels = {
        "interlock.ssl": "true",
        "interlock.ssl_cert": "b.pem",
        "interlock.ssl_cert_key": "b.key",
    }
    with backends(2) as (one, two):
        agent.write(service("a.test", one), service("b.test", two, labels=labels))
        agent.start()
        agent.wait_in_sync()
        assert serving(proxy, "a.test") == {"b0"}
        assert serving(proxy, "b.test") == {"b1"}
        (told,) = wait_until(lambda: agent.state()["rejections"], what="told")
        assert (told["subject"], told["reason"]) == ("host b.test", "certificate_missing")
        assert f"{certs}/b.pem" in told["message"]
        assert agent.metric('tidegate_rejections{reason="certificate_missing"}') == 1
        assert request(agent.port, "/readyz", host="agent").status == 200
        explained = agent.command("explain", "b.test", "-c", str(agent.config))
        assert explained.returncode == 1
        assert "certificate_missing" in explained.stdout

        workers = settled(proxy)
        certs.mkdir(exist_ok=True)
        authority(certs, "ca")
        certificate(certs, "b", ca="ca", names="DNS:b.test", days=-1)
        wait_until(
            lambda: (
                [item["reason"] for item in agent.state()["rejections"]] == ["certificate_expired"]
            ),
            what="it came, and is too old",
        )
        explained = agent.command("explain", "b.test", "-c", str(agent.config))
        assert explained.returncode == 0
        assert "certificate_expired" in explained.stdout
        checked = agent.command("check", "-c", str(agent.config))
        assert "warning  host b.test: OpenResty" in checked.stdout
        certificate(certs, "b", ca="ca", names="DNS:b.test")
        wait_until(lambda: agent.state()["rejections"] == [], what="cured")
        assert proxy.workers() == workers


def test_a_host_that_nginx_refuses_is_put_apart_and_the_others_serve(proxy, start):
    agent = start()
    templates = agent.directory / "templates"
    templates.mkdir()
    (templates / "host.conf.j2").write_text(
        '{% include "builtin/host.conf.j2" %}'
        '{% if host.name == "b.test" and "x.b.test" in host.aliases %}evil;{% endif %}\n'
    )
    agent.configure(extension=f'TemplatePath = "{templates}"')
    with backends(2) as (one, two):
        good = service("a.test", one)
        bad = service("b.test", two, labels={"interlock.alias_domain": "x.b.test"})
        agent.write(good, bad)
        agent.start()
        agent.wait_in_sync()
        assert serving(proxy, "a.test") == {"b0"}
        assert serving(proxy, "b.test") == {"503"}
        (rejection,) = agent.state()["rejections"]
        assert rejection["subject"] == "host b.test"
        assert rejection["reason"] == "host_quarantined"
        assert "evil" in rejection["message"]
        assert request(agent.port, "/readyz", host="agent").status == 200
        assert agent.metric('tidegate_rejections{reason="host_quarantined"}') == 1

        explained = agent.command("explain", "b.test", "-c", str(agent.config))
        assert explained.returncode == 1
        assert "refused by OpenResty" in explained.stdout
        assert "evil" in explained.stdout
        assert agent.command("explain", "a.test", "-c", str(agent.config)).returncode == 0
        checked = agent.command("check", "-c", str(agent.config))
        assert "warning  host b.test: nginx of" in checked.stdout
        planned = agent.command("plan", "-c", str(agent.config)).stdout
        assert "rejected: host b.test: nginx of" in planned
        assert "nothing to do" in planned

        agent.write(good, service("b.test", two))
        wait_until(lambda: serving(proxy, "b.test") == {"b1"}, what="mended")
        wait_until(lambda: agent.state()["rejections"] == [], what="no rejection")


def test_two_agents_one_writes_the_other_stands_by_and_takes_over(proxy, start):
    first, second = start("first"), start("second")
    with backends(2) as (one, two):
        first.write(service("a.test", one))
        first.start()
        first.wait_in_sync()
        second.start()
        wait_until(
            lambda: [item["state"] for item in second.state()["instances"]] == ["standby"],
            what="standby",
        )
        assert second.state()["ready"]
        workers = settled(proxy)
        first.stop(signal.SIGKILL)
        second.write(service("a.test", two))
        wait_until(lambda: serving(proxy, "a.test") == {"b1"}, timeout=20, what="taken over")
        assert proxy.workers() == workers


def test_a_clean_end_hands_over_before_the_lease_would_lapse(proxy, start):
    agent = start()
    agent.write(NO_SERVICE)
    agent.start()
    agent.wait_in_sync()
    assert proxy.admin.status()["writer"]
    assert agent.stop() == 0
    assert not proxy.admin.status()["writer"]
    assert "ended after" in agent.output
    assert "Traceback" not in agent.output


def test_sighup_takes_new_settings_and_refuses_bad_ones(proxy, start):
    agent = start()
    with backends(1) as (one,):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        assert agent.process is not None
        before = proxy.admin.status()["generation"]

        agent.config.write_text("SiteQuiet = 'never'\n")
        agent.process.send_signal(signal.SIGHUP)
        refused = 'tidegate_settings_reloads_total{result="refused"}'
        wait_until(lambda: agent.metric(refused) == 1, what="refused")
        assert "SiteQuiet" in agent.output
        assert serving(proxy, "a.test") == {"b0"}

        agent.configure(extension='ClientMaxBodySize = "1m"')
        agent.process.send_signal(signal.SIGHUP)
        accepted = 'tidegate_settings_reloads_total{result="ok"}'
        wait_until(lambda: agent.metric(accepted) == 1, what="accepted")
        wait_until(lambda: proxy.admin.status()["generation"] != before, what="rendered anew")
        agent.wait_in_sync()
        big = request(proxy.http_port, host="a.test", method="POST", body=b"x" * 2_000_000)
        assert big.status == 413


def test_connections_and_workers_of_the_settings_are_one_reload_and_go_with_them(proxy, start):
    agent = start()
    with backends(1) as (one,):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        generation = proxy.admin.status()["generation"]
        with Load(proxy.http_port, connections=2, keep_alive=False) as load:
            agent.configure(extension="MaxConn = 512\nWorkerProcesses = 3")
            wait_until(lambda: proxy.admin.status()["workers"] == 3, what="workers as it says")
            files = proxy.admin.call("GET", "/v1/site").json()["files"]
            assert files["00-default.events"] == "worker_connections 512;\n"
            wait_until(lambda: agent.metric("tidegate_reloads_total") == 2, what="one reload")

            agent.configure()
            wait_until(
                lambda: proxy.admin.status()["generation"] == generation, what="as it was before"
            )
            assert settled(proxy)
            assert proxy.admin.status()["workers"] == 2
        assert load.failed == {}


def test_plan_says_what_would_be_done_and_does_nothing(proxy, start):
    agent = start()
    with backends(2) as (one, two):
        agent.write(service("a.test", one))
        planned = agent.command("plan", "-c", str(agent.config))
        assert planned.returncode == 0, planned.stderr
        assert "a.test/ added" in planned.stdout
        assert "a reload is needed" in planned.stdout
        untouched = proxy.admin.status()
        assert (untouched["revision"], untouched["writer"]) == (0, "")

        agent.start()
        agent.wait_in_sync()
        assert "nothing to do" in agent.command("plan", "-c", str(agent.config)).stdout

        agent.write(service("a.test", one), service("gone.test", two))
        wait_until(lambda: serving(proxy, "gone.test") == {"b1"}, what="the new host")
        agent.write(service("a.test", one))
        wait_until(lambda: serving(proxy, "gone.test") == {"503"}, what="it lingers")
        lingers = agent.command("plan", "-c", str(agent.config)).stdout
        assert "gone.test/ lingers" in lingers
        assert "nothing to do" in lingers
        agent.write(service("a.test", one), service("gone.test", two))
        wait_until(lambda: serving(proxy, "gone.test") == {"b1"}, what="it is back")
        agent.stop()
        agent.write(service("a.test", one))
        unasked = agent.command("plan", "-c", str(agent.config)).stdout
        assert "note: the running agent could not be asked" in unasked
        assert "gone.test/ removed" in unasked
        assert "a reload is needed" in unasked
        agent.write(service("a.test", one), service("gone.test", two))
        assert "nothing to do" in agent.command("plan", "-c", str(agent.config)).stdout
        agent.write(service("a.test", two), service("gone.test", two))
        found = json.loads(agent.command("plan", "-c", str(agent.config), "--json").stdout)
        (instance,) = found["instances"]
        assert instance["reload"] is False
        ((change),) = instance["upstreams"]
        assert [line[0] for line in change["lines"]] == ["-", "+"]


def test_status_check_and_explain_answer_for_the_running_pair(proxy, start):
    agent = start()
    with backends(1) as (one,):
        agent.write(service("a.test", one))
        agent.start()
        agent.wait_in_sync()
        status = agent.command("status", "-c", str(agent.config))
        assert status.returncode == 0
        assert "in_sync" in status.stdout
        assert "a.test/" in status.stdout
        checked = agent.command("check", "-c", str(agent.config))
        assert checked.returncode == 0, checked.stdout
        assert "failed" not in checked.stdout
        explained = agent.command("explain", "a.test", "-c", str(agent.config))
        assert explained.returncode == 0
        missing = agent.command("explain", "nobody.test", "-c", str(agent.config))
        assert missing.returncode == 1
        agent.stop()
        assert agent.command("status", "-c", str(agent.config)).returncode == 3


def test_check_names_a_wrong_token_and_its_cure(proxy, start):
    agent = start()
    agent.write(NO_SERVICE)
    agent.config.write_text(agent.config.read_text().replace(TOKEN, "wrong"))
    checked = agent.command("check", "-c", str(agent.config))
    assert checked.returncode == 1
    assert "the token was refused" in checked.stdout
    assert "TIDEGATE_ADMIN_TOKEN_FILE" in checked.stdout


def test_an_agent_with_a_hundred_services_stays_small_and_idle(proxy, start):
    agent = start()
    with backends(1) as (one,):
        agent.write(*(service(f"s{number}.test", one) for number in range(100)))
        agent.start()
        agent.wait_in_sync()
        assert agent.process is not None
        pid = agent.process.pid
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGESIZE"
        )
        print(f"resident: {resident / 1e6:.0f} MB")
        assert resident < 120e6


def test_a_label_s_tcp_port_is_served_where_the_build_can_and_told_of_where_it_cannot(
    proxy, start, backend
):
    agent, port = start(), free_port()
    agent.write(
        service("app.test", backend),
        service("tcp.test", backend, labels={"interlock.tcp_port": str(port)}),
    )
    agent.start()
    agent.wait_in_sync()
    assert serving(proxy, "app.test") == {"b0"}
    reasons = {item["subject"]: item["reason"] for item in agent.state()["rejections"]}
    if nginx_has_stream_lua():
        assert reasons == {}
        assert request(port, host="whatever").text == "b0"
        with backends(1) as (other,):
            agent.write(
                service("app.test", backend),
                service("tcp.test", other, labels={"interlock.tcp_port": str(port)}),
            )
            wait_until(lambda: request(port).status == 200 and other.requests, what="moved")
    else:
        assert reasons == {f"TCP port {port}": "stream_unavailable"}
        told = agent.command("explain", "tcp", "-c", str(agent.config))
        assert "stream_unavailable" in told.stdout, told.stdout


def test_labels_put_certificates_on_both_legs_and_each_side_shows_its_own(proxy, start, tmp_path):
    """A client that has to show one, and a peer that wants to see one of ours."""
    agent = start()
    certs = agent.directory / "certs"
    certs.mkdir()
    for ca in ("ca", "clients", "backends"):
        authority(certs, ca)
    certificate(certs, "vault", ca="ca", names="DNS:vault.test")
    certificate(certs, "alice", ca="clients", names="DNS:alice")
    certificate(certs, "mallory", ca="ca", names="DNS:mallory")
    certificate(certs, "inside", ca="backends", names="DNS:inside.internal")
    certificate(certs, "proxy", ca="backends", names="DNS:proxy")
    labels = {
        "interlock.ssl_cert": "vault.pem",
        "interlock.ssl_cert_key": "vault.key",
        "interlock.ssl_verify_client": "required",
        "interlock.ssl_client_ca": "clients.pem",
        "interlock.ssl_backend": "true",
        "interlock.ssl_backend_tls_verify": "required",
        "interlock.ssl_backend_ca": "backends.pem",
        "interlock.ssl_backend_name": "inside.internal",
    }
    shown = {
        "interlock.ssl_backend_cert": "proxy.pem",
        "interlock.ssl_backend_cert_key": "proxy.key",
    }
    wanted = tls_server({"inside.internal": certs / "inside.pem"}, clients=certs / "backends.pem")
    front = Front(proxy)
    front.tls_port = proxy.tls_port

    def get(show: str = "") -> Answer:
        return front.get("vault.test", show=certs / f"{show}.pem" if show else None).answer

    with Backend("b0", tls=wanted) as inside:
        agent.write(service("vault.test", inside, labels=labels))
        agent.start()
        agent.wait_in_sync()
        assert get("alice").status == 502, "the peer answers nobody who shows none"
        agent.write(service("vault.test", inside, labels=labels | shown))
        wait_until(lambda: get("alice").text == "b0", what="ours is shown")
        told = inside.requests[-1].headers
        assert told["x-ssl-client-verify"] == "SUCCESS"
        assert told["x-ssl-client-subject-dn"] == "CN=alice"
        assert inside.requests[-1].tls.asked == "inside.internal"
        for stranger in ("", "mallory"):
            assert get(stranger).status == 400
        # Plain HTTP is no way round it.
        plain = request(proxy.http_port, "/path", host="vault.test")
        assert (plain.status, plain.headers["location"]) == (
            308,
            f"https://vault.test:{proxy.tls_port}/path",
        )
        assert agent.state()["rejections"] == []
