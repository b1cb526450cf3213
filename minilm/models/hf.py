"""The border to Hugging Face: Llama-like models in, our `original` out, and any causal LM behind our interface.

ours = from_hf("folder")          weights copied, every difference in architecture refused by name
llama = to_hf(ours)               transformers.LlamaForCausalLM with the same logits
model = HuggingFaceModel(theirs)  model(inputs, segments, positions, cache) -> Output for any causal LM
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilm.errors import CheckpointError, ConfigError, listed
from minilm.models.attention import borders
from minilm.models.base import Output
from minilm.models.cache import CachedRows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

    from minilm.models.original import Original


def from_hf(source: str | Path | PreTrainedModel, **changes: Any) -> Original:
    """Our `original` with the weights of a Llama-like model (a folder or hub name, or a loaded model).

    `changes` set fields that carry no weights (attention, dropout, max_length). The weights keep their dtype.
    Raises CheckpointError naming everything in the model that `original` does not have.
    """
    from minilm.models import build
    from minilm.models.original import OriginalConfig

    theirs = _loaded(source) if isinstance(source, str | Path) else source
    settings = theirs.config
    _refuse_unlike(settings)
    config = OriginalConfig(
        **{
            "vocab_size": settings.vocab_size,
            "dim": settings.hidden_size,
            "num_layers": settings.num_hidden_layers,
            "num_heads": settings.num_attention_heads,
            "num_kv_heads": settings.num_key_value_heads,
            "hidden_dim": settings.intermediate_size,
            "max_length": settings.max_position_embeddings,
            "rope_theta": float(settings.rope_parameters["rope_theta"]),
            "norm_eps": settings.rms_norm_eps,
            "tie_embeddings": bool(settings.tie_word_embeddings),
            "init_std": settings.initializer_range,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        ours = build(config)
    given = dict(theirs.state_dict())
    wanted = _llama_names(ours)
    unknown = sorted(set(given) - {name for parts in wanted.values() for name in parts} - {"lm_head.weight"})
    missing = sorted({name for parts in wanted.values() for name in parts} - set(given))
    if unknown or missing:
        raise CheckpointError(
            "This model is not Llama-like: "
            + listed(
                [f"weight {n} has no place in original" for n in unknown]
                + [f"no weight {n}" for n in missing]
            )
        )
    for name, parameter in ours.named_parameters():
        parts = [given[part].detach() for part in wanted[name]]
        parameter.data = torch.cat(parts).clone()  # same output rows, in the order of our fused products
    return ours


def to_hf(
    model: Original, *, bos_id: int | None = None, eos_id: int | None = None, pad_id: int | None = None
) -> LlamaForCausalLM:
    """A `LlamaForCausalLM` with copies of the weights, in their dtype, in evaluation mode.

    The ids are those of the tokenizer: written into the config, where `generate` looks for them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    if config.name != "original":
        raise ConfigError(f"Only model original is a Llama; this one is {config.name!r}.")
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_act="silu",
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=config.init_std,
            attention_bias=False,
            mlp_bias=False,
            bos_token_id=bos_id,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )
    )
    state = {}
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, parts in _llama_names(model).items():
        value = model.get_parameter(name).detach()
        rows = [heads, kv_heads, kv_heads] if len(parts) == 3 else [value.shape[0]]
        state.update(zip(parts, (part.clone() for part in value.split(rows)), strict=True))
    state["lm_head.weight"] = model.head_weight.detach().clone()
    llama.load_state_dict(state, strict=True)
    return llama.to(model.embedding.weight.device, model.embedding.weight.dtype).eval()


def _llama_names(model: Original) -> dict[str, list[str]]:
    """Our parameter -> the Llama parameters whose rows it holds, in this order."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not model.config.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    for layer in range(model.config.num_layers):
        ours, llama = f"blocks.{layer}", f"model.layers.{layer}"
        names |= {
            f"{ours}.attention_norm.weight": [f"{llama}.input_layernorm.weight"],
            f"{ours}.attention.qkv.weight": [f"{llama}.self_attn.{x}_proj.weight" for x in "qkv"],
            f"{ours}.attention.out.weight": [f"{llama}.self_attn.o_proj.weight"],
            f"{ours}.ffn_norm.weight": [f"{llama}.post_attention_layernorm.weight"],
            f"{ours}.ffn.gate.weight": [f"{llama}.mlp.gate_proj.weight"],
            f"{ours}.ffn.up.weight": [f"{llama}.mlp.up_proj.weight"],
            f"{ours}.ffn.down.weight": [f"{llama}.mlp.down_proj.weight"],
        }
    return names


def _loaded(source: str | Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(str(source), output_loading_info=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} could not be loaded as a Hugging Face causal LM: {error}") from error
    # transformers draws what a file lacks at random and goes on with a warning.
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if wrong:
        raise CheckpointError(f"The weights in {source} do not fit their config: {listed(wrong)}")
    return model


def _refuse_unlike(settings: Any) -> None:
    rope = getattr(settings, "rope_parameters", None) or {}
    head_dim = getattr(settings, "head_dim", None)
    wrong = []
    for name, actual, wanted in (
        ("model_type", settings.model_type, {"llama", "mistral"}),
        ("hidden_act", getattr(settings, "hidden_act", None), {"silu", "swish"}),
        ("attention_bias", getattr(settings, "attention_bias", False), {False}),
        ("mlp_bias", getattr(settings, "mlp_bias", False), {False}),
        ("sliding_window", getattr(settings, "sliding_window", None), {None}),
        ("rope_type", rope.get("rope_type", "default"), {"default"}),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), {1.0}),
        ("attention_dropout", getattr(settings, "attention_dropout", 0.0), {0.0}),
        (
            "head_dim",
            head_dim,
            {None, settings.hidden_size // getattr(settings, "num_attention_heads", 1)},
        ),
    ):
        if actual not in wanted:
            wanted_text = " or ".join(sorted(repr(w) for w in wanted if w is not None or len(wanted) == 1))
            wrong.append(f"{name} is {actual!r}; original has {wanted_text}")
    if wrong:
        raise CheckpointError(
            f"This {settings.model_type} model is not what original computes: {listed(wrong)}\n"
            "HuggingFaceModel runs it as it is."
        )


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
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
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
        if padded and not self._takes_positions:
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
            if not self._takes_positions:
                raise ConfigError(
                    f"{self.config.name} takes no position_ids; give it rows without positions."
                )
            given["position_ids"] = positions
        if self._plain:
            hidden = self.model.base_model(**given).last_hidden_state
            return Output(hidden, self.model.get_output_embeddings().weight)
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
