"""Label values as attacks: a route is refused, or its file says exactly what was intended.

What was intended is built here by hand from the parsed names and paths, without the templates, and
compared with what a strict reader finds in the rendered text: one directive more, one word
elsewhere, and the test fails.
"""

from __future__ import annotations

import re
import string
from dataclasses import astuple

import pytest
from clusters import instance, labels, service, settings, snapshot
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nginx_syntax import Directive, Odd, lua, parse

from agent.compile import compile_snapshot
from agent.config.settings import Extension, Settings
from agent.errors import RenderError
from agent.labels.names import LISTS
from agent.labels.names import OPTIONS as LABELS
from agent.model import (
    BackendTls,
    Desired,
    Host,
    Location,
    Policy,
    Protocol,
    Redirect,
    Site,
    Tls,
    VerifyClient,
)
from agent.render import DEFAULT_FILE, Capabilities, file_name, render

OPTIONS = settings(ssl_default_cert="default.pem")
CAPS = Capabilities(nginx_version=1_022_001)
FIXED = render(Site(()), OPTIONS, CAPS)[DEFAULT_FILE]

TRICKS = [
    '"',
    "'",
    "{",
    "}",
    ";",
    "\n",
    "\r",
    "\t",
    " ",
    "\x00",
    "\x7f",
    "\\",
    "$",
    "$host",
    "${host}",
    "#",
    "..",
    "/../",
    "//",
    "%",
    "~",
    "*",
    "*.",
    "^~",
    "=",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "ü",
    "ß",
    "İ",
    "。",
    "\u200b",
    "\u2028",
    "\uff1b",
    "\uff5b",
    "\ud800",
    "xn--",
    "data:",
    "return 200;",
    "} server { listen 81; }",
    "; include /etc/passwd;",
    "a" * 70,
    "a" * 10_240,
]
VALUES = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from([*TRICKS, *string.ascii_lowercase[:4], "/", ".", "-", "_", "1"]), max_size=6
    ).map("".join),
    st.from_regex(r"[a-z0-9.*_-]{1,20}", fullmatch=True),
    st.from_regex(r"(/[a-z0-9.~-]{1,8}){1,3}/?", fullmatch=True),
)
NAMES = [
    "hostname",
    "domain",
    "alias_domain",
    "alias_domain.0",
    "port",
    "network",
    "context_root",
    "context_root_rewrite",
    "ssl",
    "ssl_only",
    "ssl_cert",
    "ssl_cert_key",
    "websocket_endpoint",
    "websocket_endpoint.0",
    "weight",
]
OTHERS = sorted(LABELS - set(NAMES))
"""Options that are pushed, or rendered by more than the plain template of a host."""
NAME_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + ".-_*")
PATH_CHARACTERS = frozenset(string.ascii_letters + string.digits + "/._~!&+,=:@*-")


def directive(*words: str, block: list[Directive] | None = None) -> Directive:
    return Directive(words, None if block is None else tuple(block))


def intended(host: Host) -> tuple[Directive, ...]:
    """What the file of a host is to say."""
    servers = [_server(host, secure=False)]
    if host.tls is not None:
        servers.append(_server(host, secure=True))
    return tuple(servers)


def served(names: list[str], certificate: str, key: str) -> list[Directive]:
    """How a server gets its certificate: from Lua, in whose code the values are strings."""
    code = 'package.loaded["tidegate.certificates"].serve({ names = { '
    words = [*lua(code), *(word for name in names for word in (f'"{name}', ","))]
    words += [*lua("}, certificate = "), f'"{certificate}', *lua(", key = "), f'"{key}']
    words += lua(", staple = true, })")
    return [
        directive("ssl_certificate", "$tidegate_certificate"),
        directive("ssl_certificate_key", "$tidegate_certificate"),
        directive("ssl_certificate_by_lua_block", *words),
    ]


