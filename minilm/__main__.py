"""`minilm ...` (the same as `python -m minilm ...`): all commands."""

from __future__ import annotations

import importlib
import pkgutil
import sys

from minilm import __version__, cli


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the subcommand, return the exit code."""
    frame = cli.parser(__doc__ or "", prog="minilm")
    frame.add_argument("--version", action="version", version=f"minilm {__version__}")
    subparsers = frame.add_subparsers(metavar="COMMAND", required=True)
    for found in sorted(pkgutil.iter_modules(cli.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"minilm.cli.{found.name}")
        if hasattr(module, "add"):  # the others hold what several commands share
            module.add(subparsers)
    arguments, further = frame.parse_known_args(argv)
    if hasattr(arguments, "settings"):  # of `train`, whose settings are flags of any name
        arguments.settings = further
    elif further:
        frame.error(f"unrecognized arguments: {' '.join(further)}")
    return cli.guarded(lambda: arguments.run(arguments), debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
