"""Where instances may be reached: addresses and settings become admin URLs."""

from __future__ import annotations

from agent.config.settings import OpenResty
from agent.driver.targets import targets
from agent.model import Attachment, ProxyInstance, PublishedPort

NGINX = ProxyInstance(
    id="task1",
    name="edge_nginx.node1",
    attachments=(Attachment("edge_apps", "10.0.1.5"), Attachment("edge_admin", "10.0.2.5")),
    node_address="192.0.2.1",
    published=(PublishedPort(80, 80), PublishedPort(8081, 18081)),
)


def test_every_network_is_tried_then_the_node():
    (target,) = targets([NGINX], OpenResty())
    assert target.urls == (
        "http://10.0.1.5:8081",
        "http://10.0.2.5:8081",
        "http://192.0.2.1:18081",
    )


def test_the_named_network_is_the_only_one_with_or_without_its_stack():
    for name in ("admin", "edge_admin"):
        (target,) = targets([NGINX], OpenResty(admin_network=name))
        assert target.urls == ("http://10.0.2.5:8081", "http://192.0.2.1:18081")


def test_scheme_and_port_come_from_the_settings():
    (target,) = targets([NGINX], OpenResty(admin_tls=True, admin_port=80))
    assert target.urls == (
        "https://10.0.1.5:80",
        "https://10.0.2.5:80",
        "https://192.0.2.1:80",
    )


def test_ipv6_is_written_in_brackets():
    proxy = ProxyInstance(id="x", name="x", attachments=(Attachment("n", "fd00::5"),))
    assert targets([proxy], OpenResty())[0].urls == ("http://[fd00::5]:8081",)


def test_a_published_port_bound_to_one_address_is_reached_there():
    proxy = ProxyInstance(
        id="x",
        name="x",
        node_address="192.0.2.1",
        published=(PublishedPort(8081, 9, "127.0.0.1"), PublishedPort(8081, 10, "0.0.0.0")),
    )
    assert targets([proxy], OpenResty())[0].urls == ("http://127.0.0.1:9", "http://192.0.2.1:10")


def test_the_label_outlives_the_task_and_the_identity_does_not():
    (target,) = targets([NGINX], OpenResty())
    assert (target.name, target.id) == ("edge_nginx.node1", "task1")


def test_static_urls_stand_beside_what_was_found():
    found = targets([NGINX], OpenResty(urls=("unix:/run/admin.sock",)))
    assert [(item.name, item.static) for item in found] == [
        ("unix:/run/admin.sock", True),
        ("edge_nginx.node1", False),
    ]


def test_the_same_instance_seen_by_two_sources_is_one():
    assert len(targets([NGINX, NGINX], OpenResty())) == 1
