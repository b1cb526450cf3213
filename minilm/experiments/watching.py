"""The picture that `minilm watch` draws of a run: lines of text that fit a terminal of 80 x 24 without colour.

Every word and number comes from the files of the run. Texts of models and messages are made harmless before they are
shown: control characters in them must not command the terminal.
"""

from __future__ import annotations

import datetime
import math
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from minilm import manifest
from minilm.errors import CheckpointError
from minilm.experiments import braille
from minilm.experiments.following import Follower, Told, number
from minilm.experiments.listing import Row, look
from minilm.experiments.terminal import STYLES, count, duration, labelled, short, shown, strange, thousands

_LOOK_SECONDS = 5.0  # between two looks at whether the process of a silent run lives
_PARTS = ("data", "forward", "backward", "optimizer")
_LEAST_CURVE, _MOST_CURVE = 3, 16


class Watched:
    """One run that is looked at again and again. `row` says how it stands, `told` what its log says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.row = Row(str(folder), "waiting")
        self.record: dict[str, Any] = {}
        self._follower = Follower(folder)
        self._looked = -math.inf

    @property
    def told(self) -> Told:
        return self._follower.told

    @property
    def has_ended(self) -> bool:
        return self.row.state not in ("running", "waiting")

    def refresh(self) -> None:
        """Read what is new. A run that has not begun to write is waited for; a damaged one says so."""
        try:
            changed = self._follower.poll()
        except OSError as error:
            self.row = Row(str(self.folder), "damaged", f"metrics.jsonl cannot be read: {error.strerror}")
            return
        if not changed and time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if not (self.folder / manifest.FILE).exists():
            place = "it has not begun to write" if self.folder.is_dir() else "there is no such folder yet"
            self.row, self.record = Row(str(self.folder), "waiting", place), {}
            return
        self.row = look(self.folder, now=time.time())
        try:
            self.record = manifest.Manifest.read(self.folder).record
        except CheckpointError:  # `row` says what is wrong with it
            self.record = {}


def picture(run: Watched, *, width: int, height: int, plain: bool = False) -> list[Text]:
    """At most `height` lines of at most `width` columns. plain: ASCII for lines and curves."""
    told = run.told
    lines = [_head(run, width), *_why(run, width), _progress(run, width, plain), *_numbers(run, width)]
    samples, events = _sample(told), _events(told)
    # What is left is shared: the curve first, then some events, then the sample, and the curve takes the rest.
    left = height - len(lines) - _LEAST_CURVE - 1
    events = events[-max(0, min(3, left)) :] if left > 0 else []
    left -= len(events)
    samples = samples[: max(0, min(3, left))] if left >= 2 else []
    tall = min(_LEAST_CURVE + max(0, left - len(samples)), _MOST_CURVE)
    lines += _curve(told, width, tall, plain) + events + samples
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def overview(runs: Sequence[Watched], *, width: int, plain: bool = False) -> Group:
    """Several runs: a line each, and below them what is wrong. What a narrow terminal has no room for goes."""
    cells = [_cells(run, plain) for run in runs]
    heads = list(_HEADS)
    for name in ("curve", "tok/s", "left"):
        if _width(heads, cells) > width:
            heads.remove(name)
    room = max(width - _width(heads[1:], cells) - 2, 12)
    table = Table(box=None, pad_edge=False)
    for name in heads:
        right = name not in ("run", "state", "curve")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for run, row in zip(runs, cells, strict=True):
        name = row["run"]
        row["run"] = "..." + name[3 - room :] if len(name) > room else name  # sweeps differ at the end
        texts = [Text(row[head]) for head in heads]
        texts[1].stylize(STYLES.get(run.row.state, ""))
        table.add_row(*texts)
    wrong = [(run, text) for run in runs for text in _trouble(run)]
    lines = [
        Text(f"{shown(run.folder.name)}: {text}", style=STYLES.get(run.row.state, "")) for run, text in wrong
    ]
    return Group(table, *lines)


_HEADS = ("run", "state", "step", "%", "left", "loss", "valid.", "tok/s", "curve")


def _cells(run: Watched, plain: bool) -> dict[str, str]:
    told, row, train = run.told, run.row, run.told.train or {}
    share = _share(train, row)
    values = (
        shown(run.folder.name),
        row.state,
        count(train.get("step")),
        "-" if share is None else f"{100 * share:.0f}",
        "-" if run.has_ended else duration(told.seconds_left(row.steps)),
        short(told.smoothed),
        short(number(told.validation or {}, "loss")),
        thousands(number(train, "tokens_per_second")),
        braille.sparkline(told.curve.points(), 8, plain=plain),
    )
    return dict(zip(_HEADS, values, strict=True))


def _width(heads: Sequence[str], cells: Sequence[dict[str, str]]) -> int:
    return sum(max(len(text) for text in (head, *(row[head] for row in cells))) + 2 for head in heads) - 2


# ---------------------------------------------------------------- the parts of the picture


def _head(run: Watched, width: int) -> Text:
    state = Text(run.row.state, style=STYLES.get(run.row.state, "bold"))
    age = run.row.age_seconds
    words = "" if age is None else f"last line {duration(age)} ago"
    clock = f"{datetime.datetime.now().astimezone():%H:%M:%S}"
    right = f"{words}  {clock}" if words else clock
    name = shown(str(run.folder))
    room = max(width - len(right) - state.cell_len - 4, 12)
    if len(name) > room:  # the end of a path names the run
        name = "..." + name[3 - room :]
    left = Text.assemble((name, "bold"), "  ", state)
    return left.append(" " * max(2, width - left.cell_len - len(right)) + right, style="dim")


def _why(run: Watched, width: int) -> list[Text]:
    if not run.row.why:
        return []
    lines = textwrap.wrap(shown(run.row.why), width)
    return [Text(line, style=STYLES.get(run.row.state, "")) for line in lines[:2]]


def _progress(run: Watched, width: int, plain: bool) -> Text:
    told, train = run.told, run.told.train or {}
    step, steps, share = train.get("step", 0), run.row.steps, _share(train, run.row)
    told_steps = f"{step:,}/{steps:,}" if steps else f"{step:,}"
    line = labelled("step", told_steps)
    if share is None:
        return line
    line.append(f"  {100 * share:.1f} %  ")
    tail = "" if run.has_ended else f"  {duration(told.seconds_left(steps))} left"
    room = max(width - line.cell_len - len(tail), 0)
    full = min(int(share * room), room)
    line.append(("=" if plain else "━") * full, style="green")
    line.append(("-" if plain else "╌") * (room - full), style="dim")
    return line.append(tail)


def _numbers(run: Watched, width: int) -> list[Text]:
    told, train, last, best = run.told, run.told.train, run.told.validation, run.told.best
    lines = []
    if train:
        value = number(train, "loss")
        line = labelled("loss", short(value), style="bold red" if strange(value) else "bold")
        line.append(f"   smoothed {short(told.smoothed)}")
        if told.num_not_finite:
            line.append(f"   not finite in {told.num_not_finite:,} steps", style="bold red")
        for name in ("skipped_steps", "rollbacks"):
            if train.get(name):
                line.append(f"   {name.replace('_', ' ')} {train[name]}", style="yellow")
        lines.append(line)
    if last:
        line = labelled("validation", short(number(last, "loss")), style="bold")
        line.append(f" at {last['step']:,}")
        if best:
            line.append(f"   best {short(number(best, 'loss'))} at {best['step']:,}")
        if (bits := number(last, "bits_per_byte")) is not None:
            line.append(f"   bits/byte {short(bits)}")
        lines.append(line)
    if train:
        lines += [_pace(train), _time(train), _memory(train)]
    return [*lines, *_doctor(run, width)]


def _pace(train: dict[str, Any]) -> Text:
    rate, norm, mfu = (number(train, name) for name in ("learning_rate", "gradient_norm", "mfu"))
    line = labelled("rate", "-" if rate is None else f"{rate:.2e}")
    line.append(
        f"   gradient norm {short(norm, 3)}   tokens/s {thousands(number(train, 'tokens_per_second'))}"
    )
    return line if mfu is None else line.append(f"   MFU {100 * mfu:.1f} %")


def _time(train: dict[str, Any]) -> Text:
    whole = number(train, "seconds/step")
    if not whole:
        return labelled("a step", "-")
    parts = [(name, number(train, f"seconds/{name}") or 0.0) for name in _PARTS]
    parts.append(("other", max(0.0, whole - math.fsum(seconds for _, seconds in parts))))
    told = ", ".join(f"{name} {100 * seconds / whole:.0f}" for name, seconds in parts)
    return labelled("a step", f"{1000 * whole:,.0f} ms; in %: {told}")


def _memory(train: dict[str, Any]) -> Text:
    names = (("process", "process"), ("allocated", "GPU"), ("reserved", "reserved"), ("peak", "peak"))
    found = [(name, number(train, f"memory/{key}_mb")) for key, name in names]
    told = (f"{name} {value:,.0f} MB" for name, value in found if value is not None)
    return labelled("memory", "   ".join(told) or "-")


def _doctor(run: Watched, width: int) -> list[Text]:
    checks, look_ = run.record.get("checks") or {}, run.told.doctor
    parts = []
    if counts := checks.get("counts"):
        parts.append(f"before {counts.get('PASS', 0)} passed, {counts.get('FAIL', 0)} failed")
    elif checks:
        parts.append("before unchecked")
    if look_ is not None:
        failures = number(look_, "failures") or 0
        error = number(look_, "replay_error")
        again = "" if error is None else f", replay error {error:.1e}"
        parts.append(f"at {look_['step']:,} {failures:.0f} failed{again}")
    lines = [labelled("doctor", "; ".join(parts) or "-")] if parts or run.told.train else []
    for alarm in list(run.told.alarms)[-2:]:
        text = textwrap.wrap(f"step {alarm['step']:,}  {shown(str(alarm['text']))}", width - 2)
        lines += [Text(f"  {line}", style="bold red") for line in text[:3]]
    return lines


def _curve(told: Told, width: int, height: int, plain: bool) -> list[Text]:
    """The loss of all steps. The first steps fall from so high that they would flatten the rest: they are cut off."""
    points = told.curve.points()
    if len(points) < 2 or height < 1:
        return []
    across = max(width - 9, 10)
    drawn = braille.sampled(points, 2 * across)
    later = [y for y in drawn[len(drawn) // 20 :] if y is not None]
    low, high = min(later), max(later)
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-3
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"] if height > 1 else [f"{low:.4g}"]
    rows = braille.curve(points, across, height, limits=(low, high), plain=plain)
    edge = "|" if plain else "▏"
    lines = [
        Text(f"{label:>7} {edge}").append(row, style="cyan") for label, row in zip(labels, rows, strict=True)
    ]
    first, last = f"step {points[0][0]:,.0f}", f"{(told.train or {}).get('step', 0):,}"
    return [*lines, Text(" " * 9 + first + last.rjust(max(width - 9 - len(first), 0)), style="dim")]


def _events(told: Told) -> list[Text]:
    lines = []
    for event in told.events:
        if event in told.alarms:  # shown above
            continue
        when = number(event, "unix_seconds")
        clock = f"{datetime.datetime.fromtimestamp(when).astimezone():%H:%M:%S}" if when else "-"
        lines.append(
            Text(
                f"{clock}  step {event['step']:,}  {shown(str(event.get('text', '')))}",
                style="dim",
            )
        )
    return lines


def _sample(told: Told) -> list[Text]:
    if not told.sample:
        return []
    found = [one for one in told.sample.get("samples") or [] if isinstance(one, dict)]
    lines = [Text(f"written at step {told.sample['step']:,}:", style="dim")]
    for one in found:
        prompt, text = shown(str(one.get("prompt", ""))), shown(str(one.get("text", "")))
        lines.append(Text.assemble("  ", (prompt, "bold"), " | ", text))
    return lines


def _trouble(run: Watched) -> Iterable[str]:
    if run.row.why:
        yield shown(run.row.why)
    if run.told.alarms:
        yield shown(str(run.told.alarms[-1]["text"]))
    if run.told.num_not_finite:
        yield f"values that are not finite in {run.told.num_not_finite:,} steps"


def _share(train: dict[str, Any], row: Row) -> float | None:
    """Of the run that is done: of its steps, or of its tokens where they are what it counts."""
    if row.steps and train:
        return min(float(train["step"]) / row.steps, 1.0)
    return number(train, "tokens_share")
