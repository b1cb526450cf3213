"""docs/performance.md and its pictures, made of the results of the benchmarks.

    python benchmarks/page.py              make the page of benchmarks/results/*.json
    python benchmarks/page.py --verify     is the page in docs/ the one of these results? exit code 1 if not

Each file of results names its benchmark, whose module has `section(record)`: the Markdown of its part. What was not
measured stands on the page with the command that measures it. A picture carries a checksum of the figures that it was
drawn from, so that --verify need not draw it again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import page_figures
import page_older

from minilm import models

HERE = Path(__file__).resolve().parent
PAGE = "performance.md"
NOTE = "<!-- Made by benchmarks/page.py of benchmarks/results/*.json: change these, not the page. -->"


@dataclass(frozen=True)
class Part:
    """A benchmark that the page tells of, in the order of the page."""

    module: str
    title: str
    question: str
    command: str = ""  # what to give it; it is called by its name


PARTS = (
    Part("training_step", "Training step", "How fast is a training step, beside other trainers?",
         "--head-size 16 64 --peers PEERS"),
    Part("parts", "Parts of a step", "How far is each part of a step from its floor?"),
    Part("scaling", "Scaling", "How does the speed grow with rows, length, model and ranks?"),
    Part("memory", "Memory", "What takes the memory of a step, and was it foreseen?"),
    Part("data", "Data", "Does the loader keep up with the device, and how fast is a store built?"),
    Part("startup", "Start", "How long from launch to the first step?"),
    Part("upkeep", "Upkeep", "What do checks, watch, log and checkpoints cost?"),
    Part("generation", "Generation", "How fast is text generated?"),
    Part("evaluation_throughput", "Evaluation", "How fast are documents scored?",
         "--out benchmarks/results/evaluation_throughput.json"),
    Part("regressions", "From commit to commit", "Has something become slower?"),
)  # fmt: skip


class Problem(Exception):
    """Results that the page cannot be made of; the text says which and what to do."""


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        records = read(args.results)
        text = page(records)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if args.verify:
        wrong = differences(args.docs, text, records)
        for line in wrong:
            print(line, file=sys.stderr)
        return 1 if wrong else 0
    args.docs.mkdir(parents=True, exist_ok=True)
    for name, record in pictures(records).items():
        page_figures.draw(record, args.docs / name, checksum(record))
        print(f"wrote {args.docs / name}")
    (args.docs / PAGE).write_text(text, encoding="utf-8")
    print(f"wrote {args.docs / PAGE}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--verify", action="store_true", help="write nothing; exit code 1 if the page differs"
    )
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", metavar="FOLDER")
    args = parser.parse_args(argv)
    if args.results != measuring.RESULTS and not args.results.is_dir():
        parser.error(f"--results: {args.results} is no folder")
    return args


def read(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Name of a file -> what is in it, in the order of the page. Raises Problem for files that are no results."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Problem(f"{path} is no JSON ({error}): measure again, or remove it.") from error
        if not isinstance(record, dict):
            raise Problem(f"{path} is not what a benchmark writes: measure again, or remove it.")
        name = record.get("benchmark", path.stem)
        if section_of(name) is None:
            raise Problem(
                f"{path} is of the benchmark {name!r}, and there is no benchmarks/{name}.py that has `section`: remove "
                "the file, or give the benchmark one."
            )
        found[path.stem] = {**record, "benchmark": name}
    return found


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page. Raises Problem where a record is not what its benchmark writes."""
    blocks: list[str] = []
    measured: list[str] = []
    drawn = {id(record): name for name, record in pictures(records).items()}
    known = [part.module for part in PARTS if (HERE / f"{part.module}.py").is_file()]
    more = dict.fromkeys(
        record["benchmark"] for record in records.values() if record["benchmark"] not in known
    )
    others = [Part(name, name.replace("_", " ").capitalize(), "") for name in more]
    for part in [*(part for part in PARTS if part.module in known), *others]:
        files = [name for name, record in records.items() if record["benchmark"] == part.module]
        files.sort(key=lambda name: _size(records[name]))  # small models first, else as they are called
        if not files:
            command = " ".join(["python", f"benchmarks/{part.module}.py", part.command]).strip()
            blocks.append(f"## {part.title}\n\n{part.question} Not measured yet:\n\n```\n{command}\n```")
        said: set[str] = set()
        for name in files:
            text = _section(part, name, records[name], drawn.get(id(records[name])))
            heading, _, rest = text.partition("\n")
            if heading in (before.partition("\n")[0] for before in measured):
                text = f"{heading} ({name})\n{rest}"
            measured.append(text)
            blocks.append(_once(text, said))
    begin = [NOTE, "# Performance", introduction(list(records.values()))]
    begin += [at_a_glance(measured)] if measured else []
    return "\n\n".join(block.strip() for block in begin + blocks) + "\n"


def _size(record: Mapping[str, Any]) -> int:
    """The number of the size that was measured; 0 for benchmarks of several, or of none."""
    known = models.sizes("original")
    size = record.get("settings", {}).get("size")
    return known.index(size) if size in known else 0


