"""The admin listener over TLS: who gets in is who shows a certificate of the right authority."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.config.settings import OpenResty
from agent.driver.openresty import Instance, Token
from agent.driver.targets import Target
from agent.errors import DriverError, InstanceUnauthorized
from agent.model import Membership
from tests.certificates import authority, certificate
from tests.dataplane.harness import Proxy, wait_until

TOKEN = "s3cret"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    authority(directory, "ca")
    certificate(directory, "server", ca="ca", names="IP:127.0.0.1")
    certificate(directory, "agent", ca="ca", names="DNS:agent")
    return directory


@pytest.fixture
def proxy(make_proxy: Callable[..., Proxy], certs: Path) -> Proxy:
    proxy = make_proxy(
        token=TOKEN,
        env={
            "TIDEGATE_ADMIN_TLS_CERT": str(certs / "server.pem"),
            "TIDEGATE_ADMIN_TLS_KEY": str(certs / "server.key"),
            "TIDEGATE_ADMIN_TLS_CLIENT_CA": str(certs / "ca.pem"),
        },
    )
    proxy.launch()
    return proxy


def client(proxy: Proxy, certs: Path, *, token: str = TOKEN, name: str = "agent") -> Instance:
    own = {"tls_cert": str(certs / f"{name}.pem"), "tls_key": str(certs / f"{name}.key")}
    return Instance(
        Target(id="x", name="x", urls=(f"https://127.0.0.1:{proxy.admin_port}",), static=True),
        OpenResty(tls_ca=str(certs / "ca.pem"), **(own if name else {})),
        Token(token=token, file=""),
    )


def answers(proxy: Proxy, certs: Path) -> bool:
    try:
        return bool(client(proxy, certs).status().instance)
    except DriverError:
        return False


def test_an_agent_with_certificate_and_token_pushes(proxy: Proxy, certs: Path) -> None:
    wait_until(lambda: answers(proxy, certs), what="the admin listener answers over TLS")
    agent = client(proxy, certs)
    agent.put(writer="agent", revision=1, membership=Membership({}))
    assert agent.status().revision == 1


def test_neither_alone_is_enough(proxy: Proxy, certs: Path) -> None:
    wait_until(lambda: answers(proxy, certs), what="the admin listener answers over TLS")
    with pytest.raises(InstanceUnauthorized):
        client(proxy, certs, token="wrong").status()
    with pytest.raises(DriverError):
        client(proxy, certs, name="").status()
