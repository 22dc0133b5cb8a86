"""The site: hosts with their aliases, the default backend and TCP ports, made of settled names.

Built name by name, and only for names that changed; what comes out equal is the same object as
before, so that a difference is found by identity and an equal site costs no reload. Must not look
at peers: that they come and go must not show here.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from agent.compile.claims import ClaimId
from agent.compile.conflicts import mirror_unknown
from agent.compile.names import DEFAULT, is_host, is_tcp, tcp_port
from agent.compile.register import Register
from agent.compile.rejections import Ledger
from agent.compile.settle import Slot
from agent.compile.workloads import Route
from agent.model import Host, Location, Redirect, Rejection, Site, TcpRoute


class SiteBuilder:
    """Builds the site.

    Args:
        register: the names as they are settled.
        routes: every route that can be served, to name who asked for something.
        ledger: where to note what is not as a route asks for.
    """

    def __init__(self, register: Register, routes: Mapping[ClaimId, Route], ledger: Ledger) -> None:
        self._register = register
        self._routes = routes
        self._ledger = ledger
        self._hosts: dict[str, Host] = {}
        self._default: tuple[Location, ...] = ()
        self._tcp: dict[int, str] = {}
        self._site = Site(())
        self._changed = False

    def update(self, touched: Set[str]) -> None:
        """Build again what depends on these names."""
        for name in sorted(touched | self._register.mirrored_by(touched)):
            if is_host(name):
                self._update_host(name)
            elif is_tcp(name):
                self._update_tcp(name)
            else:
                self._update_default()

    def site(self) -> Site:
        """All of it; the same object for as long as it is equal."""
        if self._changed:
            site = Site(
                hosts=tuple(self._hosts[name] for name in sorted(self._hosts)),
                default=self._default,
                tcp=tuple(TcpRoute(port, self._tcp[port]) for port in sorted(self._tcp)),
            )
            if site != self._site:
                self._site = site
            self._changed = False
        return self._site

    def _update_host(self, name: str) -> None:
        new = self._host(name)
        if new == self._hosts.get(name):
            return
        self._changed = True
        if new is not None:
            self._hosts[name] = new
        else:
            del self._hosts[name]

    def _update_default(self) -> None:
        default = self._locations(DEFAULT)
        self._changed = self._changed or default != self._default
        self._default = default

    def _update_tcp(self, name: str) -> None:
        port = tcp_port(name)
        before = self._tcp.pop(port, None)
        if self._register.slots(name):
            self._tcp[port] = name + "/"
        self._changed = self._changed or before != self._tcp.get(port)

    def _host(self, name: str) -> Host | None:
        table = self._register.own_table(name)
        if table is None:
            self._ledger.note(("mirror", name), ())
            return None
        aliases = self._register.aliases(name)
        redirects = (
            Redirect(each, target)
            for each in (name, *aliases)
            if (target := self._register.redirect(each))
        )
        opened = table.slots[0].root == "/"
        return Host(
            name=name,
            aliases=aliases,
            locations=self._locations(name),
            tls=table.tls,
            redirects=tuple(sorted(redirects, key=lambda redirect: redirect.host)),
            passthrough=name + "/" if table.passthrough and opened else "",
        )

    def _locations(self, name: str) -> tuple[Location, ...]:
        rejections: list[Rejection] = []
        locations = []
        for slot in self._register.slots(name):
            mirror = self._mirror(name, slot)
            if isinstance(mirror, Rejection):
                rejections.append(mirror)
                mirror = ""
            locations.append(_location(name, slot, mirror))
        self._ledger.note(("mirror", name), tuple(rejections))
        return tuple(locations)

    def _mirror(self, name: str, slot: Slot) -> str | Rejection:
        """The upstream that a slot is mirrored to; empty for none.

        Returns:
            A rejection where there is no such upstream; what lingers has nobody to be told.
        """
        if slot.options.mirror is None:
            return ""
        host, root = slot.options.mirror
        found = any(known.root == root for known in self._register.slots(host))
        upstream = (self._register.folded_into(host) or host) + root if found else ""
        if upstream and upstream != name + slot.root:
            return upstream
        if not slot.winners:
            return ""
        why = "that is the route itself" if upstream else "there is no such route"
        claim = self._routes[slot.winners[0]].claim
        return mirror_unknown(name, slot.root, claim, host + root, why)


def _location(name: str, slot: Slot, mirror: str) -> Location:
    return Location(
        path=slot.root,
        upstream=name + slot.root,
        rewrite=slot.options.rewrite,
        tls_only=slot.options.tls_only,
        websocket_endpoints=slot.websocket_endpoints,
        backend_tls=slot.options.backend_tls,
        protocol=slot.options.protocol,
        mirror=mirror,
        directives=slot.options.directives,
        request_buffering=slot.options.request_buffering,
    )
