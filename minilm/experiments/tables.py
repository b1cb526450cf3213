"""A comparison as tables of text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilm.experiments.markdown import interval, number

NOTE = (
    "Differences: first less second, 95 % by paired bootstrap over the documents of the evaluation. One seed each: "
    "what another seed would change is not in the interval."
)
_ROWS = (  # key of the results, name, digits
    ("state", "state", 0),
    ("steps", "steps", 0),
    ("tokens", "tokens", 0),
    ("flops", "FLOPs, computed", 3),
    ("parameters", "parameters", 0),
    ("training_loss", "training loss, last step", 4),
    ("validation_loss", "validation loss, final", 4),
    ("best_validation_loss", "validation loss, best", 4),
    ("best_at_step", "  at step", 0),
    ("validation_bits_per_byte", "validation bits per byte", 4),
)


def differing(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) of what differs, by kind."""
    rows = []
    for kind, found in told["differs"].items():
        if not found:
            rows.append([kind, "nothing differs", *("" for _ in told["runs"])])
        for name, values in found.items():
            rows.append([kind, name, *("-" if value is None else str(value) for value in values)])
    return ["", "what differs", *told["runs"]], rows


def results(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) of what came out."""
    found = told["results"]
    rows = [[name, *(_value(one[key], digits) for one in found)] for key, name, digits in _ROWS]
    scores = [one["evaluation"] or {} for one in found]
    rows.append(["evaluation loss", *(number(one.get("loss")) for one in scores)])
    rows.append(["  95 %", *(interval(*one["loss_95"]) if one.get("loss_95") else "-" for one in scores)])
    rows.append(["evaluation bits per byte", *(number(one.get("bits_per_byte")) for one in scores)])
    rows.append(["tokens per second", *(number(one["tokens_per_second"], 0) for one in found)])
    for part in ("data", "forward", "backward", "optimizer", "other"):
        rows.append([f"  {part}, % of a step", *(_share(one["seconds_in_steps"], part) for one in found)])
    for name in dict.fromkeys(name for one in found for name in one["memory_mb"]):
        rows.append([f"memory, MB: {name}", *(number(one["memory_mb"].get(name), 0) for one in found)])
    return ["", *told["runs"]], rows


def differences(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) of the paired differences; where there is none, why."""
    rows = []
    for one in told["differences"]:
        name = f"{one['run']} - {one['base']}"
        rows += [
            [
                name,
                score["score"].replace("_", " "),
                f"{score['difference']:+.4f}",
                interval(*score["interval_95"], signed=True),
                number(score["documents"]),
                "yes" if score["significant"] else "no",
            ]
            for score in one["scores"]
        ] or [[name, one["why_not"], "-", "-", "-", "-"]]
    return ["runs", "score", "difference", "95 %", "documents", "significant"], rows


def _value(value: Any, digits: int) -> str:
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.{digits}e}"
    return number(value, digits)


def _share(seconds: Mapping[str, float], part: str) -> str:
    return number(100 * seconds[part] / seconds["step"], 1) if seconds["step"] else "-"
