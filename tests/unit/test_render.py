"""What a site looks like as nginx configuration, and that nginx takes it."""

from __future__ import annotations

import http.client
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters import GOLDEN, check_golden, settings
from nginx_syntax import Directive, parse

from agent.config.settings import Settings
from agent.errors import RenderError
from agent.model import (
    BackendTls,
    Host,
    Location,
    Protocol,
    Redirect,
    Site,
    TcpRoute,
    Tls,
    VerifyClient,
)
from agent.render import (
    Capabilities,
    file_name,
    generation,
    hosts_of_files,
    quote,
    redirect_url,
    render,
)
from agent.render import directive as raw_directive

DEFAULTS = settings()
OLD = Capabilities(nginx_version=1_022_001)
NEW = Capabilities(nginx_version=1_031_001)
STREAM = Capabilities(nginx_version=1_031_001, features=frozenset({"stream"}))
OLD_STREAM = Capabilities(nginx_version=1_022_001, features=frozenset({"stream"}))
CERTIFICATE = Tls("/certs/shop.pem", "/certs/shop.key")
REPOSITORY = Path(__file__).parents[2]


def location(host: str, path: str = "/", **options: Any) -> Location:
    return Location(path=path, upstream=host + path, **options)


def plain(name: str = "a.example.com", *, tls: Tls | None = None) -> Host:
    return Host(name, (), (location(name),), tls)


SHOP = Host(
    name="shop.example.com",
    aliases=("www.example.com", "xn--bcher-kva.example.com"),
    locations=(
        location("shop.example.com", "/", tls_only=True),
        location("shop.example.com", "/api"),
        location("shop.example.com", "/old/shop", rewrite=True),
        location("shop.example.com", "/pay", rewrite=True, tls_only=True),
    ),
    tls=CERTIFICATE,
)
ONLY_PATHS = Host(
    name="api.example.com",
    aliases=(),
    locations=(
        location("api.example.com", "/v1"),
        location("api.example.com", "/v2", rewrite=True),
    ),
)
FRONT = Site(
    (
        Host(
            "app.example.com",
            ("old.example.com", "older.example.com"),
            (
                Location("/", "app.example.com/", tls_only=True, mirror="shadow.example.com/"),
                Location("/api.Shop", "app.example.com/api.Shop", protocol=Protocol.GRPC),
                Location("/files", "app.example.com/files", rewrite=True, request_buffering=False),
                Location(
                    "/raw",
                    "app.example.com/raw",
                    directives=('add_header X-Team "blue; {green}" always;', "proxy_buffering on;"),
                ),
            ),
            CERTIFICATE,
            redirects=(
                Redirect("old.example.com", "app.example.com"),
                Redirect("older.example.com", "https://new.example.com:8443/from/"),
            ),
        ),
    ),
    default=(Location("/", "default/"), Location("/legacy", "default/legacy", rewrite=True)),
)
EVERYTHING = Site((plain("*.dev.example.com"), ONLY_PATHS, SHOP))
UNOPENED = Site(
    (
        Host("*.raw.example.com", ("default",), (), passthrough="*.raw.example.com/"),
        Host("bank.example.com", (), (), passthrough="bank.example.com/"),
        SHOP,
    ),
    tcp=(TcpRoute(1883, "tcp/1883"), TcpRoute(5432, "tcp/5432")),
)

