"""Every file of examples/ on a real Swarm: deployed as its head says, and requested with curl.

All stacks are deployed at once and looked at one by one. What `tidegate lint` says of each is
compared with what the agent then really routes, and what it reads with what Docker made of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent import composefile
from agent.composefile import Kind
from agent.config.settings import Settings
from agent.lint import lint
from tests.lab import Lab, Node
from tests.lab.builder import APP, NGINX_BASE
from tests.swarm.pair import ROOT, SETTLE, Pair

pytestmark = pytest.mark.timeout(300)

BACKEND = "tidegate-test/backend"
ENV = {"APP_IMAGE": APP, "APP_PORT": "8080", "BACKEND_IMAGE": BACKEND}
STACKS = {
    "app": "app.yml",
    "interlock": "interlock/stack.yml",
    "interlock2": "interlock2/stack.yml",
    "plain": "tls/plain.yml",
    "termination": "tls/termination.yml",
    "both-legs": "tls/both-legs.yml",
}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def request(self) -> dict[str, Any]:
        """What the test app says that it was asked."""
        found: dict[str, Any] = json.loads(self.text)
        return found


@dataclass
class Examples:
    """The pair with the examples deployed beside it."""

    pair: Pair
    directory: Path
    nodes: list[Node] = field(default_factory=list)

    @property
    def certificates(self) -> Path:
        return self.directory / "examples/tls/certs"

    def curl(self, url: str, *options: str | Path, node: Node | None = None) -> Answer | int:
        """The answer to one request as a client sees it, or curl's exit code."""
        host = re.sub(r"^https?://([^/:]+).*", r"\1", url)
        address = (node or self.pair.lab.manager).address
        done = self.pair.lab.client_exec(
            *("curl", "--silent", "--include", "--max-time", "10", "--noproxy", "*"),
            *("--resolve", f"{host}:80:{address}", "--resolve", f"{host}:443:{address}"),
            *options,
            url,
            check=False,
        )
        if done.returncode:
            return done.returncode
        head, _, text = done.stdout.replace("\r\n", "\n").partition("\n\n")
        first, *lines = head.split("\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        return Answer(int(first.split()[1]), headers, text)

    def get(self, url: str, *options: str | Path, status: int = 200) -> Answer:
        """The answer once it has that status; the same from every node."""
        found: list[Answer] = []
        for node in self.pair.lab.nodes:
            last: list[Answer | int] = []

            def there(node: Node = node, last: list[Answer | int] = last) -> bool:
                last[:] = [self.curl(url, *options, node=node)]
                return isinstance(last[0], Answer) and last[0].status == status

            self.pair.lab.wait_for(there, SETTLE, f"{url}: {status}", interval=0.3)
            assert isinstance(last[0], Answer)
            found += last
        return found[0]

    def tls(self, url: str, *options: str | Path, status: int = 200) -> Answer:
        """The same over TLS, believing the CA of the examples and no other."""
        return self.get(url, "--cacert", self.certificates / "ca.pem", *options, status=status)


@pytest.fixture(scope="module")
def examples(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examples]:
    directory = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "stack.yml", directory)
    shutil.copytree(ROOT / "examples", directory / "examples", ignore=lambda *_: ["certs"])
    tls = directory / "examples/tls"
    subprocess.run([tls / "certificates.sh"], check=True, capture_output=True, timeout=60)
    lab.reset()
    pair = Pair(lab)
    pair.build()
    (directory / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\n")
    lab.build_image("Dockerfile", BACKEND, {"BASE": NGINX_BASE}, directory)
    pair.deploy(files=(directory / "stack.yml", tls / "openresty.yml"))
    for name, file in STACKS.items():
        pair.stack_deploy([directory / "examples" / file], name, ENV)
    yield Examples(pair, directory)
    lab.reset()


def test_app(examples: Examples) -> None:
    assert examples.get("http://whoami.localhost/x").request["path"] == "/x"


def test_tls_mode_1_none(examples: Examples) -> None:
    answer = examples.get("http://plain.example.com/")
    assert answer.request["headers"]["x-forwarded-proto"] == "http"
    assert examples.curl("https://plain.example.com/", "--insecure") == 35, "no certificate at all"


@pytest.mark.parametrize("host", ["shop.example.com", "admin.example.com"])
def test_tls_mode_2_termination_with_a_certificate_for_each_host(
    examples: Examples, host: str
) -> None:
    answer = examples.tls(f"https://{host}/path")
    assert answer.request["headers"]["x-forwarded-proto"] == "https"
    assert answer.request["headers"]["host"] == host
    plain = examples.get(f"http://{host}/path?q=1", status=308)
    assert plain.headers["location"] == f"https://{host}/path?q=1"
    stranger = examples.certificates / "backend-ca.pem"
    assert examples.curl(f"https://{host}/", "--cacert", stranger) == 60, "another CA's"


def test_tls_mode_3_both_legs_with_a_client_certificate(examples: Examples) -> None:
    answer = examples.tls("https://vault.example.com/")
    assert answer.text == "host=vault.example.com sni=backend.internal client=CN=proxy\n"
    assert examples.get("http://vault.example.com/", status=308)


def test_interlock_labels(examples: Examples) -> None:
    for host in ("test.local", "alias.local", "other.local"):
        assert examples.get(f"http://{host}/a").request["path"] == "/a"
    api = examples.get("http://test.local/api/users?x=1").request
    assert (api["path"], api["query"]) == ("/users", "x=1")
    assert examples.get("http://chat.local/").request["headers"]["host"] == "chat.local"
    upgraded = examples.curl(
        "http://chat.local/ws",
        *("--header", "Connection: Upgrade", "--header", "Upgrade: websocket"),
        *("--header", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "--max-time", "1"),
        *("--header", "Sec-WebSocket-Version: 13", "--http1.1", "--output", "/dev/null"),
        *("--write-out", "HTTP/1.1 %{http_code}"),
    )
    assert upgraded == 28, "open until curl gives up"
    assert examples.get("http://checked.local/").status == 200


def test_interlock_2_labels(examples: Examples) -> None:
    for host in ("demo.local", "www.demo.local"):
        assert examples.get(f"http://{host}/a").request["path"] == "/a"
    assert examples.get("http://demo.local/app/users").request["path"] == "/users"
    upstream = examples.pair.admin(examples.pair.lab.manager, "/v1/membership/canary.local%2F")
    assert len(upstream["peers"]) == 3, "two of the one and one of the other"
    moved = examples.get("http://old.local/path", status=302)
    assert moved.headers["location"] == "http://new.local/path"
    assert examples.get("http://new.local/").status == 200
    stuck = {
        examples.get("http://sticky.local/", "--cookie", "session=abc").request["hostname"]
        for _ in range(3)
    }
    assert len(stuck) == 1
    assert examples.get("http://nobody.example.org/").status == 200, "the default backend"


@pytest.mark.parametrize("name", STACKS)
def test_lint_says_what_is_then_routed(examples: Examples, name: str) -> None:
    files = [
        (str(path), path.read_text())
        for path in (
            examples.directory / "stack.yml",
            examples.directory / "examples" / STACKS[name],
        )
    ]
    report = lint(files, Settings(), environment=ENV, name=name)
    assert [str(item) for item in report.findings] == []
    told = {
        ((line.host or "*") + line.path, line.port, line.tls, line.tls_only)
        for verdict in report.verdicts
        for line in verdict.routes
    }
    state = examples.pair.state()
    ports = {
        upstream["name"]: {peer["port"] for peer in upstream["peers"]}
        for upstream in state["upstreams"]
    }
    routed = {
        (host + route["path"], *ports[route["upstream"]], route["tls"], route["tls_only"])
        for route in state["routes"]
        for host in (route["host"], *route["aliases"])
    }
    assert told
    assert told <= routed


TRICKY = """\
version: "3.8"
x-labels: &common
  interlock.domain: example.com
  interlock.weight: 010
services:
  listed:
    image: x
    labels: [a=1, "b=x=y", c, 'd=$$HOME', "e=${NONE:-x}"]
    networks: [edge]
    deploy: { replicas: 0 }
  mapped:
    image: x
    labels:
      f: yes
      g:
      h: 1_000
      i: ${APP_PORT}
      j: "${APP_PORT:-1}-${NONE-x}"
      k: 1.50
    deploy:
      replicas: 0
      labels: { <<: *common, interlock.ssl: off, interlock.port: 0x1F }
networks:
  edge: { driver: overlay }
"""


def test_lint_reads_labels_as_docker_does(examples: Examples) -> None:
    file = examples.directory / "tricky.yml"
    file.write_text(TRICKY)
    examples.pair.stack_deploy([file], "tricky", ENV)
    lab = examples.pair.lab
    project = composefile.read([(str(file), TRICKY)], environment={**os.environ, **ENV})
    assert project.kind is Kind.STACK
    for service in project.services:
        (spec,) = json.loads(lab.docker(lab.manager, "service", "inspect", f"tricky_{service.key}"))
        own = spec["Spec"]["Labels"]
        template = spec["Spec"]["TaskTemplate"]["ContainerSpec"]["Labels"]
        for found, said in ((template, service.labels), (own, service.deploy_labels)):
            docker = {k: v for k, v in found.items() if not k.startswith("com.docker.stack")}
            assert {name: label.value for name, label in said.items()} == docker
