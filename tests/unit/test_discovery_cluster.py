"""From a Swarm's objects to workloads: what is up, what drains, what stays the same."""

from __future__ import annotations

import pytest

from agent.discovery.cluster import Change, Cluster, Listing, Network, Node, TaskState
from agent.discovery.swarm_rest import list_all, timestamp
from agent.model import (
    Attachment,
    InstanceState,
    PublishedPort,
    SourceSnapshot,
    Workload,
    WorkloadKey,
)
from tests.unit.discovery_fakes import make_service, make_task, named, only, swarm_engine

NET = Network("net", 1, "net", "overlay", ingress=False)
NODES = tuple(Node(f"n{i}", 1, f"host{i}", f"198.18.0.{i}", down=False) for i in (1, 2))


def a_cluster(*, proxy_service: str = "") -> Cluster:
    return Cluster(source="swarm", proxy_service=proxy_service, admin_port=8081)


def shown(cluster: Cluster) -> SourceSnapshot:
    snapshot = cluster.snapshot(changed_at=0.0)
    assert snapshot is not None
    return snapshot


def recorded_snapshot(*, proxy_service: str = "") -> SourceSnapshot:
    cluster = a_cluster(proxy_service=proxy_service)
    cluster.load(list_all(swarm_engine()))
    return shown(cluster)


def workload(snapshot: SourceSnapshot, name: str) -> Workload:
    found = named(snapshot, name)
    assert found is not None, f"no workload {name}"
    return found


def loaded(*tasks: object, services: tuple[object, ...] = (), **fields: object) -> Cluster:
    cluster = a_cluster()
    cluster.load(listing(*tasks, services=services or (make_service("web", **fields),)))
    return cluster


def listing(*tasks: object, services: tuple[object, ...]) -> Listing:
    return Listing(services=services, tasks=tasks, nodes=NODES, networks=(NET,))  # type: ignore[arg-type]


