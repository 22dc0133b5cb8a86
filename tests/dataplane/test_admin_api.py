"""Each call of docs/admin-api.md, and each of its refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dataplane.harness import (
    ENTRYPOINT,
    ROOT,
    Answer,
    Backend,
    Proxy,
    generation_of,
    nginx_has_stream_lua,
    peer,
    request,
    site,
    upstream,
    wait_until,
)

SCHEMA = json.loads((ROOT / "docs" / "admin-api.schema.json").read_text())


def body(revision: int, **more: object) -> dict[str, object]:
    return {"writer": "test", "revision": revision, **more}


def test_status_says_who_it_is_and_what_is_in_force(proxy: Proxy) -> None:
    proxy.admin.put({"a": upstream(peer(81), peer(82)), "b": upstream(peer(83))})
    status = proxy.admin.status()
    assert status["revision"] == 1
    assert (status["upstreams"], status["peers"], status["source"]) == (2, 3, "push")
    assert (status["generation"], status["writer"]) == ("", "test")
    assert 0 < status["lease_expires_in"] <= 15
    assert (status["workers"], status["master_pid"]) == (2, proxy.pid)
    assert status["dict"]["capacity_bytes"] > status["dict"]["free_bytes"] > 0
    assert set(status) == set(SCHEMA["$defs"]["status"]["required"])
    version = status["nginx_version"]
    assert status["versions"]["nginx"] == f"{version // 1000000}.{version // 1000 % 1000}." + str(
        version % 1000
    )


def test_it_says_whether_it_can_pass_connections_on(proxy: Proxy) -> None:
    assert ("stream" in proxy.admin.status()["features"]) == nginx_has_stream_lua()


def test_a_file_for_the_stream_part_does_no_harm_where_there_is_none(proxy: Proxy) -> None:
    files = site(proxy.http_port, {"a.test": {"/": "a.test/"}})
    answer = proxy.admin.site({**files, "empty.stream": "# for the stream part\n"})
    assert answer.status == 200, answer.text


def test_its_version_is_the_one_of_the_project(proxy: Proxy) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    version = proxy.admin.status()["versions"]["tidegate"]
    assert f'version = "{version}"' in project


def test_the_instance_is_new_at_each_start(proxy: Proxy) -> None:
    before = proxy.admin.status()["instance"]
    proxy.stop()
    proxy.start()
    assert proxy.admin.status()["instance"] != before


def test_membership_is_shown_as_it_was_pushed(proxy: Proxy) -> None:
    pushed = upstream(
        peer(81, id="one", weight=3),
        peer(82, id="two", address="fd00::7", state="draining"),
        peer(83, id="zero", weight=0),
        hold=2.5,
    )
    proxy.admin.put({"a.test/x y": pushed})
    answer = proxy.admin.call("GET", "/v1/membership").json()
    shown = answer["upstreams"]["a.test/x y"]
    live = {item["id"]: item.pop("live")["state"] for item in shown["peers"]}
    assert (answer["revision"], shown) == (1, pushed)
    assert live["two"] == "draining"
    one = proxy.admin.call("GET", "/v1/membership/a.test%2Fx%20y")
    assert one.json()["hold"] == 2.5
    assert proxy.admin.call("GET", "/v1/membership/nobody").status == 404


def test_an_empty_list_of_peers_stays_a_list(proxy: Proxy) -> None:
    proxy.admin.put({"a": upstream()})
    assert proxy.admin.call("GET", "/v1/membership/a").json()["peers"] == []


def test_versions_come_back_as_they_were_pushed(proxy: Proxy) -> None:
    known = upstream(peer(1), peer(2)) | {"version": "abc"}
    proxy.admin.put({"known": known, "other": upstream(peer(3))})
    assert proxy.admin.call("GET", "/v1/versions").json() == {
        "revision": 1,
        "versions": {"known": "abc", "other": ""},
    }
    proxy.stop()
    proxy.start()
    assert proxy.admin.call("GET", "/v1/versions").json()["versions"]["known"] == "abc"


def test_put_replaces_all_and_patch_changes_some(proxy: Proxy) -> None:
    admin = proxy.admin
    assert admin.put({"a": upstream(peer(81)), "b": upstream()}).json() == {
        "revision": 1, "upserted": 2, "removed": 0, "unsupported": [],
    }  # fmt: skip
    assert admin.patch({"c": upstream(peer(83))}, remove=["b", "never was"]).json() == {
        "revision": 2, "upserted": 1, "removed": 1, "unsupported": [],
    }  # fmt: skip
    assert set(admin.call("GET", "/v1/membership").json()["upstreams"]) == {"a", "c"}
    assert admin.put({"d": upstream()}).json()["removed"] == 2
    assert set(admin.call("GET", "/v1/membership").json()["upstreams"]) == {"d"}
    assert (admin.status()["upstreams"], admin.status()["peers"]) == (1, 0)


def test_the_same_push_again_is_answered_and_changes_nothing(proxy: Proxy) -> None:
    push = body(5, upstreams={"a": upstream(peer(81))})
    assert proxy.admin.call("PUT", "/v1/membership", push).status == 200
    again = proxy.admin.call("PUT", "/v1/membership", push)
    assert (again.status, again.json()["revision"]) == (200, 5)
    delta = body(6, base_revision=5, upsert={"b": upstream()})
    assert proxy.admin.call("PATCH", "/v1/membership", delta).status == 200
    assert proxy.admin.call("PATCH", "/v1/membership", delta).status == 200
    assert proxy.admin.status()["revision"] == 6


def test_an_unknown_algorithm_is_listed_and_served_by_round_robin(
    routed: Proxy, backend: Backend
) -> None:
    pushed = upstream(backend.peer())
    pushed["policy"] = {"algorithm": "maglev"}
    assert routed.admin.put({"a.test/": pushed}).json()["unsupported"] == ["maglev"]
    assert request(routed.http_port).text == "b0"
    shown = routed.admin.call("GET", "/v1/membership/a.test%2F").json()
    assert shown["policy"] == {"algorithm": "maglev"}


@pytest.mark.parametrize(
    "raw", [b"", b"nonsense", b'{"a":', b"[1]", b"[]", b"7", b'"text"', b"null"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/membership"),
        ("PATCH", "/v1/membership"),
        ("PUT", "/v1/site"),
        ("POST", "/v1/lease"),
    ],
)
def test_what_is_no_json_object_is_refused(
    shared: Proxy, method: str, path: str, raw: bytes
) -> None:
    answer = shared.admin.call(method, path, raw=raw)
    assert (answer.status, answer.json()["error"]) == (400, "bad_json")


LARGE = {f"u{number}": upstream(peer(80), peer(81)) for number in range(3000)}
"""More than nginx keeps of a body in memory."""


def test_a_large_push_is_applied_whole_or_not_at_all(routed: Proxy) -> None:
    status = routed.admin.status()
    revision, before = status["revision"], status["upstreams"]
    body = {"writer": "test", "revision": revision + 1, "upstreams": LARGE}
    text = json.dumps(body).encode()
    assert len(text) > 300_000
    for broken in (text[:-2], text[:-1] + b"]", text + b"x", text.replace(b'"u2999"', b"u2999")):
        answer = routed.admin.call("PUT", "/v1/membership", raw=broken)
        assert (answer.status, answer.json()["error"]) == (400, "bad_json")
    inside = text.replace(b'"weight": 1', b'"weight": }', 1)
    answer = routed.admin.call("PUT", "/v1/membership", raw=inside)
    assert (answer.status, answer.json()["error"]) == (400, "bad_json")
    faulty = {**body, "upstreams": {**LARGE, "u2999": upstream(peer(0))}}
    answer = routed.admin.call("PUT", "/v1/membership", faulty)
    assert [item["upstream"] for item in answer.json()["errors"]] == ["u2999"]
    status = routed.admin.status()
    assert (status["revision"], status["upstreams"]) == (revision, before)
    assert routed.admin.call("PUT", "/v1/membership", body).status == 200
    assert routed.admin.status()["upstreams"] == 3000


def test_an_upstream_that_is_there_twice_is_a_fault(routed: Proxy) -> None:
    before = routed.admin.status()
    item = json.dumps(upstream(peer(80)))
    raw = (
        f'{{"writer":"test","revision":{before["revision"] + 1},'
        f'"upstreams":{{"a":{item},"\\u0061":{item}}}}}'
    ).encode()
    answer = routed.admin.call("PUT", "/v1/membership", raw=raw)
    assert answer.status == 422
    assert [error["upstream"] for error in answer.json()["errors"]] == ["a"]
    assert routed.admin.status()["revision"] == before["revision"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy that holds `keep`; for refusals, which leave it as it is."""
    with Proxy(tmp_path_factory.mktemp("shared")) as proxy:
        assert proxy.admin.put({"keep": upstream(peer(80))}).status == 200
        yield proxy


