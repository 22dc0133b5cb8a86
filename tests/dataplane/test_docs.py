"""docs/data-plane.md names every setting and every metric, and no other."""

from __future__ import annotations

import json
import re

from tests.dataplane.harness import ROOT, Backend, Proxy, request, upstream, wait_until

DOC = (ROOT / "docs" / "data-plane.md").read_text()


def test_every_setting_is_told() -> None:
    read = re.findall(r"\$\{(TIDEGATE_\w+):-", (ROOT / "nginx" / "entrypoint.sh").read_text())
    told = re.findall(r"^\| `(TIDEGATE_\w+)` \|", DOC, re.M)
    assert set(told) == set(read)


def test_every_metric_is_told(routed: Proxy, backend: Backend) -> None:
    told = dict(re.findall(r"^\| `(tidegate_\w+)` \| (\w+) \|", DOC, re.M))
    modules = (ROOT / "nginx/lua/tidegate").glob("*.lua")
    source = "".join(path.read_text() for path in modules)
    families = dict(
        re.findall(r'(?:\{ |:family\(|:single\()"(\w+)", "(counter|gauge|histogram)"', source)
    )
    families |= dict.fromkeys(re.findall(r'print_gauge\(text, \w+, "(\w+)"', source), "gauge")
    routed.admin.put({"a.test/": upstream(backend.peer())})
    request(routed.http_port)

    def shown() -> dict[str, str]:
        text = routed.admin.call("GET", "/metrics").text
        return dict(re.findall(r"# TYPE (\w+) (\w+)", text))

    wait_until(lambda: "tidegate_requests_total" in shown())
    emitted = shown() | {f"tidegate_{name}": kind for name, kind in families.items()}
    assert emitted == told


def test_every_schema_definition_is_used() -> None:
    schema = json.loads((ROOT / "docs" / "admin-api.schema.json").read_text())
    used = {name for call in schema["calls"].values() for name in call.values()}
    refs = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert used | refs == set(schema["$defs"])
