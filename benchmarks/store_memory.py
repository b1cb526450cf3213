"""Peak memory and speed of `minilm data build` for corpora of growing size. Run by hand; takes minutes.

    python benchmarks/store_memory.py --megabytes 100 300 1000 --folder /tmp/store_memory

Texts are random sentences of a fixed vocabulary (Zipf), in JSON Lines, about 2 kB a document. Each size is built in
a process of its own, whose peak resident memory is reported, and the rate is held against the `tokenizers` library
alone encoding the same texts (`encode_batch` on lists that are in memory already). Results go to
store_memory.json beside this file with --save. What may grow with the corpus is the set of documents seen: 16 to
32 bytes per document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from minilm.data.tokenizer import Tokenizer

_WORDS_PER_DOCUMENT = 330


def write_corpus(path: Path, megabytes: int) -> int:
    """About that much text; the number of documents."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters, draw.integers(2, 11))) for _ in range(30_000)]
    frequency = 1 / np.arange(1, len(words) + 1)
    written = documents = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            chosen = draw.choice(len(words), (1000, _WORDS_PER_DOCUMENT), p=frequency / frequency.sum())
            for row in chosen.tolist():
                text = " ".join(words[i] for i in row).capitalize() + "."
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                documents += 1
    return documents


def build_here(out: str, corpus: str, tokenizer: str) -> None:
    """In a child process: build, print seconds and peak memory."""
    from minilm.data.build import build

    loaded = Tokenizer.load(tokenizer)
    loaded.encode("warm up")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built = build(out, [corpus], loaded)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": built.seconds, "before_mb": before / 1024, "peak_mb": peak / 1024}))


def library_rate(corpus: Path, tokenizer: Tokenizer, num_bytes: float = 30e6) -> float:
    """MB/s of the library alone on the beginning of the corpus, in batches of 1 MB, best of three."""
    texts, size = [], 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size > num_bytes:
                break
    batches = [texts[i : i + 512] for i in range(0, len(texts), 512)]
    rates = []
    for _ in range(3):
        began = time.monotonic()
        for batch in batches:
            tokenizer.hf.backend_tokenizer.encode_batch(batch, add_special_tokens=False)
        rates.append(size / 1e6 / (time.monotonic() - began))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument(
        "--folder", type=Path, default=Path("store_memory"), help="for corpora and stores; removed"
    )
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        build_here(*arguments.child)
        return
    arguments.folder.mkdir(parents=True)
    results = []
    try:
        for megabytes in arguments.megabytes:
            corpus, folder = (
                arguments.folder / f"{megabytes}.jsonl",
                arguments.folder / f"tokenizer{megabytes}",
            )
            documents = write_corpus(corpus, megabytes)
            with corpus.open(encoding="utf-8") as file:
                sample = [json.loads(next(file))["text"] for _ in range(2000)]
            tokenizer = Tokenizer.train(sample, 6400)
            tokenizer.save(folder)
            plain = library_rate(corpus, tokenizer)
            words = ["--child", str(arguments.folder / f"store{megabytes}"), str(corpus), str(folder)]
            child = subprocess.run(
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
            )
            measured = json.loads(child.stdout)
            rate = corpus.stat().st_size / 1e6 / measured["seconds"]
            results.append(
                {
                    "megabytes": megabytes,
                    "documents": documents,
                    **measured,
                    "mb_per_s": rate,
                    "library_mb_per_s": plain,
                }
            )
            print(json.dumps(results[-1]), flush=True)
            corpus.unlink()
            shutil.rmtree(arguments.folder / f"store{megabytes}")
    finally:
        shutil.rmtree(arguments.folder)
    if arguments.save:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
        out = Path(__file__).with_suffix(".json")
        out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
