"""What the options of a route come to, beyond its host, port and path: policy, TLS, canary."""

from __future__ import annotations

import pytest
from clusters import labels, service

from agent.labels import Reading, RouteDeclaration, Rules, read_labels
from agent.labels.names import OPTIONS
from agent.model import (
    Algorithm,
    BackendTls,
    Canary,
    Check,
    CheckKind,
    Circuit,
    Passive,
    Policy,
    Protocol,
    Redirect,
    Rejection,
    Retry,
    Sticky,
    StickyKind,
    Timeouts,
    VerifyClient,
)


def read(*, rules: Rules | None = None, **values: str) -> Reading:
    workload = service("web", labels(hostname="a", **values))
    return read_labels(workload) if rules is None else read_labels(workload, rules)


def the_route(**values: str) -> RouteDeclaration:
    """The route, of which nothing is to be told."""
    reading = read(**values)
    assert reading.rejections == ()
    return reading.routes[0]


def the_policy(**values: str) -> Policy:
    return the_route(**values).policy


def the_note(**values: str) -> Rejection:
    """What is told of a route that lives."""
    reading = read(**values)
    assert len(reading.routes) == 1
    assert len(reading.rejections) == 1, reading.rejections
    return reading.rejections[0]


def the_refusal(**values: str) -> Rejection:
    reading = read(**values)
    assert reading.routes == ()
    assert len(reading.rejections) == 1, reading.rejections
    return reading.rejections[0]


def test_without_any_such_label_everything_is_as_usual():
    assert the_policy() == Policy()


# --- which peer


@pytest.mark.parametrize(
    ("text", "algorithm", "key"),
    [
        ("roundrobin", Algorithm.ROUND_ROBIN, ""),
        ("round_robin", Algorithm.ROUND_ROBIN, ""),
        ("static-rr", Algorithm.ROUND_ROBIN, ""),
        ("LeastConn", Algorithm.LEAST_CONN, ""),
        ("least_conn", Algorithm.LEAST_CONN, ""),
        ("source", Algorithm.HASH, "ip"),
        ("uri", Algorithm.HASH, "uri"),
        ("url_param userid", Algorithm.HASH, "arg:userid"),
        ("url_param  userid", Algorithm.HASH, "arg:userid"),
        ("hdr(X-User)", Algorithm.HASH, "header:X-User"),
        ("hash", Algorithm.HASH, "ip"),
        ("first", Algorithm.FIRST, ""),
        ("random", Algorithm.RANDOM, ""),
        ("random(1)", Algorithm.RANDOM, ""),
        ("random(2)", Algorithm.EWMA, ""),
        ("ewma", Algorithm.EWMA, ""),
    ],
)
def test_algorithms_of_haproxy_and_our_own(text, algorithm, key):
    policy = the_policy(balance_algorithm=text)
    assert (policy.algorithm, policy.hash_key) == (algorithm, key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bogus",
        "uri depth 3",
        "uri whole",
        "url_param",
        "url_param a check_post",
        "hdr()",
        "hdr(a b)",
        "hdr(host) use_domain_only",
        "rdp-cookie",
        "random(0)",
        "random(x)",
        "roundrobin;",
    ],
)
def test_any_other_algorithm_is_refused(text):
    refusal = the_refusal(balance_algorithm=text)
    assert refusal.reason == "invalid_label"
    assert "interlock.balance_algorithm=" in refusal.message


def test_ip_hash_is_hashing_by_address_and_goes_before_an_algorithm():
    policy = the_policy(ip_hash="")
    assert (policy.algorithm, policy.hash_key) == (Algorithm.HASH, "ip")
    assert the_policy(ip_hash="false") == Policy()
    assert the_policy(ip_hash="", balance_algorithm="source").hash_key == "ip"
    note = the_note(ip_hash="", balance_algorithm="leastconn")
    assert "interlock.balance_algorithm has no effect" in note.message


@pytest.mark.parametrize("key", ["ip", "uri", "header:X-User", "cookie:session", "arg:id"])
def test_a_hash_key_hashes_by_it(key):
    assert the_policy(hash_key=key) == Policy(algorithm=Algorithm.HASH, hash_key=key)
    assert the_policy(hash_key=key, balance_algorithm="hash").hash_key == key


