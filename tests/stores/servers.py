"""Stores that hold settings, to be started, stopped and written to by tests.

etcd and ZooKeeper are real, from Debian's packages, on loopback and below a directory of the test.
Consul is not in Debian: a small server answers as its documented KV API does, blocking queries
included.
"""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
from kazoo.client import KazooClient
from kazoo.handlers.threading import KazooTimeoutError

from tests.conftest import free_port, require

KEY = "interlock/v1/config"
ZOOKEEPER_JAR = Path("/usr/share/java/zookeeper.jar")
# What it needs to speak TLS, and what Debian's jar does not name itself.
_NETTY = [
    ZOOKEEPER_JAR.with_name(f"netty-{part}.jar")
    for part in ("codec", "resolver", "transport-native-unix-common")
]


@dataclass(frozen=True)
class Tls:
    """What a store shows, and whom it believes: it wants to see a client's certificate."""

    cert: str
    key: str
    ca: str


class Process:
    """A server in a process of its own; what it has written outlives it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.home
            )
        deadline = time.monotonic() + 60
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError((self.home / "log").read_text()[-4000:])
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


class Etcd(Process):
    """etcd of Debian."""

    def __init__(self, home: Path, *, v2: bool = False, tls: Tls | None = None) -> None:
        require(shutil.which("etcd"), "etcd (Debian: etcd-server)")
        super().__init__(home)
        self.peer_port = free_port()
        self.v2 = v2
        self.tls = tls
        self.scheme = "https" if tls else "http"
        self.base = f"{self.scheme}://127.0.0.1:{self.port}"
        self.url = f"etcd://127.0.0.1:{self.port}"
        self.headers: dict[str, str] = {}

    def command(self) -> list[str]:
        peer = f"http://127.0.0.1:{self.peer_port}"
        return [
            "etcd",
            "--data-dir", "data",
            "--listen-client-urls", self.base,
            "--advertise-client-urls", self.base,
            "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}",
            "--unsafe-no-fsync",
            "--logger", "zap",
            *(["--enable-v2"] if self.v2 else []),
            *self._tls_options(),
        ]  # fmt: skip

    def _tls_options(self) -> list[str]:
        if self.tls is None:
            return []
        return [
            f"--cert-file={self.tls.cert}",
            f"--key-file={self.tls.key}",
            f"--trusted-ca-file={self.tls.ca}",
            "--client-cert-auth=true",
        ]

    def answers(self) -> bool:
        try:
            return self.post("/v3/kv/range", key=encoded("x")).status_code < 500
        except requests.ConnectionError:
            return False

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(
            self.base + path,
            json=body,
            headers=self.headers,
            timeout=10,
            verify=self.tls.ca if self.tls else True,
            cert=(self.tls.cert, self.tls.key) if self.tls else None,
        )

    def put(self, text: str, key: str = KEY) -> None:
        self.post("/v3/kv/put", key=encoded(key), value=encoded(text)).raise_for_status()

    def remove(self, key: str = KEY) -> None:
        self.post("/v3/kv/deleterange", key=encoded(key)).raise_for_status()

    def put_v2(self, text: str, key: str = KEY) -> None:
        answer = requests.put(f"{self.base}/v2/keys/{key}", data={"value": text}, timeout=10)
        answer.raise_for_status()


class ZooKeeper(Process):
    """ZooKeeper of Debian, a single server."""

    def __init__(self, home: Path, *, tls: Tls | None = None) -> None:
        require(ZOOKEEPER_JAR.exists(), "ZooKeeper (Debian: zookeeper)")
        require(shutil.which("java"), "a Java runtime")
        super().__init__(home)
        self.tls = tls
        self.url = f"zk://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        (self.home / "zoo.cfg").write_text(
            f"tickTime=500\ndataDir={self.home}/data\nadmin.enableServer=false\n"
            + (
                self._secure()
                if self.tls
                else f"clientPort={self.port}\nclientPortAddress=127.0.0.1\n"
            )
        )
        path = ":".join(str(jar) for jar in (self.home, ZOOKEEPER_JAR, *_NETTY))
        return [
            "java", "-Xmx128m", "-cp", path,
            "-Dzookeeper.jmx.log4j.disable=true", "-Dzookeeper.forceSync=no",
            "org.apache.zookeeper.server.quorum.QuorumPeerMain", "zoo.cfg",
        ]  # fmt: skip

    def _secure(self) -> str:
        assert self.tls is not None
        store = self.home / "server.pem"
        store.write_text(Path(self.tls.key).read_text() + Path(self.tls.cert).read_text())
        return (
            f"secureClientPort={self.port}\nsecureClientPortAddress=127.0.0.1\n"
            "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory\n"
            f"ssl.keyStore.location={store}\nssl.keyStore.type=PEM\n"
            f"ssl.trustStore.location={self.tls.ca}\nssl.trustStore.type=PEM\n"
            "ssl.clientAuth=need\n"
        )

    def client(self) -> KazooClient:
        files = {}
        if self.tls is not None:
            tls = self.tls
            files = {"use_ssl": True, "ca": tls.ca, "certfile": tls.cert, "keyfile": tls.key}
        client = KazooClient(hosts=f"127.0.0.1:{self.port}", **files)
        client.start(timeout=1)
        return client

    def answers(self) -> bool:
        try:
            client = self.client()
        except KazooTimeoutError:
            return False
        client.stop()
        client.close()
        return True

    def put(self, text: str, key: str = KEY) -> None:
        client = self.client()
        client.ensure_path(f"/{key}")
        client.set(f"/{key}", text.encode())
        client.stop()
        client.close()

    def remove(self, key: str = KEY) -> None:
        client = self.client()
        client.delete(f"/{key}")
        client.stop()
        client.close()


class Consul:
    """What Consul's documentation says of `GET /v1/kv/:key` and of blocking queries."""

    def __init__(
        self, home: Path | None = None, *, token: str = "", tls: Tls | None = None
    ) -> None:
        self.tls = tls
        self.port = free_port()
        self.url = f"consul://127.0.0.1:{self.port}"
        self.token = token
        self.requests: list[dict[str, str]] = []
        self.values: dict[str, tuple[str, int]] = {}
        self.index = 10
        self.changed = threading.Condition()
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        handler = type("Handler", (_ConsulHandler,), {"consul": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        if self.tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.tls.ca)
            context.load_cert_chain(self.tls.cert, self.tls.key)
            context.verify_mode = ssl.CERT_REQUIRED
            self._server.handle_error = lambda *_: None
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            with self.changed:
                self.changed.notify_all()

    @property
    def up(self) -> bool:
        return self._server is not None

    def put(self, text: str, key: str = KEY) -> None:
        with self.changed:
            self.index += 1
            self.values[key] = (text, self.index)
            self.changed.notify_all()

    def remove(self, key: str = KEY) -> None:
        with self.changed:
            self.index += 1
            del self.values[key]
            self.changed.notify_all()

    def version(self, key: str) -> int:
        return self.values[key][1] if key in self.values else self.index


class _ConsulHandler(BaseHTTPRequestHandler):
    consul: Consul
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        consul = self.consul
        url = urlsplit(self.path)
        key = url.path.removeprefix("/v1/kv/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        consul.requests.append(query)
        if consul.token and self.headers.get("X-Consul-Token") != consul.token:
            self._answer(403, b"rpc error making call: Permission denied", 0)
            return
        with consul.changed:
            if "index" in query:
                wait = float(query["wait"].removesuffix("s"))
                consul.changed.wait_for(
                    lambda: not consul.up or consul.version(key) > int(query["index"]), wait
                )
            if not consul.up:
                self.close_connection = True
                return
            if key not in consul.values:
                self._answer(404, b"", consul.index)
                return
            text, version = consul.values[key]
        body = [
            {
                "LockIndex": 0,
                "Key": key,
                "Flags": 0,
                "Value": encoded(text) or None,
                "CreateIndex": version,
                "ModifyIndex": version,
            }
        ]
        self._answer(200, json.dumps(body).encode(), version)

    def _answer(self, status: int, body: bytes, index: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if index:
            self.send_header("X-Consul-Index", str(index))
            self.send_header("X-Consul-Knownleader", "true")
            self.send_header("X-Consul-Lastcontact", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `requests`."""


def encoded(text: str) -> str:
    """As both etcd's gateway and Consul write values."""
    return base64.b64encode(text.encode()).decode()
