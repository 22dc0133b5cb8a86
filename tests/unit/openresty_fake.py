"""An OpenResty instance without OpenResty: what docs/admin-api.md says, in memory.

For tests of whoever talks to instances. Faults are put in by hand: `down`, `busy`, `refuse_site`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping

from agent.driver.openresty import Build, CertificateProblem, Status, version_of
from agent.driver.parts import Rendered
from agent.errors import (
    InstanceBusy,
    InstanceUnreachable,
    LeaseHeld,
    PushRefused,
    RevisionConflict,
    SiteRefused,
)
from agent.model import (
    Desired,
    Host,
    Location,
    Membership,
    Peer,
    PeerState,
    Site,
    Upstream,
)

_ids = itertools.count(1)


class FakeOpenResty:
    """One instance; `calls` holds what was asked of it, in order."""

    def __init__(self, name: str = "nginx.1") -> None:
        self.name = name
        self.lock = threading.RLock()
        self.instance = f"run-{next(_ids)}"
        self.revision = 0
        self.revision_writer = ""
        self.membership = Membership({})
        self.generation = ""
        self.files: dict[str, str] = {}
        self.reloads = 0
        self.writer = ""
        self.lease_until = 0.0
        self.lease_ttl = 15.0
        self.nginx_version = 1022001
        self.features: frozenset[str] = frozenset()
        self.certificates_serial = 0
        self.certificate_problems: tuple[CertificateProblem, ...] = ()
        self.dict_capacity, self.dict_free = 0, 0
        self.calls: list[tuple[str, object]] = []
        self.down = False
        self.busy = 0
        self.lose_answers = 0
        self.refuse_site: Callable[[Mapping[str, str]], SiteRefused | None] = lambda files: None
        self.refuse_push: Callable[[Mapping[str, Upstream]], PushRefused | None] = lambda u: None
        self.site_takes = threading.Event()
        self.site_takes.set()

    def restart(self, *, forget: bool = False) -> None:
        with self.lock:
            self.instance = f"run-{next(_ids)}"
            self.writer, self.lease_until = "", 0.0
            if forget:
                self.revision, self.membership, self.generation = 0, Membership({}), ""

    def names(self, kind: str | None = None) -> list[str]:
        with self.lock:
            return [name for name, _ in self.calls if kind is None or name == kind]

    def pushes(self) -> list[str]:
        return [name for name in self.names() if name in ("patch", "put")]

    def client(self, target: object = None) -> FakeClient:
        return FakeClient(self)

    def take_lease(self, writer: str) -> None:
        now = time.monotonic()
        if self.writer not in ("", writer) and now < self.lease_until:
            raise LeaseHeld("held", writer=self.writer, expires_in=self.lease_until - now)
        self.writer, self.lease_until = writer, now + self.lease_ttl


class FakeClient:
    def __init__(self, server: FakeOpenResty) -> None:
        self._server = server
        self.url = f"http://{server.name}"

    def _enter(self, name: str, detail: object = None) -> FakeOpenResty:
        server = self._server
        if server.down:
            raise InstanceUnreachable(f"{self.url}: Connection refused")
        server.calls.append((name, detail))
        return server

    def status(self) -> Status:
        with self._server.lock:
            s = self._enter("status")
            return Status(
                instance=s.instance,
                revision=s.revision,
                generation=s.generation,
                writer=s.writer,
                upstreams=len(s.membership.upstreams),
                build=Build(nginx_version=s.nginx_version, features=s.features),
                certificates_serial=s.certificates_serial,
                dict_capacity=s.dict_capacity,
                dict_free=s.dict_free,
            )

    def membership(self) -> tuple[int, Membership]:
        with self._server.lock:
            s = self._enter("membership")
            return s.revision, s.membership

    def versions(self) -> tuple[int, Mapping[str, str]]:
        with self._server.lock:
            s = self._enter("versions")
            upstreams = s.membership.upstreams.items()
            return s.revision, {name: version_of(upstream) for name, upstream in upstreams}

    def upstream(self, name: str) -> Upstream:
        with self._server.lock:
            return self._enter("upstream", name).membership.upstreams[name]

    def patch(self, *, writer, base_revision, revision, upsert, remove) -> None:
        with self._server.lock:
            s = self._enter("patch", (sorted(upsert), list(remove)))
            s.take_lease(writer)
            self._check(s, upsert)
            if (revision, writer) == (s.revision, s.revision_writer):
                return
            if base_revision != s.revision or revision <= s.revision:
                raise RevisionConflict("base differs", current=s.revision)
            merged = {k: v for k, v in s.membership.upstreams.items() if k not in remove}
            s.membership = Membership({**merged, **upsert})
            self._pushed(s, writer, revision)

    def put(self, *, writer, revision, membership) -> None:
        with self._server.lock:
            s = self._enter("put", sorted(membership.upstreams))
            s.take_lease(writer)
            self._check(s, membership.upstreams)
            if revision <= s.revision:
                raise RevisionConflict("not above", current=s.revision)
            s.membership = membership
            self._pushed(s, writer, revision)

    def _check(self, s: FakeOpenResty, upstreams: Mapping[str, Upstream]) -> None:
        if s.busy:
            s.busy -= 1
            raise InstanceBusy("busy")
        if (error := s.refuse_push(upstreams)) is not None:
            raise error

    def _pushed(self, s: FakeOpenResty, writer: str, revision: int) -> None:
        s.revision, s.revision_writer = revision, writer
        if s.lose_answers:
            s.lose_answers -= 1
            raise InstanceUnreachable(f"{self.url}: no answer within 10 s")

    def site(self) -> Mapping[str, str]:
        with self._server.lock:
            return dict(self._enter("get site").files)

    def certificate_problems(self) -> tuple[CertificateProblem, ...]:
        with self._server.lock:
            return self._enter("certificates").certificate_problems

    def put_site(self, *, writer, generation, files) -> bool:
        with self._server.lock:
            s = self._enter("site", dict(files))
            s.take_lease(writer)
        assert s.site_takes.wait(10)
        with s.lock:
            if (error := s.refuse_site(files)) is not None:
                raise error
            if generation == s.generation:
                return False
            s.generation, s.files = generation, dict(files)
            s.reloads += 1
            return True

    def renew(self, writer: str) -> float:
        with self._server.lock:
            s = self._enter("lease", writer)
            s.take_lease(writer)
            return s.lease_ttl

    def release(self, writer: str) -> None:
        with self._server.lock:
            s = self._enter("release", writer)
            if s.writer == writer:
                s.writer, s.lease_until = "", 0.0

    def close(self) -> None:
        pass


class FakeRenderer:
    """One file per host with the host's repr as its text, and one ground file."""

    def __init__(self, ground: str = "ground") -> None:
        self.ground = ground
        self.limits: dict[str, str] = {}
        self.tcp = False
        self.renders = 0

    def render(self, site: Site, build: Build) -> Rendered:
        self.renders += 1
        files = {f"{host.name}.conf": f"{host!r} for {build.nginx_version}" for host in site.hosts}
        hosts = {f"{host.name}.conf": host.name for host in site.hosts}
        for name in [f"TCP port {route.port}" for route in site.tcp if self.tcp]:
            files[f"{name}.conf"], hosts[f"{name}.conf"] = name, name
        return Rendered(
            files={"00-ground.conf": self.ground, **self.limits, **files},
            hosts=hosts,
            settings={"00-limits.events": "MaxConn"},
        )

    def generation(self, files: Mapping[str, str]) -> str:
        return f"{hash(tuple(sorted(files.items()))) & (2**256 - 1):064x}"


