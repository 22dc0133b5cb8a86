"""compose.yaml brings up the pair and its sample app on a plain engine, as the README says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.composefile import Kind
from agent.config.settings import Settings
from agent.lint import lint
from bench.load import LoadProcess, Plan
from tests.conftest import require
from tests.lab import Lab
from tests.lab.builder import APP
from tests.swarm.pair import AGENT_IMAGE, OPENRESTY_IMAGE, ROOT, Pair, own_lab

pytestmark = pytest.mark.timeout(300)


class Compose:
    """`docker-compose` on the one node of a lab."""

    def __init__(self, lab: Lab, token_file: Path) -> None:
        self.lab = lab
        # The secret's file lies beside compose.yaml, which is not a place for a test to write.
        self._file = token_file.parent / "compose.yaml"
        self._file.write_text((ROOT / "compose.yaml").read_text())
        socket = lab.manager.socket
        self._env = {
            **os.environ,
            "DOCKER_HOST": f"unix://{socket}",
            "DOCKER_GID": str(socket.stat().st_gid),
            "TIDEGATE_AGENT_IMAGE": AGENT_IMAGE,
            "TIDEGATE_OPENRESTY_IMAGE": OPENRESTY_IMAGE,
            "APP_IMAGE": APP,
            "APP_PORT": "8080",
        }

    def __call__(self, *words: str, project: str = "pair", file: Path | None = None) -> str:
        done = subprocess.run(
            ["docker-compose", f"--project-name={project}", f"--file={file or self._file}", *words],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, host: str = "whoami.localhost") -> str:
        """Status and body of a request for the sample app, through the proxy's port 80."""
        return self.lab.client_exec(
            *("curl", "--silent", "--include", "--header", f"Host: {host}"),
            f"http://{self.lab.manager.address}/",
            check=False,
        ).stdout


@pytest.fixture(scope="module")
def compose(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    require(_installed(), "docker-compose")
    own = Lab.up(own_lab("compose"), nodes=1, fresh=True)
    try:
        Pair(own).build()
        token = tmp_path_factory.mktemp("compose") / "tidegate.token"
        token.write_text("a-token-of-the-test-0123456789\n")
        compose = Compose(own, token)
        compose("up", "--detach", "--no-build")
        own.wait_for(lambda: "200 OK" in compose.get(), 60, "the sample app is routed")
        yield compose
    finally:
        Lab.down(own.name)


def _installed() -> bool:
    try:
        subprocess.run(["docker-compose", "version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def test_scaling_the_app_fails_no_request(compose: Compose) -> None:
    plan = Plan(
        urls=(f"http://{compose.lab.manager.address}/",),
        hosts=("whoami.localhost",),
        rate=100,
        timeout=20,
        backend_header="X-Backend",
    )
    with LoadProcess(plan, prefix=tuple(compose.lab.client_command())) as load:
        compose("up", "--detach", "--no-build", "--scale", "whoami=3")
        compose.lab.wait_for(
            lambda: (
                len({json.loads(compose.get().partition("\n\n")[2])["hostname"] for _ in range(9)})
                == 3
            ),
            30,
            "three containers answer",
        )
        compose("up", "--detach", "--no-build", "--scale", "whoami=1")
        result = load.stop()
    assert result.failed == 0, (result.failures, result.details)
    assert len(result.backends) == 3


def test_agent_needs_no_root_and_no_write_to_the_engine(compose: Compose) -> None:
    container = compose("ps", "--quiet", "agent").strip()
    node = compose.lab.manager
    assert compose.lab.docker(node, "exec", container, "id", "-u").strip() == "10001"
    explained = compose.lab.docker(
        node, "exec", container, "tidegate", "explain", "whoami.localhost", check=False
    )
    assert "whoami.localhost" in explained


def test_interlocks_example_is_routed_and_lint_says_so(compose: Compose) -> None:
    file = ROOT / "examples/interlock/compose.yml"
    files = [(str(path), path.read_text()) for path in (ROOT / "compose.yaml", file)]
    report = lint(files, Settings(), environment={"APP_PORT": "8080"}, kind=Kind.COMPOSE)
    said = {str(line) for verdict in report.verdicts for line in verdict.routes}
    assert "http://test.local/ -> port 8080 over tidegate" in said
    try:
        compose("up", "--detach", project="example", file=file)
        compose.lab.wait_for(lambda: "200 OK" in compose.get("test.local"), 30, "it is routed")
    finally:
        compose("down", project="example", file=file)
