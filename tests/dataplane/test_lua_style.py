"""The Lua code is clean by luacheck, and what runs in nginx's stream part needs no other."""

from __future__ import annotations

import re
import shutil
import subprocess

from tests.conftest import require
from tests.dataplane.harness import ROOT


def test_luacheck_finds_nothing() -> None:
    require(shutil.which("luacheck"), "luacheck (apt-get install lua-check)")
    result = subprocess.run(
        ["luacheck", "--no-color", "nginx/lua"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


STREAM_PART = {
    "stream",
    "bridge",
    "tcp",
    "tcp_metrics",
    "ejections",
    "codec",
    "policy",
    "json",
    "posix",
}
"""Modules that may be loaded where there are no requests and no dicts but those of the http part.

What is added here has to be tried on a build with Lua in its stream part (docs/testing.md)."""


def test_the_stream_part_loads_nothing_that_needs_the_http_part() -> None:
    loaded: set[str] = set()
    found = {"stream"}
    while found:
        name = found.pop()
        loaded.add(name)
        text = (ROOT / "nginx/lua/tidegate" / f"{name}.lua").read_text()
        found |= set(re.findall(r'require\(?\s*"tidegate\.([\w.]+)"', text)) - loaded
    assert loaded == STREAM_PART
