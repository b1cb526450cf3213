"""A run: its settings, its folder, and the parts put together from them. Entry points stand on this.

runs/NAME/
    config.yaml        resolved settings, as `--config` reads them
    manifest.json      what ran: code, packages, hardware, data
    metrics.jsonl      one line per step (the truth); loss.png, swanlog/ and log.txt mirror it
    samples.md         text that the model wrote on the way
    checkpoints/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from minilm import models
from minilm.config import Resolved, dump, resolve
from minilm.data.loader import DataConfig
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.doctor.settings import DoctorConfig
from minilm.errors import CheckpointError, ConfigError
from minilm.knowledge.fit import shape_of
from minilm.models import folder as model_folder
from minilm.models.base import ModelConfig
from minilm.track import TrackConfig
from minilm.training import checkpoint
from minilm.training.optim import OptimConfig
from minilm.training.settings import TrainConfig
from minilm.training.state import load_average_into

CONFIG = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Section `run`."""

    name: Annotated[
        str | None, Field(description="folder of the run; none: the name of the settings file")
    ] = None
    folder: Annotated[str, Field(description="where run folders are made")] = "runs"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Section `sample`: text that the model writes during and after training."""

    prompts: Annotated[list[str], Field(description="texts to continue; an empty one starts a document")] = (
        field(default_factory=lambda: [""])
    )
    max_new_tokens: Annotated[int, Field(gt=0, description="tokens per sample")] = 96
    temperature: Annotated[float, Field(ge=0, description="0: always the likeliest token")] = 0.8
    top_k: Annotated[
        int | None, Field(gt=0, description="choose among the k likeliest tokens; none: all")
    ] = 50
    seed: Annotated[int, Field(ge=0, description="of the choices")] = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a training run."""

    data: DataConfig
    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=lambda: models.preset("original", "26m"))
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / (self.run.name or "run")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Contradictions between sections."""
        if self.data.sequence_length > self.model.max_length:
            yield (
                "data.sequence_length",
                f"{self.data.sequence_length} tokens a row are longer than model.max_length {self.model.max_length}.",
            )
        if self.train.steps is not None and self.optim.warmup_steps > self.train.steps:
            yield (
                "optim.warmup_steps",
                f"{self.optim.warmup_steps} steps of warm-up do not fit into train.steps {self.train.steps}.",
            )


def choose_model(raw: dict[str, Any]) -> tuple[type, Mapping[str, Any]]:
    """Section `model`: `name` decides the class, `size` (26m, ...) the values of what is not given."""
    name, size = raw.get("name", "original"), raw.pop("size", None)
    cls = models.config_class(name)
    if size is None:
        return cls, {}
    if size not in models.sizes(name):
        raise ConfigError(
            f"model.size {size!r} does not exist for {name}. Sizes: {', '.join(models.sizes(name))}."
        )
    return cls, cls.sizes[size]


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Resolved[RunConfig]:
    """Settings from a YAML file or a run folder, and flags. Raises ConfigError with every problem."""
    if path is not None and path.is_dir():
        path = path / CONFIG
    resolved = resolve(RunConfig, file=path, overrides=overrides, choose={"model": choose_model})
    config = _with_batch_size(resolved)
    if config.train.init_from:  # a run folder is also looked at from elsewhere
        source = str(Path(config.train.init_from).resolve())
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=source))
    if config.run.name is None and path is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=path.stem))
    return Resolved(config, resolved.origins)


def _with_batch_size(resolved: Resolved[RunConfig]) -> RunConfig:
    """train.tokens_per_step, where it is given, decides train.batch_size, or must agree with it."""
    config = resolved.value
    tokens, length = config.train.tokens_per_step, config.data.sequence_length
    if tokens is None:
        return config
    if tokens % length:
        raise ConfigError(
            f"train.tokens_per_step {tokens} must be a multiple of data.sequence_length {length}: "
            f"{max(1, tokens // length) * length}, for instance."
        )
    rows, origin = tokens // length, resolved.origins["train.batch_size"]
    if origin == "default":
        resolved.origins["train.batch_size"] = "train.tokens_per_step"
    elif config.train.batch_size != rows:
        raise ConfigError(
            f"train.tokens_per_step {tokens} makes {rows} rows of {length} tokens, but train.batch_size ({origin}) is "
            f"{config.train.batch_size}. Give one of them."
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to be used; `config` and `run_folder` where it lies in a run folder."""

    model: nn.Module
    tokenizer: Tokenizer | None
    folder: Path
    step: int
    run_folder: Path | None
    config: RunConfig | None
    store_fingerprint: str  # of the store that it was trained on


