"""Llama-like models of Hugging Face as `original`, and `original` as a Llama: copied weights, equal logits."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minilm.errors import CheckpointError, ConfigError, listed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

    from minilm.models.original import Original

_PROBE_TOKENS = 32
# Of logits, relative to their spread, both sides in float32. Rounding was 3e-5 at 16 layers of large random weights, a
# rotation with another base or a norm with another epsilon over 0.5.
_TOLERANCE = 1e-3


def from_hf(source: str | Path | PreTrainedModel, **changes: Any) -> Original:
    """Our `original` with the weights of a Llama-like model (a folder or hub name, or a loaded model).

    Any family will do that computes what a Llama computes (Llama, Mistral without a window, ...): settings and weight
    names are looked at, then logits are compared. `changes` set fields that carry no weights (attention, dropout,
    max_length). The weights keep their dtype.

    Raises CheckpointError naming everything in the model that `original` does not have.
    """
    from minilm.models.hf.loading import loaded

    theirs = loaded(source) if isinstance(source, str | Path) else source
    settings = theirs.config
    given = dict(theirs.state_dict())
    problems = [*_settings_unlike(settings), *_weights_unlike(settings, given)]
    if not problems:
        ours = _copied(settings, given)
        problems = _logits_unlike(ours, theirs)
    if problems:
        raise CheckpointError(
            f"This {settings.model_type} model is not what original computes: {listed(problems)}\n"
            "HuggingFaceModel runs it as it is."
        )
    return _changed(ours, changes) if changes else ours


def _copied(settings: Any, given: Mapping[str, Tensor]) -> Original:
    from minilm.models import build
    from minilm.models.original import OriginalConfig

    with torch.random.fork_rng(devices=[]):
        ours = build(
            OriginalConfig(
                vocab_size=settings.vocab_size,
                dim=settings.hidden_size,
                num_layers=settings.num_hidden_layers,
                num_heads=settings.num_attention_heads,
                num_kv_heads=_kv_heads(settings),
                hidden_dim=settings.intermediate_size,
                max_length=settings.max_position_embeddings,
                rope_theta=float(settings.rope_parameters["rope_theta"]),
                norm_eps=settings.rms_norm_eps,
                tie_embeddings=bool(settings.tie_word_embeddings),
                init_std=getattr(settings, "initializer_range", 0.02),
            )
        )
    wanted = _llama_names(ours.config)
    for name, parameter in ours.named_parameters():
        parts = [given[part].detach() for part in wanted[name]]
        parameter.data = torch.cat(parts).clone()  # same output rows, in the order of our fused products
    return ours.to(next(iter(given.values())).device)


def _changed(ours: Original, changes: Mapping[str, Any]) -> Original:
    """The same weights under a config with other settings."""
    from minilm.models import build

    with torch.random.fork_rng(devices=[]):
        other = build(dataclasses.replace(ours.config, **changes))
    for mine, parameter in zip(ours.parameters(), other.parameters(), strict=True):
        parameter.data = mine.data
    return other.to(ours.embedding.weight.device)


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
    for name, parts in _llama_names(model.config).items():
        value = model.get_parameter(name).detach()
        rows = [heads, kv_heads, kv_heads] if len(parts) == 3 else [value.shape[0]]
        state.update(zip(parts, (part.clone() for part in value.split(rows)), strict=True))
    state["lm_head.weight"] = model.head_weight.detach().clone()
    llama.load_state_dict(state, strict=True)
    return llama.to(model.embedding.weight.device, model.embedding.weight.dtype).eval()


def _llama_names(config: Any) -> dict[str, list[str]]:
    """Our parameter -> the Llama parameters whose rows it holds, in this order."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    for layer in range(config.num_layers):
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


def _kv_heads(settings: Any) -> int:
    return getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads


def _settings_unlike(settings: Any) -> list[str]:
    """What the config says that `original` does not have."""
    rope = getattr(settings, "rope_parameters", None) or {}
    absent = [
        name
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "rms_norm_eps")
        if getattr(settings, name, None) is None
    ]
    wrong = [f"it has no setting {name}" for name in absent]
    if "rope_theta" not in rope:
        wrong.append("it has no rotary positions with one base (rope_parameters.rope_theta)")
    even = None if absent else settings.hidden_size // settings.num_attention_heads
    wanted = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (None,),
        "attention_dropout": (0.0,),
        "head_dim": (even,),
        "pretraining_tp": (1,),
    }
    found = {name: getattr(settings, name, allowed[0]) for name, allowed in wanted.items()}
    found["head_dim"] = found["head_dim"] or even  # None: that of the division
    for name, default in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        found[name], wanted[name] = rope.get(name, default), (default,)
    kinds = set(getattr(settings, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        wrong.append(f"it has layers of {', '.join(sorted(kinds))}; original has full attention only")
    return wrong + [
        f"{name} is {value!r}; original has {' or '.join(map(repr, wanted[name]))}"
        for name, value in found.items()
        if value not in wanted[name]
    ]


def _weights_unlike(settings: Any, given: Mapping[str, Tensor]) -> list[str]:
    """Weights that have no place in `original`, and places without a weight; layers are not told apart."""
    from minilm.models.original import OriginalConfig

    layers = getattr(settings, "num_hidden_layers", None) or 1
    config = OriginalConfig(num_layers=layers, tie_embeddings=bool(settings.tie_word_embeddings))
    wanted = {name for parts in _llama_names(config).values() for name in parts}
    return [
        *(
            f"weight {name} has no place in original"
            for name in _by_kind(set(given) - wanted - {"lm_head.weight"})
        ),
        *(f"there is no weight {name}" for name in _by_kind(wanted - set(given))),
    ]


def _by_kind(names: Iterable[str]) -> list[str]:
    """layers.0.a, layers.1.a -> layers.*.a (2)."""
    counts: dict[str, int] = {}
    for name in sorted(names):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        counts[kind] = counts.get(kind, 0) + 1
    return [f"{kind} ({count})" if "*" in kind else kind for kind, count in counts.items()]


@torch.no_grad()
def _logits_unlike(ours: Original, theirs: PreTrainedModel) -> list[str]:
    """A family may have Llama's settings and names, and scale or rotate otherwise. At the first and last positions."""
    length = min(_PROBE_TOKENS, ours.config.max_length)
    device = ours.embedding.weight.device
    if ours.embedding.weight.element_size() < 4:  # in 16 bits deep models differ by rounding as by a defect
        ours, theirs = copy.deepcopy(ours).float(), _in_float32(theirs)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (1, length), generator=generator).to(device)
    was_training = theirs.training, ours.training
    ours.eval(), theirs.eval()
    differences = []
    for start in (0, ours.config.max_length - length):
        places = torch.arange(start, start + length, device=device)[None]
        want = theirs(input_ids=ids, position_ids=places, use_cache=False).logits.float()
        got = ours(ids, positions=places).logits.float()
        differences.append(float((got - want).abs().max() / want.std().clamp(min=1e-30)))
    theirs.train(was_training[0]), ours.train(was_training[1])
    worst = max(differences)
    if worst <= _TOLERANCE:
        return []
    return [
        f"settings and weights have the names of a Llama, but its logits differ by {worst:.2g} of their spread "
        f"(at most {_TOLERANCE:g} is rounding): this family computes something else"
    ]


def _in_float32(theirs: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model made in float32: one that was cast has rounded rotary tables, too."""
    with torch.random.fork_rng(devices=[]):
        precise = type(theirs)._from_config(copy.deepcopy(theirs.config), dtype=torch.float32)
    precise.load_state_dict(theirs.state_dict())
    return precise.to(theirs.device)