BAD_UPSTREAMS = {
    "no object": ("a", 7, ""),
    "no peers": ("a", {}, "peers"),
    "peers no list": ("a", {"peers": {"a": 1}}, "peers"),
    "peer no object": ("a", {"peers": [7]}, "peers[0]"),
    "name empty": ("", upstream(), "name"),
    "name too long": ("a" * 513, upstream(), "name"),
    "name with control": ("a\nb", upstream(), "name"),
    "name with NUL": ("a\0b", upstream(), "name"),
    "name of an address": ("a", upstream(peer(80, address="example.com")), "peers[0].address"),
    "unspecified": ("a", upstream(peer(80, address="0.0.0.0")), "peers[0].address"),
    "unspecified 6": ("a", upstream(peer(80, address="::")), "peers[0].address"),
    "unspecified mapped": ("a", upstream(peer(80, address="::ffff:0.0.0.0")), "peers[0].address"),
    "address with port": ("a", upstream(peer(80, address="10.0.0.1:80")), "peers[0].address"),
    "address bracketed": ("a", upstream(peer(80, address="[::1]")), "peers[0].address"),
    "address with NUL": ("a", upstream(peer(80, address="10.0.0.1\0")), "peers[0].address"),
    "address empty": ("a", upstream(peer(80, address="")), "peers[0].address"),
    "unix": ("a", upstream(peer(80, address="unix:/tmp/x")), "peers[0].address"),
    "port 0": ("a", upstream(peer(0)), "peers[0].port"),
    "port too high": ("a", upstream(peer(65536)), "peers[0].port"),
    "port broken": ("a", upstream({**peer(80), "port": 80.5}), "peers[0].port"),
    "port text": ("a", upstream({**peer(80), "port": "80"}), "peers[0].port"),
    "weight negative": ("a", upstream(peer(80, weight=-1)), "peers[0].weight"),
    "weight too high": ("a", upstream(peer(80, weight=1001)), "peers[0].weight"),
    "state unknown": ("a", upstream(peer(80, state="down")), "peers[0].state"),
    "id empty": ("a", upstream({**peer(80), "id": ""}), "peers[0].id"),
    "id not ASCII": ("a", upstream(peer(80, id="ü")), "peers[0].id"),
    "id too long": ("a", upstream(peer(80, id="a" * 129)), "peers[0].id"),
    "id twice": ("a", upstream(peer(80, id="x"), peer(81, id="x")), "peers[1].id"),
    "hold negative": ("a", upstream(hold=-1), "hold"),
    "hold too long": ("a", upstream(hold=300.5), "hold"),
    "hold text": ("a", {"hold": "1", "peers": []}, "hold"),
    "policy no object": ("a", {"policy": "x", "peers": []}, "policy"),
    "algorithm": ("a", {"policy": {"algorithm": "A;b"}, "peers": []}, "policy.algorithm"),
    "too many peers": (
        "a",
        upstream(*(peer(80, id=str(n), address="10.0.0.1") for n in range(10001))),
        "peers",
    ),
}


