"""Certificates of hosts: renewed without a reload, and a bad one concerns its host alone."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.certificates import authority, certificate
from tests.dataplane.harness import Backend, Proxy, request, upstream, wait_until
from tests.dataplane.tls import Front, client, host, renew, serial


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that are only read: `a`, `a2` and `expired` for a.test, `b` for b.test."""
    directory = tmp_path_factory.mktemp("made")
    authority(directory, "ca")
    certificate(directory, "a", ca="ca", names="DNS:a.test", days=90)
    certificate(directory, "a2", ca="ca", names="DNS:a.test", days=90)
    certificate(directory, "b", ca="ca", names="DNS:b.test", days=90)
    certificate(directory, "old", ca="ca", names="DNS:a.test", days=-1)
    return directory


@pytest.fixture
def certs(made: Path, tmp_path: Path) -> Path:
    """A copy of them for one test."""
    return Path(shutil.copytree(made, tmp_path / "certs"))


@pytest.fixture
def front(proxy: Proxy, backend: Backend) -> Front:
    proxy.admin.put({"a.test/": upstream(backend.peer()), "b.test/": upstream(backend.peer())})
    return Front(proxy)


def in_all_workers(front: Front, name: str, wanted: str) -> None:
    """Each of many fresh connections gets the certificate with this serial number."""
    wait_until(lambda: front.serves(name) == wanted, what="the new certificate")
    assert {front.get(name).serial for _ in range(12)} == {wanted}


def test_each_name_gets_its_own_certificate_and_unknown_ones_none(
    front: Front, certs: Path
) -> None:
    front.push(
        host("a.test", certs / "a.pem", aliases=("www.a.test",)), host("b.test", certs / "b.pem")
    )
    assert front.get("a.test").serial == serial(certs / "a.pem")
    assert front.get("www.a.test").serial == serial(certs / "a.pem")
    assert front.get("b.test").serial == serial(certs / "b.pem")
    assert front.get("a.test").answer.text == "b0"
    assert front.refuses("c.test")
    assert front.refuses("a.test", ask="")


def test_a_renewed_certificate_is_served_without_a_reload(front: Front, certs: Path) -> None:
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    wait_until(lambda: len(front.proxy.workers()) == 2)
    workers, changes = (
        front.proxy.workers(),
        front.proxy.admin.metrics()["tidegate_site_changes_total"],
    )
    assert front.get("a.test").serial == serial(certs / "a.pem")
    renew(certs / "a.pem", certs / "a2.pem")
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))
    assert front.proxy.workers() == workers
    assert front.proxy.admin.metrics()["tidegate_site_changes_total"] == changes
    assert front.problems("a.test") == {}
    assert front.get("b.test").serial == serial(certs / "b.pem")


def test_a_link_that_is_switched_is_a_renewal(front: Front, certs: Path) -> None:
    """As certbot and mounted secrets do it."""
    for version in ("a", "a2"):
        (certs / f"v-{version}").mkdir()
        for suffix in (".pem", ".key"):
            shutil.copy(certs / f"{version}{suffix}", certs / f"v-{version}" / f"live{suffix}")
    (certs / "live").symlink_to("v-a")
    front.push(host("a.test", certs / "live" / "live.pem"))
    assert front.get("a.test").serial == serial(certs / "a.pem")
    (certs / "new").symlink_to("v-a2")
    (certs / "new").replace(certs / "live")
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))


def test_a_reload_in_the_middle_of_a_renewal_loses_neither(front: Front, certs: Path) -> None:
    front.push(host("a.test", certs / "a.pem"))
    renew(certs / "a.pem", certs / "a2.pem")
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))


