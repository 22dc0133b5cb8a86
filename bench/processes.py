"""What processes cost, as the kernel counts it: CPU time and memory of a proxy with all it started.

This module only looks; it must not start or end anything.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def tree(roots: Iterable[int]) -> list[int]:
    """The processes and all below them, each once; those that are gone are left out."""
    pending, found = list(roots), []
    while pending:
        pid = pending.pop()
        if pid in found:
            continue
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        found.append(pid)
        for thread in threads:
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{thread}/children").read_text()
                pending += [int(child) for child in text.split()]
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU time so far of the processes, of all below them, and of those below that have ended.

    To the nanosecond for what runs (all threads), to a tick (10 ms) for children that have ended.
    """
    total = 0.0
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text()
                    total += int(text.split()[0]) / 1e9
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(stat[13]) + int(stat[14])) / _TICKS
    return total


def pss_mb(roots: Iterable[int]) -> float:
    """Memory of the processes and all below them, shared pages divided among those that share."""
    return sum(memory_mb(pid, "Pss") for pid in tree(roots))


def memory_mb(pid: int, field: str) -> float:
    """A field of smaps_rollup (`Pss`, `Rss`, `Private_Dirty`) in MiB; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
        return int(found.group(1)) / 1024 if found else 0.0
    return 0.0


def busy_seconds() -> float:
    """CPU time of the whole machine so far, idle and waiting left out."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS


def pin(roots: Iterable[int], cores: Iterable[int]) -> None:
    """Keep the processes, and all below them with all their threads, on these cores."""
    chosen = set(cores)
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), chosen)
