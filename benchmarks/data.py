"""Does the loader keep up with the device, and how fast is text made into a store?

    python benchmarks/data.py                              builtin:python (nothing is downloaded): 3 minutes on 2 cores
    python benchmarks/data.py --source corpus.jsonl        another text, any source of `minilm data build`
    python benchmarks/data.py --quick --json quick.json    the same path in seconds

    loader      `Loader.step`, which reads the rows, finds the documents in them and aligns them, in one thread from a
                warm store; its floor is the memory that a batch is read from and written to
    tokenizing  the same documents, with the same tokenizer file, turn by turn: the `tokenizers` library alone, its
                variant without offsets, `Tokenizer.encode_batch`, and the whole `minilm data build` from JSON Lines
                (reading, checks, duplicates, split, encoding, writing, checksums, flushing to the disk). Processes that
                may use 1, 2, ... cores, each with as many threads of the library
    order       places of an epoch of a trillion rows, of which no list exists

The ids in the store are compared with those of the library alone: exit code 1 if any document differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch

from minilm import models
from minilm.data.build import build
from minilm.data.documents import MAX_DOCUMENT_BYTES, Document, Position
from minilm.data.loader import Loader
from minilm.data.permutation import Permutation
from minilm.data.rows import KINDS, Rows
from minilm.data.sources import parse_sources
from minilm.data.store import SPLITS, Store, checksum, files_of
from minilm.data.tokenizer import Tokenizer

LIBRARY = ("tokenizers", "tokenizers without offsets")
BATCH_BYTES = 1 << 20  # of text, as in a build
EPOCH_ROWS = 10**12  # a list of them would take 8 TB
DOCUMENTS, TOKENIZER, STORE = "documents.jsonl", "tokenizer", "store"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.worker is not None:
        print(json.dumps(tokenizing(args.worker, args.repeats)))
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = prepared(folder, args)
        cores = [n for n in args.cores if n <= len(os.sched_getaffinity(0))]
        results = {
            "text": text,
            "loader": loading(Store.open(folder / STORE), args),
            "order": ordering(),
            "tokenizing": [on_cores(n, folder, args.repeats) for n in cores],
        }
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
    file = measuring.write("data", settings, results, args.json, argv=argv)
    print(section(json.loads(file.read_text(encoding="utf-8"))))
    print(f"written to {file}", file=sys.stderr)
    return 0 if all(one["same_ids"] for one in results["tokenizing"]) else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg = parser.add_argument
    arg("--source", default="builtin:python", help="as of `minilm data build` (default: builtin:python)")
    arg("--tokenizer", metavar="DIR", help="default: one is trained on the text")
    arg("--vocab-size", type=int, default=6400, help="of the tokenizer that is trained (default: 6400)")
    arg("--max-documents", type=int, metavar="N", help="the first ones of the source (default: all)")
    arg("--rows", type=int, nargs="+", default=[8, 128], help="of a batch of the loader (default: 8 128)")
    arg("--length", type=int, default=512, help="tokens of a row (default: 512)")
    arg("--tokens", type=int, default=4_000_000, help="that the loader gives in a turn (default: 4,000,000)")
    arg("--cores", type=int, nargs="+", default=[1, 2], help="for tokenizing (default: 1 2)")
    arg("--repeats", type=int, default=5, help="turns (default: 5)")
    arg("--quick", action="store_true", help="30 documents, one core, small batches")
    arg("--json", type=Path, metavar="FILE", help="default: benchmarks/results/data.json")
    arg("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ceiling_seconds = 0.01 if args.quick else 0.3
    if args.quick:
        args.vocab_size, args.max_documents, args.repeats = 400, 30, 2
        args.rows, args.length, args.tokens, args.cores = [4], 64, 20_000, [1]
    return args


def prepared(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Documents as JSON Lines, a tokenizer and a store of them, in `folder`; how much text it is."""
    texts, size = [], 0
    for document in parse_sources([args.source])[0].documents(MAX_DOCUMENT_BYTES, Position()):
        if isinstance(document, Document) and document.text and len(texts) != args.max_documents:
            texts.append(document.text)
            size += document.num_bytes
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / DOCUMENTS).write_text(lines, encoding="utf-8")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else Tokenizer.train(texts, args.vocab_size)
    tokenizer.save(folder / TOKENIZER)
    store = build(folder / STORE, [str(folder / DOCUMENTS)], tokenizer, validation_fraction=0.0).store
    tokens = sum(store.manifest["splits"][split]["tokens"] for split in SPLITS)
    return {
        "documents": len(texts),
        "bytes": size,
        "tokens": tokens,
        "vocabulary": tokenizer.num_tokens,
        "store_bytes": sum(file["size_bytes"] for file in files_of(store.manifest)),
    }