@pytest.mark.parametrize("key", ["", "header", "header:", "host", "ip:x", "cookie:a b", "arg:$x"])
def test_any_other_hash_key_is_refused(key):
    assert the_refusal(hash_key=key).reason == "invalid_label"


def test_a_hash_key_beside_an_algorithm_of_its_own_has_no_effect():
    assert "interlock.hash_key" in the_note(hash_key="uri", balance_algorithm="source").message
    assert "interlock.hash_key" in the_note(hash_key="uri", balance_algorithm="first").message


def test_bounded_loads():
    assert the_policy(ip_hash="", hash_balance="1.25").hash_balance == 1.25
    assert the_policy(ip_hash="", hash_balance="125%").hash_balance == 1.25
    assert the_policy(ip_hash="", hash_balance="0").hash_balance == 0.0
    assert "no effect" in the_note(hash_balance="1.25").message
    for text in ("1", "0.5", "-1", "101", "x", "1e3", "nan", "inf"):
        assert the_refusal(ip_hash="", hash_balance=text).reason == "invalid_label"


# --- sessions


@pytest.mark.parametrize(
    ("text", "sticky"),
    [
        ("cookie", Sticky(StickyKind.COOKIE, "tidegate")),
        ("true", Sticky(StickyKind.COOKIE, "tidegate")),
        ("cookie:SRV", Sticky(StickyKind.COOKIE, "SRV")),
        ("app:JSESSIONID", Sticky(StickyKind.APP_COOKIE, "JSESSIONID")),
        ("ip", Sticky(StickyKind.IP)),
        ("false", None),
    ],
)
def test_sessions(text, sticky):
    assert the_policy(sticky=text).sticky == sticky


@pytest.mark.parametrize("text", ["app", "app:", "cookie:", "cookie:a b", "cookie:a;b", "jsession"])
def test_any_other_session_is_refused(text):
    assert the_refusal(sticky=text).reason == "invalid_label"


def test_attributes_of_the_cookie():
    sticky = the_policy(
        sticky="cookie",
        context_root="/shop",
        sticky_max_age="1h",
        sticky_secure="true",
        sticky_http_only="no",
        sticky_same_site="none",
    ).sticky
    assert sticky == Sticky(
        StickyKind.COOKIE, "tidegate", 3600, True, False, same_site="None", path="/shop"
    )
    assert the_policy(sticky="cookie", sticky_path="/x").sticky.path == "/x"


def test_a_cookie_of_a_host_on_tls_alone_is_sent_over_tls_alone():
    assert the_policy(sticky="cookie", ssl_only="").sticky.secure is True


def test_a_cookie_for_other_sites_needs_tls():
    assert "sticky_secure" in the_refusal(sticky="cookie", sticky_same_site="None").message


def test_attributes_without_a_cookie_of_ours_are_told_of():
    assert "sticky_max_age" in the_note(sticky="ip", sticky_max_age="5").message
    assert "sticky_secure" in the_note(sticky_secure="true").message


# --- weights, limits, times


def test_numbers_and_times():
    policy = the_policy(
        slow_start="30s",
        max_conns="100",
        queue="50",
        queue_timeout="2500ms",
        eject_failures="3",
        eject_time="20",
        eject_max="10m",
        panic="25%",
        retries="2",
        retry_on="error timeout, http_503",
        retry_timeout="1m30s",
        retry_budget="0.2",
        circuit_error_ratio="50%",
        circuit_min_requests="10",
        circuit_window="30s",
        circuit_open="1.5",
        connect_timeout="500ms",
        send_timeout="5",
        read_timeout="1h",
    )
    assert policy == Policy(
        slow_start=30.0,
        max_conns=100,
        queue=50,
        queue_timeout=2.5,
        passive=Passive(3, 20.0, 600.0),
        panic=0.25,
        retry=Retry(3, ("error", "timeout", "http_503"), 90.0, 0.2),
        circuit=Circuit(0.5, 10, 30.0, 1.5),
        timeouts=Timeouts(0.5, 5.0, 3600.0),
    )


BAD_TIMES = ("", "-1", "1x", "1 s", "s", "1e3", "1s2", "9d9", "99999999999", "1_0", "\uff11", "nan")


