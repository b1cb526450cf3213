"""A Hugging Face folder as a transformers model, with every weight from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.errors import CheckpointError, listed
from minilm.models.hf.quiet import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loaded(source: str | Path, **how: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(source, **how)`, with no weight missing, left over or of another shape.

    Raises CheckpointError for what cannot be read, and naming the weights that do not fit: transformers itself draws
    what a file lacks at random and goes on with a warning.
    """
    from transformers import AutoModelForCausalLM

    try:
        with without_bars():
            model, info = AutoModelForCausalLM.from_pretrained(str(source), output_loading_info=True, **how)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} cannot be read as a Hugging Face causal LM: {error}") from error
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if wrong:
        raise CheckpointError(f"The weights in {source} do not fit their config: {listed(wrong)}")
    return model
