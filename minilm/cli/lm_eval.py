"""`minilm lm-eval`: lm-evaluation-harness with our checkpoints as its model `minilm`."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

DESCRIPTION = """\
The command line of lm-evaluation-harness, which also knows the model `minilm`. All its flags are as they are there;
`minilm lm-eval run --help` lists them.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand. Everything after its name belongs to the harness, options too."""
    sub = subparsers.add_parser(
        "lm-eval",
        help="lm-evaluation-harness with our checkpoints (--model minilm)",
        description=DESCRIPTION,
        add_help=False,
        prefix_chars="\0",  # no argument looks like an option of ours
    )
    sub.add_argument("arguments", nargs="*")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Register the model, then let the harness read its command line and do its work.

    Raises ConfigError where it is not installed, and for settings that mean nothing to a model of ours.
    """
    from minilm.evaluation.tasks.harness import NAME, check_installed

    check_installed()
    import lm_eval.models  # noqa: F401  (registers the harness's own: it looks for them only while it knows no model)
    import torch
    from accelerate import PartialState
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    joined = torch.distributed.is_initialized()
    model_registry.register(NAME, target=_model())
    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", *(arguments.arguments or ["--help"])]
    try:
        command = HarnessCLI()
        command.execute(command.parse_args())
    finally:
        sys.argv = before
        if not joined and torch.distributed.is_initialized():
            PartialState().destroy_process_group()
    return 0


@functools.cache
def _model() -> type:
    """The class that is registered: one for a process, since the registry takes a name once."""
    from minilm.evaluation.tasks.harness import model_class

    return model_class(_load)


def _load(
    checkpoint: str, *, device: str | None, weights: Any, store: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """(model, tokenizer), on the device of this process."""
    import torch
    from accelerate import PartialState

    from minilm.opening import open_model

    # The harness asks for cuda:0 where nobody said anything, so that is no wish of the user's.
    cuda = torch.cuda.is_available()
    state = PartialState(cpu=device == "cpu" or not cuda)
    place = str(state.device) if not cuda or device is None or state.num_processes > 1 else device
    loaded = open_model(
        checkpoint, device=place, weights=weights, knowledge=store, trust_remote_code=trust_remote_code
    )
    return loaded.model, loaded.tokenizer
