"""HTTP client of one OpenResty instance: the admin API of docs/admin-api.md, call by call.

Why: the one place that knows the API's paths, JSON and status codes. It keeps one connection open,
since what a push costs is what a change takes to be in force. It must not decide anything: which
push follows from which state is the fleet's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from agent import policies
from agent.config.settings import OpenResty
from agent.driver.connection import Connection, NoAnswer, NotConnected
from agent.driver.targets import Target
from agent.errors import (
    DriverError,
    InstanceBusy,
    InstanceUnauthorized,
    InstanceUnreachable,
    LeaseHeld,
    PushRefused,
    RevisionConflict,
    SiteRefused,
)
from agent.model import Membership, Peer, PeerState, Upstream

SITE_TIMEOUT = 150.0
"""Seconds at least for a site push: testing and loading thousands of hosts takes its time."""


@dataclass(frozen=True, slots=True)
class Build:
    """What an instance's nginx is, as far as its configuration depends on it.

    Attributes:
        nginx_version: as nginx counts it: 1022001 is 1.22.1; 0 if unknown.
        features: what it was built with: `http_v2`, `http_v3`, `stream_ssl_preread` …; `stream`
            where it can pass connections on unopened.
    """

    nginx_version: int = 0
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class CertificateProblem:
    """Something that is wrong with a certificate or CA that an instance uses.

    Attributes:
        host: whose certificate it is, empty for the default one; None where it is a backend's.
        backend: identity of the TLS towards peers that it belongs to; empty for hosts.
        reason, message: as in a `Rejection`.
        refused: it is not served for that; else it is, and this is a warning.
    """

    host: str | None
    backend: str
    reason: str
    message: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Status:
    """Answer of `GET /v1/status`.

    Attributes:
        instance: id of the running OpenResty, new at each start.
        source: where its membership came from: "push", "disk" or "none".
        build: what its nginx is.
        certificates_serial: changes when a problem with a certificate comes or goes.
    """

    instance: str
    revision: int
    generation: str
    writer: str = ""
    lease_expires_in: float = 0.0
    upstreams: int = 0
    peers: int = 0
    source: str = ""
    build: Build = Build()
    certificates_serial: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    dict_capacity: int = 0
    dict_free: int = 0


class Token:
    """The bearer token of the settings; a file is read again when its mtime changes."""

    def __init__(self, *, token: str, file: str) -> None:
        self._token = token
        self._file = file
        self._stamp: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def read(self) -> str:
        """The token as of now, empty if settings name none.

        Raises:
            InstanceUnauthorized: the file cannot be read or is empty, or what is there cannot be a
                token.
        """
        if not self._file:
            return _checked(self._token, "OpenResty.Token")
        where = f"OpenResty.TokenFile {self._file}"
        with self._lock:
            try:
                stat = os.stat(self._file)
                stamp = (stat.st_mtime_ns, stat.st_size)
                if stamp != self._stamp:
                    with open(self._file, encoding="latin-1") as file:
                        self._token = file.read().strip()
                    self._stamp = stamp
            except OSError as error:
                raise InstanceUnauthorized(f"{where} cannot be read: {error.strerror}") from error
            if not self._token:
                raise InstanceUnauthorized(f"{where} is empty")
            return _checked(self._token, where)


def _checked(token: str, where: str) -> str:
    """A token that can be sent. Raises InstanceUnauthorized for one that cannot."""
    if not (token.isascii() and token.isprintable()):
        raise InstanceUnauthorized(
            f"{where} is no token: it has to be one line of printable ASCII characters"
        )
    return token


class Instance:
    """The admin API of one instance, over the first of its URLs that answers.

    Not thread-safe: each thread has its own. All calls raise subclasses of `DriverError`.

    Args:
        target: whom to talk to.
        settings: timeouts and TLS.
        token: the bearer token.
    """

    def __init__(self, target: Target, settings: OpenResty, token: Token) -> None:
        self._target = target
        self._urls = target.urls
        self._settings = settings
        self._token = token
        self._connections: dict[str, Connection] = {}

    @property
    def url(self) -> str:
        """The URL that answered last, else the first to be tried."""
        return self._urls[0] if self._urls else ""

    def status(self) -> Status:
        """What the instance is and holds."""
        return _status(self._call("GET", "/v1/status"))

    def membership(self) -> tuple[int, Membership]:
        """The membership it holds, and its revision."""
        answer = self._call("GET", "/v1/membership")
        with _understood("GET /v1/membership"):
            upstreams = {name: decode(name, item) for name, item in answer["upstreams"].items()}
            return int(answer["revision"]), Membership(upstreams)

    def versions(self) -> tuple[int, Mapping[str, str]]:
        """Its revision, and the version of each upstream; empty where none was pushed with it."""
        answer = self._call("GET", "/v1/versions")
        with _understood("GET /v1/versions"):
            return int(answer["revision"]), dict(answer["versions"])

    def upstream(self, name: str) -> Upstream:
        """One upstream that it holds."""
        path = f"/v1/membership/{quote(name, safe='')}"
        answer = self._call("GET", path)
        with _understood(f"GET {path}"):
            return decode(name, answer)

    def patch(
        self,
        *,
        writer: str,
        base_revision: int,
        revision: int,
        upsert: Mapping[str, Upstream],
        remove: tuple[str, ...],
    ) -> None:
        """Change some upstreams; applied whole or not at all.

        Raises:
            RevisionConflict: the instance does not hold `base_revision`.
            PushRefused: something in it is not valid, or there is no room.
            LeaseHeld: another writer has the lease.
        """
        self._call(
            "PATCH",
            "/v1/membership",
            _object(
                writer=_json(writer),
                base_revision=str(base_revision),
                revision=str(revision),
                upsert=_upstreams(upsert),
                remove=_json(list(remove)),
            ),
        )

    def put(self, *, writer: str, revision: int, membership: Membership) -> None:
        """Replace all upstreams; raises as `patch` does."""
        self._call(
            "PUT",
            "/v1/membership",
            _object(
                writer=_json(writer),
                revision=str(revision),
                upstreams=_upstreams(membership.upstreams),
            ),
        )

    def site(self) -> Mapping[str, str]:
        """The files that it runs, name to text; none before its first site."""
        answer = self._call("GET", "/v1/site")
        with _understood("GET /v1/site"):
            return {str(name): str(text) for name, text in answer["files"].items()}

    def certificate_problems(self) -> tuple[CertificateProblem, ...]:
        """What is wrong with the certificates and CAs that it uses."""
        answer = self._call("GET", "/v1/certificates")
        with _understood("GET /v1/certificates"):
            return tuple(
                CertificateProblem(
                    host=item.get("host"),
                    backend=str(item.get("backend") or ""),
                    reason=str(problem["reason"]),
                    message=str(problem["message"]),
                    refused=problem["refused"] is True,
                )
                for item in (*answer["hosts"], *answer["backends"])
                for problem in item["problems"]
            )

    def put_site(self, *, writer: str, generation: str, files: Mapping[str, str]) -> bool:
        """Replace the site, and return when a new worker runs it.

        Returns:
            Whether nginx was reloaded: not if it ran that generation already.

        Raises:
            SiteRefused: nginx refused it; the old site serves on.
            LeaseHeld: another writer has the lease.
        """
        answer = self._call(
            "PUT",
            "/v1/site",
            _json({"writer": writer, "generation": generation, "files": dict(files)}),
            timeout=max(self._settings.timeout, SITE_TIMEOUT),
        )
        return answer.get("reloaded") is True

    def renew(self, writer: str) -> float:
        """Take or renew the writer lease; returns for how many seconds. Raises LeaseHeld."""
        answer = self._call("POST", "/v1/lease", _json({"writer": writer}))
        return _number(answer.get("expires_in"))

    def release(self, writer: str) -> None:
        """Give the writer lease up."""
        self._call("DELETE", "/v1/lease", _json({"writer": writer}))

    def close(self) -> None:
        """Close the connection."""
        for connection in self._connections.values():
            connection.close()

    def _call(
        self, method: str, path: str, body: str | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """One call, at the URL that answered last, else at each until one answers."""
        data = None if body is None else body.encode()
        token = self._token.read()
        headers = {"User-Agent": "tidegate-agent"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if data is not None:
            headers["Content-Type"] = "application/json"
        limit = self._settings.timeout if timeout is None else timeout
        if not self._urls:
            raise InstanceUnreachable(
                "no address is known: it is on no network"
                + (f" named {self._settings.admin_network}" if self._settings.admin_network else "")
                + f" and publishes no port {self._settings.admin_port}"
            )
        faults = []
        for url in self._urls:
            try:
                status, answer = self._to(url).request(method, path, data, headers, limit)
            except NotConnected as error:
                faults.append(f"{url}: {error}")
                continue
            except NoAnswer as error:
                raise InstanceUnreachable(f"{url}: {error}") from error
            if url != self._urls[0]:
                self._urls = (url, *(other for other in self._urls if other != url))
            return _answer(f"{method} {path}", url, status, answer)
        raise InstanceUnreachable("; ".join(faults))

    def _to(self, url: str) -> Connection:
        """The connection to `url`.

        It may send a request twice, which is safe: a push carries its revision, so the second one
        changes nothing.
        """
        connection = self._connections.get(url)
        if connection is None:
            connection = Connection(url, self._settings, verify_name=self._target.static)
            self._connections[url] = connection
        return connection


def connector(settings: OpenResty) -> Callable[[Target], Instance]:
    """How the fleet gets its clients: all with the same settings and token."""
    token = Token(token=settings.token, file=settings.token_file)
    return lambda target: Instance(target, settings, token)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _object(**members: str) -> str:
    """A JSON object of members that are JSON already."""
    return "{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}"


def _upstreams(upstreams: Mapping[str, Upstream]) -> str:
    items = (f"{_json(name)}:{encode(upstream)}" for name, upstream in upstreams.items())
    return "{" + ",".join(items) + "}"


def encode(upstream: Upstream) -> str:
    """An upstream as it goes over the wire, with its version."""
    members = _members(upstream)
    return f'{{{members},"version":"{_digest(members)}"}}'


def version_of(upstream: Upstream) -> str:
    """What an instance calls an upstream that was pushed to it exactly like this."""
    return _digest(_members(upstream))


def _digest(members: str) -> str:
    return hashlib.blake2b(members.encode(), digest_size=12).hexdigest()


def _members(upstream: Upstream) -> str:
    peers = ",".join(
        f'{{"id":{_json(peer.id)},"address":"{peer.address}","port":{peer.port},'
        f'"weight":{peer.weight},"state":"{peer.state.value}"'
        + (',"backup":true}' if peer.backup else "}")
        for peer in upstream.peers
    )
    policy = _json(policies.to_json(upstream.policy))
    return f'"policy":{policy},"hold":{upstream.hold!r},"peers":[{peers}]'


_PEER_STATES = {state.value: state for state in PeerState}


def decode(name: str, item: Mapping[str, Any]) -> Upstream:
    """An upstream from the wire; raises KeyError, TypeError or ValueError where it is not one.

    A hundred thousand peers come through here, and they are only ever compared with ours: so a
    field of the wrong type is not looked for, it makes the upstream differ and be pushed.
    """
    peers = [
        Peer(
            peer["id"],
            peer["address"],
            peer["port"],
            peer["weight"],
            _PEER_STATES[peer["state"]],
            peer.get("backup", False),
        )
        for peer in item["peers"] or ()
    ]
    return Upstream(
        name=name,
        peers=tuple(sorted(peers, key=lambda peer: peer.id)),
        policy=policies.from_json(item["policy"]),
        hold=float(item.get("hold", 0.0)),
    )


def _status(answer: Mapping[str, Any]) -> Status:
    with _understood("GET /v1/status"):
        room = answer.get("dict") or {}
        return Status(
            instance=str(answer["instance"]),
            revision=int(answer["revision"]),
            generation=str(answer.get("generation") or ""),
            writer=str(answer.get("writer") or ""),
            lease_expires_in=_number(answer.get("lease_expires_in")),
            upstreams=int(answer.get("upstreams") or 0),
            peers=int(answer.get("peers") or 0),
            source=str(answer.get("source") or ""),
            build=Build(
                nginx_version=int(answer.get("nginx_version") or 0),
                features=frozenset(str(item) for item in answer.get("features") or ()),
            ),
            certificates_serial=int(answer.get("certificates_serial") or 0),
            versions={str(k): str(v) for k, v in (answer.get("versions") or {}).items()},
            dict_capacity=int(room.get("capacity_bytes") or 0),
            dict_free=int(room.get("free_bytes") or 0),
        )


class _understood:  # noqa: N801 - used as a verb: with _understood(call)
    """Turns the errors of reading an answer's fields into a DriverError."""

    def __init__(self, call: str) -> None:
        self._call = call

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError):
            raise DriverError(
                f"{self._call}: the answer is not what docs/admin-api.md says ({error!r}); "
                "are agent and OpenResty of the same version?"
            ) from error