def _server(host: Host, *, secure: bool) -> Directive:
    found = [directive("listen", "443", "ssl", "http2") if secure else directive("listen", "80")]
    if secure:
        assert host.tls is not None
        found += served([host.name, *host.aliases], host.tls.certificate, host.tls.key)
        if host.tls.hsts:
            found.append(
                directive("add_header", "Strict-Transport-Security", host.tls.hsts, "always")
            )
    found.append(directive("server_name", host.name, *host.aliases))
    found.append(directive("absolute_redirect", "off"))
    if not secure and _says_nothing_plain(host):
        found.append(directive("include", "conf.d/answer.inc"))
        found.append(directive("return", "308", "https://$host$request_uri"))
        return directive("server", block=found)
    found.append(directive("include", "conf.d/server.inc"))
    for location in host.locations:
        found += _locations(location, secure=secure)
    if all(location.path != "/" for location in host.locations):
        found.append(directive("location", "/", block=[directive("return", "404")]))
    return directive("server", block=found)


def _says_nothing_plain(host: Host) -> bool:
    return all(item.tls_only for item in host.locations) and any(
        item.path == "/" for item in host.locations
    )


def _locations(location: Location, *, secure: bool) -> list[Directive]:
    root = location.path.removesuffix("/")
    if location.tls_only and not secure:
        here = below = [directive("return", "308", "https://$host$request_uri")]
    else:
        begin = [directive("set", "$tidegate_upstream", location.upstream)]
        here = below = [*begin, directive("proxy_pass", "http://tidegate")]
        if location.rewrite:
            here = [directive("return", "308", f"{root}/$is_args$args")]
            strip = directive("set", "$tidegate_strip", root)
            below = [*begin, strip, directive("proxy_pass", "http://tidegate/")]
    found = [directive("location", f"{root}/", block=below)]
    return [directive("location", "=", root, block=here), *found] if root else found


def check(site: Site) -> None:
    files = render(site, OPTIONS, CAPS)
    assert files.pop(DEFAULT_FILE) == FIXED
    assert set(files) == {file_name(host.name) for host in site.hosts}
    for host in site.hosts:
        assert parse(files[file_name(host.name)]) == intended(host)


@given(
    wants=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    hostname=st.one_of(st.just("app"), VALUES),
)
@example(wants={"context_root": '/a" { return 200; } location "/b'}, hostname="app")
@example(wants={"domain": "x;} server { listen 81;"}, hostname="app")
@example(wants={"alias_domain": 'b.example.com"; return 200 "'}, hostname="app")
@example(wants={"ssl": "", "ssl_cert": "../../etc/passwd", "ssl_cert_key": "x"}, hostname="app")
@example(wants={"ssl": "", "ssl_cert": "a.pem", "ssl_cert_key": "a.key\n"}, hostname="app")
@example(wants={"context_root": "/$http_x"}, hostname="*")
@hypothesis_settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_label_is_refused_or_means_what_it_says(wants, hostname):
    attack = service(
        "attack",
        {f"interlock.{name}": value for name, value in {**wants, "hostname": hostname}.items()},
        instance("t1"),
    )
    bystander = service("good", labels(hostname="good.example.com", domain=""), instance("t2"))
    desired = compile_snapshot(snapshot(attack, bystander), OPTIONS)
    check(desired.site)
    mine = [host for host in desired.site.hosts if host.name != "good.example.com"]
    assert len(desired.site.hosts) > len(mine), "the bystander is served whatever the other says"
    assert mine or any(item.subject == "service attack" for item in desired.rejections)
    for host in mine:
        for name in (host.name, *host.aliases):
            assert set(name) <= NAME_CHARACTERS
            assert len(name) <= 253
        for location in host.locations:
            assert set(location.path) <= PATH_CHARACTERS
            assert ".." not in location.path.split("/")
        if host.tls is not None:
            for path in (host.tls.certificate, host.tls.key):
                assert path.startswith("/etc/tidegate/certs/")
                assert ".." not in path.split("/")
    for item in desired.rejections:
        assert item.message.isascii()
        assert item.message.isprintable()
        assert len(item.message) < 1_000


@pytest.mark.parametrize("trick", TRICKS, ids=ascii)
@pytest.mark.parametrize("name", NAMES)
def test_each_trick_in_each_label(name, trick):
    for value in (trick, f"a{trick}b", f"/a{trick}b"):
        wants = {"interlock.hostname": "app", "interlock.ssl": "true"}
        if name.startswith("ssl_cert"):
            wants |= {"interlock.ssl_cert": "a.pem", "interlock.ssl_cert_key": "a.key"}
        wants[f"interlock.{name}"] = value
        seen = snapshot(service("attack", wants, instance("t1")))
        desired = compile_snapshot(seen, OPTIONS)
        check(desired.site)
        assert desired.site.hosts or desired.rejections


