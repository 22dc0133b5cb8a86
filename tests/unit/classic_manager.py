"""A classic Swarm's manager over HTTP: answers as one was recorded, and fails as it is told to."""

from __future__ import annotations

import copy
import json
import queue
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.unit.discovery_fakes import FIXTURES, recorded

END = None


def recorded_events(name: str) -> list[dict[str, Any]]:
    """The events of a recorded stream, which has nothing between them."""
    text, events = (FIXTURES / f"classic-swarm/{name}.ndjson").read_text(), []
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        one, end = decoder.raw_decode(text)
        events.append(one)
        text = text[end:]
    return events


def event(action: str, name: str = "web1", **attributes: str) -> dict[str, Any]:
    """A recorded event of a container, made to say something else."""
    found = next(
        copy.deepcopy(item)
        for item in recorded_events("events")
        if item["Type"] == "container" and item["Actor"]["Attributes"]["name"] == name
    )
    found |= {"Action": action, "status": action}
    found["Actor"]["Attributes"] |= attributes
    return found


class ClassicManager:
    """The manager. `answers` by path may be changed at will; what `delays` names waits for it."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "/version": recorded("classic-swarm/version"),
            "/networks": recorded("classic-swarm/networks"),
        }
        self.shows("containers", "info")
        inspected = recorded("classic-swarm/container-1")
        self.answers[f"/containers/{inspected['Id']}/json"] = inspected
        self.delays: dict[str, threading.Event] = {}
        self.requests: list[str] = []
        self.streams: list[queue.SimpleQueue[bytes | None]] = []
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def shows(self, containers: str, info: str) -> None:
        """List and nodes are those of these recordings."""
        self.answers["/containers/json"] = recorded(f"classic-swarm/{containers}")
        self.answers["/info"] = recorded(f"classic-swarm/{info}")

    def line(self, name: str) -> dict[str, Any]:
        """A container of the list by its name, to be changed in place."""
        listed = self.answers["/containers/json"]
        found: dict[str, Any] = next(raw for raw in listed if raw["Names"][0].endswith(f"/{name}"))
        return found

    def forgets(self, node: str, *, status: str) -> None:
        """As after a start: nothing of that node is listed, and it is there with that status."""
        listed = self.answers["/containers/json"]
        self.answers["/containers/json"] = [
            raw for raw in listed if not raw["Names"][0].startswith(f"/{node}/")
        ]
        pairs = self.answers["/info"]["SystemStatus"]
        at = pairs.index(next(pair for pair in pairs if pair[0] == f" {node}"))
        pairs[at][0] = " (unknown)"
        pairs[at + 2][1] = status
        pairs[at + 3][1] = "0"

    def say(self, *events: dict[str, Any]) -> None:
        """Events, in one piece and without anything between them."""
        self.send("".join(json.dumps(event) for event in events).encode())

    def send(self, raw: bytes) -> None:
        """A piece of the event stream, whatever it is."""
        self.streams[-1].put(raw)

    def cut(self) -> None:
        """End the event stream."""
        self.streams[-1].put(END)

    @contextmanager
    def hanging(self, *paths: str) -> Iterator[None]:
        """As long as the block lasts there is no answer to these."""
        gates = {path: threading.Event() for path in paths}
        self.delays |= gates
        try:
            yield
        finally:
            for path, gate in gates.items():
                del self.delays[path]
                gate.set()

    def start(self) -> None:
        """Listen, at the same port as before."""
        manager = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                return

            def setup(self) -> None:
                super().setup()
                manager._open.add(self.connection)

            def do_GET(self) -> None:
                manager.requests.append(self.path)
                url = urlsplit(self.path)
                path = re.sub(r"^/v[\d.]+", "", url.path)
                if gate := manager.delays.get(path):
                    gate.wait(30)
                if path == "/events":
                    return self._stream()
                if path not in manager.answers:
                    return self._say(404, b"404 page not found")
                answer = manager.answers[path]
                if path == "/containers/json" and parse_qs(url.query).get("all") != ["1"]:
                    answer = [raw for raw in answer if raw["State"] == "running"]
                return self._say(200, json.dumps(answer).encode())

            def _say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.flush()
                pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
                manager.streams.append(pieces)
                while (piece := pieces.get()) is not END:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                # Without the last chunk, as when the process ends.
                self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                return

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """End as a killed process does: every connection breaks."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for pieces in self.streams:
            pieces.put(END)
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._open.clear()
