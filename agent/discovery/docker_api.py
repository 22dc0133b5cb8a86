"""The engine's REST API as discovery sees it: a few GET calls and the event stream.

The one place that knows the `docker` library and its exceptions. `GET` of the paths in `CALLS` is
all that is asked for; the one call that changes anything, `WRITES`, is made only when
AttachNetworks is on. Answers are handed on as bytes, so that a poll can tell an unchanged answer
without reading it.
"""

from __future__ import annotations

import codecs
import http.client
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import requests
import urllib3
from docker import APIClient
from docker.errors import DockerException
from docker.tls import TLSConfig

from agent import tls
from agent.config.settings import Settings
from agent.errors import DiscoveryError, DockerRefused, DockerUnavailable

_log = logging.getLogger(__name__)

DEFAULT_URL = "unix:///var/run/docker.sock"

OLDEST_API = (1, 24)
NEWEST_API = (1, 52)
"""What is read has this form in all versions from the one to the other."""

CALLS = (
    "/version",
    "/info",
    "/swarm",
    "/services",
    "/tasks",
    "/nodes",
    "/networks",
    "/networks/{id}",
    "/containers/json",
    "/containers/{id}/json",
    "/events",
)
"""Every path that is ever asked for with GET; what a filtering socket proxy must let by."""

WRITES = ("/networks/{id}/connect",)
"""Every path that is ever posted to, with AttachNetworks only."""

_LONGEST_EVENT = 1 << 20
_LONGEST_ELEMENT = 1 << 24
_CHUNK = 1 << 18
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))

Filters = Mapping[str, Sequence[str]]


class EventStream(Protocol):
    """Events of the engine as they come; ends when the connection does."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield events.

        Raises:
            DockerUnavailable: what came is no event.
        """

    def close(self) -> None:
        """End it, from any thread."""


class Engine(Protocol):
    """An engine that answered. Every method raises DockerUnavailable or DockerRefused."""

    @property
    def version(self) -> str:
        """Version of the engine."""

    @property
    def api_version(self) -> str:
        """Version of the API that is spoken with it."""

    @property
    def host(self) -> str:
        """Host part of a TCP URL, empty for a socket."""

    def get(
        self, path: str, *, filters: Filters | None = None, params: Mapping[str, str] | None = None
    ) -> bytes:
        """The whole body of an answer; half of one is an error."""

    def each(self, path: str) -> Iterator[dict[str, Any]]:
        """The elements of a list, parsed one by one, so that the whole never lies in memory.

        Raises:
            DockerUnavailable: also when it ends early, after what came before has been given.
        """

    def events(self, filters: Filters) -> EventStream:
        """The event stream, from now on; without filters everything."""

    def connect_network(self, network: str, container: str) -> None:
        """Attach a container to a network; well also if it is attached already."""

    def close(self) -> None:
        """Let go of the connections."""


Fit = Callable[[Engine], object]
"""Raises DiscoveryError for an engine that answers, but is not what is looked for."""


def whatever(_: Engine) -> None:
    """Fit for all engines."""


class Connect(Protocol):
    """How a source gets at its engine."""

    def __call__(self, fit: Fit = whatever) -> Engine:
        """An engine that answers and is fit.

        Raises:
            DiscoveryError: there is none; what is wrong with it, or with each.
        """


def read(engine: Engine, path: str, **params: str) -> Any:
    """The parsed answer of a call.

    Raises:
        DockerUnavailable: no answer, or one that is no JSON.
        DockerRefused: the engine answered with an error.
    """
    return parse(engine.get(path, params=params or None), path)


def parse(body: bytes, path: str) -> Any:
    """Parse the body of an answer.

    Raises:
        DockerUnavailable: it is no JSON.
    """
    try:
        return json.loads(body)
    except ValueError as error:
        raise DockerUnavailable(f"the engine's answer to {path} is not JSON: {error}") from error


def addresses(settings: Settings) -> tuple[str, ...]:
    """Where the engine may be reached, first to be tried first.

    DockerURL, else DOCKER_HOST, either with commas between several; else the local socket.
    """
    text = settings.docker_url or os.environ.get("DOCKER_HOST", "")
    parts = filter(None, (part.strip() for part in text.split(",")))
    # The library takes HOST:PORT for tcp too, and whether TLS is spoken hangs on the scheme.
    urls = (part if "://" in part or part.startswith("/") else f"tcp://{part}" for part in parts)
    return tuple(urls) or (DEFAULT_URL,)


