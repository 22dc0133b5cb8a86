"""The settings in a key-value store: etcd and Consul over HTTP, ZooKeeper in a module of its own.

A store answers with the text of one key, and says when that may have changed. What it told with
a change is never used, only read anew: so nothing hangs on the details of anybody's event format.
This module must not know what the text means.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import requests

from agent.config.stores import Content, Discovery, Store
from agent.errors import SettingsError, StoreUnavailable, innermost
from agent.tls import Client, reason, unusable

DEFAULT_KEY = "interlock/v1/config"
"""Interlock's; the path of the URL takes its place."""

PORTS = {"etcd": 2379, "consul": 8500, "zk": 2181}

CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 10.0
LONGEST_WAIT = 15.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """What the URL of `-k` says, and the TLS files beside it."""

    scheme: str
    endpoints: tuple[str, ...]
    key: str
    user: str = ""
    password: str = ""
    ca: str = ""
    cert: str = ""
    cert_key: str = ""

    @property
    def tls(self) -> bool:
        """Whether the store is spoken to over TLS: one of the files is enough."""
        return bool(self.ca or self.cert)

    @property
    def client(self) -> Client:
        """The TLS files, and the options that name them."""
        return Client(
            names=("--discovery-tls-ca-cert", "--discovery-tls-cert", "--discovery-tls-key"),
            ca=self.ca,
            cert=self.cert,
            key=self.cert_key,
        )

    @property
    def where(self) -> str:
        """The URL without user and password."""
        return f"{self.scheme}://{','.join(self.endpoints)}/{self.key}"


def parse(discovery: Discovery) -> Address:
    """Read `scheme://[user:password@]host[:port][,host[:port]…][/key]`.

    Raises:
        SettingsError: it is not of that form, or a TLS file cannot be read.
    """
    scheme, separator, rest = discovery.url.strip().partition("://")
    scheme = {"zookeeper": "zk"}.get(scheme.lower(), scheme.lower())
    form = "etcd://, consul:// or zk://, then HOST:PORT[,HOST:PORT…][/KEY]"
    if not separator or scheme not in PORTS:
        raise SettingsError(f"--discovery: got {_public(discovery.url)!r}, expected {form}")
    authority, _, path = rest.partition("/")
    account, at, hosts = authority.rpartition("@")
    user, _, password = account.partition(":")
    endpoints = tuple(_endpoint(host, scheme, form) for host in hosts.split(",") if host.strip())
    if not endpoints:
        raise SettingsError(f"--discovery: names no host, expected {form}")
    if bool(discovery.cert) != bool(discovery.key):
        raise SettingsError(
            "--discovery-tls-cert and --discovery-tls-key: one without the other; give both"
        )
    for option, file in (
        ("ca-cert", discovery.ca),
        ("cert", discovery.cert),
        ("key", discovery.key),
    ):
        if file:
            _readable(option, file)
    return Address(
        scheme=scheme,
        endpoints=endpoints,
        key=unquote(path).strip("/") or DEFAULT_KEY,
        user=unquote(user) if at else "",
        password=unquote(password) if at else "",
        ca=discovery.ca,
        cert=discovery.cert,
        cert_key=discovery.key,
    )


