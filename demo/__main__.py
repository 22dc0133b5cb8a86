"""`make demo`: the main promise on one machine in under a minute, measured while you watch.

Starts the pair on loopback, sends constant load without retries, replaces one backend after the
other (real processes that really end), adds a host, and says what was lost and what was reloaded.
With `--once` it ends there, with a code that is not zero unless all went as promised.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bench.load import LoadProcess, Plan, Result, percentile
from demo.pair import (
    ROOT,
    Backend,
    DemoError,
    Pair,
    ReloadWatch,
    Service,
    end_on_signals,
    probe,
    temporary_directory,
)

SUMMARY = ROOT / "demo" / "summary.json"
HOST = "app.localhost"
NEW_HOST = "new.localhost"
PEERS = 3
ROUNDS = 50
CHANGES_PER_ROUND = 3
RATE_KEEPALIVE = 300.0
RATE_NEW_CONNECTIONS = 150.0
ROUTED_WITHIN = 10.0
SITE_WITHIN = 20.0
SETTLE = 1.5


@dataclass
class Report:
    """What is measured on the way."""

    requests: int = 0
    failed: int = 0
    reconnects: int = 0
    membership_changes: int = 0
    reloads_for_membership: int = 0
    reloads_for_site: int = 0
    routed_ms: list[float] = field(default_factory=list)
    site_ms: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add_load(self, name: str, result: Result) -> None:
        """Count the requests of a load that has ended."""
        self.requests += result.requests
        self.failed += result.failed
        self.reconnects += result.reconnects
        if result.failed:
            self.problems.append(f"{name}: {result.summary()}")

    def add_probe(self, status: int) -> None:
        """Count a request that was made to see who answers."""
        self.requests += 1
        if status != 200:
            self.failed += 1
            self.problems.append(f"a probe of {HOST} was answered {status or 'not at all'}")

    def promised(self) -> bool:
        """Whether all went as promised."""
        return (
            not self.problems
            and self.failed == 0
            and self.reloads_for_membership == 0
            and self.reloads_for_site == 1
        )

    def as_dict(self) -> dict[str, Any]:
        """What goes to summary.json."""
        routed = sorted(self.routed_ms)
        return {
            "requests": self.requests,
            "failed": self.failed,
            "membership_changes": self.membership_changes,
            "reloads_for_membership": self.reloads_for_membership,
            "reloads_for_site": self.reloads_for_site,
            "change_to_routed_ms": {
                "p50": round(percentile(routed, 0.5), 2),
                "p99": round(percentile(routed, 0.99), 2),
            },
        }

    def text(self) -> str:
        """For people."""
        figures = self.as_dict()
        routed = figures["change_to_routed_ms"]
        rows = (
            (
                "requests",
                self.requests,
                f"no retries; idle connections reopened: {self.reconnects}",
            ),
            ("failed", self.failed, "anything but a 200 in time"),
            ("membership changes", self.membership_changes, "peers added, drained, removed"),
            ("reloads for membership", self.reloads_for_membership, "by workers and generation"),
            ("reloads for the host", self.reloads_for_site, f"live after {self.site_ms:.0f} ms"),
        )
        lines = [f"  {name:<22} {value:>8,}   {note}" for name, value, note in rows]
        lines += [
            f"  change to routed        p50 {routed['p50']:.1f} ms, p99 {routed['p99']:.1f} ms",
            "      from the replaced file to the new backend's first answer: noticing it, push,",
            f"      the admission probe, its turn among {PEERS + 1} peers, and the request itself",
        ]
        return "\n".join(["", *lines, ""])


def say(line: str) -> None:
    """A line for the person who watches."""
    print(line, flush=True)


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """Calls of what this yields, with a number of changes, move a bar (or print a line each 25)."""
    if not sys.stdout.isatty():
        done = 0

        def lines(changes: int) -> None:
            nonlocal done
            before, done = done, done + changes
            if done // 25 > before // 25 or done == total:
                say(f"  {done} of {total} membership changes")

        yield lines
        return
    columns = (TextColumn("  membership changes"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda changes: bar.advance(task, changes)


def await_backend(pair: Pair, name: str, since: float, report: Report) -> float:
    """Send requests on new connections until `name` answers one; milliseconds since `since`."""
    while True:
        answer = probe(pair.port, HOST)
        report.add_probe(answer.status)
        if answer.backend == name:
            return (answer.at - since) * 1000
        if answer.at - since > ROUTED_WITHIN:
            pair.check()
            raise DemoError(
                f"{name} was put into the static file {ROUTED_WITHIN:.0f} s ago and has not "
                f"answered one request of {HOST}. The agent's log says:\n"
                + (pair.agent.tail() if pair.agent else "")
            )


def replace_backend(pair: Pair, backends: list[Backend], new: Backend, report: Report) -> None:
    """Put `new` in the place of the oldest, the way a careful operator would."""
    old = backends[0]

    backends.append(new)
    since = pair.write([Service(HOST, tuple(b.peer for b in backends))])
    report.routed_ms.append(await_backend(pair, new.name, since, report))

    draining = tuple(b.draining if b is old else b.peer for b in backends)
    pair.write([Service(HOST, draining)])
    pair.wait_peers(HOST, lambda peers: peers.get(old.name) == "draining", f"{old.name} to drain")

    backends.remove(old)
    pair.write([Service(HOST, tuple(b.peer for b in backends))])
    pair.wait_peers(HOST, lambda peers: old.name not in peers, f"{old.name} to be gone")
    if not old.stop():
        report.problems.append(f"{old.name} did not end by itself, so it was still in use")
    report.membership_changes += CHANGES_PER_ROUND


def replace_backends(pair: Pair, backends: list[Backend], report: Report) -> None:
    """Add, drain and remove a backend, `ROUNDS` times over."""
    with progress(ROUNDS * CHANGES_PER_ROUND) as advance:
        for number in range(PEERS + 1, PEERS + ROUNDS + 1):
            replace_backend(pair, backends, pair.backend(f"backend-{number}"), report)
            advance(CHANGES_PER_ROUND)


def add_host(pair: Pair, backends: list[Backend], report: Report) -> None:
    """Add a host, and wait until it answers."""
    new = pair.backend("new-1")
    services = [Service(HOST, tuple(b.peer for b in backends)), Service(NEW_HOST, (new.peer,))]
    since = pair.write(services)
    while True:
        answer = probe(pair.port, NEW_HOST)
        if answer.status == 200:
            report.site_ms = (answer.at - since) * 1000
            return
        if answer.at - since > SITE_WITHIN:
            pair.check()
            raise DemoError(
                f"{NEW_HOST} is answered {answer.status}, {SITE_WITHIN:.0f} s after it was added. "
                "The agent's log says:\n" + (pair.agent.tail() if pair.agent else "")
            )
        time.sleep(0.01)


def counted_reloads(watch: ReloadWatch, generations: tuple[str, str]) -> int:
    """Reloads by the process table, and at least one if the generation says so."""
    return max(watch.count(), int(generations[0] != generations[1]))


def run_pair(pair: Pair, report: Report) -> None:
    """All of the demo between start and figures."""
    say(f"starting OpenResty, the agent and {PEERS} backends on loopback")
    backends = [pair.backend(f"backend-{number}") for number in range(1, PEERS + 1)]
    pair.start([Service(HOST, tuple(b.peer for b in backends))])

    urls = (f"http://127.0.0.1:{pair.port}/",)
    plan = Plan(urls=urls, hosts=(HOST,), rate=RATE_NEW_CONNECTIONS, keepalive=False)
    reusing = Plan(urls=urls, hosts=(HOST,), rate=RATE_KEEPALIVE, keepalive=True)
    say(
        f"load: {RATE_KEEPALIVE:.0f} requests a second on kept connections and "
        f"{RATE_NEW_CONNECTIONS:.0f} on new ones"
    )
    with LoadProcess(plan) as fresh, LoadProcess(reusing) as kept:
        before = pair.status()
        watch = ReloadWatch(int(before["master_pid"]))
        replace_backends(pair, backends, report)
        after = pair.status()
        report.reloads_for_membership = counted_reloads(
            watch, (before["generation"], after["generation"])
        )
        # A reload closes idle client connections, and a request that crosses such a close on its
        # way is lost: HTTP's own gap, which clients close by trying again. This one never does.
        report.add_load("load on kept connections", kept.stop())

        say(f"adding the host {NEW_HOST}: the one thing here that needs a reload")
        watch = ReloadWatch(int(after["master_pid"]))
        add_host(pair, backends, report)
        time.sleep(SETTLE)
        report.reloads_for_site = counted_reloads(
            watch, (after["generation"], pair.status()["generation"])
        )
        report.add_load("load on new connections", fresh.stop())
    pair.check()


def stay_up(pair: Pair) -> None:
    """Print the URLs, and wait for Ctrl-C."""
    say(
        f"""The pair stays up until Ctrl-C:
  demo              http://{HOST}:{pair.port}/ and http://{NEW_HOST}:{pair.port}/
                    curl -H 'Host: {HOST}' http://127.0.0.1:{pair.port}/
  agent's state     http://127.0.0.1:{pair.agent_port}/api/state
  agent's metrics   http://127.0.0.1:{pair.agent_port}/metrics
  nginx's metrics   http://127.0.0.1:{pair.admin_port}/metrics
  backends          edit {pair.services_file}
"""
    )
    while True:
        pair.check()
        time.sleep(0.5)


def demo(directory: Path, *, once: bool) -> bool:
    """Run it in `directory`; whether all went as promised."""
    report = Report()
    pair = Pair(directory, say=say)
    started = time.monotonic()
    try:
        run_pair(pair, report)
        SUMMARY.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        say(report.text())
        for problem in report.problems[:10]:
            say(f"problem: {problem}")
        say(
            f"{'as promised' if report.promised() else 'NOT as promised'}, "
            f"in {time.monotonic() - started:.0f} s; figures in {SUMMARY.relative_to(ROOT)}"
        )
        if not once:
            stay_up(pair)
    finally:
        pair.stop()
    return report.promised()


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the figures")
    once = parser.parse_args().once
    end_on_signals()
    try:
        with temporary_directory() as directory:
            return 0 if demo(directory, once=once) else 1
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("ended")
        return 130 if once else 0


if __name__ == "__main__":
    sys.exit(main())