LENIENT = Settings(
    extensions=(
        Extension(ssl_default_cert="d.pem", allowed_directives=("a", "add_header", "proxy_hide")),
    ),
)
"""An operator who allows some directives."""
WORD = re.compile(r"[A-Za-z0-9_-]{1,128}")
COOKIE = re.compile(r"[A-Za-z0-9._-]{1,128}")
TARGET = re.compile(r"(https?://)?[a-z0-9._-]{1,253}(:[0-9]{1,5})?(/[A-Za-z0-9._~!&+=@*-]*)*")
DIRECTIVE = re.compile(r"(a|add_header|proxy_hide)( [^;{}\\\\\x00-\x1f\x7f-\uffff]*)?;")
HSTS = re.compile(r"(max-age=[0-9]{1,10}(; includeSubDomains)?(; preload)?)?")
FILE = re.compile(r"/(etc/tidegate/certs|run/secrets)(/[A-Za-z0-9._@+=~-]+)+")


def check_policy(policy: Policy) -> None:
    """What the data plane takes: the same bounds as in `policy.lua`, written down once more."""
    assert re.fullmatch(r"([a-z]+(:[A-Za-z0-9._-]{1,128})?)?", policy.hash_key)
    assert policy.hash_balance == 0 or 1 < policy.hash_balance <= 100
    if policy.sticky is not None:
        assert COOKIE.fullmatch(policy.sticky.cookie or "x")
        assert policy.sticky.same_site in ("Lax", "Strict", "None")
        assert re.fullmatch(r"/[^\x00-\x20;\x7f-\uffff\"$]*", policy.sticky.path)
        assert 0 <= policy.sticky.max_age <= 400 * 86400
    if policy.check is not None:
        assert re.fullmatch(r"[A-Z]{1,16}", policy.check.method)
        assert re.fullmatch(r"/[!-~]{0,1023}", policy.check.path)
        assert re.fullmatch(r"[A-Za-z0-9_.:\[\]-]{0,300}", policy.check.host)
        assert re.fullmatch(r"[0-9,-]+", policy.check.status)
        assert 0.1 <= policy.check.interval <= 86400
        assert 0.01 <= policy.check.timeout <= 300
    if policy.canary is not None:
        assert 0 <= policy.canary.weight <= 100
        assert WORD.fullmatch(policy.canary.header or "x")
        assert COOKIE.fullmatch(policy.canary.cookie or "x")
        assert re.fullmatch(r"[ -~]{0,128}", policy.canary.header_value)
    assert all(re.fullmatch(r"[a-z0-9_]{1,64}", word) for word in policy.retry.on)
    assert 0 <= policy.panic <= 1
    assert policy.passive.eject <= policy.passive.max_eject <= 86400
    for seconds in (policy.slow_start, policy.retry.timeout, *astuple(policy.timeouts)):
        assert 0 <= seconds <= 86400


def check_desired(desired: Desired) -> None:
    """No value of a label is anywhere in what is pushed or rendered but in its form."""
    for upstream in desired.membership.upstreams.values():
        assert len(upstream.name) <= 512
        assert upstream.name.isascii()
        assert upstream.name.isprintable()
        check_policy(upstream.policy)
    locations = [item for host in desired.site.hosts for item in host.locations]
    for location in (*locations, *desired.site.default):
        assert set(location.path) <= PATH_CHARACTERS
        assert location.mirror in ("", *desired.membership.upstreams)
        assert all(DIRECTIVE.fullmatch(text) for text in location.directives)
        assert not any("$tidegate" in text for text in location.directives)
        tls = location.backend_tls
        if tls is not None:
            assert set(tls.name) <= NAME_CHARACTERS
            for path in filter(None, (tls.ca, tls.certificate, tls.key)):
                assert FILE.fullmatch(path)
                assert ".." not in path.split("/")
    for host in desired.site.hosts:
        assert all(TARGET.fullmatch(item.target) for item in host.redirects)
        assert {item.host for item in host.redirects} <= {host.name, *host.aliases}
        assert host.passthrough in ("", f"{host.name}/")
        if host.tls is not None:
            assert HSTS.fullmatch(host.tls.hsts)
            assert FILE.fullmatch(host.tls.client_ca or "/run/secrets/none")
    assert all(route.port not in (80, 443, 8081) for route in desired.site.tcp)
    for item in desired.rejections:
        assert item.message.isascii()
        assert item.message.isprintable()
        assert item.hint.isascii()
        assert item.hint.isprintable()
        assert len(item.message) < 1_000


