"""OCSP answers go out with certificates that name a responder, and never delay a handshake."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.certificates import authority, certificate
from tests.dataplane.harness import Proxy, free_port, wait_until
from tests.dataplane.tls import Front, host

RESPONDER_NAME = "localhost"


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def certs(tmp_path: Path, port: int) -> Path:
    """`a` names a responder at `port`, with its issuer in the file; `plain` names none."""
    authority(tmp_path, "ca")
    aia = f"authorityInfoAccess=OCSP;URI:http://{RESPONDER_NAME}:{port}/ocsp"
    certificate(tmp_path, "a", ca="ca", names="DNS:a.test", more=aia)
    certificate(tmp_path, "plain", ca="ca", names="DNS:b.test")
    with (tmp_path / "a.pem").open("a") as file:
        file.write((tmp_path / "ca.pem").read_text())
    return tmp_path


@pytest.fixture
def respond(certs: Path, port: int) -> Iterator[Callable[[str], None]]:
    """Starts `openssl ocsp`, which says of `a` that it is V(alid) or R(evoked)."""
    running: list[subprocess.Popen[bytes]] = []

    def start(state: str) -> None:
        command = ["openssl", "x509", "-in", str(certs / "a.pem"), "-noout", "-serial"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        serial = shown.strip().partition("=")[2]
        revoked = "250101000000Z" if state == "R" else ""
        (certs / "index").write_text(
            f"{state}\t990101000000Z\t{revoked}\t{serial}\tunknown\t/CN=a\n"
        )
        running.append(
            subprocess.Popen(
                [
                    "openssl", "ocsp", "-index", str(certs / "index"), "-port", str(port),
                    "-rsigner", str(certs / "ca.pem"), "-rkey", str(certs / "ca.key"),
                    "-CA", str(certs / "ca.pem"), "-nmin", "5",
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )  # fmt: skip

        # A connection that sends nothing would stop it.
        said = running[-1].stdout
        assert said is not None
        while b"waiting for OCSP" not in (line := said.readline()):
            assert line, "the responder ended"

    yield start
    for process in running:
        process.kill()
        process.wait()


def stapled(front: Front, name: str) -> bool:
    """Whether a client that asks for it gets a good OCSP answer for `name`."""
    found = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{front.tls_port}",
         "-servername", name, "-status"],
        input=b"", capture_output=True, check=False,
    ).stdout.decode()  # fmt: skip
    assert "BEGIN CERTIFICATE" in found
    return "OCSP Response Status: successful" in found and "Cert Status: good" in found


def test_an_answer_is_fetched_and_stapled(
    proxy: Proxy, certs: Path, respond: Callable[[str], None]
) -> None:
    respond("V")
    front = Front(proxy)
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "plain.pem"))
    wait_until(lambda: stapled(front, "a.test"), timeout=20, what="an OCSP answer")
    # In all workers, and over a reload.
    assert all(stapled(front, "a.test") for _ in range(4))
    front.push(host("a.test", certs / "a.pem"))
    assert all(stapled(front, "a.test") for _ in range(4))


def test_a_certificate_without_a_responder_has_none(proxy: Proxy, certs: Path) -> None:
    front = Front(proxy)
    front.push(host("b.test", certs / "plain.pem"))
    wait_until(lambda: all(item["checked"] for item in front.report()["hosts"]))
    assert not stapled(front, "b.test")
    assert front.problems("b.test") == {}


def test_a_responder_that_never_answers_delays_nobody(proxy: Proxy, certs: Path, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as silent:
        front = Front(proxy)
        front.push(host("a.test", certs / "a.pem"))
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(65536).startswith(b"POST /ocsp")
            assert not stapled(front, "a.test")
            assert front.get("a.test").answer.status == 503
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):  # open: the answer is still waited for
                connection.recv(1)
    assert front.get("a.test").answer.status == 503


def test_what_says_that_it_is_revoked_is_not_stapled(
    proxy: Proxy, certs: Path, respond: Callable[[str], None]
) -> None:
    respond("R")
    front = Front(proxy)
    front.push(host("a.test", certs / "a.pem"))
    wait_until(lambda: "OCSP responder" in proxy.output, timeout=20, what="the answer is refused")
    assert not stapled(front, "a.test")
    assert front.get("a.test").answer.status == 503


def test_it_can_be_switched_off(proxy: Proxy, certs: Path) -> None:
    front = Front(proxy, SSLStapling=False)
    front.push(host("a.test", certs / "a.pem"))
    wait_until(lambda: all(item["checked"] for item in front.report()["hosts"]))
    assert "OCSP" not in proxy.output
    assert not front.report()["hosts"][0]["stapled"]
