"""How the upstream of a route treats its peers, as its labels say.

Every label here becomes a field of `Policy`, which is pushed and never rendered. Ranges are those
that the data plane takes. This module must not know how an option is spelled or what a bad value
costs: that is the reader's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.labels import backend, forms
from agent.labels.declaration import DEFAULT_POLICY, Reason
from agent.labels.forms import InvalidValueError, shown, shown_label
from agent.labels.names import (
    CANARY_OPTIONS,
    CHECK_OPTIONS,
    CIRCUIT_OPTIONS,
    POLICY_OPTIONS,
    STICKY_OPTIONS,
)
from agent.labels.reader import Reader, Written
from agent.model import (
    Algorithm,
    Canary,
    Check,
    CheckKind,
    Circuit,
    Passive,
    Policy,
    Retry,
    Sticky,
    StickyKind,
    Timeouts,
)

STICKY_COOKIE = "tidegate"
"""Name of the cookie that the proxy sets where no label names another."""
_MAX_SECONDS = 86400.0
_MAX_COUNT = 1_000_000
_MAX_AGE = 400 * 86400
_QUEUE_TIMEOUT = 10.0
"""Seconds that a request waits in the queue where no label says how long."""
_seconds = forms.duration(0.0, _MAX_SECONDS)
_count = forms.number(0, _MAX_COUNT)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """The policy, and the raw directives that came along with it."""

    policy: Policy = DEFAULT_POLICY
    directives: tuple[str, ...] = ()


_NONE = Behaviour()


def read_behaviour(
    reader: Reader, *, context_root: str, tls_only: bool, allowed: frozenset[str]
) -> Behaviour:
    """Read all that a policy is made of.

    Args:
        allowed: names of raw directives that may pass.
    """
    if not reader.any_of(POLICY_OPTIONS):
        return _NONE
    options = _BackendOptions(reader, allowed)
    balance = _balance(reader, options)
    policy = Policy(
        algorithm=balance.algorithm,
        hash_key=balance.key,
        hash_balance=_hash_balance(reader, balance),
        sticky=_sticky(reader, context_root=context_root, tls_only=tls_only),
        slow_start=reader.one("slow_start", _seconds, 0.0),
        max_conns=reader.one("max_conns", _count, 0),
        check=_check(reader, options.check),
        passive=_passive(reader),
        panic=reader.one("panic", forms.share(), DEFAULT_POLICY.panic),
        retry=_retry(reader),
        circuit=_circuit(reader),
        timeouts=Timeouts(
            connect=reader.one("connect_timeout", _seconds, 0.0),
            send=reader.one("send_timeout", _seconds, 0.0),
            read=reader.one("read_timeout", _seconds, 0.0),
        ),
    )
    queue = reader.one("queue", _count, 0)
    patience = reader.one("queue_timeout", forms.duration(0.0, 300.0), _QUEUE_TIMEOUT)
    if queue and policy.max_conns:
        policy = replace(policy, queue=queue, queue_timeout=patience)
    else:
        for option in ("queue", "queue_timeout"):
            reader.idle(
                option,
                f"without {reader.label('max_conns')} and {reader.label('queue')}",
                "Say how many requests a peer takes at once; those beyond wait.",
            )
    return Behaviour(policy, tuple(options.directives))


class _BackendOptions:
    """What the `backend_option` labels come to, taken together."""

    def __init__(self, reader: Reader, allowed: frozenset[str]) -> None:
        self.balance: backend.Balance | None = None
        self.check: Check | None = None
        self.directives: list[str] = []
        for written in reader.written("backend_option"):
            try:
                found = backend.option(forms.clean(written.value, ascii_only=True))
            except InvalidValueError as error:
                reader.invalid(written, Reason.INVALID_LABEL, error)
                if backend.protects(written.value):
                    _reject_unprotected(reader, written)
                continue
            what = f"{shown_label(written.label)}={shown(written.value)}"
            self.balance = self.balance or found.balance
            self.check = self.check or found.check
            if found.told:
                reader.note(f"{what} {found.told}.", "The route works without it.")
            if not found.directive:
                continue
            if found.name in allowed:
                self.directives.append(found.directive)
                continue
            message = (
                f"{what} is a raw nginx directive, and AllowedDirectives of the configuration does "
                f"not name {found.name}."
            )
            if found.protective:
                reader.reject(
                    Reason.DIRECTIVE_NOT_ALLOWED,
                    f"{message} The route is not served without it, for it restricts who gets in.",
                    f"Have the operator add {found.name} to AllowedDirectives, or remove the "
                    "label.",
                )
            else:
                reader.note(
                    message,
                    f"Have the operator add {found.name} to AllowedDirectives, or remove the "
                    "label; the route works without it.",
                    reason=Reason.DIRECTIVE_NOT_ALLOWED,
                )


def _reject_unprotected(reader: Reader, written: Written) -> None:
    reader.reject(
        Reason.INVALID_LABEL,
        f"{shown_label(written.label)} restricts who gets in and cannot be read, so the route is "
        "not served.",
        "Write each directive into a label of its own, with its semicolon: "
        f"{reader.label('backend_option')}.0, {reader.label('backend_option')}.1.",
    )


def _balance(reader: Reader, options: _BackendOptions) -> backend.Balance:
    named = reader.one("balance_algorithm", backend.balance, None)
    key = reader.one("hash_key", forms.hash_key, "")
    found = named or options.balance
    if reader.one("ip_hash", forms.boolean, False):
        by_ip = backend.Balance(Algorithm.HASH, "ip")
        if named not in (None, by_ip):
            reader.note(
                f"{reader.label('balance_algorithm')} has no effect beside "
                f"{reader.label('ip_hash')}.",
                f"Remove {reader.label('ip_hash')} to have it.",
            )
        found = by_ip
    if found is None:
        found = backend.Balance(Algorithm.HASH if key else Algorithm.ROUND_ROBIN)
    if found.algorithm is Algorithm.HASH and not found.key:
        return backend.Balance(Algorithm.HASH, key or "ip")
    if key and key != found.key:
        reader.idle(
            "hash_key",
            "beside an algorithm that does not hash, or that says itself by what",
            f"Write {reader.label('balance_algorithm')}=hash to have it.",
        )
    return found


def _hash_balance(reader: Reader, balance: backend.Balance) -> float:
    bound = reader.one("hash_balance", forms.load_bound, 0.0)
    if bound and balance.algorithm is not Algorithm.HASH:
        reader.idle(
            "hash_balance",
            "with an algorithm that does not hash",
            f"Write {reader.label('balance_algorithm')}=hash to have it.",
        )
        return 0.0
    return bound


def _sticky_value(text: str) -> tuple[StickyKind, str] | None:
    kind, colon, name = text.partition(":")
    kind = kind.lower()
    if kind == "cookie":
        return StickyKind.COOKIE, forms.cookie_name(name) if colon else STICKY_COOKIE
    if kind == "app" and colon:
        return StickyKind.APP_COOKIE, forms.cookie_name(name)
    if kind == "ip" and not colon:
        return StickyKind.IP, ""
    try:
        return (StickyKind.COOKIE, STICKY_COOKIE) if forms.boolean(text) else None
    except InvalidValueError:
        raise InvalidValueError(
            "is nothing to tell sessions by", "write cookie, cookie:NAME, app:NAME or ip"
        ) from None


_SAME_SITE = {"lax": "Lax", "strict": "Strict", "none": "None"}


def _sticky(reader: Reader, *, context_root: str, tls_only: bool) -> Sticky | None:
    app_cookie = reader.one("sticky_session_cookie", forms.cookie_name, "")
    chosen = reader.one("sticky", _sticky_value, None)
    max_age = reader.one("sticky_max_age", forms.duration(0, _MAX_AGE), 0.0)
    secure = reader.one("sticky_secure", forms.boolean, tls_only)
    http_only = reader.one("sticky_http_only", forms.boolean, True)
    same_site = reader.one("sticky_same_site", forms.word(_SAME_SITE), "Lax")
    path = reader.one("sticky_path", forms.cookie_path, context_root)
    if app_cookie and chosen is not None:
        reader.idle(
            "sticky_session_cookie",
            f"beside {reader.label('sticky')}",
            "Remove one of the two.",
        )
    elif app_cookie:
        chosen = StickyKind.APP_COOKIE, app_cookie
    if same_site == "None" and not secure:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('sticky_same_site')}=None is not taken by browsers without "
            f"{reader.label('sticky_secure')}.",
            f"Add {reader.label('sticky_secure')}=true, or write Lax or Strict.",
        )
    if chosen is None or chosen[0] is not StickyKind.COOKIE:
        for option in sorted(STICKY_OPTIONS - {"sticky"}):
            reader.idle(
                option,
                "without a cookie that the proxy sets",
                f"Write {reader.label('sticky')}=cookie to have one.",
            )
        return None if chosen is None else Sticky(chosen[0], cookie=chosen[1])
    return Sticky(
        StickyKind.COOKIE,
        cookie=chosen[1],
        max_age=int(max_age),
        secure=secure,
        http_only=http_only,
        same_site=same_site,
        path=path,
    )


def _interval(text: str) -> float:
    """Milliseconds without a unit and the default for nothing, as Interlock read it."""
    return forms.duration(0.0, _MAX_SECONDS, unit=0.001)(text) if text else 0.0


def _check(reader: Reader, from_option: Check | None) -> Check | None:
    if not reader.any_of(CHECK_OPTIONS):
        return from_option
    # Interlock's HAProxy checked by TCP where only the interval was given.
    usual = from_option or Check(CheckKind.TCP)
    base: Check | None = usual
    if reader.has("health_check"):
        base = reader.one("health_check", backend.check, None)
    interval = reader.one("health_check_interval", _interval, 0.0)
    if 0 < interval < 0.1:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('health_check_interval')} is shorter than 100 ms.",
            "Write at least 100 (milliseconds).",
        )
    if base is None:
        return None
    checked = replace(
        base,
        interval=interval or base.interval,
        timeout=reader.one("health_check_timeout", forms.duration(0.01, 300.0), base.timeout),
        rise=reader.one("health_check_rise", forms.number(1, 100), base.rise),
        fall=reader.one("health_check_fall", forms.number(1, 100), base.fall),
    )
    if base.kind is CheckKind.HTTP:
        return replace(
            checked,
            status=reader.one("health_check_status", forms.statuses, base.status),
            host=reader.one("health_check_host", forms.check_host, base.host),
        )
    for option in ("health_check_status", "health_check_host"):
        reader.idle(
            option,
            "on a check that only connects",
            f"Write for example {reader.label('health_check')}=/ping.",
        )
    return checked


def _passive(reader: Reader) -> Passive:
    usual = DEFAULT_POLICY.passive
    time = forms.duration(0.1, _MAX_SECONDS)
    eject = reader.one("eject_time", time, usual.eject)
    longest = reader.one("eject_max", time, max(usual.max_eject, eject))
    if longest < eject:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('eject_max')} is shorter than {reader.label('eject_time')} "
            f"({longest:g} s and {eject:g} s).",
            "Each further ejection is longer than the one before: make it at least as long.",
        )
    return Passive(
        failures=reader.one("eject_failures", _count, usual.failures),
        eject=eject,
        max_eject=longest,
    )


def _retry(reader: Reader) -> Retry:
    retries = reader.one("retries", forms.number(0, 99), None)
    return Retry(
        tries=0 if retries is None else retries + 1,
        on=reader.one("retry_on", forms.retry_on, ()),
        timeout=reader.one("retry_timeout", _seconds, 0.0),
        budget=reader.one("retry_budget", forms.share(), 0.0),
    )


def _circuit(reader: Reader) -> Circuit | None:
    if not reader.any_of(CIRCUIT_OPTIONS):
        return None
    ratio = reader.one("circuit_error_ratio", forms.share(), 0.0)
    usual = Circuit(error_ratio=1.0)
    circuit = Circuit(
        error_ratio=max(ratio, 0.001),
        min_requests=reader.one(
            "circuit_min_requests", forms.number(1, _MAX_COUNT), usual.min_requests
        ),
        window=reader.one("circuit_window", forms.duration(1.0, 3600.0), usual.window),
        open=reader.one("circuit_open", forms.duration(0.1, _MAX_SECONDS), usual.open),
    )
    if ratio:
        return circuit
    for option in sorted(CIRCUIT_OPTIONS - {"circuit_error_ratio"}):
        reader.idle(
            option,
            f"without {reader.label('circuit_error_ratio')}",
            "Say at which share of failed requests the circuit opens, for example 0.5.",
        )
    return None


def read_canary(reader: Reader) -> Canary | None:
    """What a canary takes of the requests of its host and context root; None for no canary."""
    if not reader.any_of(CANARY_OPTIONS):
        return None
    canary = Canary(
        upstream="",
        weight=reader.one("canary.weight", forms.number(0, 100), 0),
        header=reader.one("canary.header", forms.name, ""),
        header_value=reader.one("canary.header_value", forms.header_value, ""),
        cookie=reader.one("canary.cookie", forms.cookie_name, ""),
    )
    if canary.header_value and not canary.header:
        reader.reject(
            Reason.INVALID_LABEL,
            f"{reader.label('canary.header_value')} is given without "
            f"{reader.label('canary.header')}.",
            "Name the header that it is to be compared with.",
        )
    return canary
