"""Our models as a model of lm-evaluation-harness, with the arithmetic of the local tasks.

The harness has no door for models of other packages: a model must be registered in its process before its command
line is read. `minilm lm-eval` does that, with `model_class` below, and then hands over to the harness.

    minilm lm-eval --model minilm --model_args checkpoint=runs/first --tasks lambada_openai --batch_size 16

Source: https://github.com/EleutherAI/lm-evaluation-harness (docs/model_guide.md, docs/interface.md).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minilm.errors import ConfigError, listed
from minilm.evaluation.intervals import device_of_messages, processes
from minilm.evaluation.mode import device_of
from minilm.evaluation.tasks.arithmetic import TextModel

NAME = "minilm"
INSTALL = "pip install 'minilm[harness]'"
MAX_NEW_TOKENS = 256  # where a task does not say; at most half the context
LOG = logging.getLogger(__name__)

Load = Callable[..., tuple[Any, Any]]  # of a checkpoint: (model, tokenizer)


def check_installed() -> None:
    """Raises ConfigError naming the command that installs the harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"lm-evaluation-harness is not installed: {INSTALL}.")


def model_class(load: Load) -> type:
    """A class that the harness can register. `load` opens what `checkpoint=` names."""
    check_installed()
    from lm_eval.api.model import LM

    return type("MinilmLM", (Answers, LM), {"load": staticmethod(load)})


class Answers:
    """What the harness asks of a model; the class that it sees also inherits from its `LM`.

    Arguments (`--model_args`):
        checkpoint   run folder, checkpoint, or Hugging Face folder
        weights      last (default) or ema
        trust_remote_code    True: run the code of a Hugging Face folder that has its own
        store        knowledge store to read in place of the one that the model was trained with
        precision    fp32 (default) or bf16
        max_length   a shorter context than the model's own
        add_bos_token    False: only an empty context gets a token that begins it (default: True, as in training)
    and those of the harness's own flags: batch_size (`auto`: by the length of the texts), device.
    """

    load: Load

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        weights: str = "last",
        store: str | None = None,
        precision: str = "fp32",
        max_length: int | None = None,
        add_bos_token: bool = True,
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        problems = [f"model_args has {name!r}, which is not an argument of {NAME}." for name in unknown]
        if checkpoint is None:
            problems.append("model_args must name a checkpoint: --model_args checkpoint=runs/first.")
        if weights not in ("last", "ema"):
            problems.append(f"weights is {weights!r}; it must be last or ema.")
        if problems:
            raise ConfigError(listed(problems))
        model, tokenizer = self.load(
            checkpoint, device=device, weights=weights, store=store, trust_remote_code=trust_remote_code
        )
        if tokenizer is None:
            raise ConfigError(
                f"{checkpoint} has no tokenizer: it was trained on token ids, so it reads no text."
            )
        rows = None if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        self.texts = TextModel(
            model,
            tokenizer,
            batch_rows=rows or max_batch_size,
            precision=precision,
            max_length=max_length,
            begin=add_bos_token,
            progress=processes()[0] == 0,
        )
        self._device = device_of(model)
        self._rank, self._world_size = processes()

    # --- the three questions

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether greedy decoding would give it."""
        pairs = [request.args for request in requests]
        spans = self.texts.likelihoods(pairs)
        cut = sum(span.cut > 0 for span in spans)
        if cut:
            LOG.warning(
                "%d of %d texts are longer than the context of %d tokens and were cut on the left.",
                cut, len(spans), self.texts.max_length,
            )  # fmt: skip
        answers = [(-span.nats, span.greedy) for span in spans]
        self._remember("loglikelihood", pairs, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each text: the log-likelihood of all its tokens, each counted once, in windows that overlap by half."""
        texts = [request.args[0] for request in requests]
        answers = [-span.nats for span in self.texts.rolling(texts)]
        self._remember("loglikelihood_rolling", [(text,) for text in texts], answers)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the greedy continuation up to the first of `until`."""
        asked = [request.args for request in requests]
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            groups.setdefault(self._settings(settings), []).append(number)
        answers = [""] * len(asked)
        for (stop, most), numbers in groups.items():
            prompts = [asked[n][0] for n in numbers]
            written = self.texts.completions(prompts, stop, most)
            cut = sum(one.cut > 0 for one in written)
            if cut:
                LOG.warning(
                    "%d of %d prompts and %d new tokens are longer than the context of %d tokens; the prompts were cut "
                    "on the left.", cut, len(prompts), most, self.texts.max_length,
                )  # fmt: skip
            for n, one in zip(numbers, written, strict=True):
                answers[n] = one.text
        self._remember("generate_until", asked, answers)
        return answers

    def _settings(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """(stop texts, new tokens). Raises ConfigError for what is not greedy."""
        from lm_eval.models.utils import normalize_gen_kwargs

        most = min(MAX_NEW_TOKENS, self.texts.max_length // 2)
        known = dict(normalize_gen_kwargs(settings, most))
        stop, most = known.pop("until"), known.pop("max_gen_toks")
        if known.pop("do_sample", False) or known.pop("temperature", 0.0):
            raise ConfigError(
                "The task samples (do_sample, temperature); here text is generated greedily only."
            )
        if known:
            raise ConfigError(f"Unknown generation settings: {', '.join(map(repr, known))}.")
        return tuple(stop), most

    def _remember(self, kind: str, asked: Sequence[Any], answers: Sequence[Any]) -> None:
        """For `--use_cache` of the harness."""
        hook = self.cache_hook  # type: ignore[attr-defined]
        for request, answer in zip(asked, answers, strict=True):
            hook.add_partial(kind, request, answer)

    # --- several processes: the harness deals the questions, we carry its messages

    @property
    def tokenizer_name(self) -> str:
        return f"minilm-{self.texts.tokenizer.fingerprint}"

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other."""
        _, world = processes()
        if world == 1:
            return tensor
        mine = tensor.to(device_of_messages()).reshape(-1)
        parts = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(parts, mine)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, in process `dst`; None in the others."""
        rank, world = processes()
        if world == 1:
            return [obj]
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, obj)
        return parts if rank == dst else None

    def barrier(self) -> None:
        if processes()[1] > 1:
            torch.distributed.barrier()