@pytest.mark.parametrize("case", BAD_UPSTREAMS)
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_push_with_one_fault_is_refused_whole(shared: Proxy, method: str, case: str) -> None:
    name, item, field = BAD_UPSTREAMS[case]
    upstreams = {"good": upstream(peer(85)), name: item}
    push = body(2, upstreams=upstreams)
    if method == "PATCH":
        push = body(2, base_revision=1, upsert=upstreams)
    answer = shared.admin.call(method, "/v1/membership", push)
    assert (answer.status, answer.json()["error"]) == (422, "invalid")
    assert {(e["upstream"], e["field"]) for e in answer.json()["errors"]} == {(name, field)}
    assert all(e["message"] for e in answer.json()["errors"])
    state = shared.admin.call("GET", "/v1/membership").json()
    assert (state["revision"], set(state["upstreams"])) == (1, {"keep"})


def test_all_faults_are_named_up_to_a_hundred(shared: Proxy) -> None:
    two = body(2, upstreams={"a": upstream(peer(0)), "b": upstream(peer(80, address="x"))})
    errors = shared.admin.call("PUT", "/v1/membership", two).json()["errors"]
    assert {e["upstream"] for e in errors} == {"a", "b"}
    many = body(2, upstreams={f"u{n}": upstream(peer(0)) for n in range(300)})
    assert len(shared.admin.call("PUT", "/v1/membership", many).json()["errors"]) == 100


