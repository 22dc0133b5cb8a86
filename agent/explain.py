"""Why something is routed, or is not: each step from a label to a peer.

The answers come from the same functions that decide (`agent.labels`, `agent.compile`), so that an
explanation cannot differ from what is done. Pure: a snapshot, the settings, the `Desired` made
from them and what OpenResty is known to have refused of it go in, text comes out. How it is shown
is the business of the command line and the API.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agent.compile import (
    Examined,
    Route,
    Way,
    examine,
    place_of,
    proxy_containers,
    told,
    vip_of,
)
from agent.config.settings import Settings
from agent.labels import INTERLOCK, Reason, forms, subject_of
from agent.model import (
    Canary,
    Desired,
    Host,
    Instance,
    InstanceState,
    Location,
    Peer,
    PeerState,
    Rejection,
    Snapshot,
    SourceSnapshot,
    TcpRoute,
    Upstream,
    Workload,
    WorkloadKind,
)

MAX_SUBJECTS = 5
"""More matches than this are listed by name instead of explained."""

_SHORTEST_PREFIX = 3
_SHOWN_IDS = 12


class Outcome(StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "failed"
    """What was asked for stops here, or this part of it does."""
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the way from label to peer: how it ended, a sentence, and the cure if failed."""

    outcome: Outcome
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Account:
    """The steps of one host, workload or instance, in order.

    Attributes:
        kind: "host", "service", "container", "static service" or "instance".
        routed: whether requests reach a peer by it now, as it asks for it.
        refused: not routed as it asks for because OpenResty refused that; what OpenResty accepted
            of it before, if anything, serves on.
    """

    kind: str
    name: str
    routed: bool
    steps: tuple[Step, ...]
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to `explain NAME`.

    Attributes:
        accounts: what the name stands for; empty where nothing matches.
        suggestions: names that may have been meant, or all that match where there are too many.
    """

    query: str
    accounts: tuple[Account, ...]
    suggestions: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the name stands for anything."""
        return bool(self.accounts)

    @property
    def routed(self) -> bool:
        """Whether everything that the name stands for is routed."""
        return self.found and all(account.routed for account in self.accounts)

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that `json.dumps` takes."""
        return {
            "query": self.query,
            "found": self.found,
            "routed": self.routed,
            "accounts": [
                {
                    "kind": account.kind,
                    "name": account.name,
                    "routed": account.routed,
                    "steps": [
                        {"outcome": step.outcome.value, "text": step.text, "hint": step.hint}
                        for step in account.steps
                    ],
                }
                for account in self.accounts
            ],
            "suggestions": list(self.suggestions),
        }


def explain(
    snapshot: Snapshot,
    settings: Settings,
    desired: Desired,
    name: str,
    *,
    refusals: Sequence[Rejection] = (),
) -> Explanation:
    """Explain a host, or a workload or instance by its name, its id or the beginning of either.

    Args:
        desired: what was compiled from this very snapshot and these settings.
        name: as people type it; of a URL its host.
        refusals: what OpenResty refused of it, of subject "host …" or "upstream …".
    """
    teller = _Teller(snapshot, settings, desired, refusals)
    query = name.strip()
    host = _host_part(query)
    for matches in (teller.exact(query, host), teller.beginning(query)):
        if len(matches) > MAX_SUBJECTS:
            return Explanation(query, (), tuple(sorted({match.name for match in matches})))
        if matches:
            return Explanation(query, tuple(match.account() for match in matches))
    known = sorted(teller.known_names())
    near = difflib.get_close_matches(query, known, n=3, cutoff=0.6)
    near += [item for item in difflib.get_close_matches(host, known, n=3) if item not in near]
    return Explanation(query, (), tuple(near[:3]))


def _host_part(query: str) -> str:
    text = re.split("[/?#]", query.split("://", 1)[-1], maxsplit=1)[0].rpartition("@")[2]
    text = text.rsplit(":", 1)[0] if text.rsplit(":", 1)[-1].isdigit() else text
    try:
        return forms.host(text)
    except forms.InvalidValueError:
        return text.lower().removesuffix(".")


@dataclass(frozen=True, slots=True)
class _Match:
    """Something that the name stands for."""

    name: str
    teller: _Teller
    host: str = ""
    workload: Workload | None = None
    instance: Instance | None = None

    def account(self) -> Account:
        """What there is to tell of it."""
        if self.workload is None:
            return self.teller.tell_host(self.host)
        if self.instance is None:
            return self.teller.tell_workload(self.workload)
        return self.teller.tell_instance(self.workload, self.instance)


class _Teller:
    """Tells of the parts of one snapshot."""

    def __init__(
        self,
        snapshot: Snapshot,
        settings: Settings,
        desired: Desired,
        refusals: Sequence[Rejection],
    ) -> None:
        self._snapshot = snapshot
        self._settings = settings
        self._desired = desired
        self._refusals = tuple(refusals)
        self._by_name = {
            name: host for host in desired.site.hosts for name in (host.name, *host.aliases)
        }

    # finding

    def _workloads(self) -> Iterator[tuple[SourceSnapshot, Workload]]:
        for _, source in sorted(self._snapshot.sources.items()):
            for _, workload in sorted(source.workloads.items()):
                yield source, workload

    def _source(self, workload: Workload) -> SourceSnapshot:
        return self._snapshot.sources[workload.key.source]

    def _examined(self, workload: Workload) -> Examined:
        source = self._source(workload)
        proxies = proxy_containers(source)
        return examine(workload, source.proxy_networks, self._settings, proxies=proxies)

    def known_names(self) -> set[str]:
        """Every name that could have been meant."""
        names = set(self._by_name)
        for _, workload in self._workloads():
            names.add(workload.name)
            names.update(instance.name for instance in workload.instances if instance.name)
        return names

    def exact(self, query: str, host: str) -> list[_Match]:
        """What bears exactly this name or id; a host also if a wildcard covers it."""
        matches = [
            _Match(workload.name, self, workload=workload)
            for _, workload in self._workloads()
            if query in (workload.name, workload.key.id)
        ]
        matches += [
            _Match(instance.name or instance.id, self, workload=workload, instance=instance)
            for _, workload in self._workloads()
            for instance in workload.instances
            if query in (instance.name, instance.id) and query != workload.key.id
        ]
        if self._serving(host) is not None or self._claiming(host):
            matches.append(_Match(host, self, host=host))
        return matches

    def beginning(self, query: str) -> list[_Match]:
        """What bears a name or id that begins with this."""
        if len(query) < _SHORTEST_PREFIX:
            return []
        matches: list[_Match] = []
        for _, workload in self._workloads():
            if workload.name.startswith(query) or workload.key.id.startswith(query):
                matches.append(_Match(workload.name, self, workload=workload))
                continue
            matches += [
                _Match(instance.name or instance.id, self, workload=workload, instance=instance)
                for instance in workload.instances
                if instance.name.startswith(query) or instance.id.startswith(query)
            ]
        hosts = {self._by_name[name].name for name in self._by_name if name.startswith(query)}
        return matches + [_Match(host, self, host=host) for host in sorted(hosts)]

    def _serving(self, name: str) -> Host | None:
        """The host of the site that answers for `name`, by the rules of nginx."""
        host = self._by_name.get(name)
        rest = name
        while host is None and "." in rest:
            rest = rest.split(".", 1)[1]
            host = self._by_name.get(f"*.{rest}")
        return host

    def _claiming(self, name: str) -> list[Workload]:
        """The workloads whose labels ask for `name`, whether they get it or not."""
        return [
            workload
            for _, workload in self._workloads()
            for route in self._examined(workload).reading.routes
            if name in (route.host, *route.aliases)
        ]

    # telling

    def tell_host(self, name: str) -> Account:
        """From the name of a host to the peers that serve it."""
        steps: list[Step] = []
        host = self._serving(name)
        routed = refused = False
        if host is None:
            steps.append(
                Step(
                    Outcome.FAILED,
                    f"{name} is not in the site: requests for it get 503.",
                    "See below who asks for it and what stopped that.",
                )
            )
        else:
            steps.append(_place_in_site(name, host))
            said, refused = self._refused_parts(host)
            steps += said
            whole = not refused
            for location in host.locations:
                upstream = self._desired.membership.upstreams.get(location.upstream)
                more, serves = _tell_location(host, location, upstream)
                more += self._tell_canary(upstream)
                said, lost = self._refused_parts(location)
                steps += more + said
                refused = refused or lost
                routed = routed or (serves and not lost)
            routed = routed and whole
        for workload in self._claiming(name):
            steps.append(Step(Outcome.NOTE, f"{subject_of(workload)} asks for {name}."))
            steps += [_refusal(rejection) for rejection in self._refused(workload)]
        for rejection in self._desired.rejections:
            if rejection.subject == f"host {name}":
                steps.append(_refusal(rejection))
        return Account("host", name, routed, tuple(steps), refused=refused and not routed)

    def tell_workload(self, workload: Workload) -> Account:
        """From the labels of a workload to its peers."""
        examined = self._examined(workload)
        steps = [self._origin(workload), *self._label_steps(examined)]
        routed = refused = False
        for route in examined.routes:
            more, serves, lost = self._tell_route(workload, route)
            steps += more
            routed = routed or serves
            refused = refused or lost
        if examined.routes:
            steps += [self._instance_step(workload, item, examined) for item in _sorted(workload)]
        return Account(
            _kind(workload), workload.name, routed, tuple(steps), refused=refused and not routed
        )

    def tell_instance(self, workload: Workload, instance: Instance) -> Account:
        """The way of one task or container: that of its workload, then its own."""
        whole = self.tell_workload(workload)
        if workload.key.id == instance.id:
            return whole
        examined = self._examined(workload)
        others = {
            self._instance_step(workload, item, examined).text
            for item in workload.instances
            if item is not instance
        }
        own = self._instance_step(workload, instance, examined)
        steps = [step for step in whole.steps if step.text not in others and step != own]
        return Account(
            kind="instance",
            name=instance.name or instance.id,
            routed=whole.routed and own.outcome is Outcome.OK,
            steps=(*steps, own),
            refused=whole.refused,
        )

    def _origin(self, workload: Workload) -> Step:
        parts = [f"{subject_of(workload)} is known from source {workload.key.source}"]
        if workload.kind is not WorkloadKind.STATIC:
            created = time.gmtime(max(workload.created, 0))
            parts.append(time.strftime("created %Y-%m-%d %H:%M:%S UTC", created))
            if workload.networks:
                parts.append(f"on networks {', '.join(workload.networks)}")
        if workload.wanted is not None:
            parts.append(f"{workload.wanted} instance(s) wanted")
        return Step(Outcome.OK, ", ".join(parts) + ".")

    def _label_steps(self, examined: Examined) -> list[Step]:
        steps: list[Step] = []
        if not examined.reading.routes and not examined.reading.rejections:
            return [
                Step(
                    Outcome.FAILED,
                    "It has no interlock labels, so it does not ask to be routed.",
                    "Add the label interlock.hostname to the service (deploy.labels) or to its "
                    "containers (labels).",
                )
            ]
        for route in examined.reading.routes:
            by_path = route.host or route.default_backend
            root = f", context root {route.context_root}" if by_path else ""
            which = f" (route {route.name})" if route.name else ""
            steps.append(
                Step(
                    Outcome.OK,
                    f"Its labels ask for {route.what}{root}{which}.",
                )
            )
        written = {**examined.workload.template_labels, **examined.workload.labels}
        if any(
            route.dialect is INTERLOCK
            and route.host.endswith(".local")
            and "interlock.domain" not in written
            and route.label("domain") not in written
            and route.label("hostname") in written
            for route in examined.reading.routes
        ):
            steps.append(
                Step(
                    Outcome.NOTE,
                    "There is no interlock.domain, so the domain is local.",
                    "Set interlock.domain; set it to nothing if interlock.hostname is the whole "
                    "name.",
                )
            )
        steps += [
            _refusal(rejection)
            for rejection in examined.rejections
            if rejection.reason != Reason.INSTANCE_NO_ADDRESS
        ]
        return steps

    def _refused(self, workload: Workload) -> list[Rejection]:
        subject = subject_of(workload)
        return [
            rejection
            for rejection in self._desired.rejections
            if rejection.subject == subject and rejection.source == workload.key.source
        ]

    def _refused_parts(self, *parts: Host | Location | TcpRoute) -> tuple[list[Step], bool]:
        """What OpenResty says of these parts of the site, and whether it refused one of them."""
        subjects = [subject for part in parts for subject in _subjects(part)]
        found = [item for item in self._refusals if item.subject in subjects]
        return [_refusal(item) for item in found], not all(item.served for item in found)

    def _tell_route(self, workload: Workload, route: Route) -> tuple[list[Step], bool, bool]:
        """The steps, whether it is served, and whether OpenResty refused some of it."""
        reach = route.reach
        where = (
            f"network {reach.network} ({reach.network_from})"
            if reach.network
            else (reach.network_from)
        )
        port = "" if reach.port is None else f", port {reach.port} ({reach.port_from})"
        name_ = route.claim.declaration.name
        which = f"Route {name_}: its" if name_ else "Its"
        steps = [Step(Outcome.OK, f"{which} instances are reached over {where}{port}.")]
        vip = vip_of(workload, reach) if route.claim.declaration.vip else None
        if vip is not None:
            steps.append(
                Step(
                    Outcome.OK, f"All go to the virtual IP {vip.address}: Docker chooses the task."
                )
            )
        if route.claim.tls is not None:
            steps.append(Step(Outcome.OK, f"TLS with certificate {route.claim.tls.certificate}."))
        known = self._examined(workload).rejections
        lost = [_refusal(item) for item in self._refused(workload) if item not in known]
        steps += lost
        serves = refused = False
        ours = {peer.id for peer in route.peers}
        for name in route.claim.names:
            place = self._place(name, route.claim.root(name))
            if place is None:
                continue
            upstream, mine = self._share(place.upstream, ours)
            if route.peers and not mine:
                continue
            up = sum(peer.state is PeerState.UP and peer.weight > 0 for peer in mine)
            if mine or not lost:
                canary = " as its canary" if upstream != place.upstream else ""
                steps.append(
                    Step(
                        Outcome.OK if up else Outcome.FAILED,
                        f"{place.text} is in the site and goes to upstream {upstream}{canary}, in "
                        f"which {up} of its peers are up.",
                        "" if up else "See below what its instances are waiting for.",
                    )
                )
            said, stopped = self._refused_parts(*place.parts)
            steps += [step for step in said if step not in steps]
            refused = refused or stopped
            serves = serves or (up > 0 and not stopped)
        return steps, serves, refused

    def _place(self, name: str, root: str) -> _Place | None:
        """Where in the site a name and context root of a claim are."""
        site = self._desired.site
        host = self._by_name.get(name)
        found = _location(host.locations if host is not None else (), root)
        if host is not None and found is not None:
            beside = f" (an alias of {host.name})" if host.name != name else ""
            return _Place(f"{name}{found.path}{beside}", found.upstream, (host, found))
        default = _location(site.default, root)
        upstream = f"{name}{root}"
        if default is not None and default.upstream == upstream:
            return _Place(told(name, root), upstream, (default,))
        for tcp in site.tcp:
            if tcp.upstream == upstream:
                return _Place(told(name), upstream, (tcp,))
        return None

    def _share(self, name: str, ours: set[str]) -> tuple[str, list[Peer]]:
        """Our peers in that upstream or in its canary, and in which of the two."""
        upstreams = self._desired.membership.upstreams
        upstream = upstreams.get(name)
        mine = [peer for peer in upstream.peers if peer.id in ours] if upstream else []
        canary = upstream.policy.canary if upstream else None
        if mine or canary is None or canary.upstream not in upstreams:
            return name, mine
        mine = [peer for peer in upstreams[canary.upstream].peers if peer.id in ours]
        return (canary.upstream if mine else name), mine

    def _tell_canary(self, upstream: Upstream | None) -> list[Step]:
        canary = upstream.policy.canary if upstream is not None else None
        if canary is None:
            return []
        found = self._desired.membership.upstreams.get(canary.upstream)
        peers = found.peers if found is not None else ()
        up = sum(peer.state is PeerState.UP and peer.weight > 0 for peer in peers)
        return [
            Step(
                Outcome.OK if up else Outcome.NOTE,
                f"Its canary {canary.upstream} gets {_share_of(canary)}: {up} peer(s) up.",
            )
        ]

    def _instance_step(self, workload: Workload, instance: Instance, examined: Examined) -> Step:
        node = f" on {instance.node}" if instance.node else ""
        # An id of Docker's is known by its beginning; cut, an address would be another one.
        shown = instance.id[:_SHOWN_IDS] if instance.id.isalnum() else instance.id
        # The name of a static peer has its id in it.
        which = "" if workload.kind is WorkloadKind.STATIC else f" ({shown})"
        who = f"{instance.name or 'instance'}{which}{node}"
        why = f": {instance.detail}" if instance.detail else ""
        if instance.state is InstanceState.WAITING:
            return Step(Outcome.NOTE, f"{who} is not up yet{why}.")
        if instance.state is InstanceState.GONE:
            return Step(Outcome.NOTE, f"{who} is gone{why}.")
        if not examined.routes:
            return Step(Outcome.FAILED, f"{who} is {instance.state.value}{why}, but not routed.")
        places: dict[str, None] = {}
        for route in examined.routes:
            reach = route.reach
            place = place_of(instance, reach, self._settings)
            if isinstance(place, str):
                hint = (
                    f"Attach it to {reach.network}."
                    if reach.way is Way.NETWORK
                    else "Publish the port that is routed to."
                )
                return Step(Outcome.FAILED, f"{who} is {instance.state.value}, but {place}.", hint)
            address, port = place
            places[f"[{address}]:{port}" if ":" in address else f"{address}:{port}"] = None
        where = " and ".join(places)
        if instance.state is InstanceState.DRAINING:
            return Step(
                Outcome.NOTE, f"{who} is draining at {where}: no new requests go to it{why}."
            )
        return Step(Outcome.OK, f"{who} is up at {where}.")


def _kind(workload: Workload) -> str:
    return subject_of(workload).removesuffix(f" {workload.name}")


def _sorted(workload: Workload) -> list[Instance]:
    return sorted(workload.instances, key=lambda item: (item.name, item.id))


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the site: told to people, its upstream, and what OpenResty could refuse of it."""

    text: str
    upstream: str
    parts: tuple[Host | Location | TcpRoute, ...] = ()


