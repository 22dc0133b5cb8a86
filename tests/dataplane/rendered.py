"""Sites as the agent renders them, for a proxy of the tests. Nothing here asserts anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

from agent.config.settings import Extension, Settings
from agent.model import Host, Location, Site
from agent.render import Capabilities, render
from tests.dataplane.harness import Answer, Proxy

A = "a.test/"


def host(*locations: Location, name: str = "a.test", **more: object) -> Host:
    """A host; without locations all of it goes to upstream `a.test/`."""
    return Host(
        name,
        more.pop("aliases", ()),  # type: ignore[arg-type]
        locations or (Location("/", A),),
        **more,  # type: ignore[arg-type]
    )


def push(proxy: Proxy, site: Site, **extension: object) -> Answer:
    """Renders the site for this proxy and its nginx, and pushes it."""
    version = proxy.admin.status()["nginx_version"]
    given = {"port": proxy.http_port, "ssl_port": 0, **extension}
    settings = Settings(extensions=(Extension.model_validate(given, by_name=True),))
    return proxy.admin.site(render(site, settings, Capabilities(nginx_version=version)))


def make_certificate(directory: Path, *names: str) -> tuple[str, str]:
    """A self-signed certificate for these names; paths of it and of its key."""
    certificate, key = directory / f"{names[0]}.pem", directory / f"{names[0]}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=tidegate"]
    command += ["-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return str(certificate), str(key)
