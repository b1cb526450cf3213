"""The border outwards: a model of ours as a folder that other software loads.

    export("runs/first", "out")                       a Hugging Face folder
    export("runs/first", "out", kind="gguf")          model.gguf for llama.cpp (`original` only)

`original` becomes a Llama, every other model a folder with its own code. Nothing is handed out that was not
loaded again and compared with the model it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

__all__ = ["export"]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    kind: Literal["hf", "gguf"] = "hf",
    weights: Literal["last", "ema"] = "last",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Export the newest checkpoint of a run folder, or the named one, to the new folder `out`, which is returned.

    Raises ConfigError if `out` exists or the model cannot be exported so, CheckpointError for a checkpoint that
    cannot be read and for an export that, loaded again, does not compute the same.
    """
    import torch

    from minilm.export import card, folder
    from minilm.run import load_checkpoint

    out = Path(out)
    folder.refuse_existing(out)
    loaded = load_checkpoint(checkpoint, weights=weights)
    given: dict[str, Any] = {
        "tokenizer": loaded.tokenizer,
        "facts": card.facts_of(loaded, weights),
        "dtype": getattr(torch, dtype),
    }
    if kind == "gguf":
        from minilm.export import llamacpp

        return llamacpp.export_gguf(loaded.model, out, **given)
    return folder.export_folder(loaded.model, out, **given)
