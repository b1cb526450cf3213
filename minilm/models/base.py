"""What all models share towards the outside: the fields of a config, and the output of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

Backend = Literal["auto", "flash", "varlen", "blockwise", "sdpa", "eager"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Settings of a decoder-only Transformer. Variants inherit, set `name` and `sizes`, and add their own fields."""

    name: str
    vocab_size: Annotated[int, Field(gt=0, description="number of token ids, special tokens included")] = 6400
    dim: Annotated[int, Field(gt=0, description="width of the residual stream")] = 512
    num_layers: Annotated[int, Field(gt=0, description="number of blocks")] = 8
    num_heads: Annotated[int, Field(gt=0, description="query heads; the head size is dim / num_heads")] = 32
    num_kv_heads: Annotated[
        int, Field(gt=0, description="key/value heads; each serves num_heads / num_kv_heads query heads")
    ] = 8
    hidden_dim: Annotated[int, Field(gt=0, description="inner width of the feed-forward")] = 1408
    max_length: Annotated[int, Field(gt=0, description="longest sequence in tokens")] = 2048
    rope_theta: Annotated[float, Field(gt=0, description="base of the rotary frequencies")] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0, lt=0.1, description="added to the mean square in a norm")] = 1e-6
    tie_embeddings: Annotated[bool, Field(description="output layer = embedding table, one parameter")] = True
    dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="of embeddings, attention weights and block outputs, in training"),
    ] = 0.0
    attention: Annotated[
        Backend,
        Field(
            description="attention kernel: auto takes the first that can run of flash (package flash-attn), varlen "
            "(torch, CUDA), blockwise (CPU, float32) and sdpa"
        ),
    ] = "auto"
    init_std: Annotated[float, Field(gt=0, description="standard deviation of freshly drawn weights")] = 0.02

    sizes: ClassVar[dict[str, dict[str, Any]]] = {}  # size name -> fields, from small to large
    unused: ClassVar[tuple[str, ...]] = ()  # inherited fields that mean nothing here; giving one is reported

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kernel(self) -> Backend:
        """The attention kernel to ask for: `attention`, but where a variant cannot go with what auto would take."""
        return self.attention

    def problems(self) -> list[tuple[str, str]]:
        """Contradictions between fields, as (field, message)."""
        from minilm.models.attention import flash_missing

        found = []
        if self.dim % self.num_heads:
            found.append(("num_heads", f"{self.num_heads} heads do not divide dim {self.dim}"))
        elif self.head_dim % 2:
            found.append(
                ("num_heads", f"the head size dim / num_heads = {self.head_dim} must be even (rotary pairs)")
            )
        if self.num_heads % self.num_kv_heads:
            found.append(("num_kv_heads", f"{self.num_kv_heads} does not divide num_heads {self.num_heads}"))
        if self.attention == "flash" and (missing := flash_missing()):
            found.append(("attention", missing))
        return found

    def parameter_groups(self) -> dict[str, int]:
        """Predicted number of parameters by group; their sum is exact, and `build` holds the module against it."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        return sum(self.parameter_groups().values())

    def active_parameters(self) -> int:
        """Parameters that work on one token: all of them, but where a router chooses."""
        return self.num_parameters()

    def table_bytes(self) -> int:
        """Bytes of what a model reads and does not train, beside its parameters: the entries of a memory."""
        return 0

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating point operations of one forward pass per token, in rows of `sequence_length` tokens.

        2 per weight of every matrix product (the output layer counts, also when tied; the embedding look-up
        does not) plus 4 x dim per layer and attended key, of which a causal row has (sequence_length + 1) / 2
        on average. Norms, rotary, softmax and activations are not counted (about 1 %).
        """
        raise NotImplementedError

    def training_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward: three times the forward pass (two products per weight in the backward pass)."""
        return 3 * self.flops_per_token(sequence_length)

    def module(self) -> nn.Module:
        """The freshly initialised module. Call `minilm.models.build`, which checks first."""
        raise NotImplementedError


@dataclass
class Output:
    """What a model returns.

    hidden     [B, L, D]  after the final norm: the input of the output layer
    head       [V, D]     weight of the output layer
    auxiliary  named scalar losses of the model itself (for instance a router's balance), to be added by the trainer
    """

    hidden: Tensor
    head: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """[B, L, V], computed at each access and not kept: at a vocabulary of 6,400 it is 12 times `hidden`."""
        return F.linear(self.hidden, self.head)
