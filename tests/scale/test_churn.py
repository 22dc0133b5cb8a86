"""The whole path, from a manager's Watch to nginx, while many tasks change every second.

Small enough for every run; `bench/scale.py` does the same with 10,000 services of 10 tasks.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.dataplane.harness import Proxy, free_port
from tests.scale.simulation import SimulatedSwarm

ROOT = Path(__file__).parents[2]
CHANGES_PER_SECOND = 500
SECONDS = 4


@contextmanager
def running_agent(directory: Path, settings: str) -> Iterator[str]:
    """An agent as a process of its own; gives the URL of its listener."""
    port = free_port()
    config = directory / "config.toml"
    config.write_text(f'ListenAddr = "127.0.0.1:{port}"\n{settings}')
    command = [sys.executable, "-m", "agent.cli", "run", "-c", str(config)]
    with (directory / "agent.log").open("wb") as log:
        agent = subprocess.Popen(command, cwd=ROOT, stderr=log, env={**os.environ})
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            agent.terminate()
            agent.wait(20)


def eventually(condition, *, within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(name="swarm")
def _swarm(tmp_path: Path) -> Iterator[SimulatedSwarm]:
    swarm = SimulatedSwarm(tmp_path, services=200, tasks=5)
    yield swarm
    swarm.stop()


def applied(proxy: Proxy, service: int) -> dict[str, str]:
    answer = proxy.admin.call("GET", f"/v1/membership/app{service:05d}.test%2F")
    if answer.status != 200:
        return {}
    return {peer["id"]: peer["address"] for peer in answer.json()["peers"]}


def test_five_hundred_task_changes_a_second_all_arrive(
    swarm: SimulatedSwarm, tmp_path: Path
) -> None:
    with Proxy(tmp_path / "nginx") as proxy:
        settings = (
            swarm.settings()
            + f'[OpenResty]\nURLs = ["http://127.0.0.1:{proxy.admin_port}"]\n'
            + f'[[Extensions]]\nName = "nginx"\nPort = {free_port()}\n'
        )
        with running_agent(tmp_path, settings) as url:

            def is_ready() -> bool:
                try:
                    return requests.get(f"{url}/readyz", timeout=5).ok
                except requests.ConnectionError:
                    return False

            eventually(is_ready, within=60, what="the agent is not ready")
            eventually(lambda: len(proxy.workers()) == 2, within=10, what="old workers stay")
            pids = proxy.workers()
            chance = random.Random(1)
            began = time.monotonic()
            for number in range(CHANGES_PER_SECOND * SECONDS // 4):
                swarm.replace_task(chance.randrange(swarm.services), chance.randrange(swarm.tasks))
                due = began + number * 4 / CHANGES_PER_SECOND
                time.sleep(max(0.0, due - time.monotonic()))
            eventually(
                lambda: all(applied(proxy, n) == swarm.peers(n) for n in range(swarm.services)),
                within=30,
                what="OpenResty does not hold what the Swarm runs",
            )
            state = requests.get(f"{url}/api/state", timeout=10).json()
            metrics = requests.get(f"{url}/metrics", timeout=10).text
        assert proxy.workers() == pids, "a change of tasks made nginx reload"
    assert state["rejections"] == []
    assert 'tidegate_watch_mode{mode="watch",source="swarm"} 1.0' in metrics
