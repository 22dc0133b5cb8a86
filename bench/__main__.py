"""`make bench`: run the benchmarks, each into its section of docs/benchmarks.md.

Without arguments all of them; else those that are named.
"""

from __future__ import annotations

import sys

from bench import change, swarm_change, swarm_idle, throughput
from bench.report import FILE, write
from demo.pair import DemoError, end_on_signals
from tests.lab import LabError, missing_prerequisites

LOOPBACK = ("throughput", "change")
SWARM = ("swarm-change", "swarm-idle")


ROUNDS, SECONDS = 9, 3
CHANGES = 200
SCALINGS = 50


def main(chosen: list[str]) -> int:
    """Returns the exit code: 0, or 2 for a name that is not known."""
    end_on_signals()
    unknown = set(chosen) - {*LOOPBACK, *SWARM}
    if unknown:
        print(f"bench: unknown: {', '.join(unknown)}; known: {', '.join(LOOPBACK + SWARM)}")
        return 2
    wanted = chosen or [*LOOPBACK, *SWARM]
    if "throughput" in wanted:
        print("throughput beside a static upstream", flush=True)
        write(throughput.measure(ROUNDS, SECONDS))
    if "change" in wanted:
        print("from the static file to routing", flush=True)
        write(change.measure(CHANGES))
    on_swarm = [name for name in wanted if name in SWARM]
    missing = missing_prerequisites() if on_swarm else []
    if missing:
        print(f"bench: {', '.join(on_swarm)} left out: {'; '.join(missing)}")
    elif on_swarm:
        with swarm_change.deployed() as pair:
            if "swarm-change" in wanted:
                print("from the manager's store to routing", flush=True)
                write(swarm_change.measure(pair, SCALINGS))
            if "swarm-idle" in wanted:
                print("the agent at rest, 100 services", flush=True)
                write(swarm_idle.measure(pair))
    print(f"bench: results are in {FILE}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (DemoError, LabError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        sys.exit(1)
