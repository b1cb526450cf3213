"""The healthy subject with every part. A plant passes its own class for one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.specimens.loss import mean_loss
from minilm.doctor.specimens.model import Model, Size
from minilm.doctor.specimens.pipeline import BOS, EOS, PAD, Pipeline
from minilm.doctor.specimens.training import Trainer
from minilm.doctor.specimens.writing import Evaluation, Generator
from minilm.doctor.subject import Rows, Subject, Training


def subject(
    *,
    model: type[Model] = Model,
    trainer: type[Trainer] = Trainer,
    pipeline: type[Pipeline] = Pipeline,
    generator: type[Generator] = Generator,
    evaluation: type[Evaluation] = Evaluation,
    loss: Any = mean_loss,
    size: dict[str, Any] | None = None,
    seed: int = 0,
    **parts: Any,
) -> Subject:
    """A subject with every part healthy but those given. `parts`: attention, ffn, norm, rotary, block of the model.

    Whatever else a plant needs to break is replaced afterwards with `subject(...).but(...)`.
    """
    shape = Size(**(size or {}))

    def drawn(number: int) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return model(shape, **parts)

    def again(number: int) -> Subject:
        return subject(
            model=model, trainer=trainer, pipeline=pipeline, generator=generator, evaluation=evaluation,
            loss=loss, size=size, seed=number, **parts,
        )  # fmt: skip

    module = drawn(seed)

    def masked(tokens: Tensor, keep: Tensor) -> Tensor:
        return module(tokens, keep.long())

    def criterion(logits: Tensor, rows: Rows) -> Tensor:
        return loss(logits, rows)

    def save(part: nn.Module, folder: Path) -> None:
        torch.save(part.state_dict(), folder / "weights.pt")

    def load(folder: Path) -> nn.Module:
        fresh = drawn(seed + 1)
        fresh.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        return fresh

    def training(clip_norm: float | None = 1.0, seed: int = seed, num_steps: int = 20) -> Training:
        return trainer(drawn(seed), clip_norm=clip_norm, num_steps=num_steps).handed_over()

    writer, score, data = generator(module, PAD), evaluation(module), pipeline()
    return Subject(
        name="specimen",
        vocab_size=shape.vocab_size,
        max_length=shape.max_length,
        special_ids=(PAD, BOS, EOS),
        module=module,
        forward=lambda tokens: module(tokens),
        masked_forward=masked,
        packed_forward=lambda tokens, segments: module(tokens, segments),
        incremental=lambda tokens, n: incremental(module, tokens, n),
        build=again,
        loss=lambda rows: loss(module(rows.tokens, rows.segments), rows),
        criterion=criterion,
        total_loss=lambda rows: loss(module(rows.tokens, rows.segments), rows),
        evaluate=score.evaluate,
        perplexity=score.perplexity,
        continuation=score.continuation,
        generate=writer.generate,
        save=save,
        load=load,
        training=training,
        data=data.handed_over(),
        tokenizer=data.tokenizer,
    )


def incremental(module: Model, tokens: Tensor, n: int) -> Tensor:
    """Logits of the first n tokens at once, then of one token at a time with the cache."""
    caches, segments = module.new_caches(), torch.ones_like(tokens)
    positions = module.positions(segments)
    parts = [module.step(tokens[:, :n], segments[:, :n], positions[:, :n], caches)]
    for i in range(n, tokens.shape[1]):
        part = slice(i, i + 1)
        parts.append(module.step(tokens[:, part], segments[:, part], positions[:, part], caches))
    return torch.cat(parts, dim=1)
