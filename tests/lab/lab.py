"""The lab itself: nodes, Swarm, client, and what a test may do to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from tests.lab import machine, util
from tests.lab.builder import APP, Images, docker_cli, runtime_root
from tests.lab.util import LabError, Progress, locked

if TYPE_CHECKING:
    from docker import DockerClient

T = TypeVar("T")

DEFAULT_NAME = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,19}")
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the Swarm, as it stays while its daemon comes and goes.

    ``pid`` is that of the node's init, seen from the host: ``nsenter --all --target PID`` is a
    shell on the node. dockerd's own pid changes with each restart: :meth:`Lab.dockerd_pid`.
    """

    name: str
    address: str
    socket: Path
    control_socket: Path
    netns: str
    pid: int
    root: Path

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("node"))


class Lab:
    """A running Swarm: made by :meth:`up`, found by :meth:`attach`, removed by :meth:`down`."""

    def __init__(
        self,
        name: str,
        nodes: Sequence[Node],
        managers: int,
        client_netns: str,
        progress: Progress | None = None,
    ) -> None:
        self.name = name
        self.nodes = tuple(nodes)
        self.managers = self.nodes[:managers]
        self.client_netns = client_netns
        self.client_address = machine.CLIENT_ADDRESS
        self._progress = progress or Progress(show=False)

    # --- coming and going -----------------------------------------------------------------

    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        *,
        nodes: int = 2,
        managers: int = 1,
        fresh: bool = False,
        rebuild_images: bool = False,
        progress: Progress | None = None,
    ) -> Lab:
        """A healthy lab of that many nodes: the running one, or a new one in its place.

        What a killed run has left behind is removed first.
        """
        if not 1 <= managers <= nodes <= 40:
            raise LabError("1 <= managers <= nodes <= 40, please")
        progress = progress or Progress(show=False)
        with _lock(name, progress):
            if not fresh and not rebuild_images:
                lab = cls._find(name, progress)
                if lab and (len(lab.nodes), len(lab.managers)) == (nodes, managers):
                    trouble = lab.trouble()
                    if not trouble:
                        progress(f"lab {name!r} runs and is healthy")
                        return lab
                    progress(f"lab {name!r} is not healthy ({trouble}), making it anew")
            images = Images(progress)
            missing = util.missing_prerequisites(bootstrap=not images.bootstrapped)
            if missing:
                raise LabError("; ".join(missing))
            cls._remove(name, progress)
            app = images.ensure(rebuild=rebuild_images)
            return cls._create(name, nodes, managers, app, progress)

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> Lab:
        """The running lab of that name; an error when there is none, or when it is not whole."""
        lab = cls._find(name, None)
        if lab is None:
            raise LabError(f"lab {name!r} does not run: python -m tests.lab --name {name} up")
        return lab

    @classmethod
    def down(cls, name: str = DEFAULT_NAME, *, progress: Progress | None = None) -> None:
        """Remove the lab and all its traces, also of one that was never finished."""
        progress = progress or Progress(show=False)
        with _lock(name, progress):
            cls._remove(name, progress)

    @classmethod
    def _find(cls, name: str, progress: Progress | None) -> Lab | None:
        root = _root(name)
        try:
            state = json.loads((root / "state.json").read_text())
        except (OSError, ValueError):
            return None
        if state.get("version") != _STATE_VERSION or not state.get("complete"):
            return None
        nodes = []
        for item in state["nodes"]:
            paths = {key: Path(item[key]) for key in ("socket", "control_socket", "root")}
            node = Node(**(item | paths))
            if util.init_of(node.root) != node.pid:
                return None
            nodes.append(node)
        return cls(name, nodes, state["managers"], state["client_netns"], progress)

    @classmethod
    def _remove(cls, name: str, progress: Progress) -> None:
        root = _root(name)
        if not root.exists() and not machine.existing_netns(name) and not util.marked(root):
            return
        killed = machine.delete_machine(root, f"/tidegate-lab/{name}")
        machine.delete_network(name)
        progress(f"removed lab {name!r} ({killed} processes killed)")

    @classmethod
    def _create(cls, name: str, count: int, managers: int, app: Path, progress: Progress) -> Lab:
        root = _root(name)
        root.mkdir(parents=True)
        state: dict[str, Any] = {"version": _STATE_VERSION, "name": name, "complete": False}
        _write(root / "state.json", state)
        machine.create_network(name, count)
        progress("network ready")

        def start(number: int) -> Node:
            label = f"node{number}"
            home, network = root / label, machine.netns(name, label)
            init = machine.start_machine(home, number, network)
            run = home / "run"
            return Node(
                name=label,
                address=machine.node_address(number),
                socket=run / "docker.sock",
                control_socket=run / "docker/swarm/control.sock",
                netns=network,
                pid=init,
                root=home,
            )

        with ThreadPoolExecutor(count) as pool:
            nodes = list(pool.map(start, range(1, count + 1)))
            lab = cls(name, nodes, managers, machine.netns(name, "client"), progress)
            list(pool.map(lab.start_dockerd, nodes))
            progress("every dockerd answers")
            loading = [pool.submit(lab._load, node, app) for node in nodes]
            lab._swarm()
            for load in loading:
                load.result()
            progress(f"{APP} loaded on every node")
        lab.wait_ready()
        progress(f"{count} nodes ready")
        state |= {
            "complete": True,
            "managers": managers,
            "client_netns": lab.client_netns,
            "nodes": [asdict(node) for node in nodes],
        }
        _write(root / "state.json", state)
        return lab

    def _swarm(self) -> None:
        first = self.nodes[0]
        self.docker(
            first,
            *("swarm", "init"),
            *("--advertise-addr", first.address, "--listen-addr", f"{first.address}:2377"),
            *("--default-addr-pool", machine.OVERLAY_POOL),
            *("--default-addr-pool-mask-length", "24"),
        )
        for node in self.nodes[1:]:
            role = "manager" if node in self.managers else "worker"
            token = self.docker(first, "swarm", "join-token", "--quiet", role).strip()
            self.docker(
                node,
                *("swarm", "join", "--token", token),
                *("--advertise-addr", node.address, "--listen-addr", f"{node.address}:2377"),
                f"{first.address}:2377",
            )

    def show_progress(self) -> None:
        """Tell on stderr, from here on, what is being done."""
        self._progress = Progress(show=True)

    # --- state ----------------------------------------------------------------------------

    @property
    def manager(self) -> Node:
        """The first manager (with one manager: the leader)."""
        return self.nodes[0]

    @property
    def workers(self) -> tuple[Node, ...]:
        return self.nodes[len(self.managers) :]

    def node(self, name: str) -> Node:
        """The node of that name, for example as ``docker node ls`` calls it."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"no node {name!r} in lab {self.name!r}")

    def node_states(self, timeout: float = 10) -> dict[str, str]:
        """What the manager says of each node: name → ``ready``, ``down``, ``unknown``…"""
        ids = self.docker(self.manager, "node", "ls", "--quiet", timeout=timeout).split()
        text = self.docker(self.manager, "node", "inspect", *ids, timeout=timeout)
        return {n["Description"]["Hostname"]: n["Status"]["State"] for n in json.loads(text)}

    def trouble(self) -> str:
        """Why the lab is not fit for use, in a few words; empty when it is."""
        names = set(machine.existing_netns(self.name))
        for network in [self.client_netns, *(node.netns for node in self.nodes)]:
            if network not in names:
                return f"network namespace {network} is gone"
        for node in self.nodes:
            if self.dockerd_pid(node) is None:
                return f"{node.name} has no dockerd"
            try:
                self.docker(node, "version", timeout=5)
            except LabError:
                return f"{node.name}'s dockerd does not answer"
        try:
            states = self.node_states()
        except LabError as error:
            return f"no Swarm: {error}"
        bad = sorted(node.name for node in self.nodes if states.get(node.name) != "ready")
        return f"not ready: {', '.join(bad)}" if bad else ""

    def wait_ready(self, timeout: float = 40) -> None:
        """Wait until the manager sees every node as ready."""

        def ready() -> bool:
            states = self.node_states()
            return all(states.get(node.name) == "ready" for node in self.nodes)

        self.wait_for(ready, timeout, f"all nodes of lab {self.name!r} are ready")

    @staticmethod
    def wait_for(
        predicate: Callable[[], T], timeout: float, what: str, *, interval: float = 0.05
    ) -> T:
        """Poll until ``predicate`` is true; see :func:`tests.lab.util.wait_for`."""
        return util.wait_for(predicate, timeout, what, interval=interval)

    # --- Docker ---------------------------------------------------------------------------

    def docker(
        self,
        node: Node,
        *args: str | Path,
        timeout: float = 120,
        stdin: str | None = None,
        check: bool = True,
    ) -> str:
        """Run the docker client against a node; returns its stdout."""
        return docker_cli(node.socket, *args, timeout=timeout, stdin=stdin, check=check)

    def api(self, node: Node, *, timeout: float = 60) -> DockerClient:
        """A client of the Docker SDK; the caller closes it."""
        from docker import DockerClient  # here, so that the command line works without it

        return DockerClient(base_url=f"unix://{node.socket}", timeout=int(timeout))

    def load_image(self, archive: Path, nodes: Sequence[Node] | None = None) -> None:
        """``docker load`` an archive on the nodes (all of them, unless told), side by side."""
        chosen = self.nodes if nodes is None else nodes
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            list(pool.map(lambda node: self._load(node, archive), chosen))

    def _load(self, node: Node, archive: Path) -> None:
        self.docker(node, "load", "--quiet", "--input", archive, timeout=600)

    def build_image(
        self,
        dockerfile: Path | str,
        tag: str,
        build_args: Mapping[str, str] | None = None,
        context: Path | str = ".",
        nodes: Sequence[Node] | None = None,
    ) -> str:
        """Build an image with the network of the host, load it on the nodes, return its id.

        The base images ``tidegate-test/nginx-base`` and ``tidegate-test/python-base`` are there to
        be named in the build arguments. Layers are cached between builds.
        """
        folder = Path(context).resolve()
        file = (folder / dockerfile).resolve()
        with Images(self._progress).build(file, tag, folder, build_args or {}) as (image, archive):
            self.load_image(archive, nodes)
        self._progress(f"{tag} loaded")
        return image

    def load_base_image(self, tag: str, nodes: Sequence[Node] | None = None) -> None:
        """Load one of the base images itself, to run something in it as it is."""
        with Images(self._progress).export(tag) as archive:
            self.load_image(archive, nodes)

    def create_overlay(self, name: str, attachable: bool = True) -> str:
        """Create an overlay network (on the manager); returns its id."""
        options = ["--driver=overlay", *(["--attachable"] if attachable else [])]
        return self.docker(self.manager, "network", "create", *options, name).strip()

    def reset(self, timeout: float = 60) -> None:
        """Empty the Swarm: services, their containers, overlay networks, configs, secrets."""
        manager = self.manager
        for node in self.nodes:
            if (pid := self.dockerd_pid(node)) is None:
                self.start_dockerd(node)
            else:
                os.kill(pid, signal.SIGCONT)
        self.wait_ready()
        for kind in ("service", "config", "secret"):
            if ids := self.docker(manager, kind, "ls", "--quiet").split():
                self.docker(manager, kind, "rm", *ids)
        for node in self.nodes:
            self.docker(manager, "node", "update", "--availability=active", node.name)
            if ids := self.docker(node, "ps", "--all", "--quiet").split():
                self.docker(node, "rm", "--force", "--volumes", *ids, check=False)

        def empty() -> bool:
            names = self.docker(
                manager, "network", "ls", "--filter=driver=overlay", "--format={{.Name}}"
            ).split()
            left = [name for name in names if name != "ingress"]
            for name in left:
                self.docker(manager, "network", "rm", name, check=False)
            running = any(self.docker(node, "ps", "--quiet").split() for node in self.nodes)
            return not left and not running

        self.wait_for(empty, timeout, "the Swarm is empty", interval=0.2)

    # --- processes ------------------------------------------------------------------------

    def client_exec(
        self, *command: str | Path, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end where only the nodes can be reached, as their client."""
        done = subprocess.run(
            self.client_command(*command),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise LabError(f"exit {done.returncode}: {command}\n{done.stderr}{done.stdout}")
        return done

    def client_popen(
        self,
        *command: str | Path,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command as the nodes' client, for example a load generator."""
        return subprocess.Popen(
            self.client_command(*command),
            stdout=stdout,
            stderr=stderr,
            stdin=stdin,
            env=None if env is None else dict(env),
            text=True,
        )

    def client_command(self, *command: str | Path) -> list[str]:
        """The command line that runs a command in the client's network namespace.

        nsenter replaces itself by the command, so a signal to the process reaches it.
        """
        return _entering(self.client_netns, *command)

    def node_command(self, node: Node, *command: str | Path) -> list[str]:
        """The command line that runs a command in a node's network namespace only."""
        return _entering(node.netns, *command)

    def dockerd_pid(self, node: Node) -> int | None:
        """The host's pid of the node's dockerd, None while it does not run."""
        for pid in util.marked(node.root):
            if pid != node.pid and _program(pid) == "dockerd" and util.alive(pid):
                return pid
        return None

    def start_dockerd(self, node: Node, timeout: float = 40) -> None:
        """Start the node's dockerd and wait until it answers."""
        cgroup = f"/tidegate-lab/{self.name}/{node.name}"
        machine.start_dockerd(node.root, node.pid, node.number, cgroup)
        begin = time.monotonic()

        def answers() -> bool:
            # Not running any more after a fair time to start: no reason to wait to the end.
            if time.monotonic() - begin > 2 and self.dockerd_pid(node) is None:
                return True
            return bool(self.docker(node, "version", "--format={{.Server.Version}}", timeout=5))

        log = node.root / "dockerd.log"
        try:
            self.wait_for(answers, timeout, f"{node.name}'s dockerd answers")
        except LabError as error:
            raise LabError(f"{error}\n{machine.tail(log)}") from error
        if self.dockerd_pid(node) is None:
            raise LabError(f"{node.name}'s dockerd ended\n{machine.tail(log)}")

    def stop_dockerd(
        self, node: Node, sig: signal.Signals = signal.SIGTERM, timeout: float = 40
    ) -> None:
        """End the node's dockerd. SIGTERM stops its containers; with SIGKILL they go on running."""
        pid = self.dockerd_pid(node)
        if pid is None:
            return
        os.kill(pid, sig)
        self.wait_for(lambda: not util.alive(pid), timeout, f"{node.name}'s dockerd ended")

    def restart_dockerd(self, node: Node, sig: signal.Signals = signal.SIGTERM) -> None:
        """Stop and start the node's dockerd; returns when the Swarm is whole again."""
        self.stop_dockerd(node, sig)
        self.start_dockerd(node)
        self.wait_ready()

    @contextlib.contextmanager
    def pause_dockerd(self, node: Node) -> Iterator[None]:
        """dockerd hangs: it accepts connections and answers none, until the block ends."""
        pid = self.dockerd_pid(node)
        if pid is None:
            raise LabError(f"{node.name} has no dockerd")
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def task_pid(self, container: str, node: Node | None = None) -> int:
        """The host's pid of a container's main process (Docker's own number is the node's)."""
        for candidate in self.nodes if node is None else (node,):
            form = "{{.State.Pid}}"
            text = self.docker(candidate, "inspect", f"--format={form}", container, check=False)
            if text.strip() not in ("", "0"):
                pid = _container_pid(candidate.pid, int(text))
                if pid is not None:
                    return pid
        raise LabError(f"no running container {container!r}")

    def kill_task(self, container: str, node: Node | None = None) -> None:
        """``kill -9`` of a container's main process, behind Docker's back."""
        os.kill(self.task_pid(container, node), signal.SIGKILL)


# --- helpers ----------------------------------------------------------------------------------


def _root(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise LabError(f"a lab's name is like {_NAME.pattern}, not {name!r}")
    return runtime_root() / name


def _lock(name: str, progress: Progress) -> contextlib.AbstractContextManager[None]:
    _root(name)
    return locked(runtime_root() / f"{name}.lock", progress)


def _write(path: Path, state: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=2, default=str) + "\n")
    part.rename(path)


def _entering(netns: str, *command: str | Path) -> list[str]:
    nsenter = shutil.which("nsenter", path=util.PATH) or "nsenter"
    return [nsenter, f"--net={machine.NETNS_DIR / netns}", *(str(word) for word in command)]


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _container_pid(init: int, inner: int) -> int | None:
    """The host's number of a pid that the node sees, for a process in a namespace below it."""
    depth = len(util.status(init, "NSpid"))
    for pid in util.descendants(init):
        numbers = util.status(pid, "NSpid")
        if len(numbers) >= depth and numbers[depth - 1] == str(inner):
            return pid
    return None
