"""What a workload says about the names it wants: a claim, and what of it must agree with others'.

A claim has no peers. So a task that comes or goes leaves the claim the same object, and nothing
that is made of claims alone (hosts, TLS, context roots) is looked at again. Must not decide between
claims: that is `settle`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from agent.compile.names import DEFAULT, is_host, is_tcp, tcp_name
from agent.labels import RouteDeclaration
from agent.model import BackendTls, Canary, Policy, Protocol, Tls, WorkloadKey, WorkloadKind


class ClaimId(NamedTuple):
    """Identity of a claim: the workload, and the name of its route."""

    workload: WorkloadKey
    route: str


class Options(NamedTuple):
    """What must agree where several workloads serve one host and context root."""

    rewrite: bool = False
    tls_only: bool = False
    tls: Tls | None = None
    passthrough: bool = False
    backend_tls: BackendTls | None = None
    protocol: Protocol = Protocol.HTTP
    mirror: tuple[str, str] | None = None
    directives: tuple[str, ...] = ()
    request_buffering: bool = True
    policy: Policy = Policy()


@dataclass(frozen=True, slots=True)
class Claim:
    """What one route of a workload says about the names it wants; without peers.

    Attributes:
        tls, backend_tls: with paths inside the OpenResty container; `tls` without HSTS.
        hsts: the header's value, empty for none; None where the labels say nothing of it.
    """

    id: ClaimId
    created: float
    subject: str
    declaration: RouteDeclaration
    tls: Tls | None
    backend_tls: BackendTls | None = None
    hsts: str | None = None
    kind: WorkloadKind = WorkloadKind.SERVICE

    @property
    def order(self) -> tuple[float, ClaimId]:
        """Who was first keeps what is contested."""
        return self.created, self.id

    @property
    def names(self) -> tuple[str, ...]:
        """The host and its aliases, and what else it is to be had by."""
        route = self.declaration
        names = (route.host, *route.aliases) if route.host else ()
        if route.default_backend:
            names = (*names, DEFAULT)
        if route.tcp_port is not None:
            names = (*names, tcp_name(route.tcp_port))
        return names

    def root(self, name: str) -> str:
        """The context root that it wants of that name."""
        return "/" if is_tcp(name) else self.declaration.context_root

    def canary(self, name: str) -> Canary | None:
        """What it takes of that name as a canary; connections cannot be told apart for that."""
        return None if is_tcp(name) else self.declaration.canary

    def options(self, name: str) -> Options:
        """What it says of that name."""
        route = self.declaration
        if is_tcp(name):
            return Options(policy=route.policy)
        # A host that nobody claims has no TLS of anybody's, and so is not redirected to it.
        host = name != DEFAULT
        return Options(
            rewrite=route.rewrite,
            tls_only=host and route.tls_only,
            tls=self.tls if host else None,
            passthrough=host and route.passthrough,
            backend_tls=self.backend_tls,
            protocol=route.protocol,
            mirror=route.mirror,
            directives=route.directives,
            request_buffering=route.request_buffering,
            policy=route.policy,
        )

    def says_tls(self, name: str) -> bool:
        """Whether it says anything about TLS of that name."""
        route = self.declaration
        return is_host(name) and (route.tls is not None or route.passthrough)
