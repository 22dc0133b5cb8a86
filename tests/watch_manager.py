"""SwarmKit's Watch over gRPC, as a manager serves it: on a unix socket, with a manager's TLS."""

from __future__ import annotations

import queue
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import suppress
from pathlib import Path

import grpc

from agent.discovery.proto import watch_pb2 as pb
from agent.discovery.swarm_watch import METHOD

_Messages = queue.SimpleQueue["pb.WatchMessage | None"]


class Manager:
    """The Watch service of a manager, as far as a client can tell."""

    def __init__(self, directory: Path, *, alpn: bool = True) -> None:
        self.socket = str(directory / "control.sock")
        self.requests: list[pb.WatchRequest] = []
        self.compacted = False
        self.silent = threading.Event()
        self._lock = threading.Lock()
        self._streams: list[_Messages] = []
        self._said: list[pb.WatchMessage | None] = []
        self.root = self_signed(directory, "swarm-manager")
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((_Handlers(self._watch),))
        if alpn:
            pair = ((directory / "key.pem").read_bytes(), self.root.encode())
            credentials = grpc.ssl_server_credentials([pair])
            self._server.add_secure_port(f"unix:{self.socket}", credentials)
        else:
            plain = str(directory / "plain.sock")
            self._server.add_insecure_port(f"unix:{plain}")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.socket)
            listener.listen()
            threading.Thread(
                target=_terminate_tls, args=(directory, listener, plain), daemon=True
            ).start()
        self._server.start()

    def send(self, *events: tuple[int, pb.Object], version: int = 0) -> None:
        items = [pb.WatchMessage.Event(action=action, object=o) for action, o in events]
        self._say(pb.WatchMessage(events=items, version=pb.Version(index=version)))

    def end(self) -> None:
        self._say(None)

    def _say(self, message: pb.WatchMessage | None) -> None:
        """Tell all streams, or the first one that is opened."""
        with self._lock:
            if not self._streams:
                self._said.append(message)
            for stream in self._streams:
                stream.put(message)

    def stop(self) -> None:
        self.end()
        self._server.stop(0).wait()

    def _watch(
        self, request: pb.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchMessage]:
        self.requests.append(request)
        if self.compacted and request.resume_from.index:
            context.abort(grpc.StatusCode.UNKNOWN, "changes are no longer available")
        messages: _Messages = queue.SimpleQueue()
        context.add_callback(lambda: messages.put(None))
        with self._lock:
            self._streams.append(messages)
            said, self._said = self._said, []
        for message in said:
            messages.put(message)
        try:
            if self.silent.is_set():
                messages.get()
                return
            yield pb.WatchMessage()
            while (item := messages.get()) is not None:
                yield item
        finally:
            with self._lock:
                self._streams.remove(messages)


def _terminate_tls(directory: Path, listener: socket.socket, plain: str) -> None:
    """What a manager is that has renewed its certificate: TLS without a word about HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    with listener:
        outside = context.wrap_socket(listener.accept()[0], server_side=True)
    assert outside.selected_alpn_protocol() is None
    outside.setblocking(False)
    inside = socket.socket(socket.AF_UNIX)
    inside.connect(plain)
    with outside, inside:
        while True:
            select.select([outside, inside], [], [])
            inside.setblocking(False)
            for source, sink in ((outside, inside), (inside, outside)):
                with suppress(ssl.SSLWantReadError, BlockingIOError):
                    while True:
                        data = source.recv(65536)
                        if not data:
                            return
                        sink.sendall(data)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, watch: object) -> None:
        self._watch = watch

    def service(self, details: grpc.HandlerCallDetails) -> object:
        if details.method != METHOD:
            return None
        return grpc.unary_stream_rpc_method_handler(
            self._watch,
            request_deserializer=pb.WatchRequest.FromString,
            response_serializer=pb.WatchMessage.SerializeToString,
        )


def self_signed(directory: Path, name: str) -> str:
    directory.mkdir(exist_ok=True)
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -batch"
        f" -subj /CN={name} -addext subjectAltName=DNS:{name} -keyout key.pem -out cert.pem"
    )
    subprocess.run(
        command.split(),
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return (directory / "cert.pem").read_text()
