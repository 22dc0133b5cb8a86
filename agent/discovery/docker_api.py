"""The engine's REST API as discovery sees it: a few GET calls and the event stream.

The one place that knows the `docker` library and its exceptions. It never writes: `GET` is all it
can do, `CALLS` is all it asks for. Answers are handed on as bytes, so that a poll can tell an
unchanged answer without reading it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests
import urllib3
from docker import APIClient
from docker.errors import DockerException
from docker.tls import TLSConfig
from docker.utils import kwargs_from_env

from agent.config.settings import Settings
from agent.errors import DiscoveryError, DockerRefused, DockerUnavailable

DEFAULT_URL = "unix:///var/run/docker.sock"

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
"""Every path that is ever asked for, always with GET; what a filtering socket proxy must let by."""

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

    def events(self, filters: Filters) -> EventStream:
        """The event stream, from now on."""

    def close(self) -> None:
        """Let go of the connections."""


Connect = Callable[[], Engine]


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


class DockerEngine:
    """An engine behind the `docker` library; made anew after each failure.

    A new one opens the socket by its path again, which is what finds a restarted dockerd.
    """

    def __init__(self, settings: Settings) -> None:
        """Connect, and settle on an API version.

        Raises:
            DockerUnavailable: no answer.
            DockerRefused: the engine answered with an error.
            DiscoveryError: the URL or the TLS files cannot be used.
        """
        self._timeout = settings.request_timeout
        arguments = _arguments(settings)
        self.url = str(arguments.get("base_url") or DEFAULT_URL)
        with _mapped(self.url):
            # The stubs know of whole seconds only; the library hands the number on as it is.
            timeout: Any = self._timeout
            self._client = APIClient(version="auto", timeout=timeout, **arguments)
        self.api_version = str(self._client.api_version)
        self.version = str(read(self, "/version").get("Version", ""))

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
            query["filters"] = json.dumps({key: list(value) for key, value in filters.items()})
        with _mapped(self.url):
            response = self._client.get(
                f"{self._client.base_url}/v{self.api_version}{path}",
                params=query,
                timeout=self._timeout,
            )
            body: bytes = response.content
        if response.status_code != requests.codes.ok:
            raise DockerRefused(
                f"the engine at {self.url} refuses GET {path}: {_message(body)}",
                status=response.status_code,
            )
        return body

    def events(self, filters: Filters) -> EventStream:
        """The event stream, from now on."""
        with _mapped(self.url):
            # Lists, no tuples: the library takes anything else for one single value.
            lists = {key: list(value) for key, value in filters.items()}
            return _Events(self._client.events(decode=True, filters=lists), self.url)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()


class _Events:
    """The library's stream, with our errors."""

    def __init__(self, stream: Any, url: str) -> None:
        self._stream = stream
        self._url = url

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _mapped(self._url):
            yield from self._stream

    def close(self) -> None:
        # The library shuts the socket down; it may be gone already, which is as good.
        try:
            self._stream.close()
        except (OSError, AttributeError, DockerException):
            return


def _arguments(settings: Settings) -> dict[str, Any]:
    """What the library's client is made with: settings first, then Docker's environment."""
    with _mapped(settings.docker_url or os.environ.get("DOCKER_HOST", DEFAULT_URL)):
        if not settings.docker_url:
            return dict(kwargs_from_env())
        arguments: dict[str, Any] = {"base_url": settings.docker_url}
        if settings.tls_ca_cert or settings.tls_cert or settings.allow_insecure:
            pair = (settings.tls_cert, settings.tls_key) if settings.tls_cert else None
            arguments["tls"] = TLSConfig(
                client_cert=pair,
                ca_cert=settings.tls_ca_cert or None,
                verify=not settings.allow_insecure,
            )
        return arguments


@contextmanager
def _mapped(url: str) -> Iterator[None]:
    """Turn whatever the library and what lies below it raises into our errors."""
    try:
        yield
    except (DockerRefused, DockerUnavailable):
        raise
    except requests.Timeout as error:
        raise DockerUnavailable(f"the engine at {url} did not answer in time") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise DockerUnavailable(_unreachable(url, error)) from error
    except DockerException as error:
        cause = _os_error(error)
        if cause is not None or isinstance(error.__context__, requests.RequestException):
            raise DockerUnavailable(_unreachable(url, error)) from error
        raise DiscoveryError(f"the engine at {url} cannot be used: {error}") from error
    except ValueError as error:
        raise DockerUnavailable(f"the engine at {url} sent something odd: {error}") from error


def _unreachable(url: str, error: BaseException) -> str:
    """One sentence; for the usual cases with the cure."""
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
