"""`minilm tokenizer`: train a byte-level BPE tokenizer, and see how well one fits a text."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from minilm.errors import DataError

_TRAIN = """\
Train a byte-level BPE tokenizer: any text can be written with it and comes back unchanged.
The folder is one that transformers' AutoTokenizer reads. Sources are those of `minilm data build`.
Documents that a store of the same sources holds out for validation are not used.

  minilm tokenizer train --source builtin:python --vocab-size 6400 --out tokenizers/python
"""


_MADE_FROM = "made_from.txt"  # in the tokenizer's folder: a digest of sources and settings


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to those of `minilm`."""
    raw = argparse.RawDescriptionHelpFormatter
    tokenizer = subparsers.add_parser("tokenizer", help="train a tokenizer, look at one", description=__doc__)
    commands = tokenizer.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train", help="sources to a tokenizer", description=_TRAIN, formatter_class=raw
    )
    train.add_argument(
        "--source", action="append", required=True, metavar="SOURCE", help="may be given several times"
    )
    train.add_argument("--out", required=True, metavar="DIR", help="folder of the tokenizer")
    train.add_argument(
        "--vocab-size", type=int, default=6400, help="tokens, special ones included (default 6400)"
    )
    train.add_argument(
        "--max-megabytes",
        type=float,
        default=200.0,
        help="of larger sources a part of about this size is used, taken evenly (default 200)",
    )
    train.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="as given to `minilm data build` (same default)",
    )
    train.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="as for `minilm data build`"
    )
    train.add_argument("--force", action="store_true", help="replace another tokenizer of this name")
    train.set_defaults(run=_train)

    info = commands.add_parser("info", help="size, special tokens, bytes per token")
    info.add_argument("tokenizer", metavar="DIR", help="tokenizer folder, or hf:NAME")
    info.add_argument(
        "--source", action="append", default=[], metavar="SOURCE", help="measure the compression on it"
    )
    info.add_argument("--text", help="show how this text is cut")
    info.set_defaults(run=_info)


