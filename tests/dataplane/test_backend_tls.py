"""TLS towards peers: each identity with connections of its own, and a bad one alone in trouble."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.model import BackendTls, Host, Location
from tests.certificates import authority, certificate
from tests.dataplane.harness import Backend, Proxy, Seen, request, upstream, wait_until
from tests.dataplane.tls import Front, renew, serial, server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Peers `one`, `two` for those names under `ca`; clients `client`, `client2` of `clients`."""
    directory = tmp_path_factory.mktemp("made")
    for name in ("ca", "ca2", "clients"):
        authority(directory, name)
    certificate(directory, "one", ca="ca", names="DNS:one.internal,DNS:a.test")
    certificate(directory, "two", ca="ca", names="DNS:two.internal")
    certificate(directory, "client", ca="clients", names="DNS:client")
    certificate(directory, "client2", ca="clients", names="DNS:client")
    return directory


@pytest.fixture
def certs(made: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(made, tmp_path / "certs"))


@pytest.fixture
def peer(certs: Path) -> Iterator[Backend]:
    """One address and port that is two services, told apart by the name that is asked for."""
    names = {"one.internal": certs / "one.pem", "two.internal": certs / "two.pem"}
    with Backend("b0", tls=server(names)) as running:
        yield running


@pytest.fixture
def front(proxy: Proxy, peer: Backend) -> Front:
    proxy.admin.put({f"{name}.test/": upstream(peer.peer()) for name in "abcd"})
    return Front(proxy)


def routed(name: str, tls: BackendTls | None, *more: Location) -> Host:
    return Host(f"{name}.test", (), (Location("/", f"{name}.test/", backend_tls=tls), *more))


def get(front: Front, name: str, path: str = "/", **options: object) -> tuple[int, str]:
    answer = request(front.proxy.http_port, path, host=f"{name}.test", **options)  # type: ignore[arg-type]
    return answer.status, answer.text


def asked(seen: Seen) -> str | None:
    """The name that was asked for when the connection of this request was made."""
    name: str | None = seen.tls.asked if seen.tls else None  # type: ignore[attr-defined]
    return name


def test_a_peer_is_asked_for_by_the_host_unless_a_name_is_given(
    front: Front, peer: Backend
) -> None:
    front.push(
        routed("a", BackendTls()),
        routed("b", BackendTls(name="two.internal")),
        Host("*.dev.test", (), (Location("/", "c.test/", backend_tls=BackendTls()),)),
    )
    assert (
        get(front, "a")
        == get(front, "b")
        == get(front, "x.dev")
        == get(front, "y.dev")
        == (200, "b0")
    )
    assert [asked(seen) for seen in peer.requests] == [
        "a.test",
        "two.internal",
        "x.dev.test",
        "y.dev.test",
    ]


def test_p7_services_on_one_address_never_share_connections(
    front: Front, certs: Path, peer: Backend
) -> None:
    """Two names, verified or not, and wrong ones: each identity on connections of its own."""
    ca, ca2 = str(certs / "ca.pem"), str(certs / "ca2.pem")
    front.push(
        routed("a", BackendTls(verify=True, ca=ca, name="one.internal")),
        routed("b", BackendTls(verify=True, ca=ca, name="two.internal")),
        routed("c", BackendTls(name="one.internal")),
        # Right address and connection, wrong name or CA: these must fail, whatever is kept open.
        routed(
            "d",
            BackendTls(verify=True, ca=ca, name="three.internal"),
            Location(
                "/ca2", "a.test/", backend_tls=BackendTls(verify=True, ca=ca2, name="one.internal")
            ),
        ),
    )
    for _ in range(15):
        for name, wanted in (("a", "one.internal"), ("b", "two.internal"), ("c", "one.internal")):
            assert get(front, name) == (200, "b0")
            assert asked(peer.requests[-1]) == wanted
        count = len(peer.requests)
        assert get(front, "d")[0] == get(front, "d", "/ca2")[0] == 502
        assert len(peer.requests) == count
    # All the same connections were kept: two workers, three identities.
    assert len({id(seen.tls) for seen in peer.requests}) <= 6
    series = 'tidegate_requests_total{upstream="d.test/",method="read",code="5xx"}'
    wait_until(lambda: front.proxy.admin.metrics().get(series) == 15)