@pytest.mark.parametrize(
    ("break_it", "reason", "tells"),
    [
        (lambda d: (d / "a.pem").unlink(), "certificate_missing", "No such file"),
        (lambda d: (d / "a.key").unlink(), "certificate_missing", "No such file"),
        (lambda d: (d / "a.pem").write_text("nonsense\n"), "certificate_unreadable", "PEM"),
        (lambda d: (d / "a.pem").write_text(""), "certificate_unreadable", "is empty"),
        (lambda d: (d / "a.key").write_text("nonsense\n"), "certificate_unreadable", "PEM"),
        (lambda d: shutil.copy(d / "b.key", d / "a.key"), "certificate_key_mismatch", "belong"),
        (lambda d: _encrypt(d / "a.key"), "certificate_unreadable", "encrypted"),
        (lambda d: _make_directory(d / "a.pem"), "certificate_unreadable", "directory"),
    ],
    ids=[
        "missing",
        "key-missing",
        "garbage",
        "empty",
        "key-garbage",
        "mismatch",
        "encrypted",
        "directory",
    ],
)
def test_a_bad_certificate_refuses_its_host_alone_until_it_is_cured(
    front: Front, certs: Path, break_it: Callable[[Path], object], reason: str, tells: str
) -> None:
    good = {suffix: (certs / f"a{suffix}").read_bytes() for suffix in (".pem", ".key")}
    break_it(certs)
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    assert front.refuses("a.test")
    assert front.get("b.test").answer.text == "b0"
    assert request(front.proxy.http_port, host="a.test").text == "b0"
    front.settled("a.test", {reason})
    assert tells in front.problems("a.test")[reason]
    assert front.problems("b.test") == {}
    metrics = front.proxy.admin.metrics()
    assert (
        metrics[f'tidegate_certificate_problem{{host="a.test",backend="",reason="{reason}"}}'] == 1
    )
    assert not any("expiry" in name and '"a.test"' in name for name in metrics)
    for suffix, data in good.items():
        if (certs / f"a{suffix}").is_dir():
            (certs / f"a{suffix}").rmdir()
        (certs / f"a{suffix}").write_bytes(data)
    in_all_workers(front, "a.test", serial(certs / "a.pem"))
    front.settled("a.test", set())


def _encrypt(key: Path) -> None:
    from tests.certificates import openssl

    openssl("pkey", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(key) + ".enc")
    Path(str(key) + ".enc").replace(key)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("what", ["missing", "garbage", "mismatch", "half-renewed", "expired"])
def test_the_last_good_one_serves_on_also_over_a_reload(
    front: Front, certs: Path, what: str
) -> None:
    front.push(host("a.test", certs / "a.pem"))
    before = serial(certs / "a.pem")
    assert front.get("a.test").serial == before
    reason = {
        "missing": "certificate_missing",
        "garbage": "certificate_unreadable",
        "expired": "certificate_expired",
    }.get(what, "certificate_key_mismatch")
    match what:
        case "missing":
            (certs / "a.pem").unlink()
        case "garbage":
            (certs / "a.key").write_text("-----BEGIN PRIVATE KEY-----\n")
        case "mismatch":
            shutil.copy(certs / "b.key", certs / "a.key")
        case "half-renewed":
            shutil.copy(certs / "a2.pem", certs / "a.pem")
        case "expired":
            renew(certs / "a.pem", certs / "old.pem")
    front.settled("a.test", {reason})
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    assert {front.get("a.test").serial for _ in range(8)} == {before}
    front.settled("a.test", {reason})
    renew(certs / "a.pem", certs / "a2.pem")
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))
    front.settled("a.test", set())


def test_expired_and_for_another_name_is_served_and_told(front: Front, certs: Path) -> None:
    front.push(
        host("a.test", certs / "old.pem"),
        host("b.test", certs / "b.pem", aliases=("www.b.test",)),
        host("*.dev.test", certs / "a.pem"),
    )
    assert front.get("a.test").serial == serial(certs / "old.pem")
    front.settled("a.test", {"certificate_expired"})
    front.settled("b.test", {"certificate_name_mismatch"})
    assert "is not for www.b.test" in front.problems("b.test")["certificate_name_mismatch"]
    assert front.get("x.dev.test").answer.status == 503
    front.settled("*.dev.test", {"certificate_name_mismatch"})
    assert not any(item["refused"] for one in front.report()["hosts"] for item in one["problems"])


