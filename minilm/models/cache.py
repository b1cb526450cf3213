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
    unpadded   in the forward pass that is running, each row is one document from its first token on: nothing is to be
               hidden from its latest token
    """

    def __init__(self, batch_rows: int, max_length: int, device: torch.device | str) -> None:
        self.tokens = torch.zeros(batch_rows, max_length, device=device, dtype=torch.long)
        self.segments = torch.zeros(batch_rows, max_length, device=device, dtype=torch.long)
        self.positions = torch.zeros(batch_rows, max_length, device=device, dtype=torch.long)
        self.max_length = max_length
        self.length = 0
        self.unpadded = False
        self._pending = 0  # tokens of the forward pass that is running
        # Segments and positions [B, 1] of the last token of each row, where every row goes on with its own document,
        # and how many tokens are stored then: all that one more token of each row needs to know.
        self._front: tuple[int, Tensor, Tensor] | None = None
        self._coming: tuple[Tensor, Tensor] | None = None  # the same, of the forward pass that is running
        self._whole = 0  # how many tokens came as one document a row, without padding, from the first on

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
        self._pending = length
        self.unpadded = segments is None and self._whole == self.length
        goes_on = segments is None and positions is None
        if goes_on and length == 1 and self._front is not None and self._front[0] == self.length:
            segments, positions = self._front[1], self._front[2] + 1
        else:
            segments, positions = self._searched(inputs, segments, positions)
        new = slice(self.length, self.length + length)
        self.tokens[:, new], self.segments[:, new], self.positions[:, new] = inputs, segments, positions
        self._coming = (segments[:, -1:], positions[:, -1:]) if goes_on else None
        return segments, positions

    def _searched(
        self, inputs: Tensor, segments: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Segments and positions [B, L] from all that is stored."""
        past_segments = self.segments[:, : self.length]  # [B, S]
        if segments is None:
            # Document numbers rise, so the latest is the highest.
            latest = past_segments.amax(dim=1, keepdim=True) if self.length else past_segments.new_zeros(1, 1)
            segments = latest.clamp(min=1).expand_as(inputs)
        if positions is None:
            positions = positions_within(segments)
            if self.length:
                same = segments[:, :, None] == past_segments[:, None, :]  # [B, L, S]
                last = torch.where(same, self.positions[:, None, : self.length], -1).amax(dim=2)
                positions = torch.where(segments > 0, positions + last + 1, 0)
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
        self._front = None if self._coming is None else (self.length, *self._coming)
        if self.unpadded:
            self._whole = self.length

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.length = self._pending = self._whole = 0
        self._front = None


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