@pytest.mark.parametrize(
    ("option", "beside"),
    [
        ("slow_start", {}),
        ("connect_timeout", {}),
        ("send_timeout", {}),
        ("read_timeout", {}),
        ("retry_timeout", {}),
        ("eject_time", {}),
        ("eject_max", {}),
        ("queue_timeout", {"queue": "1", "max_conns": "1"}),
        ("circuit_window", {"circuit_error_ratio": "1"}),
        ("circuit_open", {"circuit_error_ratio": "1"}),
        ("health_check_interval", {}),
        ("health_check_timeout", {}),
        ("sticky_max_age", {"sticky": "cookie"}),
    ],
)
def test_what_is_no_time_is_refused(option, beside):
    for text in BAD_TIMES:
        if option == "health_check_interval" and not text:
            continue
        refusal = the_refusal(**{option: text}, **beside)
        assert refusal.reason == "invalid_label"
        assert f"interlock.{option}=" in refusal.message


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("max_conns", ["", "-1", "1.5", "9999999", "x"]),
        ("queue", ["", "-1", "x"]),
        ("eject_failures", ["", "-1", "x"]),
        ("panic", ["", "1.1", "101%", "-1", "x", "%"]),
        ("retries", ["", "-1", "100", "x"]),
        ("retry_on", ["", "off", "http_200", "error;timeout"]),
        ("retry_budget", ["", "2", "x"]),
        ("circuit_error_ratio", ["", "2", "x"]),
        ("circuit_min_requests", ["0", "x"]),
        ("health_check_rise", ["0", "101", "x"]),
        ("health_check_fall", ["0", "101", "x"]),
        ("weight", ["", "-1", "1001"]),
        ("backup", ["maybe"]),
        ("tcp_port", ["", "0", "65536", "x"]),
        ("backend_mode", ["", "dnsrr"]),
        ("service_cluster", ["a b", "a;b"]),
        ("protocol", ["", "https", "tcp"]),
    ],
)
def test_what_is_out_of_range_is_refused(option, bad):
    beside = {"queue": {"max_conns": "1"}, "circuit_min_requests": {"circuit_error_ratio": "1"}}
    for text in bad:
        refusal = the_refusal(**{option: text}, **beside.get(option, {}))
        assert refusal.reason == "invalid_label"
        assert f"interlock.{option}=" in refusal.message


def test_no_retries_is_one_try():
    assert the_policy(retries="0").retry.tries == 1
    assert the_policy().retry.tries == 0


def test_a_queue_needs_a_limit_and_has_a_patience():
    assert the_policy(max_conns="1", queue="5").queue_timeout == 10.0
    assert "interlock.queue has no effect" in the_note(queue="5").message


def test_ejections_grow():
    assert the_policy(eject_time="10m").passive == Passive(5, 600.0, 600.0)
    assert "interlock.eject_max" in the_refusal(eject_time="10m", eject_max="1m").message


def test_a_circuit_needs_its_ratio():
    assert "circuit_error_ratio" in the_note(circuit_open="5s").message


def test_backup_peers():
    assert the_route(backup="true").backup is True


# --- health checks


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("httpchk GET /ping", Check(CheckKind.HTTP, "GET", "/ping")),
        ("httpchk /ping", Check(CheckKind.HTTP, "OPTIONS", "/ping")),
        ("httpchk", Check(CheckKind.HTTP, "OPTIONS", "/")),
        ("HTTPCHK head /ping HTTP/1.0", Check(CheckKind.HTTP, "HEAD", "/ping")),
        (
            r"httpchk GET /ping HTTP/1.1\r\nHost:\ www.example.com",
            Check(CheckKind.HTTP, "GET", "/ping", "www.example.com"),
        ),
        ("GET /ping?x=1&y=2", Check(CheckKind.HTTP, "GET", "/ping?x=1&y=2")),
        ("/ping", Check(CheckKind.HTTP, "GET", "/ping")),
        ("http", Check(CheckKind.HTTP)),
        (
            "http://a.example.com/ping",
            Check(CheckKind.HTTP, "GET", "/ping", "a.example.com"),
        ),
        ("tcp", Check(CheckKind.TCP)),
        ("tcp-check", Check(CheckKind.TCP)),
        ("true", Check(CheckKind.TCP)),
        ("off", None),
    ],
)
def test_health_checks(text, check):
    assert the_policy(health_check=text).check == check


