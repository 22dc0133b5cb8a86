"""Every label that Interlock had, in any of its versions: honoured, or refused with a sentence.

The table is Interlock's own: each label of 1.4.5 once for each proxy that read it differently,
those of changes that were asked for and never merged, of the prerelease of 2.0 and of 2 and 3. What
"honoured" means is looked at in what would be served, not in what was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from clusters import instance, service, settings, snapshot

from agent.compile import compile_snapshot
from agent.config.settings import Settings
from agent.discovery.cluster import PROXY_LABEL, PROXY_VALUES
from agent.labels.names import KNOWN_LABELS
from agent.model import (
    Algorithm,
    Attachment,
    BackendTls,
    Check,
    CheckKind,
    Desired,
    Host,
    Location,
    Peer,
    Redirect,
    Sticky,
    StickyKind,
    Upstream,
    WorkloadKind,
)

CERTIFIED = settings(ssl_default_cert="default.pem", redirect_code=302)


def served(wants: dict[str, str], options: Settings = CERTIFIED, **kwargs: object) -> Desired:
    """What is served of a service with these labels, beside one that nothing may change."""
    web = service("web", wants, instance("t1"), networks=("edge", "front"), **kwargs)
    web = replace(web, vips=(Attachment("edge", "10.0.0.200"),), ports=(8000, 9000))
    web = replace(
        web,
        instances=(
            replace(
                web.instances[0],
                attachments=(Attachment("edge", "10.0.0.1"), Attachment("front", "10.1.0.1")),
            ),
        ),
    )
    networks = ("edge", "front") if any("network" in label for label in wants) else ("edge",)
    return compile_snapshot(snapshot(web, proxy_networks=networks), options)


def host(desired: Desired) -> Host:
    (found,) = desired.site.hosts
    return found


def location(desired: Desired) -> Location:
    (found,) = host(desired).locations
    return found


def upstream(desired: Desired) -> Upstream:
    (found,) = desired.membership.upstreams.values()
    return found


def peer(desired: Desired) -> Peer:
    (found,) = upstream(desired).peers
    return found


class Row(NamedTuple):
    """A label of Interlock's, a value, and what is to come of it.

    `outcome` tells whether what is served is right; a text is what the refusal has to say, and
    "" that nothing at all is served or said.
    """

    label: str
    by: str
    value: str
    outcome: Callable[[Desired], bool] | str
    beside: dict[str, str] = {}  # noqa: RUF012 - never changed
    options: Settings = CERTIFIED


I_SSL = {"interlock.ssl": "true"}
I_BACKEND = {"interlock.ssl_backend": "true"}
D_BACKEND = {"com.docker.lb.ssl_backend": "true"}
CHECK = Check(CheckKind.HTTP, "GET", "/ping")

ROWS = (
    Row("interlock.app", "interlock image", "main", ""),
    Row("interlock.hostname", "nginx,haproxy", "b", lambda d: host(d).name == "b.local"),
    Row("interlock.domain", "nginx,haproxy", "x.com", lambda d: host(d).name == "a.x.com"),
    Row(
        "interlock.alias_domain",
        "nginx,haproxy",
        "b.x.com",
        lambda d: host(d).aliases == ("b.x.com",),
    ),
    Row("interlock.network", "nginx,haproxy", "front", lambda d: peer(d).address == "10.1.0.1"),
    Row("interlock.port", "nginx,haproxy", "9000", lambda d: peer(d).port == 9000),
    Row("interlock.ssl", "nginx", "true", lambda d: host(d).tls is not None),
    Row(
        "interlock.ssl_cert",
        "nginx",
        "a.pem",
        lambda d: host(d).tls.certificate == "/etc/tidegate/certs/a.pem",
        I_SSL | {"interlock.ssl_cert_key": "a.key"},
    ),
    Row(
        "interlock.ssl_cert_key",
        "nginx",
        "a.key",
        lambda d: host(d).tls.key == "/etc/tidegate/certs/a.key",
        I_SSL | {"interlock.ssl_cert": "a.pem"},
    ),
    Row("interlock.ssl_only", "nginx", "true", lambda d: location(d).tls_only),
    Row("interlock.ssl_only", "haproxy", "true", lambda d: "max-age" in host(d).tls.hsts),
    Row(
        "interlock.ssl_backend",
        "nginx,haproxy",
        "true",
        lambda d: location(d).backend_tls == BackendTls(),
    ),
    Row(
        "interlock.ssl_backend_tls_verify",
        "haproxy",
        "required",
        lambda d: location(d).backend_tls.verify,
        I_BACKEND,
    ),
    Row("interlock.context_root", "nginx,haproxy", "/x", lambda d: location(d).path == "/x"),
    Row(
        "interlock.context_root_rewrite",
        "nginx,haproxy",
        "true",
        lambda d: location(d).rewrite,
        {"interlock.context_root": "/x"},
    ),
    Row(
        "interlock.websocket_endpoint",
        "nginx",
        "ws://a.local/ws",
        lambda d: location(d).websocket_endpoints == ("/ws",),
    ),
    Row("interlock.ip_hash", "nginx", "true", lambda d: upstream(d).policy.hash_key == "ip"),
    Row(
        "interlock.health_check",
        "haproxy",
        "httpchk GET /ping",
        lambda d: upstream(d).policy.check == CHECK,
    ),
    Row(
        "interlock.health_check_interval",
        "haproxy",
        "2000",
        lambda d: upstream(d).policy.check.interval == 2.0,
    ),
    Row(
        "interlock.balance_algorithm",
        "haproxy",
        "leastconn",
        lambda d: upstream(d).policy.algorithm is Algorithm.LEAST_CONN,
    ),
    Row(
        "interlock.backend_option",
        "haproxy",
        "httpchk GET /ping",
        lambda d: upstream(d).policy.check == CHECK,
    ),
    Row(
        "interlock.backend_option",
        "nginx",
        "proxy_buffering off;",
        lambda d: location(d).directives == ("proxy_buffering off;",),
        options=settings(allowed_directives=("proxy_buffering",)),
    ),
    Row("interlock.backend_option", "nginx", "proxy_buffering off;", "AllowedDirectives"),
    Row("interlock.protocol", "haproxy", "proxy", "the PROXY protocol"),
    Row("interlock.ext.service_name", "all", "x", "ServiceClusters"),
    Row("interlock.hosts", "service", "b.x.com", lambda d: host(d).aliases == ("b.x.com",)),
    Row("com.docker.lb.hosts", "service", "b.x.com", lambda d: host(d).name == "b.x.com"),
    Row("com.docker.lb.port", "service", "9000", lambda d: peer(d).port == 9000),
    Row("com.docker.lb.network", "service", "front", lambda d: peer(d).address == "10.1.0.1"),
    Row("com.docker.lb.context_root", "service", "/x", lambda d: location(d).path == "/x"),
    Row(
        "com.docker.lb.context_root_rewrite",
        "service",
        "true",
        lambda d: location(d).rewrite,
        {"com.docker.lb.context_root": "/x"},
    ),
    Row(
        "com.docker.lb.ssl_cert",
        "service",
        "a.cert",
        lambda d: host(d).tls.certificate == "/run/secrets/a.cert",
        {"com.docker.lb.ssl_key": "a.key"},
    ),
    Row(
        "com.docker.lb.ssl_key",
        "service",
        "a.key",
        lambda d: host(d).tls.key == "/run/secrets/a.key",
        {"com.docker.lb.ssl_cert": "a.cert"},
    ),
    Row("com.docker.lb.ssl_passthrough", "service", "true", lambda d: host(d).passthrough != ""),
    Row(
        "com.docker.lb.websocket_endpoints",
        "service",
        "/ws,/events",
        lambda d: location(d).websocket_endpoints == ("/events", "/ws"),
    ),
    Row("com.docker.lb.service_cluster", "service", "east", "ServiceClusters"),
    Row(
        "com.docker.lb.service_cluster",
        "service",
        "east",
        lambda d: host(d).name == "a.local",
        options=Settings(service_clusters=("east",)),
    ),
    Row(
        "com.docker.lb.sticky_session_cookie",
        "service",
        "session",
        lambda d: upstream(d).policy.sticky == Sticky(StickyKind.APP_COOKIE, "session"),
    ),
    Row("com.docker.lb.ip_hash", "service", "true", lambda d: upstream(d).policy.hash_key == "ip"),
    Row(
        "com.docker.lb.redirects",
        "service",
        "http://a.local,http://b.local",
        lambda d: host(d).redirects == (Redirect("a.local", "http://b.local"),),
    ),
    Row("com.docker.lb.backend_mode", "service", "task", lambda d: peer(d).address == "10.0.0.1"),
    Row("com.docker.lb.backend_mode", "service", "vip", lambda d: peer(d).address == "10.0.0.200"),
    Row("com.docker.lb.default_backend", "service", "true", lambda d: len(d.site.default) == 1),
    Row("com.docker.lb.ssl_only", "service", "true", lambda d: location(d).tls_only),
    Row(
        "com.docker.lb.ssl_backend",
        "service",
        "true",
        lambda d: location(d).backend_tls == BackendTls(),
    ),
    Row(
        "com.docker.lb.ssl_backend_tls_verify",
        "service",
        "required",
        lambda d: location(d).backend_tls.verify,
        D_BACKEND,
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.label}={row.value}")
def test_each_label_is_honoured_or_refused_with_a_sentence(row):
    naming = {}
    if row.label not in ("interlock.app", "interlock.ext.service_name"):
        docker = row.label.startswith("com.docker")
        naming = {"com.docker.lb.hosts": "a.local"} if docker else {"interlock.hostname": "a"}
    desired = served(naming | row.beside | {row.label: row.value}, row.options)
    if isinstance(row.outcome, str):
        told = [f"{item.message} {item.hint}" for item in desired.rejections]
        assert [text for text in told if row.outcome in text] == told
        assert bool(told) is bool(row.outcome)
        return
    assert desired.rejections == ()
    assert row.outcome(desired)


def test_both_of_interlocks_proxies_are_openresty_now():
    assert PROXY_LABEL == "interlock.ext.name"
    assert {"nginx", "haproxy"} == PROXY_VALUES


def test_a_container_may_still_go_by_its_own_name():
    """Interlock up to 1.3, where `interlock.hostname` was not needed."""
    options = Settings(hostname_fallback=True)
    web = service("web", {"interlock.port": "80"}, instance("c1"), kind=WorkloadKind.CONTAINER)
    web = replace(web, hostname="web", domainname="example.com")
    desired = compile_snapshot(snapshot(web), options)
    assert host(desired).name == "web.example.com"


MIGRATION = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
TABLE = re.findall(
    r"^\| `((?:interlock|com\.docker)[^`]*)` \| ([^|]*) \| (honoured|refused) \| (.*) \|$",
    MIGRATION,
    re.MULTILINE,
)


def test_the_document_has_each_row_once_with_what_became_of_it():
    expected = [(row.label, row.by) for row in ROWS] + [(PROXY_LABEL, "")]
    of_two = {"interlock.backend_option"}
    documented = [label for label, *_ in TABLE]
    for label in {label for label, _ in expected}:
        assert documented.count(label) == (2 if label in of_two else 1), label
    assert set(documented) == {label for label, _ in expected}
    assert all(len(text) > 10 for *_, text in TABLE if "as it was" not in text)


def test_what_the_document_calls_refused_is():
    refused = {label for label, _, verdict, _ in TABLE if verdict == "refused"}
    honoured = {row.label for row in ROWS if callable(row.outcome)} | {PROXY_LABEL}
    assert refused == {row.label for row in ROWS} - honoured
    assert {label for label in honoured if label != PROXY_LABEL} <= set(KNOWN_LABELS)
