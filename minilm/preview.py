"""The page of a dry run: what a training run is about to do, before it does it.

Nothing here is computed for show: settings, rows, rates and counts come from the objects that would train.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from minilm import models
from minilm.config import flatten
from minilm.data.loader import Data, Loader
from minilm.data.show import row_table, row_text
from minilm.models import attention
from minilm.run import RunConfig
from minilm.training import optim, passing, paths, saving
from minilm.training.estimate import Memory, Spread, memory
from minilm.training.layout import Kind, Layout

_ROW_CHARACTERS = 400  # of a decoded row
_ROW_POSITIONS = 8  # of its table


@dataclass(frozen=True)
class Plan:
    """What a dry run shows, put together by `minilm.launch` as for a real start. step: where the run stands."""

    config: RunConfig
    origins: Mapping[str, str]
    layout: Layout
    data: Data
    loader: Loader
    step: int

    @property
    def num_steps(self) -> int:
        return self.config.train.num_steps(self.loader.steps_per_epoch)


def show(plan: Plan, console: Console) -> None:
    """Print the page. Raises CheckpointError where the disk is too small, ConfigError for a kernel that cannot run."""
    config, layout = plan.config, plan.layout
    backend = _backend(config, layout)
    optimizer = _optimizer(config, layout)
    num_moments = _num_moments(optimizer)
    console.print(Text(f"Dry run of {config.run_folder}: nothing is written.", style="bold"))
    _heading(console, "Settings (* not the default)")
    console.print(settings_table(plan))
    _heading(console, "Parameters")
    console.print(parameters_table(config))
    console.print(pairs(updates(optimizer)))
    _heading(console, "Data and steps")
    console.print(pairs(steps(plan)))
    _heading(console, "Learning rate")
    console.print(pairs(rates(plan)))
    _heading(console, "Memory of one device")
    console.print(memory_table(plan, num_moments))
    console.print(pairs(device(plan, backend, num_moments)))
    _heading(console, "Disk")
    console.print(pairs(disk(config, num_moments)))
    _heading(console, f"Two rows of step {plan.step + 1}")
    _rows(plan, console)
    saving.refuse_small_disk(
        config.run_folder / "checkpoints",
        config.train,
        num_steps=plan.num_steps,
        checkpoint_bytes=_checkpoint_bytes(config, num_moments),
    )


def settings_table(plan: Plan) -> Table:
    """Every setting with its value and where it comes from."""
    table = _table("", "setting", "value", "from")
    table.columns[1].no_wrap = True
    for name, value in flatten(plan.config).items():
        origin = plan.origins.get(name, "default")
        given = origin != "default"
        shown = "none" if value is None else str(value)
        # One file at most: its name is enough, and the line is what is looked for.
        place = re.sub(r"^.*/(?=[^/]+:\d+$)", "", origin)
        table.add_row("*" if given else "", name, Text(shown), Text(place), style="bold" if given else "dim")
    return table


def parameters_table(config: RunConfig) -> Table:
    """Number of parameters by group."""
    table = _table("group", "parameters", "share", right=(1, 2))
    total = config.model.num_parameters()
    for group, number in config.model.parameter_groups().items():
        table.add_row(group, f"{number:,}", f"{100 * number / total:.1f} %")
    table.add_row("all", f"{total:,}", "", style="bold")
    return table


def updates(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """Who updates how many parameters."""
    for group in optimizer.param_groups:
        name = "Muon" if group.get("muon") else "AdamW"
        yield name, f"{_number(group):,} parameters, weight decay {group['weight_decay']:g}"


def steps(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a step and the run consist of."""
    config, layout, loader, rows = plan.config, plan.layout, plan.loader, plan.data.train
    length, num_steps = config.data.sequence_length, plan.num_steps
    positions = config.train.batch_size * length
    targets = config.train.batch_size * rows.targets_per_row
    left_over = f", {loader.dropped_rows:,} rows left over" if loader.dropped_rows else ""
    yield "store", f"{rows.store.path}, rows {rows.kind}"
    yield "an epoch", f"{rows.rows_per_epoch:,} rows, {loader.steps_per_epoch:,} steps{left_over}"
    yield "layout", str(layout)
    yield (
        "a step",
        f"{config.train.batch_size:,} rows of {length:,} tokens: {positions:,} positions, {targets:,.1f} supervised "
        f"targets on average ({100 * targets / positions:.1f} %)",
    )
    yield "steps", f"{num_steps:,}, {num_steps / loader.steps_per_epoch:.3g} epochs"
    if plan.step:
        yield "stands after step", f"{plan.step:,}: {num_steps - plan.step:,} are left"
    yield "planned tokens", f"{num_steps * positions:,} positions, {num_steps * targets:,.0f} targets"
    limits = {"train.max_tokens": config.train.max_tokens, "train.max_minutes": config.train.max_minutes}
    if set_limits := [f"{name} {value:,}" for name, value in limits.items() if value is not None]:
        yield "stops earlier at", ", ".join(set_limits)
    flops = num_steps * positions * config.model.training_flops_per_token(length)
    yield "arithmetic", f"{flops:.3g} FLOP, forward and backward"
    validation = plan.data.validation
    scored = (
        0 if validation is None else min(len(validation), config.train.validation_rows or len(validation))
    )
    yield "validation", f"{scored:,} rows each time" if scored else "none: the store has no validation split"


