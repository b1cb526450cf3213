"""Models of our zoo as a subject: forward, loss, evaluation, generator, checkpoint."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilm import models
from minilm.alignment import Batch, Sum, align, score, score_hidden
from minilm.doctor.probes import random_states_kept
from minilm.doctor.subject import Rows, Subject
from minilm.doctor.targets.our_memory import SAME_START, initial_stds, memory_view, without_gradient
from minilm.doctor.targets.our_router import router_view
from minilm.evaluation.generate import Sampling, choose, generate
from minilm.evaluation.intervals import Scores
from minilm.evaluation.score import evaluate, measure, windows
from minilm.evaluation.text import byte_lengths_of
from minilm.models import folder as model_folder
from minilm.models.base import ModelConfig
from minilm.models.hf import to_hf


def model_subject(
    model: nn.Module, *, tokenizer: Any = None, fresh: bool, name: str = "", config: Any = None
) -> Subject:
    """A subject of `model` (of our zoo, or a Hugging Face model behind our interface), on the device where it is.

    fresh   its weights were just drawn
    config  of our zoo, to draw it anew; none: it cannot be
    """
    ours = _Ours(model)
    special = () if tokenizer is None else (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    return Subject(
        name=name or model.config.name,
        vocab_size=model.config.vocab_size,
        max_length=model.config.max_length,
        special_ids=tuple(i for i in special if i is not None),
        module=model,
        fresh=fresh,
        forward=ours.forward,
        masked_forward=ours.masked,
        packed_forward=ours.packed,
        reference=ours.reference if model.config.name == "original" else None,
        incremental=ours.incremental,
        backends=ours.backends(),
        build=None if config is None else lambda seed: _drawn(config, seed),
        loss=ours.loss,
        criterion=ours.criterion,
        auxiliary=ours.auxiliary if ours.has_auxiliary() else None,
        total_loss=ours.total_loss,
        evaluate=ours.evaluate,
        perplexity=ours.perplexity,
        bits_per_byte=None if tokenizer is None else functools.partial(ours.bits_per_byte, tokenizer),
        continuation=ours.continuation,
        generate=ours.generate,
        choose=_choose,
        save=model_folder.save if config is not None else None,
        load=model_folder.load if config is not None else None,
        tokenizer=tokenizer,
        **_declared(model),
    )


def config_subject(config: Any, *, seed: int = 0, tokenizer: Any = None) -> Subject:
    """Fresh weights of a config of our zoo."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build(config)
    return model_subject(model, tokenizer=tokenizer, fresh=True, config=config)


def _drawn(config: Any, seed: int) -> Subject:
    return config_subject(config, seed=seed)


def _declared(model: nn.Module) -> dict[str, Any]:
    """What a model of our zoo promises beyond a causal forward pass."""
    if not isinstance(model.config, ModelConfig):
        return {}
    ours = _Ours(model)
    return {
        "left_padding": True,
        "windows": (None,) * model.config.num_layers,
        "shifted_forward": ours.shifted,
        "lowered": ours.lowered,
        "initial_stds": initial_stds(model),
        "same_start": SAME_START,
        "unused": without_gradient(model),
        "document": ours.document,
        "router": router_view(model),
        "memory": memory_view(model),
    }


