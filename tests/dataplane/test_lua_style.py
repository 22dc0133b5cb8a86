"""The Lua code is clean by luacheck."""

from __future__ import annotations

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
