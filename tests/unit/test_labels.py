"""What each label means, and that a value that is not of its form is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import labels, service

from agent.labels import DOCKER_LB, Reading, Reason, RouteDeclaration, read_labels
from agent.labels.names import OPTIONS
from agent.model import Rejection


def read(**values: str) -> Reading:
    return read_labels(service("shop_web", labels(**values)))


def the_route(**values: str) -> RouteDeclaration:
    reading = read(**values)
    assert len(reading.routes) == 1, reading.rejections
    return reading.routes[0]


def the_refusal(**values: str) -> Rejection:
    reading = read(**values)
    assert reading.routes == ()
    assert len(reading.rejections) == 1, reading.rejections
    return reading.rejections[0]


@pytest.mark.parametrize(
    ("wants", "host"),
    [
        ({"hostname": "test"}, "test.local"),
        ({"hostname": "app", "domain": "example.com"}, "app.example.com"),
        ({"hostname": "", "domain": "example.com"}, "example.com"),
        ({"hostname": "", "domain": "example.com", "context_root": "/x"}, "example.com"),
        ({"hostname": ""}, "local"),
        ({"hostname": "app.example.com", "domain": ""}, "app.example.com"),
        ({"hostname": "example.com", "domain": "example.com"}, "example.com"),
        ({"hostname": "Example.com", "domain": "example.com."}, "example.com"),
        ({"hostname": " APP ", "domain": "Example.COM"}, "app.example.com"),
        ({"hostname": "app", "domain": "example.com."}, "app.example.com"),
        ({"hostname": "*", "domain": "example.com"}, "*.example.com"),
        ({"hostname": "shop_web", "domain": "example.com"}, "shop_web.example.com"),
        ({"hostname": "bücher", "domain": "example.com"}, "xn--bcher-kva.example.com"),
        ({"hostname": "a" * 63, "domain": "example.com"}, "a" * 63 + ".example.com"),
    ],
)
def test_the_host_is_put_together_from_hostname_and_domain(wants, host):
    assert the_route(**wants).host == host


@pytest.mark.parametrize(
    "wants",
    [
        {"hostname": "", "domain": ""},
        {"hostname": "a b"},
        {"hostname": "a;b"},
        {"hostname": "app..example"},
        {"hostname": ".app"},
        {"hostname": "-app"},
        {"hostname": "app-"},
        {"hostname": "app", "domain": ".example.com"},
        {"hostname": "a.*", "domain": "example.com"},
        {"hostname": "*app", "domain": "example.com"},
        {"hostname": "*", "domain": ""},
        {"hostname": "~^(.*)$", "domain": ""},
        {"hostname": "a" * 64},
        {"hostname": ".".join(["a" * 60] * 5)},
        {"hostname": "app:8080"},
        {"hostname": "http://app"},
        {"hostname": "ü" * 70},
        {"hostname": "a\u2028b"},
        {"hostname": "\ud800"},
        {"hostname": "_wildcard", "domain": "example.com"},
        {"hostname": "00-default", "domain": ""},
        {"hostname": "app\n"},
        {"hostname": "app\x00"},
    ],
)
def test_what_is_no_host_name_is_refused(wants):
    refusal = the_refusal(**wants)
    assert refusal.reason == "invalid_host"
    assert refusal.subject == "service shop_web"
    assert refusal.source == "swarm"
    assert refusal.hint


def test_a_long_value_is_shown_shortened_and_escaped():
    refusal = the_refusal(hostname="x\n" * 5_000)
    assert "(10000 characters)" in refusal.message
    assert len(refusal.message) < 300
    assert "\n" not in refusal.message
    assert refusal.message.isascii()


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "", "TRUE", " Yes ", "\ton"])
def test_true(text):
    assert the_route(hostname="a", ssl=text).tls is True


@pytest.mark.parametrize("text", ["false", "0", "no", "off", "False", " OFF "])
def test_false(text):
    assert the_route(hostname="a", ssl=text).tls is False


@pytest.mark.parametrize("label", ["ssl", "ssl_only", "context_root_rewrite"])
@pytest.mark.parametrize(
    "text", ["maybe", "2", "truee", "y", "t", "true false", "\uff54rue", "None"]
)
def test_any_other_boolean_is_refused(label, text):
    refusal = the_refusal(hostname="a", **{label: text})
    assert refusal.reason == "invalid_label"
    assert f"interlock.{label}=" in refusal.message


def test_a_host_that_says_nothing_of_tls_leaves_it_open():
    assert the_route(hostname="a").tls is None


def test_ssl_only_implies_ssl_and_contradicts_its_absence():
    assert the_route(hostname="a", ssl_only="yes").tls is True
    assert the_refusal(hostname="a", ssl_only="yes", ssl="no").reason == "invalid_label"


@pytest.mark.parametrize("text", ["1", "80", " 443 ", "65535"])
def test_ports(text):
    assert the_route(hostname="a", port=text).port == int(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "65536",
        "-1",
        "+80",
        "8_0",
        "80.0",
        "0x50",
        "http",
        "\uff18\uff10",
        "1e3",
        "9" * 5000,
    ],
)
def test_what_is_no_port_is_refused(text):
    assert the_refusal(hostname="a", port=text).reason == "invalid_label"


def test_weights():
    assert the_route(hostname="a", weight="0").weight == 0
    assert the_route(hostname="a", weight="1000").weight == 1000
    assert the_route(hostname="a").weight is None
    assert the_refusal(hostname="a", weight="1001").reason == "invalid_label"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/api", "/api"),
        ("/api/", "/api"),
        ("/", "/"),
        ("", "/"),
        ("/a/b-c_d.e~f", "/a/b-c_d.e~f"),
        ("/..a", "/..a"),
    ],
)
def test_context_roots(text, path):
    assert the_route(hostname="a", context_root=text).context_root == path


@pytest.mark.parametrize(
    "text",
    [
        "api",
        "/a//b",
        "//",
        "/a/../b",
        "/..",
        "/./a",
        "/a b",
        '/a"',
        "/a'",
        "/a;b",
        "/a{b",
        "/a}",
        "/$host",
        "/a\\b",
        "/a?b=c",
        "/a#b",
        "/a%20b",
        "/ä",
        "/a\nb",
        "/a\x00",
        "/" + "a" * 300,
    ],
)
def test_what_is_no_plain_path_is_refused(text):
    assert the_refusal(hostname="a", context_root=text).reason == "invalid_label"


def test_rewriting_the_root_is_no_rewriting():
    assert the_route(hostname="a", context_root="/x", context_root_rewrite="").rewrite is True
    assert the_route(hostname="a", context_root_rewrite="true").rewrite is False


def test_networks():
    assert the_route(hostname="a", network="shop_front-end.1").network == "shop_front-end.1"
    assert the_route(hostname="a", network="").network == ""
    for text in ("-a", "a b", "a;b", "ä", "../x", "a" * 300):
        assert the_refusal(hostname="a", network=text).reason == "invalid_label"


@pytest.mark.parametrize(
    ("text", "name"),
    [("a.pem", "a.pem"), ("shop/a.pem", "shop/a.pem"), ("/etc/passwd", "etc/passwd")],
)
def test_certificates_are_files_below_the_certificate_directory(text, name):
    route = the_route(hostname="a", ssl="", ssl_cert=text, ssl_cert_key=text)
    assert (route.certificate, route.certificate_key) == (name, name)


@pytest.mark.parametrize(
    "text", ["/", "../a", "a/../../b", "a/./b", "a//b", "a b", "a;", "$x", "a\\b", 'a"', "ä"]
)
def test_what_is_no_plain_file_name_is_refused(text):
    assert the_refusal(hostname="a", ssl="", ssl_cert=text).reason == "invalid_label"


def test_aliases_are_every_label_of_the_base_name_and_of_none_other():
    reading = read_labels(
        service(
            "shop_web",
            {
                "interlock.hostname": "a",
                "interlock.alias_domain": "one.example.com",
                "interlock.alias_domain.0": "TWO.example.com.",
                "interlock.alias_domain.blue": "*.example.org",
                "interlock.alias_domain.again": "one.example.com",
                "interlock.alias_domain.self": "a.local",
                "com.example.interlock.alias_domain_note": "x.example.com",
                "interlock.alias_domain_note": "y.example.com",
            },
        )
    )
    assert reading.routes[0].aliases == ("*.example.org", "one.example.com", "two.example.com")
    assert [item.reason for item in reading.rejections] == ["label_ignored"] * 2
    assert (
        "com.example.interlock.alias_domain_note has the name of" in reading.rejections[0].message
    )
    assert reading.rejections[1].hint == "Did you mean interlock.alias_domain?"


def test_a_bad_alias_is_refused_alone():
    reading = read(hostname="a", alias_domain__0="x;y", alias_domain__1="b.example.com")
    assert reading.routes[0].aliases == ("b.example.com",)
    assert [item.reason for item in reading.rejections] == ["invalid_host"]
    assert "interlock.alias_domain.0" in reading.rejections[0].message


def test_websocket_endpoints_are_paths_or_urls():
    route = the_route(
        hostname="a",
        websocket_endpoint="/ws",
        websocket_endpoint__0="ws://a.local/events/",
        websocket_endpoint__1="wss://a.local",
    )
    assert route.websocket_endpoints == ("/", "/events", "/ws")


def test_a_websocket_endpoint_outside_the_context_root_is_told_of():
    reading = read(hostname="a", context_root="/api", websocket_endpoint="/ws")
    assert reading.routes[0].websocket_endpoints == ()
    assert [item.reason for item in reading.rejections] == ["label_ignored"]


def test_labels_of_the_service_come_first_then_those_of_the_template_per_label():
    reading = read_labels(
        service(
            "shop_web",
            labels(hostname="outer", port="81"),
            template=labels(hostname="inner", domain="example.com", port="82"),
        )
    )
    assert reading.routes[0].host == "outer.example.com"
    assert reading.routes[0].port == 81


def test_route_labels_without_a_hostname_are_refused():
    refusal = the_refusal(port="80")
    assert refusal.reason == "no_hostname"
    assert "interlock.hostname" in refusal.hint


def test_a_misspelt_hostname_is_told_of():
    reading = read(hostnme="a")
    assert {item.reason for item in reading.rejections} == {"no_hostname", "label_ignored"}
    assert any("Did you mean interlock.hostname?" in item.hint for item in reading.rejections)


@pytest.mark.parametrize(
    "label", ["interlock.contextroot", "Interlock.Port", "interlock.sslonly", "interlock.a.b"]
)
def test_unknown_labels_are_told_of_and_the_route_lives(label):
    reading = read_labels(service("shop_web", {"interlock.hostname": "a", label: "x"}))
    assert len(reading.routes) == 1
    assert [item.reason for item in reading.rejections] == ["label_ignored"]


def test_certificate_labels_without_ssl_are_told_of():
    reading = read(hostname="a", ssl_cert="a.pem", ssl_cert_key="a.key")
    assert len(reading.routes) == 1
    assert [item.reason for item in reading.rejections] == ["label_ignored"] * 2


@pytest.mark.parametrize(
    "wants", [{}, {"ext__name": "nginx"}, {"app": "main"}, {"ext__other": "x", "app": ""}]
)
def test_who_does_not_ask_is_not_told_anything(wants):
    assert read(**wants) == Reading()


def test_all_that_is_wrong_is_told_at_once():
    reading = read(hostname="a", port="x", weight="y", ssl="z")
    assert reading.routes == ()
    assert len(reading.rejections) == 3


DOCUMENT = Path(__file__).parents[2] / "docs" / "labels.md"


def test_every_reason_and_label_is_documented():
    text = DOCUMENT.read_text()
    for reason in Reason:
        assert f"| `{reason}` |" in text
    for option in OPTIONS:
        assert f"`interlock.{option}`" in text, option
    for option, spelled in DOCKER_LB.spelled.items():
        assert f"`com.docker.lb.{spelled}`" in text, option


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("bücher.example.com", "xn--bcher-kva.example.com"),
        # What clients ask for today, by the rules of 2008 and not those of 2003.
        ("straße.example.com", "xn--strae-oqa.example.com"),
        ("STRASSE.example.com", "strasse.example.com"),
        ("βόλος.example.com", "xn--nxasmm1c.example.com"),
        ("*.straße.example.com", "*.xn--strae-oqa.example.com"),
    ],
)
def test_a_name_with_other_letters_is_the_one_that_clients_ask_for(name, host):
    assert the_route(hostname=name, domain="").host == host


def test_a_joiner_in_a_host_name_is_refused_and_not_dropped():
    refused = the_refusal(hostname="sh\u200cop", domain="example.com")
    assert refused.reason == Reason.INVALID_HOST
    assert "punycode" in refused.hint


@pytest.mark.parametrize("root", ["/.tidegate", "/.tidegate/mirror", "/" + "a" * 240])
def test_a_context_root_that_tidegate_needs_itself_is_refused(root):
    assert the_refusal(hostname="a", context_root=root).reason == Reason.INVALID_LABEL


def test_an_empty_file_name_is_none_as_interlock_had_it():
    route = the_route(hostname="a", ssl="", ssl_cert="", ssl_cert_key="")
    assert (route.tls, route.certificate, route.certificate_key) == (True, "", "")


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("a.example.com:8080", "without scheme and port"),
        ("http://a.example.com", "a path belongs into context_root"),
        ("[::1]", "without scheme and port"),
        ("a.example.com,b.example.com", ".0, .1"),
    ],
)
def test_what_is_more_than_a_host_name_is_refused_with_its_cure(name, cure):
    refused = the_refusal(hostname=name, domain="")
    assert refused.reason == Reason.INVALID_HOST
    assert cure in refused.hint
