"""Weights to begin with: of a run, a checkpoint or a Hugging Face folder (setting `train.init_from`).

Only weights are taken. The optimizer, the schedule, the data and the random states begin as in any new run, so the
first validation of the run is the evaluation of the source.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from minilm import models
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckpointError, ConfigError, listed
from minilm.models import folder as model_folder
from minilm.models.base import ModelConfig
from minilm.run import load_checkpoint

# They change no stored number; where a model has one row per position after all, the shapes tell.
_FREE = ("attention", "dropout", "init_std", "max_length")


@dataclass(frozen=True)
class Source:
    """A model whose weights can be taken over, on the CPU. `about`: what a manifest says of it."""

    model: nn.Module
    tokenizer: Tokenizer | None
    about: dict[str, Any]

    def __str__(self) -> str:
        step = f", step {self.about['step']:,}" if "step" in self.about else ""
        return f"{self.about['path']} ({self.about['kind']}, {self.about['weights']} weights{step})"


def open_source(path: str, weights: Literal["last", "ema"] = "last") -> Source:
    """The newest undamaged checkpoint of a run folder, the named checkpoint, or a Llama-like Hugging Face folder.

    Raises ConfigError if there is no such folder, CheckpointError for what is damaged, incomplete or no such model.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise ConfigError(f"train.init_from: there is no folder {folder}.")
    if (folder / "config.json").is_file() and not (folder / model_folder.DESCRIPTION).is_file():
        from minilm.models.hf import from_hf

        if weights == "ema":
            raise ConfigError(
                f"train.init_weights ema: {folder} is a Hugging Face folder, which keeps no average."
            )
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer = Tokenizer.load(str(folder)) if has_tokenizer else None
        return Source(
            from_hf(folder), tokenizer, {"path": str(folder), "kind": "Hugging Face", "weights": weights}
        )
    loaded = load_checkpoint(folder, weights=weights)
    about = {"path": str(loaded.folder), "kind": "checkpoint", "weights": weights, "step": loaded.step}
    return Source(loaded.model, loaded.tokenizer, about)


def check(source: Source, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises CheckpointError with everything in which the source differs from the model and tokenizer of the run."""
    settings: Any = source.model.config
    theirs, ours = dataclasses.asdict(settings), dataclasses.asdict(config)
    wrong = [
        f"model.{key} is {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in _FREE and theirs.get(key) != ours.get(key)
    ]
    if not wrong:  # else the shapes only repeat what the settings say
        with torch.device("meta"):
            wanted = {name: list(value.shape) for name, value in models.build(config).state_dict().items()}
        given = {name: list(value.shape) for name, value in source.model.state_dict().items()}
        wrong = [
            f"{name} has shape {given.get(name)} there, {wanted.get(name)} here"
            for name in sorted(given.keys() | wanted.keys())
            if given.get(name) != wanted.get(name)
        ]
    before, now = (t.fingerprint if t else None for t in (source.tokenizer, tokenizer))
    # A Hugging Face folder may come without its tokenizer; one of ours has it, or was trained on bare ids.
    if before != now and not (before is None and source.about["kind"] == "Hugging Face"):
        wrong.append(f"the tokenizer is {before or 'absent'} there, {now or 'absent'} here")
    if wrong:
        raise CheckpointError(
            f"train.init_from: the weights of {source.about['path']} do not fit this run. {listed(wrong)}\n"
            "Give the source's settings under `model`, and a store built with its tokenizer."
        )


def take_over(model: nn.Module, source: Source) -> dict[str, Any]:
    """Copy the weights, in the model's own type; returns what the manifest keeps, with their fingerprint."""
    given = source.model.state_dict()
    for name, value in model.state_dict().items():
        value.copy_(given[name])
    return {**source.about, "fingerprint": fingerprint(model)}


def fingerprint(model: nn.Module) -> str:
    """Of the names and numbers of a model's weights, in their type."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