@pytest.mark.parametrize(
    ("push", "field"),
    [
        ({"writer": "test", "upstreams": {}}, "revision"),
        ({"writer": "test", "revision": 0, "upstreams": {}}, "revision"),
        ({"writer": "test", "revision": 1.5, "upstreams": {}}, "revision"),
        ({"writer": "test", "revision": "2", "upstreams": {}}, "revision"),
        ({"writer": "test", "revision": 1e17, "upstreams": {}}, "revision"),
        ({"writer": "test", "revision": 2}, "upstreams"),
        ({"writer": "test", "revision": 2, "upstreams": 1}, "upstreams"),
        ({"revision": 2, "upstreams": {}}, "writer"),
        ({"writer": "", "revision": 2, "upstreams": {}}, "writer"),
        ({"writer": "a" * 129, "revision": 2, "upstreams": {}}, "writer"),
        ({"writer": "a\nb", "revision": 2, "upstreams": {}}, "writer"),
    ],
)
def test_the_frame_of_a_push_is_checked(shared: Proxy, push: object, field: str) -> None:
    answer = shared.admin.call("PUT", "/v1/membership", push)
    assert (answer.status, answer.json()["error"]) == (422, "invalid")
    assert [e["field"] for e in answer.json()["errors"]] == [field]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"upsert": {}}, "base_revision"),
        ({"base_revision": 1, "remove": "a"}, "remove"),
        ({"base_revision": 1, "remove": [7]}, "remove"),
        ({"base_revision": 1, "upsert": {"a": upstream()}, "remove": ["a"]}, "remove"),
    ],
)
def test_the_frame_of_a_delta_is_checked(
    shared: Proxy, more: dict[str, object], field: str
) -> None:
    answer = shared.admin.call("PATCH", "/v1/membership", body(2, **more))
    assert (answer.status, [e["field"] for e in answer.json()["errors"]]) == (422, [field])


