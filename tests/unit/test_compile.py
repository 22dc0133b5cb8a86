"""From a snapshot to hosts, upstreams and peers; who keeps what; what stays the same object."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
from clusters import check_golden, instance, labels, service, settings, snapshot
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agent.compile import MAX_PEERS, Compiler, compile_snapshot
from agent.config.settings import Settings
from agent.model import (
    Attachment,
    Desired,
    Host,
    Instance,
    InstanceState,
    Peer,
    PeerState,
    PublishedPort,
    Rejection,
    Snapshot,
    SourceSnapshot,
    Tls,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

DEFAULTS = settings()
CERTIFICATE = labels(ssl="", ssl_cert="a.pem", ssl_cert_key="a.key")
OTHER_CERTIFICATE = labels(ssl="", ssl_cert="b.pem", ssl_cert_key="b.key")


class Clock:
    def __init__(self) -> None:
        self.now = 1200.0

    def __call__(self) -> float:
        return self.now


def compiled(*workloads: Workload, options: Settings = DEFAULTS, **kwargs) -> Desired:
    return compile_snapshot(snapshot(*workloads, **kwargs), options)


def peers(desired: Desired, upstream: str) -> list[tuple[str, str, int]]:
    found = desired.membership.upstreams[upstream].peers
    return [(peer.id, peer.address, peer.port) for peer in found]


def host(desired: Desired, name: str) -> Host:
    return next(item for item in desired.site.hosts if item.name == name)


def names(desired: Desired) -> list[str]:
    return [item.name for item in desired.site.hosts]


def only(desired: Desired) -> Rejection:
    assert len(desired.rejections) == 1, desired.rejections
    return desired.rejections[0]


# --- address and port


def test_the_one_shared_network_is_taken():
    both = instance("t1")
    both = replace(both, attachments=(Attachment("db", "10.9.0.1"), *both.attachments))
    desired = compiled(service("web", labels(hostname="a"), both, networks=("db", "edge")))
    assert peers(desired, "a.local/") == [("t1", "10.0.0.1", 80)]
    assert desired.rejections == ()


def test_the_label_decides_among_shared_networks():
    task = replace(
        instance("t1"), attachments=(Attachment("one", "10.1.0.1"), Attachment("two", "10.2.0.1"))
    )
    web = service("web", labels(hostname="a", network="two"), task, networks=("one", "two"))
    desired = compiled(web, proxy_networks=("one", "two"))
    assert peers(desired, "a.local/") == [("t1", "10.2.0.1", 80)]


def test_the_label_may_leave_out_the_name_of_the_stack():
    task = instance("t1", network="shop_front")
    web = service(
        "shop_web",
        labels(hostname="a", network="front"),
        task,
        networks=("shop_front",),
        stack="shop",
    )
    assert peers(compiled(web, proxy_networks=("shop_front",)), "a.local/")


def test_an_exact_name_goes_before_the_stack_s():
    task = replace(
        instance("t1"),
        attachments=(Attachment("front", "10.1.0.1"), Attachment("shop_front", "10.2.0.1")),
    )
    web = service(
        "shop_web",
        labels(hostname="a", network="front"),
        task,
        networks=("front", "shop_front"),
        stack="shop",
    )
    desired = compiled(web, proxy_networks=("front", "shop_front"))
    assert peers(desired, "a.local/") == [("t1", "10.1.0.1", 80)]


def test_several_shared_networks_without_a_label_are_refused_by_name():
    web = service("web", labels(hostname="a"), instance("t1"), networks=("edge", "front", "db"))
    refusal = only(compiled(web, proxy_networks=("edge", "front", "other")))
    assert refusal.reason == "network_ambiguous"
    assert "edge, front" in refusal.message
    assert "db" not in refusal.message
    assert "interlock.network=edge web" in refusal.hint


def test_no_shared_network_is_refused_with_both_sides_named():
    web = service("web", labels(hostname="a"), instance("t1"), networks=("db",))
    refusal = only(compiled(web, proxy_networks=("edge",)))
    assert refusal.reason == "network_not_shared"
    assert "db" in refusal.message
    assert "docker service update --network-add edge web" in refusal.hint


def test_a_label_with_an_unknown_network_is_refused_with_the_candidates():
    web = service("web", labels(hostname="a", network="egde"), instance("t1"))
    refusal = only(compiled(web))
    assert refusal.reason == "network_unknown"
    assert "edge" in refusal.message
    assert "interlock.network" in refusal.hint


def test_a_label_with_a_network_that_openresty_is_not_on_is_refused():
    web = service("web", labels(hostname="a", network="db"), instance("t1"), networks=("db",))
    refusal = only(compiled(web))
    assert refusal.reason == "network_not_shared"
    assert "docker service update --network-add db" in refusal.hint


def test_where_no_openresty_is_known_the_only_network_is_taken():
    web = service("web", labels(hostname="a"), instance("t1"))
    assert peers(compiled(web, proxy_networks=None), "a.local/")
    web = service("web", labels(hostname="a"), instance("t1"), networks=("edge", "db"))
    assert only(compiled(web, proxy_networks=None)).reason == "network_ambiguous"
    web = service("web", labels(hostname="a"), instance("t1"), networks=())
    assert only(compiled(web, proxy_networks=None)).reason == "network_not_shared"


def test_the_port_is_the_label_s_else_the_lowest_declared():
    web = service("web", labels(hostname="a", port="9000"), instance("t1"), ports=(80,))
    assert peers(compiled(web), "a.local/") == [("t1", "10.0.0.1", 9000)]
    web = service("web", labels(hostname="a"), instance("t1"), ports=(8080, 8000))
    assert peers(compiled(web), "a.local/") == [("t1", "10.0.0.1", 8000)]
    refusal = only(compiled(service("web", labels(hostname="a"), instance("t1"), ports=())))
    assert refusal.reason == "no_port"
    assert "interlock.port" in refusal.hint


def test_a_service_without_overlay_network_is_reached_at_its_nodes():
    tasks = [
        instance(
            f"t{number}",
            "",
            published=(PublishedPort(8443, 30443), PublishedPort(8080, 30080 + number)),
            node_address=f"192.0.2.{number}",
        )
        for number in (1, 2)
    ]
    wants = labels(hostname="a")
    web = service("web", wants, *tasks, networks=(), ports=(), host_ports_only=True)
    assert peers(compiled(web), "a.local/") == [
        ("t1", "192.0.2.1", 30081),
        ("t2", "192.0.2.2", 30082),
    ]
    web = replace(web, labels=labels(hostname="a", port="8443"))
    assert peers(compiled(web), "a.local/") == [
        ("t1", "192.0.2.1", 30443),
        ("t2", "192.0.2.2", 30443),
    ]
    web = replace(web, labels=labels(hostname="a", port="9"))
    refusal = only(compiled(web))
    assert refusal.reason == "not_published"
    assert "8080, 8443" in refusal.message


def test_a_service_in_the_host_s_network_is_reached_at_any_port_of_its_node():
    task = instance("t1", "", node_address="192.0.2.1", host_network=True)
    wants = labels(hostname="a", port="9000")
    web = service("web", wants, task, networks=(), ports=(), host_ports_only=True)
    assert peers(compiled(web), "a.local/") == [("t1", "192.0.2.1", 9000)]


def container(wants: dict[str, str], task: Instance, **kwargs) -> Workload:
    kwargs.setdefault("networks", ("bridge",))
    return service(
        "web-1", wants, task, kind=WorkloadKind.CONTAINER, source="engine", wanted=None, **kwargs
    )


def test_a_container_without_shared_network_is_reached_by_its_published_port():
    task = instance("c1", "172.17.0.2", network="bridge", published=(PublishedPort(80, 32768),))
    web = container(labels(hostname="a"), task)
    assert peers(compiled(web, proxy_networks=None), "a.local/") == [("c1", "127.0.0.1", 32768)]
    override = settings(backend_override_address="192.0.2.9")
    assert peers(compiled(web, options=override, proxy_networks=None), "a.local/") == [
        ("c1", "192.0.2.9", 32768)
    ]
    named = container(labels(hostname="a", port="80"), task)
    assert peers(compiled(named, options=override, proxy_networks=None), "a.local/") == [
        ("c1", "192.0.2.9", 32768)
    ], "Interlock lost the override where interlock.port was given"


@pytest.mark.parametrize(
    ("bound", "node", "address"),
    [
        ("192.0.2.7", "192.0.2.8", "192.0.2.7"),
        ("0.0.0.0", "192.0.2.8", "192.0.2.8"),
        ("::", "192.0.2.8", "192.0.2.8"),
        ("", "192.0.2.8", "192.0.2.8"),
        ("2001:db8::7", "", "2001:db8::7"),
        ("", "", "127.0.0.1"),
        ("::", "", "::1"),
    ],
)
def test_where_a_published_port_is_reached(bound, node, address):
    task = instance("c1", "", published=(PublishedPort(80, 32768, bound),), node_address=node)
    desired = compiled(container(labels(hostname="a"), task), proxy_networks=None)
    assert peers(desired, "a.local/") == [("c1", address, 32768)]


def test_of_an_ipv4_and_an_ipv6_publication_ipv4_is_taken():
    both = (PublishedPort(80, 32768, "::"), PublishedPort(80, 32769, "0.0.0.0"))
    task = instance("c1", "", published=both)
    desired = compiled(container(labels(hostname="a"), task), proxy_networks=None)
    assert peers(desired, "a.local/") == [("c1", "127.0.0.1", 32769)]


def test_a_container_of_a_remote_engine_without_a_known_address_is_not_sought_here():
    task = instance("c1", "", published=(PublishedPort(80, 32768),))
    remote = DEFAULTS.model_copy(update={"docker_url": "tcp://192.0.2.3:2376"})
    desired = compiled(container(labels(hostname="a"), task), options=remote, proxy_networks=None)
    assert peers(desired, "a.local/") == []
    assert only(desired).reason == "instance_no_address"


def test_a_container_shares_a_network_with_the_proxy():
    task = replace(
        instance("c1"),
        attachments=(Attachment("bridge", "172.17.0.2"), Attachment("front", "172.18.0.2")),
    )
    web = container(labels(hostname="a"), task, networks=("bridge", "front"))
    desired = compiled(web, proxy_networks=("bridge", "front"))
    assert peers(desired, "a.local/") == [("c1", "172.18.0.2", 80)]
    desired = compiled(web, proxy_networks=("bridge",))
    assert peers(desired, "a.local/") == [("c1", "172.17.0.2", 80)]


def test_a_container_with_a_network_label_is_reached_there():
    task = instance("c1", "172.18.0.2", network="front")
    web = container(labels(hostname="a", network="front", port="9"), task, networks=("front",))
    assert peers(compiled(web, proxy_networks=None), "a.local/") == [("c1", "172.18.0.2", 9)]


def test_a_container_that_publishes_nothing_is_refused():
    web = container(labels(hostname="a"), instance("c1", ""))
    refusal = only(compiled(web, proxy_networks=None))
    assert refusal.reason == "not_published"
    assert "interlock.network" in refusal.hint


def test_static_peers_are_as_they_are():
    tasks = (
        replace(instance("s1", "192.0.2.1"), published=(PublishedPort(81, 81),)),
        replace(instance("s2", "2001:db8::2"), weight=5),
    )
    web = service("web", labels(hostname="a"), *tasks, kind=WorkloadKind.STATIC, source="static")
    assert peers(compiled(web, proxy_networks=None), "a.local/") == [
        ("s1", "192.0.2.1", 81),
        ("s2", "2001:db8::2", 80),
    ]


# --- states, weights, hold


def test_states():
    tasks = [
        instance(f"t-{state.value}", f"10.0.0.{number}", state)
        for number, state in enumerate(InstanceState, start=1)
    ]
    desired = compiled(service("web", labels(hostname="a"), *tasks))
    found = desired.membership.upstreams["a.local/"].peers
    assert [(peer.id, peer.state) for peer in found] == [
        ("t-draining", PeerState.DRAINING),
        ("t-up", PeerState.UP),
    ]


def test_the_weight_is_the_instance_s_else_the_label_s_else_one():
    tasks = (instance("t1", weight=7), instance("t2"))
    desired = compiled(service("web", labels(hostname="a", weight="3"), *tasks))
    assert [peer.weight for peer in desired.membership.upstreams["a.local/"].peers] == [7, 3]
    desired = compiled(service("web", labels(hostname="a"), instance("t1")))
    assert desired.membership.upstreams["a.local/"].peers[0].weight == 1


@pytest.mark.parametrize(("wanted", "hold"), [(None, 0.0), (0, 0.0), (1, 15.0), (4, 15.0)])
def test_a_request_is_held_only_where_an_instance_is_wanted(wanted, hold):
    desired = compiled(service("web", labels(hostname="a"), wanted=wanted))
    upstream = desired.membership.upstreams["a.local/"]
    assert (upstream.peers, upstream.hold) == ((), hold)
    assert names(desired) == ["a.local"]
    assert desired.rejections == ()


def test_hold_stays_within_what_the_admin_api_takes():
    desired = compiled(
        service("web", labels(hostname="a"), wanted=1), options=settings(hold_timeout=3600.0)
    )
    assert desired.membership.upstreams["a.local/"].hold == 300.0


@pytest.mark.parametrize(
    "address", ["", "0.0.0.0", "::", "web.example.com", "10.0.0.300", "fe80::1%eth0"]
)
def test_one_running_instance_without_an_address_does_not_harm_the_others(address):
    tasks = (instance("t1"), instance("t2", address))
    desired = compiled(service("web", labels(hostname="a"), *tasks))
    assert peers(desired, "a.local/") == [("t1", "10.0.0.1", 80)]
    assert only(desired).reason == "instance_no_address"
    assert "t2-name" in only(desired).message


@pytest.mark.parametrize(
    "state", [InstanceState.DRAINING, InstanceState.WAITING, InstanceState.GONE]
)
def test_an_instance_that_is_not_up_may_lack_an_address(state):
    desired = compiled(service("web", labels(hostname="a"), instance("t1", "", state)))
    assert desired.rejections == ()


def test_no_more_peers_than_the_admin_api_takes():
    many = [instance(f"t{n:05}", f"10.0.{n >> 8}.{n & 255}") for n in range(1, MAX_PEERS + 2)]
    desired = compiled(service("web", labels(hostname="a"), *many))
    assert len(desired.membership.upstreams["a.local/"].peers) == MAX_PEERS
    assert only(desired).reason == "too_many_peers"


def test_peer_ids_are_unique_and_such_as_the_admin_api_takes():
    tasks = (instance("x", "10.0.0.1"), instance("x", "10.0.0.2"), instance("ü\n" * 99, "10.0.0.3"))
    desired = compiled(service("web", labels(hostname="a"), *tasks))
    ids = [peer.id for peer in desired.membership.upstreams["a.local/"].peers]
    assert len(set(ids)) == 3
    assert {"x", "x#2"} < set(ids)
    assert all(item.isascii() and item.isprintable() and len(item) <= 128 for item in ids)


# --- TLS


def test_certificates_lie_below_the_certificate_directory():
    desired = compiled(service("web", labels(hostname="a") | CERTIFICATE, instance("t1")))
    assert host(desired, "a.local").tls == Tls(
        "/etc/tidegate/certs/a.pem", "/etc/tidegate/certs/a.key"
    )


def test_tls_without_a_certificate_takes_the_default():
    web = service("web", labels(hostname="a", ssl_only=""), instance("t1"))
    refusal = only(compiled(web))
    assert refusal.reason == "no_certificate"
    assert "interlock.ssl_cert" in refusal.hint
    options = settings(ssl_default_cert="d.pem", ssl_default_cert_key="/run/secrets/d.key")
    desired = compiled(web, options=options)
    assert host(desired, "a.local").tls == Tls(
        "/etc/tidegate/certs/d.pem", "/run/secrets/d.key", hsts="max-age=16000000"
    )
    assert host(desired, "a.local").locations[0].tls_only


def test_half_a_certificate_is_refused_even_with_a_default():
    web = service("web", labels(hostname="a", ssl="", ssl_cert="a.pem"), instance("t1"))
    assert (
        only(compiled(web, options=settings(ssl_default_cert="d.pem"))).reason == "no_certificate"
    )


def test_tls_with_tls_switched_off_is_refused():
    web = service("web", labels(hostname="a") | CERTIFICATE, instance("t1"))
    desired = compiled(web, options=settings(ssl_port=0))
    assert only(desired).reason == "tls_off"
    assert desired.site.hosts == ()


def test_haproxys_certificate_serves_every_host_over_tls_but_those_that_say_no():
    haproxy = settings(name="haproxy", ssl_cert="/ssl/all.pem")
    web = service("web", labels(hostname="a"), instance("t1"))
    plain = service("plain", labels(hostname="b", ssl="false"), instance("t2", "10.0.0.2"))
    desired = compiled(web, plain, options=haproxy)
    assert host(desired, "a.local").tls == Tls("/ssl/all.pem", "/ssl/all.pem")
    assert host(desired, "b.local").tls is None
    assert desired.rejections == ()


# --- who keeps what


def test_services_that_agree_serve_together():
    old = service("v1", labels(hostname="a", port="81", weight="9"), instance("t1"), created=1.0)
    new = service("v2", labels(hostname="a"), instance("t2", "10.0.0.2"), created=2.0, wanted=0)
    desired = compiled(new, old)
    assert peers(desired, "a.local/") == [("t1", "10.0.0.1", 81), ("t2", "10.0.0.2", 80)]
    assert desired.membership.upstreams["a.local/"].hold == 15.0
    assert desired.rejections == ()


@pytest.mark.parametrize(
    "options",
    [
        labels(context_root_rewrite="true", context_root="/x"),
        labels(context_root="/x") | CERTIFICATE,
        labels(context_root="/x", ssl_only="") | CERTIFICATE,
    ],
)
def test_services_that_differ_do_not_and_the_older_keeps_it(options):
    old = service("v1", labels(hostname="a", context_root="/x"), instance("t1"), created=1.0)
    new = service("v2", labels(hostname="a") | options, instance("t2"), created=2.0)
    for workloads in ((old, new), (new, old)):
        desired = compiled(*workloads)
        assert peers(desired, "a.local/x") == [("t1", "10.0.0.1", 80)]
        refusal = only(desired)
        assert (refusal.subject, refusal.reason) == ("service v2", "conflict")
        assert "service v1" in refusal.message
    older = replace(new, created=0.5)
    assert only(compiled(old, older)).subject == "service v1"


def test_of_equal_age_the_key_decides():
    one = service("v1", labels(hostname="a"), instance("t1"))
    two = service("v2", labels(hostname="a", ssl_only="") | CERTIFICATE, instance("t2"))
    assert only(compiled(two, one)).subject == "service v2"


def test_tls_belongs_to_the_host_and_who_says_nothing_takes_it():
    root = service("web", labels(hostname="a"), instance("t1"), created=1.0)
    api = service("api", labels(hostname="a", context_root="/api") | CERTIFICATE, created=2.0)
    desired = compiled(root, api)
    assert desired.rejections == ()
    assert host(desired, "a.local").tls is not None
    assert [item.path for item in host(desired, "a.local").locations] == ["/", "/api"]


@pytest.mark.parametrize("other", [OTHER_CERTIFICATE, labels(ssl="false")])
def test_other_tls_on_another_context_root_is_refused(other):
    root = service("web", labels(hostname="a") | CERTIFICATE, instance("t1"), created=1.0)
    api = service("api", labels(hostname="a", context_root="/api") | other, created=2.0)
    desired = compiled(root, api)
    refusal = only(desired)
    assert (refusal.subject, refusal.reason) == ("service api", "tls_conflict")
    assert "service web" in refusal.message
    assert [item.path for item in host(desired, "a.local").locations] == ["/"]


def test_who_lost_comes_in_when_the_older_goes():
    clock = Clock()
    compiler = Compiler(clock=clock)
    old = service("v1", labels(hostname="a"), instance("t1"), created=1.0)
    new = service("v2", labels(hostname="a") | CERTIFICATE, instance("t2"), created=2.0)
    assert only(compiler.compile(snapshot(old, new), DEFAULTS)).reason == "conflict"
    desired = compiler.compile(snapshot(new), DEFAULTS)
    assert desired.rejections == ()
    assert [peer.id for peer in desired.membership.upstreams["a.local/"].peers] == ["t2"]
    assert host(desired, "a.local").tls is not None


# --- aliases


def test_an_alias_with_the_same_table_is_folded_into_its_host():
    wants = labels(hostname="a", alias_domain__0="z.example.com", alias_domain__1="b.example.com")
    desired = compiled(service("web", wants | CERTIFICATE, instance("t1")))
    assert names(desired) == ["a.local"]
    assert host(desired, "a.local").aliases == ("b.example.com", "z.example.com")
    assert list(desired.membership.upstreams) == ["a.local/"]


def test_an_alias_with_another_table_is_a_host_of_its_own():
    web = service("web", labels(hostname="a", alias_domain="b.example.com"), instance("t1"))
    api = service(
        "api", labels(hostname="b", domain="example.com", context_root="/api"), created=2.0
    )
    desired = compiled(web, api)
    assert names(desired) == ["a.local", "b.example.com"]
    assert [item.path for item in host(desired, "b.example.com").locations] == ["/", "/api"]
    assert peers(desired, "b.example.com/") == peers(desired, "a.local/")


def test_an_alias_is_a_claim_like_any_other():
    old = service("v1", labels(hostname="a", alias_domain="b.example.com"), instance("t1"))
    new = service(
        "v2",
        labels(hostname="b", domain="example.com") | CERTIFICATE,
        instance("t2"),
        created=2.0,
    )
    desired = compiled(old, new)
    assert only(desired).subject == "service v2"
    assert names(desired) == ["a.local"]
    assert host(desired, "a.local").aliases == ("b.example.com",)


def test_an_alias_that_is_lost_leaves_the_host_alone():
    old = service("v1", labels(hostname="b", domain="example.com") | CERTIFICATE, instance("t1"))
    new = service(
        "v2", labels(hostname="a", alias_domain="b.example.com"), instance("t2"), created=2.0
    )
    desired = compiled(old, new)
    assert only(desired).subject == "service v2"
    assert names(desired) == ["a.local", "b.example.com"]
    assert peers(desired, "b.example.com/") == [("t1", "10.0.0.1", 80)]


def test_a_name_shared_by_two_hosts_is_served_by_both():
    one = service("v1", labels(hostname="a", alias_domain="s.example.com"), instance("t1"))
    two = service(
        "v2", labels(hostname="b", alias_domain="s.example.com"), instance("t2", "10.0.0.2")
    )
    desired = compiled(one, two)
    assert names(desired) == ["a.local", "b.local", "s.example.com"]
    assert [peer[0] for peer in peers(desired, "s.example.com/")] == ["t1", "t2"]


# --- what stays over time


def test_a_second_shared_network_does_not_take_down_a_service_that_is_served():
    compiler = Compiler()
    web = service("web", labels(hostname="a"), instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    both = replace(web, networks=("edge", "extra"))
    after = compiler.compile(snapshot(both, proxy_networks=("edge", "extra")), DEFAULTS)
    assert after.membership.upstreams["a.local/"] == before.membership.upstreams["a.local/"]
    assert only(after).reason == "network_ambiguous"
    assert "still reached over edge" in only(after).message


def test_tasks_still_on_the_former_network_serve_while_an_update_moves_the_service():
    moved = service(
        "web",
        labels(hostname="a"),
        instance("old", "10.0.0.1", network="edge"),
        instance("new", "10.1.0.1", network="extra"),
        networks=("extra",),
    )
    desired = compiled(moved, proxy_networks=("edge", "extra"))
    peers = desired.membership.upstreams["a.local/"].peers
    assert {(peer.id, peer.address) for peer in peers} == {
        ("old", "10.0.0.1"),
        ("new", "10.1.0.1"),
    }


def test_a_draining_task_without_its_port_leaves_the_route_waiting_for_the_next():
    web = service(
        "web",
        labels(hostname="a", port="8080"),
        instance("old", "", InstanceState.DRAINING, node_address="192.0.2.1"),
        networks=(),
        host_ports_only=True,
    )
    desired = compiled(web)
    upstream = desired.membership.upstreams["a.local/"]
    assert (upstream.peers, desired.rejections) == ((), ())
    assert upstream.hold > 0


def test_a_host_that_nobody_claims_lingers_without_peers_and_then_goes():
    clock = Clock()
    compiler = Compiler(clock=clock)
    web = service(
        "web", labels(hostname="a", alias_domain="b.example.com") | CERTIFICATE, instance("t1")
    )
    before = compiler.compile(snapshot(web), DEFAULTS)
    assert compiler.next_expiry is None

    after = compiler.compile(snapshot(), DEFAULTS)
    assert after.site is before.site
    upstream = after.membership.upstreams["a.local/"]
    assert (upstream.peers, upstream.hold) == ((), 0.0)
    assert compiler.next_expiry == clock.now + 600.0

    clock.now += 599.9
    assert compiler.compile(snapshot(), DEFAULTS) is after
    clock.now += 0.2
    gone = compiler.compile(snapshot(), DEFAULTS)
    assert (gone.site.hosts, dict(gone.membership.upstreams)) == ((), {})
    assert compiler.next_expiry is None


def test_hosts_that_are_lost_within_that_time_go_together():
    clock = Clock()
    compiler = Compiler(clock=clock)
    first = service("one", labels(hostname="a"), instance("t1"))
    second = service("two", labels(hostname="b"), instance("t2"))
    compiler.compile(snapshot(first, second), DEFAULTS)
    clock.now += 10.0
    compiler.compile(snapshot(second), DEFAULTS)
    clock.now += 300.0
    compiler.compile(snapshot(), DEFAULTS)
    deadline = compiler.next_expiry
    assert deadline is not None
    clock.now = deadline - 0.1
    assert len(compiler.compile(snapshot(), DEFAULTS).site.hosts) == 2
    clock.now = deadline
    assert compiler.compile(snapshot(), DEFAULTS).site.hosts == ()
    assert compiler.next_expiry is None


def test_a_service_that_comes_back_within_that_time_changes_no_site():
    clock = Clock()
    compiler = Compiler(clock=clock)
    web = service("web", labels(hostname="a"), instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    compiler.compile(snapshot(), DEFAULTS)
    clock.now += 300.0
    again = service("web", labels(hostname="a"), instance("t9"), created=clock.now)
    after = compiler.compile(snapshot(again), DEFAULTS)
    assert after.site is before.site
    assert [peer.id for peer in after.membership.upstreams["a.local/"].peers] == ["t9"]
    clock.now += 10_000.0
    assert compiler.compile(snapshot(again), DEFAULTS) is after


def test_a_context_root_lingers_beside_one_that_lives():
    clock = Clock()
    compiler = Compiler(clock=clock)
    web = service("web", labels(hostname="a"), instance("t1"))
    api = service("api", labels(hostname="a", context_root="/api") | CERTIFICATE, instance("t2"))
    before = compiler.compile(snapshot(web, api), DEFAULTS)
    after = compiler.compile(snapshot(web), DEFAULTS)
    assert after.site is before.site
    assert after.membership.upstreams["a.local/api"].peers == ()
    clock.now += 601.0
    last = compiler.compile(snapshot(web), DEFAULTS)
    assert [item.path for item in host(last, "a.local").locations] == ["/"]
    assert host(last, "a.local").tls is None
    assert list(last.membership.upstreams) == ["a.local/"]


def test_a_route_that_turns_bad_keeps_its_host_for_that_time():
    compiler = Compiler(clock=Clock())
    web = service("web", labels(hostname="a"), instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    bad = replace(web, labels=labels(hostname="a", port="x"))
    after = compiler.compile(snapshot(bad), DEFAULTS)
    assert after.site is before.site
    assert after.membership.upstreams["a.local/"].peers == ()
    assert only(after).reason == "invalid_label"


def test_an_alias_taken_off_a_host_that_lives_goes_at_once():
    compiler = Compiler(clock=Clock())
    web = service("web", labels(hostname="a", alias_domain="b.example.com"), instance("t1"))
    compiler.compile(snapshot(web), DEFAULTS)
    after = compiler.compile(snapshot(replace(web, labels=labels(hostname="a"))), DEFAULTS)
    assert [(item.name, item.aliases) for item in after.site.hosts] == [("a.local", ())]


def test_without_linger_a_host_goes_at_once():
    compiler = Compiler(clock=Clock())
    options = settings(host_linger=0.0)
    compiler.compile(snapshot(service("web", labels(hostname="a"), instance("t1"))), options)
    assert compiler.compile(snapshot(), options).site.hosts == ()


def test_another_service_takes_over_a_lingering_host():
    compiler = Compiler(clock=Clock())
    old = service("v1", labels(hostname="a") | CERTIFICATE, instance("t1"))
    compiler.compile(snapshot(old), DEFAULTS)
    compiler.compile(snapshot(), DEFAULTS)
    new = service("v2", labels(hostname="a"), instance("t2"), created=9.0)
    desired = compiler.compile(snapshot(new), DEFAULTS)
    assert host(desired, "a.local").tls is None
    assert [peer.id for peer in desired.membership.upstreams["a.local/"].peers] == ["t2"]


# --- what stays the same object


def test_only_what_changed_is_another_object():
    compiler = Compiler()
    workloads = {
        item.key: item
        for item in (
            service(f"w{n}", labels(hostname=f"h{n}", alias_domain=f"x{n}"), instance(f"t{n}"))
            for n in range(20)
        )
    }
    workloads[WorkloadKey("swarm", "bad")] = service("bad", labels(hostname="a b"))

    def see(seen: dict[WorkloadKey, Workload]) -> Desired:
        return compiler.compile(
            Snapshot({"swarm": SourceSnapshot("swarm", seen, proxy_networks=("edge",))}), DEFAULTS
        )

    first = see(workloads)
    assert see(workloads) is first
    assert see(dict(workloads)) is first
    key = WorkloadKey("swarm", "id-w7")
    changed = workloads | {
        key: replace(workloads[key], instances=(instance("t7"), instance("t7b", "10.0.0.2")))
    }
    second = see(changed)
    assert second.site is first.site
    assert second.rejections is first.rejections
    differ = {
        name
        for name, upstream in second.membership.upstreams.items()
        if upstream is not first.membership.upstreams[name]
    }
    assert differ == {"h7.local/"}
    waiting = instance("t7c", "", InstanceState.WAITING)
    more = replace(changed[key], instances=(*changed[key].instances, waiting))
    assert see(changed | {key: more}) is second


def test_other_settings_are_heeded():
    compiler = Compiler()
    web = service("web", labels(hostname="a") | CERTIFICATE, instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    assert compiler.compile(snapshot(web), settings()) is before
    after = compiler.compile(snapshot(web), settings(ssl_cert_path="/certs/"))
    assert host(after, "a.local").tls == Tls("/certs/a.pem", "/certs/a.key")
    assert after.membership is before.membership


def test_other_networks_of_the_proxies_are_heeded():
    compiler = Compiler()
    web = service("web", labels(hostname="a"), instance("t1"))
    seen = snapshot(web)
    assert compiler.compile(seen, DEFAULTS).rejections == ()
    assert only(compiler.compile(snapshot(web, proxy_networks=()), DEFAULTS))
    assert compiler.compile(seen, DEFAULTS).rejections == ()


def test_a_source_that_goes_takes_its_workloads_along():
    compiler = Compiler()
    web = service("web", labels(hostname="a b"), source="engine", kind=WorkloadKind.CONTAINER)
    assert compiler.compile(snapshot(web), DEFAULTS).rejections
    assert compiler.compile(Snapshot({}), DEFAULTS).rejections == ()


def test_rejections_of_sources_are_passed_on_sorted_and_once():
    odd = Rejection("service z", "odd", "It is odd.", "Make it even.", "swarm")
    seen = snapshot(service("web", labels(hostname="a b")))
    source = replace(seen.sources["swarm"], rejections=(odd, odd))
    desired = compile_snapshot(Snapshot({"swarm": source}), DEFAULTS)
    assert [item.reason for item in desired.rejections] == ["invalid_host", "odd"]


# --- anything at all

WORDS = st.sampled_from(["a", "b", "c", "", "*", "x y"])
ROOTS = st.sampled_from(["/", "/x", "/y/", "bad"])
FLAGS = st.sampled_from([None, "true", "false"])


@st.composite
def any_workload(draw, number: int) -> Workload:
    wants = {"interlock.hostname": draw(WORDS)}
    for name, values in (
        ("alias_domain", WORDS.map(lambda word: f"{word}.local")),
        ("context_root", ROOTS),
        ("context_root_rewrite", FLAGS),
        ("ssl", FLAGS),
        ("ssl_only", FLAGS),
        ("ssl_cert", st.sampled_from([None, "a.pem", "b.pem"])),
        ("ssl_passthrough", FLAGS),
        ("canary.weight", st.sampled_from(["5", "10"])),
        ("mirror", WORDS.map(lambda word: f"{word}.local")),
        ("default_backend", FLAGS),
        ("tcp_port", st.sampled_from(["5432", "5433", "80"])),
        ("redirects", st.sampled_from(["a.local,z.local", "b.local,z.local"])),
        ("x.hostname", WORDS),
        ("x.canary.weight", st.just("5")),
        ("balance_algorithm", st.sampled_from(["first", "bad"])),
    ):
        value = draw(values)
        if value is not None and draw(st.booleans()):
            wants[f"interlock.{name}"] = value
    if "interlock.ssl_cert" in wants:
        wants["interlock.ssl_cert_key"] = "a.key"
    tasks = tuple(
        instance(f"t{number}-{n}", f"10.0.{number}.{n}", draw(st.sampled_from(InstanceState)))
        for n in range(draw(st.integers(0, 2)))
    )
    return service(
        f"w{number}", wants, *tasks, created=draw(st.sampled_from([1.0, 2.0])), wanted=len(tasks)
    )


@given(data=st.data())
@hypothesis_settings(max_examples=200, deadline=None)
def test_step_by_step_is_the_same_as_at_once(data):
    """However a cluster came about: what is kept between snapshots never shows."""
    options = settings(host_linger=0.0, ssl_default_cert="d.pem")
    compiler = Compiler()
    current: dict[int, Workload] = {}
    for _ in range(data.draw(st.integers(2, 6))):
        number = data.draw(st.integers(0, 4))
        if number in current and data.draw(st.booleans()):
            del current[number]
        else:
            current[number] = data.draw(any_workload(number))
        seen = snapshot(*current.values())
        assert compiler.compile(seen, options) == compile_snapshot(seen, options)


@given(
    address=st.text(max_size=20),
    port=st.integers(-5, 70_000),
    weight=st.none() | st.integers(-5, 2_000),
    id_=st.text(max_size=200),
    kind=st.sampled_from(WorkloadKind),
    value=st.text(max_size=50),
)
def test_whatever_a_workload_says_its_neighbour_is_served(address, port, weight, id_, kind, value):
    odd = Instance(
        id=id_,
        name=value,
        state=InstanceState.UP,
        attachments=(Attachment("edge", address),),
        published=(PublishedPort(port, port, address),),
        weight=weight,
    )
    wants = {"interlock.hostname": "odd", "interlock.network": value, f"interlock.{value}": value}
    bad = service("bad", wants, odd, kind=kind, ports=(port,))
    good = service("good", labels(hostname="good"), instance("t1"))
    desired = compiled(bad, good)
    assert peers(desired, "good.local/") == [("t1", "10.0.0.1", 80)]
    for upstream in desired.membership.upstreams.values():
        for peer in upstream.peers:
            assert 1 <= peer.port <= 65535
            assert 0 <= peer.weight <= 1000
            assert 1 <= len(peer.id) <= 128
            assert peer.id.isascii()


def as_json(desired: Desired) -> str:
    def plain(value: object) -> object:
        if isinstance(value, Peer):
            return f"{value.id} {value.address} {value.port} weight={value.weight} {value.state}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            # What is as it would be anyhow is left out, so that the file shows what was decided.
            return {
                field.name: plain(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if getattr(value, field.name) != field.default or field.name == "algorithm"
            }
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return json.dumps(plain(desired), indent=2) + "\n"


def test_golden_cluster():
    """A cluster with a bit of everything; any change of behaviour shows in the golden file."""
    cluster = [
        service(
            "shop_web",
            labels(
                hostname="shop",
                domain="example.com",
                alias_domain__0="www.example.com",
                alias_domain__1="bücher.example.com",
                ssl_only="",
                ssl_cert="shop.pem",
                ssl_cert_key="shop.key",
                websocket_endpoint="ws://shop.example.com/ws",
            ),
            instance("web1", "10.0.1.1"),
            instance("web2", "10.0.1.2", InstanceState.DRAINING),
            instance("web3", "", InstanceState.WAITING),
            stack="shop",
            wanted=2,
        ),
        service(
            "shop_api",
            labels(
                hostname="api",
                domain="example.com",
                context_root="/v1/",
                context_root_rewrite="yes",
                port="8080",
                weight="10",
            ),
            instance("api1", "10.0.2.1"),
            created=2.0,
        ),
        service(
            "shop_api_canary",
            labels(
                hostname="api",
                domain="example.com",
                context_root="/v1",
                context_root_rewrite="1",
                port="8081",
            ),
            instance("api2", "10.0.2.2"),
            created=3.0,
        ),
        service("late", labels(hostname="shop", domain="example.com"), created=4.0),
        service("asleep", labels(hostname="asleep"), wanted=0),
        service("lost", labels(hostname="lost"), instance("lost1"), networks=("elsewhere",)),
        service("typo", labels(hostname="typo", contextroot="/x"), instance("typo1")),
        service("evil", labels(hostname='a";return 200', port="80")),
        container(
            labels(hostname="*", domain="dev.example.com"),
            instance("c1", "", published=(PublishedPort(3000, 32768, "0.0.0.0"),)),
        ),
    ]
    check_golden("compile/cluster.json", as_json(compiled(*cluster)))