SHAPED = st.one_of(
    VALUES,
    st.sampled_from(
        [
            "cookie:",
            "app:",
            "httpchk GET /",
            "httpchk GET / HTTP/1.1\\r\\nHost: ",
            "url_param ",
            "hdr(",
            "add_header x ",
            "hash $cookie_",
            "max-age=1; ",
            "app.local,",
            "http://app.local,https://",
            "header:",
        ]
    ).flatmap(lambda start: VALUES.map(lambda rest: start + rest)),
    VALUES.map(lambda text: f'add_header x "{text}";'),
    VALUES.map(lambda text: f"a {text};"),
    VALUES.map(lambda text: f"app.local,{text}"),
)


@given(
    wants=st.dictionaries(
        st.sampled_from(sorted(LABELS)).flatmap(
            lambda option: st.sampled_from([option, f"{option}.0"] if option in LISTS else [option])
        ),
        SHAPED,
        max_size=6,
    ),
    prefix=st.sampled_from(["interlock.", "interlock.x.", "com.docker.lb.", "com.docker.lb.x."]),
)
@example(wants={"backend_option": 'a "; } server { listen 81; }";'}, prefix="interlock.")
@example(wants={"backend_option": "a $tidegate_upstream;"}, prefix="interlock.")
@example(wants={"redirects": 'app.local,b.local" ; return 200 "'}, prefix="interlock.")
@example(wants={"health_check": "GET / HTTP/1.1\\r\\nHost: a\\r\\nX: y"}, prefix="interlock.")
@example(wants={"ssl_cert": "../../etc/passwd", "ssl_key": "x"}, prefix="com.docker.lb.")
@hypothesis_settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_option_of_every_dialect_is_refused_or_of_its_form(wants, prefix):
    hosts = {f"{prefix}{'hosts' if 'docker' in prefix else 'hostname'}": "app"}
    attack = service(
        "attack", hosts | {prefix + name: value for name, value in wants.items()}, instance("t1")
    )
    bystander = service("good", labels(hostname="good.example.com", domain=""), instance("t2"))
    alone = compile_snapshot(snapshot(bystander), LENIENT)
    desired = compile_snapshot(snapshot(attack, bystander), LENIENT)
    check_desired(desired)
    assert alone.site.hosts[0] in desired.site.hosts, "the bystander is served as if alone"
    good = "good.example.com/"
    assert desired.membership.upstreams[good] == alone.membership.upstreams[good]


@pytest.mark.parametrize("trick", TRICKS, ids=ascii)
def test_each_trick_in_each_other_option(trick):
    for name in OTHERS:
        for value in (trick, f"a{trick}b", f"/a{trick}b", f"a {trick};", f"app.local,{trick}"):
            wants = labels(hostname="app", ssl="", ssl_backend="", sticky="cookie")
            wants |= labels(health_check="/", canary__header="x") | {f"interlock.{name}": value}
            seen = snapshot(service("attack", wants, instance("t1")))
            check_desired(compile_snapshot(seen, LENIENT))


@given(text=VALUES)
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_quoting_holds_even_where_nothing_was_checked_before(text):
    """The second line of defence: values that no label could have brought this far."""
    host = Host(
        name="a.example.com",
        aliases=(f"b{text}",),
        locations=(Location(path=f"/c{text}d", upstream=f"a.example.com/{text}", rewrite=True),),
        tls=Tls(f"/certs/{text}", f"/certs/{text}.key"),
    )
    try:
        files = render(Site((host,)), OPTIONS, CAPS)
    except RenderError:
        return
    assert parse(files["a.example.com.conf"]) == intended(host)