def loading(store: Store, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of the loader by kind of rows and rows of a batch, beside memory and the model that is fed."""
    runs: dict[str, Callable[[], object]] = {}
    tokens: dict[str, int] = {}
    weight = 0.0
    for kind in KINDS:
        rows = Rows(store, "train", args.length, kind)
        for count in args.rows:
            count = min(count, rows.rows_per_epoch)
            loader = Loader(rows, batch_rows=count, micro_batch=count, prefetch=0)
            steps = max(1, args.tokens // (count * args.length))
            name = f"{kind}, {count} rows"
            runs[name] = lambda loader=loader, steps=steps: [loader.step(s) for s in range(steps)]
            tokens[name] = steps * count * args.length
            batch = loader.step(0)[0]
            held = sum(x.nbytes for x in vars(batch).values() if isinstance(x, torch.Tensor))
            weight = max(weight, held / (count * args.length))
    seconds = measuring.interleaved(runs, args.repeats)
    memory = measuring.bandwidth("cpu", seconds=args.ceiling_seconds)
    flops = models.preset("original", "26m").training_flops_per_token(args.length)
    return {
        "tokens_per_second": {
            name: measuring.spread([tokens[name] / s for s in times]) for name, times in seconds.items()
        },
        "batch_bytes_per_token": weight,
        "memory_bytes_per_second": memory,
        # A batch is read once and written once at the least.
        "floor_tokens_per_second": memory / (weight + store.dtype.itemsize),
        "model_flops_per_token": flops,
        "most_tokens_per_second_eaten": measuring.ceiling(torch.float32, "cpu", seconds=args.ceiling_seconds)
        / flops,
    }


def ordering() -> dict[str, float]:
    """Seconds and memory of finding 128 rows somewhere in an epoch of a trillion."""
    places = np.arange(128) + EPOCH_ROWS // 3

    def find() -> None:
        Permutation(EPOCH_ROWS, 0, "epoch", 0)(places)

    seconds = measuring.interleaved({"order": find}, 50)["order"]
    tracemalloc.start()
    find()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {**measuring.spread(seconds), "peak_bytes": peak}


def on_cores(count: int, folder: Path, repeats: int) -> dict[str, Any]:
    """`tokenizing` in a process with that many cores: the library fixes its threads when it is first used."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--worker", str(folder), "--repeats", str(repeats)]
    own = sorted(os.sched_getaffinity(0))
    # Set here, before it starts: a thread of it keeps what its process had.
    os.sched_setaffinity(0, own[:count])
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    finally:
        os.sched_setaffinity(0, own)
    return {"cores": count, **json.loads(done.stdout.splitlines()[-1])}