SECURE = Host(
    name="secure.example.com",
    aliases=(),
    locations=(
        location("secure.example.com", "/", backend_tls=BackendTls()),
        location(
            "secure.example.com",
            "/pay",
            rewrite=True,
            backend_tls=BackendTls(
                verify=True,
                ca="/certs/ca.pem",
                name="pay.internal",
                certificate="/certs/us.pem",
                key="/certs/us.key",
            ),
        ),
    ),
    tls=Tls(
        "/certs/secure.pem",
        "/certs/secure.key",
        verify_client=VerifyClient.REQUIRED,
        client_ca="/certs/clients.pem",
        hsts="max-age=31536000",
    ),
)
CASES: dict[str, tuple[Site, Settings, Capabilities]] = {
    "empty": (Site(()), DEFAULTS, OLD),
    "plain": (Site((plain(),)), DEFAULTS, OLD),
    "everything": (EVERYTHING, DEFAULTS, OLD),
    "everything-http2-directive": (EVERYTHING, DEFAULTS, NEW),
    "everything-other-settings": (
        EVERYTHING,
        settings(
            port=8080,
            ssl_port=8443,
            listen_ipv6=True,
            redirect_code=302,
            proxy_next_upstream="off",
            ssl_default_cert="default.pem",
            ssl_default_cert_key="default.key",
            ssl_protocols="TLSv1.3",
            ssl_ciphers="",
            client_max_body_size="10m",
            max_conn=4096,
            worker_processes="auto",
        ),
        NEW,
    ),
    "tls-both-legs": (Site((SECURE,)), DEFAULTS, OLD),
    "http3": (
        Site((plain(tls=CERTIFICATE),)),
        settings(http3=True, ssl_stapling=False),
        Capabilities(1_031_001, frozenset({"http_v3"})),
    ),
    "http3-unavailable": (Site((plain(tls=CERTIFICATE),)), settings(http3=True), NEW),
    "front": (FRONT, DEFAULTS, OLD),
    "front-other-settings": (
        FRONT,
        settings(
            trusted_proxies=("10.0.0.0/8", "2001:db8::1"),
            grpc_port=9090,
            nginx_status_from=("127.0.0.1",),
            ssl_default_cert="default.pem",
            request_buffering=False,
            keepalive_timeout=5.5,
            client_body_timeout=30.0,
            client_body_buffer_size="32k",
            client_header_buffer_size="2k",
            large_client_header_buffers="8 16k",
            underscores_in_headers=True,
            hide_info_headers=True,
        ),
        OLD,
    ),
    "front-proxy-protocol": (
        FRONT,
        settings(proxy_protocol=True, trusted_proxies=("10.0.0.0/8",), grpc_port=9090),
        NEW,
    ),
    "proxy-protocol-of-anybody": (Site((plain(),)), settings(proxy_protocol=True), OLD),
    "tls-off": (EVERYTHING, settings(ssl_port=0), OLD),
    "stream": (UNOPENED, settings(ssl_port=8443, listen_ipv6=True), STREAM),
    "stream-before-http2-directive": (UNOPENED, DEFAULTS, OLD_STREAM),
    "stream-missing": (UNOPENED, DEFAULTS, OLD),
    "stream-tls-off": (UNOPENED, settings(ssl_port=0), STREAM),
}


@pytest.mark.parametrize("case", CASES)
def test_golden_sites(case):
    site, options, caps = CASES[case]
    files = render(site, options, caps)
    for name, text in files.items():
        check_golden(f"render/{case}/{name}", text)
    assert sorted(files) == sorted(path.name for path in (GOLDEN / "render" / case).iterdir())


def test_no_golden_file_rewrites_with_an_unnamed_capture():
    """CVE-2026-42945: `rewrite` with `$1` and a `?` overflows a buffer; we need no `rewrite`."""

    def words(directives: tuple[Directive, ...]) -> list[tuple[str, ...]]:
        return [
            found
            for item in directives
            for found in (item.words, *(words(item.block) if item.block else ()))
        ]

    golden = sorted(GOLDEN.glob("render/*/*.conf"))
    assert len(golden) > 10
    for found in (item for path in golden for item in words(parse(path.read_text()))):
        assert found[0] != "rewrite"
        # The one that there is has nothing but a `return` within.
        assert found[0] != "if" or found == ("if", "($tidegate_plain)")
        assert not any(f"${digit}" in word for word in found for digit in range(10))


