"""A small, strict reader of nginx's configuration syntax, to see what rendered text really says.

It follows ngx_conf_file.c: words, quotes, backslashes, comments, blocks. Where nginx would be
lenient or the text is odd in any way it raises, so that nothing hides behind an edge case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class Odd(ValueError):
    """The text is not plain nginx configuration."""


@dataclass(frozen=True)
class Directive:
    """One directive: its words, and what is in its block, or None where it has none.

    A block of Lua is no block: its tokens are further words, strings of it as `"` and what they
    mean.
    """

    words: tuple[str, ...]
    block: tuple[Directive, ...] | None = None


def parse(text: str) -> tuple[Directive, ...]:
    tokens = _tokens(text)
    directives, rest = _block(tokens, 0, outermost=True)
    assert rest == len(tokens)
    return directives


def _block(
    tokens: list[tuple[str, str]], at: int, *, outermost: bool
) -> tuple[tuple[Directive, ...], int]:
    found: list[Directive] = []
    words: list[str] = []
    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        if kind == "word":
            words.append(text)
        elif text == ";":
            if not words:
                raise Odd("a semicolon without a directive")
            found.append(Directive(tuple(words)))
            words = []
        elif kind == "lua":
            found.append(Directive((*words, *lua(text))))
            words = []
        elif text == "{":
            if not words:
                raise Odd("a block without a name")
            inner, at = _block(tokens, at, outermost=False)
            found.append(Directive(tuple(words), inner))
            words = []
        else:
            if words:
                raise Odd(f"unfinished directive {words}")
            if outermost:
                raise Odd("a closing brace too many")
            return tuple(found), at
    if words or not outermost:
        raise Odd("the text ends within a directive or block")
    return tuple(found), at


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char in " \t\n":
            at += 1
        elif char == "#":
            at = text.find("\n", at)
            if at < 0:
                raise Odd("a comment without an end")
        elif char == "{" and tokens and tokens[-1][1].endswith("_by_lua_block"):
            end = _end_of_lua(text, at)
            tokens.append(("lua", text[at + 1 : end]))
            at = end + 1
        elif char in ";{}":
            tokens.append(("mark", char))
            at += 1
        elif char in "\"'":
            word, at = _quoted(text, at)
            if at < len(text) and text[at] not in " \t\n;{":
                raise Odd(f"something follows a quoted word: {text[at : at + 20]!r}")
            tokens.append(("word", word))
        else:
            start = at
            while at < len(text) and text[at] not in " \t\n;{}":
                if text[at] in "\"'\\" or not 0x20 < ord(text[at]) < 0x7F:
                    raise Odd(f"{text[at]!r} in a bare word")
                at += 1
            tokens.append(("word", text[start:at]))
    return tokens


def lua(code: str) -> tuple[str, ...]:
    """The tokens of the little Lua that is rendered: names, marks, strings, blocks of tables."""
    words: list[str] = []
    at = 0
    while at < len(code):
        found = _LUA.match(code, at)
        if found is None:
            raise Odd(f"{code[at : at + 20]!r} in a block of Lua")
        if found["string"] is not None:
            escaped = found["string"].encode()
            meant = re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1])]), escaped)
            words.append('"' + meant.decode())
        elif found["token"]:
            words.append(found["token"])
        at = found.end()
    return tuple(words)


_LUA = re.compile(
    r"""\s+|"(?P<string>(?:[A-Za-z0-9._/@:+,=~*\ -]|\\\d{3})*)\""""
    r"""|(?P<token>[A-Za-z_0-9]+|[=,.(){}\[\]])"""
)


def _end_of_lua(text: str, at: int) -> int:
    """Where the brace is that ends the block which begins at `at`."""
    depth = 0
    while at < len(text):
        if text[at] == '"':
            at = text.index('"', at + 1)
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1
    raise Odd("a block of Lua without an end")


def _quoted(text: str, at: int) -> tuple[str, int]:
    quote = text[at]
    at += 1
    word = ""
    while at < len(text):
        char = text[at]
        if char == "\\":
            if text[at + 1 : at + 2] not in ("\\", '"', "'"):
                raise Odd("an unknown escape")
            word += text[at + 1]
            at += 2
        elif char == quote:
            return word, at + 1
        elif ord(char) < 0x20 or ord(char) == 0x7F:
            raise Odd("a control character in a quoted word")
        else:
            word += char
            at += 1
    raise Odd("a quote without an end")
