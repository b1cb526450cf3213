"""The healthy subject with every part. A plant passes its own class for one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.specimens.loss import mean_loss
from minilm.doctor.specimens.model import Model, Size
from minilm.doctor.specimens.pipeline import Pipeline
from minilm.doctor.specimens.ranks import RankTrainer, ranks_of
from minilm.doctor.specimens.training import Trainer
from minilm.doctor.specimens.writing import Evaluation, Generator
from minilm.doctor.subject import Subject, Training

WEIGHTS = "weights.pt"


def subject(
    *,
    model: type[Model] = Model,
    trainer: type[Trainer] = Trainer,
    rank_trainer: type[RankTrainer] = RankTrainer,
    rank_seeds: bool = False,
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
            model=model, trainer=trainer, rank_trainer=rank_trainer, pipeline=pipeline, generator=generator,
            evaluation=evaluation, rank_seeds=rank_seeds, loss=loss, size=size, seed=number, **parts,
        )  # fmt: skip

    def load(folder: Path) -> nn.Module:
        fresh = drawn(seed + 1)
        fresh.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
        return fresh

    def training(clip_norm: float | None = 1.0, seed: int = seed, num_steps: int = 20) -> Training:
        return trainer(drawn(seed), clip_norm=clip_norm, num_steps=num_steps).handed_over()

    data, module = pipeline(), drawn(seed)
    writer, score = generator(module, data.tokenizer.pad_id), evaluation(module)
    return Subject(
        name="specimen",
        special_ids=(data.tokenizer.pad_id, data.tokenizer.bos_id, data.tokenizer.eos_id),
        **_of_the_model(module),
        build=again,
        loss=lambda rows: loss(module(rows.tokens, rows.segments), rows),
        criterion=lambda logits, rows: loss(logits, rows),
        total_loss=lambda rows: loss(module(rows.tokens, rows.segments), rows),
        **_of_the_evaluation(score, data),
        generate=writer.generate,
        choose=writer.sample,
        save=lambda part, folder: torch.save(part.state_dict(), folder / WEIGHTS),
        load=load,
        training=training,
        ranks=ranks_of(rank_trainer, size or {}, seed, rank_seeds=rank_seeds),
        data=data.handed_over(),
        tokenizer=data.tokenizer,
    )


def _of_the_model(module: Model) -> dict[str, Any]:
    """Its shapes and all its ways to logits."""
    shape = module.size
    return {
        "module": module,
        "vocab_size": shape.vocab_size,
        "max_length": shape.max_length,
        "windows": (shape.window,) * shape.num_layers,
        "initial_stds": {"*": shape.init_std},
        "forward": lambda tokens: module(tokens),
        "masked_forward": lambda tokens, keep: module(tokens, keep.long()),
        "left_padding": True,
        "shifted_forward": lambda tokens, offset: module.from_place(tokens, offset),
        "packed_forward": lambda tokens, segments: module(tokens, segments),
        "incremental": lambda tokens, n: incremental(module, tokens, n),
        "lowered": lambda: subject_of(module.lowered()),
    }


def _of_the_evaluation(score: Evaluation, data: Pipeline) -> dict[str, Any]:
    return {
        "evaluate": score.evaluate,
        "perplexity": score.perplexity,
        "bits_per_byte": lambda batches: score.bits_per_byte(batches, data.tokenizer.token_bytes),
        "continuation": score.continuation,
        "document": score.document,
    }


def subject_of(module: Model, special_ids: tuple[int, ...] = (0, 1, 2)) -> Subject:
    """A plain subject of a module: its forward alone."""
    return Subject(
        name="specimen, in another dtype",
        vocab_size=module.size.vocab_size,
        max_length=module.size.max_length,
        special_ids=special_ids,
        module=module,
        forward=lambda tokens: module(tokens),
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