def directives(text: str, *path: str) -> list[tuple[str, ...]]:
    """Words of the directives in the first block with each of these names, one in the other."""
    level = parse(text)
    for name in path:
        level = next(item.block for item in level if " ".join(item.words) == name and item.block)
    return [item.words for item in level]


def test_a_location_names_its_upstream_and_proxies():
    text = render(Site((plain(),)), DEFAULTS, OLD)["a.example.com.conf"]
    assert directives(text, "server", "location /") == [
        ("set", "$tidegate_upstream", "a.example.com/"),
        ("proxy_pass", "http://tidegate"),
    ]


def test_a_context_root_matches_itself_and_below_only():
    text = render(Site((ONLY_PATHS,)), DEFAULTS, OLD)["api.example.com.conf"]
    roots = [words[1:] for words in directives(text, "server") if words[0] == "location"]
    assert roots == [("=", "/v1"), ("/v1/",), ("=", "/v2"), ("/v2/",), ("/",)]
    assert directives(text, "server", "location /") == [("return", "404")]


def test_a_rewritten_context_root_is_taken_off_and_told():
    text = render(Site((ONLY_PATHS,)), DEFAULTS, OLD)["api.example.com.conf"]
    assert directives(text, "server", "location = /v2") == [("return", "308", "/v2/$is_args$args")]
    assert directives(text, "server", "location /v2/") == [
        ("set", "$tidegate_upstream", "api.example.com/v2"),
        ("set", "$tidegate_strip", "/v2"),
        ("proxy_pass", "http://tidegate/"),
    ]


def test_a_host_whose_clients_must_show_a_certificate_has_no_plain_way_round():
    def plain_server(**options: object) -> list[tuple[str, ...]]:
        text = render(Site((SECURE,)), settings(**options), OLD)["secure.example.com.conf"]
        return directives(text, "server")

    for options, said in (
        ({}, ("return", "308", "https://$host$request_uri")),
        ({"ssl_port": 0}, ("return", "403")),
    ):
        found = plain_server(**options)
        assert said in found
        assert not [words for words in found if words[0] == "location"]


def test_a_host_that_trusts_somebody_or_asks_for_certificates_tells_peers_so():
    include = ("include", "conf.d/proxy.inc")
    text = render(Site((plain(),)), DEFAULTS, OLD)["a.example.com.conf"]
    assert include not in directives(text, "server")
    trusting = settings(trusted_proxies=("10.0.0.0/8",))
    text = render(Site((plain(),)), trusting, OLD)["a.example.com.conf"]
    assert include in directives(text, "server")
    servers = parse(render(Site((SECURE,)), DEFAULTS, OLD)["secure.example.com.conf"])
    secure = next(item for item in servers if item.words == ("server",) and "443" in str(item))
    assert include in [item.words for item in secure.block or ()]


def test_a_location_that_sets_headers_of_its_own_keeps_those_of_all():
    lines = ("proxy_set_header X-C c;", "proxy_buffers 4 8k;")
    host = Host("a.example.com", (), (location("a.example.com", "/", directives=lines),))
    text = render(Site((host,)), DEFAULTS, OLD)["a.example.com.conf"]
    found = directives(text, "server", "location /")
    assert ("include", "conf.d/proxy.inc") in found
    # Beside buffers so small, the first one of all others would be refused.
    assert ("proxy_buffer_size", "16k") in found


def test_identities_towards_peers_have_upstreams_of_their_own_each_once():
    one, two = BackendTls(name="one"), BackendTls(verify=True, name="one")
    hosts = tuple(
        Host(
            name,
            (),
            (location(name, "/", backend_tls=one), location(name, "/x", backend_tls=two)),
        )
        for name in ("a.example.com", "b.example.com")
    )
    text = render(Site(hosts), DEFAULTS, OLD)["00-default.conf"]
    blocks = [item.words[1] for item in parse(text) if item.words[0] == "upstream"]
    expected = {one.identity("a.example.com"), two.identity("b.example.com")}
    assert blocks == sorted(f"tidegate_tls_{item}" for item in expected)


