"""What the agent tells Prometheus, in a registry of its own.

Why a class: every part gets the one object and calls methods with meaning, so that names, labels
and buckets stand in one place and a test can have its own. What is a plain view of state (peers,
rejections, ages) is computed at the scrape, so it costs a change nothing and cannot go stale.
No label here may take a value that churns: task ids and addresses never become labels.
"""

from __future__ import annotations

import platform
import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent import __version__
from agent.model import Membership, PeerState, Rejection

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

APPLIED_BUCKETS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05,
    0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Seconds. The promise is 25 ms at the 99th percentile, so the buckets are finest around it."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, of use only to OpenMetrics


def version() -> str:
    """Version of the agent."""
    return __version__


class SourceView(NamedTuple):
    """How a source stands; `last_success` is Unix time, 0 for never."""

    name: str
    mode: str
    last_success: float


class InstanceSeries(NamedTuple):
    """How an OpenResty instance stands; `last_seen` is Unix time, 0 for never."""

    name: str
    revision: int
    generation: str
    in_sync: bool
    last_seen: float


class Metrics:
    """All of the agent's metrics; thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._sources: Callable[[], Iterable[SourceView]] = tuple
        self._membership = Membership({})
        self._rejections: Callable[[], Iterable[Rejection]] = tuple
        self._instances: Callable[[], Iterable[InstanceSeries]] = tuple
        self._started = clock()
        self._last_reload = 0.0

        build = self._gauge(
            "tidegate_build_info", "Version of the agent; always 1.", "version", "python"
        )
        build.labels(version(), platform.python_version()).set(1)
        self._events = self._counter(
            "tidegate_events_total", "Changes heard of, by source and type.", "source", "type"
        )
        self._source_errors = self._counter(
            "tidegate_discovery_errors_total",
            "Failed full lists of a source; it goes on by itself.",
            "source",
        )
        self._source_duration = Histogram(
            "tidegate_discovery_duration_seconds",
            "How long a source took for a full list.",
            ("source",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
            registry=self.registry,
        )
        self._applied = Histogram(
            "tidegate_change_to_applied_seconds",
            "From hearing of a change to an instance's acknowledgement that it is in force.",
            ("kind",),
            buckets=APPLIED_BUCKETS,
            registry=self.registry,
        )
        self._pushes = self._counter(
            "tidegate_pushes_total",
            "Pushes to an instance, by kind and result.",
            "instance",
            "kind",
            "result",
        )
        self._reloads = self._counter(
            "tidegate_reloads_total",
            "Site pushes that made nginx reload, or that it refused.",
            "instance",
            "result",
        )
        self._settings_reloads = self._counter(
            "tidegate_settings_reloads_total",
            "Changes of the settings and rereadings by SIGHUP, by result.",
            "result",
        )
        self._settings_store = self._gauge(
            "tidegate_settings_store_up",
            "1 while the store that holds the settings can be read.",
        )
        self._loop_errors = self._counter(
            "tidegate_loop_errors_total",
            "Unexpected errors caught at a loop's guard: each is a defect.",
            "loop",
        )
        self.registry.register(_Views(self))
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def event(self, source: str, kind: str) -> None:
        """Count a change that `source` heard of; `kind` is from a closed set ("task", "kill")."""
        self._events.labels(source, kind).inc()

    def sync(self, source: str, *, ok: bool, seconds: float) -> None:
        """Note that `source` read its full list, or failed to, in `seconds`."""
        self._source_duration.labels(source).observe(seconds)
        if not ok:
            self._source_errors.labels(source).inc()

    def mode(self, source: str, mode: str) -> None:
        """Nothing to keep: the mode in use is asked for at a scrape, like all that is state."""

    def sources_from(self, sources: Callable[[], Iterable[SourceView]]) -> None:
        """Set where a scrape asks for how the sources stand."""
        self._sources = sources

    def applied(self, kind: str, seconds: float) -> None:
        """Note that a change ("membership" or "site") was in force after `seconds`."""
        self._applied.labels(kind).observe(seconds)

    def push(self, instance: str, kind: str, result: str) -> None:
        """Count a push; `kind` is delta, full or site, `result` ok or why not."""
        self._pushes.labels(instance, kind, result).inc()

    def reload(self, instance: str, result: str, seconds: float) -> None:
        """Count a reload (ok) or a site that nginx refused (refused), which took `seconds`."""
        self._reloads.labels(instance, result).inc()
        if result == "ok":
            self._last_reload = seconds

    def instances_from(self, instances: Callable[[], Iterable[InstanceSeries]]) -> None:
        """Set where a scrape asks for how the instances stand."""
        self._instances = instances

    def forget_instance(self, instance: str) -> None:
        """Drop the counters of an instance that is gone."""
        for metric in (self._pushes, self._reloads):
            for labels in _label_sets(metric):
                if labels[0] == instance:
                    metric.remove(*labels)

    def desired(self, membership: Membership) -> None:
        """Set the membership that `tidegate_peers` is computed from at a scrape."""
        self._membership = membership

    def rejections_from(self, rejections: Callable[[], Iterable[Rejection]]) -> None:
        """Set where a scrape asks for the rejections in force."""
        self._rejections = rejections

    def settings_reload(self, result: str) -> None:
        """Count a change of the settings, or a rereading that was asked for: ok or refused."""
        self._settings_reloads.labels(result).inc()

    def settings_store(self, *, connected: bool) -> None:
        """Note whether the store that holds the settings can be read."""
        self._settings_store.set(connected)

    def loop_error(self, loop: str) -> None:
        """Count an unexpected error that a loop's guard caught."""
        self._loop_errors.labels(loop).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def views(self) -> Iterator[Metric]:
        """The families that are computed at a scrape."""
        now = self._clock()
        success = GaugeMetricFamily(
            "tidegate_discovery_last_success_timestamp_seconds",
            "When a source last knew the present state (Unix time).",
            labels=["source"],
        )
        age = GaugeMetricFamily(
            "tidegate_snapshot_age_seconds",
            "Seconds since a source last knew the present state.",
            labels=["source"],
        )
        mode = GaugeMetricFamily(
            "tidegate_watch_mode",
            "How a source hears of changes; 1 for the mode in use.",
            labels=["source", "mode"],
        )
        for source in self._sources():
            mode.add_metric([source.name, source.mode], 1)
            if source.last_success:
                success.add_metric([source.name], source.last_success)
                age.add_metric([source.name], max(0.0, now - source.last_success))
        yield from (success, age, mode, *self._instance_families())
        yield from (self._peers(), self._rejected())
        yield from self._as_interlock_named_them(now)

    def _as_interlock_named_them(self, now: float) -> Iterator[Metric]:
        """What dashboards made for Interlock ask for; its names have no unit and no `_total`."""
        heard = sum(sample.value for family in self._events.collect() for sample in family.samples)
        values = (
            ("interlock_totals_events_processed", "Changes heard of, in all.", heard),
            ("interlock_totals_uptime", "Seconds since the start.", now - self._started),
            (
                "interlock_system_last_reload_duration",
                "Nanoseconds that the last reload of an OpenResty took.",
                self._last_reload * 1e9,
            ),
        )
        for name, text, value in values:
            family = Metric(name, text, "unknown")
            family.add_sample(name, {}, value)
            yield family

    def _instance_families(self) -> Iterator[GaugeMetricFamily]:
        revision = GaugeMetricFamily(
            "tidegate_instance_revision",
            "Revision of the membership that an instance holds.",
            labels=["instance"],
        )
        generation = GaugeMetricFamily(
            "tidegate_instance_generation_info",
            "Generation of the site that an instance runs; always 1.",
            labels=["instance", "generation"],
        )
        in_sync = GaugeMetricFamily(
            "tidegate_instance_in_sync",
            "1 while an instance holds exactly what it shall.",
            labels=["instance"],
        )
        seen = GaugeMetricFamily(
            "tidegate_instance_last_seen_timestamp_seconds",
            "When an instance last answered (Unix time).",
            labels=["instance"],
        )
        for item in {item.name: item for item in self._instances()}.values():
            in_sync.add_metric([item.name], item.in_sync)
            if item.last_seen:
                revision.add_metric([item.name], item.revision)
                generation.add_metric([item.name, item.generation], 1)
                seen.add_metric([item.name], item.last_seen)
        yield from (revision, generation, in_sync, seen)

    def _peers(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "tidegate_peers", "Peers by upstream and state.", labels=["upstream", "state"]
        )
        for name, upstream in self._membership.upstreams.items():
            draining = sum(peer.state is PeerState.DRAINING for peer in upstream.peers)
            family.add_metric([name, "up"], len(upstream.peers) - draining)
            family.add_metric([name, "draining"], draining)
        return family

    def _rejected(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "tidegate_rejections", "Rejections in force, by reason.", labels=["reason"]
        )
        for reason, number in sorted(Count(item.reason for item in self._rejections()).items()):
            family.add_metric([reason], number)
        return family


def _label_sets(metric: Counter | Gauge) -> set[tuple[str, ...]]:
    """The label values of all series of `metric`, in the order of its label names."""
    (family,) = metric.collect()
    return {tuple(sample.labels.values()) for sample in family.samples}


class _Views(Collector):
    """Hands the computed families to the registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Compute them; called at each scrape."""
        return self._metrics.views()

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry then does not collect when registering."""
        return ()
