"""The configuration of an exported model, as transformers reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from minilm.export.remote.variant import VariantConfig

HERE = "."  # as the setting `store`: the store's two files lie in the exported folder itself
STORE_FILES = ("knowledge.safetensors", "knowledge.json")


class MiniLMConfig(PreTrainedConfig):
    """`architecture` holds the settings of the model under their own names, and nothing else describes it.

    The names that transformers and its friends ask for (hidden_size, num_hidden_layers, ...) are read from there.
    """

    model_type = "minilm"
    keys_to_ignore_at_inference = ("past_key_values",)

    architecture: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def variant(self) -> VariantConfig:
        """The model's own config. Raises ValueError naming settings that are unknown or missing."""
        given = self.architecture or {}
        known = {field.name for field in dataclasses.fields(VariantConfig)}
        if set(given) != known:
            raise ValueError(
                f"config.json does not describe a {VariantConfig.__name__}: architecture has unknown settings "
                f"{sorted(set(given) - known)} and lacks {sorted(known - set(given))}."
            )
        if given.get("store") == HERE:
            given = {**given, "store": str(self.store_folder())}
        return VariantConfig(**given)

    def store_folder(self) -> Path:
        """Where the knowledge store of the model lies: its own folder, or what was fetched of it from the hub."""
        if not self.name_or_path:
            raise ValueError(
                "This model reads a knowledge store from its folder: load it with from_pretrained."
            )
        found = [cached_file(self.name_or_path, name) for name in STORE_FILES]
        return Path(found[0]).parent

    def _setting(self, name: str) -> Any:
        return (self.architecture or {}).get(name)

    @property
    def vocab_size(self) -> int:
        return self._setting("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self._setting("dim")

    @property
    def num_hidden_layers(self) -> int:
        return self._setting("num_layers")

    @property
    def num_attention_heads(self) -> int:
        return self._setting("num_heads")

    @property
    def num_key_value_heads(self) -> int:
        return self._setting("num_kv_heads")

    @property
    def max_position_embeddings(self) -> int:
        return self._setting("max_length")
