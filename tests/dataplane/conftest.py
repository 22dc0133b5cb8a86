"""Fixtures of the data-plane tests: a proxy of its own for each test, with two workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
if str(_ROOT) not in sys.path:  # for `pytest` without `python -m`
    sys.path.insert(0, str(_ROOT))

from tests.conftest import require  # noqa: E402
from tests.dataplane.harness import (  # noqa: E402
    Backend,
    Proxy,
    nginx_has_stream_lua,
    nginx_is_installed,
    site,
)

_HERE = Path(__file__).parent


_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests of the stream part out where there is none: CI's nginx is Debian's."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.dataplane)
    stream = [item for item in items if item.get_closest_marker("stream")]
    if stream and not nginx_has_stream_lua():
        config.stash[_LEFT_OUT] = len(stream)
        items[:] = [item for item in items if item not in stream]
        config.hook.pytest_deselected(items=stream)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left_out = config.stash.get(_LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(
            f"{left_out} tests of TCP routes and passthrough left out: this nginx has no Lua in "
            "its stream part; TIDEGATE_TEST_NGINX can name one that has (docs/testing.md)"
        )


@pytest.fixture
def make_proxy(tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """Makes proxies (not started) that are stopped at the end of the test."""
    require(nginx_is_installed(), "nginx with libnginx-mod-http-lua, or OpenResty")
    made: list[Proxy] = []

    def make(**options: object) -> Proxy:
        proxy = Proxy(tmp_path / f"proxy{len(made)}", **options)  # type: ignore[arg-type]
        made.append(proxy)
        return proxy

    yield make
    for proxy in made:
        proxy.stop()


@pytest.fixture
def proxy(make_proxy: Callable[..., Proxy]) -> Proxy:
    """A running proxy without a site."""
    proxy = make_proxy()
    proxy.start()
    return proxy


@pytest.fixture
def routed(proxy: Proxy) -> Proxy:
    """A running proxy whose host a.test is routed to upstream `a.test/`."""
    assert proxy.admin.site(site(proxy.http_port, {"a.test": {"/": "a.test/"}})).status == 200
    return proxy


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A toy backend that runs."""
    with Backend("b0") as running:
        yield running