def tokenizing(folder: Path, repeats: int) -> dict[str, Any]:
    """MB/s of text of each way, ratios to the library, seconds of parts of a build alone, and are the ids equal."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER / "tokenizer.json"))
    library.encode_special_tokens = True  # as in a build: a text that spells a special token is text
    tokenizer, source = Tokenizer.load(folder / TOKENIZER), parse_sources([str(folder / DOCUMENTS)])[0]
    documents = [d for d in source.documents(MAX_DOCUMENT_BYTES, Position()) if isinstance(d, Document)]
    texts = [document.text for document in documents]
    built: list[Store] = []

    def of_library(encode: Callable[..., Any]) -> Callable[[], list[list[int]]]:
        return lambda: [found.ids for found in encode(texts, add_special_tokens=False)]

    def anew() -> None:
        """A build into a folder of its own: one that is there already would only be opened."""
        place = tempfile.mkdtemp(dir=folder)
        found = build(Path(place) / STORE, [source.place], tokenizer, validation_fraction=0.0)
        assert not found.reused
        built.append(found.store)

    ways: dict[str, Callable[[], Any]] = {
        LIBRARY[0]: of_library(library.encode_batch),
        "Tokenizer.encode_batch": lambda: [tokenizer.encode_batch(texts[a:b]) for a, b in batches(documents)],
        LIBRARY[1]: of_library(library.encode_batch_fast),
        "minilm data build": anew,
    }
    seconds = measuring.interleaved(ways, repeats)
    size = sum(document.num_bytes for document in documents) / 1e6
    begins = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    expected = {(*begins, *ids, tokenizer.eos_id) for ids in ways[LIBRARY[0]]()}
    ours = ("Tokenizer.encode_batch", "minilm data build")
    return {
        "megabytes_per_second": {
            name: measuring.spread([size / s for s in times]) for name, times in seconds.items()
        },
        "ratio": {
            name: {to: measuring.paired(seconds[to], seconds[name]) for to in LIBRARY} for name in ours
        },
        "alone_seconds": _alone(source, built[-1]),
        "build_seconds": measuring.spread(seconds["minilm data build"]),
        "same_ids": expected == stored(built[-1]),
    }


def batches(documents: list[Document]) -> Iterator[tuple[int, int]]:
    """First and end (exclusive) of runs of documents of about BATCH_BYTES, as a build encodes them."""
    first, size = 0, 0
    for place, document in enumerate(documents, 1):
        size += document.num_bytes
        if size >= BATCH_BYTES or place == len(documents):
            yield first, place
            first, size = place, 0


def stored(store: Store) -> set[tuple[int, ...]]:
    """The documents of a store as ids. A build drops what occurs twice, and so does a set."""
    shards = [
        shard
        for split in SPLITS
        if store.manifest["splits"][split]["documents"]
        for shard in store.shards(split)
    ]
    return {tuple(shard.document(k).tolist()) for shard in shards for k in range(shard.num_documents)}


def _alone(source: Any, store: Store) -> dict[str, float]:
    """What a build does beside encoding, done alone: seconds of the quicker of two times."""
    files = [store.path / file["path"] for file in files_of(store.manifest)]
    works: dict[str, Callable[[], object]] = {
        "reading, checking and hashing documents": lambda: list(
            source.documents(MAX_DOCUMENT_BYTES, Position())
        ),
        "checksums of the files": lambda: [checksum(path) for path in files],
        "opening the finished store": lambda: Store.open(store.path),
    }
    found = {}
    for name, work in works.items():
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        found[name] = min(times)
    return found


def section(record: dict[str, Any]) -> str:
    """The Markdown of docs/performance.md that these results are."""
    results = record["results"]
    blocks = ["## Data", _answer(results), *_loader(results["loader"], results["order"])]
    blocks += _tokenizing(results["text"], results["tokenizing"])
    wrong = [str(one["cores"]) for one in results["tokenizing"] if not one["same_ids"]]
    blocks.append(
        f"**The ids in the store differ from the library's ({', '.join(wrong)} cores).**"
        if wrong
        else "The documents in the store are, id by id, those of the library alone."
    )
    return "\n\n".join([*blocks, f"```\n{record['command']}\n```"]) + "\n"


def _answer(results: dict[str, Any]) -> str:
    loader = results["loader"]
    slowest = min(found["median"] for found in loader["tokens_per_second"].values())
    said = [
        f"One thread of the loader gives at least {slowest / 1e6:,.1f} million tokens/s, enough for a device that does "
        f"{slowest * loader['model_flops_per_token'] / 1e12:,.0f} TFLOP/s of a 26M model"
    ]
    for one in results["tokenizing"]:
        usual, fastest = (one["ratio"]["minilm data build"][name]["median"] for name in LIBRARY)
        said.append(
            f"a whole build on {one['cores']} core(s) runs at {fastest:.0%} of the fastest call of the `tokenizers` "
            f"library alone, at {usual:.0%} of its usual one"
        )
    return "; ".join(said) + "."


def _loader(found: dict[str, Any], order: dict[str, float]) -> list[str]:
    floor = found["floor_tokens_per_second"]
    rows = [
        [name, measuring.told(speed, ",.1f", 1e-6), f"{speed['median'] / floor:.0%}"]
        for name, speed in found["tokens_per_second"].items()
    ]
    fed = (
        min(speed["median"] for speed in found["tokens_per_second"].values()) * found["model_flops_per_token"]
    )
    return [
        "### Loader",
        measuring.table(["rows", "million tokens/s", "of the floor"], rows),
        f"Floor: a batch has {found['batch_bytes_per_token']:.0f} bytes per token, and memory is copied at "
        f"{found['memory_bytes_per_second'] / 1e9:.1f} GB/s (read and written), so {floor / 1e6:,.0f} million "
        "tokens/s if nothing were computed. At the slowest of these speeds one process feeds a device that does "
        f"{fed / 1e12:,.0f} TFLOP/s of a 26M model. The order of an epoch is computed where it is needed: "
        f"128 rows of an epoch of {EPOCH_ROWS:,} take {1e6 * order['median']:,.0f} µs and "
        f"{order['peak_bytes'] / 1e3:,.0f} kB.",
    ]


def _tokenizing(text: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    head = ["way", *(f"{one['cores']} core(s): MB/s" for one in found)]
    rows = [
        [name, *(measuring.told(one["megabytes_per_second"][name]) for one in found)]
        for name in found[0]["megabytes_per_second"]
    ]
    blocks = [
        "### Tokenizing and building",
        f"{text['documents']:,} documents, {text['bytes'] / 1e6:,.1f} MB, a vocabulary of {text['vocabulary']:,}. The "
        "floor of a build is the library's own speed (ids as Python lists, which is the only way to get them).",
        measuring.table(head, rows),
    ]
    rows = [
        [f"{ours} to {to}", *(measuring.told(one["ratio"][ours][to], ".3f") for one in found)]
        for ours, theirs in found[0]["ratio"].items()
        for to in theirs
    ]
    blocks.append(measuring.table(["speed of", *(f"{one['cores']} core(s)" for one in found)], rows))
    names = list(found[0]["alone_seconds"])
    rows = [[name, *(f"{one['alone_seconds'][name]:.3f}" for one in found)] for name in names]
    rows.append(["a whole build", *(measuring.told(one["build_seconds"]) for one in found)])
    head = ["done alone", *(f"{one['cores']} core(s): seconds" for one in found)]
    return [*blocks, measuring.table(head, rows)]


if __name__ == "__main__":
    sys.exit(main())