class Connector:
    """Connects to the first address that answers, and keeps to it until it fails.

    Several managers of one cluster are one engine with several addresses: where one stops
    answering, or is a manager no longer, the next one is tried.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._urls = addresses(settings)
        self._first = 0
        if settings.allow_insecure and any(_client(settings, url) for url in self._urls):
            _log.warning("AllowInsecure: the engine's certificate is not verified")
            # Said once, here; the library would say it with each request.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def __call__(self, fit: Fit = whatever) -> DockerEngine:
        """Connect.

        Args:
            fit: what is asked of the engine before it is taken.

        Raises:
            DockerUnavailable: no address answers.
            DockerRefused: the only address answered with an error.
            DiscoveryError: the URL or the TLS files cannot be used, or the only one is not fit.
        """
        errors: list[DiscoveryError] = []
        count, first = len(self._urls), self._first
        for index in (at % count for at in range(first, first + count)):
            try:
                engine = self._connect(index, fit)
            except DiscoveryError as error:
                errors.append(error)
                continue
            self._first = index
            return engine
        if len(errors) == 1:
            raise errors[0]
        raise DockerUnavailable("; ".join(str(error) for error in errors))

    def _connect(self, index: int, fit: Fit) -> DockerEngine:
        with ExitStack() as undo:
            engine = DockerEngine(
                self._settings, url=self._urls[index], failed=partial(self._leave, index)
            )
            undo.callback(engine.close)
            fit(engine)
            undo.pop_all()
        return engine

    def _leave(self, index: int) -> None:
        """The next connection is first tried elsewhere."""
        self._first = (index + 1) % len(self._urls)


class DockerEngine:
    """An engine behind the `docker` library; made anew after each failure.

    A new one opens the socket by its path again, which is what finds a restarted dockerd.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        url: str = "",
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect, and settle on an API version.

        Args:
            url: which of the `addresses`; the first one by default.
            failed: is told when a call fails for a reason that another address may not have.

        Raises:
            DockerUnavailable: no answer.
            DockerRefused: the engine answered with an error.
            DiscoveryError: the URL or the TLS files cannot be used.
        """
        # The stubs know of whole seconds only; the library hands the number on as it is.
        timeout: Any = settings.request_timeout
        self._timeout = timeout
        self._failed = failed
        self.url = url or addresses(settings)[0]
        self._tls = _client(settings, self.url)
        if self._tls and (why := tls.unusable(self._tls)):
            raise DiscoveryError(f"the engine at {self.url} cannot be reached: {why}")
        with _mapped(self.url):
            try:
                self._client = APIClient(
                    base_url=self.url,
                    version=_written(OLDEST_API),
                    timeout=timeout,
                    tls=_for_library(self._tls, verify=not settings.allow_insecure),
                )
            except ValueError as error:
                raise DiscoveryError(_unusable(self.url, error)) from error
        # What a proxy or a CA bundle of the environment says is not meant for the engine.
        self._client.trust_env = False
        self._prefix = ""
        facts = read(self, "/version")
        self.version = str(facts.get("Version", ""))
        self.api_version = _written(_agreed(self.url, facts))
        self._prefix = f"/v{self.api_version}"

    @property
    def host(self) -> str:
        """Host part of a TCP URL, empty for a socket."""
        parts = urlsplit(self.url)
        return parts.hostname or "" if parts.scheme in ("tcp", "http", "https") else ""

    def get(
        self, path: str, *, filters: Filters | None = None, params: Mapping[str, str] | None = None
    ) -> bytes:
        """The whole body of an answer."""
        query = dict(params or {})
        if filters:
            query["filters"] = _filters(filters)
        with self._watched():
            response = self._client.get(self._at(path), params=query, timeout=self._timeout)
            return self._checked(response, f"GET {path}")

    def each(self, path: str) -> Iterator[dict[str, Any]]:
        """The elements of a list, parsed one by one."""
        with self._watched():
            response = self._client.get(self._at(path), stream=True, timeout=self._timeout)
            with response:
                if response.status_code != requests.codes.ok:
                    self._checked(response, f"GET {path}")
                yield from elements(response.iter_content(_CHUNK), path)

    def events(self, filters: Filters) -> EventStream:
        """The event stream, from now on."""
        with self._watched():
            response = self._client.get(
                self._at("/events"),
                params={"filters": _filters(filters)} if filters else {},
                headers={"Accept-Encoding": "identity"},
                stream=True,
                timeout=self._timeout,
            )
            if response.status_code != requests.codes.ok:
                self._checked(response, "GET /events")
            return _Events(response, self.url, self._tls)

    def connect_network(self, network: str, container: str) -> None:
        """Attach a container to a network."""
        path = f"/networks/{quote(network, safe='')}/connect"
        try:
            with self._watched():
                response = self._client.post(
                    self._at(path), json={"Container": container}, timeout=self._timeout
                )
                self._checked(response, f"POST {path}")
        except DockerRefused as error:
            if "already exists in network" not in str(error):
                raise

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _at(self, path: str) -> str:
        return f"{self._client.base_url}{self._prefix}{path}"

    def _checked(self, response: requests.Response, call: str) -> bytes:
        """The body of a good answer."""
        body: bytes = response.content
        if response.status_code != requests.codes.ok:
            said = _message(body)
            if _WANTS_TLS in said:
                said = "it speaks TLS there; set TLSCACert, TLSCert and TLSKey"
            raise DockerRefused(
                f"the engine at {self.url} refuses {call}: {said}", status=response.status_code
            )
        return body

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Map errors, and tell of those that another address may not have."""
        try:
            with _mapped(self.url, self._tls):
                yield
        except DockerUnavailable:
            self._failed()
            raise
        except DockerRefused as error:
            if error.status >= requests.codes.server_error:
                self._failed()
            raise


