"""`minilm.evaluate`, and what eval.py does: a model and data in, scores and a report out."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilm.alignment import Batch
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError, MinilmError, listed
from minilm.evaluation.heldout import HeldOut, How, TextList, open_held_out
from minilm.evaluation.material import Material
from minilm.evaluation.mode import context_tokens
from minilm.evaluation.overlap import Overlapping, overlap_with
from minilm.evaluation.page import page
from minilm.evaluation.report import Asked, Report, add_continuations, add_samples, begin_report, print_report
from minilm.evaluation.scored import Scored, score_batches, score_held_out
from minilm.evaluation.text import byte_lengths_of
from minilm.manifest import UNCHECKED, unchecked
from minilm.opening import FROM_ELSEWHERE, as_model, open_model
from minilm.run import Loaded


def evaluate(
    model: nn.Module | str | Path,
    data: str | Path | Iterable[str] | Iterable[Batch],
    *,
    tokenizer: Tokenizer | None = None,
    split: str = "validation",
    sequence_length: int | None = None,
    rows: str | None = None,
    batch_rows: int | None = None,
    precision: str = "fp32",
    device: str | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> Scored:
    """Teacher-forced scores of a model on data: the numbers of eval.py.

        minilm.evaluate("runs/first", "held_out.jsonl").loss
        minilm.evaluate(model, ["a text", "another"], tokenizer=tokenizer).bits_per_byte
        minilm.evaluate(model, batches).scores.intervals

    model            a model of ours, a transformers causal LM, or a place: run folder, checkpoint, Hugging Face folder
    data             a place (a store, or texts as `minilm data build` reads them), texts, or `Batch`es
    tokenizer        of the model; a place brings its own. Without one only batches and stores of token ids are scored
    split            of a store
    sequence_length  tokens of context (default: those of the run, or the model's). Not for batches
    rows             "packed" or "document": how a store's documents lie in rows (default: as in the run, or packed)
    batch_rows       rows that are computed together: changes the speed, not the numbers. Not for batches
    precision        "fp32": the type of the parameters; "bf16": autocast
    device           where a model that is given as a place is put (default: cpu)
    skip_bad         leave out bad lines of a file (they are listed in `excluded`) in place of DataError

    Under several processes each one calls this and gets the same result. Of a place or of texts every process is given
    all and scores its part; of batches each gives its own, disjoint ones. The model's mode and all random states
    are afterwards as before. Raises ConfigError, DataError, CheckpointError; CheckFailed if the loss is not finite.
    """
    loaded = None
    if isinstance(model, str | Path):
        loaded = open_model(model, device=device or "cpu")
        tokenizer = tokenizer or loaded.tokenizer
    net = as_model(model) if loaded is None else loaded.model  # type: ignore[arg-type]
    how = How(batch_rows, precision, progress)
    found: Any = data
    if not isinstance(data, str | Path):
        stream = iter(data)
        first = next(stream, None)
        if first is None:
            raise DataError("There is nothing to score: no texts and no batches.")
        found = itertools.chain([first], stream)
        if isinstance(first, Batch):
            lengths = None if tokenizer is None else byte_lengths_of(tokenizer)
            return score_batches(net, found, byte_lengths=lengths, precision=precision)
    length, kind = _lengths(net, loaded, sequence_length)
    if not isinstance(data, str | Path):
        held_out: HeldOut = TextList(list(found), tokenizer, length)
    else:
        held_out = open_held_out(
            str(data),
            net,
            tokenizer,
            split=split,
            sequence_length=length,
            rows=rows or kind,
            skip_bad=skip_bad,
        )
    return score_held_out(net, held_out, how)


def run(arguments: argparse.Namespace, parts: Sequence[Any]) -> int:
    """eval.py, from its flags to its exit code: 0, 1 a section failed, 2 a part is missing, 130 interrupted.

    parts   modules that answer further questions (minilm/evaluation/material.py)
    """
    _refuse_wrong_use(arguments, parts)
    with _processes(arguments.device) as state:
        loaded = open_model(
            arguments.checkpoint,
            device=str(state.device),
            weights=arguments.weights,
            knowledge=arguments.store,
            trust_remote_code=arguments.trust_remote_code,
        )
        material = _material(arguments, loaded, is_main=state.is_main_process)
        training = Store.open(arguments.overlap_with) if arguments.overlap_with else None
        asked = Asked(
            prompt_lengths=arguments.prompt_lengths,
            continuation_tokens=arguments.continuation_tokens,
            continuation_documents=arguments.continuation_documents,
            samples=arguments.samples,
        )
        asked.checked_lengths(loaded.model)
        report, scored = begin_report(material, about=_about(arguments, loaded, str(state.device)))
        if arguments.per_document:
            report.documents = scored.document_records()
        stages = [
            ("continuations", lambda: add_continuations(report, material, asked)),
            ("samples", lambda: add_samples(report, material, asked)),
        ]
        if training is not None:
            stages.insert(0, ("overlap", lambda: _add_overlap(report, material, scored, training)))
        stages += [(_name(part), _adds(report, part, arguments, material)) for part in parts]
        try:
            code = _carry_out(report, stages)
        finally:  # whatever happened: what was computed is not lost
            if state.is_main_process:
                _put_out(report, arguments)
    return code or (1 if report.failed else 0)


def _carry_out(report: Report, stages: Sequence[tuple[str, Callable[[], None]]]) -> int:
    """Each stage in turn; what one has found is kept, whatever becomes of the next."""
    code = 0
    for number, (name, stage) in enumerate(stages):
        try:
            stage()
        except MinilmError as error:
            report.missing[name] = f"{type(error).__name__}: {error}"
            code = 2
        except KeyboardInterrupt:
            report.missing |= dict.fromkeys((later for later, _ in stages[number:]), "interrupted")
            return 130
        except BaseException as error:
            why = f"stopped by {type(error).__name__}"
            report.missing |= dict.fromkeys((later for later, _ in stages[number:]), why)
            raise
    return code


def _put_out(report: Report, arguments: argparse.Namespace) -> None:
    """Files first: a terminal that is closed may not lose them."""
    if arguments.json:
        report.write(arguments.json)
        print(f"wrote {arguments.json}", file=sys.stderr)
    if arguments.html:
        aside = arguments.html.with_name(f".{arguments.html.name}.part")
        aside.write_text(page(report), encoding="utf-8")
        aside.replace(arguments.html)
        print(f"wrote {arguments.html}", file=sys.stderr)
    print_report(report)
    for part, why in report.missing.items():
        print(f"{part} is missing: {why}", file=sys.stderr)


def _adds(report: Report, part: Any, arguments: argparse.Namespace, material: Material) -> Callable[[], None]:
    return lambda: report.sections.extend(part.sections(arguments, material))


def _name(part: Any) -> str:
    return str(part.__name__).rpartition(".")[2]


def _add_overlap(report: Report, material: Material, scored: Scored, store: Store) -> None:
    shared = overlap_with(material.held_out, store, progress=material.how.progress)
    report.sections.append(
        Overlapping.of(scored.documents, shared, material.held_out, str(store.path)),
    )
    if report.documents is not None:
        for record in report.documents:
            number = record["document"]
            record["num_words"] = int(shared.words[number])
            record["num_words_in_shared_runs"] = int(shared.covered[number])


def _material(arguments: argparse.Namespace, loaded: Loaded, *, is_main: bool) -> Material:
    length, kind = _lengths(loaded.model, loaded, arguments.sequence_length)
    held_out = open_held_out(
        arguments.data or _data_of_run(loaded),
        loaded.model,
        loaded.tokenizer,
        split=arguments.split,
        sequence_length=length,
        rows=kind,
        skip_bad=arguments.on_bad_line == "skip",
    )
    return Material(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        held_out=held_out,
        how=How(arguments.batch_rows, arguments.precision, progress=is_main),
        folder=loaded.folder,
        run_folder=loaded.run_folder,
        config=loaded.config,
        is_main=is_main,
    )


def _lengths(model: nn.Module, loaded: Loaded | None, asked: int | None) -> tuple[int, str]:
    """Sequence length and kind of rows: as asked for, else as the run has them, else the model's context, packed."""
    of_run = loaded.config.data if loaded is not None and loaded.config is not None else None
    length = asked if asked is not None else of_run.sequence_length if of_run else context_tokens(model)
    if length is None:
        raise ConfigError("This model does not say how long its context is: give a sequence length.")
    return length, of_run.rows if of_run else "packed"


def _about(arguments: argparse.Namespace, loaded: Loaded, device: str) -> dict[str, Any]:
    from minilm import __version__

    config = getattr(loaded.model, "config", None)
    return {
        "checkpoint": str(loaded.folder),
        **({} if loaded.step == FROM_ELSEWHERE else {"step": loaded.step, "weights": arguments.weights}),
        **({"checks": UNCHECKED} if unchecked(loaded.run_folder) else {}),
        "model": getattr(config, "name", type(loaded.model).__name__),
        "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "device": device,
        "minilm": __version__,
        "torch": torch.__version__,
    }


@contextmanager
def _processes(device: str) -> Iterator[Any]:
    """Accelerate's view of the processes; the group ends with it, unless the caller had made it."""
    from accelerate import PartialState

    joined = torch.distributed.is_initialized()
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield state
    finally:
        if not joined:
            state.destroy_process_group()


def _refuse_wrong_use(arguments: argparse.Namespace, parts: Sequence[Any]) -> None:
    problems = []
    for flag in ("json", "html"):
        file = getattr(arguments, flag)
        if file and not file.absolute().parent.is_dir():
            problems.append(f"--{flag}: there is no folder {file.absolute().parent}.")
        elif file and file.is_dir():
            problems.append(f"--{flag}: {file} is a folder, not a file.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda was asked for, but torch sees no GPU here.")
    if arguments.batch_rows is not None and arguments.batch_rows < 1:
        problems.append(f"--batch-rows is {arguments.batch_rows}; it must be at least 1.")
    if arguments.per_document and not arguments.json:
        problems.append("--per-document writes into the JSON file: name one with --json.")
    for part in parts:
        problems += part.problems(arguments) if hasattr(part, "problems") else []
    if problems:
        raise ConfigError(listed(problems))


def _data_of_run(loaded: Loaded) -> str:
    """What the run holds out."""
    if loaded.config is None:
        raise ConfigError(f"{loaded.folder} does not lie in a run folder: say what to score with --data.")
    of_run = loaded.config.data
    if of_run.validation_store:
        return of_run.validation_store
    # Held-out documents of a store that was rebuilt may have been trained on.
    if Store.open(of_run.store).fingerprint != loaded.store_fingerprint:
        raise DataError(
            f"{of_run.store} is not the store that the checkpoint was trained on: it was built again with other "
            "documents or settings, and what it holds out may be what was learnt. Name it with --data to score it all "
            "the same."
        )
    return of_run.store