class TestTheRecordedSwarm:
    def test_virtual_ips_are_those_of_networks_that_can_be_shared(self) -> None:
        snapshot = recorded_snapshot()
        assert workload(snapshot, "meshed").vips == (Attachment("edge", "198.19.1.11"),)
        assert workload(snapshot, "onhost").vips == ()
        assert workload(snapshot, "hostmode").vips == ()

    def test_a_replicated_service_on_two_networks(self) -> None:
        web = workload(recorded_snapshot(), "shop_web")
        assert web.labels["interlock.hostname"] == "shop"
        assert web.template_labels == {"interlock.port": "8080"}
        assert web.networks == ("back", "edge")
        assert web.stack == "shop"
        assert web.wanted == 3
        assert not web.host_ports_only
        assert web.created == pytest.approx(1795362216.902778)
        assert web.vips == (Attachment("back", "198.19.2.2"), Attachment("edge", "198.19.1.2"))
        assert [i.name for i in web.instances] == ["shop_web.1", "shop_web.2", "shop_web.3"]
        first = web.instances[0]
        assert first.state is InstanceState.UP
        assert (first.node, first.node_address) == ("node2", "198.18.0.12")
        assert first.attachments == (
            Attachment("back", "198.19.2.3"),
            Attachment("edge", "198.19.1.3"),
        )

    def test_a_global_service_is_named_by_node_and_wants_one_on_each(self) -> None:
        agents = workload(recorded_snapshot(), "agents")
        assert [i.name for i in agents.instances] == ["agents.node1", "agents.node2"]
        assert agents.wanted == 2

    def test_host_mode_ports_are_told_once_though_the_engine_lists_them_twice(self) -> None:
        hostmode = workload(recorded_snapshot(), "hostmode")
        assert hostmode.host_ports_only
        assert hostmode.networks == ()
        assert only(hostmode).published == (PublishedPort(8080, 18080),)
        assert only(hostmode).node_address == "198.18.0.11"

    def test_a_mesh_port_is_declared_and_its_ingress_address_is_no_way_in(self) -> None:
        meshed = workload(recorded_snapshot(), "meshed")
        assert meshed.ports == (8080,)
        assert only(meshed).published == ()
        assert [a.network for a in only(meshed).attachments] == ["edge"]
        assert meshed.networks == ("edge",)

    def test_on_the_host_network_every_port_is_the_nodes(self) -> None:
        onhost = workload(recorded_snapshot(), "onhost")
        assert onhost.host_ports_only
        assert onhost.networks == ()
        assert only(onhost).host_network
        assert only(onhost).node_address == "198.18.0.12"

    def test_a_service_that_never_starts_shows_its_last_failure(self) -> None:
        broken = workload(recorded_snapshot(), "broken")
        gone = [i for i in broken.instances if i.state is InstanceState.GONE]
        waiting = [i for i in broken.instances if i.state is InstanceState.WAITING]
        assert len(gone) == 1
        assert 'exec: "/nonexistent"' in gone[0].detail
        assert [i.detail for i in waiting] == ["the task is ready"]

    def test_zero_replicas_is_a_service_without_instances(self) -> None:
        zero = workload(recorded_snapshot(), "zero")
        assert (zero.instances, zero.wanted) == ((), 0)

    def test_jobs_are_no_services(self) -> None:
        assert named(recorded_snapshot(), "job") is None

    def test_openresty_is_known_by_its_label_or_by_name(self) -> None:
        snapshot = recorded_snapshot()
        assert [proxy.name for proxy in snapshot.proxies] == ["proxy.1"]
        assert snapshot.proxies[0].attachments == (Attachment("edge", "198.19.1.19"),)
        assert snapshot.proxy_networks == ("edge",)
        both = recorded_snapshot(proxy_service="shop_web")
        assert {proxy.name for proxy in both.proxies} == {
            "proxy.1",
            "shop_web.1",
            "shop_web.2",
            "shop_web.3",
        }
        assert both.proxy_networks == ("back", "edge")

    def test_openresty_on_the_host_network_is_reached_at_the_admin_port(self) -> None:
        snapshot = recorded_snapshot(proxy_service="onhost")
        proxy = next(p for p in snapshot.proxies if p.name == "onhost.1")
        assert proxy.published == (PublishedPort(8081, 8081),)
        assert proxy.node_address == "198.18.0.12"


@pytest.mark.parametrize(
    ("state", "desired", "expected", "why"),
    [
        (TaskState.RUNNING, TaskState.RUNNING, InstanceState.UP, ""),
        (TaskState.RUNNING, TaskState.SHUTDOWN, InstanceState.DRAINING, "shutdown"),
        (TaskState.RUNNING, TaskState.REMOVE, InstanceState.DRAINING, "remove"),
        (TaskState.STARTING, TaskState.RUNNING, InstanceState.WAITING, "starting"),
        (TaskState.READY, TaskState.READY, InstanceState.WAITING, "ready"),
        (TaskState.PENDING, TaskState.RUNNING, InstanceState.WAITING, "no suitable node"),
        (TaskState.STARTING, TaskState.SHUTDOWN, InstanceState.GONE, "before it ran"),
        (TaskState.FAILED, TaskState.RUNNING, InstanceState.GONE, "no suitable node"),
        (5000, TaskState.RUNNING, InstanceState.GONE, "no suitable node"),
    ],
)
def test_traffic_follows_state_and_desired_state(
    state: int, desired: int, expected: InstanceState, why: str
) -> None:
    error = "no suitable node" if "node" in why else ""
    task = make_task("t1", "web", state=state, desired=desired, error=error)
    instance = only(workload(shown(loaded(task)), "web"))
    assert instance.state is expected
    assert why in instance.detail


def test_tasks_of_a_lost_node_are_gone_and_back_with_it() -> None:
    cluster = loaded(make_task("t1", "web"))
    assert only(workload(shown(cluster), "web")).state is InstanceState.UP
    cluster.apply([Change("node", Node("n1", 2, "host1", "198.18.0.1", down=True))])
    lost = only(workload(shown(cluster), "web"))
    assert (lost.state, lost.detail) == (InstanceState.GONE, "node host1 is down")
    cluster.apply([Change("node", Node("n1", 3, "host1", "198.18.0.1", down=False))])
    assert only(workload(shown(cluster), "web")).state is InstanceState.UP


