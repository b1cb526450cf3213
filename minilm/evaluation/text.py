"""Tokens to text while they come: whole characters only, and in the end exactly the decoded text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from minilm.errors import DataError

REPLACEMENT = "\ufffd"


class TextPieces:
    """Feed tokens with `push`, which returns the text that is certain by now; `finish` returns the rest.

    All pieces together are `tokenizer.decode(tokens)`. Bytes that can still become a character are held back;
    they become U+FFFD only once they no longer can.

    Tokenizers whose tokens do not stand for fixed bytes are decoded as a whole at each token (quadratic, but
    these texts are short), and the end that a later token may still change is held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._exact = has_exact_bytes(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        if self._exact:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # An incomplete character decodes to U+FFFD, and spaces may be taken back before a full stop.
        certain = text.rstrip(REPLACEMENT + " ")
        if not certain.startswith(self._given):
            return ""  # the tokenizer went back behind what was given; `finish` gives what follows
        piece, self._given = certain[len(self._given) :], certain
        return piece

    def finish(self) -> str:
        if self._exact:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._tokens)[len(self._given) :]


class StoppedText:
    """`TextPieces` that end before a stop string. `push` and `finish` as there; after a stop string both return "".

    The text stops with the first token after which any of the strings is in it, wherever token borders are, and is cut
    before the earliest of them. What may become a stop string is held back until it has, or no longer can.

    stopped  the string that was found, None so far
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._pieces = TextPieces(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        return "" if self.stopped is not None else self._given(self._pieces.push(token))

    def finish(self) -> str:
        if self.stopped is not None:
            return ""
        piece = self._given(self._pieces.finish())
        rest, self._held = self._held, ""
        return piece + rest

    def _given(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            place, self.stopped = min(found)
            self._held = ""
            return text[:place]
        kept = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    """The text that streaming these tokens would give."""
    pieces = TextPieces(tokenizer)
    return "".join([*(pieces.push(token) for token in tokens), pieces.finish()])


def has_exact_bytes(tokenizer: Any) -> bool:
    """Does every token stand for fixed bytes, so that texts can be cut and counted by bytes?"""
    return byte_lengths_of(tokenizer) is not None


def byte_lengths_of(tokenizer: Any) -> Any:
    """`tokenizer.byte_lengths`, or None where its tokens do not stand for fixed bytes (no bits per byte then)."""
    try:
        return tokenizer.byte_lengths
    except DataError:
        return None
