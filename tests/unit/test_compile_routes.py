"""Several routes, canaries, mirrors, TCP and what else a route can be, from snapshot to desired."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from clusters import check_golden, instance, labels, service, settings, snapshot
from test_compile import as_json

from agent.compile import Compiler, compile_snapshot
from agent.compile.conflicts import POLICY_LABELS
from agent.config.settings import OpenResty, Settings
from agent.labels.names import OPTIONS
from agent.model import (
    Algorithm,
    Attachment,
    BackendTls,
    Canary,
    Desired,
    Host,
    InstanceState,
    Location,
    PeerState,
    Policy,
    Protocol,
    Redirect,
    Rejection,
    TcpRoute,
    Tls,
    VerifyClient,
    Workload,
    WorkloadKind,
)

DEFAULTS = settings()
CERTIFICATE = labels(ssl="", ssl_cert="a.pem", ssl_cert_key="a.key")


def docker(**values: str) -> dict[str, str]:
    return {"com.docker.lb." + name.replace("__", "."): value for name, value in values.items()}


def compiled(*workloads: Workload, options: Settings = DEFAULTS, **kwargs) -> Desired:
    return compile_snapshot(snapshot(*workloads, **kwargs), options)


def host(desired: Desired, name: str) -> Host:
    return next(item for item in desired.site.hosts if item.name == name)


def location(desired: Desired, name: str, path: str = "/") -> Location:
    return next(item for item in host(desired, name).locations if item.path == path)


def ids(desired: Desired, upstream: str) -> list[str]:
    return [peer.id for peer in desired.membership.upstreams[upstream].peers]


def only(desired: Desired) -> Rejection:
    assert len(desired.rejections) == 1, desired.rejections
    return desired.rejections[0]


# --- several routes on one service


def test_a_service_serves_several_hosts_by_several_ports():
    wants = labels(hostname="a", port="8080", b__hostname="b", b__port="9090")
    desired = compiled(service("web", wants, instance("t1")))
    assert desired.rejections == ()
    ports = {
        name: [peer.port for peer in upstream.peers]
        for name, upstream in desired.membership.upstreams.items()
    }
    assert ports == {"a.local/": [8080], "b.local/": [9090]}


def test_a_route_that_cannot_be_served_leaves_the_others_alone():
    wants = labels(hostname="a", b__hostname="b", b__network="nowhere")
    desired = compiled(service("web", wants, instance("t1")))
    assert [item.name for item in desired.site.hosts] == ["a.local"]
    assert "interlock.b.network=nowhere" in only(desired).message


def test_a_further_route_leaves_the_first_as_it_is():
    compiler = Compiler()
    web = service("web", labels(hostname="b"), instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    more = replace(web, labels=labels(hostname="b", a__hostname="a"))
    after = compiler.compile(snapshot(more), DEFAULTS)
    assert after.membership.upstreams["b.local/"] is before.membership.upstreams["b.local/"]
    assert host(after, "b.local") is host(before, "b.local")


# --- the other dialect


def test_secrets_lie_where_openresty_has_them():
    wants = docker(hosts="a.example.com", ssl_cert="a.cert", ssl_key="a.key", ssl_backend="true")
    wants |= docker(ssl_backend_ca="ca", ssl_backend_cert="me.cert", ssl_backend_cert_key="me.key")
    desired = compiled(service("web", wants, instance("t1")))
    assert desired.rejections == ()
    assert host(desired, "a.example.com").tls == Tls("/run/secrets/a.cert", "/run/secrets/a.key")
    assert location(desired, "a.example.com").backend_tls == BackendTls(
        True, "/run/secrets/ca", "", "/run/secrets/me.cert", "/run/secrets/me.key"
    )
    elsewhere = settings(ssl_secret_path="/secrets/")
    desired = compiled(service("web", wants, instance("t1")), options=elsewhere)
    assert host(desired, "a.example.com").tls == Tls("/secrets/a.cert", "/secrets/a.key")


def test_half_a_certificate_is_refused_in_the_words_of_its_dialect():
    wants = docker(hosts="a.example.com", ssl_cert="a.cert")
    refusal = only(compiled(service("web", wants, instance("t1"))))
    assert refusal.reason == "no_certificate"
    assert "com.docker.lb.ssl_key" in refusal.message
    assert "Docker secrets" in refusal.hint


def test_services_of_both_dialects_that_share_a_host_merge_their_peers():
    one = service("v1", docker(hosts="a.local", weight="9"), instance("t1"))
    two = service("v2", labels(hostname="a"), instance("t2", "10.0.0.2"))
    desired = compiled(one, two)
    assert desired.rejections == ()
    peers = desired.membership.upstreams["a.local/"].peers
    assert [(peer.id, peer.weight) for peer in peers] == [("t1", 9), ("t2", 1)]


def with_vip(wants: dict[str, str], *tasks) -> Workload:
    web = service("web", wants, *tasks)
    return replace(web, vips=(Attachment("other", "10.9.0.2"), Attachment("edge", "10.0.0.200")))


def test_with_backend_mode_vip_the_virtual_ip_is_the_one_peer():
    wants = docker(hosts="a.local", port="8080", backend_mode="vip", weight="3")
    desired = compiled(with_vip(wants, instance("t1"), instance("t2", "10.0.0.2")))
    assert desired.rejections == ()
    (peer,) = desired.membership.upstreams["a.local/"].peers
    assert (peer.address, peer.port, peer.weight) == ("10.0.0.200", 8080, 3)
    assert peer.state is PeerState.UP


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((), []),
        ((InstanceState.WAITING, InstanceState.GONE), []),
        ((InstanceState.DRAINING,), [PeerState.DRAINING]),
        ((InstanceState.DRAINING, InstanceState.UP), [PeerState.UP]),
    ],
)
def test_a_virtual_ip_is_as_good_as_the_best_task_behind_it(states, expected):
    tasks = [instance(f"t{n}", f"10.0.0.{n}", state) for n, state in enumerate(states)]
    desired = compiled(with_vip(docker(hosts="a.local", backend_mode="vip"), *tasks))
    peers = desired.membership.upstreams["a.local/"].peers
    assert [peer.state for peer in peers] == expected


def test_scaling_behind_a_virtual_ip_changes_nothing():
    compiler = Compiler()
    wants = docker(hosts="a.local", backend_mode="vip")
    before = compiler.compile(snapshot(with_vip(wants, instance("t1"))), DEFAULTS)
    more = with_vip(wants, instance("t1"), instance("t2", "10.0.0.2"))
    assert compiler.compile(snapshot(more), DEFAULTS) is before


def test_without_a_virtual_ip_there_is_none_to_go_to():
    wants = docker(hosts="a.local", backend_mode="vip")
    refusal = only(compiled(service("web", wants, instance("t1"))))
    assert refusal.reason == "no_vip"
    assert "edge" in refusal.message
    assert "com.docker.lb.backend_mode" in refusal.hint


def test_an_agent_serves_the_clusters_of_its_settings():
    east = service("east", docker(hosts="e.local", service_cluster="east"), instance("t1"))
    rest = service("rest", docker(hosts="r.local"), instance("t2"))
    desired = compiled(east, rest)
    assert [item.name for item in desired.site.hosts] == ["r.local"]
    assert only(desired).reason == "other_cluster"
    compiler = Compiler()
    compiler.compile(snapshot(east, rest), DEFAULTS)
    told = Settings(service_clusters=("east",), host_linger=0.0)
    desired = compiler.compile(snapshot(east, rest), told)
    assert [item.name for item in desired.site.hosts] == ["e.local"]


def test_a_container_goes_by_its_own_name_where_the_settings_say_so():
    web = service("web-1", {}, instance("c1"), kind=WorkloadKind.CONTAINER, source="engine")
    web = replace(web, hostname="web.example.com")
    compiler = Compiler()
    assert compiler.compile(snapshot(web), DEFAULTS).site.hosts == ()
    desired = compiler.compile(snapshot(web), Settings(hostname_fallback=True))
    assert [item.name for item in desired.site.hosts] == ["web.example.com"]
    renamed = replace(web, hostname="www.example.com")
    desired = compiler.compile(snapshot(renamed), Settings(hostname_fallback=True))
    assert "www.example.com" in [item.name for item in desired.site.hosts]


# --- canaries

MAIN = service("v1", labels(hostname="a"), instance("m1"), created=2.0)
V2 = service("v2", labels(hostname="a", canary__weight="10"), instance("c1", "10.0.0.2"))


def test_a_canary_is_a_second_upstream_that_the_main_one_points_to():
    desired = compiled(MAIN, V2)
    assert desired.rejections == ()
    assert ids(desired, "a.local/") == ["m1"]
    assert ids(desired, "a.local/@canary") == ["c1"]
    main = desired.membership.upstreams["a.local/"].policy
    assert main.canary == Canary("a.local/@canary", 10)
    assert desired.membership.upstreams["a.local/@canary"].policy.canary is None
    assert [item.upstream for item in host(desired, "a.local").locations] == ["a.local/"]


def test_a_canary_has_a_policy_of_its_own():
    canary = replace(V2, labels=V2.labels | labels(balance_algorithm="leastconn"))
    desired = compiled(MAIN, canary)
    assert desired.rejections == ()
    upstreams = desired.membership.upstreams
    assert upstreams["a.local/"].policy.algorithm is Algorithm.ROUND_ROBIN
    assert upstreams["a.local/@canary"].policy.algorithm is Algorithm.LEAST_CONN


def test_a_canary_without_a_main_service_serves_as_main():
    desired = compiled(V2)
    assert ids(desired, "a.local/") == ["c1"]
    assert list(desired.membership.upstreams) == ["a.local/"]
    assert desired.membership.upstreams["a.local/"].policy.canary is None


def test_a_canary_comes_and_goes_without_touching_the_site():
    compiler = Compiler()
    before = compiler.compile(snapshot(MAIN), DEFAULTS)
    with_canary = compiler.compile(snapshot(MAIN, V2), DEFAULTS)
    assert with_canary.site is before.site
    more = replace(V2, instances=(*V2.instances, instance("c2", "10.0.0.3")))
    scaled = compiler.compile(snapshot(MAIN, more), DEFAULTS)
    assert ids(scaled, "a.local/@canary") == ["c1", "c2"]
    main = scaled.membership.upstreams["a.local/"]
    assert main is with_canary.membership.upstreams["a.local/"]
    promoted = compiler.compile(snapshot(V2), DEFAULTS)
    assert promoted.site is before.site
    assert ids(promoted, "a.local/") == ["c1"]
    assert list(promoted.membership.upstreams) == ["a.local/"]
    after = compiler.compile(snapshot(MAIN), DEFAULTS)
    assert after.membership == before.membership


def test_canaries_that_agree_share_and_the_younger_of_others_is_refused():
    same = service("v3", V2.labels, instance("c3", "10.0.0.3"), created=3.0)
    other = service(
        "v4", labels(hostname="a", canary__weight="20"), instance("c4", "10.0.0.4"), created=4.0
    )
    desired = compiled(MAIN, V2, same, other)
    assert ids(desired, "a.local/@canary") == ["c1", "c3"]
    refusal = only(desired)
    assert (refusal.subject, refusal.reason) == ("service v4", "conflict")
    assert "service v2" in refusal.message


def test_a_canary_must_agree_on_what_is_rendered():
    canary = replace(V2, labels=V2.labels | labels(ssl_backend=""))
    refusal = only(compiled(MAIN, canary))
    assert (refusal.subject, refusal.reason) == ("service v2", "conflict")
    assert "interlock.ssl_backend" in refusal.message


def test_an_alias_has_the_canary_too():
    alias = labels(alias_domain="b.example.com")
    main = replace(MAIN, labels=MAIN.labels | alias)
    canary = replace(V2, labels=V2.labels | alias)
    desired = compiled(main, canary)
    assert host(desired, "a.local").aliases == ("b.example.com",)
    assert list(desired.membership.upstreams) == ["a.local/", "a.local/@canary"]


# --- mirrors


def test_a_mirror_is_the_upstream_of_another_route():
    web = service("web", labels(hostname="a", mirror="s.local/api"), instance("t1"))
    shadow = service(
        "shadow",
        labels(hostname="s", context_root="/api", alias_domain="alias.example.com"),
        instance("t2"),
    )
    desired = compiled(web, shadow)
    assert desired.rejections == ()
    assert location(desired, "a.local").mirror == "s.local/api"
    by_alias = replace(web, labels=labels(hostname="a", mirror="alias.example.com/api"))
    assert location(compiled(by_alias, shadow), "a.local").mirror == "s.local/api"


@pytest.mark.parametrize("target", ["gone.local", "s.local/other", "a.local"])
def test_a_mirror_to_nothing_or_to_itself_is_told_of_and_the_route_lives(target):
    web = service("web", labels(hostname="a", mirror=target), instance("t1"))
    shadow = service("shadow", labels(hostname="s"), instance("t2"))
    desired = compiled(web, shadow)
    assert location(desired, "a.local").mirror == ""
    refusal = only(desired)
    assert (refusal.subject, refusal.reason) == ("service web", "mirror_unknown")
    assert target in refusal.message


def test_a_mirror_follows_its_target():
    compiler = Compiler()
    options = settings(host_linger=0.0)
    web = service("web", labels(hostname="a", mirror="s.local"), instance("t1"))
    shadow = service("shadow", labels(hostname="s"), instance("t2"))
    for workloads in ((web,), (web, shadow), (web,), (web, shadow), (shadow,)):
        seen = snapshot(*workloads)
        assert compiler.compile(seen, options) == compile_snapshot(seen, options)


# --- default backend


def test_a_default_backend_serves_hosts_that_nobody_claims():
    wants = docker(default_backend="true", port="8080", ssl_only="true")
    desired = compiled(
        service("web", wants, instance("t1")), options=settings(ssl_default_cert="d")
    )
    assert desired.site.hosts == ()
    assert [(item.path, item.upstream) for item in desired.site.default] == [("/", "*/")]
    assert not desired.site.default[0].tls_only, "nobody's certificate is for such a host"
    assert ids(desired, "*/") == ["t1"]


def test_a_default_backend_may_have_hosts_too():
    wants = labels(hostname="a", default_backend="true") | CERTIFICATE
    desired = compiled(service("web", wants, instance("t1")))
    assert [item.name for item in desired.site.hosts] == ["a.local"]
    assert list(desired.membership.upstreams) == ["*/", "a.local/"]


def test_of_two_default_backends_with_other_hosts_the_older_keeps_it():
    one = service("v1", labels(hostname="a", default_backend=""), instance("t1"))
    two = service("v2", labels(hostname="b", default_backend=""), instance("t2"), created=2.0)
    desired = compiled(one, two)
    assert ids(desired, "*/") == ["t1"]
    assert only(desired).subject == "service v2"
    assert "the default backend" in only(desired).message
    again = service("v3", labels(hostname="a", default_backend=""), instance("t3"), created=3.0)
    assert ids(compiled(one, again), "*/") == ["t1", "t3"]


def test_a_default_backend_lingers_and_goes():
    compiler = Compiler(clock=lambda: now[0])
    now = [1200.0]
    web = service("web", labels(default_backend="true"), instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    after = compiler.compile(snapshot(), DEFAULTS)
    assert after.site is before.site
    now[0] += 2000.0
    assert compiler.compile(snapshot(), DEFAULTS).site.default == ()


# --- TCP


def test_a_tcp_port_goes_to_the_peers():
    db = service("db", labels(tcp_port="5432", port="5432"), instance("t1"))
    desired = compiled(db)
    assert desired.rejections == ()
    assert desired.site.hosts == ()
    assert desired.site.tcp == (TcpRoute(5432, ":5432/"),)
    assert [peer.port for peer in desired.membership.upstreams[":5432/"].peers] == [5432]


def test_two_services_do_not_share_a_port_and_the_older_keeps_it():
    one = service("v1", labels(tcp_port="5432"), instance("t1"))
    two = service("v2", labels(tcp_port="5432"), instance("t2"), created=2.0)
    desired = compiled(two, one)
    assert ids(desired, ":5432/") == ["t1"]
    refusal = only(desired)
    assert (refusal.subject, refusal.reason) == ("service v2", "conflict")
    assert "TCP port 5432 is held by service v1" in refusal.message


def test_containers_made_alike_share_a_port():
    def replica(number: int, **values: str) -> Workload:
        return service(
            f"db-{number}",
            labels(tcp_port="5432", **values),
            instance(f"c{number}", f"10.0.0.{number}"),
            kind=WorkloadKind.CONTAINER,
            source="engine",
            created=float(number),
        )

    assert ids(compiled(replica(1), replica(2)), ":5432/") == ["c1", "c2"]
    desired = compiled(replica(1), replica(2, port="9"))
    assert ids(desired, ":5432/") == ["c1"]


@pytest.mark.parametrize(
    ("port", "options"),
    [
        ("80", DEFAULTS),
        ("443", DEFAULTS),
        ("8081", DEFAULTS),
        ("9000", Settings(openresty=OpenResty(admin_port=9000))),
        ("9001", settings(grpc_port=9001)),
    ],
)
def test_the_proxys_own_ports_are_not_to_be_had(port, options):
    desired = compiled(service("db", labels(tcp_port=port), instance("t1")), options=options)
    assert desired.site.tcp == ()
    assert "own port" in only(desired).message


# --- TLS


def test_passthrough_hands_tls_to_the_upstream_and_redirects_the_rest_to_it():
    web = service("web", labels(hostname="a", ssl_passthrough=""), instance("t1"))
    desired = compiled(web, options=settings(name="haproxy", ssl_cert="/all.pem"))
    found = host(desired, "a.local")
    assert (found.passthrough, found.tls) == ("a.local/", None)
    assert [(item.path, item.tls_only) for item in found.locations] == [("/", True)]
    assert only(compiled(web, options=settings(ssl_port=0))).reason == "tls_off"


def test_passthrough_and_the_proxy_protocol_do_not_go_together():
    web = service("web", labels(hostname="a", ssl_passthrough=""), instance("t1"))
    told = only(compiled(web, options=settings(proxy_protocol=True)))
    assert told.reason == "tls_off"
    assert "ProxyProtocol" in told.message


def test_passthrough_and_termination_do_not_go_together():
    one = service("v1", labels(hostname="a", ssl_passthrough=""), instance("t1"))
    two = service("v2", labels(hostname="a", context_root="/x") | CERTIFICATE, created=2.0)
    assert only(compiled(one, two)).reason == "tls_conflict"
    assert only(compiled(replace(one, created=3.0), two)).reason == "tls_conflict"


def test_clients_are_verified_with_a_file_below_the_certificate_directory():
    wants = labels(hostname="a", ssl_verify_client="required", ssl_client_ca="ca.pem") | CERTIFICATE
    desired = compiled(service("web", wants, instance("t1")))
    found = host(desired, "a.local").tls
    assert found is not None
    assert (found.verify_client, found.client_ca) == (
        VerifyClient.REQUIRED,
        "/etc/tidegate/certs/ca.pem",
    )


@pytest.mark.parametrize(
    ("wants", "setting", "header"),
    [
        ({"ssl": ""}, None, ""),
        ({"ssl_only": ""}, None, "max-age=16000000"),
        ({"ssl_only": ""}, "max-age=300; includeSubDomains", "max-age=300; includeSubDomains"),
        ({"ssl_only": ""}, "off", ""),
        ({"ssl_only": "", "hsts": "off"}, None, ""),
        ({"ssl_only": "", "hsts": "60"}, None, "max-age=60"),
        ({"ssl": "", "hsts": "true"}, "max-age=300", "max-age=300"),
        ({"ssl": "", "hsts": "true"}, "off", "max-age=16000000"),
    ],
)
def test_hsts_by_label_or_with_ssl_only_by_setting(wants, setting, header):
    options = settings(ssl_default_cert="d.pem", **({"hsts": setting} if setting else {}))
    desired = compiled(
        service("web", labels(hostname="a", **wants), instance("t1")), options=options
    )
    found = host(desired, "a.local").tls
    assert found is not None
    assert found.hsts == header


def test_hsts_is_no_reason_for_a_conflict():
    root = service("web", labels(hostname="a", ssl_only="") | CERTIFICATE, instance("t1"))
    api = service(
        "api", labels(hostname="a", context_root="/api") | CERTIFICATE, instance("t2"), created=2.0
    )
    assert compiled(root, api).rejections == ()


def test_options_towards_the_peers_belong_to_the_location():
    wants = labels(hostname="a", ssl_backend="", ssl_backend_ca="ca.pem", protocol="grpc")
    wants |= labels(backend_option="proxy_buffering off;")
    options = settings(allowed_directives=("proxy_buffering",))
    found = location(compiled(service("web", wants, instance("t1")), options=options), "a.local")
    assert found.backend_tls == BackendTls(True, "/etc/tidegate/certs/ca.pem")
    assert found.protocol is Protocol.GRPC
    assert found.request_buffering
    assert found.directives == ("proxy_buffering off;",)
    assert only(compiled(service("web", wants, instance("t1")))).reason == "directive_not_allowed"


def test_bodies_go_on_as_they_come_where_the_label_says_so():
    upload = service("upload", labels(hostname="a", request_buffering="false"), instance("t1"))
    assert not location(compiled(upload), "a.local").request_buffering


@pytest.mark.parametrize(
    ("wants", "named"),
    [
        ({"ssl_backend": ""}, "interlock.ssl_backend"),
        ({"protocol": "grpc"}, "interlock.protocol"),
        ({"mirror": "s.local"}, "interlock.mirror"),
        ({"request_buffering": "off"}, "interlock.request_buffering"),
        ({"max_conns": "5"}, "the balancing policy (interlock.max_conns)"),
        ({"health_check": "/x"}, "(interlock.health_check or what belongs to it)"),
        (
            {"balance_algorithm": "uri", "read_timeout": "5s"},
            "(interlock.balance_algorithm, interlock.hash_key, interlock.read_timeout or what",
        ),
        ({"ssl_passthrough": ""}, "interlock.ssl_passthrough"),
    ],
)
def test_the_older_of_two_that_differ_keeps_the_route(wants, named):
    shadow = service("shadow", labels(hostname="s"), instance("t3"))
    old = service("v1", labels(hostname="a"), instance("t1"))
    new = service("v2", labels(hostname="a", **wants), instance("t2"), created=2.0)
    desired = compiled(old, new, shadow)
    assert ids(desired, "a.local/") == ["t1"]
    assert named in only(desired).message


def test_weights_and_backups_may_differ():
    old = service("v1", labels(hostname="a", weight="9"), instance("t1"))
    new = service("v2", labels(hostname="a", backup=""), instance("t2", "10.0.0.2"), created=2.0)
    desired = compiled(old, new)
    assert desired.rejections == ()
    peers = desired.membership.upstreams["a.local/"].peers
    assert [(peer.weight, peer.backup) for peer in peers] == [(9, False), (1, True)]


# --- redirects


def test_names_that_are_redirected_stay_with_their_host():
    wants = docker(
        hosts="new.example.com,old.example.com",
        redirects="http://old.example.com,http://new.example.com",
    )
    desired = compiled(service("web", wants, instance("t1")))
    found = host(desired, "new.example.com")
    assert found.aliases == ("old.example.com",)
    assert found.redirects == (Redirect("old.example.com", "http://new.example.com"),)


def test_a_younger_service_cannot_redirect_the_host_of_another():
    old = service("v1", labels(hostname="a"), instance("t1"))
    new = service(
        "v2", labels(hostname="a", redirects="a.local,b.local"), instance("t2"), created=2.0
    )
    desired = compiled(old, new)
    assert host(desired, "a.local").redirects == ()
    assert only(desired).reason == "conflict"
    quiet = replace(old, created=3.0)
    desired = compiled(quiet, new)
    assert host(desired, "a.local").redirects == (Redirect("a.local", "b.local"),)
    assert desired.rejections == ()


def test_a_redirect_stays_while_its_host_lingers():
    compiler = Compiler(clock=lambda: 1200.0)
    web = service("web", labels(hostname="a", redirects="a.local,b.local"), instance("t1"))
    before = compiler.compile(snapshot(web), DEFAULTS)
    assert compiler.compile(snapshot(), DEFAULTS).site is before.site


# --- a cluster with everything


def test_golden_cluster_of_options():
    """Every kind of route at once; any change of behaviour shows in the golden file."""
    options = settings(ssl_default_cert="d.pem", allowed_directives=("proxy_buffering",))
    cluster = [
        service(
            "ucp_demo",
            docker(
                hosts="demo.example.com,old.example.com",
                port="8080",
                network="edge",
                ssl_cert="demo.cert",
                ssl_key="demo.key",
                context_root="/app",
                context_root_rewrite="true",
                websocket_endpoints="/app/ws",
                sticky_session_cookie="session",
                redirects="http://old.example.com,http://demo.example.com",
            ),
            instance("demo1", "10.0.1.1"),
        ),
        service(
            "shop",
            labels(
                hostname="shop",
                domain="example.com",
                ssl_only="",
                balance_algorithm="leastconn",
                health_check="httpchk GET /ping",
                health_check_interval="2000",
                slow_start="30s",
                max_conns="100",
                mirror="shadow.example.com",
                admin__hostname="admin",
                admin__port="9090",
                admin__ssl_backend="true",
                admin__ssl_backend_ca="ca.pem",
                admin__backend_option="proxy_buffering off;",
            ),
            instance("shop1", "10.0.2.1"),
        ),
        service(
            "shop_next",
            labels(
                hostname="shop",
                domain="example.com",
                ssl_only="",
                mirror="shadow.example.com",
                canary__weight="5",
                canary__header="X-Next",
            ),
            instance("next1", "10.0.3.1"),
            created=2.0,
        ),
        service(
            "shadow",
            labels(hostname="shadow", domain="example.com", protocol="grpc"),
            instance("shadow1", "10.0.4.1"),
        ),
        with_vip(docker(default_backend="true", backend_mode="vip"), instance("v1", "10.0.5.1")),
        service("db", labels(tcp_port="5432", port="5432", backup="true"), instance("db1")),
        service("mail", labels(hostname="mail", ssl_passthrough="true"), instance("mail1")),
        service("other", docker(hosts="x.example.com", service_cluster="east"), instance("x1")),
        service("evil", labels(hostname="evil", backend_option="deny all;"), instance("e1")),
    ]
    check_golden("compile/options.json", as_json(compiled(*cluster, options=options)))


def test_everything_of_a_policy_that_may_differ_has_its_label():
    assert set(POLICY_LABELS) == {field.name for field in fields(Policy)} - {"canary"}
    assert set(POLICY_LABELS.values()) <= OPTIONS