def rates(plan: Plan) -> Iterator[tuple[str, str]]:
    """Learning rate at the steps between which it changes its course."""
    told, last = plan.config.optim, plan.num_steps
    after = max(1, told.warmup_steps)  # the step that has the full rate, numbered from 1
    marks = {last: f"last step, {last:,}", after: f"after warm-up, step {after:,}", 1: "first step"}
    for step, name in sorted(marks.items()):
        yield name, f"{optim.rate_at(told, step - 1, last):.4g}"
    yield "schedule", told.schedule
    if told.name == "muon":
        yield "Muon's rates", f"{told.muon_learning_rate / told.learning_rate:.4g} times these"


def layouts(plan: Plan) -> Iterator[tuple[str, Spread, str]]:
    """(name, spread, attention kernel): this run, then the layouts that one may choose from instead."""
    config, layout = plan.config, plan.layout
    own = _spread(config, layout, layout.micro_batch)
    yield "this run", own, _backend(config, layout)
    kernel = config.model.kernel
    if kernel == "auto":
        kernel = "varlen" if attention.flash_missing() else "flash"  # on a GPU
    others: list[tuple[Kind, int, bool]] = [("single", 1, False), ("single", 1, True)]
    if config.optim.name == "adamw":  # Muon does not go with ZeRO
        others += [("zero", 2, True), ("zero", 8, True)]
    for kind, ranks, bf16 in others:
        each, rest = divmod(config.train.batch_size, ranks)
        rows = config.train.rows_per_forward or each
        if rest or each % rows or not each:
            continue
        name = f"ZeRO-2 x {ranks}" if kind == "zero" else f"1 GPU, {'bf16' if bf16 else 'fp32'}"
        spread = Spread(
            kind=kind,
            ranks=ranks,
            bf16=bf16,
            device="cuda",
            rows=rows,
            accumulation=each // rows,
            recompute=own.recompute,
        )
        yield name, spread, "sdpa" if kernel in attention.BY_DOCUMENT and not bf16 else kernel


def memory_table(plan: Plan, num_moments: int) -> Table:
    """Memory by part, for this run and for other layouts of the same batch."""
    named = [
        (name, spread, _memory(plan.config, plan.data, spread, kernel, num_moments))
        for name, spread, kernel in layouts(plan)
    ]
    table = _table("", *(name for name, _, _ in named), right=range(1, len(named) + 1))
    table.add_row("rows a forward", *(str(spread.rows) for _, spread, _ in named))
    for part in named[0][2].parts():
        values = [found.parts()[part] for _, _, found in named]
        if any(value != 0 for value in values):
            table.add_row(part, *map(size, values))
    table.add_row("peak", *(size(found.peak) for _, _, found in named), style="bold")
    return table


def memory_line(plan: Plan) -> str:
    """Memory of one device of this run, part by part."""
    _, spread, kernel = next(layouts(plan))
    optimizer = _optimizer(plan.config, plan.layout)
    found = _memory(plan.config, plan.data, spread, kernel, _num_moments(optimizer))
    shown = [f"{part} {size(value)}" for part, value in found.parts().items() if value != 0]
    return ", ".join([*shown, f"peak {size(found.peak)}"])


def device(plan: Plan, backend: str, num_moments: int) -> Iterator[tuple[str, str]]:
    """The device of this run, whether it is large enough, and how far the numbers can be trusted."""
    layout, kind = plan.layout, plan.layout.device_type
    if kind == "cuda":
        has = torch.cuda.get_device_properties(layout.device).total_memory
        yield "device", f"{torch.cuda.get_device_name(layout.device)}, {size(has)}; attention {backend}"
    else:
        has = psutil.virtual_memory().available
        yield "device", f"cpu, {size(has)} available; attention {backend}"
    own = next(layouts(plan))[1]
    peak = _memory(plan.config, plan.data, own, backend, num_moments).peak
    if peak is None:
        yield "activations", f"not known for the model {plan.config.model.name}"
    elif peak * (layout.world_size if kind == "cpu" else 1) > has:
        yield "WARNING", "this run will not fit. A smaller train.micro_batch takes less memory."
    if plan.config.train.compile:
        yield "compiled", "blocks that are compiled keep less than is counted here"
    yield "peak", "gradients and activations are there in turn, unless a step has several micro-batches"
    yield (
        "trust",
        "tensors only. Held against measurements on a CPU; for CUDA and ZeRO computed, not measured",
    )


