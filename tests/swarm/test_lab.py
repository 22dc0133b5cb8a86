"""The lab keeps its promises: a real Swarm, reachable from its client, and no way out of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Lab, LabError, Node, machine, util, wait_for
from tests.lab.builder import APP, PYTHON_BASE, pip_configuration, runtime_root

ROOT = Path(__file__).resolve().parents[2]
PORT = 18999

# 192.0.2.0/24 is reserved for documentation: even with a route nobody would answer there.
NO_ROUTE = """
import socket, sys
probe = socket.socket()
probe.settimeout(5)
sys.exit(probe.connect_ex(("192.0.2.1", 9)))
"""
FETCH = """
import json, sys, urllib.request
answer = urllib.request.urlopen(sys.argv[1], timeout=5)
print(json.dumps([dict(answer.headers.items()), answer.read().decode()]))
"""


def tasks_of(lab: Lab, service: str) -> list[dict[str, Any]]:
    ids = lab.docker(
        lab.manager,
        "service",
        "ps",
        "--quiet",
        "--no-trunc",
        "--filter=desired-state=running",
        service,
    ).split()
    tasks = json.loads(lab.docker(lab.manager, "inspect", "--type=task", *ids)) if ids else []
    return [task for task in tasks if task["Status"]["State"] == "running"]


@pytest.fixture(scope="module")
def backend(lab: Lab) -> Iterator[list[dict[str, Any]]]:
    """One backend task per node, on an overlay network and on a host-mode port."""
    name = f"lab-test-{os.getpid()}"
    network = lab.create_overlay(name)
    lab.docker(
        lab.manager,
        *("service", "create", "--detach", "--quiet", "--no-resolve-image", "--mode=global"),
        *(f"--name={name}", f"--network={name}", "--env=VERSION=7", "--stop-grace-period=2s"),
        f"--publish=mode=host,target=8080,published={PORT}",
        APP,
    )
    try:
        lab.wait_for(
            lambda: len(tasks_of(lab, name)) == len(lab.nodes), 30, "a backend runs on every node"
        )
        yield tasks_of(lab, name)
    finally:
        lab.docker(lab.manager, "service", "rm", name)
        lab.wait_for(lambda: lab.docker(lab.manager, "network", "rm", network), 30, "overlay gone")


def overlay_address(task: dict[str, Any]) -> str:
    (address,) = (
        attachment["Addresses"][0].partition("/")[0]
        for attachment in task["NetworksAttachments"]
        if attachment["Network"]["Spec"]["Name"] != "ingress"
    )
    return str(address)


def container_of(task: dict[str, Any]) -> str:
    return str(task["Status"]["ContainerStatus"]["ContainerID"])


def node_of(lab: Lab, task: dict[str, Any]) -> Node:
    """The lab's node that runs a task."""
    node = lab.docker(
        lab.manager, "node", "inspect", "--format={{.Description.Hostname}}", task["NodeID"]
    )
    return lab.node(node.strip())


def test_every_node_is_ready_under_its_own_name(lab: Lab) -> None:
    states = lab.node_states()
    assert states == {node.name: "ready" for node in lab.nodes}
    assert len(lab.nodes) >= 2
    with contextlib.closing(lab.api(lab.manager)) as api:
        assert api.info()["Swarm"]["LocalNodeState"] == "active"
        assert api.info()["Name"] == lab.manager.name


def test_managers_and_only_they_have_the_control_socket(lab: Lab) -> None:
    for node in lab.nodes:
        assert node.control_socket.is_socket() == (node in lab.managers), node


def test_tasks_reach_each_other_across_nodes(lab: Lab, backend: list[dict[str, Any]]) -> None:
    for task in backend:
        for other in backend:
            url = f"http://{overlay_address(other)}:8080/healthz"
            text = lab.docker(
                node_of(lab, task), "exec", container_of(task), "python3", "-c", FETCH, url
            )
            headers, body = json.loads(text)
            assert body == "ok\n"
            assert headers["X-Version"] == "7"
            assert container_of(other).startswith(headers["X-Backend"])


def test_the_client_reaches_host_mode_ports(lab: Lab, backend: list[dict[str, Any]]) -> None:
    answering = set()
    for node in lab.nodes:
        url = f"http://{node.address}:{PORT}/some/path?x=1"
        _, body = json.loads(lab.client_exec(sys.executable, "-c", FETCH, url).stdout)
        answer = json.loads(body)
        assert (answer["path"], answer["query"]) == ("/some/path", "x=1")
        assert answer["headers"]["host"] == f"{node.address}:{PORT}"
        answering.add(answer["hostname"])
    assert len(answering) == len(lab.nodes)


def test_there_is_no_way_out(lab: Lab, backend: list[dict[str, Any]]) -> None:
    commands = [lab.client_command(sys.executable, "-c", NO_ROUTE)]
    commands += [lab.node_command(node, sys.executable, "-c", NO_ROUTE) for node in lab.nodes]
    for command in commands:
        assert subprocess.run(command, check=False).returncode == errno.ENETUNREACH
    for task in backend:  # the container has a route, to its node; that is where it ends
        node = node_of(lab, task)
        with pytest.raises(LabError, match=f"exit ({errno.ENETUNREACH}|{errno.EHOSTUNREACH}):"):
            lab.docker(node, "exec", container_of(task), "python3", "-c", NO_ROUTE, timeout=5)