def test_an_identity_is_all_that_decides_what_a_connection_is():
    base = BackendTls(verify=True, ca="/ca", name="n", certificate="/c", key="/k")
    others = [
        replace(base, verify=False),
        replace(base, ca="/other"),
        replace(base, name="other"),
        replace(base, certificate="/other"),
        replace(base, key="/other"),
        BackendTls(),
        BackendTls(name="b.test"),
    ]
    identities = [item.identity("a.test") for item in (base, *others)]
    assert len(set(identities)) == len(identities)
    assert BackendTls(name="a.test").identity("b.test") == BackendTls().identity("a.test")
    assert BackendTls().server_name("*.a.test") == BackendTls().server_name("") == ""


def test_connections_with_a_name_per_request_are_not_kept():
    wild = Host("*.a.test", (), (location("a.test", "/", backend_tls=BackendTls()),))
    for caps, said in ((OLD, False), (Capabilities(1_029_007), True)):
        text = render(Site((wild,)), DEFAULTS, caps)["00-default.conf"]
        assert ("keepalive 0;" in text) == said
        assert "keepalive 32" not in text
    assert "proxy_ssl_name $host;" in render(Site((wild,)), DEFAULTS, OLD)["_wildcard.a.test.conf"]


@pytest.mark.parametrize(("port", "shown"), [(443, ""), (8443, ":8443")])
def test_plain_http_is_redirected_where_only_tls_is_wanted(port, shown):
    text = render(Site((SHOP,)), settings(ssl_port=port), OLD)["shop.example.com.conf"]
    assert directives(text, "server", "location /") == [
        ("return", "308", f"https://$host{shown}$request_uri")
    ]
    assert ("proxy_pass", "http://tidegate") in directives(text, "server", "location /api/")


def test_unknown_hosts_get_503_and_a_refused_handshake():
    text = render(Site((plain(tls=CERTIFICATE),)), DEFAULTS, OLD)["00-default.conf"]
    http, tls = [item.block for item in parse(text) if item.words == ("server",)]
    assert http is not None
    assert Directive(("location", "/"), (Directive(("return", "503")),)) in http
    assert tls == (
        Directive(("listen", "443", "default_server", "ssl", "http2")),
        Directive(("ssl_reject_handshake", "on")),
    )


def test_the_tls_listener_refuses_unknown_hosts_and_is_off_with_sslport_0():
    def common(**options: object) -> str:
        return render(Site((plain(),)), settings(**options), OLD)["00-default.conf"]

    assert "listen 443 default_server ssl" in common()
    assert "ssl_reject_handshake on;" in common()
    assert " ssl" not in common(SSLPort=0)


def test_haproxys_time_outs_certificate_and_nginxs_dh_parameters_are_rendered():
    def common(**options: object) -> str:
        return render(Site((plain(),)), settings(**options), OLD)["00-default.conf"]

    haproxy = common(Name="haproxy", ConnectTimeout=250, ServerTimeout=1500, SSLCert="/ssl/all.pem")
    for directive in (
        "proxy_connect_timeout 250ms;",
        "proxy_send_timeout 1500ms;",
        "proxy_read_timeout 1500ms;",
        "send_timeout 10000ms;",
        'certificate = "/ssl/all.pem",',
        'key = "/ssl/all.pem",',
    ):
        assert directive in haproxy
    assert 'ssl_dhparam "/dh.pem";' in common(DHParam=True, DHParamPath="/dh.pem")
    assert "ssl_dhparam" not in common(DHParam=True)


def test_a_site_is_the_same_text_in_whatever_order():
    files = render(Site((plain("b.example.com"), plain("a.example.com"))), DEFAULTS, OLD)
    again = render(Site((plain("a.example.com"), plain("b.example.com"))), DEFAULTS, OLD)
    assert (
        list(files)
        == list(again)
        == ["00-default.conf", "a.example.com.conf", "b.example.com.conf"]
    )
    assert generation(files) == generation(again)
    assert len(generation(files)) == 64