def _public(url: str) -> str:
    """The URL without user and password."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _endpoint(text: str, scheme: str, form: str) -> str:
    host, port = text.strip(), ""
    if not host.endswith("]") and ":" in host:
        host, _, port = host.rpartition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise SettingsError(f"--discovery: got the host {text!r}, expected {form}")
    return f"{host}:{port or PORTS[scheme]}"


def _readable(option: str, file: str) -> None:
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise SettingsError(
            f"--discovery-tls-{option}: {file} cannot be read: {error.strerror}"
        ) from error


def open_store(discovery: Discovery) -> Store:
    """The store that the URL names; nothing is connected to yet.

    Raises:
        SettingsError: the URL or a TLS file cannot be used.
    """
    address = parse(discovery)
    match address.scheme:
        case "etcd":
            return EtcdStore(address)
        case "consul":
            return ConsulStore(address)
    from agent.config.zookeeper import ZooKeeperStore  # loads kazoo

    return ZooKeeperStore(address)


class _HttpStore:
    """What the HTTP stores share: the session, the endpoints in turn, the errors."""

    remote = True
    longest_wait = LONGEST_WAIT

    def __init__(self, address: Address) -> None:
        self.where = address.where
        self._address = address
        self._current = 0
        self._local = threading.local()

    def close(self) -> None:
        """Nothing is kept open between two calls but idle connections, which end with us."""

    @property
    def _session(self) -> requests.Session:
        """One for each thread: SIGHUP reads while the follower waits."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = requests.Session()
            session.trust_env = False  # a proxy has no business with user and password
            address = self._address
            session.verify = address.ca or True
            if address.cert:
                session.cert = (address.cert, address.cert_key)
            self._local.session = session
        return session

    def _url(self, path: str) -> str:
        scheme = "https" if self._address.tls else "http"
        return f"{scheme}://{self._address.endpoints[self._current]}{path}"

    def _first(self, call: Callable[[], T]) -> T:
        """Do it with the endpoint that was good last, else with the next ones.

        Raises:
            StoreUnavailable: none gave an answer of use; says what each one did.
        """
        said = []
        for _ in self._address.endpoints:
            try:
                return call()
            except StoreUnavailable as error:
                said.append(str(error))
                self._current = (self._current + 1) % len(self._address.endpoints)
                self._moved()
        raise StoreUnavailable("; ".join(said))

    def _moved(self) -> None:
        """Another endpoint is asked from now on."""

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        place = self._address.endpoints[self._current]
        scheme = self._address.scheme
        try:
            yield
        except requests.Timeout as error:
            raise StoreUnavailable(f"{scheme} at {place} does not answer in time") from error
        except requests.ConnectionError as error:
            why = reason(error, self._address.client) if self._address.tls else ""
            raise StoreUnavailable(
                f"{scheme} at {place} cannot be reached: {why or innermost(error)}"
            ) from error
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise StoreUnavailable(
                f"{scheme} at {place}: its answer makes no sense: {type(error).__name__}: {error}"
            ) from error
        except OSError as error:
            # A file that was there when the store was opened.
            why = unusable(self._address.client)
            raise StoreUnavailable(f"{scheme} at {place}: {why or error}") from error

    def _refused(self, answer: requests.Response) -> StoreUnavailable:
        place = self._address.endpoints[self._current]
        return StoreUnavailable(
            f"{self._address.scheme} at {place} refuses: {answer.status_code} {_message(answer)}"
        )


def _message(answer: requests.Response) -> str:
    """What a store says about a refusal, short."""
    try:
        body = answer.json()
        text = str(body.get("error") or body.get("message") or body)
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(text.split())[:200]


@dataclass(frozen=True, slots=True)
class _Found:
    """Which API of etcd has the key, under which spellings, and as of when.

    The index counts every change of the store, so it says nothing about the key.
    """

    api: str
    keys: tuple[str, ...]
    index: int = field(compare=False)
    version: int = 0