def test_a_health_check_speaks_what_the_peers_do():
    policy = the_policy(health_check="/ping", ssl_backend="true")
    assert policy.check == Check(CheckKind.HTTP, path="/ping", tls=True)
    assert the_policy(health_check="tcp", ssl_backend="true").check == Check(CheckKind.TCP)
    asked = {"protocol": "grpc", "health_check": "/ping", "health_check_fall": "9"}
    assert read(**asked).routes[0].policy.check == Check(CheckKind.TCP, fall=9)
    assert the_note(**asked).reason == "label_ignored"


@pytest.mark.parametrize(
    "text",
    [
        "ping",
        "httpchk ping",
        "GET",
        "GET ping",
        "GET /a b",
        'GET /a"b',
        "GET /a\\b",
        "GET /a{b}",
        "mysql-check user haproxy",
        "redis-check",
        "https://a/ping",
        "/" + "a" * 1022,
    ],
)
def test_any_other_health_check_is_refused(text):
    assert the_refusal(health_check=text).reason == "invalid_label"


def test_the_interval_is_in_milliseconds_and_alone_means_a_tcp_check():
    assert the_policy(health_check_interval="2000").check == Check(CheckKind.TCP, interval=2.0)
    assert the_policy(health_check_interval="2s").check == Check(CheckKind.TCP, interval=2.0)
    assert the_policy(health_check="/", health_check_interval="0").check.interval == 5.0
    assert "100" in the_refusal(health_check_interval="50").message


def test_all_of_a_check():
    assert the_policy(
        health_check="/ping",
        health_check_interval="10000",
        health_check_timeout="500ms",
        health_check_rise="1",
        health_check_fall="5",
        health_check_status="200, 204-299",
        health_check_host="b.example.com:81",
    ).check == Check(
        CheckKind.HTTP,
        "GET",
        "/ping",
        "b.example.com:81",
        10.0,
        0.5,
        1,
        5,
        "200,204-299",
    )
    for text in ("", "600", "20", "300-200", "200-", "200;300"):
        assert the_refusal(health_check="/", health_check_status=text).reason == "invalid_label"
    for text in ("", "a b", "a\\r\\nb", "a;b"):
        assert the_refusal(health_check="/", health_check_host=text).reason == "invalid_label"
    assert "only connects" in the_note(health_check="tcp", health_check_status="200").message


# --- backend_option


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("forwardfor", Policy()),
        ("redispatch", Policy()),
        ("http-keep-alive", Policy()),
        ("abortonclose", Policy()),
        ("httpchk GET /ping", Policy(check=Check(CheckKind.HTTP, "GET", "/ping"))),
        ("option tcp-check", Policy(check=Check(CheckKind.TCP))),
        ("least_conn;", Policy(Algorithm.LEAST_CONN)),
        ("ip_hash;", Policy(Algorithm.HASH, "ip")),
        ("random;", Policy(Algorithm.RANDOM)),
        ("random two least_conn;", Policy(Algorithm.EWMA)),
        ("hash $request_uri consistent;", Policy(Algorithm.HASH, "uri")),
        ("hash $cookie_user;", Policy(Algorithm.HASH, "cookie:user")),
        ("hash $http_x_user ;", Policy(Algorithm.HASH, "header:x-user")),
    ],
)
def test_options_that_have_a_meaning_here(text, policy):
    assert the_policy(backend_option=text) == policy


@pytest.mark.parametrize(
    "text",
    [
        "httpclose",
        "http-server-close",
        "forceclose",
        "log-health-checks",
        "dontlognull",
        "persist",
        "nolinger",
        "mysql-check",
        "smtpchk",
        "forwardfor except 10.0.0.0/8",
        "ssl-hello-chk",
        "keepalive 16;",
        "zone a 64k;",
        "server 10.0.0.1:80;",
        "least_time header;",
    ],
)
def test_options_without_effect_are_told_of_one_by_one(text):
    note = the_note(backend_option=text)
    assert note.reason == "label_ignored"
    assert "interlock.backend_option=" in note.message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "httpchk GET ping",
        "hash $host;",
        ";",
        "a;b;",
        "a {b};",
        "a b; }",
        "if ($x) { return 200; };",
        "add_header x 'y';",
        "add_header x \\;",
        "# a;",
        'add_header x "a;b";',
        'add_header x "${host}";',
        "set $tidegate_upstream other;",
        "set $x $tidegate_upstream;",
        "A b;",
    ],
)
def test_what_is_neither_option_nor_simple_directive_is_refused_alone(text):
    rules = Rules(directives=frozenset({"a", "if", "add_header", "set", "hash", "A"}))
    reading = read(backend_option=text, rules=rules)
    assert reading.routes[0].directives == ()
    assert [item.reason for item in reading.rejections] == ["invalid_label"]


