"""What is told of TLS that fails; against real engines and stores in tests/engine, tests/stores."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent import tls
from tests.certificates import authority, certificate

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(name="client", scope="module")
def _client(tmp_path_factory: pytest.TempPathFactory) -> tls.Client:
    directory = tmp_path_factory.mktemp("certs")
    authority(directory, "ca")
    certificate(directory, "ours", ca="ca", names="DNS:agent")
    return tls.Client(
        names=("CA", "CERT", "KEY"),
        ca=f"{directory}/ca.pem",
        cert=f"{directory}/ours.pem",
        key=f"{directory}/ours.key",
    )


def test_good_files_are_usable_and_so_are_none(client: tls.Client) -> None:
    assert tls.unusable(client) == ""
    assert tls.unusable(tls.Client(client.names)) == ""


def test_a_key_with_a_pass_phrase_is_told_and_not_asked_for(
    client: tls.Client, tmp_path: Path
) -> None:
    locked = tmp_path / "locked.key"
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", client.key, "-out"]
    subprocess.run([*command, str(locked)], check=True, capture_output=True)
    assert "KEY" in tls.unusable(replace(client, key=str(locked)))
    assert "without a pass phrase" in tls.unusable(replace(client, key=str(locked)))


def failure(word: str) -> ssl.SSLError:
    """As OpenSSL tells one."""
    error = ssl.SSLError(1, f"[SSL: {word}] (_ssl.c:1)")
    error.reason = word
    return error


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("TLSV1_ALERT_PROTOCOL_VERSION", "1.2 or later is needed"),
        ("UNSUPPORTED_PROTOCOL", "1.2 or later is needed"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "it refuses CERT"),
        ("BAD_LENGTH", "TLS fails: bad length"),
    ],
)
def test_what_openssl_calls_it_is_told_in_words(client: tls.Client, word: str, says: str) -> None:
    wrapped = RuntimeError("could not")
    wrapped.__cause__ = failure(word)
    assert says in tls.reason(wrapped, client)


def test_who_shows_nothing_is_told_that_something_is_wanted(client: tls.Client) -> None:
    silent = replace(client, cert="", key="")
    for word in ("SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV13_ALERT_CERTIFICATE_REQUIRED"):
        assert "set CERT and KEY" in tls.reason(failure(word), silent)


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "refused"), TimeoutError(), KeyError()]
)
def test_what_is_no_failure_of_tls_is_none(client: tls.Client, error: Exception) -> None:
    assert tls.reason(error, client) == ""


def test_a_probe_tells_nothing_where_nobody_is_or_answers(
    client: tls.Client, free_port: Callable[[], int]
) -> None:
    assert tls.probe("127.0.0.1", free_port(), client, timeout=0.2) == ""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert tls.probe("127.0.0.1", silent.getsockname()[1], client, timeout=0.2) == ""
