"""SwarmKit's Watch over gRPC: a server of our own on a unix socket, with a manager's TLS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agent.discovery.cluster import Change, Network, Node, Service, Task, TaskState
from agent.discovery.proto import watch_pb2 as pb
from agent.discovery.swarm_watch import opener
from agent.discovery.tls_relay import TlsRelay
from agent.errors import WatchCompacted, WatchUnavailable
from agent.model import PublishedPort
from tests.watch_manager import Manager, self_signed

ROOT = Path(__file__).parents[2]
OVERLAY = pb.Network(
    id="net",
    meta=pb.Meta(version=pb.Version(index=3)),
    spec=pb.NetworkSpec(
        annotations=pb.Annotations(name="edge"), driver_config=pb.Driver(name="overlay")
    ),
)


@pytest.fixture(name="manager")
def _manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.stop()


def test_it_asks_for_tasks_services_nodes_and_networks_from_now_on(manager: Manager) -> None:
    opener(manager.socket, timeout=5)(manager.root, 0).close()
    (request,) = manager.requests
    assert {entry.kind: entry.action for entry in request.entries} == {
        "task": 7,
        "service": 7,
        "node": 7,
        "network": 7,
    }
    assert not request.HasField("resume_from")


def test_a_transaction_becomes_changes_in_their_order(manager: Manager) -> None:
    watch = opener(manager.socket, timeout=5)(manager.root, 0)
    meta = pb.Meta(version=pb.Version(index=8), created_at=pb.Timestamp(seconds=5, nanos=500000000))
    port = pb.PortConfig(target_port=8080, published_port=18080, publish_mode=1)
    task = pb.Task(
        id="t1",
        meta=meta,
        service_id="s1",
        slot=2,
        node_id="n1",
        status=pb.TaskStatus(state=512, port_status=pb.PortStatus(ports=[port, port])),
        desired_state=640,
        networks=[pb.NetworkAttachment(network=OVERLAY, addresses=["10.0.1.7/24"])],
    )
    service = pb.Service(
        id="s1",
        meta=meta,
        spec=pb.ServiceSpec(
            annotations=pb.Annotations(name="web", labels={"a": "b"}),
            task=pb.TaskSpec(
                container=pb.ContainerSpec(labels={"c": "d"}),
                networks=[pb.NetworkAttachmentConfig(target="net")],
            ),
            replicated=pb.ReplicatedService(replicas=3),
            endpoint=pb.EndpointSpec(
                ports=[pb.PortConfig(target_port=80), pb.PortConfig(target_port=53, protocol=1)]
            ),
        ),
        endpoint=pb.Endpoint(virtual_ips=[pb.VirtualIP(network_id="net", addr="10.0.1.2/24")]),
    )
    node = pb.Node(
        id="n1",
        meta=meta,
        description=pb.NodeDescription(hostname="host1"),
        status=pb.NodeStatus(state=1, addr="0.0.0.0"),
    )
    manager.send(
        (2, pb.Object(service=service)),
        (1, pb.Object(task=task)),
        (2, pb.Object(node=node)),
        (4, pb.Object(task=task)),
        version=9,
    )
    transaction = watch.next(5)
    watch.close()
    assert transaction is not None
    assert transaction.version == 9
    record = Task(
        id="t1",
        version=8,
        service="s1",
        slot=2,
        node="n1",
        state=TaskState.RUNNING,
        desired=TaskState.SHUTDOWN,
        error="",
        addresses=(("net", "10.0.1.7"),),
        published=(PublishedPort(8080, 18080),),
    )
    network = Change("network", Network("net", 3, "edge", "overlay", ingress=False))
    expected = Service(
        "s1",
        8,
        "web",
        5.5,
        {"a": "b"},
        {"c": "d"},
        ("net",),
        (80,),
        3,
        job=False,
        vips=(("net", "10.0.1.2"),),
    )
    assert transaction.changes == (
        Change("service", expected),
        network,
        Change("task", record),
        Change("node", Node("n1", 8, "host1", "", down=True)),
        network,
        Change("task", record, removed=True),
    )


@pytest.mark.parametrize(
    ("spec", "replicas", "job"),
    [
        (pb.ServiceSpec(**{"global": pb.GlobalService()}), None, False),
        (pb.ServiceSpec(replicated=pb.ReplicatedService(replicas=0)), 0, False),
        (pb.ServiceSpec(), None, True),
    ],
)
def test_modes_of_a_service(
    manager: Manager, spec: pb.ServiceSpec, replicas: int | None, job: bool
) -> None:
    watch = opener(manager.socket, timeout=5)(manager.root, 0)
    manager.send((1, pb.Object(service=pb.Service(id="s1", spec=spec))))
    transaction = watch.next(5)
    watch.close()
    assert transaction is not None
    (change,) = transaction.changes
    assert isinstance(change.record, Service)
    assert (change.record.replicas, change.record.job) == (replicas, job)


def test_nothing_new_is_nothing(manager: Manager) -> None:
    watch = opener(manager.socket, timeout=5)(manager.root, 0)
    assert watch.next(0.01) is None
    watch.close()


def test_an_ended_stream_is_told_to_everybody_who_asks(manager: Manager) -> None:
    watch = opener(manager.socket, timeout=5)(manager.root, 0)
    manager.end()
    for _ in range(2):
        with pytest.raises(WatchUnavailable, match="ended the watch"):
            watch.next(5)
    watch.close()


def test_a_manager_that_dies_breaks_the_stream(manager: Manager) -> None:
    watch = opener(manager.socket, timeout=5)(manager.root, 0)
    manager.stop()
    with pytest.raises(WatchUnavailable):
        watch.next(5)
    watch.close()


def test_it_resumes_where_it_was(manager: Manager) -> None:
    opener(manager.socket, timeout=5)(manager.root, 77).close()
    assert manager.requests[0].resume_from.index == 77


def test_a_manager_that_forgot_the_version_says_so(manager: Manager) -> None:
    manager.compacted = True
    with pytest.raises(WatchCompacted, match="no longer available"):
        opener(manager.socket, timeout=5)(manager.root, 77)


def test_a_manager_that_does_not_confirm_is_not_waited_for_for_ever(manager: Manager) -> None:
    manager.silent.set()
    with pytest.raises(WatchUnavailable, match=r"did not confirm it within 0\.2 s"):
        opener(manager.socket, timeout=0.2)(manager.root, 0)


def test_a_certificate_of_another_ca_is_refused(manager: Manager, tmp_path: Path) -> None:
    other = self_signed(tmp_path / "other", "swarm-manager")
    with pytest.raises(WatchUnavailable, match="certificate is not the cluster's"):
        opener(manager.socket, timeout=5)(other, 0)
    assert manager.requests == []


def test_a_manager_that_renewed_its_certificate_is_watched_too(tmp_path: Path) -> None:
    manager = Manager(tmp_path, alpn=False)
    watch = opener(manager.socket, timeout=5)(manager.root, 0)
    manager.send((4, pb.Object(task=pb.Task(id="t1"))))
    transaction = watch.next(5)
    watch.close()
    manager.stop()
    assert transaction is not None
    assert [change.record.id for change in transaction.changes] == ["t1"]


def test_no_other_process_gets_to_the_manager_through_the_relay(manager: Manager) -> None:
    relay = TlsRelay(
        manager.socket, trust_root=manager.root, server_name="swarm-manager", timeout=5
    )
    name = relay.target.removeprefix("unix-abstract:")
    stranger = (
        "import socket\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.settimeout(5)\n"
        f"s.connect(chr(0) + {name!r})\n"
        "try:\n"
        "    s.sendall(b'PRI * HTTP/2.0')\n"
        "    print(s.recv(100))\n"
        "except (ConnectionResetError, BrokenPipeError):\n"
        "    print(b'')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stranger], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout.strip() == "b''", done.stderr
    with grpc.insecure_channel(relay.target) as channel:
        grpc.channel_ready_future(channel).result(timeout=5)
    relay.close()


def test_what_is_wrong_with_the_socket_is_said_plainly(tmp_path: Path) -> None:
    missing = str(tmp_path / "control.sock")
    with pytest.raises(WatchUnavailable, match=r"there is no socket .* mount"):
        opener(missing, timeout=5)("", 0)
    Path(missing).mkdir()
    with pytest.raises(WatchUnavailable, match="is no socket"):
        opener(missing, timeout=5)("", 0)


def test_the_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    source = "agent/discovery/proto/watch.proto"
    out = tmp_path / "descriptors"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={out}", source],
        cwd=ROOT,
        check=True,
    )
    from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

    (generated,) = FileDescriptorSet.FromString(out.read_bytes()).file
    committed = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    for file in (generated, committed):
        for message in file.message_type:
            _without_json_names(message)
    assert generated == committed


def _without_json_names(message: object) -> None:
    """Whether protoc writes the default JSON names down depends on how it is called."""
    for field in message.field:  # type: ignore[attr-defined]
        field.ClearField("json_name")
    for nested in message.nested_type:  # type: ignore[attr-defined]
        _without_json_names(nested)
