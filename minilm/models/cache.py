"""Keys and values of the tokens so far, so that generating a token costs one token's work.

Buffers are allocated once at full size. The cache remembers the segment and position of each token, so rows
of a batch may be padded on either side: padding is never attended to, and positions go on where each row's
own text ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.errors import ConfigError


class CachedRows:
    """Which tokens a cache has seen. Room for `max_length` tokens (padding included) in each of `batch_rows` rows.

    tokens     [B, max_length] int64: what a memory looks back at
    segments   [B, max_length] int64, as given to the model; 0 is padding
    positions  [B, max_length] int64
    length     tokens stored in each row
    """

    def __init__(self, batch_rows: int, max_length: int, device: torch.device | str) -> None:
        self.tokens = torch.zeros(batch_rows, max_length, device=device, dtype=torch.long)
        self.segments = torch.zeros(batch_rows, max_length, device=device, dtype=torch.long)
        self.positions = torch.zeros(batch_rows, max_length, device=device, dtype=torch.long)
        self.max_length = max_length
        self.length = 0
        self._pending = 0  # tokens of the forward pass that is running

    def begin(
        self, inputs: Tensor, segments: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Announce the tokens [B, L] of a forward pass; returns their segments and positions [B, L].

        Without `segments` the tokens go on with each row's latest document. Without `positions` they count on
        from the last position of their document. Raises ConfigError if the tokens do not fit.
        """
        rows, length = inputs.shape
        if rows != self.segments.shape[0]:
            raise ConfigError(
                f"The cache has {self.segments.shape[0]} rows, the inputs {rows}: they must be equal."
            )
        if self.length + length > self.max_length:
            raise ConfigError(
                f"The key/value cache holds {self.max_length} tokens a row: {self.length} are stored and "
                f"{length} more were given. Make it larger (model.new_cache(..., max_length=...)) or generate less."
            )
        past_segments = self.segments[:, : self.length]  # [B, S]
        if segments is None:
            latest = (
                past_segments.amax(dim=1, keepdim=True) if self.length else past_segments.new_zeros(rows, 1)
            )
            segments = latest.clamp(min=1).expand(
                rows, length
            )  # document numbers rise, so the latest is the highest
        if positions is None:
            positions = positions_within(segments)
            if self.length:
                same = segments[:, :, None] == past_segments[:, None, :]  # [B, L, S]
                last = torch.where(same, self.positions[:, None, : self.length], -1).amax(dim=2)
                positions = torch.where(segments > 0, positions + last + 1, 0)
        new = slice(self.length, self.length + length)
        self.tokens[:, new], self.segments[:, new], self.positions[:, new] = inputs, segments, positions
        self._pending = length
        return segments, positions

    @property
    def all_segments(self) -> Tensor:
        """[B, S] segments of the stored tokens and of those announced."""
        return self.segments[:, : self.length + self._pending]

    @property
    def all_positions(self) -> Tensor:
        """[B, S] positions, of the same tokens."""
        return self.positions[:, : self.length + self._pending]

    @property
    def all_tokens(self) -> Tensor:
        """[B, S] ids, of the same tokens."""
        return self.tokens[:, : self.length + self._pending]

    def commit(self) -> None:
        """The forward pass is complete: its tokens count. One that failed leaves the cache as it was."""
        self.length += self._pending
        self._pending = 0

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.length = self._pending = 0


class KVCache(CachedRows):
    """The keys and values of all layers, [layers, B, max_length, Hkv, d] each."""

    def __init__(
        self,
        *,
        num_layers: int,
        batch_rows: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(batch_rows, max_length, device)
        shape = (num_layers, batch_rows, max_length, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, L, Hkv, d] of the announced tokens; returns all keys and values [B, S, Hkv, d] so far."""
        if k.requires_grad:
            raise ConfigError("A key/value cache holds no gradients: call the model under torch.no_grad().")
        if k.dtype != self.keys.dtype:
            raise ConfigError(
                f"The cache was made for {self.keys.dtype}, the model computes in {k.dtype}: "
                "make it with model.new_cache(..., dtype=...)."
            )
        end = self.length + self._pending
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


def positions_within(segments: Tensor) -> Tensor:
    """[B, T] segments -> [B, T] positions that restart at 0 with each document; 0 at padding."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return torch.where(segments > 0, index - first, 0)
