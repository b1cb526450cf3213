"""Any Hugging Face causal LM behind our interface: model(inputs, segments, positions, cache) -> Output."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilm.errors import ConfigError
from minilm.models.attention import borders
from minilm.models.base import Output
from minilm.models.cache import CachedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig:
    """What can be said of any causal LM."""

    name: str
    vocab_size: int
    max_length: int
    count: int

    def num_parameters(self) -> int:
        return self.count


@dataclass
class WholeOutput(Output):
    """Output of a model whose logits are not hidden @ head.T (a bias, a cap, a scale): they are made at once."""

    whole: Tensor | None = None  # [B, L, V]

    @property
    def logits(self) -> Tensor:
        assert self.whole is not None
        return self.whole


class HuggingFaceCache(CachedRows):
    """Transformers' own cache, with what ours remembers of the rows."""

    def __init__(self, config: Any, batch_rows: int, max_length: int, device: torch.device | str) -> None:
        from transformers import DynamicCache

        super().__init__(batch_rows, max_length, device)
        self.past = DynamicCache(config=config)


class HuggingFaceModel(nn.Module):
    """Any Hugging Face causal LM behind our interface: model(inputs, segments, positions, cache) -> Output.

    Packed rows: few such models can tell documents in a row apart, so each document is given to the model as a
    row of its own, right-padded, and its states are put back in place. The answer is that of the document
    alone, exactly; positions are passed on only where they differ from 0, 1, 2, ... Padding gets zeros.

    With a cache: one document a row, padding on the left only.

    Not supported: encoder-decoder models, models without a token embedding input. `head_weight` raises
    ConfigError for models whose logits are not a plain product with the output embedding; their `Output.logits`
    are right all the same.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{type(model).__name__} is an encoder-decoder model, not a causal LM.")
        self.model = model
        settings = model.config.get_text_config()
        self.config = HuggingFaceConfig(
            name=type(model).__name__,
            vocab_size=settings.vocab_size,
            max_length=getattr(settings, "max_position_embeddings", None) or 2**31 - 1,
            count=sum(p.numel() for p in model.parameters()),
        )
        taken = inspect.signature(model.forward).parameters
        self.takes_positions, self.takes_cache = "position_ids" in taken, "past_key_values" in taken
        self._plain = self._has_plain_head()

    @property
    def head_weight(self) -> nn.Parameter:
        if not self._plain:
            raise ConfigError(
                f"The logits of {self.config.name} are not hidden @ weight.T (a bias, a cap or a scale comes after): "
                "use output.logits."
            )
        return self.model.get_output_embeddings().weight

    def new_cache(
        self,
        batch_rows: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HuggingFaceCache:
        """An empty cache. It grows and takes the model's dtype by itself; `dtype` is accepted for our interface."""
        return HuggingFaceCache(self.model.config, batch_rows, max_length, device or self.model.device)

    def forward(
        self,
        inputs: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
    ) -> Output:
        """Shapes and meaning as in `Original.forward`. Raises ConfigError for what is not supported (see above)."""
        if inputs.shape[1] > self.config.max_length:
            raise ConfigError(
                f"The sequence has {inputs.shape[1]} tokens, {self.config.name} at most {self.config.max_length}."
            )
        if cache is not None:
            return self._cached(inputs, segments, positions, cache)
        if segments is None:
            return self._run(inputs, None, positions)
        start = borders(segments, *inputs.shape, inputs.device).long()
        start, lengths = start[:-1], start.diff()
        real = segments.flatten()[start] > 0
        start, lengths = start[real], lengths[real]  # [N] documents
        nothing = len(start) == 0
        if (
            nothing
        ):  # a batch of padding still gets an answer: one token is run and its states are not put back
            start, lengths = lengths.new_zeros(1), lengths.new_ones(1)
        offset = torch.arange(int(lengths.max()), device=inputs.device)
        valid = offset < lengths[:, None]  # [N, T]
        index = torch.where(valid, start[:, None] + offset, start[:, None])
        output = self._run(
            inputs.flatten()[index],
            None if bool(valid.all()) else valid.long(),
            None if positions is None else torch.where(valid, positions.flatten()[index], offset),
        )

        def back(states: Tensor) -> Tensor:  # [N, T, D] -> [B, L, D]
            flat = states.new_zeros(inputs.numel(), states.shape[-1])
            kept = torch.zeros_like(valid) if nothing else valid
            return flat.index_put((index[kept],), states[kept]).unflatten(0, tuple(inputs.shape))

        if isinstance(output, WholeOutput):
            return WholeOutput(back(output.hidden), output.head, whole=back(output.logits))
        return Output(back(output.hidden), output.head)

    def _cached(
        self, inputs: Tensor, segments: Tensor | None, positions: Tensor | None, cache: HuggingFaceCache
    ) -> Output:
        _, places = cache.begin(inputs, segments, positions)
        known = cache.all_segments  # [B, S]
        padded = bool((known == 0).any())
        if bool((known > 1).any()) or bool((known.diff(dim=1) < 0).any()):
            raise ConfigError(
                f"With a cache, {self.config.name} takes one document a row (segment 1), padded on the left (0)."
            )
        if padded and not self.takes_positions:
            raise ConfigError(f"{self.config.name} takes no position_ids: give it rows of equal length.")
        mask, places = (known.clone(), places) if padded else (None, positions)
        output = self._run(inputs, mask, places, past_key_values=cache.past, use_cache=True)
        cache.commit()
        return output

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, **cached: Any) -> Output:
        given: dict[str, Any] = {"input_ids": ids, "return_dict": True, **(cached or {"use_cache": False})}
        if mask is not None:
            given["attention_mask"] = mask
        default = torch.arange(ids.shape[1], device=ids.device)
        if positions is not None and (cached or not bool((positions == default).all())):
            if not self.takes_positions:
                raise ConfigError(
                    f"{self.config.name} takes no position_ids; give it rows without positions."
                )
            given["position_ids"] = positions
        if self._plain:
            hidden = self.model.base_model(**given).last_hidden_state
            return Output(hidden, self.model.get_output_embeddings().weight)
        if self.model.config.model_type == "minilm":
            # Our own code in a folder: it gives logits and nothing else.
            logits = self.model(**given).logits
            return WholeOutput(logits[..., :0], torch.empty(0), whole=logits)
        out = self.model(**given, output_hidden_states=True)
        return WholeOutput(out.hidden_states[-1], torch.empty(0), whole=out.logits)

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Measured, not read from the class: are the logits of a few tokens hidden @ weight.T?"""
        head, body = self.model.get_output_embeddings(), self.model.base_model
        if head is None or body is self.model:
            return False
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(min(4, self.config.vocab_size), device=self.model.device)[None]
        hidden = body(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        logits = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
        self.model.train(was_training)
        if hidden.shape[-1] != head.weight.shape[1]:
            return False
        product = torch.nn.functional.linear(hidden, head.weight).float()
        return bool((product - logits.float()).abs().max() <= 1e-3 * logits.float().std())