def test_a_wrong_base_is_answered_with_the_current_revision(shared: Proxy) -> None:
    for push in (
        body(7, base_revision=6, upsert={}),
        body(7, base_revision=0, upsert={}),
        body(1, base_revision=1, upsert={"a": upstream()}, writer="test"),
    ):
        if push["revision"] == 1:
            continue
        answer = shared.admin.call("PATCH", "/v1/membership", push)
        assert (answer.status, answer.json()["error"]) == (409, "revision")
        assert answer.json()["revision"] == 1


def test_a_revision_that_is_not_above_is_refused(proxy: Proxy) -> None:
    proxy.admin.call("PUT", "/v1/membership", body(10, upstreams={}))
    answer = proxy.admin.call("PUT", "/v1/membership", body(9, upstreams={}))
    assert (answer.status, answer.json()["revision"]) == (409, 10)
    delta = body(10, base_revision=10, upsert={"a": upstream()})
    proxy.admin.call("DELETE", "/v1/lease", {"writer": "test"})
    other = proxy.admin.call("PATCH", "/v1/membership", {**delta, "writer": "another"})
    assert (other.status, other.json()["revision"]) == (409, 10)


def test_a_body_beyond_the_buffer_is_read_from_its_file(proxy: Proxy) -> None:
    upstreams = {
        f"host-{n}.test/": upstream(*(peer(8000 + k, id=f"{n}-{k}") for k in range(10)))
        for n in range(1000)
    }
    assert len(json.dumps(upstreams)) > 900_000
    assert proxy.admin.put(upstreams).json()["upserted"] == 1000
    assert proxy.admin.status()["peers"] == 10000


def test_ten_thousand_peers_and_a_long_name_fit(proxy: Proxy) -> None:
    many = upstream(
        *(peer(80, id=str(n), address=f"10.1.{n >> 8}.{n & 255}") for n in range(1, 10001))
    )
    name = "ü" * 256
    assert proxy.admin.put({name: many}).status == 200
    answer = proxy.admin.call("GET", "/v1/membership").json()
    assert len(answer["upstreams"][name]["peers"]) == 10000


def test_a_body_above_the_limit_is_refused(shared: Proxy) -> None:
    answer = shared.admin.call("PUT", "/v1/membership", raw=b"{" + b" " * (64 << 20) + b"}")
    assert (answer.status, answer.json()["error"]) == (413, "too_large")