def _share_of(canary: Canary) -> str:
    shares = [f"{canary.weight}% of the requests"] if canary.weight else []
    if canary.header:
        shares.append(f"those with header {canary.header}: {canary.header_value or 'always'}")
    if canary.cookie:
        shares.append(f"those with cookie {canary.cookie}=always")
    return ", ".join(shares) or "nothing"


def _location(locations: tuple[Location, ...], root: str) -> Location | None:
    for location in locations:
        if location.path == root:
            return location
    return None


def _refusal(rejection: Rejection) -> Step:
    serves = rejection.served or rejection.reason == Reason.LABEL_IGNORED
    outcome = Outcome.NOTE if serves else Outcome.FAILED
    return Step(outcome, f"{rejection.reason}: {rejection.message}", rejection.hint)


def _subjects(part: Host | Location | TcpRoute) -> tuple[str, ...]:
    """Under which subjects an instance refuses a part of the site."""
    if isinstance(part, Host):
        return (f"host {part.name}",)
    upstream = f"upstream {part.upstream}"
    return (f"TCP port {part.port}", upstream) if isinstance(part, TcpRoute) else (upstream,)


def _place_in_site(name: str, host: Host) -> Step:
    tls = " and TLS" if host.tls is not None else ""
    if host.passthrough:
        tls = ", and its TLS is passed through unopened"
    for redirect in host.redirects:
        if redirect.host == name:
            return Step(Outcome.OK, f"{name} is in the site, redirected to {redirect.target}{tls}.")
    if name == host.name:
        return Step(Outcome.OK, f"{name} is in the site, on plain HTTP{tls}.")
    if name in host.aliases:
        return Step(Outcome.OK, f"{name} is in the site as an alias of {host.name}{tls}.")
    covering = next(item for item in (host.name, *host.aliases) if item.startswith("*."))
    return Step(Outcome.OK, f"{name} is covered by {covering}{tls}.")


def _tell_location(
    host: Host, location: Location, upstream: Upstream | None
) -> tuple[list[Step], bool]:
    where = f"{host.name}{location.path}"
    only = " (plain HTTP is redirected to TLS)" if location.tls_only else ""
    if location.mirror:
        only += f" (mirrored to {location.mirror})"
    peers = upstream.peers if upstream is not None else ()
    up = sum(peer.state is PeerState.UP and peer.weight > 0 for peer in peers)
    rest = len(peers) - up
    told = f"{up} peer(s) up" + (f" and {rest} draining or of weight 0" if rest else "")
    if up:
        return [
            Step(Outcome.OK, f"{where} goes to upstream {location.upstream}{only}: {told}.")
        ], True
    held = upstream.hold if upstream is not None else 0.0
    waits = f"wait up to {held:g} s for one and then " if held else ""
    return [
        Step(
            Outcome.FAILED,
            f"{where} goes to upstream {location.upstream}{only}: {told}; requests {waits}get 503.",
            "Ask for the service by its name to see what its instances are waiting for; a host "
            "that nobody asks for any more stays like this for HostLinger.",
        )
    ], False
