"""A model as a folder: `model.safetensors` (the weights, each parameter once) and `model.json` (its config).

Loading is strict: the folder and the code must agree on the architecture, on every name and on every shape,
and every number must be finite. What does not agree is named, all of it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minilm import models
from minilm.errors import CheckpointError, ConfigError, listed

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def save(model: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the two files into `folder` (made if missing), each in one step: a file is old or new, never torn.

    `state` replaces `model.state_dict()`, for weights that were gathered elsewhere (ZeRO keeps the float32
    master weights outside of the module). Dtypes are kept as they are. Raises CheckpointError if `state` does
    not fit the model, or if the disk is full or cannot be written.
    """
    folder = Path(folder)
    own = model.state_dict()
    tensors = {name: value.detach().contiguous() for name, value in (own if state is None else state).items()}
    wrong = _differences({n: tuple(t.shape) for n, t in tensors.items()}, own, "the given state")
    if wrong:
        raise CheckpointError(f"These weights are not those of the model to be saved: {listed(wrong)}")
    config = model.config
    description = {
        "format": FORMAT,
        "name": config.name,
        "num_parameters": config.num_parameters(),
        "config": dataclasses.asdict(config),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{WEIGHTS}.part"
        save_file({name: value.cpu() for name, value in tensors.items()}, part, metadata={"format": "pt"})
        text = folder / f"{DESCRIPTION}.part"
        text.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(text, part)  # safetensors makes files that only their owner can read
        part.replace(folder / WEIGHTS)
        text.replace(folder / DESCRIPTION)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The model could not be written to {folder}: {error}. Check free space and permissions."
        ) from error


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    knowledge: str | None = None,
) -> nn.Module:
    """The model of a folder, in evaluation mode. `dtype` None keeps what was saved.

    knowledge  folder of a knowledge store that is to be read in place of the one that the model was trained with

    Raises CheckpointError naming every difference. Draws nothing from the caller's random generator.
    """
    folder = Path(folder)
    config = read_config(folder)
    if knowledge is not None:
        if not getattr(config, "layers", ()):
            raise CheckpointError(f"{folder} holds a model without a knowledge memory: it can read no store.")
        config = dataclasses.replace(config, store=knowledge, store_fingerprint="")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        model = models.build(config)
    state = model.state_dict(keep_vars=True)
    for name, tensor in _read(folder / WEIGHTS, state).items():
        state[name].data = tensor  # in the dtype that was saved
    model = model.to(device)
    return (model if dtype is None else model.to(dtype)).eval()


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights of a folder into `model`, in place and in its own dtype and device.

    The configs must be the same but for dropout and kernel. Raises CheckpointError naming every difference.
    """
    folder = Path(folder)
    _refuse_other_config(model.config, read_config(folder), folder)
    state = model.state_dict()
    for name, tensor in _read(folder / WEIGHTS, state).items():
        state[name].copy_(tensor)


def read_config(folder: str | Path) -> models.ModelConfig:
    """The config of a saved model. Raises CheckpointError if `model.json` is missing, damaged or does not fit."""
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist, so {folder} is not a saved model. {_inside(Path(folder))}"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise CheckpointError(f"{path} is damaged: it holds no model config.")
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {description.get('format')!r}, this minilm reads format {FORMAT}. "
            "Use the version that wrote it."
        )
    values: dict[str, Any] = description["config"]
    try:
        cls = models.config_class(str(values.get("name")))
        missing = sorted({f.name for f in dataclasses.fields(cls)} - set(values))
        if missing:
            # A default of today may not be what the weights were trained with.
            raise CheckpointError(f"{path} lacks the settings {', '.join(missing)}.")
        values = _portable(values)
        config = models.from_dict(values, where=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a model of this minilm. {error}") from error
    if description.get("num_parameters") != config.num_parameters():
        raise CheckpointError(
            f"{path} was written for {description.get('num_parameters')} parameters, its config stands for "
            f"{config.num_parameters()}: one of them was changed by hand."
        )
    return config


def _portable(values: dict[str, Any]) -> dict[str, Any]:
    """The kernel is a property of the machine, not of the weights: what may be missing here is chosen anew."""
    from minilm.models.attention import flash_missing

    kernel = values.get("attention")
    if kernel in ("varlen", "blockwise") or (kernel == "flash" and flash_missing()):
        return {**values, "attention": "auto"}
    return values


def _refuse_other_config(ours: models.ModelConfig, saved: models.ModelConfig, folder: Path) -> None:
    # They change no stored number and no shape. Of a knowledge store the fingerprint counts, not the place.
    free = {
        "attention",
        "dropout",
        "init_std",
        "store",
        "retrieval_weight",
        "memory_balance_weight",
        "freeze_keys",
    }
    a, b = dataclasses.asdict(saved), dataclasses.asdict(ours)
    wrong = [
        f"{key} is {a.get(key, 'absent')!r} in the folder, {b.get(key, 'absent')!r} here"
        for key in sorted(a.keys() | b.keys())
        if key not in free and a.get(key) != b.get(key)
    ]
    if wrong:
        raise CheckpointError(f"{folder} holds another model: {listed(wrong)}")


def _read(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wrong = _differences(shapes, expected, path.name)
            if wrong:
                raise CheckpointError(f"{path} does not fit the model: {listed(wrong)}")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist. {_inside(path.parent)}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}.") from error
    wrong = [
        f"{name}: {tensor.dtype} instead of {expected[name].dtype}"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    wrong += [
        f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if wrong:
        raise CheckpointError(f"{path} is damaged: {listed(wrong)}")
    return tensors


def _differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], where: str
) -> list[str]:
    wrong = [f"{name} is missing in {where}" for name in expected if name not in found]
    wrong += [f"{name} is in {where} but not in the model" for name in found if name not in expected]
    wrong += [
        f"{name} has shape {list(found[name])} in {where}, {list(expected[name].shape)} in the model"
        for name in expected
        if name in found and found[name] != tuple(expected[name].shape)
    ]
    return wrong


def _inside(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}."
    names = sorted(path.name for path in folder.iterdir())
    return f"The folder holds: {', '.join(names[:20]) or 'nothing'}."
