"""The state of the optimizer by parameter name, the same whatever the layout: one process, DDP or ZeRO.

DeepSpeed's own checkpoint belongs to the number of ranks that wrote it and is a pickle. Here every rank's part of
the float32 master weights and of AdamW's moments is put together under the name of its parameter, so that N ranks
can go on as M, with or without ZeRO. Nothing is rounded on the way: what goes out comes back bit for bit.

    ema.safetensors          the averaged weights by name, float32, where the run keeps an average; updates in metadata
    optimizer.safetensors    NAME::exp_avg, NAME::exp_avg_sq (AdamW) or NAME::momentum_buffer (Muon), float32, shaped
                             like the parameter; steps in metadata
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minilm.errors import CheckpointError, listed
from minilm.training.layout import Layout

FILE, AVERAGE = "optimizer.safetensors", "ema.safetensors"
_SEPARATOR = "::"


def full_weights(layout: Layout) -> dict[str, Tensor]:
    """Float32 weights of the model by name, on every rank (ZeRO: from the master copies). Collective."""
    state = layout.model.state_dict(keep_vars=True)
    if layout.engine is None:
        return {name: value.detach() for name, value in state.items()}
    # A tied matrix has one master copy; a buffer has none and is the same on every rank.
    return {
        name: value.get_full_hp_param().detach() if isinstance(value, nn.Parameter) else value
        for name, value in state.items()
    }


def average_weights(layout: Layout) -> dict[str, Tensor]:
    """The averaged weights by name, like `full_weights`; a buffer is as it is now. Collective."""
    average = layout.average
    assert average is not None
    if layout.engine is not None:
        with average.exchanged():  # gathering makes new tensors, which stay when the exchange is undone
            return full_weights(layout)
    own = {live.data_ptr(): shadow for live, shadow in zip(average.live, average.shadow, strict=True)}
    return {name: own.get(value.data_ptr(), value) for name, value in full_weights(layout).items()}


@dataclass(frozen=True)
class OptimizerState:
    """`tensors`: "NAME::KIND" -> float32, shaped like the parameter; `steps`: NAME -> updates it has had.

    `average`: averaged weights by name, after `num_updates` updates.
    """

    tensors: dict[str, Tensor]
    steps: dict[str, float]
    average: dict[str, Tensor] | None = None
    num_updates: int = 0

    def copied(self, keep: Callable[[str, Tensor], Tensor]) -> OptimizerState:
        """The same with keep(name, tensor) in place of each tensor."""
        average = self.average
        if average is not None:
            average = {name: keep(f"average/{name}", value) for name, value in average.items()}
        tensors = {name: keep(f"moments/{name}", value) for name, value in self.tensors.items()}
        return OptimizerState(tensors, dict(self.steps), average, self.num_updates)

    def write(self, folder: Path) -> None:
        """Write optimizer.safetensors and, where there is an average, ema.safetensors."""
        # One metadata key: several are written in an order of chance, and equal states would give unequal files.
        save_file(self.tensors, folder / FILE, metadata={"steps": json.dumps(self.steps)})
        if self.average is not None:
            contiguous = {name: value.contiguous() for name, value in self.average.items()}
            save_file(contiguous, folder / AVERAGE, metadata={"updates": str(self.num_updates)})


def optimizer_state(layout: Layout) -> OptimizerState:
    """The whole state, on every rank; empty before the first update. Collective."""
    named = dict(layout.model.named_parameters())
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    average: dict[str, Tensor] | None = None
    num_updates = 0
    if layout.average is not None:
        average, num_updates = average_weights(layout), layout.average.num_updates
    if not any(layout.optimizer.optimizer.state.values()):
        return OptimizerState(tensors, steps, average, num_updates)
    if layout.engine is None:
        state = layout.optimizer.optimizer.state
        for name, parameter in named.items():
            own = dict(state.get(parameter, {}))
            if not own:  # it never had a gradient, for instance an expert that no token chose
                continue
            steps[name] = float(own.pop("step"))
            tensors |= {name + _SEPARATOR + kind: value.detach().contiguous() for kind, value in own.items()}
        return OptimizerState(tensors, steps, average, num_updates)
    zero = layout.engine.optimizer
    _link(zero)
    flat_state = [zero.optimizer.state[flat] for flat in zero.single_partition_of_fp32_groups]
    kinds = [key for key in flat_state[0] if key != "step"]
    for name, parameter in named.items():
        steps[name] = float(flat_state[0]["step"])
        for kind in kinds:
            tensors[name + _SEPARATOR + kind] = parameter.get_full_hp_param(kind).detach()
    return OptimizerState(tensors, steps, average, num_updates)


def load(layout: Layout, folder: Path, weights: dict[str, Tensor]) -> None:
    """Put back what `OptimizerState.write` wrote, into a freshly prepared layout or in place of what it has.

    weights  float32 by name: the master copies of a sharded layout are set to them.
    Raises CheckpointError naming every parameter that does not fit.
    """
    tensors, steps = _read(folder / FILE, "steps")
    named = dict(layout.model.named_parameters())
    saved = {key.partition(_SEPARATOR)[0] for key in tensors}
    # A parameter that had no gradient yet has no state, and before the first update none has.
    wrong = [f"{name} has no optimizer state" for name in steps if name not in saved]
    wrong += [f"{name} is no parameter of this model" for name in sorted(saved - named.keys())]
    wrong += [
        f"{key}: shape {list(tensor.shape)} instead of {list(named[name].shape)}"
        for key, tensor in tensors.items()
        if (name := key.partition(_SEPARATOR)[0]) in named and tensor.shape != named[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{folder / FILE} does not fit the model: {listed(wrong)}")
    if layout.engine is None:
        optimizer = layout.optimizer.optimizer
        optimizer.state.clear()  # a run that goes back has one
        for name, step in steps.items():
            optimizer.state[named[name]] = {"step": _step_tensor(optimizer, named[name], step)}
        for key, tensor in tensors.items():
            name, _, kind = key.partition(_SEPARATOR)
            optimizer.state[named[name]][kind] = tensor.to(named[name].device)
    else:
        kinds = sorted({key.partition(_SEPARATOR)[2] for key in tensors})
        _load_sharded(layout.engine.optimizer, named, tensors, steps, kinds, weights)
    if layout.average is not None:
        _load_average(layout, folder / AVERAGE)


def load_average_into(model: nn.Module, folder: Path) -> None:
    """Give a model that was loaded from a checkpoint folder the averaged weights of that checkpoint.

    Raises CheckpointError if the run kept no average or the file does not fit.
    """
    path = folder / AVERAGE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no averaged weights: its run kept none (train.ema_decay).")
    tensors, _ = _read(path, "updates")
    own = model.state_dict()
    wrong = [name for name in own.keys() | tensors.keys() if name not in own or name not in tensors]
    wrong += [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model: {listed(sorted(wrong))}")
    for name, value in tensors.items():
        own[name].copy_(value)


def _load_average(layout: Layout, path: Path) -> None:
    """Put back an average, after the weights. The live tensors take it, so that a sharded layout can share it out."""
    average = layout.average
    assert average is not None
    tensors, updates = _read(path, "updates")
    named = dict(layout.model.named_parameters())
    wrong = [name for name, p in named.items() if name not in tensors or tensors[name].shape != p.shape]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model: {listed(wrong)} missing or of another shape")
    with torch.no_grad(), average.exchanged():
        for name, parameter in named.items():
            value = tensors[name].to(parameter.device)
            if layout.engine is None:
                parameter.copy_(value)
            else:
                parameter.set_full_hp_param(value)
    average.num_updates = int(updates)


def _load_sharded(
    zero: Any,
    named: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    steps: dict[str, float],
    kinds: list[str],
    weights: dict[str, Tensor],
) -> None:
    """ZeRO makes its state at the first step: make it now, link it to the parameters, then fill it by name."""
    if not steps:  # AdamW begins with zeros, and so does one that goes back to before its first update
        for of_flat in zero.optimizer.state.values():
            for value in of_flat.values():
                value.zero_()
    else:
        step = next(iter(steps.values()))
        for flat in zero.single_partition_of_fp32_groups:
            filled = {kind: torch.zeros_like(flat) for kind in kinds}
            zero.optimizer.state[flat] = {"step": _step_tensor(zero.optimizer, flat, step), **filled}
        _link(zero)
    for name, parameter in named.items():
        value = weights[name].to(parameter.device)
        parameter.set_full_hp_param(value)
        with torch.no_grad():
            parameter.copy_(value)  # the copy that the forward uses, rounded to its type
        for kind in kinds:
            if name in steps:  # the others keep the zeros that they begin with
                parameter.set_full_hp_param(tensors[name + _SEPARATOR + kind].to(parameter.device), kind)


def _link(zero: Any) -> None:
    """Connect every parameter with its part of the flat state.

    DeepSpeed (0.19.8) does so once, in the update of the first parameter group, when the state of the other groups
    does not exist yet: their parameters would have none.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _step_tensor(optimizer: torch.optim.Optimizer, parameter: Tensor, step: float) -> Tensor:
    # A fused optimizer counts on the parameter's device, the others on the CPU.
    fused = optimizer.param_groups[0].get("fused")
    return torch.tensor(step, dtype=torch.float32, device=parameter.device if fused else "cpu")


def _read(path: Path, field: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file and one field of its metadata, decoded."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()[field])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
