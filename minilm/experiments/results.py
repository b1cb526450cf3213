"""Parts of a record that say what came out: metrics, curve, memory, time, samples, evaluation, agreement, comparison.

What was not measured is said to be so: no figure is filled in for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minilm.experiments import numbers, paired
from minilm.experiments.facts import Subject
from minilm.experiments.markdown import block, cell, interval, number, table
from minilm.experiments.runfiles import NO_END, RunFiles, utc
from minilm.experiments.words import Words

_MOST_SAMPLES = 5


def metrics(subject: Subject) -> list[str]:
    """Final and lowest value of each curve, with step and time."""
    say, run, rows = subject.say, subject.run, []
    for kind, column, name in numbers.CURVES:
        final, best = numbers.last(run, kind, column), numbers.lowest(run, kind, column)
        if final is None or best is None:
            continue
        values = (number(final.value), str(final.step), number(best.value), str(best.step), utc(best.when))
        rows.append((say(name), *values))
    if not rows:
        return [say("no step was logged")]
    head = [say("metric"), say("final"), say("at step"), say("best"), say("at step"), say("reached")]
    planned = numbers.last(run, "train", "tokens_share")
    lines = [
        *table(head, rows),
        "",
        say("Losses in nats per token. A training loss is that of one step, not a mean."),
    ]
    lines.append(say("Tokens trained on: {count}.", count=number(numbers.tokens(run))))
    if planned is not None and (run.state != "finished" or planned.value < 0.99):
        lines.append(
            say("**Partial**: {share} % of the planned tokens.", share=number(100 * planned.value, 1))
        )
    if numbers.not_finite(run):
        lines.append(say("Steps whose loss was not finite: {count}.", count=numbers.not_finite(run)))
    return lines


def curve(subject: Subject) -> list[str]:
    """The picture, and what ties it to the data and to its file."""
    say, picture = subject.say, subject.picture
    if not picture:
        return [say("no step was logged")]
    return [
        f"![{say('curves')}]({picture['file']})",
        "",
        *table(
            [say("picture"), "sha256"],
            [(say("points drawn"), picture["data"]), (say("file"), picture["sha256"])],
        ),
    ]


def memory(subject: Subject) -> list[str]:
    """Highest and last memory, in MB."""
    say, run, rows = subject.say, subject.run, []
    for column, name in numbers.MEMORY:
        top, final = numbers.highest(run, "train", column), numbers.last(run, "train", column)
        if top is not None and final is not None:
            rows.append((say(name), number(top.value, 1), str(top.step), number(final.value, 1)))
    head = [say("memory, MB"), say("highest"), say("at step"), say("last")]
    return table(head, rows) if rows else [say("not logged")]


def step_time(subject: Subject) -> list[str]:
    """Where the seconds of the steps went, and the speed."""
    say, run = subject.say, subject.run
    seconds, steps = numbers.step_seconds(run), len(run.of("train"))
    if not steps or not seconds["step"]:
        return [say("not logged")]
    rows = [
        (
            say(part),
            number(1000 * value / steps, 2),
            number(100 * value / seconds["step"], 1),
            number(value, 1),
        )
        for part, value in seconds.items()
    ]
    head = [say("part of a step"), say("ms per step"), "%", say("seconds in all")]
    lines = [*table(head, rows), ""]
    lines.append(say("Tokens per second in steps: {speed}.", speed=number(numbers.tokens_per_second(run), 0)))
    used = numbers.highest(run, "train", "mfu")
    if used is not None:
        lines.append(
            say("Highest share of the GPU's peak (mfu): {share} %.", share=number(100 * used.value, 1))
        )
    return lines


def samples(subject: Subject) -> list[str]:
    """Prompt, prediction, truth and loss from the evaluation; else what the model wrote during training."""
    say, run = subject.say, subject.run
    found = (run.evaluation or {}).get("samples") or []
    if found:
        lines = [say("Greedy, from held-out documents; loss of the truth in nats per token."), ""]
        for sample in found[:_MOST_SAMPLES]:
            loss = number(float(sample["loss"]))
            lines += [
                say("Document {number}, loss {loss}:", number=sample.get("document", "-"), loss=loss),
                "",
            ]
            for name in ("prompt", "prediction", "truth"):
                lines += [f"{say(name)}:", "", *block(str(sample[name])), ""]
        return lines[:-1]
    written = run.of("sample")
    if not written:
        return [say("not run")]
    last = written[-1]
    lines = [
        say(
            "Not evaluated, so without truth and loss. Written in training at step {step}:", step=last["step"]
        )
    ]
    for sample in last["samples"][:_MOST_SAMPLES]:
        lines += ["", f"{say('prompt')}: {str(sample.get('prompt', ''))!r}", ""]
        lines += block(str(sample.get("prompt", "")) + str(sample["text"]))
    return lines


def evaluation(subject: Subject) -> list[str]:
    """The scores of eval.json."""
    say, run, found = subject.say, subject.run, subject.run.evaluation
    if found is None:
        return [say("not run")]
    rows = [_scores_row(say("all"), found["scores"])]
    for length, scores in (found.get("continuations") or {}).items():
        rows.append(_scores_row(say("after {length} tokens", length=length), scores))
    head = [
        say("scored"),
        say("loss"),
        "95 %",
        say("perplexity"),
        say("bits per byte"),
        say("accuracy"),
        say("tokens"),
        say("documents"),
    ]
    lines = table(head, rows)
    facts = [("data", "data"), ("split", "split"), ("step", "step"), ("precision", "precision")]
    told = [f"{say(name)} {found[key]}" for key, name in facts if found.get(key) is not None]
    lines += ["", ", ".join(told) + "."]
    if found.get("step") is not None and found["step"] != run.step:
        lines.append(
            say("**Of step {step}, but the run has {last} steps.**", step=found["step"], last=run.step)
        )
    for part, why in (found.get("missing") or {}).items():
        lines.append(say("Not there: {part} ({why}).", part=part, why=why))
    return lines


def _scores_row(name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    limits = scores.get("loss_95")
    return (
        name,
        number(scores.get("loss")),
        interval(*limits) if limits else "-",
        number(scores.get("perplexity"), 2),
        number(scores.get("bits_per_byte")),
        number(scores.get("accuracy")),
        number(scores.get("num_tokens")),
        number(scores.get("num_documents")),
    )


def agreement(subject: Subject) -> list[str]:
    """The agreement report of eval.py: two ways to one number, beside what rounding can do."""
    say = subject.say
    found = (subject.run.evaluation or {}).get("agreement")
    if not found:
        return [say("not run")]
    rows = []
    for row in found["rows"]:
        (first, one), (second, other) = row["numbers"].items()
        told = (f"{first} {number(one, 6)}", f"{second} {number(other, 6)}")
        rows.append((row["what"], *told, _small(row["difference"]), _small(row["limit"]), row["verdict"]))
    head = [
        say("agreement"),
        say("one way"),
        say("other way"),
        say("difference"),
        say("limit"),
        say("verdict"),
    ]
    lines = table(head, rows)
    for row in found["rows"]:
        if row.get("why_not"):
            lines += ["", say("Not comparable: {what}: {why}.", what=row["what"], why=cell(row["why_not"]))]
    return [*lines, "", f"**{found['verdict']}**"]


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def comparison(subject: Subject) -> list[str]:
    """The run and others against the baseline: losses, paired intervals, speed, memory."""
    say, base = subject.say, subject.baseline
    if base is None:
        return [say("This run is the baseline.")]
    runs = (base, subject.run, *subject.others)
    lines: list[str] = []
    for run in runs[1:]:
        lines += [f"**{text}**" for text in incomparable(run, base, say)]
    rows = [_run_row(run, say) for run in runs]
    names = (
        "run",
        "steps",
        "tokens",
        "parameters",
        "validation loss",
        "bits per byte",
        "tokens/s",
        "memory, MB",
    )
    lines += (
        ["", *table([say(name) for name in names], rows), ""]
        if lines
        else [*table([say(n) for n in names], rows), ""]
    )
    differences = [row for run in runs[1:] for row in difference_rows(run, base, say)]
    head = ("run less baseline", "score", "difference", "95 %", "documents", "significant")
    lines += table([say(name) for name in head], differences)
    note = "Paired bootstrap over the documents of the evaluation, one seed each: other seeds are not in the interval."
    return [*lines, "", say(note)]


def incomparable(run: RunFiles, base: RunFiles, say: Words) -> Iterator[str]:
    """Why losses of two runs may not be held against each other; nothing where they may."""
    names = {"name": run.name, "other": base.name}
    if run.tokenizer_fingerprint != base.tokenizer_fingerprint:
        yield say(
            "{name} and {other} have other tokenizers: losses per token are not comparable, bits per byte are.",
            **names,
        )
    elif run.data_fingerprint != base.data_fingerprint:
        yield say(
            "{name} and {other} were trained on other data: their validation losses are not comparable.",
            **names,
        )
    if NO_END in (run.state, base.state):
        yield say("{name} or {other} has no end: final values are those of the last line.", **names)


def difference_rows(run: RunFiles, base: RunFiles, say: Words) -> list[tuple[str, ...]]:
    """Rows of the table of paired differences; where there is none, why."""
    found = paired.compare(run.evaluation, base.evaluation)
    name = f"{run.name} - {base.name}"
    if isinstance(found, str):
        return [(name, "-", say(found), "-", "-", "-")]
    return [
        (
            name,
            say("loss" if one.metric == "loss" else "bits per byte"),
            f"{one.value:+.4f}",
            interval(*one.interval, signed=True),
            number(one.num_documents),
            say("yes") if one.significant else say("no"),
        )
        for one in found
    ]


def _run_row(run: RunFiles, say: Words) -> tuple[str, ...]:
    loss = numbers.last(run, "validation", "loss")
    bits = numbers.last(run, "validation", "bits_per_byte")
    top = numbers.highest(run, "train", "memory/peak_mb") or numbers.highest(
        run, "train", "memory/process_mb"
    )
    return (
        run.name,
        number(run.step),
        number(numbers.tokens(run)),
        number((run.manifest.get("model") or {}).get("num_parameters")),
        number(loss.value if loss else None),
        number(bits.value if bits else None),
        number(numbers.tokens_per_second(run), 0),
        number(top.value if top else None, 0),
    )