def load_checkpoint(
    path: Path | str,
    *,
    device: str = "cpu",
    weights: Literal["last", "ema"] = "last",
    knowledge: str | None = None,
) -> Loaded:
    """The newest undamaged checkpoint of a run folder, or the named one: float32 model in eval mode, tokenizer.

    weights    "last", or "ema": their moving average, which a run with train.ema_decay keeps
    knowledge  a knowledge store to read in place of the one that it was trained with
    Raises CheckpointError if there is none or it does not fit together.
    """
    found, damaged = checkpoint.find(Path(path))
    if damaged and found.folder != Path(path):
        # The user asked for the newest: being given an older one must not go unseen.
        raise CheckpointError(
            f"The newest checkpoint is damaged: {damaged[0]}. Name an older one, for instance {found.folder}."
        )
    model = model_folder.load(found.folder, device=device, knowledge=knowledge).eval()
    if weights == "ema":
        load_average_into(model, found.folder)
    has_tokenizer = (found.folder / "tokenizer").is_dir()
    run_folder = next((p for p in found.folder.parents if (p / CONFIG).is_file()), None)
    return Loaded(
        model=model,
        tokenizer=Tokenizer.load(str(found.folder / "tokenizer")) if has_tokenizer else None,
        folder=found.folder,
        step=found.step,
        run_folder=run_folder,
        config=load_config(run_folder).value if run_folder else None,
        store_fingerprint=found.trainer["loader"]["store"],
    )


def with_vocabulary(resolved: Resolved[RunConfig], store: Store) -> RunConfig:
    """What the data decide of the model, unless it was set: model.vocab_size, which must be large enough.

    A knowledge store (model.store) decides the sizes of its grid in the same way. Raises ConfigError.
    """
    config = _with_knowledge(resolved)
    needed = store.vocab_size
    origin = resolved.origins.get("model.vocab_size", "default")
    if origin in ("default", "model.size"):
        resolved.origins["model.vocab_size"] = "data.store"
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=needed))
    if config.model.vocab_size < needed:
        raise ConfigError(
            f"model.vocab_size ({origin}) is {config.model.vocab_size}, but the store {config.data.store} has token "
            f"ids up to {needed - 1}. Set it to {needed} or more, or leave it out."
        )
    return config


def write_config(config: RunConfig) -> None:
    """config.yaml in the run folder, whole or not at all."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    # The run folder is also looked at from elsewhere: stores are named by where they are, not as seen from here.
    places = {"store": str(Path(config.data.store).resolve())}
    if config.data.validation_store:
        places["validation_store"] = str(Path(config.data.validation_store).resolve())
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **places))
    knowledge = getattr(config.model, "store", "")
    if knowledge not in ("", "random"):
        model = dataclasses.replace(config.model, store=str(Path(knowledge).expanduser().resolve()))
        config = dataclasses.replace(config, model=model)
    aside = config.run_folder / f".{CONFIG}"
    aside.write_text(dump(config), encoding="utf-8")
    aside.replace(config.run_folder / CONFIG)


def _with_knowledge(resolved: Resolved[RunConfig]) -> RunConfig:
    config, folder = resolved.value, getattr(resolved.value.model, "store", "")
    if folder in ("", "random") or not config.model.layers:
        return config
    changes = {}
    for setting, value in shape_of(folder).items():
        origin = resolved.origins.get(f"model.{setting}", "default")
        if origin in ("default", "model.size"):
            resolved.origins[f"model.{setting}"] = "model.store"
            changes[setting] = value
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