def _answer(call: str, url: str, status: int, text: bytes) -> dict[str, Any]:
    """The JSON object of an answer, or the error that it stands for."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if status == 200 and isinstance(body, dict):
        return body
    if not isinstance(body, dict):
        body = {}
    raise _error(f"{url}: {call}", status, body)


def _error(call: str, status: int, body: Mapping[str, Any]) -> DriverError:
    message = str(body.get("message") or f"answered {status}")
    code = body.get("error")
    if status == 401:
        return InstanceUnauthorized(f"{call}: the token was refused: {message}")
    if status == 409:
        return RevisionConflict(f"{call}: {message}", current=int(_number(body.get("revision"))))
    if status == 423:
        return LeaseHeld(
            f"{call}: {message}",
            writer=str(body.get("writer") or ""),
            expires_in=_number(body.get("expires_in")),
        )
    if status == 503:
        return InstanceBusy(f"{call}: {message}")
    if status == 422 and code == "site_refused":
        file = body.get("file")
        return SiteRefused(message, file=str(file) if file else None)
    if status in (400, 413, 422, 507):
        faults = [item for item in body.get("errors") or () if isinstance(item, dict)]
        reasons = {
            str(item["upstream"]): f"{item.get('field') or 'upstream'}: {item.get('message')}"
            for item in faults
            if item.get("upstream")
        }
        return PushRefused(f"{call}: {message}", status=status, reasons=reasons)
    return DriverError(
        f"{call}: {message}; is this the admin port of Tidegate's OpenResty, of the same version?"
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
