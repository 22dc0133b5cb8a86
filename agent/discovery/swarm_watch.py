"""SwarmKit's Watch: every change of the cluster's store, as one manager sees it.

The engine's REST API has no task events; the manager's own gRPC socket has. This module opens the
stream, turns what comes into `cluster`'s records and says why when it cannot. It knows nothing of
lists, and it calls nothing but `Watch`, although the socket could do far more.
"""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import grpc

from agent.discovery.cluster import Change, Kind, Network, Node, Record, Service, Task
from agent.discovery.proto import watch_pb2 as pb
from agent.discovery.swarm_rest import bare, host_ports, usable_address
from agent.discovery.tls_relay import TlsRelay
from agent.errors import WatchCompacted, WatchUnavailable
from agent.model import EMPTY

METHOD = "/docker.swarmkit.v1.Watch/Watch"
SERVER_NAME = "swarm-manager"
"""Name in the certificate of every manager."""

KINDS: tuple[Kind, ...] = ("task", "service", "node", "network")
_CREATE, _UPDATE, _REMOVE = 1, 2, 4
_NODE_DOWN = 1
_TCP, _HOST = 0, 1


@dataclass(frozen=True, slots=True)
class Transaction:
    """What one transaction of the manager's store has changed.

    Attributes:
        version: to resume from; 0 where the manager gave none.
        heard_at: monotonic time of its arrival.
    """

    changes: tuple[Change, ...]
    version: int
    heard_at: float


class Watch(Protocol):
    """An open stream: the manager has said that it stands."""

    def next(self, timeout: float) -> Transaction | None:
        """The next transaction, or None when none came within `timeout` seconds.

        Raises:
            WatchUnavailable: the stream broke.
        """

    def close(self) -> None:
        """End it, from any thread."""


OpenWatch = Callable[[str, int], Watch]
"""Open a stream with this trust root (PEM), resumed after this version (0: from now on).

Raises WatchUnavailable, or WatchCompacted when the manager cannot resume from there.
"""


class GrpcWatch:
    """A stream over the manager's socket.

    A thread of its own takes the messages in, so that none is late or lost while others are dealt
    with or lists are read.
    """

    def __init__(self, socket: str, *, trust_root: str, resume_from: int, timeout: float) -> None:
        """Open the stream and wait until it stands.

        Raises:
            WatchUnavailable: no socket, no permission, no answer, not the right certificate.
            WatchCompacted: the manager cannot resume from that version.
        """
        _look_at(socket)
        self._socket = socket
        self._messages: queue.SimpleQueue[tuple[float, pb.WatchMessage] | grpc.RpcError | None] = (
            queue.SimpleQueue()
        )
        self._relay = TlsRelay(
            socket, trust_root=trust_root, server_name=SERVER_NAME, timeout=timeout
        )
        self._channel = grpc.insecure_channel(
            self._relay.target,
            options=[
                ("grpc.default_authority", SERVER_NAME),
                ("grpc.max_receive_message_length", -1),
                ("grpc.enable_http_proxy", 0),
                # A new channel must really try anew, not share a broken connection.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        request = pb.WatchRequest(
            entries=[
                pb.WatchRequest.WatchEntry(kind=kind, action=_CREATE | _UPDATE | _REMOVE)
                for kind in KINDS
            ]
        )
        if resume_from:
            request.resume_from.index = resume_from
        self._call: Any = self._channel.unary_stream(
            METHOD,
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchMessage.FromString,
        )(request)
        threading.Thread(target=self._read, name="swarm-watch", daemon=True).start()
        try:
            self._await_first(timeout, resumed=bool(resume_from))
        except BaseException:
            self.close()
            raise

    def next(self, timeout: float) -> Transaction | None:
        """The next transaction, or None when none came in time."""
        item = self._take(timeout)
        if item is None:
            return None
        heard_at, message = item
        return Transaction(
            changes=tuple(_changes(message)), version=message.version.index, heard_at=heard_at
        )

    def close(self) -> None:
        """End the stream."""
        self._call.cancel()
        self._channel.close()
        self._relay.close()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._messages.put((time.monotonic(), message))
            self._messages.put(None)
        except grpc.RpcError as error:
            self._messages.put(error)

    def _await_first(self, timeout: float, *, resumed: bool) -> None:
        try:
            first = self._take(timeout)
        except WatchUnavailable as error:
            cause = error.__cause__
            refused = isinstance(cause, grpc.RpcError) and cause.code() not in _BROKEN
            if resumed and refused:
                raise WatchCompacted(f"the manager cannot resume: {error}") from cause
            raise
        if first is None:
            raise WatchUnavailable(
                f"SwarmKit's socket {self._socket} accepted the watch but did not confirm it "
                f"within {timeout:g} s"
            )

    def _take(self, timeout: float) -> tuple[float, pb.WatchMessage] | None:
        try:
            item = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, tuple):
            return item
        # Whoever asks again shall hear the same.
        self._messages.put(item)
        if item is None:
            raise WatchUnavailable("the manager ended the watch")
        raise WatchUnavailable(f"the watch at {self._socket} broke: {_details(item)}") from item


