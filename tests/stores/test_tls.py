"""Each kind of store over TLS with certificates on both sides, and what is told where it fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config.kv import open_store
from agent.config.stores import Discovery
from agent.errors import StoreUnavailable
from tests.certificates import authority, certificate
from tests.conftest import require
from tests.stores.servers import Consul, Etcd, Tls, ZooKeeper
from tests.stores.test_kv import heard
from tests.stores.test_live import REFUSED, UP, Agent

KINDS = {"etcd": Etcd, "zk": ZooKeeper, "consul": Consul}


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require(shutil.which("openssl"), "openssl")
    directory = tmp_path_factory.mktemp("certs")
    authority(directory, "ca")
    authority(directory, "other")
    # etcd's gateway is a client of etcd's own, with the server's certificate.
    both = "extendedKeyUsage=serverAuth,clientAuth"
    certificate(directory, "server", ca="ca", names="IP:127.0.0.1", more=both)
    certificate(directory, "client", ca="ca", names="DNS:agent")
    certificate(directory, "late", ca="ca", names="DNS:agent", days=-1)
    certificate(directory, "foreign", ca="other", names="DNS:agent")
    return directory


@pytest.fixture(scope="module", params=KINDS)
def server(request: Any, certs: Path, tmp_path_factory: Any) -> Iterator[Any]:
    tls = Tls(*(str(certs / name) for name in ("server.pem", "server.key", "ca.pem")))
    server = KINDS[request.param](tmp_path_factory.mktemp(request.param), tls=tls)
    server.start()
    yield server
    server.stop()


def asked(server: Any, certs: Path, ca: str = "ca", client: str = "client") -> Discovery:
    return Discovery(
        server.url,
        str(certs / f"{ca}.pem") if ca else "",
        str(certs / f"{client}.pem") if client else "",
        str(certs / f"{client}.key") if client else "",
    )


def test_a_change_is_heard_of_over_tls(server: Any, certs: Path) -> None:
    server.put("one")
    store = open_store(asked(server, certs))
    content = store.read()
    assert content.text == "one"
    assert heard(store, content, lambda: server.put("two")) < 5
    assert store.read().text == "two"
    store.close()


@pytest.mark.parametrize(
    ("files", "host", "says"),
    [
        (
            {"ca": "other"},
            "127.0.0.1",
            r"not of --discovery-tls-ca-cert \S*other.pem .*name the",
        ),
        ({"ca": ""}, "127.0.0.1", r"not of a public CA .*name the CA.* as --discovery-tls-ca-cert"),
        ({}, "localhost", "certificate is for another name .*'localhost'.*connect by a name"),
        ({"client": "late"}, "127.0.0.1", r"--discovery-tls-cert \S*late.pem has expired; renew"),
        (
            {"client": "foreign"},
            "127.0.0.1",
            r"--discovery-tls-cert \S*foreign.pem .*of a CA that it trusts",
        ),
        ({"client": ""}, "127.0.0.1", "set --discovery-tls-cert and --discovery-tls-key"),
    ],
    ids=["wrong-ca", "no-ca", "wrong-name", "expired", "foreign", "no-certificate"],
)
def test_what_is_wrong_with_certificates_is_told_with_the_cure(
    server: Any, certs: Path, files: dict[str, str], host: str, says: str
) -> None:
    discovery = asked(server, certs, **files)
    discovery = Discovery(
        discovery.url.replace("127.0.0.1", host), discovery.ca, discovery.cert, discovery.key
    )
    store = open_store(discovery)
    with pytest.raises(StoreUnavailable, match=says) as caught:
        store.read()
    assert f"{host}:{server.port}" in str(caught.value)
    store.close()


def test_a_file_that_is_gone_is_told_and_nothing_else_happens(
    server: Any, certs: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(certs, tmp_path / "certs"))
    store = open_store(asked(server, mine))
    (mine / "ca.pem").unlink()
    with pytest.raises(StoreUnavailable, match=r"ca-cert \S*ca.pem cannot be read: no such file"):
        store.read()
    store.close()


def test_the_agent_follows_its_settings_over_tls(server: Any, certs: Path, tmp_path: Path) -> None:
    files = asked(server, certs)
    agent = Agent(
        tmp_path,
        *("-k", server.url, "--discovery-tls-ca-cert", files.ca),
        *("--discovery-tls-cert", files.cert, "--discovery-tls-key", files.key),
    )
    server.put(agent.settings("one"))
    agent.start()
    try:
        agent.eventually(lambda: agent.hosts() == ["one.test"])
        assert agent.metric(UP) == 1
        server.put(agent.settings("two"))
        agent.eventually(lambda: agent.hosts() == ["two.test"])
        assert agent.metric(REFUSED) == 0
    finally:
        agent.stop()
