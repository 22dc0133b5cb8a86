"""The agent's HTTP listener: metrics, health and the status API. Read-only, and only GET and HEAD.

Why the standard library: four small pages for a scraper and an operator need no framework. This
module must not reach into the loop; it shows what a `Pages` gives it.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from agent.errors import SettingsError

log = logging.getLogger(__name__)

REQUEST_TIMEOUT = 10.0
"""Seconds a client may take to send its request, or stay silent between two."""

LOOK_INTERVAL = 1.0
"""Seconds between looks whether to end; who ends it does not wait for one."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    status: int
    content_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]
"""Path to the function that makes its answer."""


def as_json(value: object, *, status: int = 200) -> Page:
    """A JSON answer, indented for people."""
    body = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    return Page(status, "application/json; charset=utf-8", body)


def parse_listen(text: str) -> tuple[str, int]:
    """ListenAddr in Go's way, as Interlock had it: ":8080", "127.0.0.1:8080", "[::1]:8080".

    Returns:
        Host (empty for every address) and port.

    Raises:
        SettingsError: it is none.
    """
    host, colon, port = text.strip().rpartition(":")
    if not colon:
        host, port = "", text.strip()
    if not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise SettingsError(f'ListenAddr: got "{text}", expected something like ":8080"')
    return host.strip("[]"), int(port)


class Listener:
    """Serves the pages from threads of its own.

    Args:
        listen: as in ListenAddr; port 0 takes a free one.
        pages: what to serve.

    Raises:
        SettingsError: the address cannot be bound.
    """

    def __init__(self, listen: str, pages: Pages) -> None:
        host, port = parse_listen(listen)
        try:
            self._server = _Server(host, port, pages)
        except (OSError, TypeError) as error:  # the latter for what cannot be a host's name
            why = getattr(error, "strerror", None) or str(error)
            raise SettingsError(
                f'ListenAddr: "{listen}" cannot be listened on: {why}; '
                "is another agent running? Set another ListenAddr."
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(LOOK_INTERVAL,), daemon=True, name="http"
        )

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and close the socket."""
        if self._thread.is_alive():
            with suppress(OSError):
                # Else it looks only after its interval whether it is to end.
                self._server.socket.shutdown(socket.SHUT_RDWR)
            self._server.shutdown()
            self._thread.join(5)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self.pages = pages
        if (not host and socket.has_dualstack_ipv6()) or ":" in host:
            self.address_family = socket.AF_INET6
        self._dual_stack = not host
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6 and self._dual_stack:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's own: that one asks the resolver for our name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "tidegate", int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection has ended with an error; the library would print a traceback."""
        error = sys.exception()
        if isinstance(error, OSError):
            log.debug("%s has gone away: %s", client_address, error)
        else:
            log.error("connection of %s: unexpected", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "tidegate"
    sys_version = ""
    timeout = REQUEST_TIMEOUT
    server: _Server

    def do_GET(self) -> None:
        self._answer(self._page())

    def do_HEAD(self) -> None:
        self._answer(self._page())

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Every other method is answered alike."""
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def _page(self) -> Page:
        path = self.path.partition("?")[0]
        make = self.server.pages.get(path)
        if make is None:
            known = sorted(self.server.pages)
            return as_json(
                {"error": "not_found", "message": f"no {path} here", "paths": known}, status=404
            )
        try:
            return make()
        except Exception:
            log.exception("%s failed", path)
            return as_json({"error": "internal", "message": "see the agent's log"}, status=500)

    def _refuse(self) -> None:
        # What the body would be is not read, so the connection cannot be used again.
        self.close_connection = True
        self._answer(
            as_json({"error": "method_not_allowed", "message": "GET and HEAD only"}, status=405),
            ("Allow", "GET, HEAD"),
            ("Connection", "close"),
        )

    def _answer(self, page: Page, *headers: tuple[str, str]) -> None:
        self.send_response(page.status, HTTPStatus(page.status).phrase)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        log.debug("%s %s", self.address_string(), format % args)
