"""The whole path at 10,000 services of 10 tasks: how long, how much memory, what a change costs.

The Swarm is simulated (`tests/scale/simulation.py`), agent and OpenResty are real.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import requests

from bench.report import Section, paragraph, table
from demo.pair import DemoError
from tests.dataplane.harness import Proxy, free_port
from tests.scale.simulation import SimulatedSwarm

ROOT = Path(__file__).resolve().parents[1]
CHANGES_PER_REPLACEMENT = 4
READY_LIMIT = 300.0


def measure(services: int = 10_000, tasks: int = 10, rate: int = 500, seconds: int = 20) -> Section:
    """Start an agent beside a large Swarm, let tasks change, start it once more."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        swarm = SimulatedSwarm(directory, services=services, tasks=tasks)
        try:
            with Proxy(directory / "nginx") as proxy:
                return _measure(swarm, proxy, directory, rate=rate, seconds=seconds)
        finally:
            swarm.stop()


def _measure(
    swarm: SimulatedSwarm, proxy: Proxy, directory: Path, *, rate: int, seconds: int
) -> Section:
    rows = []
    with _Agent(directory, swarm, proxy) as agent:
        rows.append(
            ["first start: until OpenResty holds all and runs the site", agent.until_ready()]
        )
        rows.append(["agent's memory then (RSS, peak)", agent.memory()])
        cpu = agent.cpu()
        before = agent.applied()
        chance = random.Random(1)
        began = time.monotonic()
        for number in range(rate * seconds // CHANGES_PER_REPLACEMENT):
            swarm.replace_task(chance.randrange(swarm.services), chance.randrange(swarm.tasks))
            due = began + number * CHANGES_PER_REPLACEMENT / rate
            time.sleep(max(0.0, due - time.monotonic()))
        took = time.monotonic() - began
        _await(lambda: _in_step(swarm, proxy), 60, "OpenResty does not hold what the Swarm runs")
        used = 100 * (agent.cpu() - cpu) / took
        rows.append(
            [f"{rate} task changes a second for {took:.0f} s: the agent's CPU", f"{used:.0f} %"]
        )
        rows.append(["change to applied meanwhile: at most 25, 100 ms", agent.shares(before)])
        rows.append(["agent's memory then (RSS, peak)", agent.memory()])
    with _Agent(directory, swarm, proxy) as agent:
        rows.append(
            ["agent started again: until it knows that all is in step", agent.until_ready()]
        )
    rows.append(["OpenResty's workers (PSS)", _workers(proxy)])
    started = time.monotonic()
    proxy.stop()
    stopped = time.monotonic()
    proxy.start(timeout=READY_LIMIT)
    back = time.monotonic() - stopped
    rows.append(
        [
            "OpenResty restarted: until it answers, from its disk, with all these hosts",
            f"{back:.2f} s",
        ]
    )
    rows.append(["", f"(ending took {stopped - started:.2f} s)"])
    text = "\n\n".join(
        (
            paragraph(
                f"{swarm.services:,} services of {swarm.tasks} tasks each, simulated from what a "
                "real manager answered (its engine API and its Watch); agent and OpenResty as they "
                "are, all on this machine. `bench/scale.py`."
            ),
            table(["what", "measured"], rows),
        )
    )
    return Section("scale", f"{swarm.services * swarm.tasks:,} tasks", text)


def _in_step(swarm: SimulatedSwarm, proxy: Proxy) -> bool:
    chance = random.Random(time.monotonic())
    for service in chance.sample(range(swarm.services), 50):
        answer = proxy.admin.call("GET", f"/v1/membership/app{service:05d}.test%2F")
        if answer.status != 200:
            return False
        peers = {peer["id"]: peer["address"] for peer in answer.json()["peers"]}
        if peers != swarm.peers(service):
            return False
    return True


def _workers(proxy: Proxy) -> str:
    sizes = []
    for pid in sorted(proxy.workers()):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss: +(\d+)", rollup, re.MULTILINE)
        sizes.append(f"{int(found[1]) / 1024:.0f}" if found else "?")
    return " and ".join(sizes) + " MB"


class _Agent:
    """An agent as a process of its own."""

    def __init__(self, directory: Path, swarm: SimulatedSwarm, proxy: Proxy) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._config = directory / "config.toml"
        self._log = directory / "agent.log"
        self._config.write_text(
            f'ListenAddr = "127.0.0.1:{port}"\n{swarm.settings()}RequestTimeout = "60s"\n'
            f'[OpenResty]\nURLs = ["http://127.0.0.1:{proxy.admin_port}"]\n'
            f'[[Extensions]]\nName = "nginx"\nPort = {free_port()}\n'
        )

    def __enter__(self) -> _Agent:
        command = [sys.executable, "-m", "agent.cli", "run", "-c", str(self._config)]
        self._started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def until_ready(self) -> str:
        def ready() -> bool:
            try:
                return requests.get(f"{self._url}/readyz", timeout=30).ok
            except requests.RequestException:
                return False

        _await(ready, READY_LIMIT, f"the agent is not ready:\n{self._log.read_text()[-2000:]}")
        return f"{time.monotonic() - self._started:.1f} s"

    def memory(self) -> str:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        sizes = [
            int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) / 1024  # type: ignore[index]
            for name in ("VmRSS", "VmHWM")
        ]
        return f"{sizes[0]:.0f} MB, {sizes[1]:.0f} MB"

    def cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def applied(self) -> dict[float, float]:
        """The histogram of change-to-applied: limit in seconds to how many were below."""
        text = requests.get(f"{self._url}/metrics", timeout=30).text
        pattern = (
            r'^tidegate_change_to_applied_seconds_bucket\{[^}]*kind="membership"[^}]*le="([^"]+)"'
            r"[^}]*\} (\S+)|"
            r'^tidegate_change_to_applied_seconds_bucket\{[^}]*le="([^"]+)"[^}]*kind="membership"'
            r"[^}]*\} (\S+)"
        )
        found = re.findall(pattern, text, re.MULTILINE)
        return {float(a or c): float(b or d) for a, b, c, d in found}

    def shares(self, before: dict[float, float]) -> str:
        now = self.applied()
        count = {limit: value - before.get(limit, 0.0) for limit, value in now.items()}
        total = count.get(float("inf"), 0.0)
        if not total:
            return "nothing was applied"
        return ", ".join(f"{100 * count[limit] / total:.1f} %" for limit in (0.025, 0.1))


def _await(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(what)
        time.sleep(0.1)
