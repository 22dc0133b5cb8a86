"""Services and peers of a TOML file, for backends that no engine knows of.

The file is looked at often and read when it has changed. A service that is not valid is rejected
alone; a file that is not valid changes nothing: what the last good one said stays in force.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli

from agent.discovery.base import Observer, Publish, Reporter, SourceStatus
from agent.errors import StaticFileError
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    PublishedPort,
    Rejection,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)

NAME = "static"
NETWORK = "static"

_log = logging.getLogger(__name__)

LOOK_INTERVAL = 0.02
"""Seconds between looks at the file. One look is one `stat`."""

FRESH = 0.05
"""Seconds for which a file may have changed again without its times telling."""

_SERVICE_KEYS = ("name", "labels", "peer")
_PEER_KEYS = ("address", "port", "weight", "state", "id")
_STATES = {"up": InstanceState.UP, "draining": InstanceState.DRAINING}
_ID = re.compile(r"[!-~]{1,128}")
_HINT = "correct it in the file; the file is read again when it changes"


class _Invalid(Exception):
    """A service that cannot be used; the message says which key and what is expected."""


class StaticSource:
    """The source named "static"."""

    name = NAME

    def __init__(self, path: str, *, observer: Observer) -> None:
        self._path = Path(path)
        self._report = Reporter(NAME, observer, _log)
        self._good: SourceSnapshot | None = None

    @property
    def status(self) -> SourceStatus:
        """Where it stands."""
        return self._report.status

    def read_once(self) -> SourceSnapshot:
        """Read the file.

        Raises:
            StaticFileError: it cannot be read or is not valid as a whole.
        """
        return _parse(self._read(), self._path, {}, time.monotonic())

    def run(self, publish: Publish, stop: threading.Event) -> None:
        """Follow the file until `stop` is set."""
        self._report.mode("file")
        seen: tuple[int, ...] | None = None
        content: bytes | None = None
        while not stop.is_set():
            try:
                look = self._look()
                if look != seen or content is None or _fresh(look):
                    if _in_place(seen, look) and (content is not None or _fresh(look)):
                        # Whoever writes in place may be half-way: wait until it rests.
                        stop.wait(LOOK_INTERVAL)
                        if self._look() != look:
                            continue
                    new = self._read()
                    seen = look
                    if new != content:
                        content = new
                        self._take_in(new, publish)
                self._report.follow(following=not self._report.status.last_error)
            except StaticFileError as error:
                seen = content = None
                self._complain(error, publish)
            except Exception as error:  # noqa: BLE001
                # The guard of the loop: a fault of ours must not end discovery for good.
                self._report.fault(error)
            stop.wait(LOOK_INTERVAL)

    def _look(self) -> tuple[int, ...]:
        """What tells one version of the file from another without reading it."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> StaticFileError:
        return StaticFileError(f"StaticFile {self._path} cannot be read: {error.strerror}")

    def _take_in(self, content: bytes, publish: Publish) -> None:
        started = time.monotonic()
        self._report.heard("file")
        before = self._good.workloads if self._good else {}
        try:
            snapshot = _parse(content, self._path, before, started)
        except StaticFileError as error:
            self._complain(error, publish)
            return
        self._report.synced(time.monotonic() - started)
        self._good = snapshot
        publish(snapshot)
        self._report.published()

    def _complain(self, error: StaticFileError, publish: Publish) -> None:
        """Say what is wrong, once, and keep serving what was good."""
        if str(error) == self._report.status.last_error:
            return
        self._report.list_failed(error, 0.0)
        if self._good is None:
            return
        rejection = Rejection(
            subject=f"file {self._path}",
            reason="static_file_invalid",
            message=f"{error}; what the last good version said stays in force",
            hint=_HINT,
            source=NAME,
        )
        publish(
            replace(
                self._good,
                rejections=(*self._good.rejections, rejection),
                changed_at=time.monotonic(),
            )
        )
        self._report.published()


def _in_place(before: tuple[int, ...] | None, now: tuple[int, ...]) -> bool:
    """The same file was written to, and not another put in its place."""
    return before is None or before[:2] == now[:2]


def _fresh(look: tuple[int, ...]) -> bool:
    """The file was written to so lately that its times may not tell of another write."""
    return time.time() - look[3] / 1e9 < FRESH


