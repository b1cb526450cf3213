"""Train a language model.

    python train.py --config run_file/quickstart.yaml --optim.learning_rate=3e-4
    accelerate launch --config_file run_file/accelerate/zero2.yaml train.py --config FILE --section.key=value
    python train.py --config FILE --resume
    python train.py --config FILE --run.name=second --init-from runs/first
    python train.py --config FILE --dry-run
    python train.py --config FILE --profile 10:13

Settings come from defaults, then the file, then the flags. --help lists all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from minilm import cli


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__ or "", prog="train.py", add_help=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings, or a run folder")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="begin with the weights of a run, a checkpoint or a Hugging Face folder (train.init_from)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be trained, with its memory, and stop"
    )
    parser.add_argument(
        "--profile", metavar="STEPS", help="write where the time and memory of these steps go (10:13 or 10)"
    )
    parser.add_argument(
        "--check",
        choices=("quick", "off"),
        help="the doctor's checks before the first step (doctor.check; default: quick)",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page with all settings")
    arguments, settings = parser.parse_known_args(argv)
    if arguments.help:
        from minilm.cli.settings import print_settings

        parser.print_help()
        print_settings()
        return 0

    if arguments.init_from is not None:
        settings.append(f"--train.init_from={arguments.init_from}")

    if arguments.check is not None:
        settings.append(f"--doctor.check={arguments.check}")

    def run() -> int:
        from minilm.launch import train
        from minilm.run import load_config

        return train(
            load_config(arguments.config, settings),
            resume=arguments.resume,
            dry_run=arguments.dry_run,
            profile=arguments.profile,
        )

    return cli.guarded(run, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
