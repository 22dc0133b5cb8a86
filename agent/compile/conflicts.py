"""What people are told of claims that cannot be had as they are asked for.

Words only: who gets what is decided in `settle` and `site`, which come here with the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.compile.claims import Claim
from agent.compile.names import is_tcp, told
from agent.labels import Reason, RouteDeclaration
from agent.model import Rejection

OPTION_LABELS: Mapping[str, Callable[[RouteDeclaration], str]] = {
    "rewrite": lambda route: route.label("context_root_rewrite"),
    "tls_only": lambda route: route.label("ssl_only"),
    "tls": lambda route: (
        f"{route.label('ssl')}, {route.label('ssl_cert')} or {route.label('ssl_cert_key')}"
    ),
    "passthrough": lambda route: route.label("ssl_passthrough"),
    "backend_tls": lambda route: f"{route.label('ssl_backend')} and what belongs to it",
    "protocol": lambda route: route.label("protocol"),
    "mirror": lambda route: route.label("mirror"),
    "directives": lambda route: route.label("backend_option"),
    "request_buffering": lambda route: route.label("request_buffering"),
}
"""How people know each of `claims.Options` but the policy: the labels that set it."""

POLICY_LABELS = {
    "algorithm": "balance_algorithm",
    "hash_key": "hash_key",
    "hash_balance": "hash_balance",
    "sticky": "sticky",
    "slow_start": "slow_start",
    "max_conns": "max_conns",
    "queue": "queue",
    "queue_timeout": "queue_timeout",
    "check": "health_check",
    "passive": "eject_failures",
    "panic": "panic",
    "retry": "retries",
    "circuit": "circuit_error_ratio",
    "timeouts": "read_timeout",
}
"""Each field of a policy that claims may differ in: the label, or the first of several."""
_GROUPS = frozenset({"sticky", "check", "passive", "retry", "circuit", "timeouts"})


def policy_difference(claim: Claim, holder: Claim) -> str:
    """What of the balancing policy two claims do not agree on, in the words of labels."""
    mine, theirs = claim.declaration.policy, holder.declaration.policy
    labels = [
        claim.declaration.label(option) + (" or what belongs to it" if field in _GROUPS else "")
        for field, option in POLICY_LABELS.items()
        if getattr(mine, field) != getattr(theirs, field)
    ]
    return f"the balancing policy ({', '.join(labels)})"


def conflict(name: str, claim: Claim, holder: Claim, differ: list[str]) -> Rejection:
    """That a context root of a name is served by others, with other options.

    Args:
        holder: the oldest claim of those who have it.
        differ: what the two do not agree on, in the words of labels.
    """
    if is_tcp(name):
        hint = "Choose another port of the proxy."
    else:
        hint = (
            f"Give {claim.subject} the same options as {holder.subject} to have both serve it, "
            "or another host or context root."
        )
    return _reject(
        claim,
        Reason.CONFLICT,
        f"{told(name, claim.root(name))} is held by {holder.subject}, which is older, and "
        f"{claim.subject} asks for it with other options: {', '.join(differ)}.",
        hint,
    )


def tls_conflict(name: str, claim: Claim, decider: Claim) -> Rejection:
    """That a name has other TLS than one of its claims asks for."""
    route = claim.declaration
    return _reject(
        claim,
        Reason.TLS_CONFLICT,
        f"{name} has its TLS from {decider.subject}, which is older, and {claim.subject} asks for "
        f"other TLS ({route.label('ssl')}, {route.label('ssl_cert')}, "
        f"{route.label('ssl_cert_key')}) on another context root of that host.",
        f"Remove the TLS labels of {claim.subject}, which then has the TLS of the host, or make "
        f"them equal to those of {decider.subject}.",
    )


def redirect_conflict(name: str, claim: Claim, holder: Claim, target: str) -> Rejection:
    """That a name stays where a claim wants it to be redirected to `target`."""
    return _reject(
        claim,
        Reason.CONFLICT,
        f"{name} is held by {holder.subject}, which is older and does not redirect it to {target}, "
        f"as {claim.subject} asks for.",
        f"Give {holder.subject} the same {claim.declaration.label('redirects')}, or remove them.",
    )


def mirror_unknown(name: str, root: str, claim: Claim, mirror: str, why: str) -> Rejection:
    """That a route is not mirrored, and lives nevertheless.

    Args:
        mirror: host and context root that it is to be mirrored to.
        why: what is wrong with that, a clause.
    """
    return _reject(
        claim,
        Reason.MIRROR_UNKNOWN,
        f"{claim.declaration.label('mirror')}={mirror}: {why}, so {told(name, root)} is not "
        "mirrored.",
        "Name the host and the context root of another route, for example shadow.example.com or "
        "shadow.example.com/api.",
    )


def _reject(claim: Claim, reason: Reason, message: str, hint: str) -> Rejection:
    return Rejection(
        subject=claim.subject,
        reason=reason.value,
        message=message,
        hint=hint,
        source=claim.id.workload.source,
    )