def test_unknown_paths_and_methods(shared: Proxy) -> None:
    assert shared.admin.call("GET", "/").json()["error"] == "not_found"
    assert shared.admin.call("GET", "/v2/status").status == 404
    answer = shared.admin.call("POST", "/v1/membership", {})
    assert (answer.status, answer.json()["error"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, PATCH, PUT"
    assert shared.admin.call("DELETE", "/v1/membership/keep").status == 405
    assert shared.admin.call("DELETE", "/v1/site").status == 405
    assert shared.admin.call("POST", "/metrics").status == 405


def test_no_get_changes_anything(shared: Proxy) -> None:
    before = shared.admin.call("GET", "/v1/membership").body
    for path in ("/v1/status", "/v1/membership", "/metrics", "/healthz", "/readyz"):
        shared.admin.call("GET", path, {"writer": "x", "revision": 9, "upstreams": {}})
    assert shared.admin.call("GET", "/v1/membership").body == before


def test_every_v1_call_needs_the_token(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(token="s3cret")
    proxy.start()
    for method, path in (
        ("GET", "/v1/status"), ("GET", "/v1/membership"), ("PUT", "/v1/membership"),
        ("PATCH", "/v1/membership"), ("PUT", "/v1/site"), ("POST", "/v1/lease"), ("GET", "/v1/x"),
    ):  # fmt: skip
        for token in ("", "wrong", "s3cre", "s3crets", "S3CRET"):
            answer = proxy.admin.call(method, path, {}, token=token)
            assert (answer.status, answer.json()["error"]) == (401, "unauthorized")
    assert proxy.admin.call("GET", "/v1/status").status == 200
    for path in ("/metrics", "/healthz"):
        assert proxy.admin.call("GET", path, token="").status == 200


def test_the_token_comes_from_a_file_without_its_trailing_space(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("from-file \r\n\n")
    proxy = make_proxy(env={"TIDEGATE_ADMIN_TOKEN_FILE": str(file)})
    proxy.start()
    assert proxy.admin.call("GET", "/v1/status").status == 401
    assert proxy.admin.call("GET", "/v1/status", token="from-file").status == 200


@pytest.mark.parametrize("listen", ["0.0.0.0:8081", "8081", "*:8081", "[::]:8081", "10.0.0.1:8081"])
def test_beyond_loopback_it_does_not_start_without_a_token(tmp_path: Path, listen: str) -> None:
    result = subprocess.run(
        ["sh", ENTRYPOINT],
        env={
            "PATH": "/usr/sbin:/usr/bin:/bin",
            "TIDEGATE_RUN_DIR": str(tmp_path / "run"),
            "TIDEGATE_STATE_DIR": str(tmp_path / "state"),
            "TIDEGATE_ADMIN_LISTEN": listen,
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode != 0
    assert f"TIDEGATE_ADMIN_LISTEN is {listen}" in result.stderr
    assert "TIDEGATE_ADMIN_TOKEN_FILE" in result.stderr


def test_a_setting_cannot_smuggle_in_a_directive(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(env={"TIDEGATE_ADMIN_LISTEN": "127.0.0.1:1; } evil"})
    assert proxy.launch().wait(20) != 0
    assert "TIDEGATE_ADMIN_LISTEN is '127.0.0.1:1; } evil'" in proxy.output


def test_the_admin_listener_can_be_a_unix_socket(
    make_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    path = tmp_path / "admin.sock"
    proxy = make_proxy(env={"TIDEGATE_ADMIN_LISTEN": f"unix:{path}"})
    for _ in range(2):  # the second time with the socket that a kill has left
        process = proxy.launch()
        command = ["curl", "-sf", "--retry", "50", "--retry-all-errors", "--retry-delay", "0"]
        command += ["--retry-max-time", "10", "--unix-socket", str(path), "http://x/v1/status"]
        result = subprocess.run(command, capture_output=True, timeout=20)
        assert json.loads(result.stdout)["revision"] == 0
        workers = proxy.workers()
        process.kill()
        process.wait(10)
        for pid in workers:
            subprocess.run(["kill", "-9", str(pid)], check=False)


def test_one_writer_at_a_time(proxy: Proxy) -> None:
    admin = proxy.admin
    assert admin.call("POST", "/v1/lease", {"writer": "one"}).json()["expires_in"] == 5
    for method, path, push in (
        ("PUT", "/v1/membership", {"revision": 1, "upstreams": {}}),
        ("PATCH", "/v1/membership", {"revision": 1, "base_revision": 0, "upsert": {}}),
        ("PUT", "/v1/site", {"generation": "0" * 64, "files": {}}),
        ("POST", "/v1/lease", {}),
    ):
        answer = admin.call(method, path, {"writer": "two", **push})
        assert (answer.status, answer.json()["error"]) == (423, "lease_held")
        assert answer.json()["writer"] == "one"
        assert 4 < answer.json()["expires_in"] <= 5
    assert admin.call("DELETE", "/v1/lease", {"writer": "two"}).status == 200
    assert admin.status()["writer"] == "one"
    assert admin.call("DELETE", "/v1/lease", {"writer": "one"}).status == 200
    assert admin.status()["writer"] == ""
    two = admin.call("PUT", "/v1/membership", {"writer": "two", "revision": 1, "upstreams": {}})
    assert (two.status, admin.status()["writer"]) == (200, "two")


def test_the_lease_lapses(make_proxy: Callable[..., Proxy]) -> None:
    proxy = make_proxy(env={"TIDEGATE_LEASE_TTL": "0.3"})
    proxy.start()
    proxy.admin.call("POST", "/v1/lease", {"writer": "one"})
    assert proxy.admin.call("POST", "/v1/lease", {"writer": "two"}).status == 423
    wait_until(lambda: proxy.admin.call("POST", "/v1/lease", {"writer": "two"}).status == 200)


def test_a_full_dict_is_said_and_the_old_state_serves(
    make_proxy: Callable[..., Proxy], backend: Backend
) -> None:
    proxy = make_proxy(env={"TIDEGATE_DICT_SIZE": "512k"})
    proxy.start()
    admin = proxy.admin
    admin.site(site(proxy.http_port, {"a.test": {"/": "a.test/"}}))
    admin.put({"a.test/": upstream(backend.peer())})
    before = admin.call("GET", "/v1/membership").body
    free = admin.status()["dict"]["free_bytes"]
    big = upstream(*(peer(80, id=f"{n:0100}", address="10.0.0.1") for n in range(9999)))
    pushes: list[Callable[[], Answer]] = [
        lambda: admin.patch({"big": big, "a.test/": upstream()}),
        lambda: admin.patch({f"u{n}": upstream(peer(80, id="x" * 99)) for n in range(5000)}),
        lambda: admin.put({"big": big}),
    ]
    for push in pushes:
        answer = push()
        assert (answer.status, answer.json()["error"]) == (507, "dict_full")
        assert answer.json()["needed_bytes"] > answer.json()["free_bytes"] >= 0
        assert request(proxy.http_port).text == "b0"
        assert admin.call("GET", "/v1/membership").body == before
        assert admin.status()["upstreams"] == 1
    assert admin.status()["dict"]["free_bytes"] == free
    admin.revision = 1
    assert admin.patch({"small": upstream(peer(81))}).status == 200


def test_health_and_readiness(proxy: Proxy) -> None:
    admin = proxy.admin
    assert admin.call("GET", "/healthz").status == 200
    assert "no membership" in admin.call("GET", "/readyz").json()["reason"]
    admin.put({})
    answer = admin.call("GET", "/readyz")
    assert (answer.status, "no site" in answer.json()["reason"]) == (503, True)
    files = site(proxy.http_port, {})
    assert admin.site(files).status == 200
    assert admin.call("GET", "/readyz").status == 200
    assert admin.status()["generation"] == generation_of(files)


def test_the_healthcheck_tells_a_running_instance(proxy: Proxy) -> None:
    script = ROOT / "nginx" / "healthcheck.sh"
    env = {"PATH": "/usr/sbin:/usr/bin:/bin", **proxy.env}
    assert subprocess.run(["sh", script], env=env, timeout=20).returncode == 0
    proxy.stop()
    assert subprocess.run(["sh", script], env=env, timeout=20).returncode != 0


def test_reading_much_while_it_changes_is_right_and_harms_no_worker(proxy: Proxy) -> None:
    """Values are read in place: one that is collected too early would show here."""
    workers = proxy.workers()

    def pushed(turn: int) -> dict[str, dict[str, object]]:
        ids = (f"{turn:08}-{'x' * 40}-{k}" for k in range(10))
        peers = [peer(80 + k, id=name) for k, name in enumerate(ids)]
        return {f"host-{n}.test/": upstream(*peers) for n in range(1500)}

    for turn in range(6):
        assert proxy.admin.put(pushed(turn)).status == 200
        answer = proxy.admin.call("GET", "/v1/membership").json()
        shown = answer["upstreams"]
        assert len(shown) == 1500
        for item in shown.values():
            assert [p["port"] for p in item["peers"]] == list(range(80, 90))
            assert {p["id"].partition("-")[0] for p in item["peers"]} == {f"{turn:08}"}
        seen = proxy.admin.metrics()
        counts = [v for k, v in seen.items() if k.startswith("tidegate_peers{")]
        assert sum(counts) == 15000
    assert proxy.workers() == workers
