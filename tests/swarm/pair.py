"""The pair on the lab's Swarm, deployed from the project's own stack file and images.

What a test may ask of it, and what it may do to it; nothing here asserts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import LoadProcess, Plan, Result
from tests.lab import Lab, LabError, Node
from tests.lab.builder import APP, NGINX_BASE, PYTHON_BASE

ROOT = Path(__file__).resolve().parents[2]
STACK = "tidegate"
NETWORK = "tidegate"
TOKEN = "test-token-of-the-lab-0123456789abcdef"
AGENT_IMAGE = "tidegate/agent:test"
OPENRESTY_IMAGE = "tidegate/openresty:test"
SETTLE = 60.0


def own_lab(purpose: str) -> str:
    """Name of a lab that a module has to itself, for this `TIDEGATE_LAB` if there is one."""
    run = os.environ.get("TIDEGATE_LAB")
    return f"{run}-{purpose}" if run else purpose


@dataclass(frozen=True)
class Disturbance:
    """What must not change while only backends do: worker pids and generation, by node."""

    workers: Mapping[str, frozenset[int]]
    generations: Mapping[str, str]


@dataclass
class Pair:
    """One agent and an OpenResty on each labelled node."""

    lab: Lab
    _env: dict[str, str] = field(default_factory=dict)

    # --- coming and going -----------------------------------------------------------------

    def build(self) -> None:
        """Build both images from the project's Dockerfiles and load them on all nodes."""
        self.lab.build_image("Dockerfile.openresty", OPENRESTY_IMAGE, {"BASE": NGINX_BASE}, ROOT)
        self.lab.build_image("Dockerfile.agent", AGENT_IMAGE, {"BASE": PYTHON_BASE}, ROOT)

    def deploy(
        self,
        *,
        watch: str = "auto",
        next_upstream: str = "error timeout",
        files: tuple[Path, ...] = (ROOT / "stack.yml",),
    ) -> None:
        """Deploy the stack, or update it to these settings; returns when all are in step.

        Args:
            files: the stack file, and what is merged into it.
        """
        manager = self.lab.manager
        for node in self.lab.nodes:
            self.lab.docker(manager, "node", "update", "--label-add=tidegate=true", node.name)
        if "tidegate_token" not in self.lab.docker(manager, "secret", "ls", "--format={{.Name}}"):
            self.lab.docker(manager, "secret", "create", "tidegate_token", "-", stdin=TOKEN)
        self._env = {
            "TIDEGATE_AGENT_IMAGE": AGENT_IMAGE,
            "TIDEGATE_OPENRESTY_IMAGE": OPENRESTY_IMAGE,
            "TIDEGATE_WATCH": watch,
            "TIDEGATE_NEXT_UPSTREAM": next_upstream,
            "TIDEGATE_LOG_LEVEL": "debug",
        }
        before = self.agent_container()
        self.stack_deploy(files, STACK, self._env)
        expected = "poll" if watch == "off" else "watch"

        def settled() -> bool:
            return (
                self.agent_setting("TIDEGATE_CONFIG", f'Watch = "{watch}"')
                and self.agent_setting("TIDEGATE_CONFIG", f'ProxyNextUpstream = "{next_upstream}"')
                and self.source()["mode"] == expected
                and self.in_step()
            )

        self.lab.wait_for(
            settled, SETTLE, f"the pair is in step (agent was {before or 'not there'})"
        )

    def stack_deploy(self, files: Sequence[Path], name: str, env: Mapping[str, str]) -> None:
        """`docker stack deploy` as a user would, with these variables set."""
        given = [word for file in files for word in ("-c", str(file))]
        done = subprocess.run(
            ["docker", "stack", "deploy", "--resolve-image=never", *given, name],
            env={**os.environ, **env, "DOCKER_HOST": f"unix://{self.lab.manager.socket}"},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise LabError(f"docker stack deploy {name}: {done.stderr}")

    # --- the agent ------------------------------------------------------------------------

    def agent_container(self) -> str:
        """Id of the running agent's container on the manager, empty if none runs."""
        ids = self.lab.docker(
            self.lab.manager,
            *("ps", "--quiet", "--filter", f"name={STACK}_agent"),
            *("--filter", "status=running"),
        ).split()
        return ids[0] if ids else ""

    def agent_setting(self, variable: str, part: str) -> bool:
        """Whether the running agent's environment variable holds that text."""
        container = self.agent_container()
        if not container:
            return False
        env = json.loads(
            self.lab.docker(self.lab.manager, "inspect", "--format={{json .Config.Env}}", container)
        )
        return any(item.startswith(f"{variable}=") and part in item for item in env)

    def state(self) -> dict[str, Any]:
        """The agent's /api/state."""
        found: dict[str, Any] = json.loads(self._agent("/api/state"))
        return found

    def _agent(self, path: str) -> str:
        return self._inside(self.lab.manager, self.agent_container(), 8080, path)

    def source(self) -> dict[str, Any]:
        """The Swarm source as /api/state tells it."""
        return next(s for s in self.state()["sources"] if s["name"] == "swarm")

    def agent_metrics(self) -> str:
        """The agent's /metrics."""
        return self._agent("/metrics")

    def explain(self, name: str) -> str:
        """What `tidegate explain NAME` prints in the agent's container."""
        return self.lab.docker(
            self.lab.manager,
            "exec",
            self.agent_container(),
            "tidegate",
            "explain",
            name,
            check=False,
        )

    def scale_agent(self, replicas: int) -> None:
        """Stop the agent (0) or start it (1), and wait until that is so."""
        self.lab.docker(
            self.lab.manager, "service", "scale", "--detach", f"{STACK}_agent={replicas}"
        )
        self.lab.wait_for(
            lambda: bool(self.agent_container()) == bool(replicas), SETTLE, "the agent is scaled"
        )

    # --- OpenResty ------------------------------------------------------------------------

    def openresty_container(self, node: Node) -> str:
        """Id of the running OpenResty container on that node, empty if none runs."""
        ids = self.lab.docker(
            node,
            *("ps", "--quiet", "--filter", f"name={STACK}_openresty"),
            *("--filter", "status=running"),
        ).split()
        return ids[0] if ids else ""

    def admin(self, node: Node, path: str) -> dict[str, Any]:
        """A GET of the admin API of the OpenResty on that node."""
        text = self._inside(node, self.openresty_container(node), 8081, path)
        found: dict[str, Any] = json.loads(text)
        return found

    def openresty_metrics(self, node: Node) -> str:
        """/metrics of the OpenResty on that node."""
        return self._inside(node, self.openresty_container(node), 8081, "/metrics")

    def workers(self, node: Node) -> frozenset[int]:
        """Host pids of the nginx workers on that node."""
        pending = [self.lab.task_pid(self.openresty_container(node), node)]
        found: set[int] = set()
        while pending:
            pid = pending.pop()
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"nginx: worker process" in title and b"shutting down" not in title:
                    found.add(pid)
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                pending += [int(child) for child in children]
        return frozenset(found)

    def disturbance(self) -> Disturbance:
        """Worker pids and generation of every OpenResty that runs."""
        nodes = [node for node in self.lab.nodes if self.openresty_container(node)]
        return Disturbance(
            {node.name: self.workers(node) for node in nodes},
            {node.name: self.admin(node, "/v1/status")["generation"] for node in nodes},
        )

    def is_settled(self) -> bool:
        """Whether no OpenResty has workers of before its last reload that still take requests."""
        return all(
            len(self.workers(node)) == self.admin(node, "/v1/status")["workers"]
            for node in self.lab.nodes
            if self.openresty_container(node)
        )

    def in_step(self) -> bool:
        """Whether every OpenResty task runs, and has acknowledged what the agent wants."""
        instances = self.state()["instances"]
        return len(instances) == len(self.lab.nodes) and all(
            instance["in_sync"] for instance in instances
        )

    # --- apps and load --------------------------------------------------------------------

    def create_app(self, name: str, *options: str, replicas: int = 2, version: str = "1") -> None:
        """A service of the test app, routed as NAME.test; returns when its tasks are peers."""
        self.lab.docker(
            self.lab.manager,
            *("service", "create", "--detach", "--no-resolve-image", "--name", name),
            *("--network", NETWORK, "--replicas", str(replicas), "--env", f"VERSION={version}"),
            *("--label", f"interlock.hostname={name}", "--label", "interlock.domain=test"),
            *("--label", "interlock.port=8080", "--stop-grace-period=10s"),
            *("--update-delay=0s", "--update-monitor=100ms", "--restart-delay=500ms"),
            *options,
            APP,
        )
        if replicas:
            self.wait_peers(name, replicas)

    def remove_app(self, name: str) -> None:
        """Remove the service if it is there."""
        self.lab.docker(self.lab.manager, "service", "rm", name, check=False)

    def peers(self, name: str, node: Node | None = None) -> list[dict[str, Any]]:
        """Peers of NAME.test as an OpenResty has them; empty if it has none or no upstream."""
        with contextlib.suppress(LabError, ValueError, KeyError):
            path = f"/v1/membership/{name}.test%2F"
            return list(self.admin(node or self.lab.manager, path)["peers"])
        return []

    def wait_peers(self, name: str, count: int, timeout: float = SETTLE) -> None:
        """Wait until every OpenResty has exactly that many peers of NAME.test, all in use."""

        def there() -> bool:
            for node in self.lab.nodes:
                if not self.openresty_container(node):
                    continue
                states = [peer["live"]["state"] for peer in self.peers(name, node)]
                if states != ["up"] * count:
                    return False
            return True

        self.lab.wait_for(there, timeout, f"{name} has {count} peers", interval=0.2)

    def update_done(self, name: str, version: str, replicas: int) -> bool:
        """Whether a rolling update has come to its end and only its tasks are peers."""
        services = json.loads(self.lab.docker(self.lab.manager, "service", "inspect", name))
        if services[0].get("UpdateStatus", {}).get("State") != "completed":
            return False
        running = self.lab.docker(
            self.lab.manager,
            *("service", "ps", "--filter=desired-state=running", "--no-trunc"),
            *("--format={{.CurrentState}}", name),
        ).splitlines()
        return len(running) == replicas and all(line.startswith("Running") for line in running)

    def urls(self, nodes: tuple[Node, ...] | None = None, path: str = "/") -> tuple[str, ...]:
        """Addresses of the proxies as clients see them."""
        return tuple(f"http://{node.address}{path}" for node in nodes or self.lab.nodes)

    @contextlib.contextmanager
    def load(
        self,
        name: str,
        *,
        rate: float = 60.0,
        nodes: tuple[Node, ...] | None = None,
        expect: tuple[int, ...] = (),
        timeout: float = 30.0,
    ) -> Iterator[list[Result]]:
        """Constant load on NAME.test through the proxies, with and without keep-alive.

        The results are in the list once the block has ended; no client retries anything.
        """
        results: list[Result] = []
        with contextlib.ExitStack() as stack:
            loads = [
                stack.enter_context(
                    LoadProcess(
                        Plan(
                            urls=self.urls(nodes),
                            hosts=(f"{name}.test",),
                            rate=rate,
                            keepalive=keepalive,
                            connections=8,
                            timeout=timeout,
                            expect=expect,
                            backend_header="X-Backend",
                        ),
                        prefix=tuple(self.lab.client_command()),
                    )
                )
                for keepalive in (True, False)
            ]
            yield results
            results += [load.stop() for load in loads]

    def _inside(self, node: Node, container: str, port: int, path: str) -> str:
        """A GET on the loopback of a container, with the admin token."""
        if not container:
            raise LabError(f"no running container to ask for {path} on {node.name}")
        done = subprocess.run(
            [
                *("nsenter", "--net", "--target", str(self.lab.task_pid(container, node))),
                *("curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "10"),
                *("--header", f"Authorization: Bearer {TOKEN}"),
                f"http://127.0.0.1:{port}{path}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LabError(f"{path} on {node.name}: {done.stderr}{done.stdout}")
        return done.stdout
