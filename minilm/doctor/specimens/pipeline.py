"""The specimens' data: documents of a small language, a character tokenizer, packed rows, an order per epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from minilm.doctor.subject import DataView, Rows

PAD, BOS, EOS = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"  # ids 3 and on


class Tokenizer:
    """One id per character; other characters are spelt as a question mark."""

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    num_tokens = 3 + len(LETTERS)

    def encode(self, text: str) -> list[int]:
        return [3 + max(LETTERS.find(c), LETTERS.find("?") if c not in LETTERS else 0) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i - 3] for i in ids if i >= 3)

    def token_bytes(self, token: int) -> bytes:
        return LETTERS[token - 3].encode() if token >= 3 else b""


class Pipeline:
    """Documents -> a stored stream -> packed rows of `length` + 1 tokens that overlap by one, so that each token of a
    document but its first is a target exactly once -> batches, ordered by (seed, epoch), dealt out to the ranks."""

    length, batch_rows = 16, 4

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.texts = {"train": self.make_texts(60, 11), "validation": self.make_texts(8, 12)}

    def make_texts(self, count: int, seed: int) -> list[str]:
        draw = random.Random(seed)
        words = ["".join(draw.choices(LETTERS[:26], k=draw.randint(2, 7))) for _ in range(400)]
        return [" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(count)]

    def documents(self, split: str) -> list[list[int]]:
        """The truth: what should be stored."""
        return [[BOS, *self.tokenizer.encode(text), EOS] for text in self.texts[split]]

    def stored(self, split: str) -> list[list[int]]:
        """What was stored, read back."""
        return self.documents(split)

    def rows(self, split: str) -> list[Rows]:
        tokens, segments = [], []
        for number, document in enumerate(self.stored(split), 1):
            tokens += document
            segments += [number] * len(document)
        found = []
        for start in range(0, len(tokens) - 1, self.length):
            part, numbers = tokens[start : start + self.length + 1], segments[start : start + self.length + 1]
            missing = self.length + 1 - len(part)
            local = {n: k for k, n in enumerate(dict.fromkeys(numbers), 1)}
            row = torch.tensor([part + [PAD] * missing])
            segment = torch.tensor([[local[n] for n in numbers] + [0] * missing])
            found.append(Rows(row, segment, self.learn(row, segment)))
        return found

    def learn(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return segments > 0

    def order(self, count: int, epoch: int, seed: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def shard(self, order: list[int], rank: int, world: int) -> list[int]:
        return order[rank::world]

    def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
        rows = self.rows("train")
        own = self.shard(self.order(len(rows), epoch, seed), rank, world)
        for start in range(0, len(own), self.batch_rows):
            chosen = [rows[i] for i in own[start : start + self.batch_rows]]
            yield Rows(
                torch.cat([r.tokens for r in chosen]),
                torch.cat([r.segments for r in chosen]),
                torch.cat([r.learn for r in chosen]),
            )

    def handed_over(self) -> DataView:
        """What the doctor is given."""
        return DataView(
            documents=Pipeline.documents.__get__(self),
            stored=self.stored,
            batches=self.batches,
            lost_targets=0,
        )
