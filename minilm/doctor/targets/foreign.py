"""Anybody's model as a subject: a module, a function tokens -> logits, or a factory in a file."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.subject import Subject
from minilm.errors import ConfigError, listed

TRIED_IDS = 2  # of the tokens that a function of unknown vocabulary is tried with: 0 and 1 exist everywhere


def subject_of_object(given: Any, **parts: Any) -> Subject:
    """A `Subject` of what somebody has; `parts` are further fields of it. ConfigError where it cannot be used.

    A module or function is called with tokens [B, T] int64 and returns logits [B, T, V], or an object with `.logits`,
    or a tuple whose first element they are. The vocabulary is read from the logits.
    """
    if isinstance(given, Subject):
        return given.but(**parts) if parts else given
    if _is_huggingface(given):
        from minilm.doctor.targets.huggingface import huggingface_subject

        subject = huggingface_subject(given, fresh=parts.pop("fresh", False))
        return subject.but(**parts) if parts else subject
    if _is_trainer(given):
        from minilm.doctor.targets.hf_trainer import trainer_subject

        subject = trainer_subject(given)
        return subject.but(**parts) if parts else subject
    if not callable(given):
        raise ConfigError(
            f"{type(given).__name__} cannot be examined: give a module, a function from tokens to logits, or a Subject."
        )

    def forward(tokens: Tensor) -> Tensor:
        return logits_of(given(tokens))

    module = given if isinstance(given, nn.Module) else None
    with torch.no_grad():
        trial = _tried(forward, module)
    made = Subject(
        name=getattr(given, "__name__", type(given).__name__),
        module=module,
        forward=forward,
        vocab_size=trial.shape[-1],
        fresh=False,
    )
    return made.but(**parts) if parts else made


def factory_subject(text: str) -> Subject:
    """`path/file.py:factory`: the file is run, the factory called without arguments. ConfigError says what is wrong."""
    path, _, name = text.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path} is not a file (TARGET {text} means: call {name}() of that file).")
    spec = importlib.util.spec_from_file_location(f"examined_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    content = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = content  # dataclasses look their module up
    sys.path.insert(0, str(file.resolve().parent))
    try:
        with _explained(f"{path} cannot be run", file):
            spec.loader.exec_module(content)
    finally:
        sys.path.remove(str(file.resolve().parent))
    factory: Callable[[], Any] | None = getattr(content, name, None)
    if not callable(factory):
        names = [n for n, v in vars(content).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(f"{path} has no function {name!r}. It has: {', '.join(names) or 'none'}.")
    with _explained(f"{text} gives nothing that can be examined", file):
        subject = subject_of_object(factory())

    def build(seed: int) -> Subject:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return subject_of_object(factory())

    return subject.but(name=text, build=subject.build or (build if subject.fresh else None))


@contextlib.contextmanager
def _explained(what: str, file: Path) -> Iterator[None]:
    """Whatever the user's file raises becomes a ConfigError that names its last line that took part."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" ({file}, line {line})" if line is not None else ""
        raise ConfigError(f"{what}: {type(error).__name__}: {error}{where}") from error


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned."""
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigError(f"the model returned {type(output).__name__}: logits [B, T, V] are needed")
    return output


def _tried(forward: Callable[[Tensor], Tensor], module: nn.Module | None) -> Tensor:
    """Logits of two short rows, with every requirement checked at once."""
    was_training = module is not None and module.training
    if module is not None:
        module.eval()
    tokens = torch.arange(8).remainder(TRIED_IDS).repeat(2, 1)
    logits = forward(tokens)
    if module is not None:
        module.train(was_training)
    problems = []
    if logits.dim() != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
        problems.append(
            f"for tokens of shape {list(tokens.shape)} the logits have shape {list(logits.shape)}: "
            f"they must be [{tokens.shape[0]}, {tokens.shape[1]}, vocabulary], one row for each token"
        )
    if not logits.is_floating_point():
        problems.append(f"the logits are {logits.dtype}: they must be floating point")
    if problems:
        raise ConfigError(f"The model cannot be examined: {listed(problems)}")
    return logits


def _is_huggingface(given: Any) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(given, PreTrainedModel)


def _is_trainer(given: Any) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import Trainer

    return isinstance(given, Trainer)