_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


def opener(socket: str, *, timeout: float) -> OpenWatch:
    """How streams over this socket are opened."""

    def open_watch(trust_root: str, resume_from: int) -> Watch:
        return GrpcWatch(socket, trust_root=trust_root, resume_from=resume_from, timeout=timeout)

    return open_watch


def _details(error: grpc.RpcError) -> str:
    return f"{error.details()} ({error.code().name.lower()})"


def _look_at(socket: str) -> None:
    """Say plainly what is wrong with the socket, which gRPC would not."""
    try:
        mode = os.stat(socket).st_mode
    except FileNotFoundError:
        raise WatchUnavailable(
            f"there is no socket {socket}; mount the manager's /var/run/docker/swarm there"
        ) from None
    except OSError as error:
        raise WatchUnavailable(f"{socket}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise WatchUnavailable(
            f"{socket} is no socket; a file mounted before dockerd made it looks like this: "
            "mount its directory instead"
        )


def _changes(message: pb.WatchMessage) -> Iterator[Change]:
    for event in message.events:
        removed = event.action == _REMOVE
        match event.object.WhichOneof("object"):
            case "task":
                task = event.object.task
                for attachment in task.networks:
                    yield Change("network", _network(attachment.network))
                yield _change("task", _task(task), removed=removed)
            case "service":
                yield _change("service", _service(event.object.service), removed=removed)
            case "node":
                yield _change("node", _node(event.object.node), removed=removed)
            case "network":
                yield _change("network", _network(event.object.network), removed=removed)


def _change(kind: Kind, record: Record, *, removed: bool) -> Change:
    return Change(kind, record, removed=removed)


def _task(task: pb.Task) -> Task:
    return Task(
        id=task.id,
        version=task.meta.version.index,
        service=sys.intern(task.service_id),
        slot=task.slot,
        node=sys.intern(task.node_id),
        state=task.status.state,
        desired=task.desired_state,
        error=task.status.err,
        addresses=tuple(
            (sys.intern(attachment.network.id), bare(address))
            for attachment in task.networks
            for address in attachment.addresses
        ),
        published=host_ports(
            (port.target_port, port.published_port)
            for port in task.status.port_status.ports
            if port.protocol == _TCP and port.publish_mode == _HOST and port.published_port
        ),
    )


def _service(service: pb.Service) -> Service:
    spec = service.spec
    created = service.meta.created_at
    mode = spec.WhichOneof("mode")
    attached = spec.task.networks or spec.networks
    return Service(
        id=service.id,
        version=service.meta.version.index,
        name=spec.annotations.name,
        created=created.seconds + created.nanos // 1000 / 1e6,
        labels=_labels(spec.annotations.labels),
        template_labels=_labels(spec.task.container.labels),
        targets=tuple(dict.fromkeys(item.target for item in attached if item.target)),
        ports=tuple(
            sorted({port.target_port for port in spec.endpoint.ports if port.protocol == _TCP})
        ),
        replicas=spec.replicated.replicas if mode == "replicated" else None,
        job=mode is None,
        vips=tuple(
            (sys.intern(item.network_id), bare(item.addr))
            for item in service.endpoint.virtual_ips
            if item.addr
        ),
    )


def _node(node: pb.Node) -> Node:
    return Node(
        id=sys.intern(node.id),
        version=node.meta.version.index,
        hostname=node.description.hostname,
        address=usable_address(node.status.addr),
        down=node.status.state == _NODE_DOWN,
    )


def _network(network: pb.Network) -> Network:
    return Network(
        id=sys.intern(network.id),
        version=network.meta.version.index,
        name=sys.intern(network.spec.annotations.name),
        driver=network.spec.driver_config.name,
        ingress=network.spec.ingress,
    )


def _labels(raw: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(raw)) if raw else EMPTY
