"""A small GPT and its training, as an ordinary user would write them. Nothing of minilm is used.

`Kit` names the parts. A variant of a part is a subclass or another function put in its place.
Segments number the documents of a row from 1; 0 is padding.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from unseen.plain_model import GPT, SYMBOLS, Cache, Settings, evaluating

PAD, BOS, EOS = 0, 1, 2
IGNORED = -100  # a target that is not counted


def make_documents(num: int, seed: int = 0) -> list[list[int]]:
    """`num` different short texts of one to four sentences."""
    rng, texts = random.Random(seed), {}
    while len(texts) < num:
        sentences = []
        for _ in range(rng.randint(1, 4)):
            name = rng.choice(["Tom", "Ann", "Zoe", "Max"])
            thing = rng.choice(["cats", "big red cars", "eggs"])
            sentences.append(f"{name} has {rng.randint(2, 99)} {thing}")
        texts[", ".join(sentences) + "."] = None
    return [[BOS, *(3 + SYMBOLS.index(c) for c in text), EOS] for text in texts]


def split(documents: list, share: float = 0.1, seed: int = 0) -> tuple[list, list]:
    """Training and validation documents, drawn at random."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    held = int(len(documents) * share)
    return shuffled[held:], shuffled[:held]


class Rows:
    """Rows of length + 1 tokens and their segments: packed from one stream, or one document a row, padded."""

    def __init__(self, documents: list[list[int]], settings: Settings, packed: bool = True):
        self.length, self.rows = settings.length, []
        numbered = [[(token, n) for token in text] for n, text in enumerate(documents, start=1)]
        for piece in [list(itertools.chain(*numbered))] if packed else numbered:
            self.rows += [row + [(PAD, 0)] * (self.length + 1 - len(row)) for row in self.cut(piece)]

    def cut(self, piece: list) -> list[list]:
        """The last token of a row is the first of the next, so each pair of neighbours is in one row."""
        return [piece[i : i + self.length + 1] for i in range(0, len(piece) - 1, self.length)]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens and segments, each [B, length + 1]."""
        return tuple(torch.tensor([self.rows[i] for i in indices]).unbind(-1))


class Trainer:
    def __init__(self, model: GPT, settings: Settings, train: Rows, valid: Rows | None = None):
        self.model, self.settings, self.train, self.valid = model, settings, train, valid
        self.step, self.steps_per_epoch = (
            0,
            len(train) // settings.batch_rows,
        )  # the tail waits for a later epoch
        self.optimizer, self.average = self.build_optimizer(), self.start_average()

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Matrices are decayed; embeddings (and a tied head), norms and biases are not."""
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        groups = [{"params": [], "weight_decay": self.settings.decay}, {"params": [], "weight_decay": 0.0}]
        for weight in self.model.parameters():
            groups[weight.ndim < 2 or id(weight) in embeddings]["params"].append(weight)
        return torch.optim.AdamW(groups, lr=self.settings.lr, betas=(0.9, 0.95))

    def lr_at(self, step: int) -> float:
        """Linear warm-up to lr, then half a cosine down to min_lr at the last step. Steps count from 0."""
        s = self.settings
        if step < s.warmup:
            return s.lr * (step + 1) / s.warmup
        done = min(1.0, (step - s.warmup) / max(1, s.steps - 1 - s.warmup))
        return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * done)) / 2

    def current_lr(self) -> float:
        return self.lr_at(self.step)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def order(self, epoch: int) -> list[int]:
        """All rows, shuffled; the same on every rank."""
        return random.Random(f"{self.settings.seed} {epoch}").sample(range(len(self.train)), len(self.train))

    def rows_of_step(self, step: int) -> list[int]:
        """This rank's rows of a step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.settings.batch_rows
        return self.order(epoch)[start : start + self.settings.batch_rows][
            self.settings.rank :: self.settings.world
        ]

    def align(self, ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, their segments and the targets, each [B, length]; a target is in the document of its input."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return inputs, segments[:, :-1], targets.masked_fill(~counted, IGNORED)

    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        rows, size = self.rows_of_step(step), self.settings.micro_rows
        return [self.align(*self.train.batch(rows[i : i + size])) for i in range(0, len(rows), size)]

    def over_ranks(self, tensor: Tensor) -> Tensor:
        if self.settings.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def count(self, batches: list) -> int:
        """Targets that are counted, on all ranks."""
        return int(self.over_ranks(sum((targets != IGNORED).sum() for _, _, targets in batches)))

    def losses(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums over the counted targets, in nats. What is optimised is the sum of all entries."""
        return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")}

    def micro_losses(self, inputs: Tensor, segments: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return self.losses(self.model(inputs, segments), targets)

    def accumulate(self, batches: list, tokens: int) -> dict[str, Tensor]:
        """Adds the gradient of the mean over `tokens` targets; returns the sums of the losses."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            sums = self.micro_losses(*batch)
            (sum(sums.values()) / tokens).backward()
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value.detach()
        return totals

    def clip(self) -> float:
        """The norm of the whole gradient before it is clipped."""
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip))

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def start_average(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def update_average(self) -> None:
        for name, weight in self.model.named_parameters():
            self.average[name].lerp_(weight.detach(), 1 - self.settings.average)

    def train_step(self) -> dict[str, float]:
        """One update; losses are means over the counted targets of the whole batch, in nats."""
        self.model.train()
        lr = self.current_lr()
        self.set_lr(lr)
        batches = self.micro_batches(self.step)
        tokens = self.count(batches)
        totals = self.accumulate(batches, tokens)
        for weight in self.model.parameters():
            self.over_ranks(weight.grad)
        norm = self.clip()
        self.update()
        self.update_average()
        self.step += 1
        losses = {name: float(self.over_ranks(value)) / tokens for name, value in totals.items()}
        return {**losses, "lr": lr, "norm": norm, "tokens": tokens}

    def evaluate(self, rows: Rows | None = None, average: bool = False) -> dict[str, float]:
        """Mean loss in nats per counted target and its perplexity, of the model or of the averaged weights."""
        rows, weights = self.valid if rows is None else rows, self.average if average else {}
        total, tokens, size = 0.0, 0, self.settings.micro_rows
        with evaluating(self.model):
            for start in range(0, len(rows), size):
                indices = list(range(start, min(start + size, len(rows))))
                inputs, segments, targets = self.align(*rows.batch(indices))
                logits = torch.func.functional_call(self.model, weights, (inputs, segments))
                total += float(self.losses(logits, targets)["loss"])
                tokens += int((targets != IGNORED).sum())
        return {"loss": total / tokens, "perplexity": math.exp(total / tokens), "tokens": tokens}

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "rng": torch.get_rng_state(),
        }

    def save(self, path: Path) -> None:
        torch.save(self.state(), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]
        torch.set_rng_state(state["rng"])


def continuation_loss(model: GPT, prompt: list[int], continuation: list[int]) -> float:
    """Mean nats per token of `continuation` after `prompt`, which has at least one token."""
    with evaluating(model):
        logits = model(torch.tensor([prompt + continuation]))[0]
    return float(F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(continuation)))


class Sampler:
    def __init__(self, model: GPT):
        self.model = model

    def probabilities(self, logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
        """[B, vocab]; top_k 0 and top_p 1 keep everything, the most probable token is always kept."""
        logits = logits / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        ranked, tokens = logits.softmax(-1).sort(descending=True)
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill((before >= top_p) & (before > 0), 0.0)
        kept = torch.zeros_like(ranked).scatter(1, tokens, ranked)
        return kept / kept.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
        """[B, 1]; temperature 0 is greedy."""
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return self.probabilities(logits, temperature, top_k, top_p).multinomial(1, generator=generator)

    def prefill(self, ids: Tensor, segments: Tensor) -> tuple[Tensor, Cache]:
        cache = Cache()
        return self.model(ids, segments, cache)[:, -1], cache

    def generate(
        self,
        prompts: list[list[int]],
        new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        cached: bool = True,
    ) -> list[list[int]]:
        """What follows each prompt, up to and with its EOS. Prompts are padded on the left."""
        with evaluating(self.model):
            return self.write(prompts, new_tokens, (temperature, top_k, top_p, generator), cached)

    def write(self, prompts: list, new_tokens: int, how: tuple, cached: bool) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        segments = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        logits, cache = self.prefill(ids, segments)
        done, one = torch.zeros(len(prompts), 1, dtype=torch.bool), segments[:, -1:]
        for made in range(1, new_tokens + 1):
            ids = torch.cat([ids, self.choose(logits, *how)], 1)
            done = done | (ids[:, -1:] == EOS)
            if done.all() or made == new_tokens:
                break
            segments = torch.cat([segments, one], 1)
            logits = (self.model(ids[:, -1:], one, cache) if cached else self.model(ids, segments))[:, -1]
        rows = [row[longest:].tolist() for row in ids]
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@dataclass(frozen=True)
class Kit:
    """The parts; `dataclasses.replace(Kit(), trainer=...)` swaps one."""

    split: Callable = split
    rows: type[Rows] = Rows
    model: type[GPT] = GPT
    trainer: type[Trainer] = Trainer
    sampler: type[Sampler] = Sampler
    continuation_loss: Callable = continuation_loss