def test_a_peer_that_one_route_does_not_trust_is_not_left_alone_by_another(
    front: Front, certs: Path, peer: Backend
) -> None:
    """Nor by the workers that have seen the handshake fail."""
    ca, ca2 = str(certs / "ca.pem"), str(certs / "ca2.pem")
    with Backend("other", tls=server({"one.internal": certs / "one.pem"})) as other:
        front.proxy.admin.put(
            {"a.test/": upstream(peer.peer()), "b.test/": upstream(peer.peer(), other.peer())}
        )
        wait_until(lambda: front.proxy.admin.live("b.test/") == {"b0": "up", "other": "up"})
        front.push(
            routed("a", BackendTls(verify=True, ca=ca2, name="one.internal")),
            routed("b", BackendTls(verify=True, ca=ca, name="one.internal")),
        )
        for _ in range(10):
            assert get(front, "a")[0] == 502
        names = [get(front, "b")[1] for _ in range(12)]
    # Each of two workers takes them in turn.
    assert 5 <= names.count("b0") <= 7


def test_plain_and_tls_to_one_address_are_kept_apart(front: Front, peer: Backend) -> None:
    front.push(routed("a", BackendTls()), routed("b", None))
    for _ in range(4):
        assert get(front, "a") == (200, "b0")
        assert get(front, "b")[0] == 502


def test_a_peers_certificate_is_verified_for_ca_and_name(front: Front, certs: Path) -> None:
    ca, ca2 = str(certs / "ca.pem"), str(certs / "ca2.pem")
    for tls, status in (
        (BackendTls(verify=True, ca=ca, name="one.internal"), 200),
        (BackendTls(verify=True, ca=ca2, name="one.internal"), 502),
        (
            BackendTls(verify=True, ca=ca, name="a.test"),
            200,
        ),  # what the peer shows where no name fits
        (BackendTls(verify=True, ca=ca, name="other.test"), 502),
        (BackendTls(verify=True, name="one.internal"), 502),  # the system's CAs do not know it
        (BackendTls(verify=False, ca=ca2, name="nobody"), 200),
    ):
        front.push(routed("a", tls), routed("b", BackendTls()))
        assert get(front, "a")[0] == status, tls
        assert get(front, "b") == (200, "b0")


def test_the_system_bundle_can_be_named(
    make_proxy: Callable[..., Proxy], certs: Path, peer: Backend
) -> None:
    proxy = make_proxy(env={"TIDEGATE_CA_BUNDLE": str(certs / "ca.pem")})
    proxy.start()
    proxy.admin.put({"a.test/": upstream(peer.peer())})
    front = Front(proxy)
    front.push(routed("a", BackendTls(verify=True, name="one.internal")))
    assert get(front, "a") == (200, "b0")


def test_held_requests_prefixes_and_websockets_work_over_tls(
    front: Front, certs: Path, peer: Backend
) -> None:
    tls = BackendTls(verify=True, ca=str(certs / "ca.pem"), name="one.internal")
    front.push(
        Host(
            "a.test",
            (),
            (
                Location("/", "b.test/"),
                Location("/app", "a.test/", rewrite=True, backend_tls=tls),
            ),
        ),
    )
    assert get(front, "a", "/app/x?y=1") == (200, "b0")
    assert peer.requests[-1].path == "/x?y=1"
    body = b"z" * 200_000
    assert get(front, "a", "/app/echo", method="POST", body=body)[1] == body.decode()
    # No peer: the request waits, and goes on over TLS with its prefix off once there is one.
    admin = front.proxy.admin
    admin.put({"a.test/": upstream(hold=10)})
    found: list[tuple[int, str]] = []
    thread = threading.Thread(
        target=lambda: found.append(get(front, "a", "/app/held", method="POST", body=b"1"))
    )
    thread.start()
    wait_until(lambda: admin.metrics().get('tidegate_no_peer_total{upstream="a.test/"}', 0) >= 1)
    admin.put({"a.test/": upstream(peer.peer(), hold=10)})
    thread.join()
    assert found == [(200, "b0")]
    assert (peer.requests[-1].path, asked(peer.requests[-1])) == ("/held", "one.internal")
    # No peer and nothing to wait for.
    admin.put({"a.test/": upstream()})
    assert get(front, "a", "/app/x")[0] == 503


