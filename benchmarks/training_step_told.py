"""What `training_step.py` has measured, in words and tables: its part of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from measuring import table, told

SPEED = ("contender", "parameters", "MFLOP a token", "tokens/s", "x plain loop", "x best peer", "of ceiling")
REST = ("contender", "peak MiB", "x plain loop", "compile s", "again", "loss gap")


def section(record: Mapping[str, Any]) -> str:
    """Markdown: what the comparison says, a table per head size, floors, how each contender was set up."""
    settings, cases = record["settings"], record["results"]["cases"]
    where = "CPU" if settings["device"] == "cpu" else record["machine"]["accelerator"]
    number = record["machine"]["threads"]
    threads = f", {number} thread{'s' if number > 1 else ''}" if settings["device"] == "cpu" else ""
    heads = " and ".join(str(case["head_size"]) for case in cases)
    device = "" if settings["device"] == "cpu" else f", {where}"
    title = f"## Training step, {settings['size']}, heads of {heads}{_kind(cases)}{device}"
    shape = (
        f"{settings['batch']} x {settings['length']} tokens a step, "
        f"{'float32' if settings['dtype'] == 'fp32' else 'bf16'} on {where}{threads}."
    )
    parts = [title, " ".join(_sentence(case) for case in cases), shape, _legend(record)]
    for case in cases:
        parts += [
            f"### Size of a head: {case['head_size']}",
            *_tables(case),
            *_failures(case),
            *_remarks(case),
        ]
        parts += [_floors(case)]
    parts += [_setups(cases), f"```\n{record['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def _kind(cases: Sequence[Mapping[str, Any]]) -> str:
    """For the title: who is compared, where it is not all sorts."""
    some = any("compile_seconds" in x for case in cases for x in case["contenders"].values())
    return "" if some else ", nobody compiled"


def best_of_ours(case: Mapping[str, Any]) -> str | None:
    """The faster of minilm eager and compiled, on rows of one document as all others have."""
    ours = {name: case["contenders"].get(name, {}) for name in ("minilm", "minilm-compiled")}
    speeds = {n: x["tokens_per_second"]["median"] for n, x in ours.items() if "tokens_per_second" in x}
    return max(speeds, key=speeds.__getitem__, default=None)


def _sentence(case: Mapping[str, Any]) -> str:
    name = best_of_ours(case)
    if name is None:
        return f"With heads of {case['head_size']}, minilm was not measured."
    ours, peer = case["contenders"][name], case["best_peer"]
    text = (
        f"With heads of {case['head_size']}, {ours['label']} trains {ours['tokens_per_second']['median']:,.0f} tokens/s"
        f", {ours['mfu']:.0%} of what matrix products alone reach here"
    )
    if ours["ratio_to_plain"] is not None:
        ratio, memory = ours["ratio_to_plain"]["median"], ours["peak_ratio"]
        text += f"; that is {ratio:.2f} times the plain loop of transformers, with {memory:.2f} of its memory"
    if peer is not None:
        ratio = ours["ratio_to_best_peer"]["median"]
        text += f", and {ratio:.2f} times the fastest of all others ({case['contenders'][peer]['label']})"
    return text + "."


def _legend(record: Mapping[str, Any]) -> str:
    limit, compared = record["results"]["gap_limit"], record["results"]["compared_steps"]
    turns, steps = record["settings"]["repeats"], record["settings"]["steps_per_turn"]
    cpu = record["settings"]["device"] == "cpu"
    names = {name for case in record["results"]["cases"] for name in case["contenders"]}
    malloc = ""
    if any(name.endswith("-malloc") for name in names):
        malloc = (
            " Lines with malloc settings are no peers: their allocator keeps freed memory, as a run of minilm does by "
            "itself, and they show which part of the gain comes from that alone."
        )
    return (
        f"Medians of {turns} turns of {steps} step{'s' if steps > 1 else ''} (lowest to highest). Ratios are of "
        "neighbours in the same turn: times as fast as the plain loop of transformers (eager, SDPA), and as the "
        f"fastest contender that is not minilm.{malloc} *Of ceiling* is the model's own operations per second as a "
        "share of the best matrix product that was found in the same run. *Peak* is the most that the process ever had"
        f"{', libraries included' if cpu else ' from the allocator'}; beside it, that as a multiple of the plain "
        "loop's. *Compile* are the seconds by which the first step is longer, with an empty cache; *again* is what was "
        "compiled after the two uncounted steps. The *loss gap* is the largest difference to the loss of the plain "
        f"loop in the first {compared} steps, for those who begin with the same weights: at most {limit:g} nats, or "
        "the command fails."
    )


def _tables(case: Mapping[str, Any]) -> Iterator[str]:
    """Speed, then all else: in one table, its right half would not be seen."""
    done = [x for x in case["contenders"].values() if "failed" not in x]
    speed = [
        [
            x["label"],
            f"{x['parameters'] / 1e6:.1f} M",
            f"{x['flops_per_token'] / 1e6:.0f}",
            told(x["tokens_per_second"], ",.0f"),
            told(x["ratio_to_plain"]),
            told(x["ratio_to_best_peer"]),
            f"{x['mfu']:.0%}",
        ]
        for x in done
    ]
    rest = [
        [
            x["label"],
            f"{x['peak_bytes'] / 2**20:,.0f}",
            _or_nothing(x["peak_ratio"], ".2f"),
            _or_nothing(x.get("compile_seconds"), ".0f"),
            _or_nothing(x.get("recompilations"), "d"),
            _or_nothing(x["loss_gap"], ".0e"),
        ]
        for x in done
    ]
    yield table(SPEED, speed)
    yield table(REST, rest)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _failures(case: Mapping[str, Any]) -> Iterator[str]:
    failed = [f"- {x['label']}: `{x['failed']}`" for x in case["contenders"].values() if "failed" in x]
    if failed:
        yield "Not measured:\n\n" + "\n".join(failed)


def _remarks(case: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know before believing the table; nothing where all is in order."""
    odd = [x for x in case["contenders"].values() if "failed" not in x and not x["in_order"]]
    if odd:
        lines = [
            f"- {x['label']}: losses {', '.join(f'{loss:.3f}' for loss in x['losses'])}, which are not those of a "
            "model that begins to learn"
            for x in odd
        ]
        yield "Not to be believed:\n\n" + "\n".join(lines)


