"""Score a checkpoint: `python eval.py --help` shows how. The command itself is minilm/cli/eval.py."""

from __future__ import annotations

import sys

from minilm.cli import eval as command


def main(argv: list[str]) -> int:
    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
