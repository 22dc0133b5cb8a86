"""`explain` names each step and what stopped it, in the words of whoever decided."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from clusters import check_golden, instance, labels, service, settings, snapshot

from agent.compile import Compiler, compile_snapshot
from agent.config.settings import Settings
from agent.explain import MAX_SUBJECTS, Explanation, Outcome, explain
from agent.model import Attachment, InstanceState, Rejection, Workload

DEFAULTS = settings()
CERTIFICATE = labels(ssl="", ssl_cert="a.pem", ssl_cert_key="a.key")


def cluster() -> list[Workload]:
    return [
        service(
            "shop_web",
            labels(hostname="shop", domain="example.com", alias_domain="www.example.com"),
            instance("4hz2web1aaaa", "10.0.1.1"),
            instance(
                "4hz2web2bbbb",
                "10.0.1.2",
                InstanceState.DRAINING,
                detail="desired state is shutdown",
            ),
            instance("7kweb3cccc", "", InstanceState.WAITING, detail="the task is starting"),
            instance("8kweb4dddd", ""),
            wanted=4,
        ),
        service(
            "shop_late",
            labels(hostname="shop", domain="example.com") | CERTIFICATE,
            instance("9klate1", "10.0.2.1"),
            created=2.0,
        ),
        service("db", {}, instance("db1")),
        service("lost", labels(hostname="lost"), instance("lost1"), networks=("elsewhere",)),
        service("asleep", labels(hostname="asleep"), wanted=0),
        service("wild", labels(hostname="*", domain="dev.example.com"), instance("wild1")),
        service("typo", labels(hostnme="typo")),
    ]


def ask(
    name: str,
    *workloads: Workload,
    options: Settings = DEFAULTS,
    refusals: tuple[Rejection, ...] = (),
) -> Explanation:
    seen = snapshot(*(workloads or cluster()))
    return explain(seen, options, compile_snapshot(seen, options), name, refusals=refusals)


def failed(explanation: Explanation) -> list[str]:
    return [
        step.text
        for account in explanation.accounts
        for step in account.steps
        if step.outcome is Outcome.FAILED
    ]


@pytest.mark.parametrize(
    "name",
    ["shop_web", "shop_late", "shop.example.com", "www.example.com", "lost", "8kweb4dddd", "typo"],
)
def test_golden_explanations(name):
    told = ask(name).as_dict()
    check_golden(f"explain/{name}.json", json.dumps(told, indent=2) + "\n")


def test_a_routed_service_is_routed_from_label_to_peer():
    told = ask("shop_web", service("shop_web", labels(hostname="a"), instance("t1")))
    assert told.routed
    assert failed(told) == []
    texts = [step.text for step in told.accounts[0].steps]
    assert any("ask for a.local" in text for text in texts)
    assert any("network edge" in text and "port 80" in text for text in texts)
    assert any("goes to upstream a.local/" in text for text in texts)
    assert any("is up at 10.0.0.1:80" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shop_late", "conflict"),
        ("lost", "network_not_shared"),
        ("db", "no interlock labels"),
        ("typo", "no_hostname"),
        ("asleep", "0 of its peers are up"),
        ("lost.local", "network_not_shared"),
        ("8kweb4dddd-name", "no address on network edge"),
    ],
)
def test_what_stopped_it_is_told(name, reason):
    told = ask(name)
    assert not told.routed
    assert any(reason in text for text in failed(told)), failed(told)


@pytest.mark.parametrize(
    "name",
    [
        "shop.example.com",
        "SHOP.example.com.",
        "https://shop.example.com/some/path?x=1",
        "shop.example.com:8080",
        " shop.example.com ",
        "http://me@shop.example.com:8080?x=1",
    ],
)
def test_a_host_is_found_as_people_type_it(name):
    account = ask(name).accounts[0]
    assert (account.kind, account.name, account.routed) == ("host", "shop.example.com", True)


@pytest.mark.parametrize("name", ["bücher.example.com", "https://BÜCHER.example.com/x"])
def test_a_host_with_other_letters_is_found_as_people_type_it(name):
    wants = labels(hostname="bücher", domain="example.com")
    account = ask(name, service("books", wants, instance("b1"))).accounts[0]
    assert (account.name, account.routed) == ("xn--bcher-kva.example.com", True)


def test_a_host_that_a_wildcard_covers_is_found():
    account = ask("feature-7.dev.example.com").accounts[0]
    assert account.routed
    assert "covered by *.dev.example.com" in account.steps[0].text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("id-shop_web", ["shop_web"]),
        ("shop_w", ["shop_web"]),
        ("4hz2", ["4hz2web1aaaa-name", "4hz2web2bbbb-name"]),
        ("7kweb3cccc", ["7kweb3cccc-name"]),
        ("7kweb3cccc-name", ["7kweb3cccc-name"]),
        ("shop_", ["shop_late", "shop_web"]),
    ],
)
def test_names_ids_and_beginnings_are_found(name, found):
    assert sorted(account.name for account in ask(name).accounts) == found


def test_an_instance_is_told_of_without_its_siblings():
    account = ask("4hz2web2bbbb").accounts[0]
    assert (account.kind, account.routed) == ("instance", False)
    assert "draining at 10.0.1.2:80" in account.steps[-1].text
    assert not any("web1" in step.text for step in account.steps)


def test_the_id_of_an_instance_that_is_an_address_is_not_cut():
    told = ask("web", service("web", labels(hostname="a"), instance("127.0.0.1:8080", "127.0.0.1")))
    assert any("(127.0.0.1:8080)" in step.text for step in told.accounts[0].steps)


def test_nothing_found_suggests_what_is_near():
    told = ask("shop_wbe")
    assert (told.found, told.routed) == (False, False)
    assert "shop_web" in told.suggestions
    assert ask("shop.exmaple.com").suggestions[0] == "shop.example.com"
    assert ask("qqqqqqqq").suggestions == ()
    assert ask("").accounts == ()


def test_too_many_matches_are_listed():
    many = [service(f"web-{n}", labels(hostname=f"h{n}")) for n in range(MAX_SUBJECTS + 1)]
    told = ask("web-", *many)
    assert told.accounts == ()
    assert len(told.suggestions) == MAX_SUBJECTS + 1


def test_a_lingering_host_is_told_of():
    compiler = Compiler(clock=lambda: 0.0)
    compiler.compile(snapshot(service("web", labels(hostname="a"), instance("t1"))), DEFAULTS)
    desired = compiler.compile(snapshot(), DEFAULTS)
    told = explain(snapshot(), DEFAULTS, desired, "a.local")
    assert told.found
    assert not told.routed
    assert "get 503" in failed(told)[0]


def refused(subject: str, reason: str = "host_quarantined") -> Rejection:
    return Rejection(subject, reason, "nginx of n1 refused it: no a.pem", "Mend it.")


@pytest.mark.parametrize(
    "name", ["shop.example.com", "www.example.com", "shop_web", "4hz2web1aaaa"]
)
def test_what_nginx_refused_is_not_routed_and_told_with_its_message(name):
    told = ask(name, refusals=(refused("host shop.example.com"),))
    assert not told.routed
    (account,) = told.accounts
    assert account.refused
    (step,) = [step for step in account.steps if "host_quarantined" in step.text]
    assert step.outcome is Outcome.FAILED
    assert "nginx of n1 refused it: no a.pem" in step.text
    assert step.hint == "Mend it."


def test_an_upstream_that_openresty_refused_is_told():
    refusal = refused("upstream shop.example.com/", "upstream_refused")
    told = ask("shop.example.com", refusals=(refusal,))
    assert not told.routed
    assert any("upstream_refused" in text for text in failed(told))


def test_a_refused_host_is_no_matter_of_the_others():
    told = ask("shop.example.com", refusals=(refused("host other.example.com"),))
    assert told.routed
    assert not told.accounts[0].refused


# --- routes that are more than a host with peers


def texts(explanation: Explanation) -> str:
    return "\n".join(step.text for account in explanation.accounts for step in account.steps)


def test_each_of_several_routes_is_told_with_its_port():
    wants = labels(hostname="a", port="80", admin__hostname="admin", admin__port="9090")
    told = ask("web", service("web", wants, instance("t1")))
    assert told.routed
    assert "ask for admin.local, context root / (route admin)" in texts(told)
    assert "Route admin: its instances are reached over network edge" in texts(told)
    assert "is up at 10.0.0.1:80 and 10.0.0.1:9090" in texts(told)


def test_a_canary_is_told_of_from_both_sides():
    main = service("v1", labels(hostname="a"), instance("m1"))
    canary = service(
        "v2",
        labels(hostname="a", canary__weight="10", canary__header="X-Next", canary__cookie="next"),
        instance("c1", "10.0.0.2"),
    )
    told = ask("v2", main, canary)
    assert told.routed
    assert "goes to upstream a.local/@canary as its canary, in which 1 of its peers" in texts(told)
    told = ask("a.local", main, canary)
    assert (
        "canary a.local/@canary gets 10% of the requests, those with header X-Next: always, those "
        "with cookie next=always: 1 peer(s) up" in texts(told)
    )


def test_a_virtual_ip_is_told_of():
    web = service("web", {"com.docker.lb.hosts": "a", "com.docker.lb.backend_mode": "vip"})
    web = replace(web, vips=(Attachment("edge", "10.0.0.200"),), instances=(instance("t1"),))
    told = ask("web", web)
    assert told.routed
    assert "virtual IP 10.0.0.200" in texts(told)


def test_what_is_no_host_is_told_of():
    wants = labels(default_backend="true", tcp_port="5432")
    told = ask("web", service("web", wants, instance("t1")))
    assert told.routed
    assert "ask for the default backend, TCP port 5432" in texts(told)
    assert "the default backend is in the site and goes to upstream */" in texts(told)
    assert "TCP port 5432 is in the site and goes to upstream :5432/" in texts(told)


def test_redirects_passthrough_and_mirrors_are_told_of():
    web = service(
        "web",
        labels(
            hostname="a", alias_domain="old.local", redirects="old.local,a.local", mirror="s.local"
        ),
        instance("t1"),
    )
    shadow = service("shadow", labels(hostname="s", ssl_passthrough=""), instance("t2"))
    assert "old.local is in the site, redirected to a.local" in texts(ask("old.local", web, shadow))
    assert "(mirrored to s.local/)" in texts(ask("a.local", web, shadow))
    assert "its TLS is passed through unopened" in texts(ask("s.local", web, shadow))


def test_another_clusters_service_is_told_why():
    told = ask("web", service("web", labels(hostname="a", service_cluster="east"), instance("t1")))
    assert not told.routed
    assert any("other_cluster" in text for text in failed(told))
