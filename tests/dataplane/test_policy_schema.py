"""The schema of a policy, the agent's model and what the proxy accepts are one and the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from agent import model, policies
from agent.compile import compile_snapshot
from agent.config.settings import Settings
from tests.dataplane.harness import ROOT, Proxy, upstream
from tests.unit.clusters import instance, labels, service, snapshot

SCHEMA = json.loads((ROOT / "docs" / "admin-api.schema.json").read_text())
POLICY = SCHEMA["$defs"]["policy"]
VALIDATOR = Draft202012Validator({"$ref": "#/$defs/policy", "$defs": SCHEMA["$defs"]})
PARTS = {
    "sticky": model.Sticky,
    "canary": model.Canary,
    "check": model.Check,
    "passive": model.Passive,
    "retry": model.Retry,
    "circuit": model.Circuit,
    "timeouts": model.Timeouts,
}
NEEDED = {
    "sticky": {"kind": "cookie"},
    "canary": {"upstream": "next"},
    "check": {"kind": "http"},
    "circuit": {"error_ratio": 0.5},
}
TEXTS = [
    "",
    "a",
    "A-1",
    "ip",
    "header:X-User",
    "/path",
    "GET",
    "200-399",
    "no good",
    "ü",
    "x" * 129,
]
TEXTS += ["a;b", "a\tb", "/a b", "x" * 600]


def values(rule: dict[str, Any]) -> Iterator[object]:
    """What tells right from wrong for a field of this rule."""
    yield from (None, True, "x", 1, 0.5, -1, ["x"], {"x": 1})
    for bound in ("minimum", "maximum"):
        if bound in rule:
            yield from (rule[bound], rule[bound] - 1, rule[bound] + 1)
    yield from rule.get("enum", ())
    yield rule.get("default")
    if rule.get("type") == "string" or "$ref" in rule:
        yield from TEXTS
    if rule.get("type") == "array":
        yield from ([], ["error", "http_502"], ["no good"], [1], ["error"] * 20, ["error"] * 21)


def cases() -> Iterator[tuple[str, dict[str, object]]]:
    for name, rule in POLICY["properties"].items():
        if "properties" not in rule:
            for value in values(rule):
                yield name, {"algorithm": "round_robin", name: value}
            continue
        needed = NEEDED.get(name, {})
        for wrong in (None, "x", 1, True):
            yield name, {"algorithm": "round_robin", name: wrong}
        yield name, {"algorithm": "round_robin", name: {}}
        for field, inner in rule["properties"].items():
            for value in values(inner):
                part = {**needed, field: value}
                yield f"{name}.{field}", {"algorithm": "round_robin", name: part}


def test_the_proxy_accepts_what_the_schema_does(proxy: Proxy) -> None:
    wrong, seen = [], set()
    for name, policy in cases():
        valid = VALIDATOR.is_valid(policy)
        answer = proxy.admin.put({"u": upstream() | {"policy": policy}})
        seen.add((name.partition(".")[0], valid))
        if answer.status != (200 if valid else 422):
            wrong.append((policy, valid, answer.status))
        elif not valid:
            assert f"policy.{name.partition('.')[0]}" in answer.text
        else:
            assert answer.json()["unsupported"] in ([], [policy["algorithm"]])
    assert not wrong, "\n".join(map(repr, wrong))
    assert seen == {(name, valid) for name in POLICY["properties"] for valid in (True, False)}


@pytest.mark.parametrize("part", ["", *PARTS])
def test_the_schema_has_the_models_fields_and_defaults(part: str) -> None:
    rule = POLICY["properties"][part] if part else POLICY
    fields = {
        field.name: field for field in dataclasses.fields(PARTS[part] if part else model.Policy)
    }
    assert set(rule["properties"]) == set(fields)
    for name, field in fields.items():
        inner = rule["properties"][name]
        if field.default is dataclasses.MISSING:
            assert name in rule["required"]
        elif "properties" not in inner and name != "algorithm":
            default = field.default
            assert inner["default"] == (list(default) if isinstance(default, tuple) else default)


def test_a_whole_policy_of_the_agent_is_valid_and_accepted(proxy: Proxy) -> None:
    policy = model.Policy(
        algorithm=model.Algorithm.HASH,
        hash_key="header:X-User",
        hash_balance=1.25,
        sticky=model.Sticky(kind=model.StickyKind.COOKIE, cookie="sid", same_site="", max_age=60),
        slow_start=30.0,
        max_conns=100,
        queue=10,
        queue_timeout=2.5,
        canary=model.Canary(upstream="b.test/", weight=5, header="X-Canary", cookie="canary"),
    )
    sent = dict(policies.to_json(policy))
    VALIDATOR.validate(sent)
    answer = proxy.admin.put({"u": upstream() | {"policy": sent}})
    assert (answer.status, answer.json()["unsupported"]) == (200, [])
    shown = proxy.admin.call("GET", "/v1/membership/u").json()["policy"]
    assert policies.from_json(shown) == policy


def test_the_longest_values_that_labels_take_are_accepted(proxy: Proxy) -> None:
    host = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    asked = labels(hostname=host, domain="", context_root="/" + "r" * 239)
    long = "x" * 128
    main = labels(balance_algorithm=f"hdr({long})", sticky=f"cookie:{long}", health_check="/ping")
    canary = labels(canary__cookie=long, canary__header=long, canary__header_value=long)
    desired = compile_snapshot(
        snapshot(
            service("main", asked | main, instance("m1")),
            service("next", asked | canary, instance("n1"), created=2.0),
        ),
        Settings(),
    )
    assert desired.rejections == ()
    sent = {
        name: upstream() | {"policy": dict(policies.to_json(item.policy))}
        for name, item in desired.membership.upstreams.items()
    }
    assert len(sent) == 2
    assert proxy.admin.put(sent).status == 200
