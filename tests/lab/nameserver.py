"""The nodes' name server: it knows no name, and says so at once.

Docker's own name server answers for the names of its networks and passes on all others. Without
anybody to pass them on to it stays silent, and each look-up of an unknown name takes the client ten
seconds; in a real network it takes a millisecond. Run as a script: it is what a node's init runs.
"""

from __future__ import annotations

import socket
import sys

_HEADER = 12


def nxdomain(query: bytes) -> bytes:
    """The answer NXDOMAIN to a query, or nothing to what is not one."""
    if len(query) < _HEADER or query[2] & 0x80:
        return b""
    end = _HEADER
    while end < len(query) and query[end]:
        end += query[end] + 1
    end += 5  # the root label, type and class
    if end > len(query):
        return b""
    flags = bytes((0x80 | query[2] & 0x79, 0x83))  # an answer, recursion available, no such name
    return query[:2] + flags + b"\0\1" + b"\0" * 6 + query[_HEADER:end]


def main() -> None:
    """Answer UDP queries on the address given, for ever."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((sys.argv[1], 53))
    while True:
        try:
            query, client = server.recvfrom(4096)
            if answer := nxdomain(query):
                server.sendto(answer, client)
        except OSError:  # a client that is gone; the next one may be there
            continue


if __name__ == "__main__":
    main()
