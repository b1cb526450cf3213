"""The knowledge store: short texts as token ids in the cells of a square grid, read-only while a model uses it.

A store is no module and holds no parameter and no buffer: nothing trains it, casts it, broadcasts it or writes it
into a checkpoint. All ranks map the same two files, and a checkpoint remembers the fingerprint.

    STORE/knowledge.safetensors  ids, lengths, codes, rows, ... (see `KnowledgeStore`)
    STORE/knowledge.json         the description: settings, counts, source, tokenizer, checksums, fingerprint, edits

Entries have two numbers. The SOURCE ROW counts the records of the source file and is the name of an entry for good;
the SLOT is its cell on the grid, row * side + column.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilm.errors import CheckpointError, ConfigError, listed
from minilm.knowledge.codes import entry_codes, inverse_frequencies, token_table
from minilm.knowledge.layout import place

FORMAT, VERSION = "minilm knowledge", 1
TENSORS, DESCRIPTION = "knowledge.safetensors", "knowledge.json"
CODE_SCALE = 1 / 127  # a code has length 1, so no component is larger than 1
SETTINGS = ("side", "width", "code_dim", "num_entries", "vocab_size", "code_scale", "seed")
DECIDE = ("ids", "lengths", "codes", "rows", "idf", "classes")  # all that a model can see
FOLLOW = ("offsets", "row_means", "column_means")


class KnowledgeStore:
    """Entries on a grid of side x side slots. N = side * side, W = width, C = code_dim, V = vocab_size.

    ids           [N, W] int16 (int32 for a vocabulary over 32,767): the tokens of a slot, zeros beyond its length
    lengths       [N] uint8: 0 = empty slot, never to be selected
    codes         [N, C] int8: the code divided by `code_scale` and rounded; zeros for an empty slot
    rows          [N] int32: the source row of a slot, -1 for an empty one
    slots         [num_entries] int32: the slot of a source row
    offsets       [num_entries] int64: byte offset of the record in the (decompressed) source file
    row_means, column_means  [side, C] float32: mean code of the entries of a grid row, of a column
    idf           [V] float32, classes [V] int32: what `token_codes` is made of

    Frozen: nobody writes into these tensors. Made by `open`, `build`, `assemble` or `random`.
    """

    def __init__(
        self, description: dict[str, Any], tensors: dict[str, Tensor], path: Path | None = None
    ) -> None:
        self.description, self.path = description, path
        self.side, self.width, self.code_dim = (int(description[k]) for k in ("side", "width", "code_dim"))
        self.num_entries, self.vocab_size = int(description["num_entries"]), int(description["vocab_size"])
        self.code_scale, self.seed = float(description["code_scale"]), int(description["seed"])
        self.ids, self.lengths = tensors["ids"], tensors["lengths"]
        self.codes, self.rows = tensors["codes"], tensors["rows"]
        self.offsets = tensors["offsets"]
        self.row_means, self.column_means = tensors["row_means"], tensors["column_means"]
        self.idf, self.classes = tensors["idf"], tensors["classes"]
        self.slots = tensors["slots"] if "slots" in tensors else _inverse(self.rows, self.num_entries)
        self._copies: dict[torch.device, KnowledgeStore] = {self.ids.device: self}

    @property
    def fingerprint(self) -> str:
        """Of everything that a model can see: settings, tokenizer, entries, codes and places."""
        return str(self.description["fingerprint"])

    @property
    def source_sha256(self) -> str | None:
        """Of the file whose records the source rows count; labels of data name the same file. None: no file."""
        return (self.description.get("source") or {}).get("sha256")

    @property
    def num_slots(self) -> int:
        return self.side * self.side

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def descends_from(self, fingerprint: str) -> bool:
        """Is this the store with that fingerprint, or one made from it by `minilm knowledge edit`?"""
        return fingerprint in (self.fingerprint, *(edit["parent"] for edit in self.description["lineage"]))

    # --- what a model asks

    def token_codes(self) -> Tensor:
        """[V, C] float32 on the store's device: the code vector of each token, 0 where no key part holds it."""
        return self._token_codes

    @functools.cached_property
    def _token_codes(self) -> Tensor:
        # Always made on the CPU: every device and every rank gets the same bits.
        table = token_table(self.classes.cpu(), self.idf.cpu(), self.code_dim, self.seed)
        return table.to(self.device)

    def to(self, device: torch.device | str) -> KnowledgeStore:
        """The store with its tensors on that device; the same object for every call, so it lies there once."""
        wanted = torch.empty(0, device=device).device  # "cuda" has the number of the current device
        if wanted not in self._copies:
            moved = {name: tensor.to(wanted) for name, tensor in self.tensors().items()}
            copy = KnowledgeStore(self.description, moved, self.path)
            copy._copies = self._copies
            self._copies[wanted] = copy
        return self._copies[wanted]

    def __deepcopy__(self, memo: dict[int, Any]) -> KnowledgeStore:
        return self  # shared and frozen: a copy of a model reads the same entries

    def __repr__(self) -> str:
        grid = f"{self.side} x {self.side}"
        return f"KnowledgeStore({self.num_entries:,} entries, {grid}, fingerprint {self.fingerprint[:12]})"

    def tokens_of(self, row: int) -> list[int]:
        """The token ids of a source row."""
        slot = int(self.slots[row])
        return [int(token) for token in self.ids[slot, : int(self.lengths[slot])]]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, `slots` included."""
        return {name: getattr(self, name) for name in (*DECIDE, *FOLLOW, "slots")}

    # --- where stores come from

    @classmethod
    def open(
        cls, folder: str | Path, *, tokenizer_fingerprint: str | None = None, verify: bool = True
    ) -> KnowledgeStore:
        """The store of a folder, its tensors mapped from the file.

        tokenizer_fingerprint  of the tokenizer that the model's data was made with
        verify                 compare all checksums (0.3 s for a million entries); without, only names and shapes

        Raises CheckpointError for a folder that is missing, torn or altered, naming every difference, and
        ConfigError for a store of another tokenizer.
        """
        folder = Path(folder)
        description = read_description(folder)
        store = cls(description, _read(folder / TENSORS, description), folder)
        if verify:
            store.verify()
        made = description["tokenizer"]
        if tokenizer_fingerprint is not None and made["fingerprint"] != tokenizer_fingerprint:
            raise ConfigError(
                f"The knowledge store {folder} was made with the tokenizer {made['name']} (fingerprint "
                f"{made['fingerprint']}), but the data and the model use another one ({tokenizer_fingerprint}): its "
                "ids would mean other words. Build the store again with that tokenizer (`minilm knowledge build`)."
            )
        return store

    def verify(self) -> None:
        """Recompute the checksum of every tensor. Raises CheckpointError naming each one that differs."""
        name = self.path or "The knowledge store"
        noted = self.description["checksums"]
        wrong = [
            f"{key} differs from its checksum ({now[:12]} instead of {str(noted.get(key))[:12]})"
            for key, now in self.checksums().items()
            if noted.get(key) != now
        ]
        if not wrong and fingerprint_of(self.description) != self.fingerprint:
            wrong.append("the settings in knowledge.json were altered: they do not give its fingerprint")
        if not wrong:
            wrong = self._inconsistent()
        if wrong:
            raise CheckpointError(f"{name} is damaged: {listed(wrong)}. Copy it again, or build it again.")

    def checksums(self) -> dict[str, str]:
        """sha256 of dtype, shape and bytes of each tensor that is stored."""
        return {name: _checksum(getattr(self, name)) for name in (*DECIDE, *FOLLOW)}

    def _inconsistent(self) -> list[str]:
        held = self.rows[self.rows >= 0]
        wrong = []
        if not torch.equal(held.sort().values, torch.arange(self.num_entries, dtype=held.dtype)):
            wrong.append("its slots do not hold every source row exactly once")
        if not torch.equal(self.rows >= 0, self.lengths > 0) or int(self.lengths.max()) > self.width:
            wrong.append("lengths and rows disagree about which slots are empty")
        return wrong

    @classmethod
    def assemble(
        cls,
        settings: dict[str, Any],
        *,
        ids: Tensor,
        lengths: Tensor,
        keys: Tensor,
        key_starts: Tensor,
        offsets: Tensor,
        classes: Tensor,
    ) -> KnowledgeStore:
        """A store in memory, from entries in the order of the source.

        settings   side, width, code_dim, vocab_size, seed, tokenizer, and whatever else the description shall hold
        ids, lengths, offsets  [n, W], [n], [n]: as in the store, but in source order
        keys, key_starts       the tokens of all key parts one after another; where each one begins, [n]
        classes                [V]
        """
        side, seed = settings["side"], settings["seed"]
        idf = inverse_frequencies(classes, keys, key_starts)
        codes = entry_codes(token_table(classes, idf, settings["code_dim"], seed), keys, key_starts)
        slots = torch.from_numpy(place(codes.numpy(), side)).long()
        tensors = {
            "ids": _scattered(ids.to(id_dtype(settings["vocab_size"])), slots, side),
            "lengths": _scattered(lengths.to(torch.uint8), slots, side),
            "codes": _scattered(quantised(codes), slots, side),
            "rows": torch.full((side * side,), -1, dtype=torch.int32),
            "offsets": offsets.long(),
            "idf": idf,
            "classes": classes.int(),
        }
        tensors["rows"][slots] = torch.arange(len(ids), dtype=torch.int32)
        tensors |= means(tensors["codes"], tensors["lengths"], side)
        return cls.sealed({"num_entries": len(ids), "lineage": [], **settings}, tensors)

    @classmethod
    def sealed(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> KnowledgeStore:
        """A store of these tensors, with its checksums and its fingerprint in the description."""
        description = {"format": FORMAT, "version": VERSION, "code_scale": CODE_SCALE, **settings}
        description["fingerprint"], description["checksums"] = "", {}
        store = cls(description, tensors)
        description["checksums"] = store.checksums()
        description["fingerprint"] = fingerprint_of(description)
        return store

    @classmethod
    def random(
        cls,
        side: int,
        width: int,
        vocab_size: int,
        num_entries: int | None = None,
        code_dim: int = 64,
        seed: int = 0,
    ) -> KnowledgeStore:
        """Entries of random tokens and lengths, for tests and timing. Full unless `num_entries` says otherwise."""
        num_entries = side * side if num_entries is None else num_entries
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (num_entries, width), generator=generator)
        lengths = torch.randint(1, width + 1, (num_entries,), generator=generator)
        inside = torch.arange(width) < lengths[:, None]
        settings = {
            "side": side,
            "width": width,
            "code_dim": code_dim,
            "vocab_size": vocab_size,
            "seed": seed,
            "tokenizer": {"name": "none: random ids", "fingerprint": f"random-{vocab_size}"},
            "source": None,
        }
        return cls.assemble(
            settings,
            ids=ids * inside,
            lengths=lengths,
            keys=ids[inside],
            key_starts=torch.cumsum(lengths, 0) - lengths,
            offsets=torch.zeros(num_entries, dtype=torch.int64),
            classes=torch.arange(vocab_size),
        )


# ---------------------------------------------------------------- parts of a store


def id_dtype(vocab_size: int) -> torch.dtype:
    """int16 where every id fits."""
    return torch.int16 if vocab_size <= 32767 else torch.int32


def quantised(codes: Tensor) -> Tensor:
    """int8 of the same shape: codes in units of `CODE_SCALE`."""
    return torch.round(codes / CODE_SCALE).clamp(-127, 127).to(torch.int8)


def means(codes: Tensor, lengths: Tensor, side: int) -> dict[str, Tensor]:
    """`row_means` and `column_means`, [side, C] float32 each; zeros for a row or column without entries."""
    grid = codes.view(side, side, -1)
    held = (lengths > 0).view(side, side)
    found = {}
    for name, across in (("row_means", 1), ("column_means", 0)):
        sums = grid.sum(across, dtype=torch.int64).double() * CODE_SCALE  # empty slots have zeros
        found[name] = (sums / held.sum(across).clamp(min=1)[:, None]).float()
    return found


def fingerprint_of(description: dict[str, Any]) -> str:
    """sha256 over the settings, the tokenizer and the checksums of what a model can see."""
    decides = {
        "settings": {key: description[key] for key in SETTINGS},
        "tokenizer": description["tokenizer"]["fingerprint"],
        "checksums": {key: description["checksums"][key] for key in DECIDE},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def read_description(folder: Path) -> dict[str, Any]:
    """knowledge.json of a store. Raises CheckpointError for one that is missing, damaged or of another format."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no knowledge store in {folder}: {path} does not exist. `minilm knowledge build` makes one."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Copy the store again, or build it again."
        ) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a knowledge store.")
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {description.get('version')!r}, this minilm reads version {VERSION}. Build the store "
            "again, or use the version of minilm that wrote it."
        )
    needed = (*SETTINGS, "tokenizer", "checksums", "fingerprint", "lineage")
    missing = [key for key in needed if key not in description]
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(missing)}.")
    return description


