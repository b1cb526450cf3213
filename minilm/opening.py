"""A model from wherever it lies: a run folder, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckpointError, ConfigError, listed
from minilm.run import Loaded, load_checkpoint

FROM_ELSEWHERE = -1  # the step of a model that did not come from one of our runs


def open_model(
    place: str | Path,
    *,
    device: str = "cpu",
    weights: Literal["last", "ema"] = "last",
    knowledge: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """`minilm.run.load_checkpoint`, or the same of a Hugging Face folder: a float32 model in eval mode, its tokenizer.

    A Llama-like model is read as our `original` (equal logits, or it is refused as such); any other causal LM runs as
    it is behind our interface. Its `step` is `FROM_ELSEWHERE`.

    trust_remote_code  run the code that lies in a Hugging Face folder, where the model is made of such
    Raises CheckpointError, ConfigError.
    """
    path = Path(place)
    if not is_huggingface_folder(path):
        return load_checkpoint(path, device=device, weights=weights, knowledge=knowledge)
    problems = []
    if weights != "last":
        problems.append(f"{path} is a Hugging Face folder: it has one set of weights, no average of them.")
    if knowledge is not None:
        problems.append(f"{path} is a Hugging Face folder: it reads no knowledge store from elsewhere.")
    if not trust_remote_code and "auto_map" in (path / "config.json").read_text(encoding="utf-8"):
        problems.append(
            f"{path} holds a model with its own code (auto_map in config.json), and loading it runs that code. Read "
            "it, and if you trust it, say so: --trust-remote-code."
        )
    if problems:
        raise ConfigError(listed(problems))
    return Loaded(
        model=_model(path, trust_remote_code).to(device).eval(),
        tokenizer=Tokenizer.load(path) if (path / "tokenizer.json").is_file() else None,
        folder=path,
        step=FROM_ELSEWHERE,
        run_folder=None,
        config=None,
        store_fingerprint="",
    )


def is_huggingface_folder(path: Path) -> bool:
    """Does `from_pretrained` read it? Our own checkpoints have model.json in place of config.json."""
    return (path / "config.json").is_file()


def as_model(model: nn.Module) -> nn.Module:
    """A model with our interface: itself, or a transformers model behind it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return model
    from minilm.models.hf import HuggingFaceModel

    return HuggingFaceModel(model)


def _model(path: Path, trust_remote_code: bool) -> nn.Module:
    from minilm.models.hf import HuggingFaceModel, from_hf
    from minilm.models.hf.loading import loaded

    theirs = loaded(path, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code)
    try:
        return from_hf(theirs.eval())
    except CheckpointError:  # no Llama: it says what differs, and runs as it is
        return HuggingFaceModel(theirs.eval())