def test_names_outside_fail_at_once(lab: Lab, backend: list[dict[str, Any]]) -> None:
    lookup = "import socket; socket.getaddrinfo('outside.invalid', 80)"
    for task in backend:
        with pytest.raises(LabError, match="gaierror"):
            lab.docker(
                node_of(lab, task), "exec", container_of(task), "python3", "-c", lookup, timeout=4
            )


def test_a_task_can_be_killed_behind_dockers_back(lab: Lab) -> None:
    name = f"lab-kill-{os.getpid()}"
    node = lab.nodes[-1]
    lab.docker(node, "run", "--detach", f"--name={name}", APP)
    try:
        pid = lab.task_pid(name)
        assert b"/app.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        lab.kill_task(name, node)
        form = "--format={{.State.Status}} {{.State.ExitCode}}"
        lab.wait_for(
            lambda: lab.docker(node, "inspect", form, name).strip() == "exited 137",
            10,
            "Docker sees that the container was killed",
        )
    finally:
        lab.docker(node, "rm", "--force", name)


def test_a_paused_dockerd_hangs_and_comes_back(lab: Lab) -> None:
    node = lab.nodes[-1]
    with lab.pause_dockerd(node), pytest.raises(LabError, match="no end after"):
        lab.docker(node, "version", timeout=1)
    lab.docker(node, "version", timeout=10)
    lab.wait_ready()


def test_containers_outlive_a_killed_dockerd_until_it_is_back(lab: Lab) -> None:
    node = lab.nodes[-1]
    before = lab.dockerd_pid(node)
    container = lab.docker(node, "run", "--detach", "--rm", APP).strip()
    pid = lab.task_pid(container, node)
    lab.stop_dockerd(node, signal.SIGKILL)
    assert lab.dockerd_pid(node) is None
    assert util.alive(pid)
    assert lab.trouble() == f"{node.name} has no dockerd"
    lab.start_dockerd(node)
    lab.wait_ready()
    assert not util.alive(pid)
    assert lab.dockerd_pid(node) not in (None, before)
    assert lab.trouble() == ""


def test_the_base_image_reaches_the_package_registry_as_the_host_does(
    lab: Lab, tmp_path: Path
) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        "ARG BASE\nFROM ${BASE}\nRUN pip install --no-cache-dir toml==0.10.2\n"
        'CMD ["python", "-c", "import toml; print(toml.__version__)"]\n'
    )
    tag = "tidegate-test/pip-check"
    image = lab.build_image(dockerfile, tag, {"BASE": PYTHON_BASE}, tmp_path)
    for node in lab.nodes:
        assert lab.docker(node, "run", "--rm", image).strip() == "0.10.2"
        lab.docker(node, "rmi", tag)


def test_local_paths_stay_out_of_the_images_pip_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/somewhere/here https://packages.example/links")
    monkeypatch.setenv("PIP_INDEX_URL", "file:///somewhere/else")
    text = pip_configuration()
    assert "find-links = https://packages.example/links\n" in text
    assert "somewhere" not in text


# --- after a crash ------------------------------------------------------------------------------


@pytest.fixture
def other_name() -> Iterator[str]:
    name = f"crash-{os.getpid()}"
    yield name
    Lab.down(name)


def traces(name: str) -> list[object]:
    """All that a lab may leave on a machine."""
    root = runtime_root() / name
    found: list[object] = [f"process {pid}" for pid in util.marked(root)]
    found += machine.existing_netns(name)
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if name in line]
    found += list(Path("/sys/fs/cgroup").glob(f"*/tidegate-lab/{name}"))
    found += list(Path("/sys/fs/cgroup").glob(f"tidegate-lab/{name}"))
    if root.exists():
        found.append(root)
    return found


def cli(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", "tests.lab", "--name", name, *args]


def test_what_a_killed_up_left_is_cleaned_up(lab: Lab, other_name: str) -> None:
    """``lab`` also runs at that time, with the same addresses: the two must not see each other."""
    root = runtime_root() / other_name
    up = subprocess.Popen(cli(other_name, "up"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for((root / "node1/run/docker.sock").exists, 60, "a dockerd of the other lab runs")
    up.kill()
    up.communicate()
    left = util.marked(root)
    assert left
    with pytest.raises(LabError, match="does not run"):
        Lab.attach(other_name)

    other = Lab.up(other_name, nodes=1)
    assert not any(util.alive(pid) for pid in left)
    assert other.trouble() == ""
    assert Lab.up(other_name, nodes=1).nodes == other.nodes  # healthy: used again
    intruder = other.client_popen("sleep", "600")

    done = subprocess.run(cli(other_name, "down"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert intruder.wait(5) == -signal.SIGKILL
    assert traces(other_name) == []
    assert lab.trouble() == ""


def test_a_killed_builder_leaves_nothing_running() -> None:
    script = (
        "from tests.lab.builder import *\n"
        "with Builder(cache_root(), Progress(show=False)) as builder:\n"
        "    print('up', flush=True)\n"
        "    input()\n"
    )
    words = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as runner:
        assert runner.stdout
        assert runner.stdout.readline() == "up\n"
        root = runtime_root() / "_builder"
        assert util.marked(root)
        runner.kill()
    wait_for(lambda: not util.marked(root), 5, "the builder died with its runner")
