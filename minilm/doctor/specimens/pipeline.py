"""The specimens' data: documents of a small language, a tokenizer, packed rows, an order per epoch, shares of ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from minilm.doctor.subject import DataView, Rows

PAD, BOS, EOS = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"  # ids 3 and on


class Tokenizer:
    """One id per character; other characters are spelt as a question mark."""

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    num_tokens = 3 + len(LETTERS)
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return [3 + max(LETTERS.find(c), LETTERS.find("?") if c not in LETTERS else 0) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i - 3] for i in ids if i >= 3)

    def token_bytes(self, token: int) -> bytes:
        return LETTERS[token - 3].encode() if token >= 3 else b""


class ByteTokenizer:
    """Bytes of UTF-8 and some longer pieces, the longest piece that fits taken first; special tokens come last, so
    that the vocabulary (more than 256 ids) ends with them."""

    pieces = (" the ", "the", "in", "er", " a", "an", "ing", "é", "中", "文", "ion", "st")
    num_tokens = 256 + len(pieces) + 3
    pad_id, bos_id, eos_id = num_tokens - 3, num_tokens - 2, num_tokens - 1
    fingerprint = "bytes and pieces"

    def encode(self, text: str) -> list[int]:
        table = sorted(((p.encode(), 256 + n) for n, p in enumerate(self.pieces)), key=lambda x: -len(x[0]))
        data, at, ids = text.encode(), 0, []
        while at < len(data):
            piece, token = next(
                (x for x in table if data.startswith(x[0], at)), (data[at : at + 1], data[at])
            )
            ids.append(token)
            at += len(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        if token < 256:
            return bytes([token])
        return self.pieces[token - 256].encode() if token - 256 < len(self.pieces) else b""


class Pipeline:
    """Documents -> a stored stream -> packed rows of `length` + 1 tokens that overlap by one, so that each token of a
    document but its first is a target exactly once -> batches, ordered by (seed, epoch), dealt out to the ranks."""

    length, batch_rows = 16, 4
    tokenizer_type: type = Tokenizer
    letters, num_train, num_validation = LETTERS[:26], 60, 8

    def __init__(self) -> None:
        self.tokenizer = self.tokenizer_type()
        self.texts = {
            "train": self.make_texts(self.num_train, 11),
            "validation": self.make_texts(self.num_validation, 12),
        }

    def make_texts(self, count: int, seed: int) -> list[str]:
        draw = random.Random(seed)
        words = ["".join(draw.choices(self.letters, k=draw.randint(2, 7))) for _ in range(400)]
        return [" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(count)]

    # ---- text to ids

    def document(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]

    def documents(self, split: str) -> list[list[int]]:
        """The truth: what should be stored."""
        return [Pipeline.document(self, text) for text in self.texts[split]]

    def stored(self, split: str) -> Any:
        """What was stored, read back."""
        return self.documents(split)

    def beginning(self, text: str) -> list[int]:
        """How evaluation and generation begin a text."""
        return self.document(text)[:-1]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A context and its continuation, encoded as one text: the cut falls between two tokens."""
        whole, ids = self.tokenizer.encode(context + continuation), []
        for ids in (whole[:n] for n in range(len(whole), -1, -1)):
            if context.startswith(self.tokenizer.decode(ids)):
                break
        return ids, whole[len(ids) :]

    # ---- ids to rows

    def rows(self, split: str) -> list[Rows]:
        tokens: list[int] = []
        segments: list[int] = []
        for number, document in enumerate(self.stored(split), 1):
            tokens += [int(t) for t in document]
            segments += [number] * len(document)
        found = []
        for start in range(0, len(tokens) - 1, self.length):
            part, numbers = tokens[start : start + self.length + 1], segments[start : start + self.length + 1]
            missing = self.length + 1 - len(part)
            local = {n: k for k, n in enumerate(dict.fromkeys(numbers), 1)}
            row = torch.tensor([part + [self.tokenizer.pad_id] * missing])
            segment = torch.tensor([[local[n] for n in numbers] + [0] * missing])
            found.append(Rows(row, segment, self.learn(row, segment)))
        return found

    def learn(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return segments > 0

    # ---- rows to batches

    def order(self, count: int, epoch: int, seed: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def shard(self, order: list[int], rank: int, world: int) -> list[int]:
        return order[rank::world]

    def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
        rows = self.rows("train")
        yield from self.cut(rows, self.shard(self.order(len(rows), epoch, seed), rank, world))

    def cut(self, rows: list[Rows], own: list[int]) -> Iterator[Rows]:
        for start in range(0, len(own), self.batch_rows):
            chosen = [rows[i] for i in own[start : start + self.batch_rows]]
            yield Rows(
                torch.cat([r.tokens for r in chosen]),
                torch.cat([r.segments for r in chosen]),
                torch.cat([r.learn for r in chosen]),
            )

    def validation_batches(self, rank: int, world: int) -> Iterator[Rows]:
        """All rows once, in the order of the disk."""
        rows = self.rows("validation")
        yield from self.cut(rows, self.validation_shard(list(range(len(rows))), rank, world))

    def validation_shard(self, order: list[int], rank: int, world: int) -> list[int]:
        return order[rank::world]

    def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
        """A loader that was stopped after `done` batches and goes on, through the next epoch too."""
        yield from list(self.batches(epoch, seed, rank, world))[done:]
        yield from self.batches(epoch + 1, seed, rank, world)

    def worker_rows(self, epoch: int, seed: int, worker: int, workers: int) -> Iterator[Rows]:
        """The rows of one worker process; each hides some tokens from the loss, by a draw of its own."""
        rows = self.rows("train")
        draw = np.random.default_rng(self.worker_seed(epoch, seed, worker))
        for index in self.shard(self.order(len(rows), epoch, seed), worker, workers):
            row = rows[index]
            hidden = torch.from_numpy(draw.random(row.tokens.shape) < 0.15)
            yield Rows(row.tokens, row.segments, row.learn & ~hidden)

    def worker_seed(self, epoch: int, seed: int, worker: int) -> list[int]:
        return [seed, epoch, worker]

    def handed_over(self) -> DataView:
        """What the doctor is given."""
        return DataView(
            documents=Pipeline.documents.__get__(self),
            stored=self.stored,
            batches=self.batches,
            lost_targets=0,
            fingerprint_of_tokenizer=self.tokenizer.fingerprint,
            texts=lambda split: self.texts[split],
            encoders={"training": lambda text: self.document(text)[:-1], "evaluation": self.beginning},
            encode_pair=self.encode_pair,
            validation_batches=self.validation_batches,
            resumed=self.resumed,
            worker_rows=self.worker_rows,
        )


class BytePipeline(Pipeline):
    """Texts in several scripts, and a byte-level tokenizer."""

    tokenizer_type = ByteTokenizer
    letters = "abcdefghinorstu äéß中文字符🙂"
