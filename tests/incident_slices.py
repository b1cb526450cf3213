"""The incident of docs/incident_slicing.md: three ways to cut the logits of a continuation, on a trained model.

    python tests/incident_slices.py runs/quickstart --prompt-tokens 64 --continuation-tokens 32

Prints what each says for the same documents, and what the evaluation says. The wrong ways stand here and nowhere else.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Cut = Callable[[Tensor, int, int], Tensor]


def right(logits: Tensor, p: int, n: int) -> Tensor:
    """The logits [T, V] that predict tokens p .. p+n-1: those at the position before each."""
    return logits[p - 1 : p - 1 + n]


def unshifted(logits: Tensor, p: int, n: int) -> Tensor:
    """Wrong: the logits AT these tokens, which predict the token after each."""
    return logits[p : p + n]


def last_n(logits: Tensor, p: int, n: int) -> Tensor:
    """Wrong: the same as `unshifted` in a row that ends there, and the logits of the padding in a longer one."""
    return logits[-n:]


WAYS: dict[str, Cut] = {
    "[prompt-1 : prompt-1+n]": right,
    "[prompt : prompt+n]": unshifted,
    "[-n:]": last_n,
}


@torch.no_grad()
def loss(model: nn.Module, tokens: Sequence[int], p: int, cut: Cut, width: int | None = None) -> float:
    """Nats per token of tokens p, p+1, ... by a cut, in a row padded on the right to `width` tokens with token 0."""
    n = len(tokens) - p
    row = [*tokens, *[0] * ((width or len(tokens)) - len(tokens))]
    logits = model(torch.tensor([row])).logits[0].double()
    cut_logits = cut(logits, p, n)
    nats = [-float(cut_logits[k].log_softmax(-1)[token]) for k, token in enumerate(tokens[p:])]
    return math.fsum(nats) / n


def main(argv: list[str]) -> int:
    from minilm.evaluation.heldout import open_held_out
    from minilm.evaluation.score import continuation_of_tokens
    from minilm.run import load_checkpoint

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--continuation-tokens", type=int, default=32)
    parser.add_argument("--documents", type=int, default=64)
    asked = parser.parse_args(argv)
    p, n = asked.prompt_tokens, asked.continuation_tokens
    loaded = load_checkpoint(asked.checkpoint)
    assert loaded.config is not None, "give a checkpoint in its run folder"
    width = loaded.config.data.sequence_length
    held_out = open_held_out(loaded.config.data.store, loaded.model, loaded.tokenizer, sequence_length=width)
    numbers = range(held_out.num_documents)
    found = held_out.token_documents(numbers, p + n)
    documents = [tokens for tokens in found if len(tokens) == p + n][: asked.documents]
    print(f"{len(documents)} documents, {n} tokens after {p}; nats per token")
    print(f"{'':26}{'row of ' + str(p + n):>14}{'padded to ' + str(width):>16}")
    for name, cut in WAYS.items():
        exact, longer = (
            math.fsum(loss(loaded.model, tokens, p, cut, size) for tokens in documents) / len(documents)
            for size in (None, width)
        )
        print(f"{name:26}{exact:14.4f}{longer:16.4f}")
    print(f"{'minilm.evaluation':26}{continuation_of_tokens(loaded.model, documents, [p], n)[p].loss:14.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