class EtcdStore(_HttpStore):
    """etcd: its v3 API through the gateway, and the v2 keys where v3 has none.

    The two know nothing of each other's keys. A v3 key may or may not begin with a slash, and
    both are in use, so both are looked for: first as written, then with one.
    """

    _GATEWAYS = ("/v3", "/v3beta", "/v3alpha")

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._gateway: str | None = None
        self._token = ""

    def read(self) -> Content:
        """The text under the key."""
        return self._first(self._read)

    def watch(self, content: Content, timeout: float) -> None:
        """Wait for an event of the key, by the API that has it."""
        found = content.mark
        if not isinstance(found, _Found):
            raise StoreUnavailable("etcd: watched before it was read")
        if found.api == "v2":
            self._watch_v2(found, timeout)
        else:
            self._watch_v3(found, timeout)

    def _moved(self) -> None:
        self._gateway, self._token = None, ""

    def _read(self) -> Content:
        missing: Content | None = None
        if self._find_gateway():
            missing = self._read_v3()
            if missing.text:
                return missing
        v2 = self._read_v2()
        if v2 is not None and (v2.text or missing is None):
            return v2
        if missing is None:
            place = self._address.endpoints[self._current]
            raise StoreUnavailable(f"{place} has neither etcd's v3 gateway nor its v2 keys")
        return missing

    def _find_gateway(self) -> bool:
        """Find the prefix of the v3 API, which moved from version to version."""
        if self._gateway is None:
            for prefix in self._GATEWAYS:
                answer = self._post(f"{prefix}/kv/range", {"key": _b64("tidegate")})
                if answer.status_code != requests.codes.not_found:
                    self._gateway = prefix
                    break
            else:
                self._gateway = ""
        return bool(self._gateway)

    def _post(self, path: str, *bodies: dict[str, Any], **arguments: Any) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        with self._mapped():
            return self._session.post(
                self._url(path),
                data="".join(json.dumps(body) for body in bodies),
                headers=headers,
                **{"timeout": (CONNECT_TIMEOUT, ANSWER_TIMEOUT), **arguments},
            )

    def _authenticate(self) -> None:
        self._token = ""
        answer = self._post(
            f"{self._gateway}/auth/authenticate",
            {"name": self._address.user, "password": self._address.password},
        )
        if not answer.ok:
            raise self._refused(answer)
        with self._mapped():
            self._token = str(answer.json()["token"])

    def _range(self, key: str) -> requests.Response:
        if self._address.user and not self._token:
            self._authenticate()
        answer = self._post(f"{self._gateway}/kv/range", {"key": _b64(key)})
        if answer.status_code == requests.codes.unauthorized and self._token:
            self._authenticate()  # tokens run out
            answer = self._post(f"{self._gateway}/kv/range", {"key": _b64(key)})
        return answer

    def _read_v3(self) -> Content:
        watched: list[str] = []
        index = 0
        for key in (self._address.key, f"/{self._address.key}"):
            answer = self._range(key)
            if not answer.ok and watched:
                break  # a role may be allowed the one spelling only
            if not answer.ok:
                raise self._refused(answer)
            watched.append(key)
            with self._mapped():
                body = answer.json()
                # Of the first look, so that a change between the two is not missed.
                index = index or int(body["header"]["revision"])
                for item in body.get("kvs", ()):
                    text = _text(item.get("value", ""), self.where)
                    if text.strip():
                        version = int(item["mod_revision"])
                        return Content(text, _Found("v3", tuple(watched), index, version))
        return Content("", _Found("v3", tuple(watched), index))

    def _watch_v3(self, found: _Found, timeout: float) -> None:
        requested = [
            {"create_request": {"key": _b64(key), "start_revision": str(found.index + 1)}}
            for key in found.keys
        ]
        answer = self._post(
            f"{self._gateway}/watch",
            *requested,
            stream=True,
            timeout=(CONNECT_TIMEOUT, timeout),
        )
        with answer:
            if not answer.ok:
                raise self._refused(answer)
            try:
                for line in answer.iter_lines():
                    result = json.loads(line).get("result", {}) if line.strip() else {}
                    if result.get("canceled") or result.get("events"):
                        return
            except (requests.RequestException, ValueError):
                return  # it was silent for that long, or broke: the next read says which

    def _read_v2(self) -> Content | None:
        """The v2 key; None where the server has no v2 API."""
        with self._mapped():
            answer = self._session.get(
                self._url(self._v2_path),
                params={"quorum": "true"},
                auth=self._v2_account,
                timeout=(CONNECT_TIMEOUT, ANSWER_TIMEOUT),
            )
        try:
            body = answer.json()
        except ValueError:
            body = {}
        if answer.status_code == requests.codes.not_found:
            if not isinstance(body, dict) or "errorCode" not in body:
                return None
            return Content("", _Found("v2", (), int(body.get("index", 0))))
        if not answer.ok:
            raise self._refused(answer)
        with self._mapped():
            index = int(answer.headers.get("X-Etcd-Index", 0))
            node = body["node"]
            version = int(node["modifiedIndex"])
            return Content(str(node.get("value", "")), _Found("v2", (), index, version))

    def _watch_v2(self, found: _Found, timeout: float) -> None:
        try:
            self._session.get(
                self._url(self._v2_path),
                params={"wait": "true", "waitIndex": str(found.index + 1)},
                auth=self._v2_account,
                timeout=(CONNECT_TIMEOUT, timeout),
            )
        except OSError:
            return  # silent, or broken: the next read says which

    @property
    def _v2_path(self) -> str:
        return f"/v2/keys/{quote(self._address.key)}"

    @property
    def _v2_account(self) -> tuple[str, str] | None:
        return (self._address.user, self._address.password) if self._address.user else None


class ConsulStore(_HttpStore):
    """Consul's KV store, with blocking queries.

    A password without a user is an ACL token; with one, both go into HTTP's basic authentication.
    """

    def read(self) -> Content:
        """The text under the key."""
        return self._first(self._read)

    def watch(self, content: Content, timeout: float) -> None:
        """Block until the key's index is above the one that was read."""
        index = content.mark if isinstance(content.mark, int) else 1
        try:
            # The server adds up to a sixteenth, so that not all come back at once.
            self._get(
                {"index": str(max(1, index)), "wait": f"{max(1, round(timeout))}s"},
                timeout=timeout * 17 / 16 + ANSWER_TIMEOUT,
            )
        except OSError:
            return  # the next read says what is wrong

    def _read(self) -> Content:
        with self._mapped():
            answer = self._get({}, timeout=ANSWER_TIMEOUT)
        with self._mapped():
            index = int(answer.headers.get("X-Consul-Index", 0))
        if answer.status_code == requests.codes.not_found and index:
            return Content("", index)
        if not answer.ok:
            raise self._refused(answer)
        with self._mapped():
            return Content(_text(answer.json()[0]["Value"] or "", self.where), index)

    def _get(self, params: dict[str, str], *, timeout: float) -> requests.Response:
        user, password = self._address.user, self._address.password
        return self._session.get(
            self._url(f"/v1/kv/{quote(self._address.key)}"),
            params=params,
            auth=(user, password) if user else None,
            headers={"X-Consul-Token": password} if password and not user else {},
            timeout=(CONNECT_TIMEOUT, timeout),
        )


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(encoded: str, where: str) -> str:
    """The text of a base64 value. Raises SettingsError for one that is no text."""
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise SettingsError(f"{where}: not UTF-8 text: {error}") from error
