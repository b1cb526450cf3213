"""Between the cache of transformers, which `generate` makes, sorts and cuts, and what the model wants of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minilm.models.cache import CachedRows


class RowsInCache(CachedRows):
    """The rows of one forward pass over a `DynamicCache`: made for it, and forgotten after it.

    What is known of each earlier token (its id, document, position) travels in the cache, as the keys of one more
    layer. So whatever transformers does with a cache, reorder it for beams, repeat it, cut it, happens to them too.
    """

    def __init__(self, past: DynamicCache, num_layers: int, inputs: Tensor, known: Tensor | None) -> None:
        """known  [B, S] 1 = real, 0 = padding, of all tokens so far; None: as it was, and the new ones are real."""
        length = past.get_seq_length()
        super().__init__(inputs.shape[0], length + inputs.shape[1], inputs.device)
        self.past, self.num_layers = past, num_layers
        if length:
            if len(past.layers) <= num_layers:
                raise ValueError("past_key_values was filled by another model: its tokens are not in it.")
            states = past.layers[num_layers].keys  # [B, 1, length, kinds]
            for kind, buffer in enumerate(self._kinds().values()):
                buffer[:, :length] = states[:, 0, :, kind]
        self.length = length
        if known is not None:  # the mask of this call is the truth about the tokens of earlier calls, too
            self.segments[:, :length] = known[:, :length]

    def _kinds(self) -> dict[str, Tensor]:
        """Everything that is remembered of a token, by name: [B, S] int64 each."""
        return {
            name: value
            for name, value in sorted(vars(self).items())
            if isinstance(value, Tensor) and value.dtype == torch.long and value.dim() == 2
        }

    def commit(self) -> None:
        """The forward pass is complete: remember its tokens."""
        new = slice(self.length, self.length + self._pending)
        states = torch.stack([buffer[:, new] for buffer in self._kinds().values()], dim=-1).unsqueeze(1)
        while len(self.past.layers) <= self.num_layers:
            self.past.layers.append(DynamicLayer())
        self.past.layers[self.num_layers].update(states, states[..., :0])
        super().commit()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, L, Hkv, d]; returns all keys and values [B, S, Hkv, d] so far."""
        k, v = self.past.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2)


def rows_in(past: Any, num_layers: int, inputs: Tensor, known: Tensor | None) -> RowsInCache:
    """The rows of inputs [B, L] over `past`. Raises ValueError for a kind of cache that does not grow."""
    if not isinstance(past, DynamicCache):
        raise ValueError(
            f"past_key_values is a {type(past).__name__}; this model takes a DynamicCache "
            "(leave cache_implementation unset)."
        )
    return RowsInCache(past, num_layers, inputs, known)