def test_a_raw_directive_needs_the_operators_word():
    note = the_note(backend_option="proxy_buffering off;")
    assert note.reason == "directive_not_allowed"
    assert "AllowedDirectives" in note.message
    allowed = Rules(directives=frozenset({"proxy_buffering", "add_header"}))
    reading = read(
        backend_option__0="proxy_buffering   off ;",
        backend_option__1='add_header X-Served "by shop $server_port" always;',
        rules=allowed,
    )
    assert reading.rejections == ()
    assert reading.routes[0].directives == (
        "proxy_buffering off;",
        'add_header X-Served "by shop $server_port" always;',
    )


@pytest.mark.parametrize("text", ["deny all;", "allow 10.0.0.0/8;", "auth_basic x;", "internal;"])
def test_without_a_directive_that_protects_it_a_route_is_not_served(text):
    assert the_refusal(backend_option=text).reason == "directive_not_allowed"


def test_a_label_of_its_own_goes_before_an_option():
    policy = the_policy(
        health_check="/ping",
        balance_algorithm="first",
        backend_option__0="tcp-check",
        backend_option__1="least_conn;",
    )
    assert policy == Policy(Algorithm.FIRST, check=Check(CheckKind.HTTP, "GET", "/ping"))


# --- canary and mirror


def test_canaries():
    canary = the_route(canary__weight="10", canary__header="X-Canary", canary__cookie="canary")
    assert canary.canary == Canary("", 10, "X-Canary", "", "canary")
    exact = the_route(canary__header="X-Group", canary__header_value="beta testers")
    assert exact.canary == Canary("", 0, "X-Group", "beta testers")
    assert "canary.header" in the_refusal(canary__header_value="x").message
    for option, bad in (
        ("canary__weight", "101"),
        ("canary__header", "a b"),
        ("canary__cookie", "a=b"),
        ("canary__header_value", ""),
    ):
        refusal = the_refusal(**{"canary__header": "x"} | {option: bad})
        assert refusal.reason == "invalid_label"


def test_grpc_is_not_mirrored_and_that_is_told():
    note = the_note(protocol="grpc", mirror="s.local")
    assert note.reason == "label_ignored"
    assert note.message.startswith("interlock.mirror has no effect with interlock.protocol=grpc")
    assert read(protocol="grpc", mirror="s.local").routes[0].mirror is None


def test_request_buffering():
    assert the_route().request_buffering
    assert the_route(request_buffering="on").request_buffering
    assert not the_route(request_buffering="false").request_buffering
    assert the_refusal(request_buffering="sometimes").reason == "invalid_label"


@pytest.mark.parametrize("other", [{"protocol": "grpc"}, {"mirror": "s.local"}])
def test_request_buffering_has_no_effect_where_something_else_decides(other):
    note = the_note(request_buffering="false", **other)
    assert "interlock.request_buffering has no effect with" in note.message
    assert read(request_buffering="false", **other).routes[0].request_buffering
    assert the_route(mirror="s.local", request_buffering="true").request_buffering


def test_mirrors():
    assert the_route(mirror="Shadow.example.com").mirror == ("shadow.example.com", "/")
    assert the_route(mirror="shadow.example.com/api/").mirror == ("shadow.example.com", "/api")
    for text in ("", "/api", "a b", "a/..", "http://a", "a;b"):
        assert the_refusal(mirror=text).reason == "invalid_label"


def test_no_context_root_ends_like_the_upstream_of_a_canary():
    assert the_refusal(context_root="/@canary").reason == "invalid_label"


# --- TLS


