"""Tidegate's own OpenResty side, pushed to as the agent pushes: same client, same rendered site.

A change is a PATCH of the membership, a change of hosts a PUT of the site; both return when the
instance has acknowledged. The agent itself is left out, as the other proxies' controllers are.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence

from agent.config.settings import Settings, load
from agent.driver.openresty import Instance, Token
from agent.driver.targets import Target
from agent.errors import DriverError
from agent.model import Host, Location, Membership, Site, Tls, Upstream
from agent.model import Peer as ModelPeer
from agent.render import Capabilities, generation, render
from bench.proxies.base import BenchError, Peer, Proxy
from bench.proxies.nginx import Nginx
from demo.pair import ROOT

_WRITER = "bench"


class Tidegate(Proxy):
    """Tidegate."""

    name = "Tidegate"
    key = "tidegate"
    retries_by_default = True
    how = "admin API: PATCH /v1/membership"

    def __init__(self, *, extra: str = "") -> None:
        """`extra`: nginx configuration at http level that runs in the same process."""
        super().__init__()
        self._extra = extra
        self._revision = 0
        self._client: Instance | None = None
        self._token = secrets.token_hex(16)

    @classmethod
    def missing(cls) -> str:
        """See the base class."""
        return Nginx.missing()

    @classmethod
    def version(cls) -> str:
        """See the base class."""
        text = (ROOT / "pyproject.toml").read_text()
        found = re.search(r'^version = "(.*)"', text, re.MULTILINE)
        return f"Tidegate {found.group(1) if found else ''} on {Nginx.version()}"

    def configuration(self) -> str:
        """The environment of its entry point, and the site as the agent renders it."""
        shown = self._env() | {"TIDEGATE_ADMIN_TOKEN": "a random one"}
        env = "\n".join(f"{name}={value}" for name, value in shown.items())
        files = render(self._site(), self._settings(), Capabilities())
        text = "\n".join(f"# {name}\n{text}" for name, text in files.items())
        return f"{env}\n\n{text}"

    @property
    def client(self) -> Instance:
        """The agent's client of the admin API, connected."""
        assert self._client is not None, "not started"
        return self._client

    def _env(self) -> dict[str, str]:
        directory = self.setup.directory
        peers = sum(len(peers) for peers in self.routes.values())
        return {
            "TIDEGATE_RUN_DIR": str(directory / "run"),
            "TIDEGATE_STATE_DIR": str(directory / "state"),
            "TIDEGATE_CONF_DIR": str(directory / "conf.d"),
            "TIDEGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "TIDEGATE_ADMIN_TOKEN": self._token,
            "TIDEGATE_HTTP_PORT": str(self.port),
            "TIDEGATE_WORKERS": str(self.setup.workers),
            "TIDEGATE_DICT_SIZE": "64m" if peers < 50_000 else "256m",
        }

    def _settings(self) -> Settings:
        retry = "error timeout" if self.retries else "off"
        text = f"""\
[[Extensions]]
Name = "nginx"
Port = {self.port}
SSLPort = {self.tls_port}
ProxyNextUpstream = "{retry}"
"""
        return load(text, where="bench")[0]

    def _site(self) -> Site:
        files = self.setup.tls
        tls = Tls(str(files.certificate), str(files.key)) if files else None
        return Site(
            tuple(
                Host(host, (), (Location("/", f"{host}/"),), tls)
                for host in sorted(self.served_hosts())
            )
        )

    def _start(self) -> None:
        directory = self.setup.directory
        conf = directory / "conf.d"
        conf.mkdir()
        (conf / "bench.conf").write_text(self._extra)
        # The agent's client is told the token; nothing but this machine can reach the port.
        self.launch(["sh", str(ROOT / "nginx" / "entrypoint.sh")], env=self._env())
        url = f"http://127.0.0.1:{self.admin_port}"
        settings = self._settings().openresty.model_copy(update={"timeout": 120.0})
        self._client = Instance(
            Target(url, url, (url,), static=True), settings, Token(token=self._token, file="")
        )
        self.wait_for(self._answers, "its admin API")
        self._put()
        self._push_site()

    def _answers(self) -> bool:
        try:
            self._revision = self.client.status().revision
        except DriverError:
            return False
        return True

    def _put(self) -> None:
        self._revision += 1
        upstreams = {f"{host}/": _upstream(host, peers) for host, peers in self.routes.items()}
        self._told(
            lambda: self.client.put(
                writer=_WRITER, revision=self._revision, membership=Membership(upstreams)
            )
        )

    def _push_site(self) -> None:
        files = render(self._site(), self._settings(), Capabilities())
        self._told(
            lambda: self.client.put_site(writer=_WRITER, generation=generation(files), files=files)
        )

    def _change(self, host: str, add: Sequence[Peer], remove: Sequence[Peer]) -> None:
        base, self._revision = self._revision, self._revision + 1
        upsert = {f"{host}/": _upstream(host, self.routes[host])}
        self._told(
            lambda: self.client.patch(
                writer=_WRITER,
                base_revision=base,
                revision=self._revision,
                upsert=upsert,
                remove=(),
            )
        )

    def _reload(self) -> None:
        self._put()
        self._push_site()

    @staticmethod
    def _told(push: Callable[[], object]) -> None:
        try:
            push()
        except DriverError as error:
            raise BenchError(f"Tidegate: {error}") from error

    def stop(self) -> None:
        """See the base class."""
        if self._client is not None:
            self._client.close()
            self._client = None
        super().stop()


class TidegateOneHost(Tidegate):
    """All upstreams, and a single host: what the membership costs without nginx's own hosts."""

    name = "Tidegate, 1 host"
    key = "tidegate-one-host"
    how = "as Tidegate; only the first host is rendered"
    same_configuration_as = Tidegate.name

    def served_hosts(self) -> list[str]:
        """See the base class."""
        return list(self.routes)[:1]


def _upstream(host: str, peers: Sequence[Peer]) -> Upstream:
    ordered = sorted(peers, key=lambda peer: peer.id)
    return Upstream(
        f"{host}/", tuple(ModelPeer(peer.id, "127.0.0.1", peer.port) for peer in ordered)
    )
