"""What an instance lacks for what it is asked to serve, as rejections.

Told by its status alone: what its nginx was built with, and how much room is left for upstreams.
All else is served meanwhile. Must not talk to anybody.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.driver.openresty import Status
from agent.model import Rejection, Site

LITTLE_ROOM = 0.25
"""Share of the shared dict below which its size is to be raised: a full one refuses pushes."""

_STREAM = "stream"
"""The feature of an instance that can pass connections on unopened."""
_HTTP3 = "http_v3"
"""The feature of an instance whose nginx can speak HTTP/3."""


def rejections(status: Status, site: Site, instance: str, *, http3: bool) -> tuple[Rejection, ...]:
    """All that an instance lacks.

    Args:
        status: what it says of itself.
        site: what it is to serve.
        instance: its name, for people.
        http3: whether the settings want HTTP/3.
    """
    found = [*_room(status, instance)]
    if http3 and _HTTP3 not in status.build.features:
        found.append(_no_http3(instance))
    if _STREAM not in status.build.features:
        found += _no_stream(status, site, instance)
    return tuple(found)


def _room(status: Status, instance: str) -> Iterator[Rejection]:
    if status.dict_free < status.dict_capacity * LITTLE_ROOM:
        yield Rejection(
            subject=f"OpenResty {instance}",
            reason="dict_nearly_full",
            message=f"{status.dict_free >> 10} kB of {status.dict_capacity >> 10} kB are left "
            f"for upstreams, with {status.upstreams} upstreams and {status.peers} peers in it.",
            hint="Start OpenResty with a larger TIDEGATE_DICT_SIZE; a full one refuses pushes "
            "and serves what it has.",
        )


def _no_http3(instance: str) -> Rejection:
    return Rejection(
        subject=f"OpenResty {instance}",
        reason="http3_unavailable",
        message="HTTP3 is on, and its nginx was built without it: it serves HTTP/1.1 and HTTP/2.",
        hint="Take an image whose `nginx -V` has --with-http_v3_module, or set HTTP3 = false.",
        served=True,
    )


def _no_stream(status: Status, site: Site, instance: str) -> Iterator[Rejection]:
    asked = [(f"TCP port {route.port}", "the TCP route") for route in site.tcp] + [
        (f"host {host.name}", "the passthrough of its TLS")
        for host in site.hosts
        if host.passthrough
    ]
    for subject, what in asked:
        yield Rejection(
            subject=subject,
            reason="stream_unavailable",
            message=f"OpenResty {instance} does not serve {what}: this build of nginx "
            f"({status.versions.get('nginx') or 'of unknown version'}) has no stream Lua module",
            hint="Use an image with OpenResty, as Dockerfile.openresty does by default; "
            "Debian's nginx has no such module. All else is served.",
        )