def test_a_stopping_task_keeps_the_ports_that_the_engine_withdraws_before_it_stops() -> None:
    port = PublishedPort(8080, 18080)
    cluster = loaded(make_task("t1", "web", published=(port,)))
    cluster.apply([Change("task", make_task("t1", "web", 2, desired=TaskState.SHUTDOWN))])
    instance = only(workload(shown(cluster), "web"))
    assert (instance.state, instance.published) == (InstanceState.DRAINING, (port,))


def test_a_network_counts_for_openresty_when_all_its_tasks_are_on_it() -> None:
    cluster = loaded(
        make_task("t1", "web", addresses=(("net", "10.0.0.1"),)),
        targets=("net", "extra"),
        labels={"interlock.ext.name": "nginx"},
    )
    cluster.apply([Change("network", Network("extra", 1, "extra", "overlay", ingress=False))])
    assert shown(cluster).proxy_networks == ("net",)
    moved = make_task("t2", "web", addresses=(("net", "10.0.0.2"), ("extra", "10.1.0.2")))
    gone = make_task("t1", "web", 2, state=TaskState.SHUTDOWN, desired=TaskState.SHUTDOWN)
    cluster.apply([Change("task", moved), Change("task", gone)])
    assert shown(cluster).proxy_networks == ("extra", "net")


def test_a_nodes_address_stays_known_when_an_event_has_none() -> None:
    cluster = loaded(make_task("t1", "web"))
    cluster.apply([Change("node", Node("n1", 2, "renamed", "", down=False))])
    instance = only(workload(shown(cluster), "web"))
    assert (instance.node, instance.node_address) == ("renamed", "198.18.0.1")


def test_a_global_service_in_an_update_wants_one_per_node_not_one_per_task() -> None:
    old = make_task("t1", "web", slot=0, node="n1")
    new = make_task("t2", "web", slot=0, node="n1", desired=TaskState.READY, state=TaskState.NEW)
    other = make_task("t3", "web", slot=0, node="n2")
    assert workload(shown(loaded(old, new, other, replicas=None)), "web").wanted == 2


def test_a_network_may_be_named_by_its_name() -> None:
    assert workload(shown(loaded(targets=("net",))), "web").networks == ("net",)


def test_a_network_that_is_not_known_yet_does_not_make_a_service_host_ports_only() -> None:
    cluster = loaded(targets=("unheard-of",))
    assert not workload(shown(cluster), "web").host_ports_only
    late = Network("unheard-of", 9, "late", "overlay", ingress=False)
    cluster.apply([Change("network", late)])
    assert workload(shown(cluster), "web").networks == ("late",)


