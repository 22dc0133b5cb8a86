"""The soak in short: everything at once on the real pair; and what is wrong would be told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.soak import Look, Outcome, judge, run
from tests.conftest import require
from tests.dataplane.harness import nginx_is_installed

SECONDS = 9

LOOK = Look(
    seconds=100,
    master_mb=5,
    workers_mb=[10, 10],
    lua_kb=[800, 800],
    agent_mb=40,
    pss_mb=25,
    master_descriptors=11,
    worker_descriptors=24,
    agent_descriptors=5,
    dict_free_bytes=60_000_000,
    load_cells=0,
    series=150,
    reloads=40,
)
HAPPENED = {
    "peers replaced": 1,
    "policies changed": 1,
    "certificates renewed": 1,
    "sites changed": 1,
    "peers ejected": 1,
    "certificates seen": 2,
}


def test_a_short_soak(tmp_path: Path) -> None:
    require(nginx_is_installed(), "nginx with libnginx-mod-http-lua, or OpenResty")
    outcome = run(SECONDS, print)
    assert outcome.complaints == [], outcome
    kinds = {"kept", "new", "post", "websocket", "ejected", "tls", "tls kept"}
    assert {kind for kind, count in outcome.answered.items() if count >= 10} == kinds


@pytest.mark.parametrize(
    "grown",
    [
        {"master_mb": 9},
        {"workers_mb": [10, 27]},
        {"lua_kb": [800, 1100]},
        {"agent_mb": 56},
        {"master_descriptors": 14},
        {"worker_descriptors": 31},
        {"agent_descriptors": 10},
        {"dict_free_bytes": 59_000_000},
        {"load_cells": 1},
        {"series": 250},
        {"reloads": 41},
    ],
    ids=lambda grown: next(iter(grown)),
)
def test_what_has_grown_is_told(grown: dict[str, Any]) -> None:
    looks = [LOOK, LOOK, LOOK]
    assert judge(Outcome(happened=dict(HAPPENED), looks=looks)) == []
    looks[2] = replace(LOOK, **grown)
    assert len(judge(Outcome(happened=dict(HAPPENED), looks=looks))) == 1


@pytest.mark.parametrize("what", HAPPENED)
def test_a_scene_that_did_not_happen_is_told(what: str) -> None:
    outcome = Outcome(happened={**HAPPENED, what: 0}, looks=[LOOK] * 3)
    assert len(judge(outcome)) == 1


def test_failed_requests_are_told() -> None:
    outcome = Outcome(happened=dict(HAPPENED), looks=[LOOK] * 3, failures=1)
    assert judge(outcome) == ["1 requests failed"]
