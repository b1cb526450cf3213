"""Settings that were given and change nothing, because another one turns them off: the user is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from minilm.config import flatten
from minilm.data.loader import Data
from minilm.run import RunConfig


def without_effect(config: RunConfig, origins: Mapping[str, str], data: Data) -> list[str]:
    """One line for each setting that somebody gave, other than its default, and that has no effect here."""
    given, defaults = flatten(config), dict(_defaults(config))
    lines = []
    for idle, patterns, why in _rules(config, data):
        for name in given if idle else ():
            matches = any(name == p or (p.endswith("*") and name.startswith(p[:-1])) for p in patterns)
            origin = origins.get(name, "default")
            if matches and origin != "default" and given[name] != defaults[name]:
                lines.append(f"{name} {given[name]} ({origin}) has no effect: {why}")
    return lines


def _rules(config: RunConfig, data: Data) -> Iterator[tuple[bool, tuple[str, ...], str]]:
    """(is it so, names or beginnings of names that have no effect then, why)"""
    train, optim = config.train, config.optim
    yield optim.name != "muon", ("optim.muon_*",), f"optim.name is {optim.name}"
    yield optim.schedule != "wsd", ("optim.decay_share",), f"optim.schedule is {optim.schedule}"
    yield optim.schedule == "constant", ("optim.final_rate",), "optim.schedule is constant"
    yield train.on_nonfinite != "skip", ("train.skip_budget",), f"train.on_nonfinite is {train.on_nonfinite}"
    yield train.on_spike != "rollback", ("train.rollback_budget",), f"train.on_spike is {train.on_spike}"
    yield not train.init_from, ("train.init_weights",), "train.init_from is not given"
    validating = ("train.validate_every", "train.validation_rows", "train.keep_best")
    yield data.validation is None, validating, "the store has no validation split"
    yield (
        data.tokenizer is None,
        ("sample.*", "train.sample_every"),
        "the store has no tokenizer to write with",
    )
    greedy = config.sample.temperature == 0
    yield greedy, ("sample.top_k", "sample.seed"), "sample.temperature is 0"
    dashboard = ("project", "name", "group", "tags", "swanlab_folder", "swanlab_close_seconds")
    of_dashboard = tuple(f"track.{name}" for name in dashboard)
    unused = tuple(f"model.{name}" for name in config.model.unused)
    yield bool(unused), unused, f"model {config.model.name} has no use for it"
    yield config.track.swanlab == "off", of_dashboard, "track.swanlab is off"


def _defaults(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Dotted name -> default, of every setting."""
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            made = field.default
            if field.default_factory is not dataclasses.MISSING:
                made = field.default_factory()
            yield f"{section.name}.{field.name}", made
