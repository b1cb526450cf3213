"""Several runs beside each other: what differs, what came out, whether the difference is one. The first is the base.

`compare` gives one mapping that the terminal, the page and the JSON file show; nothing is computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minilm.errors import ConfigError
from minilm.experiments import numbers, paired
from minilm.experiments.facts import OF_THE_PLACE
from minilm.experiments.picture import points_hash
from minilm.experiments.results import incomparable
from minilm.experiments.runfiles import RunFiles
from minilm.experiments.words import words

KINDS = ("settings", "code", "data", "packages", "hardware")


def compare(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Everything about the runs that is shown of them. Raises ConfigError for fewer than two, or two of one name."""
    if len(runs) < 2:
        raise ConfigError("Name at least two runs to compare: minilm compare runs/a runs/b")
    names = labels(runs)
    base = runs[0]
    say = words("en")
    return {
        "runs": names,
        "folders": [str(run.folder) for run in runs],
        "warnings": [text for run in runs[1:] for text in _warnings(run, base, say)],
        "differs": {kind: _differing([_of_kind(run, kind) for run in runs]) for kind in KINDS},
        "results": [_results(run) for run in runs],
        "differences": [
            _against(run, base, name, names[0]) for run, name in zip(runs[1:], names[1:], strict=True)
        ],
        "points_sha256": points_hash(runs),
    }


def labels(runs: Sequence[RunFiles]) -> list[str]:
    """Names that tell the runs apart: their own, or with their folder where two have the same."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError("A run was named twice: " + ", ".join(str(run.folder) for run in runs))
    return names


def _warnings(run: RunFiles, base: RunFiles, say: Any) -> list[str]:
    found = list(incomparable(run, base, say))
    if (
        run.tokenizer_fingerprint == base.tokenizer_fingerprint
        and run.data_fingerprint == base.data_fingerprint
    ):
        rows = [one.settings.get("train.validation_rows") for one in (run, base)]
        if rows[0] != rows[1] or run.settings.get("data.sequence_length") != base.settings.get(
            "data.sequence_length"
        ):
            found.append(
                f"{run.name} and {base.name} validate on other rows: their validation losses are not comparable."
            )
    tokens = numbers.tokens(run), numbers.tokens(base)
    if tokens[0] != tokens[1]:
        found.append(
            f"{run.name} was trained on {tokens[0]:,} tokens, {base.name} on {tokens[1]:,}: not the same budget."
        )
    return found


def _of_kind(run: RunFiles, kind: str) -> dict[str, Any]:
    record = run.manifest
    if kind == "settings":
        return {k: v for k, v in run.settings.items() if not k.startswith(OF_THE_PLACE)}
    if kind == "code":
        code = record.get("code") or {}
        git = code.get("git") or {}
        return {
            "source sha256": code.get("source_sha256"),
            "commit": git.get("commit"),
            "uncommitted changes": git.get("diff_sha256") or bool(git.get("dirty")),
        }
    if kind == "data":
        return {"store": run.data_fingerprint, "tokenizer": run.tokenizer_fingerprint}
    if kind == "packages":
        return dict(record.get("packages") or {})
    machine, layout = record.get("machine") or {}, record.get("layout") or {}
    names = ("python", "system", "cpu", "cpu_cores", "memory_bytes", "nvidia_driver", "cuda", "cudnn")
    found = {name: machine.get(name) for name in names}
    found["gpus"] = ", ".join(gpu["name"] for gpu in machine.get("gpus") or []) or None
    return {**found, **layout, **(machine.get("environment") or {})}


def _differing(all_of: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """{name: value of each run}, where not all are equal; a name that a run does not have is None there."""
    names = {name for one in all_of for name in one}
    values = {name: [one.get(name) for one in all_of] for name in sorted(names)}
    missing = {name for name in names if any(name not in one for one in all_of)}
    return {k: v for k, v in values.items() if k in missing or any(value != v[0] for value in v)}


def _results(run: RunFiles) -> dict[str, Any]:
    def final(kind: str, column: str) -> float | None:
        place = numbers.last(run, kind, column)
        return place.value if place else None

    best = numbers.lowest(run, "validation", "loss")
    top = {name: numbers.highest(run, "train", column) for column, name in numbers.MEMORY}
    flops = run.flops_per_step
    return {
        "state": run.state,
        "steps": run.step,
        "tokens": numbers.tokens(run),
        "flops": None if flops is None else flops * run.step,
        "parameters": (run.manifest.get("model") or {}).get("num_parameters"),
        "training_loss": final("train", "loss"),
        "validation_loss": final("validation", "loss"),
        "validation_bits_per_byte": final("validation", "bits_per_byte"),
        "best_validation_loss": best.value if best else None,
        "best_at_step": best.step if best else None,
        "evaluation": (run.evaluation or {}).get("scores"),
        "tokens_per_second": numbers.tokens_per_second(run),
        "seconds_in_steps": numbers.step_seconds(run),
        "memory_mb": {name: place.value for name, place in top.items() if place is not None},
    }


def _against(run: RunFiles, base: RunFiles, name: str, base_name: str) -> dict[str, Any]:
    found = paired.compare(run.evaluation, base.evaluation)
    told: dict[str, Any] = {"run": name, "base": base_name}
    if isinstance(found, str):
        return {**told, "scores": [], "why_not": found}
    scores = [
        {
            "score": one.metric,
            "difference": one.value,
            "interval_95": list(one.interval),
            "documents": one.num_documents,
            "significant": one.significant,
        }
        for one in found
    ]
    return {**told, "scores": scores}
