"""What the agent costs when nothing happens, with 100 services of a real Swarm.

CPU time and memory are those of the agent's main process, as the kernel counts them.
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.report import Section, paragraph, table
from tests.swarm.pair import Pair

_SETTLE_SECONDS = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _megabytes(pid: int, field: str) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) / 1024 if found else 0.0


def _row(pair: Pair, mode: str, seconds: float) -> list[str]:
    # pid 1 of the container may be an init; the agent is the one that has used most.
    pid = pair.lab.task_pid(pair.agent_container(), pair.lab.manager)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pid = max([pid, *(int(child) for child in children)], key=_cpu_seconds)
    time.sleep(_SETTLE_SECONDS)
    before, started = _cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    share = (_cpu_seconds(pid) - before) / (time.monotonic() - started)
    return [mode, f"{share:.2%}", f"{_megabytes(pid, 'Rss'):.0f}", f"{_megabytes(pid, 'Pss'):.0f}"]


def measure(pair: Pair, *, services: int = 100, seconds: float = 60.0) -> Section:
    """Make the services, let things settle, and look for that many seconds in each mode."""
    names = [f"idle{number}" for number in range(services)]
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: pair.create_app(name, replicas=0), names))
        for start in range(0, services, 10):
            chunk = names[start : start + 10]
            pair.lab.docker(
                pair.lab.manager, "service", "scale", "--detach", *(f"{name}=1" for name in chunk)
            )
            for name in chunk:
                pair.wait_peers(name, 1, timeout=180)
            print(f"  {start + len(chunk)} of {services} services run", flush=True)
        rows = [_row(pair, "watch", seconds)]
        pair.deploy(watch="off")
        rows.append(_row(pair, "poll, 500 ms", seconds))
    finally:
        pair.lab.docker(pair.lab.manager, "service", "rm", *names, check=False)
    about = paragraph(
        f"The agent with {services} services of one task each, two proxies, nothing changing; over",
        f"{seconds:.0f} s. CPU is the share of one core. `bench/swarm_idle.py`.",
    )
    text = f"{about}\n\n{table(['mode', 'CPU', 'RSS MiB', 'PSS MiB'], rows)}"
    return Section("agent-idle", "The agent at rest", text)
