"""How long from a change of the static file to routing, with the pair on loopback.

Two standing backends take turns: `swap` replaces the only peer by the other one in one change, so
that the very first request after it tells; `add` puts one beside the other, which then has to
accept a connection (admission probe) and to get its turn. Requests are sent one after the other
on new connections; each took about 0.3 ms, which is part of every figure, as is the agent's
interval of looking at the file (20 ms: a change waits 10 ms on average).
"""

from __future__ import annotations

import random
import time

from bench.report import Section, paragraph, quantiles, table
from demo.pair import DemoError, Pair, Peer, Service, probe, temporary_directory

HOST = "app.localhost"
_LIMIT_SECONDS = 10.0


def _say(line: str) -> None:
    print(line, flush=True)


def _change(pair: Pair, peers: tuple[Peer, ...], name: str) -> tuple[float, float]:
    """Milliseconds until `name` answers first, and until anybody else answers last (0: at once)."""
    # Not in step with the agent's looks.
    time.sleep(random.uniform(0.05, 0.1))
    since = pair.write([Service(HOST, peers)])
    last_other = since
    first = 0.0
    settled = 0
    while settled < 20:
        answer = probe(pair.port, HOST)
        if answer.status != 200:
            raise DemoError(f"a request was answered {answer.status} during a change")
        if answer.backend == name:
            first = first or answer.at
        else:
            last_other = answer.at
        settled += bool(first)
        if answer.at - since > _LIMIT_SECONDS:
            raise DemoError(f"{name} did not answer within {_LIMIT_SECONDS:.0f} s")
    return (first - since) * 1000, (last_other - since) * 1000


def _only(pair: Pair, peer: Peer) -> None:
    pair.write([Service(HOST, (peer,))])
    pair.wait_peers(HOST, lambda peers: list(peers) == [peer.name], f"{peer.name} alone")


def measure(changes: int) -> Section:
    """Make that many changes of each kind, on an otherwise idle pair."""
    swap: list[float] = []
    last: list[float] = []
    add: list[float] = []
    with temporary_directory() as directory:
        pair = Pair(directory, say=_say)
        try:
            one, two = pair.backend("one"), pair.backend("two")
            pair.start([Service(HOST, (one.peer,))])
            current, other = one, two
            for _ in range(changes):
                first_ms, last_ms = _change(pair, (other.peer,), other.name)
                swap.append(first_ms)
                last.append(last_ms)
                current, other = other, current
            for _ in range(changes):
                first_ms, _last_ms = _change(pair, (current.peer, other.peer), other.name)
                add.append(first_ms)
                _only(pair, current.peer)
        finally:
            pair.stop()
    rows = [
        ["swap: first answer of the new peer", *quantiles(swap)],
        ["swap: last answer of the old peer", *quantiles(last)],
        ["add: first answer of the new peer", *quantiles(add)],
    ]
    about = paragraph(
        "One host, one or two peers, no other load; times from the replaced static file, in",
        "milliseconds. The agent looks at the file each 20 ms, so a change waits 10 ms on average",
        "before anything knows of it. `bench/change.py`.",
    )
    text = f"{about}\n\n{table(['what', 'changes', 'p50', 'p99', 'max'], rows)}"
    return Section("change-loopback", "From the static file to routing, on loopback", text)
