"""A manager of a large Swarm: its engine API and its Watch, of any size, on two unix sockets.

Why simulated: no machine that runs tests has room for 100,000 tasks. What it answers is what a real
manager answered (tests/unit/fixtures/swarm), with ids, names, addresses and states put in. Tasks
change in transactions as SwarmKit makes them: a new one runs, the old one is told to shut down, it
has shut down, it is removed.
"""

from __future__ import annotations

import copy
import itertools
import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.discovery.cluster import TaskState
from agent.discovery.proto import watch_pb2 as pb
from tests.watch_manager import Manager

FIXTURES = Path(__file__).parents[1] / "unit" / "fixtures" / "swarm"
CREATE, UPDATE, REMOVE = 1, 2, 4
NODES = 10


def _recorded(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text())


class SimulatedSwarm:
    """Services `app00000` … of `tasks` tasks each, all routed as `app00000.test` … .

    Args:
        directory: where its sockets go: `docker.sock` and the manager's `control.sock`.
    """

    def __init__(self, directory: Path, *, services: int, tasks: int) -> None:
        self.services = services
        self.tasks = tasks
        self.manager = Manager(directory)
        self.docker_url = f"unix://{directory / 'docker.sock'}"
        self._lock = threading.Lock()
        self._version = 100
        self._numbers = itertools.count()
        self._running = {
            (service, slot): self._next_task()
            for service in range(services)
            for slot in range(tasks)
        }
        self._network = next(n for n in _recorded("networks") if n["Name"] == "edge")
        self._ended = threading.Event()
        self._server = _Server(str(directory / "docker.sock"), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """End both servers."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self.manager.stop()

    def settings(self) -> str:
        """What an agent's configuration says of this Swarm."""
        return (
            f'DockerURL = "{self.docker_url}"\nSources = ["swarm"]\n'
            f'Watch = "on"\nWatchSocket = "{self.manager.socket}"\n'
        )

    def peers(self, service: int) -> dict[str, str]:
        """The tasks of a service that run and shall: id to address."""
        with self._lock:
            numbers = [self._running[service, slot] for slot in range(self.tasks)]
        return {_task_id(number): _address(number) for number in numbers}

    def replace_task(self, service: int, slot: int) -> None:
        """One task of a rolling update with start-first, from the new one's start to the old one's
        removal: four transactions."""
        with self._lock:
            old, new = self._running[service, slot], self._next_task()
            self._running[service, slot] = new
        running, shutdown = TaskState.RUNNING, TaskState.SHUTDOWN
        self._say(CREATE, service, slot, new, state=running, desired=running)
        self._say(UPDATE, service, slot, old, state=running, desired=shutdown)
        self._say(UPDATE, service, slot, old, state=shutdown, desired=shutdown)
        self._say(REMOVE, service, slot, old, state=shutdown, desired=shutdown)

    def _say(
        self, action: int, service: int, slot: int, number: int, *, state: int, desired: int
    ) -> None:
        with self._lock:
            self._version += 1
            version = self._version
        network = pb.Network(
            id=self._network["Id"],
            meta=pb.Meta(version=pb.Version(index=17)),
            spec=pb.NetworkSpec(
                annotations=pb.Annotations(name="edge"), driver_config=pb.Driver(name="overlay")
            ),
        )
        task = pb.Task(
            id=_task_id(number),
            meta=pb.Meta(version=pb.Version(index=version)),
            service_id=_service_id(service),
            slot=slot + 1,
            node_id=f"node{number % NODES:022d}",
            status=pb.TaskStatus(state=state),
            desired_state=desired,
            networks=[pb.NetworkAttachment(network=network, addresses=[f"{_address(number)}/8"])],
        )
        self.manager.send((action, pb.Object(task=task)), version=version)

    def _next_task(self) -> int:
        return next(self._numbers)

    def answer(self, path: str) -> Iterator[bytes] | bytes | None:
        """The body that the engine answers `path` with; None where it has nothing there."""
        match path.split("/")[1:]:
            case ["version"]:
                return b'{"Version": "20.10.24", "ApiVersion": "1.41", "MinAPIVersion": "1.12"}'
            case ["info" | "networks" as name]:
                return json.dumps(_recorded(name)).encode()
            case ["swarm"]:
                swarm = _recorded("swarm")
                swarm["TLSInfo"]["TrustRoot"] = self.manager.root
                return json.dumps(swarm).encode()
            case ["nodes"]:
                return _listed(self._nodes())
            case ["services"]:
                return _listed(self._services())
            case ["tasks"]:
                return _listed(self._tasks())
            case ["events"]:
                return self._events()
        return None

    def _events(self) -> Iterator[bytes]:
        self._ended.wait()
        yield b""

    def _nodes(self) -> Iterator[Any]:
        (template, *_) = _recorded("nodes")
        for number in range(NODES):
            node = copy.deepcopy(template)
            node["ID"] = f"node{number:022d}"
            node["Description"]["Hostname"] = f"node{number}"
            node["Status"]["Addr"] = f"198.18.1.{number + 1}"
            yield node

    def _services(self) -> Iterator[Any]:
        template = _recorded("services")[0]
        for number in range(self.services):
            service = copy.deepcopy(template)
            service["ID"] = _service_id(number)
            service["Spec"]["Name"] = f"app{number:05d}"
            service["Spec"]["Mode"] = {"Replicated": {"Replicas": self.tasks}}
            service["Spec"]["TaskTemplate"]["Networks"] = [{"Target": self._network["Id"]}]
            service["Spec"]["Labels"] = {
                "interlock.hostname": f"app{number:05d}",
                "interlock.domain": "test",
                "interlock.port": "8080",
            }
            yield service

    def _tasks(self) -> Iterator[Any]:
        template = next(
            task
            for task in _recorded("tasks")
            if task["Status"]["State"] == "running" and task.get("NetworksAttachments")
        )
        with self._lock:
            running = list(self._running.items())
            version = self._version
        for (service, slot), number in running:
            task = copy.copy(template)
            task["ID"] = _task_id(number)
            task["ServiceID"] = _service_id(service)
            task["Slot"] = slot + 1
            task["NodeID"] = f"node{number % NODES:022d}"
            task["Version"] = {"Index": version}
            (attachment,) = (
                item
                for item in template["NetworksAttachments"]
                if item["Network"]["ID"] == self._network["Id"]
            )
            address = f"{_address(number)}/8"
            task["NetworksAttachments"] = [{**attachment, "Addresses": [address]}]
            yield task


def _task_id(number: int) -> str:
    return f"task{number:021d}"


def _service_id(number: int) -> str:
    return f"service{number:018d}"


def _address(number: int) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def _listed(items: Iterator[Any]) -> Iterator[bytes]:
    separator = "["
    for item in items:
        yield (separator + json.dumps(item)).encode()
        separator = ","
    yield b"[]" if separator == "[" else b"]"


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever hangs up is no error here."""


def _handler(swarm: SimulatedSwarm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = "/" + urlsplit(self.path).path.lstrip("/")
            if path.startswith("/v1."):
                path = "/" + path.split("/", 2)[2]
            body = swarm.answer(path)
            if body is None:
                body = b'{"message": "page not found"}'
                self._begin(404, len(body))
                self.wfile.write(body)
            elif isinstance(body, bytes):
                self._begin(200, len(body))
                self.wfile.write(body)
            else:
                self._begin(200, None)
                for block in _blocks(body):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
                self.wfile.write(b"0\r\n\r\n")

        def _begin(self, status: int, length: int | None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if length is None:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def address_string(self) -> str:
            return "agent"

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _blocks(chunks: Iterator[bytes]) -> Iterator[bytes]:
    block = bytearray()
    for chunk in chunks:
        block += chunk
        if len(block) > 60_000:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