def test_expiry_is_a_metric_and_warned_of_in_time(front: Front, certs: Path) -> None:
    certificate(certs, "soon", ca="ca", names="DNS:a.test, DNS:*.dev.test", days=1)
    front.push(host("a.test", certs / "a.pem"), host("*.dev.test", certs / "soon.pem"))
    front.settled("a.test", set())
    wait_until(lambda: all(item["checked"] for item in front.report()["hosts"]))
    name = 'tidegate_certificate_expiry_timestamp_seconds{host="%s",backend=""}'
    metrics = front.proxy.admin.metrics()
    now = time.time()
    assert 89 * 86400 < metrics[name % "a.test"] - now <= 90 * 86400
    assert 0 < metrics[name % "*.dev.test"] - now <= 86400
    front.settled("*.dev.test", set())  # a day is its whole life: that is no warning yet


def test_a_default_certificate_answers_names_that_nobody_claims(proxy: Proxy, certs: Path) -> None:
    front = Front(
        proxy, SSLDefaultCert=str(certs / "b.pem"), SSLDefaultCertKey=str(certs / "b.key")
    )
    front.push(host("a.test", certs / "a.pem"))
    assert front.get("c.test").serial == serial(certs / "b.pem")
    serving = serial(certs / "b.pem")
    assert front.get("c.test").answer.status == 503
    assert front.get("a.test", ask="").serial == serial(certs / "b.pem")
    (certs / "b.pem").unlink()
    front.settled("", {"certificate_missing"})
    assert front.get("c.test").serial == serving


def test_haproxys_one_file_holds_certificate_and_key(proxy: Proxy, certs: Path) -> None:
    both = certs / "both.pem"
    both.write_bytes((certs / "b.key").read_bytes() + (certs / "b.pem").read_bytes())
    front = Front(proxy, Name="haproxy", SSLCert=str(both))
    front.push()
    assert front.get("any.test").serial == serial(certs / "b.pem")
    renewed = (certs / "a.pem").read_bytes() + (certs / "a.key").read_bytes()
    both.with_suffix(".new").write_bytes(renewed)
    both.with_suffix(".new").replace(both)
    in_all_workers(front, "any.test", serial(certs / "a.pem"))


def test_a_restart_with_broken_files_and_no_agent_costs_their_hosts_alone(
    front: Front, certs: Path
) -> None:
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    generation = front.proxy.admin.status()["generation"]
    front.proxy.stop()
    (certs / "a.pem").unlink()
    renew(certs / "b.pem", certs / "a2.pem")
    front.proxy.start()
    assert front.proxy.admin.status()["generation"] == generation
    assert front.refuses("a.test")
    assert front.get("b.test").serial == serial(certs / "a2.pem")
    shutil.copy(certs / "a2.pem", certs / "a.pem")
    shutil.copy(certs / "a2.key", certs / "a.key")
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))


def test_a_killed_worker_leaves_the_looking_to_others(front: Front, certs: Path) -> None:
    front.push(host("a.test", certs / "a.pem"))
    wait_until(lambda: len(front.proxy.workers()) == 2)
    os.kill(min(front.proxy.workers()), signal.SIGKILL)
    renew(certs / "a.pem", certs / "a2.pem")
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))


def test_keys_are_nowhere_but_in_their_file(front: Front, certs: Path) -> None:
    shutil.copy(certs / "b.key", certs / "a.key")
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    assert front.refuses("a.test")
    assert front.get("b.test").answer.text == "b0"
    front.settled("a.test", {"certificate_key_mismatch"})
    line = (certs / "b.key").read_text().splitlines()[3]
    front.proxy.stop()
    for path in [*front.proxy.directory.rglob("*"), front.proxy.log]:
        if path.is_file():
            assert line not in path.read_text(errors="replace"), path


