"""Tokens to text while they come: whole characters only, and in the end exactly the decoded text."""

from __future__ import annotations

import codecs
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
