"""Why TLS with an engine or a store fails, in a sentence with the cure.

Libraries say "[SSL: CERTIFICATE_VERIFY_FAILED]", or merely that the connection was reset or timed
out; whoever runs the agent has to know which side, which file, and what to do. Knows no library but
`ssl`, and opens no connection but in `probe`.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_EXPIRED = "certificate has expired"
_NOT_YET_VALID = "certificate is not yet valid"
_OTHER_NAME = frozenset({62, 63, 64})
"""OpenSSL's codes for a certificate that is for another host name, mail or IP address."""

_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"})

_LAST_WORDS = 1.0
"""Seconds in which, by TLS 1.3, a refusal may still come after a handshake that was good."""


@dataclass(frozen=True, slots=True)
class Client:
    """The files that we speak TLS with, and what they are called where they are set.

    Attributes:
        ca: whom the other side's certificate has to be signed by; public CAs if empty.
        cert, key: what we show if we are asked.
        names: of the settings that name `ca`, `cert` and `key`.
        unverified: the setting that goes without verification; empty where there is none.
    """

    names: tuple[str, str, str]
    ca: str = ""
    cert: str = ""
    key: str = ""
    unverified: str = ""

    @property
    def shown(self) -> str:
        """What we show, for people."""
        return f"{self.names[1]} {self.cert}"


def unusable(client: Client) -> str:
    """Why the files cannot be used; empty if they can."""
    ca, cert, key = client.names
    if bool(client.cert) != bool(client.key):
        there, missing = (cert, key) if client.cert else (key, cert)
        return f"{there} is of no use without {missing}; give both"
    for name, file in zip(client.names, (client.ca, client.cert, client.key), strict=True):
        if file and (why := _unreadable(file)):
            return f"{name} {file} cannot be read: {why}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if client.ca:
            context.load_verify_locations(client.ca)
    except ssl.SSLError:
        return f"{ca} {client.ca} holds no certificate in PEM form"
    try:
        if client.cert:
            context.load_cert_chain(client.cert, client.key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{key} {client.key} is not the key of {client.shown}"
        return (
            f"{client.shown} and {key} {client.key} cannot be used; both have to be in PEM form, "
            "the key without a pass phrase"
        )
    return ""


def reason(error: BaseException, client: Client) -> str:
    """What a failed connection over TLS means; empty where the failure is none of TLS."""
    if why := unusable(client):
        return why
    failures = [item for item in _causes(error) if isinstance(item, _FAILURES)]
    told = next((item for item in failures if isinstance(item, ssl.SSLError)), None)
    if isinstance(told, ssl.SSLCertVerificationError):
        return _not_believed(told, client)
    word = (told.reason or "" if told else "").upper()
    if word in _NO_TLS:
        return "it speaks no TLS there; name the port where it does"
    if "PROTOCOL_VERSION" in word or word == "UNSUPPORTED_PROTOCOL":
        return "it speaks no version of TLS that we do; 1.2 or later is needed"
    if "ALERT" in word or (failures and word in ("", "UNEXPECTED_EOF_WHILE_READING")):
        return _refused(client, said=word)
    return f"TLS fails: {word.replace('_', ' ').lower()}" if told else ""


_FAILURES = (ssl.SSLError, ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)
"""A server that refuses a client's certificate may close before its reason has been read."""


def probe(host: str, port: int, client: Client, *, timeout: float) -> str:
    """Connect and shake hands, and tell why that fails; empty where it does not, or not for TLS."""
    if why := unusable(client):
        return why
    context = ssl.create_default_context(cafile=client.ca or None)
    if client.cert:
        context.load_cert_chain(client.cert, client.key)
    try:
        with (
            socket.create_connection((host, port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            if tls.version() == "TLSv1.3":
                tls.settimeout(_LAST_WORDS)
                tls.recv(1)
    except TimeoutError:
        return ""
    except OSError as error:
        return reason(error, client)
    return ""


def _not_believed(error: ssl.SSLCertVerificationError, client: Client) -> str:
    """Why we do not believe the other side."""
    said = error.verify_message.rstrip(".")
    if said in (_EXPIRED, _NOT_YET_VALID):
        return f"its {said}; renew it, or set the clocks right"
    if error.verify_code in _OTHER_NAME:
        return (
            f"its certificate is for another name ({said}); connect by a name that it has, or give "
            "it one for this name"
        )
    by = f"of {client.names[0]} {client.ca}" if client.ca else "of a public CA"
    without = f", or set {client.unverified} to go without" if client.unverified else ""
    return (
        f"its certificate is not {by} ({said}); name the CA that signed it as {client.names[0]}"
        f"{without}"
    )


def _refused(client: Client, *, said: str) -> str:
    """Why the other side does not believe us; what it says itself is rarely more than no."""
    _, cert, key = client.names
    if not client.cert:
        if "CERTIFICATE" in said or "HANDSHAKE_FAILURE" in said:
            return f"it wants to see a certificate of ours; set {cert} and {key}"
        return f"it closes the connection; if it wants to see a certificate, set {cert} and {key}"
    judged = _judged(client)
    if judged == _EXPIRED:
        return f"it refuses ours, for {client.shown} has expired; renew it"
    if judged == _NOT_YET_VALID:
        return f"it refuses ours, for {client.shown} is not valid yet; set the clocks right"
    if "ALERT" not in said:
        return (
            f"it closes the connection without a word; if it goes on doing that, {client.shown} is "
            "not of a CA that it trusts"
        )
    words = said.partition("ALERT_")[2].replace("_", " ").lower()
    return (
        f"it refuses {client.shown} ({words}); that has to be of a CA that it trusts, and for the "
        "use by clients"
    )


def _judged(client: Client) -> str:
    """What anybody would find wrong with our certificate itself, whoever signed it.

    Nothing public reads a certificate, so it is shown to ourselves.
    """
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.check_hostname, ours.verify_mode = False, ssl.CERT_NONE
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (ours, judge):
        context.load_cert_chain(client.cert, client.key)
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    judge.load_verify_locations(client.cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (ours.wrap_bio(back, there), judge.wrap_bio(there, back, server_side=True))
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
            except ssl.SSLError:
                return ""
    return ""


def _unreadable(file: str) -> str:
    try:
        Path(file).read_bytes()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all below it, as libraries wrap them: as cause, context, reason, argument."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        item = queue.pop(0)
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            inner = getattr(item, "reason", None)
            queue += [item.__cause__, item.__context__, inner, *item.args]