@pytest.fixture
def one_worker(make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(workers=1)
    proxy.start()
    return proxy


def test_a_thousand_hosts_are_looked_at_without_requests_waiting(
    one_worker: Proxy, certs: Path, backend: Backend
) -> None:
    one_worker.admin.put({"a.test/": upstream(backend.peer())})
    front = Front(one_worker)
    hosts = [host("a.test", certs / "a.pem")]
    for n in range(1000):
        for suffix in (".pem", ".key"):
            os.link(certs / f"b{suffix}", certs / f"h{n}{suffix}")
        hosts.append(host(f"h{n}.test", certs / f"h{n}.pem"))
    front.push(*hosts)
    times = []

    def all_checked() -> bool:
        started = time.monotonic()
        assert request(one_worker.http_port, host="a.test").text == "b0"
        times.append(time.monotonic() - started)
        return len(times) % 50 == 0 and all(item["checked"] for item in front.report()["hosts"])

    wait_until(all_checked, timeout=60, what="all certificates have been looked at")
    assert front.get("h999.test").serial == serial(certs / "b.pem")
    renew(certs / "a.pem", certs / "a2.pem")
    in_all_workers(front, "a.test", serial(certs / "a2.pem"))
    # Were they all looked at in one go, one request would have waited for as long as that took.
    assert max(times) < sum(times) / 2


def test_a_host_that_is_gone_is_forgotten(front: Front, certs: Path) -> None:
    (certs / "a.pem").unlink()
    front.push(host("a.test", certs / "a.pem"), host("b.test", certs / "b.pem"))
    front.settled("a.test", {"certificate_missing"})
    front.push(host("b.test", certs / "b.pem"))
    wait_until(lambda: not any('"a.test"' in name for name in front.proxy.admin.metrics()))
    assert [item["host"] for item in front.report()["hosts"]] == ["b.test"]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 is deprecated")
def test_old_protocols_are_spoken_when_the_settings_say_so(
    proxy: Proxy, certs: Path, backend: Backend
) -> None:
    proxy.admin.put({"a.test/": upstream(backend.peer())})
    front = Front(proxy)
    front.push(host("a.test", certs / "a.pem"))
    assert front.get("a.test").version == "TLSv1.3"
    old = client()
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    assert front.refuses("a.test", context=old)
    front.settings = {
        "SSLProtocols": "TLSv1 TLSv1.1 TLSv1.2",
        "SSLCiphers": "DEFAULT@SECLEVEL=0",
    }
    front.push(host("a.test", certs / "a.pem"))
    assert front.get("a.test", context=old).version == "TLSv1"


def test_sessions_are_resumed_and_no_tickets_are_given(front: Front, certs: Path) -> None:
    front.push(host("a.test", certs / "a.pem"))
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client()
        context.minimum_version = context.maximum_version = version
        first = front.get("a.test", context=context)
        assert first.session is not None
        assert front.get("a.test", context=context, session=first.session).reused
        if version is ssl.TLSVersion.TLSv1_2:
            assert not first.session.has_ticket


def test_hsts_is_on_all_answers_over_tls_and_on_none_without(front: Front, certs: Path) -> None:
    front.push(host("a.test", certs / "a.pem", hsts="max-age=300; includeSubDomains"))
    for path in ("/", "/reset"):
        found = front.get("a.test", path).answer
        assert found.headers["strict-transport-security"] == "max-age=300; includeSubDomains"
    front.proxy.admin.put({})
    answer = front.get("a.test").answer
    assert answer.status == 503
    assert answer.headers["strict-transport-security"] == "max-age=300; includeSubDomains"
    assert "strict-transport-security" not in request(front.proxy.http_port, host="a.test").headers
