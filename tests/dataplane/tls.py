"""TLS in data-plane tests: a rendered site on a real proxy, and a client that shows all it sees."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config.settings import Extension, Settings
from agent.model import Host, Location, Site, Tls
from agent.render import Capabilities, render
from tests.dataplane.harness import Answer, Proxy, free_port, wait_until


@dataclass(frozen=True)
class Seen:
    """What a client saw of a handshake and an answer."""

    answer: Answer
    serial: str
    session: ssl.SSLSession | None
    reused: bool
    version: str


class Front:
    """A running proxy with TLS, whose sites are rendered as the agent does.

    Args:
        proxy: runs already.
        ca: who clients trust; nothing is verified without.
    """

    def __init__(self, proxy: Proxy, **settings: object) -> None:
        self.proxy = proxy
        self.tls_port = free_port()
        self.settings = settings

    def push(self, *hosts: Host, expect: int = 200) -> Answer:
        """Renders these hosts and pushes them."""
        extension = {"Port": self.proxy.http_port, "SSLPort": self.tls_port, **self.settings}
        settings = Settings(extensions=(Extension.model_validate(extension),))
        status = self.proxy.admin.status()
        capabilities = Capabilities(
            nginx_version=status["nginx_version"], features=frozenset(status["features"])
        )
        answer = self.proxy.admin.site(render(Site(hosts), settings, capabilities))
        assert answer.status == expect, answer.text
        return answer

    def get(
        self,
        name: str,
        path: str = "/",
        *,
        ask: str | None = None,
        show: Path | None = None,
        session: ssl.SSLSession | None = None,
        context: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
        method: str = "GET",
    ) -> Seen:
        """One request on a connection of its own.

        Args:
            name: for the request, and for SNI unless `ask` says otherwise ("" for none).
            show: client certificate, its key beside it.
            session: one to be resumed; needs the same `context`.

        Raises:
            ssl.SSLError: the handshake failed. ConnectionError: likewise, less politely.
        """
        context = context or client(show)
        asked = name if ask is None else ask
        connection = _Connection(self.tls_port, context, asked, session)
        with contextlib.closing(connection):
            connection.connect()
            tls = connection.tls
            der, version, reused = tls.getpeercert(True), tls.version(), tls.session_reused
            assert der is not None
            connection.request(method, path, headers={"Host": name, **(headers or {})})
            response = connection.getresponse()
            lower = {key.lower(): value for key, value in response.getheaders()}
            answer = Answer(response.status, lower, response.read())
            return Seen(
                answer=answer,
                serial=_serial(der),
                session=None if tls.fileno() < 0 else tls.session,
                reused=bool(reused),
                version=version or "",
            )

    def refuses(self, name: str, **options: Any) -> bool:
        """Whether a handshake for `name` fails."""
        try:
            self.get(name, **options)
        except (ssl.SSLError, ConnectionError):
            return True
        return False

    def serves(self, name: str) -> str:
        """Serial number of the certificate for `name`, empty where the handshake fails."""
        try:
            return self.get(name).serial
        except (ssl.SSLError, ConnectionError):
            return ""

    def problems(self, host: str) -> dict[str, str]:
        """What is wrong with a host's certificate, as the instance tells: message by reason."""
        return {item["reason"]: item["message"] for item in self._of("hosts", "host", host)}

    def backend_problems(self) -> dict[str, str]:
        """The same of all identities towards peers."""
        backends = self.report()["backends"]
        return {item["reason"]: item["message"] for one in backends for item in one["problems"]}

    def report(self) -> dict[str, Any]:
        """`GET /v1/certificates`."""
        answer: dict[str, Any] = self.proxy.admin.call("GET", "/v1/certificates").json()
        return answer

    def _of(self, kind: str, key: str, value: str) -> list[dict[str, str]]:
        found = [item for item in self.report()[kind] if item[key] == value]
        return found[0]["problems"] if found else []

    def settled(self, host: str, reasons: set[str]) -> None:
        """Waits until these are the problems of a host, and no others."""
        wait_until(
            lambda: set(self.problems(host)) == reasons,
            timeout=15,
            what=f"problems of {host}: {reasons}",
        )


def client(show: Path | None = None) -> ssl.SSLContext:
    """A client that trusts anybody, and shows this certificate if it is asked to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if show is not None:
        context.load_cert_chain(show, show.with_suffix(".key"))
    return context


def server(certificates: Mapping[str, Path], *, clients: Path | None = None) -> ssl.SSLContext:
    """A TLS server with a certificate per name that is asked for; the first where none fits.

    Its connections carry the name that was asked for as `asked` of their SSL object.

    Args:
        certificates: path of a certificate by name, the key beside it.
        clients: a CA; clients have to show a certificate of it.
    """
    contexts = {}
    for name, path in certificates.items():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path, path.with_suffix(".key"))
        if clients is not None:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED
        contexts[name] = context
    first = next(iter(contexts.values()))

    def choose(tls: Any, name: str | None, context: ssl.SSLContext) -> None:
        tls.asked = name
        if name in contexts:
            tls.context = contexts[name]

    first.sni_callback = choose
    return first


def host(name: str, certificate: Path | None, *, aliases: tuple[str, ...] = (), **tls: Any) -> Host:
    """A host with one location, on upstream `NAME/`."""
    front = None
    if certificate is not None:
        front = Tls(str(certificate), str(certificate.with_suffix(".key")), **tls)
    return Host(name, aliases, (Location("/", f"{name}/"),), front)


def renew(target: Path, source: Path) -> None:
    """Puts certificate and key of `source` in the place of those of `target`, one by one."""
    for suffix in (".pem", ".key"):
        new = target.with_suffix(suffix + ".tmp")
        new.write_bytes(source.with_suffix(suffix).read_bytes())
        new.replace(target.with_suffix(suffix))


class _Connection(http.client.HTTPSConnection):
    """Connects to a port of loopback, asking for a name, and may resume a session."""

    def __init__(
        self, port: int, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None
    ) -> None:
        super().__init__("127.0.0.1", port, timeout=30, context=context)
        self._own, self._name, self._resumed = context, name, session
        self.tls: ssl.SSLSocket

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        assert self.sock is not None
        self.tls = self._own.wrap_socket(
            self.sock, server_hostname=self._name or None, session=self._resumed
        )
        self.sock = self.tls


def serial(path: Path) -> str:
    """Serial number of the certificate at `path`."""
    return _serial(ssl.PEM_cert_to_DER_cert(path.read_text()))


def _serial(der: bytes) -> str:
    command = ["openssl", "x509", "-inform", "DER", "-noout", "-serial"]
    return subprocess.run(command, input=der, check=True, capture_output=True).stdout.decode()