@pytest.mark.parametrize("trick", TRICKS, ids=ascii)
def test_no_value_of_tls_means_anything_but_itself(trick):
    """Paths and names are strings of Lua or words of nginx; what can be neither is refused."""
    ca, client_ca, certificate, key = (f"/{what}{trick}" for what in ("ca", "cc", "cert", "key"))
    tls = BackendTls(verify=True, ca=ca, name=f"n{trick}", certificate=certificate, key=key)
    host = Host(
        name="a.example.com",
        aliases=(),
        locations=(Location("/", "a.example.com/", backend_tls=tls),),
        tls=Tls(certificate, key, VerifyClient.REQUIRED, client_ca, hsts=f"h{trick}"),
    )
    try:
        files = render(Site((host,)), OPTIONS, CAPS)
    except RenderError:
        return
    _, secure = parse(files["a.example.com.conf"])
    shared = [item for item in parse(files[DEFAULT_FILE]) if item.words[0] == "upstream"]
    assert len(shared) == 1
    told = [word for item in shared[0].block or () for word in item.words]
    assert {f'"{ca}', f'"{certificate}', f'"{key}'} <= set(told)
    front = [item.words for item in secure.block or ()]
    assert ("add_header", "Strict-Transport-Security", f"h{trick}", "always") in front
    served = next(words for words in front if words[0] == "ssl_certificate_by_lua_block")
    assert {f'"{client_ca}', f'"{certificate}', f'"{key}'} <= set(served)
    location = next(item for item in secure.block or () if item.words == ("location", "/"))
    assert Directive(("proxy_ssl_name", f"n{trick}")) in (location.block or ())


def front(text: str) -> Site:
    """A site with this text wherever a front of ours takes one."""
    locations = (
        Location("/", f"a{text}", mirror=f"m{text}", tls_only=True),
        Location(f"/g{text}", f"g{text}", protocol=Protocol.GRPC, rewrite=True),
        Location(f"/u{text}", f"u{text}", request_buffering=False),
    )
    host = Host(
        name="a.example.com",
        aliases=("b.example.com", f"c{text}"),
        locations=locations,
        tls=Tls(f"/certs/{text}", f"/certs/{text}.key"),
        redirects=(
            Redirect(f"c{text}", f"https://x{text}"),
            Redirect("b.example.com", f"d{text}"),
        ),
    )
    return Site((host,), default=locations)


def shape(found: tuple[Directive, ...]) -> list[object]:
    """The directives without their arguments."""
    return [
        (item.words[0], len(item.words), None if item.block is None else shape(item.block))
        for item in found
    ]


@pytest.mark.parametrize(
    "options",
    [
        settings(ssl_default_cert="d.pem"),
        settings(trusted_proxies=("10.0.0.0/8",), grpc_port=99, nginx_status_from=("::/0",)),
        settings(proxy_protocol=True, hide_info_headers=True),
    ],
)
@given(text=VALUES)
@example(text='"; return 200 "')
@example(text="$request_uri")
@example(text="://")
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_value_adds_a_directive_whatever_the_front_is_told_to_do(options, text):
    plain = render(front("x"), options, CAPS)
    try:
        files = render(front(text), options, CAPS)
    except RenderError:
        return
    assert list(files) == list(plain)
    for name, written in files.items():
        assert shape(parse(written)) == shape(parse(plain[name]))


@pytest.mark.parametrize(
    "text",
    [
        "a {",
        "a; }",
        "a",
        "a; b",
        ";",
        "{ }",
        'a "b',
        'a "b"c;',
        'a b"c;',
        "a b\\c;",
        "a b\x00c;",
        'a "b\nc";',
        "a ü;",
        "a; # b",
        "a { b }",
    ],
)
def test_the_reader_itself_is_strict(text):
    with pytest.raises(Odd):
        parse(text)


def test_the_reader_itself_reads():
    assert parse('a "b;{}" c; # d\ne { f "g\\"h"; i { } }\n') == (
        Directive(("a", "b;{}", "c")),
        Directive(("e",), (Directive(("f", 'g"h')), Directive(("i",), ()))),
    )