def test_the_generation_tells_any_two_sites_apart():
    seen = [{}, {"a": "b"}, {"ab": ""}, {"": "ab"}, {"a": "b", "c": ""}, {"a": "bc"}, {"c": "b"}]
    assert len({generation(files) for files in seen}) == len(seen)


def test_each_host_has_a_file_name_of_its_own_that_the_admin_api_takes():
    long = ".".join(["a" * 60] * 4)
    hosts = ["a", "*.a", "0.a", long, long + "bbbbbbbbb", "*." + long, "x_y.a"]
    files = [file_name(host) for host in hosts]
    assert len(set(files)) == len(files)
    assert file_name("*.example.com") == "_wildcard.example.com.conf"
    for name in files:
        assert len(name) <= 255
        assert name.endswith(".conf")
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        assert name[0] not in ".-"
    assert hosts_of_files(Site((plain("*.a"),))) == {"_wildcard.a.conf": "*.a"}


def test_quoting():
    assert quote("a b;{}#'") == '"a b;{}#\'"'
    assert quote('a"b\\') == '"a\\"b\\\\"'
    assert quote(80) == '"80"'
    assert redirect_url("a.test") == '"$tidegate_proto://a.test$request_uri"'
    assert redirect_url("https://a.test/b") == '"https://a.test/b$request_uri"'
    for bad in ("$host", "a\nb", "\x00", "\x7f"):
        with pytest.raises(RenderError):
            quote(bad)


@pytest.mark.parametrize(
    "text",
    [
        "proxy_buffering on;",
        'add_header X-A "a b; {c}" always;',
        "add_header X-B 'it is \\'quoted\\'';",
        "proxy_set_header X-C $host;",
        "internal;",
    ],
)
def test_a_raw_directive_is_written_as_it_is(text):
    assert raw_directive(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "proxy_buffering on",
        "proxy_buffering on; return 200;",
        "proxy_buffering on;\nreturn 200;",
        "proxy_buffering on\n;",
        "} server { listen 81;",
        "if ($a) { return 200; }",
        "return 200; }",
        "a ${b};",
        "a b}c;",
        "a #b;",
        'a "b;',
        'a "b"c;',
        "a 'b;",
        'a "b\\";',
        "a b\\;",
        "a\tb;",
        "content_by_lua_block { }",
    ],
)
def test_more_or_less_than_one_directive_is_not_written(text):
    with pytest.raises(RenderError, match="is not one directive"):
        raw_directive(text)
    with pytest.raises(RenderError):
        render(Site((Host("a", (), (Location("/", "a/", directives=(text,)),)),)), DEFAULTS, OLD)


def test_a_build_without_stream_lua_gets_nothing_for_it():
    files = render(UNOPENED, DEFAULTS, OLD)
    assert not [name for name in files if name.endswith(".stream")]
    assert not any("tls.inc" in text or "proxy_protocol" in text for text in files.values())


def test_without_passthrough_the_tls_port_is_nginx_s_own():
    files = render(EVERYTHING, DEFAULTS, STREAM)
    assert "passthrough.stream" not in files
    assert "listen 443 ssl;" in files["shop.example.com.conf"]


def test_a_host_that_is_passed_on_unopened_has_no_tls_here():
    host = Host("a.example.com", (), (), tls=CERTIFICATE, passthrough="a.example.com/")
    assert CERTIFICATE.key not in render(Site((host,)), DEFAULTS, STREAM)["a.example.com.conf"]
    assert CERTIFICATE.key in render(Site((host,)), DEFAULTS, OLD)["a.example.com.conf"]


