"""What was broken in Interlock and works here, as a running nginx shows it: see docs/migration.md.

Labels go in, requests come out: services of a static file are compiled, rendered and pushed by the
agent's own parts to a real nginx. Wherever Interlock's file became invalid as a whole there is a
bystander, whose requests must be answered whatever the others ask for.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from agent.compile import compile_snapshot
from agent.config.settings import Extension, OpenResty, Settings
from agent.controller import SiteRenderer
from agent.driver.fleet import Fleet, Options
from agent.driver.openresty import Instance as Client
from agent.driver.openresty import connector
from agent.driver.targets import targets
from agent.errors import SiteRefused
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    PublishedPort,
    Rejection,
    Snapshot,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)
from tests.certificates import authority, certificate
from tests.conftest import require
from tests.dataplane.harness import (
    Answer,
    Backend,
    Proxy,
    free_port,
    nginx_is_installed,
    request,
    wait_until,
)
from tests.unit.openresty_fake import CountingSink

TOKEN = "a-long-token"
CERTIFICATE = {"ssl_cert": "test.pem", "ssl_cert_key": "test.key"}


def wants(backend: Backend, host: str, **labels: str) -> Workload:
    """A service of the static file; `alias_domain__1` stands for `interlock.alias_domain.1`."""
    name, _, domain = host.partition(".")
    asked = {"hostname": name, "domain": domain} | labels
    return Workload(
        key=WorkloadKey("static", f"{host}{labels.get('context_root', '')}"),
        kind=WorkloadKind.STATIC,
        name=host,
        created=float(len(labels)),
        labels=MappingProxyType(
            {f"interlock.{key.replace('__', '.')}": value for key, value in asked.items()}
        ),
        networks=("static",),
        instances=(
            Instance(
                id=backend.name,
                name=backend.name,
                state=InstanceState.UP,
                attachments=(Attachment("static", backend.address),),
                published=(PublishedPort(backend.port, backend.port, backend.address),),
            ),
        ),
        wanted=1,
    )


class Pair:
    """The agent's parts and a real nginx."""

    def __init__(self, proxy: Proxy, certificates: Path) -> None:
        self.proxy = proxy
        self.certificates = certificates
        self.tls_port = free_port()
        self.url = f"http://127.0.0.1:{proxy.admin_port}"

    def serve(self, *workloads: Workload, **extension: object) -> tuple[Rejection, ...]:
        """Have these served, and nothing else; returns what of them is refused."""
        values = {
            "name": "nginx",
            "port": self.proxy.http_port,
            "ssl_port": self.tls_port,
            "ssl_cert_path": str(self.certificates),
        }
        settings = Settings(
            extensions=(Extension.model_validate(values | extension, by_name=True),),
            openresty=OpenResty(urls=(self.url,), token=TOKEN),
        )
        seen = SourceSnapshot("static", {item.key: item for item in workloads})
        desired = compile_snapshot(Snapshot({"static": seen}), settings)
        fleet = Fleet(
            writer="test",
            connect=connector(settings.openresty),
            renderer=SiteRenderer(settings),
            options=Options(heartbeat=0.2, site_quiet=0.01, site_max_wait=0.1),
            sink=CountingSink(),
        )
        fleet.set_instances(targets((), settings.openresty))
        fleet.start()
        try:
            fleet.apply(desired)
            wait_until(lambda: all(view.in_sync for view in fleet.views()), what="in step")
            return desired.rejections + fleet.rejections()
        finally:
            fleet.stop(10)

    @property
    def files(self) -> Mapping[str, str]:
        """The site that runs."""
        client = self.client()
        try:
            return client.site()
        finally:
            client.close()

    def client(self) -> Client:
        """What speaks with the admin API."""
        settings = OpenResty(urls=(self.url,), token=TOKEN)
        return connector(settings)(targets((), settings)[0])

    def get(self, host: str, path: str = "/", **headers: str) -> Answer:
        """A request over plain HTTP; underscores in the names of headers are hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(self.proxy.http_port, path, host=host, headers=named)

    def tls(self, host: str, path: str = "/", **headers: str) -> Answer:
        """A request over TLS, with the certificate verified for that host."""
        context = ssl.create_default_context(cafile=f"{self.certificates}/ca.pem")
        raw = socket.create_connection(("127.0.0.1", self.tls_port), 10)
        connection = http.client.HTTPConnection(host, self.tls_port, timeout=10)
        connection.sock = context.wrap_socket(raw, server_hostname=host)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET", path, headers={"Host": host, **named})
            answer = connection.getresponse()
            lower = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, lower, answer.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    require(nginx_is_installed(), "nginx with its Lua module, or OpenResty")
    certificates = tmp_path_factory.mktemp("certificates")
    authority(certificates, "ca")
    certificate(certificates, "test", ca="ca", names="DNS:a.test,DNS:unknown.test")
    with Proxy(tmp_path_factory.mktemp("nginx"), token=TOKEN) as proxy:
        yield Pair(proxy, certificates)


@pytest.fixture
def one() -> Iterator[Backend]:
    with Backend("one") as backend:
        yield backend


@pytest.fixture
def two() -> Iterator[Backend]:
    with Backend("two") as backend:
        yield backend


@pytest.fixture
def bystander(two: Backend) -> Workload:
    """Somebody else on the same proxy, who asks for nothing unusual."""
    return wants(two, "bystander.test")


def answers(pair: Pair, host: str, path: str = "/", **headers: str) -> str:
    """Name of the backend that answers."""
    answer = pair.get(host, path, **headers)
    assert answer.status == 200, answer
    return answer.text


def upgraded(pair: Pair, host: str, path: str) -> int:
    """The status that a websocket gets."""
    with socket.create_connection(("127.0.0.1", pair.proxy.http_port), 10) as raw:
        raw.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            "X-Forwarded-For: 203.0.113.9\r\n\r\n".encode()
        )
        return int(raw.recv(4096).split()[1])


# --- what made the whole file invalid ----------------------------------------------------------


def test_fix_ssl_only_leaves_the_file_valid(pair: Pair, one: Backend, bystander: Workload) -> None:
    """FIX-1: `ssl_only` on any host left a block open, and no host was updated any more (#226)."""
    pair.serve(wants(one, "a.test", ssl_only="true", **CERTIFICATE), bystander)
    assert answers(pair, "bystander.test") == "two"
    assert pair.tls("a.test").text == "one"
    moved = pair.get("a.test", "/x?y=1")
    assert moved.status in (301, 302, 307, 308)
    assert moved.headers["location"].startswith("https://a.test")
    assert moved.headers["location"].endswith("/x?y=1")


def test_fix_several_websocket_endpoints_of_one_host(
    pair: Pair, one: Backend, bystander: Workload
) -> None:
    """FIX-2: two websocket endpoints of a host made a duplicate location."""
    labels = {"websocket_endpoint__0": "/ws", "websocket_endpoint__1": "/chat"}
    pair.serve(wants(one, "a.test", **labels), bystander)
    assert upgraded(pair, "a.test", "/ws") == upgraded(pair, "a.test", "/chat") == 101
    assert answers(pair, "bystander.test") == "two"


def test_fix_a_websocket_endpoint_of_the_whole_host(
    pair: Pair, one: Backend, bystander: Workload
) -> None:
    """FIX-3: the websocket endpoint `/` made a duplicate location."""
    pair.serve(wants(one, "a.test", websocket_endpoint="/"), bystander)
    assert upgraded(pair, "a.test", "/") == 101
    assert answers(pair, "a.test") == "one"
    assert answers(pair, "bystander.test") == "two"


def test_fix_a_context_root_of_a_slash_beside_a_plain_container(
    pair: Pair, one: Backend, two: Backend
) -> None:
    """FIX-4: `context_root = /` on one container of a host that another served plainly."""
    pair.serve(wants(one, "a.test"), wants(two, "a.test", context_root="/"))
    assert {answers(pair, "a.test") for _ in range(12)} == {"one", "two"}, "they serve it together"


def test_fix_tls_and_websockets_on_a_host_of_context_roots_only(
    pair: Pair, one: Backend, bystander: Workload
) -> None:
    """FIX-5: TLS or websockets on a host without a root named an upstream that was not there."""
    labels = {"context_root": "/app", "ssl": "true", "websocket_endpoint": "/app/ws"}
    pair.serve(wants(one, "a.test", **labels, **CERTIFICATE), bystander)
    assert pair.tls("a.test", "/app/x").text == "one"
    assert upgraded(pair, "a.test", "/app/ws") == 101
    assert pair.get("a.test", "/other").status == 404, "and not a page of nginx's"
    assert answers(pair, "bystander.test") == "two"


@pytest.mark.parametrize("port", [True, False])
def test_fix_tls_without_certificate_or_port_concerns_that_host_alone(
    pair: Pair, one: Backend, bystander: Workload, port: bool
) -> None:
    """FIX-6: `interlock.ssl` without certificate, or without SSLPort, made the file invalid."""
    extension = {} if port else {"ssl_port": 0}
    (told,) = pair.serve(wants(one, "a.test", ssl="true"), bystander, **extension)
    assert told.reason == ("no_certificate" if port else "tls_off")
    assert answers(pair, "bystander.test") == "two"
    assert pair.get("a.test").status == 503


@pytest.mark.parametrize("hostname", ["a b", "a;", "a{", 'a"', "a\nb", "$host", "a'", "~^a"])
def test_fix_characters_in_a_host_name_concern_that_host_alone(
    pair: Pair, one: Backend, bystander: Workload, hostname: str
) -> None:
    """FIX-10: a space or `;` in hostname or domain corrupted the file for everybody (#217)."""
    (told,) = pair.serve(wants(one, "a.test", hostname=hostname), bystander)
    assert told.reason == "invalid_host"
    assert answers(pair, "bystander.test") == "two"


def test_fix_a_backend_option_without_its_semicolon(
    pair: Pair, one: Backend, bystander: Workload
) -> None:
    """FIX-11: `backend_option` was raw text, so one without `;` made the file invalid."""
    told = pair.serve(wants(one, "a.test", backend_option="keepalive 8"), bystander)
    assert {item.subject for item in told} == {"static service a.test"}
    assert answers(pair, "bystander.test") == "two"


# --- how it is put in force --------------------------------------------------------------------


def test_fix_a_site_is_tested_before_it_replaces_the_one_that_runs(
    pair: Pair, bystander: Workload
) -> None:
    """FIX-22: the live file was overwritten first and tested afterwards."""
    pair.serve(bystander)
    client, files = pair.client(), pair.files
    broken = {**files, "broken.test.conf": "server { listen nonsense"}
    before = client.status().generation
    with pytest.raises(SiteRefused) as refused:
        client.put_site(writer="test", generation="0" * 64, files=broken)
    assert refused.value.file in ("broken.test.conf", None)
    assert client.status().generation == before
    assert client.site() == files, "what would be loaded after a restart is the old one too"
    client.close()
    assert answers(pair, "bystander.test") == "two"


def test_fix_a_bad_label_concerns_its_own_route_alone(
    pair: Pair, one: Backend, bystander: Workload
) -> None:
    """FIX-23: one bad label took down, or froze, every site (#217, #218)."""
    bad = {"port": "http", "context_root": "api", "weight": "-1", "ssl_cert": "../../etc/passwd"}
    for label, value in bad.items():
        told = pair.serve(wants(one, "a.test", **{label: value}), bystander)
        assert [item.reason for item in told] == ["invalid_label"], label
        assert f"interlock.{label}" in told[0].message
        assert answers(pair, "bystander.test") == "two"


def test_fix_a_change_restarts_nothing_and_closes_no_connection(
    pair: Pair, one: Backend, two: Backend
) -> None:
    """FIX-30: HAProxy was restarted for each change, which cut every connection (#190)."""
    pair.serve(wants(one, "another.test"))
    before = pair.proxy.workers()
    pair.serve(wants(one, "a.test"))

    def settled() -> bool:
        now = pair.proxy.workers()
        return len(now) == 2 and before.isdisjoint(now)

    wait_until(settled, what="only the new workers")
    workers = pair.proxy.workers()
    connection = http.client.HTTPConnection("127.0.0.1", pair.proxy.http_port, timeout=10)

    def ask() -> str:
        connection.request("GET", "/", headers={"Host": "a.test"})
        name = connection.getresponse().read().decode()
        assert connection.sock is not None, "the connection was kept"
        return name

    assert ask() == "one"
    for new in (two, one, two):
        old = one if new is two else two
        pair.serve(wants(old, "a.test"), wants(new, "a.test", context_root="/"))
        wait_until(lambda new=new: ask() == new.name, what="the new peer serves")
        pair.serve(wants(new, "a.test"))
        assert ask() == new.name
    connection.close()
    assert pair.proxy.workers() == workers


# --- requests ----------------------------------------------------------------------------------


def test_fix_websockets_have_the_headers_of_other_requests(pair: Pair, one: Backend) -> None:
    """FIX-24: in websocket locations Host was the upstream's name, and X-Forwarded-* were gone."""
    pair.serve(wants(one, "a.test", websocket_endpoint="/ws", alias_domain="alias.test"))
    assert upgraded(pair, "alias.test", "/ws") == 101
    headers = one.requests[-1].headers
    assert headers["host"] == "alias.test"
    assert headers["x-real-ip"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "http"
    assert headers["x-forwarded-for"].endswith("127.0.0.1")


def test_fix_unknown_tls_hosts_are_nobody_elses(pair: Pair, one: Backend) -> None:
    """FIX-25: an unknown TLS host was served by whichever host came first (#52, #164)."""
    pair.serve(wants(one, "a.test", ssl="true", **CERTIFICATE))
    assert pair.tls("a.test").text == "one"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        pair.tls("unknown.test")
    files = {key: f"{pair.certificates}/test.{end}" for key, end in
             (("ssl_default_cert", "pem"), ("ssl_default_cert_key", "key"))}  # fmt: skip
    pair.serve(wants(one, "a.test", ssl="true", **CERTIFICATE), **files)
    assert pair.tls("unknown.test").status == 503, "with a default certificate, and nobody's site"


def test_fix_x_forwarded_proto_is_not_the_clients_to_say(pair: Pair, one: Backend) -> None:
    """FIX-26: a client that sent `X-Forwarded-Proto: https` was believed."""
    pair.serve(wants(one, "a.test", ssl="true", **CERTIFICATE))
    pair.get("a.test", X_Forwarded_Proto="https", X_Forwarded_For="203.0.113.9")
    headers = one.requests[-1].headers
    assert (headers["x-forwarded-proto"], headers["x-real-ip"]) == ("http", "127.0.0.1")
    pair.tls("a.test", X_Forwarded_Proto="http")
    assert one.requests[-1].headers["x-forwarded-proto"] == "https"


def test_fix_a_host_is_its_whole_name_in_any_case(pair: Pair, one: Backend) -> None:
    """FIX-28: `hdr_dom` matched `a.test.local` and `test.local.evil.com`, but not `TEST.local`."""
    pair.serve(wants(one, "test.local"))
    for host in ("test.local", "TEST.local", "Test.Local", "test.local."):
        assert answers(pair, host) == "one", host
    for host in ("a.test.local", "test.local.evil.com", "test.locals", "atest.local"):
        assert pair.get(host).status == 503, host


def test_fix_a_context_root_is_of_its_own_host_alone(
    pair: Pair, one: Backend, bystander: Workload
) -> None:
    """FIX-29: in HAProxy a context root took that path away from every other host."""
    pair.serve(wants(one, "a.test", context_root="/api"), bystander)
    assert answers(pair, "a.test", "/api/x") == "one"
    assert answers(pair, "bystander.test", "/api/x") == "two"
    assert pair.get("a.test", "/application").status == 404, "nor is it every path that begins so"


def test_fix_there_are_no_statistics_on_the_public_port(pair: Pair, bystander: Workload) -> None:
    """FIX-32: HAProxy's statistics were on every host, for `admin` with an empty password."""
    pair.serve(bystander)
    for path in ("/haproxy?stats", "/haproxy?monitor", "/nginx_status", "/status"):
        assert pair.get("nobody.test", path).status == 503, path
        assert answers(pair, "bystander.test", path) == "two", "it is the application's path"
    admin = request(pair.proxy.admin_port, "/v1/membership")
    assert admin.status == 401, "and the admin API wants its token"


def test_fix_a_context_root_is_taken_off_without_detours(pair: Pair, one: Backend) -> None:
    """FIX-33: rewriting was by `reqrep`, fatal in HAProxy 2.1; in nginx a redirect came first."""
    pair.serve(wants(one, "a.test", context_root="/app", context_root_rewrite="true"))
    for asked, seen in (
        ("/app/users", "/users"),
        ("/app/users/", "/users/"),
        ("/app/v1.2/x?y=%20", "/v1.2/x?y=%20"),
        ("/app/", "/"),
    ):
        assert answers(pair, "a.test", asked) == "one", asked
        assert one.requests[-1].path == seen
    assert not any(re.search(r"\brewrite\b.*\$1\?", text) for text in pair.files.values())
