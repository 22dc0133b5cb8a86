"""A real engine in no swarm, over TLS with certificates on both sides; made once per session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.config.settings import Settings
from agent.discovery import build_sources
from tests.certificates import authority, certificate
from tests.conftest import require
from tests.lab import Images, missing_prerequisites
from tests.lab.engine import ADDRESS_6, CONTAINERS_6, PlainEngine, enter, plain_engine
from tests.lab.util import wait_for
from tests.swarm.pair import own_lab
from tests.swarm.test_discovery import Follower

_HERE = Path(__file__).parent
PORT = 2376


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root and Docker; and the first test may have to make its images."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine's, for its address; clients `good`, `late` and `foreign`."""
    directory = tmp_path_factory.mktemp("engine")
    authority(directory, "ca")
    authority(directory, "other")
    names = f"IP:198.18.0.11,IP:{ADDRESS_6},DNS:engine"
    certificate(directory, "server", ca="ca", names=names)
    client = "extendedKeyUsage=clientAuth"
    certificate(directory, "good", ca="ca", names="DNS:agent", more=client)
    certificate(directory, "late", ca="ca", names="DNS:agent", days=-1, more=client)
    certificate(directory, "foreign", ca="other", names="DNS:agent", more=client)
    (directory / "cert.pem").write_bytes((directory / "good.pem").read_bytes())
    (directory / "key.pem").write_bytes((directory / "good.key").read_bytes())
    return directory


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where no engine can be started."""
    missing = missing_prerequisites(bootstrap=not Images().bootstrapped)
    require(not missing, "; ".join(missing))


@pytest.fixture(scope="session")
def engine(certs: Path, possible: None) -> Iterator[PlainEngine]:
    with plain_engine(
        own_lab("engine"),
        *(f"--host=tcp://0.0.0.0:{PORT}", "--tlsverify"),  # which is IPv6 too
        *(f"--tlscacert={certs}/ca.pem", f"--tlscert={certs}/server.pem"),
        *(f"--tlskey={certs}/server.key", "--ipv6", f"--fixed-cidr-v6={CONTAINERS_6}"),
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DOCKER_HOST", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(engine: PlainEngine) -> Iterator[Callable[..., str]]:
    """Runs containers, and removes them with the test."""
    made: list[str] = []

    def start(name: str, *options: str) -> str:
        made.append(name)
        return engine.docker("run", "--detach", f"--name={name}", *options).strip()

    yield start
    if made:
        engine.docker("rm", "--force", *made, check=False)


@contextmanager
def following(engine: PlainEngine, options: Settings) -> Iterator[Follower]:
    """The source that the settings name, run where only the engine's network is to be had."""
    (source,) = build_sources(options)
    follower, stop = Follower(source), threading.Event()

    def follow() -> None:
        enter(engine.client)
        source.run(follower.publish, stop)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        wait_for(lambda: follower.published, 20, "a first snapshot")
        yield follower
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def checked(*prefix: str, **environment: str) -> dict[str, str]:
    """What `tidegate check` says of each subject; of Docker's environment it has this alone.

    Args:
        prefix: the command that it is run by.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "TIDEGATE_"))}
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "agent.cli", "check", "--json"],
        cwd=_HERE.parents[1],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = json.loads(done.stdout)["findings"]
    return {item["subject"]: f"{item['level']}: {item['text']}" for item in found}
