"""Constant-rate HTTP/1.1 load that hides nothing: how the promise "0 failed requests" is measured.

The load is open loop: request number *i* is due at ``start + i / rate``, whether or not the ones
before it were answered, and its latency counts from that moment. A client that waits for slow
answers, or that tries again, would report a better proxy than there is; so this one never retries.
A request has failed unless an expected status (any 2xx by default) came with a whole body in time.

With keep-alive a pool of connections is used in turn. A server may close one that is idle; when
that is known before a request was sent on it, the connection is replaced and counted in
``reconnects``. Once a request has been sent, a close without a whole answer is a failure.
Without keep-alive each request has a connection of its own.

Command line (needs nothing but Python 3.9 or later, so that it runs in any network namespace)::

    python -m bench.load --url http://127.0.0.1:8000/ --host app.localhost --rate 500 --seconds 10
    ... --no-keepalive        a connection per request; default is --keepalive
    ... --connections 32      size of the pool per address (16)
    ... --url A --url B --host X --host Y    all combinations, in rotation
    ... --timeout 60          seconds from the time a request is due; for long requests (10)
    ... --expect 200 --expect 308            statuses that count as success (any 2xx)
    ... --backend-header X-Backend | --backend-json hostname    who answered; counted in `backends`
    ... --stop-file PATH      stop as soon as PATH exists
    ... --records PATH        every request as a line of JSON
    ... --json                the result as JSON on stdout instead of a summary

Without ``--seconds`` it runs until SIGTERM, SIGINT or the stop file. It then sends no more, waits
for the answers under way, and prints the result. On stderr it says ``load: under way`` when the
first request was answered or has failed.
Exit code: 0 nothing failed, 1 requests failed, 2 wrong usage, 3 nothing was sent.

From Python: :func:`run` does all that in this thread; :class:`LoadProcess` runs the command line
beside a test, in another network namespace if asked (``prefix=("ip", "netns", "exec", "client")``).

This module must not import anything outside the standard library, nor the rest of the project.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit

_SWEEP_SECONDS = 0.05
_LINGER_SECONDS = 1.0
_BODY_KEPT = 65536
_SNIPPET = 200
_RECEIVE = 65536
_UNDER_WAY = "load: under way"

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*(?=\r\n|\Z)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[^\r\n]*close", re.IGNORECASE)


class UsageError(ValueError):
    """The plan cannot be carried out: says which option and why."""


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        urls: http:// URLs; a host name is resolved once, at the start.
        hosts: Host headers, combined with every URL; none takes the URL's own.
        rate: requests per second over all targets together.
        seconds: how long requests are sent; None until told to stop.
        keepalive: reuse connections, at most `connections` per address.
        timeout: seconds from the time a request is due until it counts as failed.
        headers: further request headers.
        body_bytes: size of the body of each request (of `x`), 0 for none.
        expect: statuses that are success; empty for any 2xx.
        backend_header: response header that names who answered.
        backend_json: top-level field of a JSON body that names who answered.
        details: how many failures are told one by one.
        stop_file: stop as soon as this path exists.
        keep_records: keep every request in `Result.records`.
    """

    urls: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    rate: float = 100.0
    seconds: float | None = None
    keepalive: bool = True
    connections: int = 16
    timeout: float = 10.0
    method: str = "GET"
    headers: tuple[str, ...] = ()
    body_bytes: int = 0
    expect: tuple[int, ...] = ()
    backend_header: str = ""
    backend_json: str = ""
    details: int = 20
    stop_file: str = ""
    keep_records: bool = False


class Record(NamedTuple):
    """One request: `due` in seconds from the start, `latency_ms` from then, `kind` "" if it is ok.

    `status` is 0 where no status line came.
    """

    due: float
    latency_ms: float
    status: int
    kind: str
    backend: str


