"""Backends that really start and stop: one process each, forked from a small parent in a moment.

    python -I -S bench/backend_server.py

The parent reads commands, one a line: `start NAME` forks a backend that listens by the time the
answer, its port, is printed; `kill NAME` ends it by SIGKILL and prints `dead` when it is gone, its
connections with it. At the end of its input, or on SIGTERM, it kills all and exits. Forking instead
of starting a program makes a hundred changes a second possible on the machine that is measured.

A backend answers every GET at once with its name in `X-Backend`. Standard library only.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys

_HEAD_LIMIT = 65536


def serve(name: str, listener: socket.socket, parent: int) -> None:
    """Answer while the parent lives. What a connection asks is answered in its order."""
    body = f"{name}\n".encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        f"X-Backend: {name}\r\n"
    ).encode()
    keep, close = head + b"\r\n" + body, head + b"Connection: close\r\n\r\n" + body
    listener.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    received: dict[socket.socket, bytes] = {}

    def drop(sock: socket.socket) -> None:
        selector.unregister(sock)
        del received[sock]
        sock.close()

    while os.getppid() == parent:
        for key, _ in selector.select(1.0):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is listener:
                try:
                    client, _address = listener.accept()
                except OSError:
                    continue
                client.setblocking(False)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                received[client] = b""
                selector.register(client, selectors.EVENT_READ)
                continue
            try:
                data = sock.recv(_HEAD_LIMIT)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            text = received[sock] + data
            if not data or len(text) > _HEAD_LIMIT:
                drop(sock)
                continue
            try:
                while b"\r\n\r\n" in text:
                    request, _, text = text.partition(b"\r\n\r\n")
                    last = b"\r\nconnection: close" in request.lower()
                    sock.sendall(close if last else keep)
                    if last:
                        text = b""
                        drop(sock)
                        break
                else:
                    received[sock] = text
            except OSError:
                drop(sock)


def start(name: str) -> tuple[int, int]:
    """Fork a backend; its pid and port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            serve(name, listener, parent)
        finally:
            os._exit(0)
    port: int = listener.getsockname()[1]
    listener.close()
    return pid, port


def main() -> None:
    """Obey until there is no more input, or until told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    running: dict[str, int] = {}
    try:
        for line in sys.stdin:
            command, name = line.split()
            if command == "start":
                running[name], port = start(name)
                print(port, flush=True)
            else:
                pid = running.pop(name)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                print("dead", flush=True)
    finally:
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