def _train(args: argparse.Namespace) -> None:
    from minilm.data.build import default_fraction
    from minilm.data.sources import parse_sources
    from minilm.data.tokenizer import Tokenizer

    began, out = time.monotonic(), Path(args.out)
    sources = parse_sources(args.source)
    if sources[0].kind == "synthetic":
        raise DataError(f"{sources[0].place} has token ids and no text: it needs no tokenizer.")
    size = sum(source.size_bytes for source in sources)
    held_out = args.validation_fraction if args.validation_fraction is not None else default_fraction(size)
    made_from = _digest(sources, args, held_out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not (out / "tokenizer.json").is_file():
            raise DataError(
                f"{out} exists and is not a tokenizer folder: choose another name, or remove it yourself."
            )
        mark = out / _MADE_FROM
        if not args.force and mark.is_file() and mark.read_text(encoding="utf-8").strip() == made_from:
            print(f"{out}: there already, from the same sources with the same settings")
            return
        if not args.force:
            raise DataError(
                f"The tokenizer {out} exists, from other sources or settings: choose another name, or replace it with "
                "--force."
            )
        mark.unlink(missing_ok=True)
    texts = _Texts(sources, held_out, args.max_megabytes * 1e6, skip_bad=args.on_bad_line == "skip")
    tokenizer = Tokenizer.train(texts, args.vocab_size, show_progress=sys.stderr.isatty())
    tokenizer.save(out)
    (out / _MADE_FROM).write_text(
        made_from + "\n", encoding="utf-8"
    )  # last: it says that the folder is whole
    amount = f"{texts.num_documents} documents, {texts.num_bytes / 1e6:.1f} MB"
    print(f"{out}: {tokenizer.num_tokens} tokens from {amount}, in {time.monotonic() - began:.1f} s")
    if texts.bad:
        print(f"{len(texts.bad)} bad documents passed over; the first:")
        for line in texts.bad[:10]:
            print(f"  {line}")
    if tokenizer.num_tokens < args.vocab_size:
        print(
            f"The text has no more pairs to merge: {tokenizer.num_tokens} tokens instead of {args.vocab_size}."
        )


def _digest(sources: list, args: argparse.Namespace, held_out: float) -> str:
    """What decides the tokenizer: the files (by size and time) and the settings."""
    settings = [args.vocab_size, args.max_megabytes, args.on_bad_line, held_out]
    settings += [{"weight": source.weight, **source.identity()} for source in sources]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


class _Texts:
    """The texts to train on; iterating reads them and counts."""

    def __init__(self, sources: list, held_out: float, limit_bytes: float, *, skip_bad: bool) -> None:
        self.sources, self.held_out, self.limit_bytes, self.skip_bad = (
            sources,
            held_out,
            limit_bytes,
            skip_bad,
        )
        self.size = sum(source.size_bytes for source in sources)
        self.num_documents = self.num_bytes = 0
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[str]:
        from minilm.data.documents import MAX_DOCUMENT_BYTES, BadDocument, Position, in_sample, in_validation
        from minilm.data.progress import progress

        # By a hash, so that the part is taken evenly from all sources; at least the limit where sizes are known.
        share = min(1.0, self.limit_bytes / self.size) if self.size else 1.0
        position = Position()
        with progress("reading", self.size) as advance:
            for source in self.sources:
                for document in source.documents(MAX_DOCUMENT_BYTES, position):
                    if isinstance(document, BadDocument):
                        if not self.skip_bad:
                            raise DataError(
                                f"Bad document, {document}. Repair it, or use `--on-bad-line skip`."
                            )
                        self.bad.append(str(document))
                    elif not in_validation(document.key, self.held_out) and in_sample(document.key, share):
                        self.num_documents += 1
                        self.num_bytes += document.num_bytes
                        advance(position.done_bytes, f"{self.num_documents} documents")
                        yield document.text
                    if self.num_bytes >= 2 * self.limit_bytes:
                        return  # compressed or streamed: larger than it seemed


def _info(args: argparse.Namespace) -> None:
    from minilm.data.documents import MAX_DOCUMENT_BYTES, Document
    from minilm.data.sources import parse_sources
    from minilm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    print(f"{args.tokenizer}: {tokenizer.num_tokens} tokens, fingerprint {tokenizer.fingerprint}")
    for name in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{name}_id")
        print(f"  {name}  {'none' if token is None else f'{token} {tokenizer.token_name(token)}'}")
    print(
        f"  lossless  {'yes: any text comes back unchanged' if tokenizer.lossless else 'NO: it alters some texts'}"
    )
    try:
        lengths = tokenizer.byte_lengths
        print(f"  bytes per token of the vocabulary  mean {lengths.mean():.2f}, longest {int(lengths.max())}")
    except DataError as error:
        print(f"  {error}")
    if args.text is not None:
        print("  " + " | ".join(repr(tokenizer.decode([i])) for i in tokenizer.encode(args.text)))
    for source in parse_sources(args.source) if args.source else []:
        texts = [
            d.text for d in _first(source.documents(MAX_DOCUMENT_BYTES), 20e6) if isinstance(d, Document)
        ]
        if not texts:
            raise DataError(f"{source.place} has no documents.")
        began = time.monotonic()
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        seconds, num_bytes = time.monotonic() - began, sum(len(t.encode()) for t in texts)
        print(
            f"  {source.name}: {len(texts)} documents, {num_bytes / 1e6:.2f} MB, {num_tokens:,} tokens, "
            f"{num_bytes / num_tokens:.3f} bytes per token; {num_bytes / 1e6 / seconds:.1f} MB/s"
        )


def _first(documents: Iterator, num_bytes: float) -> Iterator:
    """Documents up to about this many bytes: enough to measure on."""
    total = 0
    for document in documents:
        yield document
        total += getattr(document, "num_bytes", 0)
        if total >= num_bytes:
            return
