"""What a generator is given, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from minilm.errors import ConfigError, DataError
from minilm.evaluation.mode import context_tokens


def checked_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, bos_id: int | None
) -> list[list[int]]:
    """The prompts as lists of Python integers, an empty one as [bos_id]; raises for those that cannot be continued."""
    rows = [[int(token) for token in prompt] for prompt in prompts]
    rows = [row if row or bos_id is None else [bos_id] for row in rows]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        raise DataError(
            f"Prompt {empty[0]} is empty, and there is no begin-of-sequence token to start from: give a prompt."
        )
    config = getattr(model, "config", None)
    num_tokens = getattr(config, "vocab_size", None)
    if num_tokens is not None:
        wrong = [(i, t) for i, row in enumerate(rows) for t in row if not 0 <= t < num_tokens]
        if wrong:
            raise DataError(
                f"Prompt {wrong[0][0]} has token {wrong[0][1]}, but the model knows 0 to {num_tokens - 1}: "
                "the tokenizer is not the one that the model was trained with."
            )
    context = context_tokens(model)
    # The last new token is not fed back, so it needs no place in the context.
    needed = [len(row) + max_new_tokens - 1 for row in rows]
    if context is not None and rows and max(needed) > context:
        i = max(range(len(rows)), key=lambda k: needed[k])
        raise ConfigError(
            f"Prompt {i} has {len(rows[i])} tokens; with max_new_tokens {max_new_tokens} it needs a context of "
            f"{needed[i]} tokens, but the model has {context}. Shorten the prompt, or ask for at most "
            f"{max(0, context - len(rows[i]) + 1)} new tokens."
        )
    return rows


def checked_stop(stop: str | Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Stop strings as a tuple, one alone as one; raises ConfigError for those that mean nothing."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    wrong = [s for s in strings if not isinstance(s, str) or not s]
    if wrong:
        raise ConfigError(
            f"A stop string is {wrong[0]!r}; it must be a text of at least one character (leave it out for none)."
        )
    if strings and tokenizer is None:
        raise ConfigError(
            "Stop strings are looked for in text: give the tokenizer, too (generate(..., tokenizer=...))."
        )
    return strings


def ending(eos_id: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a text."""
    if eos_id is None:
        return frozenset()
    return frozenset((eos_id,) if isinstance(eos_id, int) else (int(token) for token in eos_id))