def _floors(case: Mapping[str, Any]) -> str:
    """Floors on paper, against what minilm took."""
    parts, name = case["floors"], best_of_ours(case)
    lines = [
        _floor_line(part, x, max(x["arithmetic_seconds"], x["memory_seconds"])) for part, x in parts.items()
    ]
    whole = {key: sum(x[key] for x in parts.values()) for key in next(iter(parts.values()))}
    floor = sum(max(x["arithmetic_seconds"], x["memory_seconds"]) for x in parts.values())
    lines.append(_floor_line("all", whole, floor))
    text = (
        f"#### Floors on paper\n\nAt the {case['ceiling_flops_per_second'] / 1e9:,.0f} GFLOP/s of the best matrix "
        f"product and the {case['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s of a copy in memory, both measured in "
        "this run, a step of minilm's model cannot take less than this. What lies between the products is taken as "
        "done on the way, the logits as never stored. No attention of small heads reaches the speed of a large "
        "product.\n\n" + table(("part", "GFLOP", "GB moved", "arithmetic s", "memory s", "floor s"), lines)
    )
    if name is not None:
        ours = case["contenders"][name]
        tokens = case["shape"]["batch"] * case["shape"]["length"]
        seconds = tokens / ours["tokens_per_second"]["median"]
        text += (
            f"\n\nA step of {ours['label']} takes {seconds:.3g} s, {seconds / floor:.2f} times the floor; one of the "
            f"plain loop of transformers {_plain_over(case, tokens, floor)}."
        )
    return text


def _plain_over(case: Mapping[str, Any], tokens: int, floor: float) -> str:
    plain = case["contenders"].get("transformers", {})
    if "tokens_per_second" not in plain:
        return "was not measured"
    return f"{tokens / plain['tokens_per_second']['median'] / floor:.2f} times"


def _floor_line(name: str, x: Mapping[str, float], floor: float) -> list[str]:
    return [
        name,
        f"{x['flops'] / 1e9:,.1f}",
        f"{x['bytes'] / 1e9:,.2f}",
        f"{x['arithmetic_seconds']:.3g}",
        f"{x['memory_seconds']:.3g}",
        f"{floor:.3g}",
    ]


def _setups(cases: list[Mapping[str, Any]]) -> str:
    """How each contender was set up; compiled ones as their eager ones."""
    known: dict[str, str] = {}
    for case in cases:
        for x in case["contenders"].values():
            if "about" in x and x["about"] not in known.values():
                label = x["label"].replace(", eager", "").replace(", compiled", "")
                known[x["label"] if label in known else label] = x["about"]
    return "How they were set up (a compiled one as its eager one):\n\n" + "\n".join(
        f"- {label}: {about}" for label, about in known.items()
    )