def disk(config: RunConfig, num_moments: int) -> Iterator[tuple[str, str]]:
    """Size of the checkpoints, and the room for them."""
    one = _checkpoint_bytes(config, num_moments)
    at_once = (
        config.train.keep_last + 1 + config.train.keep_best
    )  # the new one is whole before an old one goes
    yield "checkpoint", size(one)
    yield "at most", f"{at_once} at once, {size(at_once * one)}"
    yield (
        "free",
        f"{size(shutil.disk_usage(_existing(config.run_folder)).free)} in {_existing(config.run_folder)}",
    )


def size(value: int | None) -> str:
    """Bytes in decimal units, as the log's megabytes are."""
    if value is None:
        return "?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value} B"


def pairs(rows: Iterator[tuple[str, str]]) -> Table:
    """Names and texts, two columns."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def memory_by_rows(config: RunConfig, layout: Layout, data: Data) -> tuple[Callable[[int], Memory], int]:
    """Rows of a forward -> memory of one device of this run, and the bytes of a checkpoint."""
    num_moments, kernel = _num_moments(_optimizer(config, layout)), _backend(config, layout)

    def needed(rows: int) -> Memory:
        return _memory(config, data, _spread(config, layout, rows), kernel, num_moments)

    return needed, _checkpoint_bytes(config, num_moments)


def _spread(config: RunConfig, layout: Layout, rows: int) -> Spread:
    return Spread(
        kind=layout.kind, ranks=layout.world_size, bf16=layout.bf16, device=layout.device_type, rows=rows,
        accumulation=layout.micro_batch * layout.accumulation // rows, zero_stage=layout.zero_stage or 2,
        recompute=config.train.activation_checkpointing,
    )  # fmt: skip


def _memory(config: RunConfig, data: Data, spread: Spread, kernel: str, num_moments: int) -> Memory:
    return memory(
        config.model,
        spread,
        length=config.data.sequence_length,
        backend=kernel,
        num_moments=num_moments,
        averages=config.train.ema_decay is not None,
        labelled=_labelled(data),
    )


def _labelled(data: Data) -> float:
    """Share of the training tokens whose entry in a knowledge store the data name."""
    store = data.train.store
    sources = store.manifest["splits"]["train"]["sources"].values()
    labelled = sum(int(counts.get("labelled", 0)) for counts in sources)
    return labelled / sum(shard.num_tokens for shard in store.shards("train"))


def _backend(config: RunConfig, layout: Layout) -> str:
    """The attention kernel that will run. Raises ConfigError where the one that was asked for cannot."""
    return paths.kernel_of(config.model, layout.device, bf16=layout.bf16)


def _optimizer(config: RunConfig, layout: Layout) -> torch.optim.Optimizer:
    """The optimizer of a real start, with its refusals, over a model of shapes only: no memory, no time."""
    with torch.device("meta"):
        model = models.build(config.model)
    passing.arrange(model, recompute=config.train.activation_checkpointing, compiled=config.train.compile)
    made = optim.build(model, config.optim)
    layout.check_optimizer(made)
    return made


def _number(group: Mapping[str, Any]) -> int:
    return sum(p.numel() for p in group["params"])


def _num_moments(optimizer: torch.optim.Optimizer) -> int:
    return sum((1 if group.get("muon") else 2) * _number(group) for group in optimizer.param_groups)


def _checkpoint_bytes(config: RunConfig, num_moments: int) -> int:
    """float32 weights, moments and average; tokenizer and random states are small beside them."""
    n = config.model.num_parameters()
    return 4 * (n + num_moments + (n if config.train.ema_decay is not None else 0))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _rows(plan: Plan, console: Console) -> None:
    tokenizer, step = plan.data.tokenizer, plan.loader.next_step
    places = plan.loader.where(step).rows
    flat = [(batch, row) for batch in plan.loader.step(step) for row in range(batch.shape[0])]
    for place, (batch, row) in list(zip(places, flat, strict=False))[:2]:  # the first rank has the first rows
        targets = int(batch.weights[row].sum())
        console.print(Rule(Text(f"{place} · {targets} targets"), align="left", characters="-"))
        text = row_text(batch, row, tokenizer)
        text.truncate(_ROW_CHARACTERS, overflow="ellipsis")
        console.print(text)
        console.print()
        console.print(row_table(batch, row, tokenizer, _ROW_POSITIONS))
        console.print()


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold underline"))


def _table(*names: str, right: Any = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    return table
