"""A model as a Hugging Face folder: `original` as a Llama, every other model with its own code.

The folder is made aside, loaded again, compared with the model it came from, and only then gets its name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import shutil
import sys
import types
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilm.errors import CheckpointError, ConfigError
from minilm.export.card import card
from minilm.export.sources import collect
from minilm.models.hf.quiet import without_bars

if TYPE_CHECKING:
    from minilm.data.tokenizer import Tokenizer

TOLERANCE = 1e-5  # of logits in float32, relative to the largest where that is over 1
_PROBE_TOKENS = 64
_AUTO_MAP = {
    "AutoConfig": "configuration_minilm.MiniLMConfig",
    "AutoModelForCausalLM": "modeling_minilm.MiniLMForCausalLM",
}


def export_folder(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    facts: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model to the new folder `out`, for `AutoModelForCausalLM` and `AutoTokenizer`; returns `out`.

    facts  rows of the table in README.md: name -> value
    dtype  of the stored weights

    Raises ConfigError if `out` exists or the model cannot be exported, CheckpointError if the folder, loaded again,
    does not give the model's logits or cannot be written.
    """
    model = converted(model, dtype)
    own_code = model.config.name != "original"
    with aside(Path(out)) as folder:
        with without_bars():
            if tokenizer is not None:
                # First: where there is a model with code, reading a tokenizer asks about that code.
                save_tokenizer(tokenizer, folder, model.config.max_length)
            write = _write_with_code if own_code else _write_llama
            again = write(model, folder, tokenizer)
        compare(model, lambda ids: again(input_ids=ids, use_cache=False).logits, str(out))
        text = card(model.config, facts or {}, own_code=own_code, dtype=str(dtype).removeprefix("torch."))
        (folder / "README.md").write_text(text, encoding="utf-8")
        for weights in folder.glob("*.safetensors"):  # made so that only their owner can read them
            shutil.copymode(folder / "README.md", weights)
    return Path(out)


def refuse_existing(out: Path) -> None:
    """ConfigError if there is something of that name."""
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} exists. An export overwrites nothing: give --out another name or remove it."
        )


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name at the end, and is removed if anything goes wrong before."""
    refuse_existing(out)
    part = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(part / "__pycache__", ignore_errors=True)
        refuse_existing(out)  # it may have been made since
        part.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"The export to {out} could not be written: {error}. Check free space and permissions."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model on the CPU, in evaluation mode, with weights of that dtype."""
    return copy.deepcopy(model).to("cpu", dtype).eval()


@torch.no_grad()
def compare(model: nn.Module, theirs: Any, out: str) -> None:
    """Hold logits against the model's own, on random tokens. Raises CheckpointError where they differ.

    theirs  a function of ids [B, L] that gives logits [B, L, V] of the exported weights in float32
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, min(_PROBE_TOKENS, config.max_length)), generator=generator)
    ours: Tensor = converted(model, torch.float32)(ids).logits
    difference = float((theirs(ids).float() - ours).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours.abs().max()))
    if not difference <= allowed:  # not-a-number is a difference, too
        raise CheckpointError(
            f"{out} was not written: loaded again, its logits differ from the model's by {difference:.2e} (at most "
            f"{allowed:.0e} is rounding). This is a defect of the export; please report it with the model's config."
        )


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids that `generate` asks for, as arguments of `to_hf`."""
    if tokenizer is None:
        return {}
    return {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the tokenizer so that `AutoTokenizer(text)` begins a text as the model was trained on it: with BOS."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    theirs = copy.deepcopy(tokenizer.hf)
    theirs.model_max_length = max_length
    if tokenizer.bos_id is not None:
        bos = theirs.bos_token
        theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.bos_id)]
        )
    theirs.save_pretrained(str(folder))
    text = "The cat's 12 mats,\n  中文 é"
    got = AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"]
    if list(got) != tokenizer.prompt(text):
        raise CheckpointError(
            f"{tokenizer!r} cannot be exported: read again by transformers, it makes {got} of {text!r}, "
            f"not {tokenizer.prompt(text)}."
        )


def _write_llama(model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> Any:
    """The files of a Llama; returns the model that they hold, loaded again in float32."""
    from transformers import AutoModelForCausalLM

    from minilm.models.hf import to_hf

    to_hf(model, **special_ids(tokenizer)).save_pretrained(str(folder))  # type: ignore[arg-type]
    # Readers from before transformers 5 look for the base of the rotary frequencies here.
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["rope_theta"] = model.config.rope_theta
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def _write_with_code(model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> Any:
    """The files of a model with its own code; returns what that code makes of them, in float32."""
    config = model.config
    for name, text in collect(type(config)).items():
        (folder / name).write_text(text, encoding="utf-8")
    settings = dataclasses.asdict(config)
    store = getattr(model, "store", None)
    with _imported(folder) as code:
        remote = code("configuration_minilm")
        if store is not None and store.path is not None:
            for name in remote.STORE_FILES:
                shutil.copyfile(store.path / name, folder / name)
            settings["store"] = remote.HERE
        described = remote.MiniLMConfig(
            architecture=settings,
            tie_word_embeddings=config.tie_embeddings,
            auto_map=_AUTO_MAP,
            **{f"{name}_token_id": i for name, i in _tokens(tokenizer).items()},
        )
        described._name_or_path = str(folder)
        made = code("modeling_minilm").MiniLMForCausalLM
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
            theirs = made(described).to(next(model.parameters()).dtype)
        theirs.model.load_state_dict(model.state_dict())
        theirs.save_pretrained(str(folder))
        return made.from_pretrained(str(folder), dtype=torch.float32).eval()


def _tokens(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    return {name.removesuffix("_id"): value for name, value in special_ids(tokenizer).items()}


@contextlib.contextmanager
def _imported(folder: Path) -> Iterator[Any]:
    """A function that imports a file of the folder by name, without the cache of transformers."""
    package = types.ModuleType(f"minilm_exported_{uuid.uuid4().hex}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    try:
        yield lambda name: importlib.import_module(f"{package.__name__}.{name}")
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == package.__name__]:
            del sys.modules[name]