def test_client_certificates():
    route = the_route(ssl="", ssl_verify_client="optional", ssl_client_ca="ca.pem")
    assert (route.verify_client, route.client_ca) == (VerifyClient.OPTIONAL, "ca.pem")
    assert route.tls_only is False
    for text in ("required", "true", "on", ""):
        route = the_route(ssl_verify_client=text, ssl_client_ca="ca.pem")
        assert route.verify_client is VerifyClient.REQUIRED
        assert route.tls_only is True, "plain HTTP would be a way around it"
        assert route.tls is True
    for text in ("off", "false"):
        assert the_route(ssl="", ssl_verify_client=text).verify_client is VerifyClient.OFF


@pytest.mark.parametrize(
    "values",
    [
        {"ssl_verify_client": "required"},
        {"ssl_verify_client": "sometimes", "ssl_client_ca": "ca.pem"},
        {"ssl_verify_client": "required", "ssl_client_ca": "ca.pem", "ssl_only": "false"},
        {"ssl_verify_client": "required", "ssl_client_ca": "ca.pem", "ssl": "false"},
        {"ssl_verify_client": "optional", "ssl_client_ca": "ca.pem", "ssl": "false"},
        {"ssl_verify_client": "required", "ssl_client_ca": "../ca.pem"},
    ],
)
def test_a_route_that_cannot_be_verified_as_asked_is_not_served(values):
    assert read(**values).routes == ()


def test_a_client_ca_without_verification_is_told_of():
    assert "ssl_client_ca" in the_note(ssl="", ssl_client_ca="ca.pem").message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", "default"),
        ("", "default"),
        ("off", ""),
        ("31536000", "max-age=31536000"),
        ("max-age=300", "max-age=300"),
        (
            "max-age=300;includesubdomains ;preload;",
            "max-age=300; includeSubDomains; preload",
        ),
    ],
)
def test_hsts(text, value):
    assert the_route(ssl="", hsts=text).hsts == value


def test_what_is_no_hsts_is_refused_and_without_tls_it_has_no_effect():
    for text in (
        "maybe",
        "max-age",
        "max-age=x",
        "includeSubDomains",
        "max-age=1; x",
        "max-age=1\\",
    ):
        assert the_refusal(ssl="", hsts=text).reason == "invalid_label"
    assert the_route(ssl="").hsts is None
    assert "interlock.hsts has no effect" in the_note(hsts="true").message


def test_tls_to_the_backend():
    assert the_route(ssl_backend="").backend_tls == BackendTls()
    assert the_route(ssl_backend="", ssl_backend_tls_verify="none").backend_tls == BackendTls()
    assert the_route(
        ssl_backend="yes",
        ssl_backend_tls_verify="required",
        ssl_backend_ca="ca.pem",
        ssl_backend_name="shop.internal",
        ssl_backend_cert="/client.pem",
        ssl_backend_cert_key="client.key",
    ).backend_tls == BackendTls(True, "ca.pem", "shop.internal", "client.pem", "client.key")
    assert the_route(ssl_backend="", ssl_backend_ca="ca.pem").backend_tls.verify is True
    assert the_route(ssl_backend="false").backend_tls is None


@pytest.mark.parametrize(
    "values",
    [
        {"ssl_backend_tls_verify": "maybe"},
        {"ssl_backend_ca": "../ca.pem"},
        {"ssl_backend_name": "*.internal"},
        {"ssl_backend_name": "a;b"},
        {"ssl_backend_cert": "a.pem"},
        {"ssl_backend_cert_key": "a.key"},
    ],
)
def test_what_is_no_tls_to_the_backend_is_refused(values):
    assert the_refusal(ssl_backend="", **values).reason == "invalid_label"


def test_what_belongs_to_tls_to_the_backend_is_told_of_without_it():
    assert "without interlock.ssl_backend" in the_note(ssl_backend_tls_verify="required").message
    note = the_note(ssl_backend="", ssl_backend_tls_verify="none", ssl_backend_ca="ca.pem")
    assert "interlock.ssl_backend_ca" in note.message


def test_protocols():
    assert the_route(protocol="grpc").protocol is Protocol.GRPC
    assert the_route(protocol="HTTP").protocol is Protocol.HTTP
    assert "PROXY protocol" in the_refusal(protocol="proxy").message


