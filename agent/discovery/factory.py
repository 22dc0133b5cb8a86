"""From the settings to the sources: what "auto" means, and what each source is made of."""

from __future__ import annotations

import logging
import threading
from contextlib import closing

from agent.config.settings import Settings
from agent.discovery.base import (
    Backoff,
    NullObserver,
    Observer,
    Publish,
    Reporter,
    Source,
    SourceStatus,
)
from agent.discovery.classic import ClassicSource
from agent.discovery.classic_nodes import is_classic
from agent.discovery.docker_api import Connect, Connector, Engine, read
from agent.discovery.engine import EngineSource
from agent.discovery.static import StaticSource
from agent.discovery.swarm import SwarmSource, require_manager
from agent.discovery.swarm_watch import opener
from agent.errors import DiscoveryError, SettingsError
from agent.model import SourceSnapshot

_log = logging.getLogger(__name__)


def build_sources(
    settings: Settings, observer: Observer | None = None, *, connect: Connect | None = None
) -> list[Source]:
    """The sources that the settings name, each once; nothing is connected to yet.

    Args:
        connect: how the engine is reached; the settings say so by default.

    Raises:
        SettingsError: "static" without StaticFile.
    """
    observer = observer or NullObserver()
    connect = connect or Connector(settings)
    wanted = dict.fromkeys(settings.sources)
    if "static" in wanted and not settings.static_file:
        raise SettingsError("Sources: static needs StaticFile, which is empty")
    if "auto" in wanted:
        # What the engine is, and so what "auto" is, cannot be asked for twice.
        wanted.pop("swarm", None)
        wanted.pop("engine", None)
        wanted.pop("classic", None)
        if settings.static_file:
            wanted.setdefault("static")
    sources: list[Source] = []
    for name in wanted:
        match name:
            case "auto":
                sources.append(AutoSource(settings, observer=observer, connect=connect))
            case "swarm":
                sources.append(_swarm(settings, observer, connect))
            case "engine":
                both = "swarm" in wanted
                sources.append(_engine(observer, connect, settings, skip_tasks=both))
            case "classic":
                sources.append(_classic(observer, connect, settings))
            case "static":
                sources.append(StaticSource(settings.static_file, observer=observer))
    return sources


def _swarm(settings: Settings, observer: Observer, connect: Connect) -> SwarmSource:
    return SwarmSource(
        settings,
        observer=observer,
        connect=connect,
        open_watch=opener(settings.watch_socket, timeout=settings.request_timeout),
    )


def _engine(
    observer: Observer, connect: Connect, settings: Settings, *, skip_tasks: bool = False
) -> EngineSource:
    return EngineSource(settings, observer=observer, connect=connect, skip_tasks=skip_tasks)


def _classic(observer: Observer, connect: Connect, settings: Settings) -> ClassicSource:
    return ClassicSource(settings, observer=observer, connect=connect)


class AutoSource:
    """What the engine is: a Swarm's manager, a classic one's, or a plain engine. Asked once."""

    def __init__(self, settings: Settings, *, observer: Observer, connect: Connect) -> None:
        self._settings = settings
        self._observer = observer
        self._connect = connect
        self._report = Reporter("auto", observer, _log)
        self._resolved: Source | None = None

    @property
    def name(self) -> str:
        """ "auto" until the engine has answered, then the name of what it is."""
        return self._resolved.name if self._resolved else "auto"

    @property
    def status(self) -> SourceStatus:
        """Where it stands."""
        return self._resolved.status if self._resolved else self._report.status

    def read_once(self) -> SourceSnapshot:
        """Ask the engine what it is, and read everything once.

        Raises:
            DiscoveryError: no answer, or a Swarm worker.
        """
        return self._resolve().read_once()

    def run(self, publish: Publish, stop: threading.Event) -> None:
        """Ask until the engine answers, then be what it is."""
        backoff = Backoff()
        while not stop.is_set():
            try:
                source = self._resolve()
            except DiscoveryError as error:
                self._report.failed(error)
                stop.wait(backoff.wait())
                continue
            source.run(publish, stop)

    def _resolve(self) -> Source:
        if self._resolved is None:
            made: list[Source] = []
            with closing(self._connect(lambda engine: made.append(self._source(engine)))):
                self._resolved = made[-1]
            _log.info("sources: auto is %s", self._resolved.name)
        return self._resolved

    def _source(self, engine: Engine) -> Source:
        """What an engine is read by.

        Raises:
            DiscoveryError: by none, since it is a worker.
        """
        info = read(engine, "/info")
        node = info.get("Swarm") or {}
        if is_classic(info):
            return _classic(self._observer, self._connect, self._settings)
        if node.get("LocalNodeState", "inactive") == "inactive":
            return _engine(self._observer, self._connect, self._settings)
        require_manager(engine)
        return _swarm(self._settings, self._observer, self._connect)
