"""Train a language model: `python train.py --help` shows how. The command itself is minilm/cli/train.py."""

from __future__ import annotations

import sys

from minilm.cli import train


def main(argv: list[str]) -> int:
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
