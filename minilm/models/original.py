"""The original Transformer: the plain model that every variant is compared with.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward, RMS norms, no
biases, the output layer tied to the embedding. Computes what `transformers.LlamaForCausalLM` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from minilm.errors import ConfigError, DataError
from minilm.models import register
from minilm.models.attention import Plan, plan
from minilm.models.base import ModelConfig, Output
from minilm.models.cache import KVCache, positions_within
from minilm.models.parts import Block, RMSNorm, Rotary, SwiGLU, compute_dtype
from minilm.models.uniformity import columns_of, pairwise


def _shape(*values: int) -> dict[str, Any]:
    fields = "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "hidden_dim", "max_length"
    return dict(zip(fields, values, strict=True))


@register("original")
@dataclass(frozen=True, kw_only=True)
class OriginalConfig(ModelConfig):
    """Settings of the original Transformer; the defaults are the reference size, 25,829,888 parameters."""

    name: Literal["original"] = "original"

    # 26m is the reference, with the historical head size 16. The other sizes have head size 64, which
    # attention kernels like better, and from 100m on a vocabulary that suits larger corpora.
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _shape(256, 32, 2, 4, 2, 96, 128),  # 32,928 parameters, for tests
        "6m": _shape(6_400, 256, 6, 4, 2, 704, 1024),  # 6,065,408, for a CPU
        "26m": _shape(6_400, 512, 8, 32, 8, 1408, 2048),  # 25,829,888, the reference
        "100m": _shape(32_000, 768, 12, 12, 4, 2048, 2048),  # 100,092,672
        "350m": _shape(32_000, 1024, 28, 16, 4, 2816, 2048),  # 348,447,744
        "1b": _shape(32_000, 2048, 22, 32, 8, 5632, 2048),  # 1,057,581,056
    }

    def parameter_groups(self) -> dict[str, int]:
        kv_dim = self.num_kv_heads * self.head_dim
        groups = {
            "embedding": self.vocab_size * self.dim,
            "attention": self.num_layers * (2 * self.dim * self.dim + 2 * self.dim * kv_dim),
            "feed-forward": self.num_layers * 3 * self.dim * self.hidden_dim,
            "norms": (2 * self.num_layers + 1) * self.dim,
        }
        if not self.tie_embeddings:
            groups["head"] = self.vocab_size * self.dim
        return groups

    def flops_per_token(self, sequence_length: int) -> int:
        groups = self.parameter_groups()
        products = groups["attention"] + groups["feed-forward"] + self.vocab_size * self.dim
        attended = 2 * self.num_layers * self.dim * (sequence_length + 1)  # 4 x dim x mean number of keys
        return 2 * products + attended

    def module(self) -> Original:
        return Original(self)


class Original(nn.Module):
    """model(inputs [B, L], segments, positions, cache) -> Output. Knows nothing of losses."""

    takes_entries = False  # does forward want to know which entry each target needs (`Batch.entries`)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rotary = Rotary(config.head_dim, config.max_length, config.rope_theta)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # How training goes through a block instead of calling it: recomputed, compiled.
        self.through: Callable[[nn.Module, Tensor, Plan], Any] | None = None
        # Where forwards add what is to be told about them (`collect`); nobody asks: None.
        self.collector: dict[str, Tensor] | None = None
        self.initialise()

    def block(self, layer: int) -> nn.Module:
        """Block number `layer`: the method that variants replace."""
        return Block(self.config, layer, SwiGLU(self.config.dim, self.config.hidden_dim))

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all weights anew from torch's global generator: normal(0, init_std), norms one.

        The initial loss is then ln V + s^2 / 2, with s^2 = dim x init_std^2 the variance of the logits: 8.87 at
        the reference size. Output projections are not scaled down by depth: with tied embeddings the residual
        stream would stay so close to the embedding that every token votes for itself (measured at the reference
        size: loss against the inputs themselves 7.07 with that scaling, 8.46 without, where chance is 8.87).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D] weight of the output layer. Tied, it IS the embedding's parameter: there is no second to lose."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def new_cache(
        self,
        batch_rows: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for `max_length` tokens a row, padding included; by default as and where the model is."""
        self._check_length(max_length)
        weight = self.embedding.weight
        return KVCache(
            num_layers=self.config.num_layers,
            batch_rows=batch_rows,
            max_length=max_length,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            device=device or weight.device,
            dtype=dtype or compute_dtype(weight),
        )

    def forward(
        self,
        inputs: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        documents: int | None = None,
    ) -> Output:
        """hidden[b, i] is computed from inputs[b, : i + 1] of its own segment.

        inputs     [B, L] token ids
        segments   [B, L] document numbers, 0 = padding, each document one unbroken run; default: one document
        positions  [B, L] default: 0, 1, 2, ... within each document
        cache      earlier tokens of the same rows; these are appended to it
        documents  how many runs of one segment there are, if it is known: an accelerator is not waited for then

        Raises ConfigError for sequences longer than `max_length`, DataError for shapes that do not fit.
        """
        return self._forward(inputs, segments, positions, cache, documents=documents)

    def _forward(
        self,
        inputs: Tensor,
        segments: Tensor | None,
        positions: Tensor | None,
        cache: KVCache | None,
        entries: Tensor | None = None,
        documents: int | None = None,
    ) -> Output:
        self._check(inputs, segments, positions)
        if cache is not None:
            segments, positions = cache.begin(inputs, segments, positions)
        elif positions is None and segments is not None:
            positions = positions_within(segments)
        shared = plan(
            self.config.kernel,
            *self.rotary(inputs.shape[1] if positions is None else positions),
            inputs=inputs,
            segments=segments,
            dtype=compute_dtype(self.embedding.weight),
            head_dim=self.config.head_dim,
            cache=cache,
            dropout=self.config.dropout,
            documents=documents,
        )
        shared = self.extended(shared, inputs, segments, entries)
        x = self.dropout(self.embedding(inputs))  # [B, L, D]
        x, auxiliary = self.stack(x, shared, segments)
        if cache is not None:
            cache.commit()
        hidden = self.norm(x)
        if self.collector is not None and cache is None:
            for name, value in pairwise(hidden, segments).items():
                self.collect(name, value)
        return Output(hidden, self.head_weight, auxiliary)

    def extended(self, shared: Plan, inputs: Tensor, segments: Tensor | None, entries: Tensor | None) -> Plan:
        """The plan with what else the blocks of a variant want to know of the rows."""
        return shared

    def stack(self, x: Tensor, plan: Plan, segments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, L, D] through all blocks, and the model's own losses: what a variant with such losses replaces."""
        for block in self.blocks:
            x = self.passed(block, x, plan)
        return x, {}

    def counted(self, segments: Tensor, entries: Tensor | None = None) -> dict[str, Tensor]:
        """How many tokens of these rows count for each auxiliary loss, before any forward: float64 scalars.

        An auxiliary loss is a mean over tokens; with these counts the step makes the mean over all its micro-batches
        and ranks of it, exactly. The names are those of `Output.auxiliary`, and the same for any rows.

        segments, entries  [B, L] of a `Batch`
        """
        return {}

    def collect(self, name: str, value: Tensor) -> None:
        """Add a statistic of this forward, a sum over its tokens of any shape, to what is collected, if it is.

        To be called where a forward comes by once: not inside of blocks, which may be computed again.
        """
        if self.collector is not None:
            before = self.collector.get(name)
            now = value.detach().double()
            self.collector[name] = now if before is None else before + now

    def columns(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What was collected, summed over the micro-batches and ranks of a step -> columns of the step's line."""
        return columns_of(sums)

    def passed(self, block: nn.Module, x: Tensor, plan: Plan) -> Any:
        """What a block returns: in training it may be recomputed or compiled."""
        through = self.through if self.training and plan.cache is None else None
        return through(block, x, plan) if through else block(x, plan)

    def _check(self, inputs: Tensor, segments: Tensor | None, positions: Tensor | None) -> None:
        if inputs.dim() != 2 or inputs.shape[1] == 0:
            raise DataError(f"inputs must be [rows, at least 1 token], not {list(inputs.shape)}.")
        for name, value in (("segments", segments), ("positions", positions)):
            if value is not None and value.shape != inputs.shape:
                raise DataError(
                    f"{name} has shape {list(value.shape)}, inputs {list(inputs.shape)}: they must be equal."
                )
        self._check_length(inputs.shape[1])
        # Positions that were counted by us fit whenever the length does. On an accelerator, looking at them
        # would stop the queue; there the table's own bounds check speaks.
        if positions is not None and positions.device.type == "cpu":
            low, high = (int(x) for x in positions.aminmax())
            if low < 0 or high >= self.config.max_length:
                raise ConfigError(
                    f"Positions {low} to {high} were given, the model knows 0 to {self.config.max_length - 1} "
                    "(model.max_length)."
                )

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ConfigError(
                f"The sequence has {length} tokens, the model at most {self.config.max_length} (model.max_length). "
                "Shorten the sequences (data.sequence_length, max_new_tokens) or train a model with a longer context."
            )
