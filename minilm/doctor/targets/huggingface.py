"""Hugging Face causal language models as a subject: a folder, a loaded model, or a tiny random one of any family."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minilm.doctor.probes import random_states_kept
from minilm.doctor.subject import Rows, Subject
from minilm.doctor.targets.families import OWN, SMALL, UNUSED, exceptions_of
from minilm.errors import ConfigError
from minilm.models.hf.quiet import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_PARAMETERS = 20_000_000  # of a "tiny" model: beyond it, a setting that makes it small is missing
IGNORED = -100


def families() -> list[str]:
    """Every causal LM family that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family with random weights, in float32 and eval mode. ConfigError where it cannot be made."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family not in families() or family not in CONFIG_MAPPING:
        close = difflib.get_close_matches(family, families(), 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"transformers {transformers.__version__} knows no causal LM family {family!r}.{hint}"
        )
    try:
        config = _small_config(CONFIG_MAPPING[family], family)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise ConfigError(f"its smallest known settings make {size / 1e6:,.0f} M parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            _Theirs(model).forward(torch.arange(3, 27)[None])
    except Exception as error:
        raise ConfigError(
            f"hf:{family} cannot be built tiny: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    return model


def _small_config(kind: type, family: str) -> Any:
    wanted = {**SMALL, **OWN.get(family, {})}
    with contextlib.suppress(Exception):
        return kind(**{k: v for k, v in wanted.items() if v is not None and k in vars(kind())} | _own(family))
    names = set(inspect.signature(kind).parameters) | set(dir(kind))
    return kind(**{k: v for k, v in wanted.items() if v is not None and k in names} | _own(family))


def _own(family: str) -> dict[str, Any]:
    return {k: v for k, v in OWN.get(family, {}).items() if v is not None}


def family_subject(family: str, seed: int = 0) -> Subject:
    """`hf:FAMILY`: a tiny random model, which can be drawn anew."""
    subject = huggingface_subject(tiny(family, seed), fresh=True, name=f"hf:{family}")
    return subject.but(build=lambda number: family_subject(family, number), exceptions=exceptions_of(family))


def folder_subject(folder: Path, *, trust_remote_code: bool = False) -> Subject:
    """A folder that `from_pretrained` reads, with its tokenizer if it has one. ConfigError if it does not.

    trust_remote_code  run the code that lies in the folder, where the model is made of such
    """
    import transformers

    if not trust_remote_code and "auto_map" in (folder / "config.json").read_text(encoding="utf-8"):
        raise ConfigError(
            f"{folder} holds a model with its own code (auto_map in config.json), and examining it runs that code. "
            "Read it, and if you trust it, say so: --trust-remote-code."
        )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code
        ).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be read as a Hugging Face model: {error}") from error
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        from minilm.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(str(folder))
    subject = huggingface_subject(model, fresh=False, name=str(folder), tokenizer=tokenizer)
    return subject.but(exceptions=exceptions_of(model.config.model_type))


def huggingface_subject(
    model: PreTrainedModel, *, fresh: bool, name: str = "", tokenizer: Any = None
) -> Subject:
    """A subject of a loaded model: its own forward, loss (`labels=`), cache, generate, save_pretrained."""
    theirs = _Theirs(model)
    settings = model.config.get_text_config()
    ids = (getattr(settings, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id"))
    special = [i for given in ids for i in (given if isinstance(given, list) else [given])]
    length = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    return Subject(
        name=name or type(model).__name__,
        vocab_size=settings.vocab_size,
        max_length=length if isinstance(length, int) and length > 0 else None,
        special_ids=tuple(
            dict.fromkeys(i for i in special if isinstance(i, int) and 0 <= i < settings.vocab_size)
        ),
        module=model,
        fresh=fresh,
        unused=UNUSED.get(model.config.model_type, ()),
        windows=_windows(settings),
        lowered=theirs.lowered,
        forward=theirs.forward,
        masked_forward=theirs.masked if theirs.takes("attention_mask") else None,
        incremental=theirs.incremental if theirs.takes("past_key_values") else None,
        backends=theirs.backends(),
        loss=theirs.loss if theirs.takes("labels") else None,
        generate=theirs.generate if hasattr(model, "generate") and model.can_generate() else None,
        save=_saved,
        load=lambda folder: _loaded(type(model), folder, torch.float32),
        tokenizer=tokenizer,
    )


class _Theirs:
    """The parts of a subject, as methods over one Hugging Face model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parameters = inspect.signature(model.forward).parameters
        self.uncached = {"use_cache": False} if self.takes("use_cache") else {}

    def takes(self, name: str) -> bool:
        return name in self.parameters

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, **self.uncached).logits

    def masked(self, tokens: Tensor, keep: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=keep.long(), **self.uncached).logits

    def incremental(self, tokens: Tensor, n: int) -> Tensor:
        out = self.model(input_ids=tokens[:, :n], use_cache=True)
        parts = [out.logits]
        for i in range(n, tokens.shape[1]):
            past = out.past_key_values
            out = self.model(input_ids=tokens[:, i : i + 1], past_key_values=past, use_cache=True)
            parts.append(out.logits)
        return torch.cat(parts, dim=1)

    def lowered(self) -> Subject:
        """In bfloat16 as its owner brings it there: saved and loaded. A cast would round the rotary tables, too."""
        with tempfile.TemporaryDirectory() as folder:
            _saved(self.model, folder)
            low = _loaded(type(self.model), folder, torch.bfloat16)
        return huggingface_subject(low, fresh=False)

    def backends(self) -> dict[str, Callable[[Tensor], Tensor]]:
        names = ["eager", *(["sdpa"] if getattr(self.model, "_supports_sdpa", False) else [])]
        return {name: self._through(name) for name in names} if len(names) > 1 else {}

    def _through(self, name: str) -> Callable[[Tensor], Tensor]:
        def forward(tokens: Tensor) -> Tensor:
            with self._attention(name):
                return self.forward(tokens)

        return forward

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def loss(self, rows: Rows) -> Tensor:
        return self.model(**hugging_face_inputs(rows), **self.uncached).loss

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_id: int | None = None,
    ) -> list[list[int]]:
        """`model.generate`, left-padded; what follows an EOS is cut off."""
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        keep = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": temperature,
                "top_k": top_k or 0,
                "top_p": top_p or 1.0,
            }
        with (
            random_states_kept(seed),
            torch.no_grad(),
            self._plain_generation(),
        ):  # it has no generator of its own
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=keep,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_id,
                pad_token_id=0,
                **sampling,
            )
        new = [row[width:].tolist() for row in out]
        return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in new]

    @contextlib.contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Without what a class or a folder adds to the choice of tokens (a forced end, beams, forbidden n-grams)."""
        from transformers import GenerationConfig

        before = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = before


def _saved(module: PreTrainedModel, folder: Path | str) -> None:
    with without_bars():
        module.save_pretrained(folder)


def _loaded(kind: type[PreTrainedModel], folder: Path | str, dtype: torch.dtype) -> PreTrainedModel:
    with without_bars():
        return kind.from_pretrained(str(folder), dtype=dtype).eval()


def _windows(settings: Any) -> tuple[int | None, ...] | None:
    """Tokens that each layer sees, where the config says it; None where it does not."""
    window, kinds = getattr(settings, "sliding_window", None), getattr(settings, "layer_types", None)
    if not isinstance(window, int) or not kinds or set(kinds) - {"sliding_attention", "full_attention"}:
        return None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def hugging_face_inputs(rows: Rows) -> dict[str, Tensor]:
    """Rows in the convention of Hugging Face's own losses: labels are the unshifted tokens, -100 where ignored."""
    real = rows.segments > 0
    given = {"input_ids": rows.tokens, "labels": torch.where(rows.learn & real, rows.tokens, IGNORED)}
    return given if bool(real.all()) else {**given, "attention_mask": real.long()}


def is_huggingface_folder(path: Path) -> bool:
    """Does the folder hold a Hugging Face model."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))
