"""What all kinds of tests share: saying what a test needs, and finding a free port.

Data-plane and Swarm helpers live with their tests; nothing here may start anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

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
    """A TCP port that nothing listens on.

    Another process may take it before it is used: bind to port 0 and read it back where that can
    be done, and use this only for a port that must be written into a configuration.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(name="require")
def _require() -> Callable[[object, str], None]:
    return require


@pytest.fixture(name="free_port")
def _free_port() -> Callable[..., int]:
    return free_port
