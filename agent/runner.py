"""`tidegate run`: the controller with its listener, and settings that change while it runs.

Why apart from the controller: that one needs settings to exist, and with a key-value store there
may be none yet. Until they come this answers on the listener, says what it waits for, and touches
nothing. This module must not know what settings mean.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agent import http
from agent.config import stores
from agent.config.live import Follower
from agent.config.settings import Settings
from agent.config.stores import Choice, Loaded
from agent.controller import Controller, Readiness, State, build_fleet
from agent.discovery import build_sources
from agent.errors import SettingsError
from agent.metrics import CONTENT_TYPE, Metrics, version
from agent.model import Desired, Membership, Site

log = logging.getLogger("agent")


class Runner:
    """Runs the agent with the settings of one store.

    Args:
        choice: where the settings are.
        path: file that `-c` names, for the listener until a key-value store answers.
        told: is given settings when they come into force (for the log's level).
    """

    def __init__(
        self, choice: Choice, *, path: str | None, told: Callable[[Settings], None]
    ) -> None:
        self._choice = choice
        self._path = path
        self._told = told
        self._metrics = Metrics()
        self._controller: Controller | None = None
        self._listener: http.Listener | None = None
        self._listens_on = ""
        self._follower: Follower | None = None

    def start(self) -> None:
        """Start. Returns at once where the store is remote: the settings come when they come.

        Raises:
            SettingsError: the settings of a file or the environment cannot be used.
        """
        in_force = None
        if self._choice.store.remote:
            self._listen_meanwhile()
        else:
            loaded = stores.read(self._choice)
            for warning in loaded.warnings:
                log.warning("settings: %s", warning)
            self._apply(loaded)
            in_force = loaded.text
        self._follower = Follower(
            self._choice, apply=self._apply, observer=self._metrics, in_force=in_force
        )
        self._follower.start()

    def reread(self) -> None:
        """SIGHUP: read the settings now."""
        if self._follower is not None:
            self._follower.reread()

    def stop(self, timeout: float) -> None:
        """End cleanly within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        if self._follower is not None:
            self._follower.stop()
        if self._controller is not None:
            self._controller.stop(deadline - time.monotonic())
        if self._listener is not None:
            self._listener.stop()

    def _apply(self, loaded: Loaded) -> None:
        """Take settings into force. Raises SettingsError: they cannot be."""
        if self._controller is None:
            self._begin(loaded)
        else:
            self._controller.reload(loaded.settings, loaded.where)
        self._told(loaded.settings)

    def _begin(self, loaded: Loaded) -> None:
        controller = Controller(
            settings=loaded.settings,
            settings_from=loaded.where,
            build_sources=build_sources,
            fleet=build_fleet(loaded.settings, self._metrics),
            metrics=self._metrics,
        )
        self._listen(loaded.settings.listen_addr)
        controller.start()
        self._controller = controller
        log.info("tidegate %s, settings from %s", version(), loaded.where)

    def _listen(self, address: str) -> None:
        """Listen there, and no longer where we did until now. Raises SettingsError."""
        if self._listener is not None and self._listens_on == address:
            return
        listener = http.Listener(address, self._pages())
        listener.start()
        log.info("listening on %s", address)
        if self._listener is not None:
            self._listener.stop()
        self._listener, self._listens_on = listener, address

    def _listen_meanwhile(self) -> None:
        """Listen where the file or the environment says, which the store beats, or by default."""
        address = Settings().listen_addr
        try:
            address = stores.load(self._path).settings.listen_addr
        except SettingsError as error:
            log.warning("until the store answers, listening on %s: %s", address, error)
        try:
            self._listen(address)
        except SettingsError as error:
            log.warning("not listening until the store answers: %s", error)

    def _pages(self) -> http.Pages:
        def metrics_page() -> http.Page:
            controller = self._controller
            if controller is not None and not controller.settings.enable_metrics:
                return http.as_json(
                    {"error": "not_found", "message": "EnableMetrics is false"}, status=404
                )
            return http.Page(200, CONTENT_TYPE, self._metrics.exposition())

        def ready_page() -> http.Page:
            readiness = self._readiness()
            body = {"ready": readiness.ready, "reasons": list(readiness.reasons)}
            return http.as_json(body, status=200 if readiness.ready else 503)

        return {
            "/metrics": metrics_page,
            "/healthz": lambda: http.as_json({"alive": True}),
            "/readyz": ready_page,
            "/api/state": lambda: http.as_json(self._state()),
        }

    @property
    def _problem(self) -> str:
        return self._follower.problem if self._follower is not None else ""

    def _readiness(self) -> Readiness:
        if self._controller is not None:
            return self._controller.readiness()
        return Readiness(False, (f"settings: {self._problem}",))

    def _state(self) -> dict[str, object]:
        where = self._choice.store.where
        if self._controller is not None:
            state = self._controller.state().as_dict()
        else:
            state = State(
                version=version(),
                settings_from=where,
                readiness=self._readiness(),
                sources=(),
                waiting_for=(f"settings from {where}",),
                desired=Desired(Membership({}), Site(()), ()),
                rejections=(),
                instances=(),
            ).as_dict()
        return state | {"settings_problem": self._problem}
