"""Where each OpenResty instance may be reached: addresses and settings become admin URLs.

Why apart: the fleet compares targets to find which instances came and went, and `plan` and `check`
need the same list without a fleet. Pure; must not open a connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.config.settings import OpenResty
from agent.model import ProxyInstance

_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, never bound


@dataclass(frozen=True, slots=True)
class Target:
    """One OpenResty instance to keep in step.

    Attributes:
        id: identity: a task or container id, or the URL of a static one.
        name: label in metrics and for people; of a Swarm task service and slot or node, so that
            it outlives the task.
        urls: admin URLs to try, in order.
        static: named by settings, so that its host name can be verified over HTTPS; an address
            that discovery found appears in no certificate.
    """

    id: str
    name: str
    urls: tuple[str, ...]
    static: bool = False


def targets(proxies: Iterable[ProxyInstance], settings: OpenResty) -> tuple[Target, ...]:
    """All instances: those of settings.urls first, then what discovery found, by name."""
    result = [Target(id=url, name=url, urls=(url,), static=True) for url in settings.urls]
    found = {proxy.id: _found(proxy, settings) for proxy in proxies}
    return (*result, *sorted(found.values(), key=lambda target: (target.name, target.id)))


def _found(proxy: ProxyInstance, settings: OpenResty) -> Target:
    """The URLs of an instance that discovery found: its networks first, then its node."""
    scheme = "https" if settings.admin_tls else "http"
    places = [
        (attachment.address, settings.admin_port)
        for attachment in proxy.attachments
        if _wanted(attachment.network, settings.admin_network)
    ]
    places += [
        (proxy.node_address if port.host in _EVERYWHERE else port.host, port.published)
        for port in proxy.published
        if port.target == settings.admin_port
    ]
    urls = tuple(
        dict.fromkeys(f"{scheme}://{_bracketed(host)}:{port}" for host, port in places if host)
    )
    return Target(id=proxy.id, name=proxy.name or proxy.id, urls=urls)


def _wanted(network: str, named: str) -> bool:
    """Whether `network` is the one that settings name, with or without the stack's prefix."""
    return not named or network == named or network.endswith(f"_{named}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
