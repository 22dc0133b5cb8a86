"""The names that routes are claimed under.

Hosts, the default backend and TCP ports of the proxy share one name space, so that one set of rules
settles who gets what of them, and an upstream is always called by a name and a context root. How
names that are no hosts are spelled is known here and nowhere else. Must not know who claims what.
"""

from __future__ import annotations

from typing import Final

DEFAULT: Final = "*"
"""The name that stands for all hosts that nobody claims; no host can be called so."""
_TCP: Final = ":"
"""What names that stand for a port of the proxy begin with; no host does."""


def is_host(name: str) -> bool:
    """Whether it is a host, and so has TLS, aliases and a file of its own."""
    return name != DEFAULT and not name.startswith(_TCP)


def is_tcp(name: str) -> bool:
    """Whether it stands for a TCP port of the proxy."""
    return name.startswith(_TCP)


def tcp_name(port: int) -> str:
    """The name that stands for a TCP port of the proxy."""
    return f"{_TCP}{port}"


def tcp_port(name: str) -> int:
    """The port that a name stands for. Raises ValueError where it stands for none."""
    return int(name.removeprefix(_TCP))


def told(name: str, root: str = "") -> str:
    """A name and context root for people."""
    if name == DEFAULT:
        return f"the default backend{'' if root == '/' else ' ' + root}".rstrip()
    if is_tcp(name):
        return f"TCP port {tcp_port(name)}"
    return name + root


def subject_of_upstream(upstream: str) -> str:
    """How rejections name an upstream."""
    name = upstream.split("/", 1)[0]
    return f"host {name}" if is_host(name) else told(name)
