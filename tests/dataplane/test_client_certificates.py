"""Hosts whose clients show a certificate: verified for that very host, and no way round it."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import pytest

from agent.model import VerifyClient
from tests.certificates import authority, certificate
from tests.dataplane.harness import Backend, Proxy, request, upstream, wait_until
from tests.dataplane.tls import Front, client, host

NAMES = ("open.test", "asks.test", "closed.test", "other.test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Servers' certificate `server`; clients `good` of CA `ca`, `foreign` of CA `ca2`."""
    directory = tmp_path_factory.mktemp("made")
    authority(directory, "ca")
    authority(directory, "ca2")
    certificate(directory, "server", ca="ca", names=",".join(f"DNS:{name}" for name in NAMES))
    certificate(directory, "good", ca="ca", names="DNS:client")
    certificate(directory, "late", ca="ca", names="DNS:client", days=-1)
    certificate(directory, "foreign", ca="ca2", names="DNS:client")
    return directory


@pytest.fixture
def certs(made: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(made, tmp_path / "certs"))


@pytest.fixture
def front(proxy: Proxy, backend: Backend, certs: Path) -> Front:
    """`open` does not ask, `asks` would like one of `ca`; `closed` wants one, `other` of `ca2`."""
    proxy.admin.put({f"{name}/": upstream(backend.peer()) for name in NAMES})
    front = Front(proxy)
    own, ca, ca2 = certs / "server.pem", str(certs / "ca.pem"), str(certs / "ca2.pem")
    front.push(
        host("open.test", own),
        host("asks.test", own, verify_client=VerifyClient.OPTIONAL, client_ca=ca),
        host(
            "closed.test", own, verify_client=VerifyClient.REQUIRED, client_ca=ca, hsts="max-age=1"
        ),
        host("other.test", own, verify_client=VerifyClient.REQUIRED, client_ca=ca2),
    )
    return front


def test_required_lets_in_who_shows_one_of_the_ca(front: Front, certs: Path) -> None:
    assert front.get("closed.test", show=certs / "good.pem").answer.text == "b0"
    for show, says in (
        (None, "No required"),
        (certs / "foreign.pem", "certificate error"),
        (certs / "late.pem", "certificate error"),
    ):
        answer = front.get("closed.test", show=show).answer
        assert answer.status == 400
        assert says in answer.text
        assert answer.headers["strict-transport-security"] == "max-age=1"


def test_optional_lets_in_who_shows_none_but_not_who_shows_a_bad_one(
    front: Front, certs: Path
) -> None:
    assert front.get("asks.test").answer.text == "b0"
    assert front.get("asks.test", show=certs / "good.pem").answer.text == "b0"
    assert front.get("asks.test", show=certs / "foreign.pem").answer.status == 400


def test_backends_are_told_who_it_is_and_clients_cannot_say_so_themselves(
    front: Front, certs: Path, backend: Backend
) -> None:
    forged = {
        "X-SSL-Client-Verify": "SUCCESS",
        "X-SSL-Client-Subject-DN": "CN=root",
        "X-SSL-Client-Issuer-DN": "CN=root",
        "X-SSL-Client-Serial": "1",
        "X-SSL-Client-Fingerprint": "1",
    }
    front.get("asks.test", show=certs / "good.pem", headers=forged)
    told = backend.requests[-1].headers
    assert told["x-ssl-client-verify"] == "SUCCESS"
    assert told["x-ssl-client-subject-dn"] == "CN=good"
    assert told["x-ssl-client-issuer-dn"] == "CN=ca"
    assert len(told["x-ssl-client-fingerprint"]) == 40
    assert int(told["x-ssl-client-serial"], 16) > 1
    front.get("asks.test", headers=forged)
    front.get("open.test", headers=forged, show=certs / "good.pem")
    request(front.proxy.http_port, host="open.test", headers=forged)
    for seen in backend.requests[-3:]:
        found = {name: value for name, value in seen.headers.items() if "ssl-client" in name}
        assert found in ({}, {"x-ssl-client-verify": "NONE"})


def test_a_connection_for_another_name_does_not_get_round_it(front: Front, certs: Path) -> None:
    for show in (None, certs / "good.pem", certs / "foreign.pem"):
        for asked in ("open.test", "other.test"):
            assert front.get("closed.test", ask=asked, show=show).answer.status == 421
    assert front.refuses("closed.test", ask="")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_resumed_session_does_not_get_round_it(
    front: Front, certs: Path, version: ssl.TLSVersion
) -> None:
    """CVE-2025-23419: a client of one host's CA resumes its session at another host."""
    context = client(certs / "foreign.pem")
    context.minimum_version = context.maximum_version = version
    first = front.get("other.test", context=context)
    assert first.answer.text == "b0"
    again = front.get("other.test", context=context, session=first.session)
    assert (again.answer.text, again.reused) == ("b0", False)
    answer = front.get("closed.test", context=context, session=first.session).answer
    assert answer.status == 400
    open_session = front.get("open.test", context=context).session
    try:
        status = front.get("closed.test", context=context, session=open_session).answer.status
    except (ssl.SSLError, ConnectionError):
        status = 0
    assert status in (0, 400, 421)


def test_plain_http_does_not_get_round_it(front: Front) -> None:
    answer = request(front.proxy.http_port, "/x?y", host="closed.test")
    assert (answer.status, answer.headers["location"]) == (
        308,
        f"https://closed.test:{front.tls_port}/x?y",
    )


@pytest.mark.parametrize("default", [False, True])
def test_clients_that_name_no_host_do_not_get_round_it(
    front: Front, certs: Path, default: bool
) -> None:
    if default:
        front.settings = {
            "SSLDefaultCert": str(certs / "server.pem"),
            "SSLDefaultCertKey": str(certs / "server.key"),
        }
        own = certs / "server.pem"
        front.push(
            host(
                "closed.test",
                own,
                verify_client=VerifyClient.REQUIRED,
                client_ca=str(certs / "ca.pem"),
            )
        )
        assert front.get("closed.test", ask="", show=certs / "good.pem").answer.status == 400
    else:
        assert front.refuses("closed.test", ask="", show=certs / "good.pem")


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "client_ca_missing"), ("no", "client_ca_unreadable")]
)
def test_a_ca_that_cannot_be_read_concerns_its_host_alone(
    front: Front, certs: Path, text: str | None, reason: str
) -> None:
    own, ca3 = certs / "server.pem", certs / "ca3.pem"
    if text is not None:
        ca3.write_text(text)
    front.push(
        host("open.test", own),
        host("closed.test", own, verify_client=VerifyClient.REQUIRED, client_ca=str(ca3)),
    )
    assert front.refuses("closed.test", show=certs / "good.pem")
    assert front.get("open.test").answer.text == "b0"
    front.settled("closed.test", {reason})
    shutil.copy(certs / "ca.pem", ca3)
    front.settled("closed.test", set())
    assert front.get("closed.test", show=certs / "good.pem").answer.text == "b0"


def test_a_renewed_ca_counts_without_a_reload(front: Front, certs: Path) -> None:
    wait_until(lambda: len(front.proxy.workers()) == 2)
    workers = front.proxy.workers()
    assert front.get("closed.test", show=certs / "foreign.pem").answer.status == 400
    (certs / "new").write_bytes((certs / "ca2.pem").read_bytes())
    (certs / "new").replace(certs / "ca.pem")
    wait_until(lambda: front.get("closed.test", show=certs / "foreign.pem").answer.status == 200)
    assert front.get("closed.test", show=certs / "good.pem").answer.status == 400
    assert front.proxy.workers() == workers
