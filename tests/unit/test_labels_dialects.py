"""Several routes on one workload, and the dialect of Interlock 2 and 3: one way for both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from clusters import service

from agent.labels import Reading, RouteDeclaration, Rules, read_labels
from agent.model import (
    BackendTls,
    Protocol,
    Redirect,
    Sticky,
    StickyKind,
    WorkloadKind,
)


def read(wants: dict[str, str], rules: Rules | None = None) -> Reading:
    workload = service("web", wants)
    return read_labels(workload) if rules is None else read_labels(workload, rules)


def docker(**values: str) -> dict[str, str]:
    return {"com.docker.lb." + name.replace("__", "."): value for name, value in values.items()}


def the_route(wants: dict[str, str]) -> RouteDeclaration:
    reading = read(wants)
    assert reading.rejections == ()
    (route,) = reading.routes
    return route


def by_name(reading: Reading) -> dict[str, RouteDeclaration]:
    return {route.name: route for route in reading.routes}


# --- several routes


def test_each_name_is_a_route_of_its_own_beside_the_unnamed_one():
    reading = read(
        {
            "interlock.hostname": "shop",
            "interlock.domain": "example.com",
            "interlock.port": "8080",
            "interlock.admin.hostname": "admin",
            "interlock.admin.port": "9090",
            "interlock.admin.alias_domain.0": "manage.example.com",
            "interlock.admin.canary.weight": "5",
            "interlock.api.hostname": "api.example.org",
            "interlock.api.domain": "",
            "interlock.api.context_root": "/v1",
        }
    )
    assert reading.rejections == ()
    routes = by_name(reading)
    assert {name: (route.host, route.port) for name, route in routes.items()} == {
        "": ("shop.example.com", 8080),
        "admin": ("admin.example.com", 9090),
        "api": ("api.example.org", 8080),
    }
    assert routes["admin"].aliases == ("manage.example.com",)
    assert routes["admin"].canary is not None
    assert routes["api"].context_root == "/v1"
    assert routes[""].context_root == "/"


def test_what_belongs_to_the_workload_is_had_from_the_unnamed_labels():
    reading = read(
        {
            "interlock.domain": "example.com",
            "interlock.network": "edge",
            "interlock.weight": "5",
            "interlock.backup": "true",
            "interlock.ssl_only": "true",
            "interlock.ssl_cert": "all.pem",
            "interlock.ssl_cert_key": "all.key",
            "interlock.hsts": "300",
            "interlock.port": "8443",
            "interlock.ssl_backend": "true",
            "interlock.protocol": "grpc",
            "interlock.a.hostname": "a",
            "interlock.b.hostname": "b",
            "interlock.b.port": "9090",
            "interlock.b.weight": "7",
            "interlock.b.ssl_cert": "b.pem",
            "interlock.b.ssl_cert_key": "b.key",
            "interlock.c.hostname": "c",
            "interlock.c.ssl": "false",
            "interlock.c.protocol": "http",
        }
    )
    assert [item for item in reading.rejections if item.reason != "label_ignored"] == []
    routes = by_name(reading)
    assert set(routes) == {"a", "b", "c"}, "the unnamed labels name no host and are no route"
    a, b, c = routes["a"], routes["b"], routes["c"]
    assert (a.network, a.weight, a.backup, a.port) == ("edge", 5, True, 8443)
    assert (a.tls_only, a.certificate, a.hsts) == (True, "all.pem", "max-age=300")
    assert (a.backend_tls, a.protocol) == (BackendTls(), Protocol.GRPC)
    assert (b.weight, b.port, b.certificate, b.tls_only) == (7, 9090, "b.pem", True)
    assert (b.backend_tls, b.protocol) == (None, Protocol.HTTP), "what is spoken is the port's"
    assert (c.tls, c.tls_only, c.port) == (False, False, 8443)
    assert (c.backend_tls, c.protocol) == (None, Protocol.HTTP)


def test_what_belongs_to_a_route_stays_with_it():
    reading = read(
        {
            "interlock.hostname": "a",
            "interlock.context_root": "/x",
            "interlock.ip_hash": "true",
            "interlock.health_check": "/ping",
            "interlock.canary.weight": "5",
            "interlock.alias_domain": "alias.local",
            "interlock.b.hostname": "b",
        }
    )
    assert by_name(reading)["b"] == replace(
        RouteDeclaration("b.local"), name="b", dialect=by_name(reading)["b"].dialect
    )


def test_a_bad_route_is_refused_alone_and_told_of_by_its_own_label():
    reading = read(
        {
            "interlock.hostname": "a",
            "interlock.b.hostname": "b",
            "interlock.b.port": "http",
            "interlock.c.port": "80",
        }
    )
    assert list(by_name(reading)) == [""]
    told = {item.reason: item.message for item in reading.rejections}
    assert "interlock.b.port=" in told["invalid_label"]
    assert "no interlock.c.hostname" in told["no_hostname"]


@pytest.mark.parametrize(
    "label",
    [
        "interlock.alias_domain.hostname",
        "interlock.websocket_endpoint.port",
        "interlock.backend_option.port",
        "interlock.canary.hostname",
        "interlock.hosts.hostname",
        "interlock.ext.hostname",
        "interlock.app.hostname",
        "interlock.port.hostname",
        "interlock..hostname",
        "interlock.a b.hostname",
        "interlock.-a.hostname",
        "interlock.a.b.hostname",
        "interlock.ü.hostname",
    ],
)
def test_a_word_that_labels_begin_with_is_the_name_of_no_route(label):
    reading = read({"interlock.hostname": "a", label: "x"})
    assert list(by_name(reading)) == [""]


def test_a_misspelt_option_of_a_named_route_is_told_of():
    reading = read({"interlock.a.hostname": "a", "interlock.a.contextroot": "/x"})
    assert list(by_name(reading)) == ["a"]
    assert [item.hint for item in reading.rejections] == ["Did you mean interlock.a.context_root?"]


# --- com.docker.lb


def test_a_service_of_interlock_2():
    route = the_route(
        docker(
            hosts="shop.example.com, www.example.com,old.example.com",
            port="8080",
            network="shop_front",
            context_root="/app",
            context_root_rewrite="true",
            ssl_cert="shop.example.com.cert",
            ssl_key="shop.example.com.key",
            websocket_endpoints="/app/ws, /app/events",
            sticky_session_cookie="session",
            redirects="http://old.example.com,https://shop.example.com",
            backend_mode="task",
        )
    )
    assert (route.host, route.aliases) == (
        "shop.example.com",
        ("old.example.com", "www.example.com"),
    )
    assert (route.port, route.network) == (8080, "shop_front")
    assert (route.context_root, route.rewrite) == ("/app", True)
    assert (route.tls, route.certificate, route.certificate_key) == (
        True,
        "shop.example.com.cert",
        "shop.example.com.key",
    )
    assert route.dialect.secrets
    assert route.websocket_endpoints == ("/app/events", "/app/ws")
    assert route.policy.sticky == Sticky(StickyKind.APP_COOKIE, "session")
    assert route.redirects == (Redirect("old.example.com", "https://shop.example.com"),)
    assert route.vip is False


def test_it_knows_the_options_of_the_other_dialect_and_several_routes():
    reading = read(
        docker(
            hosts="a.example.com",
            weight="5",
            canary__header="X-Canary",
            network="edge",
            admin__hosts="admin.example.com",
            admin__port="9090",
        )
    )
    assert reading.rejections == ()
    routes = by_name(reading)
    assert routes[""].weight == routes["admin"].weight == 5
    assert routes["admin"].host == "admin.example.com"
    assert routes["admin"].network == "edge"
    assert routes["admin"].label("ssl_cert_key") == "com.docker.lb.admin.ssl_key"


def test_options_that_it_dropped_are_honoured():
    route = the_route(
        docker(
            hosts="a",
            ssl_only="true",
            ssl_backend="true",
            ssl_backend_tls_verify="required",
            ip_hash="true",
        )
    )
    assert (route.tls, route.tls_only) == (True, True)
    assert route.backend_tls == BackendTls(verify=True)
    assert route.policy.hash_key == "ip"


@pytest.mark.parametrize(
    ("wants", "reason"),
    [
        ({"port": "80"}, "no_hostname"),
        ({"hosts": ""}, "invalid_host"),
        ({"hosts": "a b"}, "invalid_host"),
        ({"hosts": "a", "port": "http"}, "invalid_label"),
        ({"hosts": "a", "ssl_cert": "../cert", "ssl_key": "key"}, "invalid_label"),
        ({"hosts": "a", "ssl_cert": "dir/cert", "ssl_key": "key"}, "invalid_label"),
        ({"hosts": "a", "backend_mode": "dns"}, "invalid_label"),
    ],
)
def test_what_is_not_of_its_form_is_refused(wants, reason):
    reading = read(docker(**wants))
    assert reading.routes == ()
    assert [item.reason for item in reading.rejections] == [reason]
    assert "com.docker.lb" in reading.rejections[0].message


def test_a_bad_host_among_several_is_refused_alone():
    reading = read(docker(hosts="a.example.com,b c,d.example.com"))
    assert reading.routes[0].aliases == ("d.example.com",)
    assert [item.reason for item in reading.rejections] == ["invalid_host"]


@pytest.mark.parametrize(
    ("label", "near"),
    [
        ("com.docker.lb.host", "com.docker.lb.hosts"),
        ("com.docker.lb.context_rot", "com.docker.lb.context_root"),
        ("com.docker.lb.websocket_endpoint", "com.docker.lb.websocket_endpoints"),
        ("com.docker.lb.ssl_cert_key", "com.docker.lb.ssl_cert"),
    ],
)
def test_an_unknown_label_is_told_of_with_the_nearest(label, near):
    reading = read(docker(hosts="a") | {label: "x"})
    assert len(reading.routes) == 1
    assert [item.hint for item in reading.rejections] == [f"Did you mean {near}?"]


def test_where_both_dialects_name_a_host_interlocks_counts_as_a_whole():
    reading = read({"interlock.hostname": "a"} | docker(hosts="b.example.com", weight="5"))
    assert [(route.host, route.weight) for route in reading.routes] == [("a.local", None)]
    assert [item.reason for item in reading.rejections] == ["label_ignored"]
    assert "com.docker.lb labels have no effect" in reading.rejections[0].message


def test_interlock_labels_without_a_host_do_not_take_its_place():
    reading = read({"interlock.weight": "5"} | docker(hosts="b.example.com"))
    assert [(route.host, route.weight) for route in reading.routes] == [("b.example.com", None)]
    assert "interlock labels name no host" in reading.rejections[0].message


# --- hosts of the 2.0 prerelease


def test_interlock_hosts_of_the_prerelease():
    route = the_route({f"interlock.hosts.{n}": f"h{n}.example.com" for n in (10, 9, 1)})
    assert (route.host, route.aliases) == ("h1.example.com", ("h10.example.com", "h9.example.com"))
    route = the_route({"interlock.hosts": "a.example.com,b.example.com"})
    assert (route.host, route.aliases) == ("a.example.com", ("b.example.com",))
    route = the_route({"interlock.hostname": "x", "interlock.hosts": "a.example.com"})
    assert (route.host, route.aliases) == ("x.local", ("a.example.com",))


# --- service clusters


@pytest.mark.parametrize(
    ("clusters", "label", "served"),
    [
        ({""}, None, True),
        ({""}, "", True),
        ({""}, "east", False),
        ({"east"}, "east", True),
        ({"east"}, "west", False),
        ({"east"}, None, False),
        ({"east", ""}, None, True),
    ],
)
@pytest.mark.parametrize("prefix", ["com.docker.lb.", "interlock."])
def test_an_agent_serves_the_clusters_that_it_is_told(clusters, label, served, prefix):
    wants = {f"{prefix}hosts": "a.example.com", f"{prefix}ssl_only": "bad"}
    wants.pop(f"{prefix}ssl_only") if served else None
    if label is not None:
        wants[f"{prefix}service_cluster"] = label
    reading = read(wants, Rules(clusters=frozenset(clusters)))
    assert bool(reading.routes) is served
    reasons = [item.reason for item in reading.rejections]
    assert reasons == ([] if served else ["other_cluster"]), "its faults are the other agent's"


# --- a container's own name


def container(wants: dict[str, str], **fields: str):
    workload = service("web-1", wants, kind=WorkloadKind.CONTAINER, source="engine")
    return replace(workload, **fields)


FALLBACK = Rules(hostname_fallback=True)


@pytest.mark.parametrize(
    ("wants", "hostname", "domainname", "host"),
    [
        ({}, "web", "example.com", "web.example.com"),
        ({}, "web.example.com", "", "web.example.com"),
        ({"interlock.port": "80"}, "web", "example.com", "web.example.com"),
        ({"interlock.domain": "other.com"}, "web", "example.com", "web.other.com"),
        ({"interlock.domain": "other.com"}, "6e3ed30404b5", "", "6e3ed30404b5.other.com"),
        ({"interlock.hostname": "x"}, "web", "example.com", "x.local"),
    ],
)
def test_a_container_may_go_by_its_own_name(wants, hostname, domainname, host):
    workload = container(wants, hostname=hostname, domainname=domainname)
    reading = read_labels(workload, FALLBACK)
    assert [route.host for route in reading.routes] == [host]
    without = read_labels(workload)
    assert [route.host for route in without.routes] == ([host] if "hostname" in str(wants) else [])


def test_a_name_that_docker_made_up_is_none_and_neither_is_a_proxys():
    assert read_labels(container({}, hostname="6e3ed30404b5"), FALLBACK) == Reading()
    proxy = container({"interlock.ext.name": "nginx"}, hostname="lb.example.com")
    assert read_labels(proxy, FALLBACK) == Reading()
    swarm = replace(service("web", {}), hostname="web.example.com")
    assert read_labels(swarm, FALLBACK) == Reading()


def test_the_label_of_an_unmerged_change_is_told_of():
    reading = read({"interlock.ext.service_name": "x"})
    assert [item.reason for item in reading.rejections] == ["label_ignored"]
    assert "ServiceClusters" in reading.rejections[0].hint


def test_a_list_may_be_as_long_as_a_service_has_hosts():
    hosts = [f"customer-{number:04}.example.com" for number in range(500)]
    route = the_route(docker(hosts=",".join(hosts)))
    assert (route.host, *route.aliases) == tuple(hosts)


@pytest.mark.parametrize(
    "redirects",
    [
        "http://a.example.com,http://b.example.com;http://b.example.com,http://a.example.com",
        "a.example.com,b.example.com;b.example.com,c.example.com;"
        "c.example.com,https://a.example.com/deeper",
    ],
)
def test_a_redirect_that_leads_back_is_refused_alone(redirects):
    hosts = "a.example.com,b.example.com,c.example.com"
    reading = read(docker(hosts=hosts, redirects=redirects))
    (route,) = reading.routes
    assert len(route.redirects) == redirects.count(";")
    (refused,) = reading.rejections
    assert refused.reason == "invalid_label"
    assert "lead back" in refused.message


def test_a_bad_redirect_is_told_by_itself():
    reading = read(docker(hosts="a.example.com", redirects="http://a.example.com,x.org;nonsense"))
    (refused,) = reading.rejections
    assert refused.message == 'com.docker.lb.redirects="nonsense" is not a redirect.'


@pytest.mark.parametrize("label", ["com.docker.lb.bogus", "interlock.x.", "interlock.version"])
def test_nothing_is_suggested_where_nothing_is_near(label):
    told = [item for item in read({label: "1"}).rejections if item.reason == "label_ignored"]
    assert [item.hint for item in told] == ["See docs/labels.md for the known labels."]