class _Events:
    """A stream of JSON objects, with or without anything between them.

    An engine ends each with a newline, a classic Swarm's manager puts nothing between them, and
    either may send them in pieces.
    """

    def __init__(self, response: requests.Response, url: str, client: tls.Client | None) -> None:
        self._response = response
        self._url = url
        self._tls = client
        self._closed = False
        # The library has no public way to either.
        body: Any = response.raw._fp
        self._body = body
        self._socket: socket.socket = body.fp.raw._sock
        # Silence is no failure; a peer that is gone without a word is told by the kernel.
        self._socket.settimeout(None)
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            with _mapped(self._url, self._tls):
                yield from _objects(self._chunks(), self._url)
        except DockerUnavailable:
            if not self._closed:
                raise

    def _chunks(self) -> Iterator[bytes]:
        try:
            while chunk := self._body.read1(65536):
                yield chunk
        except http.client.HTTPException as error:
            raise DockerUnavailable(f"the event stream of {self._url} broke off") from error

    def close(self) -> None:
        # Below TLS, whose state belongs to the thread that reads. It may be gone, which is as good.
        self._closed = True
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _objects(chunks: Iterator[bytes], url: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream, each as soon as it is whole.

    Raises:
        DockerUnavailable: what came is none, or the stream ended within one.
    """
    decoder, text = json.JSONDecoder(), ""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        text = (text + characters.decode(chunk)).lstrip()
        while text:
            try:
                event, end = decoder.raw_decode(text)
            except ValueError:
                event, end = None, 0
            if end and isinstance(event, dict):
                yield event
                text = text[end:].lstrip()
            elif end or not text.startswith("{") or len(text) > _LONGEST_EVENT:
                raise DockerUnavailable(
                    f"the engine at {url} sent something odd for an event: {text[:60]!r}"
                )
            else:
                break
    if text:
        raise DockerUnavailable(f"the event stream of {url} was cut in the middle of an event")


def elements(chunks: Iterable[bytes], path: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list that comes in pieces, each as soon as it is whole.

    Raises:
        DockerUnavailable: what came is no list of objects, or not all of one.
    """
    decoder = json.JSONDecoder()
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    text, at, begun, ended = "", 0, False, False
    for chunk in chunks:
        text, at = text[at:] + characters.decode(chunk), 0
        while not ended and (found := (_NEXT_OBJECT if begun else _FIRST_OBJECT).match(text, at)):
            try:
                element, at = decoder.raw_decode(text, found.end())
            except ValueError:
                break  # not whole yet
            begun = True
            yield element
        if not ended and (end := (_END if begun else _EMPTY).match(text, at)):
            at, ended = end.end(), True
        if len(text) - at > _LONGEST_ELEMENT:
            break
    if not ended or text[at:].strip():
        raise DockerUnavailable(
            f"the engine's answer to {path} is no whole list of objects: {text[at : at + 60]!r}"
        )


_FIRST_OBJECT = re.compile(r"\s*\[\s*(?={)")
_NEXT_OBJECT = re.compile(r"\s*,\s*(?={)")
_EMPTY = re.compile(r"\s*\[\s*\]\s*")
_END = re.compile(r"\s*\]\s*")


def _agreed(url: str, facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The newest API version that both sides know.

    Raises:
        DiscoveryError: the engine is too old.
    """
    spoken = _version(facts.get("ApiVersion")) or OLDEST_API
    if spoken < OLDEST_API:
        raise DiscoveryError(
            f"the engine at {url} speaks API {_written(spoken)}, and {_written(OLDEST_API)} is the "
            "oldest that can be used; update it"
        )
    # An engine that has dropped all that is known here is asked in the oldest it still has.
    return max(min(spoken, NEWEST_API), _version(facts.get("MinAPIVersion")))


def _version(text: object) -> tuple[int, ...]:
    found = re.fullmatch(r"(\d+)\.(\d+)", str(text))
    return tuple(int(part) for part in found.groups()) if found else ()


def _written(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _filters(filters: Filters) -> str:
    return json.dumps({key: list(value) for key, value in filters.items()})


def _client(settings: Settings, url: str) -> tls.Client | None:
    """How TLS is spoken with the engine, if it is: the settings' files, else Docker's environment.

    Who gave files or asks for https is never answered in the clear, and the server is verified
    unless AllowInsecure says otherwise: with the CA given, else with the public ones.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in ("tcp", "http", "https"):
        return None
    ca, cert, key = settings.tls_ca_cert, settings.tls_cert, settings.tls_key
    names = ("TLSCACert", "TLSCert", "TLSKey")
    asked = bool(ca or cert or key)
    directory = os.environ.get("DOCKER_CERT_PATH", "")
    if not asked and (directory or os.environ.get("DOCKER_TLS_VERIFY")):
        asked = True
        names = ("ca.pem of DOCKER_CERT_PATH", "cert.pem", "key.pem")
        files = (Path(directory or "~/.docker").expanduser() / f"{n}.pem" for n in _DOCKERS_FILES)
        ca, cert, key = (str(file) if file.exists() else "" for file in files)
    if not asked and scheme != "https":
        return None
    return tls.Client(names=names, ca=ca, cert=cert, key=key, unverified="AllowInsecure")


_DOCKERS_FILES = ("ca", "cert", "key")

_WANTS_TLS = "Client sent an HTTP request to an HTTPS server"


def _for_library(client: tls.Client | None, *, verify: bool) -> TLSConfig | bool:
    if client is None:
        return False
    return TLSConfig(
        client_cert=(client.cert, client.key) if client.cert else None,
        ca_cert=client.ca or None,
        verify=verify,
    )


@contextmanager
def _mapped(url: str, client: tls.Client | None = None) -> Iterator[None]:
    """Turn whatever the library and what lies below it raises into our errors."""
    try:
        yield
    except (DockerRefused, DockerUnavailable):
        raise
    except requests.Timeout as error:
        raise DockerUnavailable(f"the engine at {url} did not answer in time") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise DockerUnavailable(_unreachable(url, error, client)) from error
    except DockerException as error:
        cause = _os_error(error)
        if cause is not None or isinstance(error.__context__, requests.RequestException):
            raise DockerUnavailable(_unreachable(url, error, client)) from error
        raise DiscoveryError(_unusable(url, error)) from error
    except ValueError as error:
        raise DockerUnavailable(f"the engine at {url} sent something odd: {error}") from error


def _unusable(url: str, error: BaseException) -> str:
    return (
        f"the engine at {url} cannot be used: {error}; DockerURL (or DOCKER_HOST) is like "
        "unix:///var/run/docker.sock or tcp://HOST:PORT"
    )


def _unreachable(url: str, error: BaseException, client: tls.Client | None) -> str:
    """One sentence; for the usual cases with the cure."""
    if client is not None and (why := tls.reason(error, client)):
        return f"the engine at {url} cannot be reached: {why}"
    cause = _os_error(error)
    match cause:
        case FileNotFoundError():
            why = "there is no such socket; mount it, or set DockerURL"
        case PermissionError():
            why = "permission denied; run as a user in the socket's group"
        case ConnectionRefusedError() if url.startswith(("unix", "/", "http+unix")):
            why = (
                "nobody listens on the socket; where dockerd was restarted and the socket file "
                "itself is mounted, mount its directory instead"
            )
        case OSError():
            why = cause.strerror or str(cause)
        case _:
            why = str(error)
    return f"the engine at {url} cannot be reached: {why}"


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's own error below the library's layers."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        item = queue.pop(0)
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, OSError) and item.errno is not None:
            return item
        queue += [item.__cause__, item.__context__, getattr(item, "reason", None), *item.args]
    return None


def _message(body: bytes) -> str:
    """The engine's own words, without a page of HTML where a proxy answered."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        text = re.sub(r"\s+", " ", body.decode("utf-8", "replace")).strip()
        return text[:200] or "no reason given"