class _Ours:
    """The parts of a subject, as methods over one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """Checks hand in rows on the CPU, and look at logits there."""
        return next(self.model.parameters()).device

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.to(self.device)).logits.cpu()

    def masked(self, tokens: Tensor, keep: Tensor) -> Tensor:
        return self.model(tokens.to(self.device), segments=keep.long().to(self.device)).logits.cpu()

    def packed(self, tokens: Tensor, segments: Tensor) -> Tensor:
        return self.model(tokens.to(self.device), segments=segments.to(self.device)).logits.cpu()

    def reference(self, tokens: Tensor) -> Tensor:
        """Transformers' Llama with the weights of this moment."""
        with random_states_kept(), torch.no_grad():  # a new model draws weights before it is given ours
            return to_hf(self.model)(input_ids=tokens.to(self.device), use_cache=False).logits.cpu()

    def incremental(self, tokens: Tensor, n: int) -> Tensor:
        tokens = tokens.to(self.device)
        cache = self.model.new_cache(tokens.shape[0], tokens.shape[1])
        parts = [self.model(tokens[:, :n], cache=cache).logits]
        parts += [self.model(tokens[:, i : i + 1], cache=cache).logits for i in range(n, tokens.shape[1])]
        return torch.cat(parts, dim=1).cpu()

    def shifted(self, tokens: Tensor, offset: int) -> Tensor:
        places = (torch.arange(tokens.shape[1]) + offset).expand_as(tokens)
        return self.model(tokens.to(self.device), positions=places.to(self.device)).logits.cpu()

    def lowered(self) -> Subject:
        """In bfloat16, as one loads it for generation."""
        return model_subject(copy.deepcopy(self.model).bfloat16(), fresh=False)

    def document(self, tokens: Sequence[int]) -> tuple[float, int]:
        length = self.model.config.max_length
        rows = windows(0, list(tokens), length, max(1, length // 2))
        total = Scores.of(measure(self.model, rows, byte_lengths=None, batch_rows=8).gathered()).total
        return float(total.nats), int(total.tokens)

    def backends(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        if not hasattr(self.model.config, "attention"):
            return {}

        def through(backend: str) -> Callable[[Tensor], Tensor]:
            def forward(tokens: Tensor) -> Tensor:
                with self._attention(backend):
                    return self.forward(tokens)

            return forward

        return {backend: through(backend) for backend in ("eager", "sdpa")}

    @contextlib.contextmanager
    def _attention(self, backend: str) -> Iterator[None]:
        before = self.model.config
        self.model.config = dataclasses.replace(before, attention=backend)
        try:
            yield
        finally:
            self.model.config = before

    def _sum(self, rows: Rows) -> tuple[Sum, dict[str, Tensor]]:
        batch = batch_of(rows).to(self.device)
        output = self.model(batch.inputs, segments=batch.segments, positions=batch.positions)
        head = getattr(self.model, "head_weight", None) if type(output).__name__ == "Output" else None
        if head is None:
            return score(output.logits, batch), dict(output.auxiliary)
        return score_hidden(output.hidden, head, batch), dict(output.auxiliary)

    def loss(self, rows: Rows) -> Tensor:
        total, _ = self._sum(rows)
        return total.share(total.tokens)

    def has_auxiliary(self) -> bool:
        """Does the model have losses of its own: seen on a few tokens in training mode, as nothing declares it."""
        modes = [(part, part.training) for part in self.model.modules()]
        tokens = torch.zeros(1, min(16, self.model.config.max_length), dtype=torch.long, device=self.device)
        try:
            with torch.no_grad(), random_states_kept():
                return bool(self.model.train()(tokens).auxiliary)
        finally:
            for part, training in modes:
                part.training = training

    def auxiliary(self, rows: Rows) -> dict[str, Tensor]:
        return self._sum(rows)[1]

    def total_loss(self, rows: Rows) -> Tensor:
        total, auxiliary = self._sum(rows)
        return total.share(total.tokens) + sum(auxiliary.values())

    def criterion(self, logits: Tensor, rows: Rows) -> Tensor:
        batch = batch_of(rows)
        total = score(
            logits.narrow(1, 0, batch.shape[1]), batch
        )  # the last position has no target in its row
        return total.share(total.tokens)

    def evaluate(self, batches: Sequence[Rows]) -> float:
        return evaluate(self.model, map(batch_of, batches)).mean

    def perplexity(self, batches: Sequence[Rows]) -> float:
        return evaluate(self.model, map(batch_of, batches)).perplexity

    def bits_per_byte(self, tokenizer: Any, batches: Sequence[Rows]) -> float:
        lengths = byte_lengths_of(tokenizer)
        return evaluate(self.model, map(batch_of, batches), byte_lengths=lengths).bits_per_byte

    def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
        tokens = torch.tensor([[*prompt, *continuation]])
        learn = torch.arange(tokens.shape[1])[None] >= len(prompt)
        return self.evaluate([Rows(tokens, torch.ones_like(tokens), learn)])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        **options: Any,
    ) -> list[list[int]]:
        written = generate(
            self.model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, **options
        )
        return [sample.tokens for sample in written]


def batch_of(rows: Rows) -> Batch:
    """The doctor's unshifted rows through the alignment layer."""
    return align(rows.tokens, rows.segments, rows.learn)


def _choose(logits: Tensor, **options: Any) -> Tensor:
    seed = options.pop("seed", 0)
    uniform = torch.rand(logits.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.pop("eos_id", None)
    return choose(logits, Sampling(max_new_tokens=1, seed=seed, **options), uniform)


def checkpoint_folder_of(path: Path) -> bool:
    """Is `path` a folder of one of our models."""
    return (path / model_folder.WEIGHTS).is_file() and (path / "model.json").is_file()
