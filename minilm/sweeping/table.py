"""One table of a sweep: mean and standard deviation over seeds, the best first, failures shown.

SWEEP/table.md and table.json hold the same numbers. The deviation is that of a sample (n - 1); one seed has none.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm.experiments import markdown
from minilm.experiments.numbers import tokens_per_second
from minilm.experiments.runfiles import RunFiles
from minilm.manifest import write_atomically
from minilm.sweeping.definition import Planned, Sweep
from minilm.sweeping.progress import Standing

SCORES = ("validation_loss", "bits_per_byte", "tokens_per_second")
_NAMES = {
    "validation_loss": "validation loss",
    "bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s",
}
_DIGITS = {"validation_loss": 4, "bits_per_byte": 4, "tokens_per_second": 0}
NOTE = "Mean ± standard deviation over seeds (n - 1) of the last validation of finished runs; n is how many."


def table(sweep: Sweep, standings: Sequence[Standing]) -> dict[str, Any]:
    """{"rows": [...], "runs": [...], "notes": [...]} as table.json has it.

    Rows are sorted by their mean validation loss; those without a finite one come last. A row has for each of SCORES
    {"mean", "deviation", "n"}, and `missing` {run: state} of its runs that are not finished.
    """
    of_run = {one.run.name: one for one in standings}
    scores, kinds = {}, set()
    for one in standings:
        if one.state != "finished":
            continue
        files = RunFiles.read(one.run.folder)
        scores[one.run.name] = scores_of(files)
        kinds.add((files.data_fingerprint, files.tokenizer_fingerprint, *_validated_on(files)))
    rows = [_row(point, sweep.of(point), scores, of_run) for point in sweep.points]
    rows.sort(key=lambda row: _rank(row["validation_loss"]["mean"]))
    notes = [NOTE]
    if len(kinds) > 1:
        notes.append(
            "The runs were validated on other data, rows or tokens: their losses are not comparable. Bits per byte are "
            "where the text is the same."
        )
    told = [
        {
            "name": one.run.name,
            "point": one.run.point,
            "seed": one.run.seed,
            "state": one.state,
            "why": one.why,
        }
        | scores.get(one.run.name, {})
        for one in standings
    ]
    return {"sweep": str(sweep.file), "rows": rows, "runs": told, "notes": notes}


def scores_of(files: RunFiles) -> dict[str, float | None]:
    """The scores of the last validation, whatever they are: nan is not passed over for an earlier number."""
    last = next(iter(files.of("validation")[::-1]), {})
    return {
        "validation_loss": last.get("loss"),
        "bits_per_byte": last.get("bits_per_byte"),
        "tokens_per_second": tokens_per_second(files),
    }


def cells(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) as text."""
    settings = list(dict.fromkeys(name for row in told["rows"] for name in row["point"]))
    head = [*settings, *_NAMES.values(), "n", "not finished"]
    rows = []
    for row in told["rows"]:
        point = [_text(row["point"][name]) if name in row["point"] else "" for name in settings]
        values = [_spread(row[score], _DIGITS[score]) for score in SCORES]
        missing = ", ".join(f"{name} ({state})" for name, state in row["missing"].items())
        rows.append([*point, *values, str(row["n"]), missing])
    return head, rows


def write(sweep: Sweep, told: Mapping[str, Any]) -> list[Path]:
    """SWEEP/table.md and table.json; returns their paths."""
    head, rows = cells(told)
    lines = [f"# {sweep.file.name}", "", *markdown.table(head, rows), "", *told["notes"]]
    failures = [run for run in told["runs"] if run["state"] not in ("finished", "new", "running")]
    if failures:
        lines += ["", "## Not finished", ""]
        lines += markdown.table(
            ["run", "state", "why"], [[r["name"], r["state"], r["why"] or "-"] for r in failures]
        )
    sweep.folder.mkdir(parents=True, exist_ok=True)
    contents = {"table.md": "\n".join(lines) + "\n", "table.json": json.dumps(_finite(told), indent=1) + "\n"}
    for name, text in contents.items():
        write_atomically(sweep.folder / name, text.encode("utf-8", errors="backslashreplace"))
    return [sweep.folder / name for name in contents]


def _row(
    point: dict[str, Any],
    runs: list[Planned],
    scores: Mapping[str, Mapping[str, float | None]],
    standings: Mapping[str, Standing],
) -> dict[str, Any]:
    done = [scores[run.name] for run in runs if run.name in scores]
    missing = {run.name: standings[run.name].state for run in runs if run.name not in scores}
    return {
        "point": point,
        "n": len(done),
        "missing": missing,
        **{score: _over_seeds([one[score] for one in done]) for score in SCORES},
    }


def _over_seeds(found: Sequence[float | None]) -> dict[str, Any]:
    """Mean and deviation of a sample; nan among the values makes both nan."""
    values = [value for value in found if value is not None]
    if not all(math.isfinite(value) for value in values):
        return {"mean": math.nan, "deviation": math.nan, "n": len(values)}
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _rank(mean: float | None) -> float:
    return math.inf if mean is None or not math.isfinite(mean) else mean


def _validated_on(files: RunFiles) -> tuple[Any, ...]:
    names = ("data.validation_store", "data.sequence_length", "data.rows", "train.validation_rows")
    return tuple(str(files.settings.get(name)) for name in names)


def _spread(score: Mapping[str, Any], digits: int) -> str:
    if score["mean"] is None:
        return "-"
    told = f"{score['mean']:,.{digits}f}"
    return told if score["deviation"] is None else f"{told} ± {score['deviation']:,.{digits}f}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no nan: it is written as text, as everywhere in the files of a run."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
