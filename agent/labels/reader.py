"""Reads the labels of one route one by one, and collects what is wrong with them.

Why apart: what a bad value costs is the same everywhere. A value that may be there once and is bad
refuses the route, one of several is refused alone, a label without effect is told of. This module
must not know what any label means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from agent.labels import forms
from agent.labels.declaration import Dialect, Reason
from agent.labels.forms import InvalidValueError, shown, shown_label
from agent.labels.names import base_of
from agent.model import Rejection

T = TypeVar("T")


class Written(NamedTuple):
    """A value, and the label that it was written as."""

    label: str
    value: str


class Reader:
    """The labels of one route by option: `port`, `alias_domain.0`.

    `refused` turns True with the first fault that the route cannot live with.
    """

    def __init__(
        self,
        values: Mapping[str, Written],
        dialect: Dialect,
        *,
        route: str,
        subject: str,
        source: str,
    ) -> None:
        self.values = values
        self.dialect = dialect
        self.found: list[Rejection] = []
        self.refused = False
        self._route = route
        self._subject = subject
        self._source = source
        self._bad: set[str] = set()
        self._elements: dict[str, list[str]] = {}
        for key in values:
            self._elements.setdefault(base_of(key), []).append(key)

    def has(self, option: str) -> bool:
        """Whether that option is given."""
        return option in self.values

    def any_of(self, options: frozenset[str]) -> bool:
        """Whether one of these options is given, or an element of a list of that name."""
        return not options.isdisjoint(self._elements)

    def label(self, option: str) -> str:
        """The label of an option, as it is written or would be."""
        written = self.values.get(option)
        if written is not None:
            return shown_label(written.label)
        return self.dialect.label(option, self._route)

    def reject(self, reason: Reason, message: str, hint: str) -> None:
        """Refuse the route."""
        self.refused = True
        self._add(reason, message, hint)

    def note(self, message: str, hint: str, *, reason: Reason = Reason.LABEL_IGNORED) -> None:
        """Tell of a label without effect; the route lives."""
        self._add(reason, message, hint)

    def idle(self, option: str, why: str, hint: str) -> None:
        """Tell of an option without effect, where it is given."""
        if self.has(option) and option not in self._bad:
            self.note(f"{self.label(option)} has no effect {why}.", hint)

    def text(
        self, option: str, *, reason: Reason = Reason.INVALID_LABEL, default: str = ""
    ) -> str | None:
        """The trimmed value of a label; None, and the route refused, where it is no clean text."""
        written = self.values.get(option)
        if written is None:
            return default
        try:
            return forms.clean(written.value, ascii_only=False)
        except InvalidValueError as error:
            self.invalid(written, reason, error)
            self.refused = True
            return None

    def one(self, option: str, parse: Callable[[str], T], default: T) -> T:
        """The value of a label that may be there once; a bad one refuses the route."""
        written = self.values.get(option)
        if written is None:
            return default
        try:
            return parse(forms.clean(written.value, ascii_only=True))
        except InvalidValueError as error:
            self.invalid(written, Reason.INVALID_LABEL, error)
            self.refused = True
            self._bad.add(option)
            return default

    def written(self, option: str) -> Iterator[Written]:
        """The labels `option` and `option.<suffix>`, numbers in order; lists taken apart."""
        for key in sorted(self._elements.get(option, ()), key=_natural):
            written = self.values[key]
            if option not in self.dialect.lists:
                yield written
                continue
            # What is too long is left whole, and refused for that.
            parts = written.value.split(",") if len(written.value) <= _LONGEST_LIST else []
            given = [part for part in parts if part.strip()]
            yield from (Written(written.label, part) for part in given)
            if not given:
                yield written

    def several(
        self,
        option: str,
        parse: Callable[[str], T],
        *,
        reason: Reason = Reason.INVALID_LABEL,
        ascii_only: bool = True,
    ) -> list[T]:
        """The values of `option` and `option.<suffix>`; a bad one is refused alone."""
        values: list[T] = []
        for written in self.written(option):
            try:
                values.append(parse(forms.clean(written.value, ascii_only=ascii_only)))
            except InvalidValueError as error:
                self.invalid(written, reason, error)
        return values

    def invalid(self, written: Written, reason: Reason, error: InvalidValueError) -> None:
        """Tell of a value that is not of its form."""
        self._add(
            reason,
            f"{shown_label(written.label)}={shown(written.value)} {error.problem}.",
            sentence(error.hint),
        )

    def _add(self, reason: Reason, message: str, hint: str) -> None:
        self.found.append(
            Rejection(
                subject=self._subject,
                reason=reason.value,
                message=message,
                hint=hint,
                source=self._source,
            )
        )


_LONGEST_LIST = 65536
_DIGITS = re.compile(r"([0-9]{1,9})")


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    return tuple(
        (int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(text) if part
    )


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + "."