def _read(path: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:  # maps the file: pages are read when they are used
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist, so {path.parent} is not a whole knowledge store."
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete: {error}. Copy the store again, or build it again."
        ) from error
    n, vocab_size = description["side"] ** 2, description["vocab_size"]
    means_shape = (torch.float32, (description["side"], description["code_dim"]))
    expected = {
        "ids": (id_dtype(vocab_size), (n, description["width"])),
        "lengths": (torch.uint8, (n,)),
        "codes": (torch.int8, (n, description["code_dim"])),
        "rows": (torch.int32, (n,)),
        "idf": (torch.float32, (vocab_size,)),
        "classes": (torch.int32, (vocab_size,)),
        "offsets": (torch.int64, (description["num_entries"],)),
        "row_means": means_shape,
        "column_means": means_shape,
    }
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, knowledge.json stands for {expected.get(name, 'no such tensor')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise CheckpointError(f"{path} is damaged or belongs to another store: {listed(wrong)}")
    return tensors


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def _scattered(values: Tensor, slots: Tensor, side: int) -> Tensor:
    out = values.new_zeros((side * side, *values.shape[1:]))
    out[slots] = values
    return out


def _inverse(rows: Tensor, num_entries: int) -> Tensor:
    slots = torch.zeros(num_entries, dtype=torch.int32, device=rows.device)
    held = torch.nonzero((rows >= 0) & (rows < num_entries)).squeeze(1)
    slots[rows[held].long()] = held.int()
    return slots