class CountingSink:
    def __init__(self) -> None:
        self.pushes: list[tuple[str, str, str]] = []
        self.reloads: list[tuple[str, str]] = []
        self.applies: list[tuple[str, float]] = []
        self.errors: list[str] = []
        self.forgotten: list[str] = []

    def applied(self, kind: str, seconds: float) -> None:
        self.applies.append((kind, seconds))

    def push(self, instance: str, kind: str, result: str) -> None:
        self.pushes.append((instance, kind, result))

    def reload(self, instance: str, result: str, seconds: float) -> None:
        self.reloads.append((instance, result))

    def forget_instance(self, instance: str) -> None:
        self.forgotten.append(instance)

    def loop_error(self, loop: str) -> None:
        self.errors.append(loop)


def upstream(name: str, *addresses: str, draining: tuple[str, ...] = ()) -> Upstream:
    peers = [Peer(f"task-{a}", a, 8080) for a in addresses]
    peers += [Peer(f"task-{a}", a, 8080, state=PeerState.DRAINING) for a in draining]
    return Upstream(name, tuple(sorted(peers, key=lambda peer: peer.id)))


def site(*names: str) -> Site:
    return Site(tuple(Host(n, (), (Location("/", f"{n}/"),)) for n in sorted(names)))


def desired(hosts: Mapping[str, tuple[str, ...]], *, keep: Desired | None = None) -> Desired:
    """Host name to its peers' addresses; what equals `keep` is the same object, as compile does."""
    ups = {f"{name}/": upstream(f"{name}/", *addresses) for name, addresses in hosts.items()}
    new_site = site(*hosts)
    if keep is not None:
        old = keep.membership.upstreams
        ups = {name: old[name] if old.get(name) == item else item for name, item in ups.items()}
        new_site = keep.site if keep.site == new_site else new_site
        same = keep.membership.upstreams == ups
        return Desired(keep.membership if same else Membership(ups), new_site, ())
    return Desired(Membership(ups), new_site, ())


def eventually(check: Callable[[], object], *, within: float = 10.0) -> object:
    """Wait until `check` gives something true; fail with its last value otherwise."""
    deadline = time.monotonic() + within
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s; last: {value!r}")
        time.sleep(0.005)
