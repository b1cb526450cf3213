"""`minilm.examine(target)`: from what the user names to a subject, and from a subject to findings.

TARGET                       examined
runs/first, a checkpoint     the trained model, its data, its training step, its checkpoint, its generation
experiment.yaml              the same with fresh weights, as the run would start
a Hugging Face folder        the model, its loss, cache and generator
hf:FAMILY                    a tiny random model of any causal LM family that transformers knows
path/file.py:factory         what the factory returns: a Subject, a module, a function tokens -> logits
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minilm import models
from minilm.doctor.core import Check, Finding, run_checks, select
from minilm.doctor.report import Examination
from minilm.doctor.subject import Subject
from minilm.errors import ConfigError, MinilmError

if TYPE_CHECKING:
    from minilm.run import RunConfig

NUM_STEPS = 20  # of the schedule that is examined: the shape of the run's own, in steps that can be afforded
FORMS = "a run folder or checkpoint, a settings file (.yaml), a Hugging Face folder, hf:FAMILY, path/file.py:factory"


def examine(
    target: Any,
    *,
    data: str | None = None,
    store: str | None = None,
    suite: str = "full",
    only: Iterable[str] = (),
    watch: Callable[[Finding], object] | None = None,
    trust_remote_code: bool = False,
    **parts: Any,
) -> Examination:
    """Run the checks of a suite ("quick" or "full"), or those named in `only`, on a target.

    target  as on the command line (see this module's text), or an object: Subject, module, Hugging Face model or
            transformers.Trainer, function from tokens [B, T] to logits [B, T, V]
    data    a store folder, in place of the one that the run names
    store   a knowledge store, in place of the one that a checkpoint was trained with
    watch   called with each finding as it comes
    trust_remote_code  run the code in a Hugging Face folder whose model is made of such
    parts   further fields of `minilm.Subject`

    Raises ConfigError, DataError or CheckpointError for a target that cannot be read.
    """
    chosen = chosen_checks(suite, only)
    subject = subject_of(target, data=data, store=store, trust_remote_code=trust_remote_code, **parts)
    findings = []
    for finding in run_checks(subject, chosen):
        findings.append(finding)
        if watch is not None:
            watch(finding)
    return Examination(subject.name, _suite_name(suite, only), findings, _about(subject))


def chosen_checks(suite: str, only: Iterable[str]) -> list[Check]:
    """`select`, with a user's error for an unknown name."""
    try:
        return select(suite, only)
    except ValueError as error:
        raise ConfigError(f"--only: {error}") from error


def subject_of(
    target: Any,
    *,
    data: str | None = None,
    store: str | None = None,
    trust_remote_code: bool = False,
    **parts: Any,
) -> Subject:
    """The subject that a target names."""
    if isinstance(target, str | Path):
        subject = _named(str(target), data, store, trust_remote_code)
    else:
        from minilm.doctor.targets.foreign import subject_of_object

        subject = subject_of_object(target)
    return subject.but(**parts) if parts else subject


def _named(text: str, data: str | None, store: str | None, trust_remote_code: bool) -> Subject:
    from minilm.doctor.targets import foreign, huggingface

    path = Path(text)
    ours = path.is_dir() and not huggingface.is_huggingface_folder(path)
    if store is not None and not ours:
        raise ConfigError(f"{text} is no checkpoint, so it reads no knowledge store: leave --store out.")
    if text.startswith("hf:"):
        return huggingface.family_subject(text.removeprefix("hf:"))
    if ":" in text and Path(text.rpartition(":")[0]).suffix == ".py":
        return foreign.factory_subject(text)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _of_settings(path, data)
    if path.is_dir():
        if huggingface.is_huggingface_folder(path):
            return huggingface.folder_subject(path, trust_remote_code=trust_remote_code)
        return _of_checkpoint(path, data, store)
    raise ConfigError(f"{text} is none of these: {FORMS}.")


def _of_checkpoint(path: Path, data: str | None, store: str | None) -> Subject:
    from minilm.doctor.targets.our_model import model_subject
    from minilm.run import load_checkpoint

    loaded = load_checkpoint(path, knowledge=store)
    subject = model_subject(
        loaded.model,
        tokenizer=loaded.tokenizer,
        fresh=False,
        name=str(loaded.folder),
        config=loaded.model.config,
    )
    if loaded.config is None:
        return subject
    config = loaded.config
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=data))
    return _with_surroundings(subject, config, required=data is not None)


def _of_settings(path: Path, data: str | None) -> Subject:
    from minilm.data.loader import open_data
    from minilm.doctor.targets.our_model import config_subject
    from minilm.run import load_config, with_vocabulary

    overrides = [] if data is None else [f"--data.store={data}"]
    resolved = load_config(path, overrides)
    opened = open_data(resolved.value.data)
    config = with_vocabulary(resolved, opened.train.store)
    subject = config_subject(config.model, seed=config.train.seed, tokenizer=opened.tokenizer)
    return _with_surroundings(subject.but(name=str(path)), config, required=True)


def _with_surroundings(subject: Subject, config: RunConfig, *, required: bool) -> Subject:
    """Data and training step of a run; where the store is gone and was not asked for, the model alone."""
    from minilm.data.loader import Loader, open_data
    from minilm.doctor.targets.our_data import data_view
    from minilm.doctor.targets.our_memory import entries_of
    from minilm.doctor.targets.our_ranks import ranks_of
    from minilm.doctor.targets.our_training import copies_of, training_of

    try:
        data = open_data(config.data)
    except MinilmError:
        if required:
            raise
        return subject
    assert subject.module is not None
    size, micro = config.train.batch_size, config.train.rows_per_forward
    loader = Loader(
        data.train, batch_rows=size, micro_batch=micro or size, seed=config.train.seed, prefetch=0
    )
    # Fresh weights are drawn anew for each seed; weights that were trained are where every seed begins.
    make = functools.partial(_drawn, config) if subject.fresh else copies_of(subject.module)
    train = dataclasses.replace(config.train, device="cpu", ranks=None, compile=False, micro_batch=micro)
    view = data_view(data, batch_rows=size, micro_batch=micro, knowledge=entries_of(subject.module))
    return subject.but(
        data=view,
        tokenizer=data.tokenizer,
        training=training_of(make, config.optim, train, num_steps=NUM_STEPS, batches=loader.step),
        ranks=ranks_of(config.data, config.optim, train, make, num_steps=NUM_STEPS),
    )


def _drawn(config: RunConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(config.model)


def _about(subject: Subject) -> dict[str, Any]:
    about: dict[str, Any] = {"torch": torch.__version__, "vocabulary": subject.vocab_size}
    if subject.module is not None:
        about["parameters"] = f"{sum(p.numel() for p in subject.module.parameters()):,}"
    return about


def _suite_name(suite: str, only: Iterable[str]) -> str:
    names: Sequence[str] = list(only)
    return f"only {', '.join(names)}" if names else suite
