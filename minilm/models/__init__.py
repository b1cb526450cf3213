"""The models, by name: `preset("original", "26m")` is a config, `build(config)` the module.

A variant is one file of this folder: a config class marked `@register("name")` and the module that it builds.
No list is edited; the registry imports every file of the folder when it is first asked.

    config = preset("original", "26m", dropout=0.1)
    model = build(config)
    output = model(inputs, segments)            # .hidden [B, L, D], .logits [B, L, V], .auxiliary
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model
from torch import nn

from minilm.errors import ConfigError, listed
from minilm.models.base import ModelConfig, Output

__all__ = [
    "ModelConfig",
    "Output",
    "build",
    "config_class",
    "from_dict",
    "names",
    "preset",
    "problems",
    "register",
    "sizes",
]

C = TypeVar("C", bound=type[ModelConfig])

# Filled by `register` while the files of this folder are imported, and never changed afterwards.
_CONFIG_CLASSES: dict[str, type[ModelConfig]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: the config class that stands for `name`. The same name twice is a defect of the code."""

    def add(cls: C) -> C:
        known = _CONFIG_CLASSES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RuntimeError(f"model {name!r} is registered by {known.__module__} and by {cls.__module__}")
        _CONFIG_CLASSES[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Names of all models, sorted."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_CONFIG_CLASSES)


def config_class(name: str) -> type[ModelConfig]:
    """The config class of a model. Raises ConfigError with a suggestion for an unknown name."""
    known = names()
    if name not in _CONFIG_CLASSES:
        raise ConfigError(f"There is no model {name!r}{_suggestion(name, known)} Models: {', '.join(known)}.")
    return _CONFIG_CLASSES[name]


def sizes(name: str) -> list[str]:
    """Names of the sizes of a model, from small to large."""
    return list(config_class(name).sizes)


def preset(name: str, size: str, **changes: Any) -> ModelConfig:
    """The config of a named size, with single fields changed. Raises ConfigError for unknown name, size or field."""
    return from_dict({"name": name, "size": size, **changes})


def from_dict(settings: Mapping[str, Any], where: str = "model") -> ModelConfig:
    """A checked config from settings: `name`, optionally `size`, and fields that replace those of the size.

    `where` is the section or file that error messages name. Raises ConfigError naming every problem.
    """
    given = dict(settings)
    if "name" not in given:
        raise ConfigError(f"{where} has no name. Add one of: {', '.join(names())}.")
    cls = config_class(given["name"])
    start: dict[str, Any] = {}
    if (size := given.pop("size", None)) is not None:
        if size not in cls.sizes:
            hint = _suggestion(str(size), cls.sizes)
            raise ConfigError(
                f"There is no size {size!r} of model {given['name']!r}{hint} Sizes: {', '.join(cls.sizes)}."
            )
        start = dict(cls.sizes[size])
    fields = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in given if key not in fields]
    if unknown:
        raise ConfigError(
            f"In {where} (model {given['name']!r}): "
            + listed([f"there is no setting {key!r}{_suggestion(key, fields)}" for key in unknown])
        )
    config = cls(**{**start, **given})
    _refuse(config, where)
    return config


def problems(config: ModelConfig) -> list[tuple[str, str]]:
    """Everything that is wrong with a config, as (field, message): wrong types and ranges, then contradictions."""
    cls = type(config)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    # pydantic takes a dataclass instance as it is, so the fields are put before a strict model of the same types.
    types: dict[str, Any] = {name: (kind, ...) for name, kind in _field_types(cls).items()}
    checker = create_model(cls.__name__, __config__=ConfigDict(strict=True), **types)
    try:
        checker.model_validate(values)
    except ValidationError as error:
        return [
            (str(e["loc"][0]) if e["loc"] else "config", f"{e['msg']} (it is {e['input']!r})")
            for e in error.errors()
        ]
    return config.problems()


def _field_types(cls: type[ModelConfig]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def build(config: ModelConfig) -> nn.Module:
    """A freshly initialised module (float32, on the CPU, from torch's global generator).

    Raises ConfigError listing every problem of the config. The number of parameters is held against the
    config's own prediction: a mismatch would make every table of compared sizes wrong.
    """
    _refuse(config, "model")
    model = config.module()
    actual, predicted = sum(p.numel() for p in model.parameters()), config.num_parameters()
    assert actual == predicted, f"{config.name}: {actual:,} parameters, but its config predicts {predicted:,}"
    return model


def _refuse(config: ModelConfig, where: str) -> None:
    found = problems(config)
    if found:
        raise ConfigError(
            f"The {where} settings of model {config.name!r} do not fit: "
            + listed([f"{field}: {message}" for field, message in found])
        )


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
