"""Every call of the admin API answers with each status that its schema names, and in that form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jsonschema import Draft202012Validator

from tests.dataplane.harness import ROOT, Answer, Proxy, generation_of, peer, site, upstream
from tests.dataplane.hooks import Hooked

SCHEMA = json.loads((ROOT / "docs" / "admin-api.schema.json").read_text())
CALLS: dict[str, dict[str, str]] = SCHEMA["calls"]
TOKEN = "s3cret"
LARGE = b"{" + b" " * (64 << 20) + b"}"


def check(value: object, definition: str) -> None:
    """Raises ValidationError where `value` is not of this form."""
    schema = {"$ref": f"#/$defs/{definition}", "$defs": SCHEMA["$defs"]}
    Draft202012Validator(schema).validate(value)


class Calls:
    """Makes calls, looks at the form of what goes and comes, and notes what has been seen."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.seen: set[tuple[str, str]] = set()

    def __call__(
        self, call: str, status: int, body: object = None, *, raw: bytes | None = None
    ) -> Answer:
        """One call that has to be answered with this status."""
        method, path = call.replace("UPSTREAM", "a.test%2F").split(" ")
        answer = self._proxy.admin.call(method, path, body, raw=raw)
        assert answer.status == status, (call, answer.text)
        check(answer.json(), CALLS[call][str(status)])
        if body is not None and status == 200:
            check(body, CALLS[call]["body"])
        self.seen.add((call, str(status)))
        return answer


def test_every_call_gives_every_answer_that_the_schema_has(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    hooked = Hooked(make_proxy, tmp_path, token=TOKEN, env={"TIDEGATE_DICT_SIZE": "512k"})
    call = Calls(hooked.proxy)
    mine = {"writer": "mine"}
    small = {"a.test/": upstream(peer(80))}
    large = upstream(*(peer(80, id=f"{n:0100}", address="10.0.0.1") for n in range(9999)))
    files = site(hooked.proxy.http_port, {"a.test": {"/": "a.test/"}})
    good = {**mine, "generation": generation_of(files), "files": files}
    broken = {"a.test.conf": "nonsense;\n"}

    call("GET /healthz", 200)
    call("GET /readyz", 503)
    call("GET /v1/membership/UPSTREAM", 404)
    for write in ("PUT /v1/membership", "PATCH /v1/membership", "PUT /v1/site"):
        call(write, 400, raw=b"[1]")
        call(write, 413, raw=LARGE)
        call(write, 422, mine)
    for write in ("POST /v1/lease", "DELETE /v1/lease"):
        call(write, 400, raw=b"no JSON")
        call(write, 422, {"writer": ""})
    full = {**mine, "revision": 5, "upstreams": small}
    delta = {**mine, "base_revision": 5, "revision": 6, "upsert": small, "remove": ["gone"]}
    call("PUT /v1/membership", 200, full)
    call("PATCH /v1/membership", 200, delta)
    call("PUT /v1/membership", 409, {**full, "revision": 2})
    call("PATCH /v1/membership", 409, {**delta, "base_revision": 2, "revision": 9})
    call("PUT /v1/membership", 507, {**full, "revision": 7, "upstreams": {"large": large}})
    call(
        "PATCH /v1/membership",
        507,
        {**delta, "base_revision": 6, "revision": 7, "upsert": {"large": large}},
    )
    refused = {**mine, "generation": generation_of(broken), "files": broken}
    assert call("PUT /v1/site", 422, refused).json()["stage"] == "test"
    call("PUT /v1/site", 200, good)
    call("GET /readyz", 200)
    for path in ("status", "membership", "membership/UPSTREAM", "versions", "certificates", "site"):
        call(f"GET /v1/{path}", 200)

    call("POST /v1/lease", 200, mine)
    for write, body in (
        ("PUT /v1/membership", full),
        ("PATCH /v1/membership", delta),
        ("PUT /v1/site", good),
        ("POST /v1/lease", mine),
    ):
        call(write, 423, {**body, "writer": "another"})
    call("DELETE /v1/lease", 200, mine)

    for lock in ("push", "site"):
        assert hooked.run(f'return require("tidegate.lock").acquire("{lock}", 0)')
    call("PUT /v1/membership", 503, {**full, "revision": 8})
    call("PATCH /v1/membership", 503, {**delta, "base_revision": 6, "revision": 8})
    call("PUT /v1/site", 503, refused)

    documented = {
        (name, status) for name, parts in CALLS.items() for status in parts if status != "body"
    }
    assert call.seen == documented


def test_who_has_no_token_or_asks_for_what_is_not_there_gets_an_error_of_that_form(
    make_proxy: Callable[..., Proxy],
) -> None:
    proxy = make_proxy(token=TOKEN)
    proxy.start()
    for name in CALLS:
        method, path = name.replace("UPSTREAM", "x").split(" ")
        answers = [proxy.admin.call("OPTIONS", path)]
        assert answers[0].status == 405
        if path.startswith("/v1/"):
            answers.append(proxy.admin.call(method, path, token="wrong"))
            assert answers[-1].status == 401
        answers.append(proxy.admin.call(method, path + "/none/"))
        for answer in answers:
            assert answer.status in (401, 404, 405)
            check(answer.json(), "error")
