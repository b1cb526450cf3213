"""The exported model behind the interface of transformers: forward, loss, `generate` with its cache, saving.

The model itself is in the files beside this one, as it was trained.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from minilm.export.remote.cache_minilm import rows_in
from minilm.export.remote.configuration_minilm import HERE, STORE_FILES, MiniLMConfig


@dataclass
class MiniLMOutput(CausalLMOutputWithPast):
    """auxiliary: the model's own losses by name (a router's balance), which are not in `loss`."""

    auxiliary: dict[str, Tensor] | None = None


class MiniLMForCausalLM(PreTrainedModel, GenerationMixin):
    """`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`."""

    config_class = MiniLMConfig
    base_model_prefix = ""  # the body alone has another interface: it takes documents, not masks
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__(config)
        # `from_pretrained` asks for a model without memory, and fills in what the file holds. What a model computes
        # for itself (rotary tables) is in no file, so it is really made here, and put back below.
        # In float32, as where it was trained: what is computed may not be rounded, or not possible in 16 bits.
        self._hollow = torch.empty(0).device.type == "meta"
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), torch.random.fork_rng(devices=[], enabled=self._hollow):
                self.model = config.variant().module()
        finally:
            torch.set_default_dtype(dtype)
        self.model.to(dtype)
        self._computed = {
            module: {n: b.clone() for n, b in module.named_buffers(recurse=False) if _unsaved(module, n)}
            for module in self.modules()
        }
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for each module whose tensors did not all come from a file."""
        for name, value in self._computed.get(module, {}).items():
            module._buffers[name] = value.to(module._buffers[name].device)
        lacking = [n for n, p in module.named_parameters(recurse=False) if not _is_loaded(p)]
        if self._hollow and lacking:
            raise ValueError(
                f"{self.config.name_or_path} lacks the weight {', '.join(lacking)} of a {type(module).__name__}: "
                "the folder is incomplete."
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError("The vocabulary of an exported model is fixed.")

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self.model, "head", None)  # tied, it is no module of its own

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever; the files of a knowledge store go along."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if (self.config.architecture or {}).get("store") == HERE:
            source, target = Path(self.model.config.store), Path(save_directory)
            for name in STORE_FILES if source.resolve() != target.resolve() else ():
                shutil.copyfile(source / name, target / name)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> MiniLMOutput:
        """As for every causal LM of transformers.

        input_ids        [B, L]
        attention_mask   [B, L], with a cache [B, earlier + L]: 0 is padding, on either side
        position_ids     [B, L]; in a first call without a mask, each place where they do not count on begins a document
        labels           [B, L], not shifted, -100 = not a target; `loss` is the cross entropy alone, in nats
        """
        _refuse(input_ids, attention_mask, others)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        output = self._run(input_ids, attention_mask, position_ids, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = dataclasses.replace(output, hidden=output.hidden[:, kept]).logits
        loss = None
        if labels is not None:
            total = others.get("num_items_in_batch")
            total = _num_targets(labels) if total is None else total
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=total)
        return MiniLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, auxiliary=output.auxiliary or None
        )

    def _run(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        past: DynamicCache | None,
    ) -> Any:
        self._choose_kernel()
        length = inputs.shape[1]
        known = None if mask is None else (mask != 0).long()
        if positions is not None:
            positions = positions.expand_as(inputs)
        begins = past is None or past.get_seq_length() == 0
        if known is None:
            segments = _documents(positions) if begins and positions is not None else None
        elif past is None and bool(known.all()):
            segments = None
        else:
            segments = known[:, -length:]
            positions = _places(known)[:, -length:] if positions is None else positions
        cache = None if past is None else rows_in(past, self.config.num_hidden_layers, inputs, known)
        return self.model(inputs, segments, positions, cache)

    def _choose_kernel(self) -> None:
        """`attn_implementation` of transformers, which may change at any time, is the model's own setting here."""
        wanted, now = self.config._attn_implementation, self.model.config
        if wanted in ("eager", "sdpa") and now.attention != wanted:
            self.model.config = dataclasses.replace(now, attention=wanted)


def _refuse(inputs: Tensor | None, mask: Tensor | None, others: dict[str, Any]) -> None:
    """ValueError for what would be dropped silently."""
    unknown = {k for k, v in others.items() if v is not None and v is not False} - {
        "num_items_in_batch",
        "return_dict",
        "cache_position",
    }
    if inputs is None or unknown:
        raise ValueError(
            f"MiniLMForCausalLM takes input_ids, and no {', '.join(sorted(unknown)) or 'other input'}."
        )
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask must be [rows, tokens], not {list(mask.shape)}.")


def _num_targets(labels: Tensor) -> Tensor:
    """How many labels [B, L] are predicted, the first of a row is not. At least 1: no loss is 0, not nan."""
    real = labels != -100
    return (real.sum() - real[:, 0].sum()).clamp(min=1)


def _documents(positions: Tensor) -> Tensor:
    """[B, L] positions -> numbers 1, 2, ... of the documents that follow one another in a row."""
    begins = torch.ones_like(positions)
    begins[:, 1:] = positions.diff(dim=1) != 1
    return begins.cumsum(dim=1)


def _places(known: Tensor) -> Tensor:
    """[B, S] 1 = real, 0 = padding -> positions that count the real tokens of a row."""
    return (known.cumsum(dim=1) - 1).clamp(min=0)


def _unsaved(module: nn.Module, name: str) -> bool:
    return name in module._non_persistent_buffers_set


def _is_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))  # the mark that transformers leaves