def test_a_peer_that_fails_is_retried_elsewhere_over_tls(
    front: Front, certs: Path, peer: Backend
) -> None:
    tls = BackendTls(verify=True, ca=str(certs / "ca.pem"), name="one.internal")
    with Backend("bad", tls=server({"x": certs / "two.pem"})) as wrong:
        front.proxy.admin.put({"a.test/": upstream(peer.peer(), wrong.peer())})
        front.push(routed("a", tls))
        assert {get(front, "a") for _ in range(10)} == {(200, "b0")}
        assert wrong.requests == []


def test_what_we_show_is_renewed_without_a_reload(front: Front, certs: Path) -> None:
    with Backend(
        "m", tls=server({"m": certs / "one.pem"}, clients=certs / "clients.pem")
    ) as strict:
        front.proxy.admin.put(
            {"a.test/": upstream(strict.peer()), "b.test/": upstream(strict.peer())}
        )
        own = BackendTls(
            certificate=str(certs / "client.pem"), key=str(certs / "client.key"), name="m"
        )
        front.push(routed("a", own), routed("b", BackendTls(name="m")))
        wait_until(lambda: len(front.proxy.workers()) == 2)
        workers = front.proxy.workers()

        def shown() -> str:
            strict.drop()
            assert get(front, "a") == (200, "m")
            tls = strict.requests[-1].tls
            assert tls is not None
            peercert = tls.getpeercert()
            assert peercert is not None
            return f"serial={peercert['serialNumber']}\n"

        assert shown() == serial(certs / "client.pem")
        # A connection that showed one is never used where none is to be shown.
        assert get(front, "b")[0] == 502
        renew(certs / "client.pem", certs / "client2.pem")
        wanted = serial(certs / "client2.pem")
        wait_until(lambda: shown() == wanted, timeout=15, what="the new certificate is shown")
        assert front.proxy.workers() == workers
        shutil.copy(certs / "one.key", certs / "client.key")
        wait_until(lambda: set(front.backend_problems()) == {"certificate_key_mismatch"})
        assert get(front, "a") == (200, "m")


@pytest.mark.parametrize("what", ["ca", "certificate", "key"])
def test_a_file_that_is_missing_refuses_its_route_alone_until_it_comes(
    front: Front, certs: Path, peer: Backend, what: str
) -> None:
    names = {"ca": "ca.pem", "certificate": "client.pem", "key": "client.key"}
    path = certs / names[what]
    data = path.read_bytes()
    path.unlink()
    tls = BackendTls(
        verify=True,
        ca=str(certs / "ca.pem"),
        name="one.internal",
        certificate=str(certs / "client.pem"),
        key=str(certs / "client.key"),
    )
    front.push(
        Host(
            "a.test",
            (),
            (
                Location("/", "a.test/"),
                Location("/tls", "b.test/", backend_tls=tls),
                Location("/other", "c.test/", backend_tls=BackendTls()),
            ),
        )
    )
    assert get(front, "a", "/tls")[0] == 502
    assert get(front, "a", "/other") == (200, "b0")
    assert peer.requests[-1].path == "/other"
    reason = "backend_ca_missing" if what == "ca" else "certificate_missing"
    wait_until(lambda: set(front.backend_problems()) == {reason}, timeout=15)
    # Nor does a restart without the agent cost more than that.
    front.proxy.stop()
    front.proxy.start()
    assert get(front, "a", "/tls")[0] == 502
    assert get(front, "a", "/other") == (200, "b0")
    path.write_bytes(data)
    wait_until(lambda: get(front, "a", "/tls") == (200, "b0"), timeout=30, what="the route is back")
    wait_until(lambda: front.backend_problems() == {}, timeout=15)


def test_a_changed_ca_is_taken_in_by_itself(front: Front, certs: Path) -> None:
    tls = BackendTls(verify=True, ca=str(certs / "ca.pem"), name="one.internal")
    front.push(routed("a", tls))
    assert get(front, "a") == (200, "b0")
    (certs / "new").write_bytes((certs / "ca2.pem").read_bytes())
    (certs / "new").replace(certs / "ca.pem")
    wait_until(lambda: get(front, "a")[0] == 502, timeout=20, what="the new CA is in force")
    # One that goes missing changes nothing.
    generation = front.proxy.admin.status()["generation"]
    (certs / "ca.pem").unlink()
    wait_until(lambda: set(front.backend_problems()) == {"backend_ca_missing"}, timeout=15)
    assert front.proxy.admin.status()["generation"] == generation
