"""The plain set-up handed over to the doctor, as its user would do it: part by part, through a `minilm.Subject`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import unseen.plain as plain
from torch import Tensor, nn
from unseen.plain import BOS, EOS, IGNORED, PAD, Kit, make_documents
from unseen.plain_model import SYMBOLS, Cache, Settings

from minilm import DataView, Rows, Subject, Training


class Tokenizer:
    """The characters of the plain set-up."""

    pad_id, bos_id, eos_id, num_tokens = PAD, BOS, EOS, 3 + len(SYMBOLS)

    def encode(self, text: str) -> list[int]:
        return [3 + SYMBOLS.index(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(SYMBOLS[i - 3] for i in ids if i >= 3)


class Given:
    """Rows of a check in the form that the plain trainer reads, with its align made aware of prompts."""

    def __init__(self, batches: Sequence[Rows]):
        self.tokens = torch.cat([b.tokens for b in batches])
        self.segments = torch.cat([b.segments for b in batches])
        self.learn = torch.cat([b.learn for b in batches])
        self.taken = self.learn

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        self.taken = self.learn[indices]
        return self.tokens[indices], self.segments[indices]


class Handed:
    """A kit with its settings, documents and model; `subject()` is what the doctor gets."""

    def __init__(self, kit: Kit, settings: Settings, packed: bool = True, seed: int = 0):
        self.kit, self.settings, self.packed, self.seed = kit, settings, packed, seed
        self.documents = dict(zip(("train", "validation"), kit.split(make_documents(120)), strict=True))
        self.model = self.drawn(seed)
        self.trainer = self.trainer_of(self.model, settings)

    def drawn(self, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.kit.model(self.settings)

    def rows(self, split: str, settings: Settings) -> Any:
        return self.kit.rows(self.documents[split], settings, self.packed)

    def trainer_of(self, model: nn.Module, settings: Settings) -> Any:
        return self.kit.trainer(model, settings, *(self.rows(name, settings) for name in self.documents))

    # ---- loss and evaluation

    def aligned(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        inputs, segments, targets = self.trainer.align(rows.tokens, rows.segments)
        return inputs, segments, targets.masked_fill(~rows.learn[:, 1:], IGNORED)

    def terms(self, rows: Rows) -> tuple[dict[str, Tensor], int]:
        inputs, segments, targets = self.aligned(rows)
        sums = self.trainer.micro_losses(inputs, segments, targets)
        return sums, max(1, int((targets != IGNORED).sum()))

    def loss(self, rows: Rows) -> Tensor:
        sums, count = self.terms(rows)
        return sums["loss"] / count

    def auxiliary(self, rows: Rows) -> dict[str, Tensor]:
        sums, count = self.terms(rows)
        return {name: value / count for name, value in sums.items() if name != "loss"}

    def total_loss(self, rows: Rows) -> Tensor:
        sums, count = self.terms(rows)
        return sum(sums.values()) / count

    def criterion(self, logits: Tensor, rows: Rows) -> Tensor:
        _, _, targets = self.aligned(rows)
        sums = self.trainer.losses(logits[:, : targets.shape[1]], targets)
        return sums["loss"] / max(1, int((targets != IGNORED).sum()))

    def evaluated(self, batches: Sequence[Rows]) -> dict[str, float]:
        given, align = Given(batches), type(self.trainer).align

        def masked(ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            inputs, inner, targets = align(self.trainer, ids, segments)
            return inputs, inner, targets.masked_fill(~given.taken[:, 1:], IGNORED)

        self.trainer.align = masked
        try:
            return self.trainer.evaluate(given)
        finally:
            del self.trainer.align

    # ---- generation

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0,
        top_k: int | None = None, top_p: float | None = None, seed: int = 0, eos_id: int | None = None,
    ) -> list[list[int]]:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        how = {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
        with ending(eos_id):
            return self.kit.sampler(self.model).generate(
                [list(p) for p in prompts], max_new_tokens, generator=generator, **how
            )

    def choose(
        self, logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        seed: int = 0, eos_id: int | None = None,
    ) -> Tensor:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        sampler = self.kit.sampler(self.model)
        return sampler.choose(logits, temperature, top_k or 0, 1.0 if top_p is None else top_p, generator)[
            :, 0
        ]

    def incremental(self, tokens: Tensor, n: int) -> Tensor:
        cache = Cache()
        parts = [self.model(tokens[:, :n], None, cache)]
        parts += [self.model(tokens[:, i : i + 1], None, cache) for i in range(n, tokens.shape[1])]
        return torch.cat(parts, 1)

    # ---- training and data

    def training(
        self, clip_norm: float | None = None, seed: int | None = None, num_steps: int | None = None
    ) -> Training:
        changes = {"clip": clip_norm, "steps": num_steps}
        settings = dataclasses.replace(self.settings, **{k: v for k, v in changes.items() if v is not None})
        model = self.drawn(self.seed if seed is None else seed)
        trainer = self.trainer_of(model, settings)
        own_batches, align = trainer.micro_batches, trainer.align

        def step(micro_batches: list[Rows]) -> dict[str, float]:
            aligned = [
                (*align(rows.tokens, rows.segments)[:2], align(rows.tokens, rows.segments)[2].masked_fill(
                    ~rows.learn[:, 1:], IGNORED))
                for rows in micro_batches
            ]  # fmt: skip
            trainer.micro_batches = lambda _: aligned
            logged = trainer.train_step()
            return {"loss": logged["loss"], "gradient_norm": logged["norm"], "learning_rate": logged["lr"]}

        def next_rows() -> list[Rows]:
            return [joined(*batch) for batch in own_batches(trainer.step)]

        embeddings = {name for name, _ in model.named_parameters() if name.startswith(("token", "position"))}
        return Training(
            module=model,
            step=step,
            forward=lambda module, tokens, segments: module(tokens, segments),
            optimizer=trainer.optimizer if isinstance(trainer.optimizer, torch.optim.Optimizer) else None,
            clip_norm=settings.clip,
            planned_rate=lambda number: plain.Trainer.lr_at(trainer, number),
            num_steps=settings.steps,
            decays=lambda name, p: p.dim() >= 2 and name not in embeddings,
            save=lambda folder: trainer.save(folder / "state.pt"),
            load=lambda folder: trainer.load(folder / "state.pt"),
            next_rows=next_rows,
            average=lambda: trainer.average,
            average_decay=settings.average,
        )

    def sampled(self, seed: int, rank: int, world: int) -> Any:
        settings = dataclasses.replace(self.settings, seed=seed, rank=rank, world=world)
        return self.trainer_of(self.drawn(0), settings)

    def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
        trainer = self.sampled(seed, rank, world)
        for step in range(epoch * trainer.steps_per_epoch, (epoch + 1) * trainer.steps_per_epoch):
            yield self.of_rows(trainer, trainer.rows_of_step(step))

    def of_rows(self, trainer: Any, indices: list[int]) -> Rows:
        tokens, segments = trainer.train.batch(indices)
        counted = trainer.align(tokens, segments)[2] != IGNORED
        return Rows(tokens, segments, torch.cat([torch.ones_like(counted[:, :1]), counted], 1))

    def lost_targets(self, epoch: int, seed: int) -> int:
        """Targets of the rows that wait for a later epoch."""
        trainer = self.sampled(seed, 0, 1)
        waiting = trainer.order(epoch)[trainer.steps_per_epoch * self.settings.batch_rows :]
        return int(self.of_rows(trainer, waiting).learn[:, 1:].sum()) if waiting else 0

    def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
        first, second = self.sampled(seed, rank, world), self.sampled(seed, rank, world)
        first.step = epoch * first.steps_per_epoch + done
        path = Path(torch.hub.get_dir()).with_name("unseen-state.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        first.save(path)
        second.load(path)
        path.unlink()
        while second.step < (epoch + 2) * second.steps_per_epoch:
            if second.step < 0:
                return
            yield self.of_rows(second, second.rows_of_step(second.step))
            second.step += 1

    def subject(self) -> Subject:
        """Everything that the plain set-up has."""
        return Subject(
            name="the plain set-up",
            vocab_size=self.settings.vocab,
            max_length=self.settings.length,
            special_ids=(PAD, BOS, EOS),
            module=self.model,
            forward=lambda tokens: self.model(tokens),
            masked_forward=lambda tokens, keep: self.model(tokens, keep.long()),
            left_padding=True,
            packed_forward=lambda tokens, segments: self.model(tokens, segments),
            incremental=self.incremental,
            build=lambda seed: Handed(self.kit, self.settings, self.packed, seed).subject(),
            loss=self.loss,
            criterion=self.criterion,
            auxiliary=self.auxiliary if len(self.terms(self.probe())[0]) > 1 else None,
            total_loss=self.total_loss,
            evaluate=lambda batches: self.evaluated(batches)["loss"],
            perplexity=lambda batches: self.evaluated(batches)["perplexity"],
            continuation=lambda p, c: self.kit.continuation_loss(self.model, list(p), list(c)),
            generate=self.generate,
            choose=self.choose,
            save=lambda module, folder: torch.save(module.state_dict(), folder / "weights.pt"),
            load=self.load,
            training=self.training,
            data=DataView(
                documents=self.documents.__getitem__,
                stored=self.documents.__getitem__,
                batches=self.batches,
                resumed=self.resumed,
                lost_targets=self.lost_targets,
            ),
            tokenizer=Tokenizer(),
        )

    def probe(self) -> Rows:
        return Rows.whole(torch.arange(3, 19).unsqueeze(0))

    def load(self, folder: Path) -> nn.Module:
        model = self.drawn(self.seed + 1)
        model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        return model


class ending:
    """The plain sampler ends at the constant EOS; inside, at another id, or nowhere (None)."""

    def __init__(self, eos_id: int | None):
        self.eos_id = -1 if eos_id is None else eos_id

    def __enter__(self) -> None:
        plain.EOS = self.eos_id

    def __exit__(self, *_: object) -> None:
        plain.EOS = EOS


def joined(inputs: Tensor, segments: Tensor, targets: Tensor) -> Rows:
    """An aligned micro-batch as unshifted rows; the last target joins its input's document where it counts."""
    counted = targets != IGNORED
    last = torch.where(counted[:, -1:], targets[:, -1:], PAD)
    tokens = torch.cat([inputs, last], 1)
    whole = torch.cat([segments, torch.where(counted[:, -1:], segments[:, -1:], 0)], 1)
    return Rows(tokens, whole, torch.cat([torch.ones_like(counted[:, :1]), counted], 1))


def handed(variant: Any = None) -> Handed:
    """The plain set-up, or one with a bug or a healthy variant in it."""
    plant: Callable[[Kit], Kit] = variant.plant if variant is not None else lambda kit: kit
    settings = Settings(**(getattr(variant, "settings", None) or {}))
    return Handed(plant(Kit()), dataclasses.replace(settings, world=1), getattr(variant, "packed", True))
