"""What instances tell of their certificates, as rejections.

A host whose certificate cannot be used, or a route whose CA is missing, is refused by the instance
itself, alone and until it is cured; the agent passes on what and why. Must not talk to anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.driver.openresty import CertificateProblem
from agent.model import Rejection, Site

_HINTS = {
    "missing": "Put the file where the label or setting says, inside the OpenResty container "
    "(SSLCertPath, or a secret).",
    "unreadable": "Put a PEM file there, without a pass phrase, that OpenResty's user may read.",
    "key_mismatch": "Put certificate and key there that belong together, the host's certificate "
    "before those of its issuers.",
    "name_mismatch": "Order a certificate for all names of the host, or take the others off.",
    "expired": "Renew it.",
    "expires_soon": "Renew it; is whatever renews it still at work?",
    "not_yet_valid": "Look at the clocks, or wait.",
    "no_room": "Start OpenResty with a larger TIDEGATE_DICT_SIZE.",
}
REASONS = frozenset(
    {f"certificate_{what}" for what in _HINTS}
    | {f"{kind}_ca_{what}" for kind in ("client", "backend") for what in ("missing", "unreadable")}
)
"""All reasons that an instance tells."""

_CURED = " A change of the file is taken in within seconds, without a reload."


def rejections(
    problems: Iterable[CertificateProblem], site: Site, instance: str
) -> tuple[Rejection, ...]:
    """A rejection for each problem, and each route that it concerns.

    Args:
        site: what the instance was given; tells whose the TLS towards peers is.
    """
    return tuple(
        Rejection(
            subject=subject,
            reason=problem.reason,
            message=f"OpenResty {instance}: {problem.message}; "
            + ("refused until that is cured" if problem.refused else "served nevertheless"),
            hint=_HINTS.get(problem.reason.partition("_")[2].removeprefix("ca_"), "Mend the file.")
            + _CURED,
            served=not problem.refused,
        )
        for problem in problems
        for subject in _subjects(problem, site)
    )


def whose(problem: CertificateProblem) -> str:
    """Whose certificate or CA it is, for the log."""
    if problem.host is None:
        return f"TLS towards peers, identity {problem.backend}"
    return f"host {problem.host}" if problem.host else "default certificate"


def _subjects(problem: CertificateProblem, site: Site) -> Iterator[str]:
    if problem.host is not None:
        yield whose(problem)
        return
    routes = [(host.name, location) for host in site.hosts for location in host.locations]
    routes += [("", location) for location in site.default]
    for host, location in routes:
        tls = location.backend_tls
        if tls is not None and tls.identity(host) == problem.backend:
            yield f"upstream {location.upstream}"