def test_a_file_of_a_tcp_port_is_known_as_its():
    assert hosts_of_files(Site((), tcp=(TcpRoute(5432, "tcp/5432"),))) == {
        "tcp-5432.stream": "TCP port 5432"
    }


# --- templates of the operator


def test_an_operator_s_template_replaces_the_one_of_that_name(tmp_path):
    (tmp_path / "host.conf.j2").write_text("server { server_name {{ host.name | quote }}; }\n")
    options = settings(template_path=str(tmp_path))
    files = render(Site((plain(),)), options, OLD)
    assert files["a.example.com.conf"] == 'server { server_name "a.example.com"; }\n'
    assert files["00-default.conf"] == render(Site((plain(),)), DEFAULTS, OLD)["00-default.conf"]
    (tmp_path / "host.conf.j2").write_text("# {{ host.name }}: another text, and longer\n")
    assert "another" in render(Site((plain(),)), options, OLD)["a.example.com.conf"]


def test_an_operator_s_template_can_extend_a_built_in_one(tmp_path):
    (tmp_path / "more.conf.j2").write_text("gzip on;\n")
    (tmp_path / "default.conf.j2").write_text(
        "{% include 'more.conf.j2' %}{% include 'builtin/default.conf.j2' %}"
    )
    text = render(Site(()), settings(template_path=str(tmp_path)), OLD)["00-default.conf"]
    assert text == "gzip on;\n" + render(Site(()), DEFAULTS, OLD)["00-default.conf"]


@pytest.mark.parametrize(
    "template",
    ["{{ nothing }}", "{% if %}", "{{ 1 // 0 }}", "{{ host.name + 1 }}", "{{ [][3].x }}"],
)
def test_a_template_that_fails_is_an_error_of_ours(tmp_path, template):
    (tmp_path / "host.conf.j2").write_text(template)
    with pytest.raises(RenderError, match="TemplatePath"):
        render(Site((plain(),)), settings(template_path=str(tmp_path)), OLD)


# --- real nginx


NGINX = shutil.which("nginx") or shutil.which("openresty") or "/usr/sbin/nginx"
LUA_MODULES = [
    Path("/usr/lib/nginx/modules") / name
    for name in ("ndk_http_module.so", "ngx_http_lua_module.so")
]


