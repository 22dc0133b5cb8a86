"""Where one instance lies: its address and port, as the admin API takes them.

The last look at an address before it is pushed: what gets through here is an IP address and a port,
whatever an engine or a static file said, so that one peer cannot spoil a whole push. Must not
choose the network or the port: that is `reach`'s.
"""

from __future__ import annotations

import ipaddress
import re

from agent.compile.reach import Reach, Way
from agent.config.settings import Settings
from agent.model import Attachment, Instance, PublishedPort, Workload

_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_BYTE}(?:\.{_BYTE}){{3}}")
"""Much faster than `ipaddress`, and nearly every peer's address is looked at with it."""
_NOWHERE = ("0.0.0.0", "::")  # noqa: S104 - refused, not bound to


def vip_of(workload: Workload, reach: Reach) -> Attachment | None:
    """The virtual IP of a service on the network over which it is reached."""
    for vip in workload.vips:
        if reach.way is Way.NETWORK and vip.network == reach.network:
            return vip
    return None


def place_of(instance: Instance, reach: Reach, settings: Settings) -> tuple[str, int] | str:
    """Address and port of an instance, or what is missing (a clause for people)."""
    if reach.way is Way.NETWORK:
        for network in (reach.network, *reach.others):
            for attachment in instance.attachments:
                if attachment.network == network:
                    return checked(attachment.address, reach.port)
        return f"it has no address on network {reach.network}"
    if reach.way is Way.NODE_PORT:
        return _published_place(instance, reach, settings)
    published = instance.published[0] if instance.published else None
    if instance.attachments:
        address = instance.attachments[0].address
    else:
        address = (published.host if published else "") or instance.node_address
    return checked(address, published.published if published else reach.port)


def _published_place(instance: Instance, reach: Reach, settings: Settings) -> tuple[str, int] | str:
    offers = [port for port in instance.published if port.target == reach.port]
    if instance.host_network and not offers and reach.port is not None:
        offers = [PublishedPort(target=reach.port, published=reach.port)]
    if not offers:
        return f"it publishes no port for {reach.port}"
    offer = min(offers, key=_preference)
    if offer.host not in ("", *_NOWHERE):
        return checked(offer.host, offer.published)
    override = settings.extension.backend_override_address
    if override:
        return checked(override, offer.published)
    if instance.node_address:
        return checked(instance.node_address, offer.published)
    if not settings.docker_url or settings.docker_url.startswith("unix:"):
        return checked("::1" if offer.host == "::" else "127.0.0.1", offer.published)
    return "the address of its node is not known (BackendOverrideAddress can give it)"


def _preference(port: PublishedPort) -> tuple[bool, int, str]:
    return ":" in port.host, port.published, port.host


def checked(address: str, port: int | None) -> tuple[str, int] | str:
    """Let through only an address and port that the admin API takes.

    Returns:
        Both, the address as it is usually written; or what is wrong, a clause for people.
    """
    if not address:
        return "it has no address"
    if not _IPV4.fullmatch(address):
        try:
            address = str(ipaddress.IPv6Address(address))
        except ValueError:
            return f"{address[:60]!a} is not an IP address"
    if address in _NOWHERE or "%" in address:
        return f"{address[:60]!a} is not an address that can be reached"
    if port is None:
        return "it has no port"
    if not 1 <= port <= 65535:
        return f"{port} is not a port"
    return address, port
