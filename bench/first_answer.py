"""Waits for the first answer of a backend that has not answered before, and says when it came.

    python bench/first_answer.py URL HOST RATE SECONDS KNOWN…

One request after the other on a kept connection, at most RATE a second, for at most SECONDS; KNOWN
are the values of `X-Backend` that are not waited for. Prints a line of JSON: `backend` (empty if
none came), `at` (Unix time of the answer), `requests`, `failed`. So few instructions for a request
that a thousand a second do not disturb what is measured. Standard library only.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from urllib.parse import urlsplit


def ask(sock: socket.socket, message: bytes) -> tuple[int, str]:
    """One request on an open connection: status and `X-Backend`. Bodies have a Content-Length.

    Raises:
        OSError: the connection ended before the answer did.
    """
    sock.sendall(message)
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    missing = int(headers.get("content-length", "0")) - len(body)
    while missing > 0:
        missing -= len(_more(sock))
    return int(lines[0].split()[1]), headers.get("x-backend", "")


def _more(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    if not data:
        raise OSError("closed")
    return data


def wait(url: str, host: str, rate: float, seconds: float, known: set[str]) -> dict[str, object]:
    """What is printed."""
    parts = urlsplit(url)
    message = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    requests = failed = 0
    end = due = time.monotonic()
    end += seconds
    sock: socket.socket | None = None
    while due < end:
        due = max(due + 1 / rate, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        requests += 1
        try:
            if sock is None:
                sock = socket.create_connection((parts.hostname or "", parts.port or 80), 5)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            status, backend = ask(sock, message)
        except OSError:
            failed += 1
            if sock is not None:
                sock.close()
            sock = None
            continue
        if status != 200:
            failed += 1
        elif backend not in known:
            return {"backend": backend, "at": time.time(), "requests": requests, "failed": failed}
    return {"backend": "", "at": 0.0, "requests": requests, "failed": failed}


def main(arguments: list[str]) -> None:
    """The command line."""
    url, host, rate, seconds, *known = arguments
    print(json.dumps(wait(url, host, float(rate), float(seconds), set(known))))


if __name__ == "__main__":
    main(sys.argv[1:])