def test_passthrough_leaves_tls_to_the_application():
    route = the_route(ssl_passthrough="true")
    assert (route.passthrough, route.tls_only, route.tls) == (True, True, None)
    note = the_note(ssl_passthrough="true", ssl_cert="a.pem")
    assert "ssl_cert has no effect" in note.message
    assert "context_root" in the_refusal(ssl_passthrough="true", context_root="/x").message


# --- redirects


def test_redirects_of_its_own_names():
    route = the_route(
        alias_domain__0="old.example.com",
        alias_domain__1="older.example.com",
        redirects="http://old.example.com,https://a.local;older.example.com,a.local:8080/new/",
    )
    assert route.redirects == (
        Redirect("old.example.com", "https://a.local"),
        Redirect("older.example.com", "a.local:8080/new"),
    )


def test_a_redirect_from_plain_http_to_tls_of_one_name_is_ssl_only():
    route = the_route(redirects="http://a.local,https://a.local")
    assert (route.redirects, route.tls_only) == ((), True)


@pytest.mark.parametrize(
    "text",
    [
        "a.local",
        "a.local,",
        "a.local,a.local",
        "https://a.local,http://a.local",
        "a.local/x,b.local",
        "a.local,*.b.local",
        "a.local,b local",
        'a.local,b.local"',
        "a.local,b.local/$uri",
        "a.local,ftp://b.local",
        "a.local,b.local:99999",
        "other.local,b.local",
    ],
)
def test_what_is_no_redirect_is_refused_alone(text):
    note = the_note(redirects=text)
    assert note.reason == "invalid_label"


# --- names other than a host


def test_a_default_backend_or_a_tcp_port_needs_no_host():
    reading = read_labels(service("web", labels(default_backend="true")))
    assert (reading.routes[0].host, reading.routes[0].default_backend) == ("", True)
    reading = read_labels(service("db", labels(tcp_port="5432")))
    assert (reading.routes[0].host, reading.routes[0].tcp_port) == ("", 5432)
    assert reading.rejections == ()


def test_every_option_of_the_vocabulary_is_read():
    """A bad value of each is noticed, so that none is in the list and read by nobody."""
    for option in sorted(OPTIONS):
        wants = labels(hostname="a", ssl_backend="", health_check="/", sticky="cookie", ssl="")
        wants |= {f"interlock.{option}": "\x00"}
        assert read_labels(service("web", wants)).rejections, option


@pytest.mark.parametrize("name", ["connect.sid", "ASP.NET_SessionId", ".AspNetCore.Session"])
def test_cookies_may_have_dots_in_their_names(name):
    assert the_policy(sticky_session_cookie=name).sticky == Sticky(StickyKind.APP_COOKIE, name)
    assert the_policy(sticky=f"app:{name}").sticky == Sticky(StickyKind.APP_COOKIE, name)
    assert the_policy(hash_key=f"cookie:{name}").hash_key == f"cookie:{name}"
    assert the_route(canary__cookie=name).canary == Canary("", cookie=name)


@pytest.mark.parametrize(
    "value",
    [
        "allow 10.0.0.0/8; deny all;",
        "deny all",
        "allow 10.0.0.0/8;\ndeny all;\n",
        'auth_basic "members {only}";',
        "limit_except GET { deny all; }",
        "if ($bad) { DENY all; }",
    ],
)
def test_a_protection_that_cannot_be_read_refuses_the_route(value):
    for rules in (Rules(), Rules(directives=frozenset({"allow", "deny", "auth_basic"}))):
        reading = read(rules=rules, backend_option=value)
        assert reading.routes == ()
        assert "interlock.backend_option.0" in " ".join(item.hint for item in reading.rejections)


def test_another_option_that_cannot_be_read_is_refused_alone():
    reading = read(backend_option="proxy_hide_header X-Allow; gzip on;")
    assert len(reading.routes) == 1
    assert [item.reason for item in reading.rejections] == ["invalid_label"]


def test_no_interval_is_the_usual_one_as_interlock_had_it():
    assert the_policy(health_check_interval="").check == Check(CheckKind.TCP)
    assert the_policy(health_check_interval="0").check == Check(CheckKind.TCP)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("word", ["$aa", '"$aa" ', "a ", "/$a1"])
def test_a_directive_that_is_none_is_told_without_trying_for_ever(word):
    reading = read(backend_option=f"add_header {word * 200}{{;")
    assert [item.reason for item in reading.rejections] == ["invalid_label"]
