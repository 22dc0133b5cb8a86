"""Snapshot and settings in, what every OpenResty instance shall serve out.

The work is in three steps, each of which is done again only for what changed:

1. *Examine* one workload (`workloads`, with `tls`, `reach`, `networks`, `addresses`, `peers`):
   labels → route declaration → address and port of each instance. Depends on that workload, the
   settings and the networks of the proxies, and on nothing else.
2. *Settle* one name, host or alias (`settle`, with `claims`, `conflicts`): who of those that claim
   it gets which context root, and which TLS the name has. Depends on the claims to that name, and
   on what the `register` knows of it from before.
3. *Build* (`site`, `membership`): hosts with their aliases, upstreams with their peers. What comes
   out equal to what was there before is the same object, so that a difference is found by identity.

A claim is what a workload says about a name; its peers are no part of it. So a task that comes or
goes touches step 1 of its workload and its own upstreams, however many others there are.
`compiler` drives the steps, `intake` says what changed since the last snapshot, `rejections` keeps
the reasons.

Nothing here does input or output, and nothing here raises on what a workload says: what cannot be
served becomes a `Rejection`. The one thing remembered over time is what lingers: a host that
nobody claims any more stays in the site, without peers, for `Settings.host_linger` seconds.

Others import from this package, not from its modules.
"""

from __future__ import annotations

from agent.compile.addresses import place_of, vip_of
from agent.compile.claims import Claim, ClaimId
from agent.compile.compiler import Compiler, compile_snapshot
from agent.compile.membership import MAX_PEERS
from agent.compile.names import DEFAULT, told
from agent.compile.reach import Reach, Way
from agent.compile.workloads import Examined, Route, examine, proxy_containers

__all__ = (
    "DEFAULT",
    "MAX_PEERS",
    "Claim",
    "ClaimId",
    "Compiler",
    "Examined",
    "Reach",
    "Route",
    "Way",
    "compile_snapshot",
    "examine",
    "place_of",
    "proxy_containers",
    "told",
    "vip_of",
)
