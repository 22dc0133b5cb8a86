"""The agent's fleet and an instance of whatever build: what it cannot do is rejected, no more."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from agent.config.settings import Extension, Settings
from agent.controller import SiteRenderer
from agent.driver.fleet import Fleet, Options
from agent.driver.openresty import connector
from agent.driver.targets import Target
from agent.metrics import Metrics
from agent.model import Desired, Host, Location, Membership, Peer, Site, TcpRoute, Upstream
from tests.dataplane.harness import (
    Backend,
    Proxy,
    free_port,
    nginx_has_stream_lua,
    request,
    wait_until,
)


@contextmanager
def fleet_of(proxy: Proxy, settings: Settings) -> Iterator[Fleet]:
    fleet = Fleet(
        writer="test",
        connect=connector(settings.openresty),
        renderer=SiteRenderer(settings),
        options=Options(heartbeat=0.2, site_quiet=0.01, site_max_wait=0.1),
        sink=Metrics(),
    )
    url = f"http://127.0.0.1:{proxy.admin_port}"
    fleet.set_instances((Target(id="one", name="one", urls=(url,), static=True),))
    fleet.start()
    try:
        yield fleet
    finally:
        fleet.stop(5)


def served(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: any\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def test_what_the_build_cannot_do_is_rejected_and_all_else_is_served(
    proxy: Proxy, backend: Backend
) -> None:
    settings = Settings(extensions=(Extension(name="nginx", port=proxy.http_port, ssl_port=0),))
    peers = (Peer("b0", "127.0.0.1", backend.port),)
    names = ("a.test/", "raw.test/", "tcp/one", "tcp/two")
    ports = (free_port(), free_port())
    desired = Desired(
        Membership({name: Upstream(name, peers) for name in names}),
        Site(
            (
                Host("a.test", (), (Location("/", "a.test/"),)),
                Host("raw.test", (), (), passthrough="raw.test/"),
            ),
            tcp=tuple(TcpRoute(port, name) for port, name in zip(ports, names[2:], strict=True)),
        ),
        (),
    )
    with fleet_of(proxy, settings) as fleet:
        fleet.apply(desired)
        wait_until(lambda: all(view.in_sync for view in fleet.views()), what="in sync")
        rejections = {item.subject: item for item in fleet.rejections()}
    assert request(proxy.http_port).status == 200
    if nginx_has_stream_lua():
        assert rejections == {}
        assert all(served(port) for port in ports)
    else:
        wanted = {"host raw.test", *(f"TCP port {port}" for port in ports)}
        assert set(rejections) == wanted
        for rejection in rejections.values():
            assert rejection.reason == "stream_unavailable"
            assert "has no stream Lua module" in rejection.message
        assert not any(served(port) for port in ports)
