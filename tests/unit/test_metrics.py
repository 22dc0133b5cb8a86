"""Metrics: the documented names are the real ones, and no series outlives what it is about."""

from __future__ import annotations

import re
from pathlib import Path

from agent.metrics import InstanceSeries, Metrics, SourceView
from agent.model import Membership, Peer, PeerState, Rejection, Upstream

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def used() -> Metrics:
    """Everything has happened once."""
    metrics = Metrics(clock=lambda: 1000.0)
    metrics.event("swarm", "task")
    metrics.sync("swarm", ok=False, seconds=0.1)
    metrics.sources_from(lambda: [SourceView("swarm", "watch", 990.0)])
    metrics.instances_from(lambda: [InstanceSeries("nginx.1", 7, "ab" * 32, True, 999.0)])
    metrics.applied("membership", 0.004)
    metrics.push("nginx.1", "delta", "ok")
    metrics.reload("nginx.1", "ok", 0.25)
    metrics.settings_reload("ok")
    metrics.loop_error("source")
    metrics.desired(
        Membership(
            {
                "a/": Upstream(
                    "a/",
                    (
                        Peer("1", "10.0.0.1", 80),
                        Peer("2", "10.0.0.2", 80),
                        Peer("3", "10.0.0.3", 80, state=PeerState.DRAINING),
                    ),
                )
            }
        )
    )
    metrics.rejections_from(lambda: [Rejection("service b", "no_port", "m", "h")])
    return metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = metrics.exposition().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_every_metric_is_documented_with_its_type_and_labels_and_none_that_is_not_there():
    section = DOCS.read_text().partition("## Agent")[2].partition("\n## ")[0]
    documented = {}
    for name, kind, labels in re.findall(
        r"^\| `([a-z_]+)` \| (\w+) \| (.*?) \|", section, re.MULTILINE
    ):
        documented[name] = kind, frozenset(re.findall(r"`(\w+)`", labels))
    real = {}
    for family in used().registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        real[name] = family.type, frozenset(labels)
    assert documented == real


def test_ages_are_computed_when_they_are_asked_for():
    found = series(used())
    assert found['tidegate_discovery_last_success_timestamp_seconds{source="swarm"}'] == 990
    assert found['tidegate_snapshot_age_seconds{source="swarm"}'] == 10
    assert found['tidegate_watch_mode{mode="watch",source="swarm"}'] == 1


def test_a_source_that_never_synced_has_no_age_rather_than_a_young_one():
    metrics = Metrics()
    metrics.sources_from(lambda: [SourceView("swarm", "connecting", 0.0)])
    assert not [name for name in series(metrics) if "snapshot_age" in name]


def test_peers_are_counted_by_upstream_and_state_and_go_with_their_upstream():
    metrics = used()
    found = series(metrics)
    assert found['tidegate_peers{state="up",upstream="a/"}'] == 2
    assert found['tidegate_peers{state="draining",upstream="a/"}'] == 1
    metrics.desired(Membership({}))
    assert not [name for name in series(metrics) if name.startswith("tidegate_peers")]


def test_rejections_are_counted_by_reason():
    assert series(used())['tidegate_rejections{reason="no_port"}'] == 1


def test_an_instance_that_is_gone_leaves_no_series():
    metrics = used()
    metrics.push("nginx.2", "full", "ok")
    metrics.instances_from(tuple)
    metrics.forget_instance("nginx.1")
    left = [name for name in series(metrics) if "nginx." in name]
    assert left == ['tidegate_pushes_total{instance="nginx.2",kind="full",result="ok"}']


def test_an_instance_that_was_never_seen_is_out_of_sync_and_claims_nothing_else():
    metrics = Metrics()
    metrics.instances_from(lambda: [InstanceSeries("nginx.1", 0, "", False, 0.0)])
    assert {name: value for name, value in series(metrics).items() if "nginx.1" in name} == {
        'tidegate_instance_in_sync{instance="nginx.1"}': 0
    }


def test_the_histogram_resolves_the_promise_of_25_milliseconds():
    bounds = [
        float(bound)
        for bound in re.findall(r'kind="membership",le="([\d.]+)"', used().exposition().decode())
    ]
    assert bounds[0] <= 0.001
    assert bounds[-1] >= 10
    assert 0.025 in bounds
    assert len([bound for bound in bounds if 0.005 <= bound <= 0.05]) >= 6
