"""The lab for the tests of this folder: a real Swarm, made once per session.

A lab that runs already (``python -m tests.lab up``) is used as it is and left running, which makes
the second run of a test quick; one that the session made is removed, but with TIDEGATE_LAB_KEEP.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
if str(_ROOT) not in sys.path:  # for `pytest` without `python -m`
    sys.path.insert(0, str(_ROOT))

from tests.lab import Images, Lab, LabError, missing_prerequisites  # noqa: E402
from tests.lab.util import Progress  # noqa: E402

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the Swarm; and the first test may have to make its images."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A healthy Swarm of at least two nodes, without a way out of this machine."""
    name = os.environ.get("TIDEGATE_LAB", "default")
    missing = missing_prerequisites(bootstrap=not Images().bootstrapped)
    if missing:
        reason = "no Swarm lab here: " + "; ".join(missing)
        # Where nobody looks at skipped tests, they must not pass for run ones.
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    try:
        running = Lab.attach(name)
    except LabError:
        running = None
    if running is not None and len(running.nodes) >= 2 and not running.trouble():
        yield running
        return
    made = Lab.up(name, nodes=2, progress=Progress(show=True))
    yield made
    if not os.environ.get("TIDEGATE_LAB_KEEP"):
        Lab.down(name)
