"""Writes what a benchmark found into docs/benchmarks.md, each into a section of its own.

A section is replaced as a whole by the run that made it, and says on which machine and when; what
stands outside the sections is written by people and stays. Plots and the figures as JSON go into
the directory `benchmarks` beside it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import percentile

FILE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Section:
    """What one benchmark found.

    Attributes:
        name: marks its place in the file.
        text: Markdown; a plot is named as `benchmarks/NAME.svg`.
        plots: SVG by NAME.
        data: every figure, for JSON; None for a section without.
    """

    name: str
    title: str
    text: str
    plots: Mapping[str, str] = field(default_factory=dict)
    data: Any = None


def write(section: Section, *, file: Path = FILE) -> None:
    """Put the section in its place, or at the end if it has none yet."""
    begin, end = f"<!-- begin {section.name} -->", f"<!-- end {section.name} -->"
    block = "\n".join(
        (begin, f"## {section.title}", paragraph(machine()), "", section.text.strip(), end)
    )
    text = file.read_text(encoding="utf-8") if file.exists() else "# Benchmarks\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: block, text)
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    file.write_text(text, encoding="utf-8")
    beside = file.with_suffix("")
    if section.plots or section.data is not None:
        beside.mkdir(exist_ok=True)
    for name, svg in section.plots.items():
        (beside / f"{name}.svg").write_text(svg, encoding="utf-8")
    if section.data is not None:
        found = {"scene": section.name, "machine": machine(), "samples": section.data}
        (beside / f"{section.name}.json").write_text(json.dumps(found, indent=1) + "\n")


def paragraph(*parts: str) -> str:
    """Prose, wrapped as the documentation is."""
    return textwrap.fill(" ".join(parts), 100, break_on_hyphens=False, break_long_words=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and, in brackets, range."""
    return (
        f"{statistics.median(values):.{digits}f} "
        f"({min(values):.{digits}f}–{max(values):.{digits}f})"  # noqa: RUF001
    )


def quantiles(values_ms: Sequence[float]) -> list[str]:
    """Number, p50, p99 and largest of some milliseconds, as cells of a table."""
    ordered = sorted(values_ms)
    shares = (0.5, 0.99, 1.0)
    return [str(len(ordered)), *(f"{percentile(ordered, share):.1f}" for share in shares)]


def machine() -> str:
    """One line: when and where this was measured, and how busy the machine was before."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    load = os.getloadavg()[0]
    return (
        f"Measured on {today}: {_processor()}, {os.cpu_count()} cores, {_memory()} GiB, Linux "
        f"{platform.release()}, {_nginx()}, Python {platform.python_version()}; load average at "
        f"the end: {load:.1f}."
    )


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found.group(1) if found else platform.machine()


def _memory() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _nginx() -> str:
    for program in ("openresty", "nginx", "/usr/sbin/nginx"):
        try:
            done = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        return done.stderr.strip().rpartition(": ")[2]
    return "no nginx"