def _parse(
    content: bytes, path: Path, before: Mapping[WorkloadKey, Workload], changed_at: float
) -> SourceSnapshot:
    """Read the whole file; unchanged services stay the same objects.

    Raises:
        StaticFileError: it is not TOML, or not a list of services.
    """
    if not content.strip():
        raise StaticFileError(
            f"{path}: the file is empty; for no services at all write: service = []"
        )
    try:
        raw = tomli.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StaticFileError(f"{path}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:  # tomli's own, a number of thousands of digits …
        raise StaticFileError(f"{path}: not valid TOML: {error}") from error
    for key in raw:
        if key != "service":
            raise StaticFileError(f"{path}: unknown key {key}; expected [[service]]")
    services = raw.get("service", [])
    if not isinstance(services, list):
        raise StaticFileError(f"{path}: service: expected a list of tables: [[service]]")
    workloads: dict[WorkloadKey, Workload] = {}
    rejections: list[Rejection] = []
    for index, item in enumerate(services):
        try:
            workload = _service(item, index)
            if workload.key in workloads:
                raise _Invalid(f"name: {workload.name!r} is taken by an earlier service")
        except _Invalid as error:
            name = item.get("name") if isinstance(item, dict) else None
            rejections.append(
                Rejection(
                    subject=f"service {name if isinstance(name, str) else f'number {index + 1}'}",
                    reason="static_service_invalid",
                    message=f"{path}: service[{index}].{error}",
                    hint=_HINT,
                    source=NAME,
                )
            )
            continue
        old = before.get(workload.key)
        workloads[workload.key] = old if old == workload else workload
    return SourceSnapshot(
        source=NAME,
        workloads=MappingProxyType(workloads),
        rejections=tuple(rejections),
        changed_at=changed_at,
    )


def _service(item: Any, index: int) -> Workload:
    if not isinstance(item, dict):
        raise _Invalid(f": expected a table, got {item!r}")
    _known_keys(item, _SERVICE_KEYS, "")
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise _Invalid(f"name: expected a name, got {name!r}")
    labels = item.get("labels", {})
    if not isinstance(labels, dict):
        raise _Invalid(f"labels: expected a table, got {labels!r}")
    peers = item.get("peer", [])
    if not isinstance(peers, list):
        raise _Invalid(f"peer: expected a list of tables ([[service.peer]]), got {peers!r}")
    instances = [_peer(peer, f"peer[{number}]", name) for number, peer in enumerate(peers)]
    twice = {i.id for i in instances if sum(other.id == i.id for other in instances) > 1}
    if twice:
        raise _Invalid(f"peer: id {min(twice)!r} is given twice; give one of them another id")
    return Workload(
        key=WorkloadKey(NAME, name),
        kind=WorkloadKind.STATIC,
        name=name,
        created=float(index),
        labels=MappingProxyType({key: _label(key, value) for key, value in labels.items()}),
        networks=(NETWORK,),
        instances=tuple(instances),
        wanted=len(instances),
    )


def _label(key: str, value: Any) -> str:
    """Labels are text; TOML's numbers and booleans are written as Docker's would be."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, dict):
        raise _Invalid(f'labels.{key}: got a table; quote the whole key: "{key}.…" = "…"')
    raise _Invalid(f"labels.{key}: expected text, got {value!r}")


def _peer(item: Any, where: str, service: str) -> Instance:
    if not isinstance(item, dict):
        raise _Invalid(f"{where}: expected a table, got {item!r}")
    _known_keys(item, _PEER_KEYS, f"{where}.")
    address, port = _peer_address(item, where), item.get("port")
    if not isinstance(port, int) or not _whole(port, 1, 65535):
        raise _Invalid(f"{where}.port: expected 1 to 65535, got {port!r}")
    weight = item.get("weight")
    if weight is not None and not _whole(weight, 0, 1000):
        raise _Invalid(f"{where}.weight: expected 0 to 1000, got {weight!r}")
    state = item.get("state", "up")
    if not isinstance(state, str) or state not in _STATES:
        raise _Invalid(f'{where}.state: expected "up" or "draining", got {state!r}')
    shown = f"[{address}]" if ":" in address else address
    identity = item.get("id", f"{shown}:{port}")
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        raise _Invalid(f"{where}.id: expected 1 to 128 printable characters, got {identity!r}")
    return Instance(
        id=identity,
        name=f"{service} {identity}",
        state=_STATES[state],
        attachments=(Attachment(NETWORK, address),),
        published=(PublishedPort(target=port, published=port, host=address),),
        detail="" if state == "up" else "the file says so",
        weight=weight,
    )


def _peer_address(item: Mapping[str, Any], where: str) -> str:
    text = item.get("address")
    try:
        address = ipaddress.ip_address(text if isinstance(text, str) else "")
    except ValueError:
        raise _Invalid(
            f"{where}.address: expected an IPv4 or IPv6 address (no name), got {text!r}"
        ) from None
    if address.is_unspecified or address.is_multicast:
        raise _Invalid(f"{where}.address: {text} is no address of a server")
    return str(address)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _known_keys(item: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in item:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise _Invalid(f"{where}{key}: unknown key{meant}")
