"""Score a checkpoint: loss, perplexity, bits per byte, continuations by prompt length, samples.

    python eval.py --checkpoint runs/first
    python eval.py --checkpoint runs/first --data held_out.jsonl --json scores.json
    accelerate launch --num_processes 2 eval.py --checkpoint runs/first

Without --data the store that the run was trained on is used. Rows of a store are scored exactly as training
validates on them; texts of a file as whole documents, longer ones in rolling windows. The numbers do not
depend on the number of processes or on --batch-rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minilm import cli

if TYPE_CHECKING:
    from minilm.run import Loaded


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__ or "", prog="eval.py")
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run folder (its newest checkpoint) or a checkpoint",
    )
    add(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="those of the last step, or their moving average (train.ema_decay); default: last",
    )
    add(
        "--store",
        metavar="DIR",
        help="knowledge store to read in place of the one that the model was trained with",
    )
    add(
        "--data",
        metavar="PLACE",
        help="a store, or texts as `minilm data build` reads them (jsonl, txt, folder)",
    )
    add("--split", default="validation", help="split of a store (default: validation)")
    add(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens of context (default: the run's, or the model's)",
    )
    add(
        "--prompt-lengths",
        type=_lengths,
        metavar="16,64,128",
        help="prompts, in tokens, to score continuations of",
    )
    add(
        "--continuation-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens of a continuation (default: 64)",
    )
    add(
        "--continuation-documents",
        type=int,
        default=512,
        metavar="N",
        help="documents for this (default: 512)",
    )
    add("--samples", type=int, default=3, metavar="N", help="samples to show (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--batch-rows", type=int, metavar="N", help="rows computed together; changes speed, not numbers")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the computation (default: fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    add("--on-bad-line", choices=("error", "skip"), default="error", help="of a text file (default: error)")
    arguments = parser.parse_args(argv)
    return cli.guarded(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from accelerate import PartialState

    from minilm.evaluation.heldout import How, open_held_out
    from minilm.evaluation.mode import context_tokens
    from minilm.evaluation.report import Asked, make_report, print_report
    from minilm.manifest import UNCHECKED, unchecked
    from minilm.run import load_checkpoint

    _refuse_wrong_use(arguments, cuda=torch.cuda.is_available())
    joined = torch.distributed.is_initialized()  # by the caller, who then also ends it
    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    try:
        loaded = load_checkpoint(
            arguments.checkpoint,
            device=str(state.device),
            weights=arguments.weights,
            knowledge=arguments.store,
        )
        of_run = None if loaded.config is None else loaded.config.data
        length = arguments.sequence_length
        if length is None:
            length = of_run.sequence_length if of_run else context_tokens(loaded.model)
        report = make_report(
            loaded.model,
            loaded.tokenizer,
            open_held_out(
                _data(arguments, loaded),
                loaded.model,
                loaded.tokenizer,
                split=arguments.split,
                sequence_length=length,
                rows=of_run.rows if of_run else "packed",
                skip_bad=arguments.on_bad_line == "skip",
            ),
            Asked(
                prompt_lengths=arguments.prompt_lengths,
                continuation_tokens=arguments.continuation_tokens,
                continuation_documents=arguments.continuation_documents,
                samples=arguments.samples,
            ),
            How(arguments.batch_rows, arguments.precision, progress=state.is_main_process),
            about={
                "checkpoint": str(loaded.folder),
                "step": loaded.step,
                **({"checks": UNCHECKED} if unchecked(loaded.run_folder) else {}),
                "weights": arguments.weights,
                "device": str(state.device),
            },
        )
        if state.is_main_process:
            print_report(report)
            if arguments.json:
                report.write(arguments.json)
                print(f"wrote {arguments.json}", file=sys.stderr)
    finally:
        if not joined:
            state.destroy_process_group()
    return 0


def _refuse_wrong_use(arguments: argparse.Namespace, *, cuda: bool) -> None:
    from minilm.errors import ConfigError, listed

    problems = []
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        problems.append(f"--json: there is no folder {arguments.json.absolute().parent}.")
    if arguments.device == "cuda" and not cuda:
        problems.append("--device cuda was asked for, but torch sees no GPU here.")
    if arguments.batch_rows is not None and arguments.batch_rows < 1:
        problems.append(f"--batch-rows is {arguments.batch_rows}; it must be at least 1.")
    if problems:
        raise ConfigError(listed(problems))


def _data(arguments: argparse.Namespace, loaded: Loaded) -> str:
    """The place of what is scored: what was asked for, or what the run holds out."""
    from minilm.errors import ConfigError

    if arguments.data:
        return arguments.data
    if loaded.config is None:
        raise ConfigError(f"{loaded.folder} does not lie in a run folder: say what to score with --data.")
    of_run = loaded.config.data
    if of_run.validation_store:
        return of_run.validation_store
    _refuse_another_store(of_run.store, loaded.store_fingerprint)
    return of_run.store


def _refuse_another_store(store: str, fingerprint: str) -> None:
    """Held-out documents of a store that was rebuilt may have been trained on."""
    from minilm.data.store import Store
    from minilm.errors import DataError

    if Store.open(store).fingerprint != fingerprint:
        raise DataError(
            f"{store} is not the store that the checkpoint was trained on: it was built again with other documents or "
            "settings, and what it holds out may be what was learnt. Name it with --data to score it all the same."
        )


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 16,64,128") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
