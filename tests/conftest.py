"""What all kinds of tests share: saying what a test needs, and finding a free port.

Data-plane and Swarm helpers live with their tests; nothing here may start anything.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


def require(condition: object, what: str) -> None:
    """Skip the test where `what` is missing on a developer's machine; on CI that is a failure.

    So a run with `CI=true` proves that everything ran.
    """
    if condition:
        return
    if os.environ.get("CI", "").lower() in ("true", "1", "yes"):
        pytest.fail(f"this test needs {what}, and with CI set nothing may be skipped")
    pytest.skip(f"needs {what}")


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on, for what must be written into a configuration.

    It is below those that the kernel gives to outgoing connections, and drawn by lot, so that
    another process hardly takes it before it is used. Bind to port 0 where that can be done.
    """
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((address, port))
                return port


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n`): a file's tests share what it starts, so they stay together,
    and those of the Swarm share one lab.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatIsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "swarm" if file.startswith("tests/swarm/") else file

    return ByWhatIsShared(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes the Swarm's tests begin first, since they take longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        swarm = Path(__file__).parent / "swarm"
        items.sort(key=lambda item: swarm not in item.path.parents)


@pytest.fixture(name="require")
def _require() -> Callable[[object, str], None]:
    return require


@pytest.fixture(name="free_port")
def _free_port() -> Callable[..., int]:
    return free_port