class TestVersions:
    def test_an_older_version_is_dropped(self) -> None:
        cluster = loaded(make_task("t1", "web", version=10, desired=TaskState.SHUTDOWN))
        shown(cluster)
        cluster.apply([Change("task", make_task("t1", "web", version=9))])
        assert cluster.snapshot(changed_at=0.0) is None

    def test_an_event_of_a_task_that_the_list_no_longer_had_brings_nothing_back(self) -> None:
        # It was removed before the list was made; the stream is behind.
        cluster = loaded(make_task("t2", "web", version=20))
        cluster.apply([Change("task", make_task("t1", "web", version=15))])
        assert only(workload(shown(cluster), "web")).id == "t2"

    def test_a_new_task_after_the_list_is_taken_in(self) -> None:
        cluster = loaded(make_task("t2", "web", version=20))
        cluster.apply([Change("task", make_task("t3", "web", version=21, slot=2))])
        assert [i.id for i in workload(shown(cluster), "web").instances] == ["t2", "t3"]

    def test_a_removal_is_final_whatever_its_version(self) -> None:
        cluster = loaded(make_task("t1", "web", version=20))
        cluster.apply([Change("task", make_task("t1", "web", version=3), removed=True)])
        assert workload(shown(cluster), "web").instances == ()

    def test_a_list_does_not_undo_what_is_newer(self) -> None:
        cluster = loaded(make_task("t1", "web", version=10))
        draining = make_task("t1", "web", version=12, desired=TaskState.SHUTDOWN)
        cluster.apply([Change("task", draining)])
        cluster.load(listing(make_task("t1", "web", version=10), services=(make_service("web"),)))
        assert only(workload(shown(cluster), "web")).state is InstanceState.DRAINING

    def test_what_a_list_has_no_more_is_gone(self) -> None:
        cluster = loaded(make_task("t1", "web", version=10))
        cluster.load(listing(services=(make_service("api", version=30),)))
        snapshot = shown(cluster)
        assert [w.name for w in snapshot.workloads.values()] == ["api"]

    def test_a_careful_list_that_is_older_takes_nothing_away(self) -> None:
        cluster = loaded(make_task("t1", "web", version=10))
        short = listing(services=(make_service("web"),))
        assert cluster.load(short, careful=True)
        assert only(workload(shown(cluster), "web")).id == "t1"
        cluster.reset(short)
        assert workload(shown(cluster), "web").instances == ()

    def test_a_reset_keeps_the_objects_that_did_not_change(self) -> None:
        tasks, services = (make_task("t1", "web"),), (make_service("web"), make_service("api"))
        cluster = a_cluster()
        cluster.load(listing(*tasks, services=services))
        before = shown(cluster)
        cluster.reset(listing(*tasks, services=(make_service("web"),)))
        after = shown(cluster)
        assert named(after, "web") is named(before, "web")
        assert named(after, "api") is None


class TestSharing:
    def test_unchanged_workloads_are_the_same_objects(self) -> None:
        cluster = a_cluster()
        services = (make_service("web"), make_service("api"))
        cluster.load(listing(make_task("t1", "web"), make_task("t2", "api"), services=services))
        before = shown(cluster)
        cluster.apply([Change("task", make_task("t1", "web", version=2, state=TaskState.FAILED))])
        after = shown(cluster)
        assert named(after, "api") is named(before, "api")
        assert named(after, "web") is not named(before, "web")
        assert workload(before, "web").instances, "a published snapshot never changes"

    def test_a_change_without_consequence_publishes_nothing(self) -> None:
        cluster = loaded(make_task("t1", "web"))
        shown(cluster)
        cluster.apply(
            [
                Change("task", make_task("t1", "web", version=2)),
                Change("service", make_service("web", version=2)),
                Change("node", Node("n1", 2, "host1", "198.18.0.1", down=False)),
            ]
        )
        assert cluster.snapshot(changed_at=0.0) is None

    def test_an_empty_swarm_is_published_too(self) -> None:
        cluster = a_cluster()
        cluster.load(Listing(services=(), tasks=(), nodes=NODES, networks=()))
        assert shown(cluster).workloads == {}
        assert cluster.snapshot(changed_at=0.0) is None

    def test_one_task_of_a_thousand_touches_its_own_service_alone(self) -> None:
        services = tuple(make_service(f"s{i}") for i in range(100))
        tasks = tuple(
            make_task(f"t{i}-{n}", f"s{i}", slot=n) for i in range(100) for n in range(1, 11)
        )
        cluster = a_cluster()
        cluster.load(listing(*tasks, services=services))
        before = last = shown(cluster)
        for version in range(2, 202):
            desired = TaskState.RUNNING if version % 2 else TaskState.SHUTDOWN
            changed = make_task("t7-3", "s7", slot=3, version=version, desired=desired)
            cluster.apply([Change("task", changed)])
            last = cluster.snapshot(changed_at=0.0) or last
        kept = {k for k, w in last.workloads.items() if w is before.workloads[k]}
        assert last.workloads.keys() - kept == {WorkloadKey("swarm", "s7")}


def test_times_of_the_engine_have_nanoseconds() -> None:
    assert timestamp("2026-11-22T15:43:37.821760276Z") == pytest.approx(1795362217.82176)
    assert timestamp("") == 0.0