def nginx_test(nginx_root: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Write the files where nginx looks for them, beside our own static part, and ask nginx."""
    (nginx_root / "site").mkdir()
    for name, text in files.items():
        (nginx_root / "site" / name).write_text(text)
    (nginx_root / "conf.d").symlink_to(REPOSITORY / "nginx" / "conf.d")
    modules = "".join(f'load_module "{path}";\n' for path in LUA_MODULES if path.exists())
    temp = "".join(
        f'{kind}_temp_path "{nginx_root}/{kind}";\n'
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (nginx_root / "nginx.conf").write_text(
        f'{modules}pid "{nginx_root}/pid";\nerror_log stderr;\nevents {{}}\n'
        f"http {{ {temp} access_log off;\ninclude conf.d/http.inc;\n"
        "map $http_x_request_id $tidegate_request_id { default $request_id; }\n"
        "include site/*.conf; }\n"
    )
    return subprocess.run(
        [NGINX, "-t", "-p", str(nginx_root), "-c", str(nginx_root / "nginx.conf")],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=shop.example.com "
        "-keyout shop.key -out shop.pem"
    )
    subprocess.run(
        command.split(),
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )
    return directory


@pytest.mark.dataplane
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("ipv6", [False, True])
def test_nginx_takes_a_site_with_everything(
    tmp_path, certificates, require, free_port, default, ipv6
):
    require(Path(NGINX).exists(), "nginx")
    options = settings(
        port=free_port(),
        ssl_port=free_port(),
        listen_ipv6=ipv6,
        ssl_cert_path=str(certificates),
        ssl_default_cert="shop.pem" if default else "",
        ssl_default_cert_key="shop.key" if default else "",
    )
    tls = Tls(f"{certificates}/shop.pem", f"{certificates}/shop.key")
    long = ".".join(["a" * 60] * 4)
    site = Site((plain("*.dev.example.com"), ONLY_PATHS, plain(long), _with(SHOP, tls)))
    done = nginx_test(tmp_path, render(site, options, _capabilities()))
    assert done.returncode == 0, done.stderr
    assert "test is successful" in done.stderr
    assert "[warn]" not in done.stderr


@pytest.mark.dataplane
@pytest.mark.parametrize(
    "case", ["front", "front-other-settings", "front-proxy-protocol", "proxy-protocol-of-anybody"]
)
def test_nginx_takes_what_is_in_front(tmp_path, certificates, require, free_port, case):
    require(Path(NGINX).exists(), "nginx")
    site, options, _ = CASES[case]
    tls = Tls(f"{certificates}/shop.pem", f"{certificates}/shop.key")
    given = options.extension.model_dump(exclude_unset=True) | {
        "port": free_port(),
        "ssl_port": free_port(),
        "ssl_cert_path": str(certificates),
    }
    if "grpc_port" in given:
        given["grpc_port"] = free_port()
    if "ssl_default_cert" in given:
        given |= {"ssl_default_cert": "shop.pem", "ssl_default_cert_key": "shop.key"}
    hosts = tuple(replace(host, tls=tls if host.tls else None) for host in site.hosts)
    files = render(replace(site, hosts=hosts), settings(**given), _capabilities())
    done = nginx_test(tmp_path, files)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


@pytest.mark.dataplane
def test_nginx_takes_hostile_values_for_what_they_are(tmp_path, require, free_port):
    """One strange value in each place that has any; nothing of it becomes a directive."""
    require(Path(NGINX).exists(), "nginx")
    strange = 'a; return 200 "x"; } # {\\" ~^/'
    host = Host(
        "a.example.com",
        ("old.example.com",),
        (
            Location("/", strange, mirror=strange),
            Location("/g", strange, protocol=Protocol.GRPC, rewrite=True),
            Location("/u", strange, request_buffering=False),
        ),
        redirects=(Redirect("old.example.com", "https://" + strange),),
    )
    files = render(
        Site((host,), default=(Location("/", strange),)),
        settings(port=free_port(), ssl_port=0),
        _capabilities(),
    )
    done = nginx_test(tmp_path, files)
    assert done.returncode == 0, done.stderr


@pytest.mark.dataplane
def test_nginx_takes_a_site_without_hosts(tmp_path, require, free_port):
    require(Path(NGINX).exists(), "nginx")
    files = render(Site(()), settings(port=free_port()), _capabilities())
    done = nginx_test(tmp_path, files)
    assert done.returncode == 0, done.stderr


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the path it was asked for."""

    def do_GET(self) -> None:
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def backend() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "nginx does not listen"
            time.sleep(0.02)
        else:
            return


SERVES_FILES = """
map "" $tidegate_certificate { default ""; }
init_by_lua_block {
    local ssl = require "ngx.ssl"
    local function content(path)
        local file = io.open(path)
        local text = file:read("*a")
        file:close()
        return text
    end
    package.loaded["tidegate.certificates"] = {
        serve = function(options)
            assert(ssl.set_cert(ssl.parse_pem_cert(content(options.certificate))))
            assert(ssl.set_priv_key(ssl.parse_pem_priv_key(content(options.key))))
        end,
    }
}
"""
"""In the place of our Lua: certificates as they lie there."""


@pytest.fixture
def routed(tmp_path, certificates, require, free_port, backend) -> Iterator[tuple[int, int]]:
    """Plain and TLS port of an nginx that serves SHOP and ONLY_PATHS from one plain backend."""
    require(Path(NGINX).exists(), "nginx")
    plain_port, tls_port = free_port(), free_port()
    options = settings(port=plain_port, ssl_port=tls_port)
    tls = Tls(f"{certificates}/shop.pem", f"{certificates}/shop.key")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "server.inc").write_text("")
    (tmp_path / "conf.d" / "proxy.inc").write_text("")
    files = render(Site((ONLY_PATHS, _with(SHOP, tls))), options, _capabilities())
    (tmp_path / "site").mkdir()
    for name, text in files.items():
        (tmp_path / "site" / name).write_text(text)
    modules = "".join(f'load_module "{path}";\n' for path in LUA_MODULES if path.exists())
    temp = "".join(
        f'{kind}_temp_path "{tmp_path}/{kind}";\n'
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f'{modules}daemon off;\nmaster_process off;\npid "{tmp_path}/pid";\n'
        f'error_log "{tmp_path}/error.log";\nevents {{}}\n'
        f"http {{ {temp} access_log off; server_names_hash_bucket_size 512;\n"
        f"upstream tidegate {{ server 127.0.0.1:{backend}; }}\n{SERVES_FILES}\n"
        "include site/*.conf; }\n"
    )
    with subprocess.Popen(
        [NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    ) as process:
        try:
            wait_for(plain_port)
            yield plain_port, tls_port
        finally:
            process.terminate()


def get(connection: http.client.HTTPConnection, host: str, path: str) -> tuple[int, str]:
    """Status, and the path that the backend saw or the place that the client is sent to."""
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers.get("Location") or (body if answer.status == 200 else "")


@pytest.mark.dataplane
def test_requests_go_where_the_site_says(routed, certificates):
    plain_port, tls_port = routed
    plain_http = http.client.HTTPConnection("127.0.0.1", plain_port, timeout=10)
    for host, path, expected in [
        ("api.example.com", "/v1", (200, "/v1")),
        ("api.example.com", "/v1/x?y=1", (200, "/v1/x?y=1")),
        ("api.example.com", "/v1x", (404, "")),
        ("api.example.com", "/", (404, "")),
        ("api.example.com", "/v2?y=1", (308, "/v2/?y=1")),
        ("api.example.com", "/v2/x?y=1", (200, "/x?y=1")),
        ("API.example.com:80", "/v2/", (200, "/")),
        ("shop.example.com", "/a?b", (308, f"https://shop.example.com:{tls_port}/a?b")),
        ("www.example.com", "/a", (308, f"https://www.example.com:{tls_port}/a")),
        ("shop.example.com", "/api/a", (200, "/api/a")),
        ("unknown.example.com", "/", (503, "")),
    ]:
        assert get(plain_http, host, path) == expected, (host, path)

    context = ssl.create_default_context(cafile=str(certificates / "shop.pem"))
    context.check_hostname = False
    for host, path, expected in [
        ("shop.example.com", "/a?b", (200, "/a?b")),
        ("shop.example.com", "/pay/x", (200, "/x")),
        ("shop.example.com", "/pay", (308, "/pay/")),
    ]:
        with socket.create_connection(("127.0.0.1", tls_port), 10) as raw:
            secure = http.client.HTTPConnection(host)
            secure.sock = context.wrap_socket(raw, server_hostname=host)
            assert get(secure, host, path) == expected, (host, path)
    for host in ("unknown.example.com", "api.example.com"):
        with (
            socket.create_connection(("127.0.0.1", tls_port), 10) as raw,
            pytest.raises(ssl.SSLError),
        ):
            context.wrap_socket(raw, server_hostname=host)


def _with(host: Host, tls: Tls) -> Host:
    return Host(host.name, host.aliases, host.locations, tls)


def _capabilities() -> Capabilities:
    told = subprocess.run([NGINX, "-v"], capture_output=True, text=True, timeout=60).stderr
    numbers = told.split("/", 1)[1].split()[0].split(".")
    major, minor, patch = (int(number) for number in numbers[:3])
    return Capabilities(nginx_version=major * 1_000_000 + minor * 1_000 + patch)
