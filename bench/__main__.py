"""`make bench`: run the benchmarks, each into its section of docs/benchmarks.md.

    python -m bench                      all of it
    python -m bench steady churn         these scenes
    python -m bench --quick              a smoke run: seconds each, into build/bench, means nothing
    python -m bench --rounds 3 --only tidegate,haproxy push

Scenes beside other proxies, on loopback: steady, churn, push, dead, scale, reload; on the Swarm of
the lab: rolling. Of Tidegate alone: change and whole-path (100,000 simulated tasks) on loopback;
swarm-change, swarm-idle on the lab. A proxy that is not on this machine is left out, and that is
said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import change, report, swarm_change, swarm_idle
from bench import scale as whole_path
from bench.proxies.base import BenchError, Certificate, Peer, Proxy, Setup
from bench.report import FILE, Section, paragraph, table
from bench.scenes import churn, dead, push, reload, rolling, scale, steady
from bench.scenes.common import ALL, Options, directory, place, say
from demo.pair import ROOT, DemoError, end_on_signals
from tests.lab import LabError, missing_prerequisites

SCENES = {
    "steady": steady.run,
    "churn": churn.run,
    "push": push.run,
    "dead": dead.run,
    "scale": scale.run,
    "reload": reload.run,
}
SWARM = ("rolling", "swarm-change", "swarm-idle")
NAMES = (*SCENES, "change", "whole-path", *SWARM)
ROUNDS = 5
CHANGES = 100
SCALINGS = 100


def proxies_section(proxies: Sequence[type[Proxy]], left_out: Sequence[str]) -> Section:
    """Which proxies are measured, and with which settings: what they run with for 3 peers."""
    parts = []
    with directory() as home:
        bundle = home / "tls.pem"
        routes = {"app.localhost": tuple(Peer(f"b{n}", 10_000 + n) for n in (1, 2, 3))}
        for kind in proxies:
            proxy = kind()
            files = Certificate(home / "tls.crt", home / "tls.key", bundle)
            if kind.same_configuration_as:
                continue
            proxy.prepare(Setup(place(home, kind.key), routes, tls=files))
            proxy.port, proxy.tls_port, proxy.admin_port = 8000, 8443, 8081
            text = proxy.configuration().replace(str(home), "/tmp/bench").rstrip()
            parts.append(f"<details><summary>{kind.name}</summary>\n\n```\n{text}\n```\n</details>")
    rows = [
        [kind.name, kind.version(), kind.how, "yes" if kind.retries_by_default else "no"]
        for kind in proxies
    ]
    about = paragraph(
        "Each as its documentation has it run best; below with three peers, two workers and TLS.",
        "Where a scene has it without retries, `proxy_next_upstream` and `retries` are off; with",
        "them, Caddy has `retries`, Traefik its middleware. Ports and directories are others in",
        "each run. With 1,000 peers there is room for more idle connections; HAProxy checks its",
        "peers where there are at most 100.",
        *(f"Left out: {reason}." for reason in left_out),
    )
    found = table(["proxy", "version", "how peers change", "retries by default"], rows)
    return Section("proxies", "The proxies", "\n\n".join([about, found, *parts]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Tidegate.")
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--quick", action="store_true", help="smoke run; its figures mean nothing")
    parser.add_argument("--rounds", type=int, help=f"rounds of each case ({ROUNDS})")
    parser.add_argument("--only", default="", help="proxies, by key, with commas between (all)")
    parser.add_argument("--out", type=Path, help="the file to write into (docs/benchmarks.md)")
    return parser


def chosen_proxies(only: str) -> tuple[tuple[type[Proxy], ...], list[str]]:
    """The proxies that are wanted and here, and why others are not.

    Raises:
        BenchError: a key is not known.
    """
    keys = [key for key in only.split(",") if key]
    known = {kind.key: kind for kind in ALL}
    if unknown := set(keys) - set(known):
        raise BenchError(f"--only: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    wanted = [kind for kind in ALL if not keys or kind.key in keys]
    here, left_out = [], []
    for kind in wanted:
        if reason := kind.missing():
            left_out.append(f"{kind.name} ({reason})")
        else:
            here.append(kind)
    return tuple(here), left_out


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 for wrong usage."""
    end_on_signals()
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.scenes) - set(NAMES):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    wanted = options.scenes or list(NAMES)
    proxies, left_out = chosen_proxies(options.only)
    for reason in left_out:
        say(f"bench: left out: {reason}")
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    how = Options(rounds=rounds, quick=options.quick, proxies=proxies)
    file = options.out or (ROOT / "build" / "bench" / "benchmarks.md" if options.quick else FILE)
    file.parent.mkdir(parents=True, exist_ok=True)

    def put(section: Section, since: float) -> None:
        report.write(section, file=file)
        say(f"  {section.title}: {time.monotonic() - since:.0f} s")

    if set(wanted) & {*SCENES, "rolling"} and not options.only:
        put(proxies_section(proxies, left_out), time.monotonic())
    for name, scene in SCENES.items():
        if name in wanted:
            say(f"bench: {name}")
            since = time.monotonic()
            put(scene(how), since)
    if "change" in wanted:
        say("bench: change, from the static file to routing")
        since = time.monotonic()
        put(change.measure(10 if how.quick else CHANGES), since)
    if "whole-path" in wanted:
        say("bench: whole-path, a simulated Swarm")
        since = time.monotonic()
        services, rate, seconds = (100, 50, 4) if how.quick else (10_000, 500, 20)
        put(whole_path.measure(services, 10, rate, seconds), since)
    _on_swarm([name for name in SWARM if name in wanted], how, put)
    say(f"bench: results are in {file}")
    return 0


def _on_swarm(wanted: list[str], how: Options, put: object) -> None:
    assert callable(put)
    missing = missing_prerequisites() if wanted else []
    if missing:
        say(f"bench: {', '.join(wanted)} left out: {'; '.join(missing)}")
        return
    if not wanted:
        return
    with swarm_change.deployed() as pair:
        since = time.monotonic()
        if "rolling" in wanted:
            say("bench: rolling")
            put(rolling.measure(pair, how), since)
        since = time.monotonic()
        if "swarm-change" in wanted:
            say("bench: swarm-change, from the manager's store to routing")
            put(swarm_change.measure(pair, 3 if how.quick else SCALINGS), since)
        since = time.monotonic()
        if "swarm-idle" in wanted:
            say("bench: swarm-idle, the agent at rest")
            services, seconds = (3, 5.0) if how.quick else (100, 30.0)
            put(swarm_idle.measure(pair, services=services, seconds=seconds), since)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BenchError, DemoError, LabError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        sys.exit(1)
