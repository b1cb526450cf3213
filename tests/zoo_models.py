"""What the zoo tests share: small models whose weights are large enough for every effect to be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minilm import models

NOISE = 1e-5  # relative to the spread of the states: float32 in another order of summation stays below
EFFECT = 1e-3  # a probe that moves nothing by this much has shown nothing

every_model = pytest.mark.parametrize("name", models.names())


def tiny(name: str, *, seed: int = 0, **changes: object) -> nn.Module:
    """The tiny size in evaluation mode. init_std 0.2 makes attention and feed-forward matter at once.

    Weights that start at zero are drawn, too: they would hide all that stands behind them.
    """
    torch.manual_seed(seed)
    model = models.build(models.preset(name, "tiny", **{"init_std": 0.2, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.2)
    return model


def tokens(model: nn.Module, rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def changed(model: nn.Module, ids: Tensor, row: int, column: int) -> Tensor:
    other = ids.clone()
    other[row, column] = (other[row, column] + 7) % model.config.vocab_size
    return other


def difference(a: Tensor, b: Tensor) -> Tensor:
    """[...] largest difference over the last dimension, in units of the spread of b."""
    return (a - b).abs().amax(dim=-1) / b.std()