def at_a_glance(sections: Sequence[str]) -> str:
    """The first paragraph of each section, which says what was found, under its name."""
    lines = []
    for text in sections:
        heading, found = text.split("\n\n")[:2]
        title = heading.removeprefix("## ")
        anchor = re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()))
        lines.append(f"- [{title}](#{anchor}): {found}")
    return "\n".join(["## At a glance", "", *lines])


def _once(text: str, said: set[str]) -> str:
    """Without the explanations that an earlier section of the same benchmark has word for word."""
    kept = []
    for paragraph in text.split("\n\n"):
        explains = len(paragraph) > 300 and paragraph[0].isalpha()
        kept.append("*To be read as above.*" if explains and paragraph in said else paragraph)
        said.update([paragraph] if explains else [])
    return "\n\n".join(kept)


def _section(part: Part, name: str, record: Mapping[str, Any], picture: str | None) -> str:
    """What the benchmark says of its record, the picture behind the heading and the first sentence."""
    try:
        tell = section_of(part.module)
        assert tell is not None  # `read` takes no others
        text = tell(record)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise Problem(
            f"{name}.json is not what benchmarks/{part.module}.py writes now ({type(error).__name__}: {error}): "
            "measure again."
        ) from error
    if picture is not None:
        heading, first, *rest = text.split("\n\n")
        alternative = f"{part.title}: tokens per second"
        text = "\n\n".join([heading, first, f"![{alternative}]({picture})", *rest])
    return f"{text.strip()}\n\n{_measured(record)}"


def section_of(module: str) -> Callable[[Mapping[str, Any]], str] | None:
    """The function that tells of a record: the benchmark's own, else the one kept here for it, if there is one."""
    if not (HERE / f"{module}.py").is_file():
        return None
    own = getattr(importlib.import_module(module), "section", None)
    return own if own is not None else getattr(page_older, module, None)


def introduction(records: Sequence[Mapping[str, Any]]) -> str:
    """What is compared, how, what is not said, how to repeat it."""
    cuda = sorted({str(r["machine"]["accelerator"]) for r in records if r["machine"].get("accelerator")})
    if cuda:
        devices = f"Figures of a GPU are those that name one ({', '.join(cuda)}); all others are of a CPU."
    elif records:
        devices = (
            "**There is no figure of a GPU here**: nothing on this page was measured on CUDA. What it says of a CPU "
            "says nothing of one: there, other parts of a step are slow."
        )
    else:
        devices = "**Nothing was measured yet.**"
    return f"""\
Every figure comes from a command of the repository, in one run on one machine, and stands in `benchmarks/results/` as
JSON with the machine and the versions; this page is made of these files.

**How it is compared.** Who is compared runs in the same command, with the same shapes, turn by turn: minilm, another,
minilm again. What else the machine does then meets all. A ratio is that of two in the same turn (with eight trainers
they may be half a minute apart); told are medians with the lowest and the highest. Trainers have a process each, so
that one's memory and settings are not another's. Where both compute the same, their losses are compared before any
time is believed. A floor on paper is what the arithmetic and the memory of the same machine allow, measured in the same
run, not a data sheet.

**What it does not say.** {devices} A shared machine moves all figures; ratios less. Nothing here says how well a
model learns: others may have chosen a slower step on purpose.

**To repeat it.** The command stands with each section. `python benchmarks/page.py` makes this page of the results,
`--verify` says whether it is theirs."""


def _measured(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    facts = [str(record.get("date") or machine.get("date", "")), str(machine.get("processor") or "")]
    facts.append(f"{machine['cores']} cores" if machine.get("cores") else "")
    facts.append(f"commit {machine['commit']}" if machine.get("commit") else "")
    facts.append(str(machine.get("accelerator") or ""))
    facts += [f"{name} {machine[name]}" for name in ("torch", "transformers", "python") if machine.get(name)]
    if machine.get("load_average"):
        facts.append(f"load average {machine['load_average'][0]:.1f} when the results were written")
    return f"*Measured {', '.join(fact for fact in facts if fact)}.*"


def pictures(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """File name of a picture -> the record that it shows."""
    return {
        f"performance_{name}.png": record
        for name, record in records.items()
        if record["benchmark"] in page_figures.DRAWN
    }


def checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def differences(docs: Path, text: str, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the page in `docs`, a line each; nothing where all is as it would be made."""
    found, path = [], docs / PAGE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        found.append(f"{path} is not the page of these results.")
    wanted = pictures(records)
    for name, record in wanted.items():
        if not (docs / name).is_file() or page_figures.drawn_from(docs / name) != checksum(record):
            found.append(f"{docs / name} is not the picture of these results.")
    found += [
        f"{old} belongs to no results: remove it."
        for old in sorted(docs.glob("performance_*.png"))
        if old.name not in wanted
    ]
    return [*found, "Make it again: python benchmarks/page.py"] if found else []


if __name__ == "__main__":
    sys.exit(main())