@dataclass(frozen=True)
class Failure:
    """One failed request, told in full.

    Attributes:
        offset: when it was due, seconds from the start.
        kind: `status`, `timeout`, `refused`, `connect`, `closed`, `reset`, `bad_response`, `client`
            (this machine ran out of descriptors or ports: the measurement is void).
        detail: start of the body, or the system's message.
        reused: whether the connection had carried a request before.
    """

    offset: float
    kind: str
    status: int
    latency_ms: float
    target: str
    detail: str
    reused: bool


@dataclass(frozen=True)
class Result:
    """What came of a load; times in milliseconds, latencies are those of successful requests.

    Attributes:
        requests: all that were sent or tried; `failed` of them failed.
        failures: number of failures by kind; `details` tells the first of them.
        statuses: number of answers by status.
        backends: number of successful answers by who gave them.
        reconnects: idle connections found closed before a request was sent on them;
            `reconnected` tells the Unix time of each.
        connections: connections that were opened.
        lag_ms_p99, lag_ms_max: how late this client was in sending what was due (up to 1 ms is the
            resolution of its timer); part of the latencies.
        started_at: Unix time at which the first request was due.
        seconds: from then until the last answer.
    """

    requests: int
    failed: int
    failures: Mapping[str, int]
    statuses: Mapping[str, int]
    backends: Mapping[str, int]
    reconnects: int
    connections: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    lag_ms_p99: float
    lag_ms_max: float
    started_at: float
    seconds: float
    details: tuple[Failure, ...] = ()
    reconnected: tuple[float, ...] = field(default=(), repr=False)
    records: tuple[Record, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without the records."""
        return {name: value for name, value in asdict(self).items() if name != "records"}

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read what `--json` printed."""
        raw = json.loads(text)
        raw["details"] = tuple(Failure(**item) for item in raw["details"])
        raw["reconnected"] = tuple(raw["reconnected"])
        return cls(**raw)

    def summary(self) -> str:
        """Several lines for people."""
        lines = [
            f"{self.requests} requests in {self.seconds:.1f} s, {self.failed} failed, "
            f"{self.connections} connections, {self.reconnects} reconnects",
            f"latency ms: p50 {self.p50_ms:.2f}, p99 {self.p99_ms:.2f}, p99.9 {self.p999_ms:.2f}, "
            f"max {self.max_ms:.2f} (client's own lag p99 {self.lag_ms_p99:.2f}, "
            f"max {self.lag_ms_max:.2f})",
            "statuses: " + (_counts(self.statuses) or "none"),
        ]
        if self.backends:
            lines.append("backends: " + _counts(self.backends))
        if self.failures:
            lines.append("failures: " + _counts(self.failures))
        lines += [
            f"  at {f.offset:.3f} s {f.kind} {f.status or ''} {f.target} after {f.latency_ms:.1f} "
            f"ms{' on a reused connection' if f.reused else ''}: {f.detail}"
            for f in self.details
        ]
        return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the sorted values do not exceed."""
    if not ordered:
        return 0.0
    rank = -(-len(ordered) * share // 1)
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


class _Target(NamedTuple):
    label: str
    family: int
    address: Any
    message: bytes


def _targets(plan: Plan) -> tuple[_Target, ...]:
    """Resolve and write out every request once, before the clock runs."""
    if not plan.urls:
        raise UsageError("--url: at least one is needed")
    if not plan.rate > 0 or plan.connections < 1 or not plan.timeout > 0:
        raise UsageError("--rate, --connections and --timeout must be above 0")
    found = []
    for url, host in itertools.product(plan.urls, plan.hosts or ("",)):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"--url {url}: expected http://host[:port]/path")
        try:
            info = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UsageError(f"--url {url}: cannot resolve {parts.hostname}: {error}") from error
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = [f"{plan.method} {path} HTTP/1.1", f"Host: {host or parts.netloc}", *plan.headers]
        if plan.body_bytes:
            head.append(f"Content-Length: {plan.body_bytes}")
        if not plan.keepalive:
            head.append("Connection: close")
        message = ("\r\n".join(head) + "\r\n\r\n").encode() + b"x" * plan.body_bytes
        found.append(_Target(f"{host or parts.netloc}{path}", info[0], info[4], message))
    return tuple(found)


class _Request:
    __slots__ = ("connection", "due", "number", "target")

    def __init__(self, number: int, due: float, target: _Target) -> None:
        self.number = number
        self.due = due
        self.target = target
        self.connection: _Connection | None = None


class _BadResponse(Exception):
    pass


class _Response:
    """One response as it comes in. `feed` is true once it is whole."""

    __slots__ = ("_buffer", "_chunked", "_left", "body", "close", "head", "head_only", "status")

    def __init__(self, *, head_only: bool) -> None:
        self.status = 0
        self.head = b""
        self.body = b""
        self.close = False
        self.head_only = head_only
        self._buffer = b""
        self._chunked = False
        self._left: int | None = 0

    def feed(self, data: bytes) -> bool:
        """Take what was received; raises _BadResponse for what is not HTTP."""
        if not self.head:
            data = self._take_head(self._buffer + data)
            if not self.head:
                self._buffer = data
                return False
            self._buffer = b""
        if self._chunked:
            return self._take_chunks(self._buffer + data)
        self._keep(data)
        if self._left is None:
            return False
        self._left -= len(data)
        if self._left < 0:
            raise _BadResponse("more bytes than Content-Length says")
        return self._left == 0

    def ends_by_close(self) -> bool:
        """Whether an end of the connection now is the end of the body."""
        return bool(self.head) and not self._chunked and self._left is None

    def _keep(self, data: bytes) -> None:
        if len(self.body) < _BODY_KEPT:
            self.body += data[: _BODY_KEPT - len(self.body)]

    def _take_head(self, data: bytes) -> bytes:
        """Read the head if it is there; returns the bytes after it."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _RECEIVE:
                    raise _BadResponse("no end of the header in 64 KiB")
                return data
            head, data = data[:end], data[end + 4 :]
            if not head.startswith(b"HTTP/1.") or not head[9:12].isdigit():
                raise _BadResponse(f"not an HTTP/1 status line: {head[:60]!r}")
            status = int(head[9:12])
            if status >= 200:
                break
        self.status, self.head = status, head
        self.close = _CLOSE.search(head) is not None or head.startswith(b"HTTP/1.0")
        if self.head_only or status in (204, 304):
            self._left = 0
        elif _CHUNKED.search(head):
            self._chunked = True
        else:
            length = _LENGTH.search(head)
            self._left = int(length.group(1)) if length else None
            self.close = self.close or length is None
        return data

    def _take_chunks(self, data: bytes) -> bool:
        while True:
            line_end = data.find(b"\r\n")
            if line_end < 0:
                break
            try:
                size = int(data[:line_end].split(b";")[0], 16)
            except ValueError as error:
                raise _BadResponse(f"bad chunk size {data[:line_end][:20]!r}") from error
            end = line_end + 2 + size + 2
            if len(data) < end:
                break
            if size == 0:
                if data[line_end + 2 : end] != b"\r\n":
                    raise _BadResponse("trailers are not supported")
                if len(data) > end:
                    raise _BadResponse("bytes after the last chunk")
                return True
            self._keep(data[line_end + 2 : end - 2])
            data = data[end:]
        self._buffer = data
        return False


class _Connection:
    """A non-blocking socket driven by the event loop's readiness callbacks.

    Plain sockets, because asyncio's transports cannot say at the moment of sending whether the
    server has closed already, and the line between `reconnects` and a failure lies just there.
    """

    __slots__ = (
        "_load",
        "_out",
        "_response",
        "_waits_to_write",
        "closed",
        "request",
        "sock",
        "target",
        "used",
    )

    def __init__(self, load: _Load, target: _Target) -> None:
        self._load = load
        self.target = target
        self.request: _Request | None = None
        self.used = 0
        self.closed = False
        self._waits_to_write = False
        self._out = b""
        self._response = _Response(head_only=False)
        self.sock = socket.socket(target.family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connect(self, request: _Request) -> None:
        """Open the connection and send `request` on it."""
        self._take(request)
        code = self.sock.connect_ex(self.target.address)
        if code not in (0, errno.EINPROGRESS):
            # Not at once: what follows may be the next connect, and so on down the whole queue.
            self._load.loop.call_soon(self._fail_connect, code)
            return
        self._load.loop.add_writer(self.sock, self._connected)

    def is_closed(self) -> bool:
        """Whether the server has closed this idle connection, as far as the kernel knows."""
        try:
            self.sock.recv(1)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
        return True  # its end, or bytes that nobody asked for (a 408): of no use either way

    def send(self, request: _Request) -> None:
        """Send `request` on the open, idle connection."""
        self._take(request)
        self._write()

    def close(self) -> None:
        self.closed = True
        self._load.loop.remove_reader(self.sock)
        self._load.loop.remove_writer(self.sock)
        self.sock.close()

    def _take(self, request: _Request) -> None:
        request.connection = self
        self.request = request
        self._out = request.target.message
        self._response = _Response(head_only=self._load.plan.method == "HEAD")

    def _connected(self) -> None:
        self._load.loop.remove_writer(self.sock)
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail_connect(code)
            return
        self._load.loop.add_reader(self.sock, self._readable)
        self._write()

    def _fail_connect(self, code: int) -> None:
        message = errno.errorcode.get(code, str(code))
        if code == errno.ECONNREFUSED:
            kind = "refused"
        elif code == errno.EADDRNOTAVAIL:
            kind = "client"
        else:
            kind = "connect"
        self._broken(kind, message)

    def _write(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._broken("reset", f"while sending: {error}")
            return
        if sent == len(self._out):
            self._out = b""
            if self._waits_to_write:
                self._waits_to_write = False
                self._load.loop.remove_writer(self.sock)
        else:
            self._out = self._out[sent:]
            self._waits_to_write = True
            self._load.loop.add_writer(self.sock, self._write)

    def _readable(self) -> None:
        try:
            data = self.sock.recv(_RECEIVE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._broken("reset", f"while receiving: {error}")
            return
        if self.request is None:
            self._load.idle_closed(self)
            return
        if not data:
            if self._response.ends_by_close():
                self._answered()
            else:
                got = "after a part of the answer" if self._response.head else "without an answer"
                self._broken("closed", f"connection closed {got}")
            return
        try:
            whole = self._response.feed(data)
        except _BadResponse as error:
            self._broken("bad_response", str(error))
            return
        if whole:
            self._answered()

    def _answered(self) -> None:
        request, self.request = self.request, None
        assert request is not None
        request.connection = None
        response = self._response
        self.used += 1
        if self._waits_to_write:  # answered before the whole request was sent
            self._load.loop.remove_writer(self.sock)
        self._load.answered(request, response, reused=self.used > 1)
        self._load.release(self, close=response.close or self._waits_to_write)

    def _broken(self, kind: str, detail: str) -> None:
        if self.closed:
            return  # its request has timed out meanwhile
        request, self.request = self.request, None
        self._load.discard(self)
        if request is not None:
            request.connection = None
            status = self._response.status
            self._load.failed(request, kind, detail, status=status, reused=self.used > 0)


class _Load:
    """The run itself: sends what is due, keeps the connections, counts."""

    def __init__(self, plan: Plan, on_under_way: Callable[[], None] | None) -> None:
        self.plan = plan
        self.loop = asyncio.get_running_loop()
        self._on_under_way = on_under_way
        self._targets = _targets(plan)
        self._expect = frozenset(plan.expect)
        name = re.escape(plan.backend_header.encode())
        self._backend_header = (
            re.compile(rb"\r\n" + name + rb":[ \t]*([^\r\n]*)", re.IGNORECASE) if name else None
        )
        self._idle: dict[Any, deque[_Connection]] = {t.address: deque() for t in self._targets}
        self._queue: dict[Any, deque[_Request]] = {t.address: deque() for t in self._targets}
        self._open: dict[Any, int] = dict.fromkeys(self._idle, 0)
        self._lingering: dict[_Connection, float] = {}
        self._outstanding: dict[int, _Request] = {}
        self._sent = 0
        self._reconnected: list[float] = []
        self._opened = 0
        self._latencies = array("d")
        self._lags = array("d")
        self._kinds: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._backends: Counter[str] = Counter()
        self._details: list[Failure] = []
        self._records: list[Record] = []
        self._start = 0.0
        self._end = 0.0
        self._last_answer = 0.0
        self._sending = True
        self._finished = asyncio.Event()

    async def run(self, told_to_stop: Callable[[], bool]) -> Result:
        """Send until the time is up or one says so, wait for what is under way, report."""
        self._told_to_stop = told_to_stop
        started_at = time.time()
        self._start = self._last_answer = self.loop.time()
        self._end = float("inf") if self.plan.seconds is None else self._start + self.plan.seconds
        self._send_due()
        self._sweep()
        await self._finished.wait()
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        for connection in self._lingering:
            connection.close()
        return self._result(started_at)

    def stop(self) -> None:
        """Send no more; the run ends with the last answer under way."""
        self._sending = False
        self._maybe_finished()

    # Sending

    def _send_due(self) -> None:
        now = self.loop.time()
        while self._sending:
            due = self._start + self._sent / self.plan.rate
            if due >= self._end:
                self.stop()
                return
            if due > now:
                self.loop.call_at(due, self._send_due)
                return
            request = _Request(self._sent, due, self._targets[self._sent % len(self._targets)])
            self._outstanding[self._sent] = request
            self._sent += 1
            self._dispatch(request)
            now = self.loop.time()
            self._lags.append(now - due)

    def _dispatch(self, request: _Request) -> None:
        address = request.target.address
        if not self.plan.keepalive:
            self._connect(request)
            return
        # New connections first, so that the whole pool is in use, then the one that waited longest.
        if self._open[address] < self.plan.connections:
            self._connect(request)
            return
        idle = self._idle[address]
        if idle:
            self._reuse(idle.popleft(), request)
        else:
            self._queue[address].append(request)

    def _reuse(self, connection: _Connection, request: _Request) -> None:
        """Send on a connection that is open as far as one can know at this moment, or a new one."""
        if not connection.is_closed():
            connection.send(request)
            return
        self._reconnected.append(self.loop.time())
        connection.close()
        self._open[connection.target.address] -= 1
        self._connect(request)

    def _connect(self, request: _Request) -> None:
        try:
            connection = _Connection(self, request.target)
        except OSError as error:
            self.failed(request, "client", f"cannot make a socket: {error}", status=0, reused=False)
            return
        self._open[request.target.address] += 1
        self._opened += 1
        connection.connect(request)

    # What connections report

    def answered(self, request: _Request, response: _Response, *, reused: bool) -> None:
        """A whole answer has come."""
        status = response.status
        if status in self._expect if self._expect else 200 <= status < 300:
            now = self.loop.time()
            self._statuses[str(status)] += 1
            backend = self._backend(response)
            if backend:
                self._backends[backend] += 1
            self._latencies.append(now - request.due)
            self._done(request, now, status, "", backend)
        else:
            snippet = response.body[:_SNIPPET].decode("utf-8", "replace")
            self.failed(request, "status", snippet, status=status, reused=reused)

    def failed(
        self, request: _Request, kind: str, detail: str, *, status: int, reused: bool
    ) -> None:
        """The request came to nothing."""
        now = self.loop.time()
        if status:
            self._statuses[str(status)] += 1
        self._kinds[kind] += 1
        if len(self._details) < self.plan.details:
            self._details.append(
                Failure(
                    offset=round(request.due - self._start, 6),
                    kind=kind,
                    status=status,
                    latency_ms=round((now - request.due) * 1000, 3),
                    target=request.target.label,
                    detail=detail,
                    reused=reused,
                )
            )
        self._done(request, now, status, kind, "")

    def release(self, connection: _Connection, *, close: bool) -> None:
        """The connection has done its request and may take another one."""
        address = connection.target.address
        if close or not self.plan.keepalive:
            # The server closes first, so that TIME_WAIT and its port are on its side.
            self._open[address] -= 1
            self._lingering[connection] = self.loop.time() + _LINGER_SECONDS
            self._serve_queue(address)
        elif self._queue[address]:
            self._reuse(connection, self._queue[address].popleft())
        else:
            self._idle[address].append(connection)

    def idle_closed(self, connection: _Connection) -> None:
        """The server has closed a connection on which no request is under way."""
        if self._lingering.pop(connection, None) is not None:
            connection.close()
            return
        with contextlib.suppress(ValueError):
            self._idle[connection.target.address].remove(connection)
        self._reconnected.append(self.loop.time())
        self.discard(connection)

    def discard(self, connection: _Connection) -> None:
        """Close a connection for good; what waits may need another one."""
        connection.close()
        address = connection.target.address
        self._open[address] -= 1
        self._serve_queue(address)

    def _serve_queue(self, address: Any) -> None:
        if self._queue[address] and self._open[address] < self.plan.connections:
            self._connect(self._queue[address].popleft())

    def _backend(self, response: _Response) -> str:
        if self._backend_header is not None:
            found = self._backend_header.search(response.head)
            return found.group(1).strip().decode("latin-1") if found else ""
        if self.plan.backend_json:
            with contextlib.suppress(ValueError, AttributeError):
                return str(json.loads(response.body).get(self.plan.backend_json, ""))
        return ""

    def _done(self, request: _Request, now: float, status: int, kind: str, backend: str) -> None:
        if self._outstanding.pop(request.number, None) is None:
            raise AssertionError(f"request {request.number} was counted twice")
        self._last_answer = now
        if self.plan.keep_records:
            due = round(request.due - self._start, 6)
            latency = round((now - request.due) * 1000, 3)
            self._records.append(Record(due, latency, status, kind, backend))
        if self._on_under_way is not None:
            self._on_under_way()
            self._on_under_way = None
        self._maybe_finished()

    def _maybe_finished(self) -> None:
        if not self._sending and not self._outstanding:
            self._finished.set()

    # Time

    def _sweep(self) -> None:
        """Fail what is overdue, close what lingers, look for the signs to stop."""
        now = self.loop.time()
        # Requests are kept in the order in which they were due.
        while self._outstanding:
            request = next(iter(self._outstanding.values()))
            if request.due + self.plan.timeout > now:
                break
            self._time_out(request)
        for connection in [c for c, until in self._lingering.items() if until <= now]:
            del self._lingering[connection]
            connection.close()
        stop_file = self.plan.stop_file
        if self._told_to_stop() or (stop_file and Path(stop_file).exists()):
            self.stop()
        if not self._finished.is_set():
            self.loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _time_out(self, request: _Request) -> None:
        connection = request.connection
        if connection is None:
            self._queue[request.target.address].remove(request)
            detail, reused = "no connection of the pool became free", False
        else:
            connection.request = None
            self.discard(connection)
            detail, reused = "no whole answer in time", connection.used > 0
        self.failed(request, "timeout", detail, status=0, reused=reused)

    def _result(self, started_at: float) -> Result:
        latencies = sorted(self._latencies)
        lags = sorted(self._lags)

        def ms(ordered: list[float], share: float) -> float:
            return round(percentile(ordered, share) * 1000, 3)

        return Result(
            requests=self._sent,
            failed=sum(self._kinds.values()),
            failures=dict(self._kinds),
            statuses=dict(self._statuses),
            backends=dict(self._backends),
            reconnects=len(self._reconnected),
            connections=self._opened,
            p50_ms=ms(latencies, 0.5),
            p99_ms=ms(latencies, 0.99),
            p999_ms=ms(latencies, 0.999),
            max_ms=ms(latencies, 1.0),
            lag_ms_p99=ms(lags, 0.99),
            lag_ms_max=ms(lags, 1.0),
            started_at=round(started_at, 6),
            seconds=round(self._last_answer - self._start, 6),
            details=tuple(self._details),
            reconnected=tuple(round(started_at + at - self._start, 6) for at in self._reconnected),
            records=tuple(self._records),
        )


def run(plan: Plan, *, stop: threading.Event | None = None) -> Result:
    """Carry out `plan` in this thread.

    Args:
        stop: setting it (from another thread) ends the load early.

    Raises:
        UsageError: the plan makes no sense, or a host name cannot be resolved.
    """

    async def main() -> Result:
        return await _Load(plan, None).run(stop.is_set if stop else lambda: False)

    return asyncio.run(main())


class LoadProcess:
    """The command line as a process beside the caller, for as long as an operation takes.

    Usable as a context manager; leaving it kills a load that has not been stopped.

    Args:
        plan: `seconds` is usually None here.
        prefix: words before the command, to run it elsewhere (`ip netns exec NAME`).
        python: the interpreter; any 3.9 or later.
    """

    def __init__(
        self, plan: Plan, *, prefix: Sequence[str] = (), python: str = sys.executable
    ) -> None:
        self._plan = plan
        self._command = [*prefix, python, str(Path(__file__).resolve()), *_arguments(plan)]
        self._records: Path | None = None
        if plan.keep_records:
            handle, name = tempfile.mkstemp(prefix="load-records-")
            os.close(handle)
            self._records = Path(name)
            self._command += ["--records", name]
        self._process: subprocess.Popen[str] | None = None
        self._first = threading.Event()
        self._under_way = False
        self._stderr: list[str] = []
        self._stdout = ""
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> LoadProcess:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self, *, within: float = 15.0) -> LoadProcess:
        """Start it and wait until the first request was answered or has failed.

        Raises:
            RuntimeError: it ended at once, or there was no answer in time.
        """
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_stdout, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._first.wait(within)
        if not self._under_way:
            self.kill()
            raise RuntimeError(f"load did not start: {''.join(self._stderr).strip() or 'silent'}")
        return self

    @property
    def pid(self) -> int:
        """Process id of the load (or of the prefix, where that does not replace itself)."""
        assert self._process is not None, "not started"
        return self._process.pid

    def stop(self) -> Result:
        """Send no more, wait for the answers under way, return the result.

        Raises:
            RuntimeError: it broke down instead of reporting.
        """
        assert self._process is not None, "not started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout=self._plan.timeout + 15)

    def wait(self, *, timeout: float | None = None) -> Result:
        """Wait until it ends by itself (`seconds`, stop file) and return the result."""
        assert self._process is not None, "not started"
        try:
            self._process.wait(timeout)
        finally:
            self.kill()
        if not self._stdout:
            raise RuntimeError(f"load broke down: {''.join(self._stderr).strip()}")
        result = Result.from_json(self._stdout)
        if self._records is not None:
            with self._records.open(encoding="utf-8") as lines:
                result = replace(result, records=tuple(Record(**json.loads(x)) for x in lines))
            self._records.unlink()
        return result

    def kill(self) -> None:
        """End it without a result, if it still runs."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def _read_stdout(self, stream: TextIO) -> None:
        with stream:
            self._stdout = stream.read()

    def _read_stderr(self, stream: TextIO) -> None:
        with stream:
            for line in stream:
                if line.strip() == _UNDER_WAY:
                    self._under_way = True
                    self._first.set()
                else:
                    self._stderr.append(line)
        self._first.set()


def _arguments(plan: Plan) -> list[str]:
    """The command line that stands for `plan`."""
    words = ["--json", "--with-parent", "--rate", str(plan.rate), "--timeout", str(plan.timeout)]
    words += ["--connections", str(plan.connections), "--method", plan.method]
    words += ["--body-bytes", str(plan.body_bytes), "--details", str(plan.details)]
    words.append("--keepalive" if plan.keepalive else "--no-keepalive")
    if plan.seconds is not None:
        words += ["--seconds", str(plan.seconds)]
    for option, values in (
        ("--url", plan.urls),
        ("--host", plan.hosts),
        ("--header", plan.headers),
        ("--expect", plan.expect),
        ("--backend-header", (plan.backend_header,)),
        ("--backend-json", (plan.backend_json,)),
        ("--stop-file", (plan.stop_file,)),
    ):
        for value in values:
            if value != "":
                words += [option, str(value)]
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.load",
        description="Constant-rate HTTP/1.1 load without retries; latency from the time due.",
    )
    add = parser.add_argument
    add("--url", action="append", required=True, help="http://host:port/path; repeatable")
    add("--host", action="append", default=[], help="Host header; repeatable, in rotation")
    add("--rate", type=float, default=100.0, help="requests per second (100)")
    add("--seconds", type=float, help="how long; without it until SIGTERM, SIGINT or --stop-file")
    add("--keepalive", action=argparse.BooleanOptionalAction, default=True)
    add("--connections", type=int, default=16, help="size of the keep-alive pool (16)")
    add("--timeout", type=float, default=10.0, help="seconds from the time due (10)")
    add("--method", default="GET")
    add("--header", action="append", default=[], help="'Name: value'; repeatable")
    add("--body-bytes", type=int, default=0, help="size of each request's body (0)")
    add("--expect", type=int, action="append", default=[], help="status that is success (2xx)")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--backend-header", default="", help="response header: who answered")
    who.add_argument("--backend-json", default="", help="JSON body field: who answered")
    add("--details", type=int, default=20, help="failures told one by one (20)")
    add("--stop-file", default="", help="stop as soon as it exists")
    add("--records", default="", help="write every request to this file, a line of JSON each")
    add("--with-parent", action="store_true", help="stop when the parent process has ended")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


async def _main(plan: Plan, *, with_parent: bool) -> Result:
    loop = asyncio.get_running_loop()
    parent = os.getppid()

    def under_way() -> None:
        print(_UNDER_WAY, file=sys.stderr, flush=True)

    load = _Load(plan, under_way)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, load.stop)
    return await load.run(lambda: with_parent and os.getppid() != parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    plan = Plan(
        urls=tuple(options.url),
        hosts=tuple(options.host),
        rate=options.rate,
        seconds=options.seconds,
        keepalive=options.keepalive,
        connections=options.connections,
        timeout=options.timeout,
        method=options.method,
        headers=tuple(options.header),
        body_bytes=options.body_bytes,
        expect=tuple(options.expect),
        backend_header=options.backend_header,
        backend_json=options.backend_json,
        details=options.details,
        stop_file=options.stop_file,
        keep_records=bool(options.records),
    )
    # A connection per request under way: the usual 1,024 descriptors may be too few.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        result = asyncio.run(_main(plan, with_parent=options.with_parent))
    except UsageError as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 2
    if options.records:
        with Path(options.records).open("w", encoding="utf-8") as out:
            for record in result.records:
                out.write(json.dumps(record._asdict()) + "\n")
    print(json.dumps(result.as_dict(), indent=2) if options.json else result.summary())
    if not result.requests:
        return 3
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
