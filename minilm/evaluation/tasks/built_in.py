"""Tasks that need no file and no network: each is a function of a seed, with a chance level that is stated.

    agreement   subject and verb, with 0 to 2 nouns of the other number between them; two sentences, chance 1/2
    brackets    two closing brackets in the right and in the wrong order, 2 to 4 deep; two sentences, chance 1/2
    addition    sums of numbers with 1 to 3 digits; four numbers to choose from, chance 1/4
    copying     a list of words, begun a second time; greedy decoding must give the last word, chance 1/words
    induction   the same random tokens twice; the second copy can be known from the first, chance 1/length
    facts=DIR   the questions of a folder of `minilm data facts` that its own database answers, chance as stated there

Two sentences are compared by their whole log-likelihoods, as BLiMP does.
Sources: Warstadt et al., BLiMP: The Benchmark of Linguistic Minimal Pairs for English (2020); Olsson et al.,
In-context Learning and Induction Heads (2022).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError, DataError
from minilm.evaluation.facts import DATABASE, read_questions
from minilm.evaluation.tasks.grammar import agreement, brackets
from minilm.evaluation.tasks.questions import Choice, Cloze, Repetition, Task

NUMBER = 200  # questions of a task
FACTS = "facts="
LONGEST_COPY = 24  # tokens
SHORTEST_COPY = 4
WORDS = (
    "river", "stone", "apple", "horse", "window", "paper", "garden", "silver", "candle", "bridge", "market",
    "winter", "letter", "shadow", "button", "forest", "kitchen", "thunder", "pocket", "mirror", "carpet", "hammer",
    "island", "orange", "pillow", "rabbit", "spider", "ticket", "velvet", "wagon", "yellow", "zebra",
)  # fmt: skip

Maker = Callable[[random.Random, int], list[Choice] | list[Cloze]]


def names() -> tuple[str, ...]:
    """The tasks that `built-in` stands for."""
    return (*_MAKERS, "induction")


def make(
    name: str,
    *,
    tokenizer: Any = None,
    num_tokens: int = 0,
    context: int = 0,
    seed: int = 0,
    number: int = NUMBER,
) -> Task:
    """A built-in task; the same arguments give the same questions.

    tokenizer   needed by induction only, which draws tokens that are text; without one it draws from `num_tokens` ids
    context     of the model; induction takes rows that fit
    Raises ConfigError for an unknown name, DataError for a folder without facts.
    """
    if name.startswith(FACTS):
        return _facts(Path(name.removeprefix(FACTS)))
    if name == "induction":
        return _induction(tokenizer, num_tokens, context, seed, number)
    if name not in _MAKERS:
        raise ConfigError(
            f"There is no task {name!r}. Name a file ending in .jsonl, or one of {', '.join(names())}, "
            f"{FACTS}FOLDER, or built-in for all without a folder."
        )
    questions = _MAKERS[name](random.Random(f"{name} {seed}"), number)
    return Task(name=name, questions=tuple(questions), generated=True, about=f"built in, seed {seed}")


def _addition(drawn: random.Random, number: int) -> list[Choice]:
    """Four numbers in a row are drawn first, then which of them is the sum, then what is added to give it.

    So the four alone tell nothing: whoever does not add is right one time in four.
    """
    found = []
    for place in range(number):
        digits = 1 + place % 3
        low, high = (2, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
        step = 10 ** drawn.randrange(digits)
        first = drawn.randint(2 * low, 2 * high - 3 * step)
        numbers = [first + step * other for other in range(4)]
        total = drawn.choice(numbers)
        left = drawn.randint(max(low, total - high), min(high, total - low))
        drawn.shuffle(numbers)
        found.append(
            Choice(
                question=f"{left} + {total - left} =",
                choices=tuple(map(str, numbers)),
                answer=numbers.index(total),
                group=f"{digits} digits" if digits > 1 else "1 digit",
                where=f"addition {place + 1}",
            )
        )
    return found


def _copying(drawn: random.Random, number: int) -> list[Cloze]:
    found = []
    for place in range(number):
        count = (4, 8, 12)[place % 3]
        words = drawn.sample(WORDS, count)
        *begun, last = words
        text = f"{' '.join(words)}. {' '.join(begun)}"
        group, where = f"{count} words", f"copying {place + 1}"
        found.append(Cloze(text=text, answer=last, group=group, where=where, by_lot=1 / count))
    return found


def _induction(tokenizer: Any, num_tokens: int, context: int, seed: int, number: int) -> Task:
    """Every token once, so that what follows it is known the second time."""
    if tokenizer is None:
        usable = list(range(num_tokens))
    else:
        special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.special_ids}
        usable = [token for token in range(tokenizer.num_tokens) if token not in special]
    length = min(LONGEST_COPY, len(usable), (context - 1) // 2)
    if length < SHORTEST_COPY:
        raise ConfigError(
            f"induction needs a context of {2 * SHORTEST_COPY + 1} tokens and {SHORTEST_COPY} tokens to draw from; "
            f"here are {context} and {len(usable)}."
        )
    drawn = random.Random(f"induction {seed}")
    questions = [
        Repetition(
            once=tuple(drawn.sample(usable, length)), where=f"induction {place + 1}", by_lot=1 / length
        )
        for place in range(number)
    ]
    about = f"built in, seed {seed}, {length} tokens twice"
    return Task(name="induction", questions=tuple(questions), generated=True, about=about)


def _facts(folder: Path) -> Task:
    """Answers follow their prompts as they are: they begin with their own space."""
    try:
        chance = float(json.loads((folder / "facts.json").read_text(encoding="utf-8"))["chance"])
    except OSError as error:
        raise DataError(
            f"{folder / 'facts.json'} cannot be read: {error.strerror}. `minilm data facts` makes such a folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'facts.json'} is not the description of a facts folder: {error}."
        ) from error
    questions = tuple(
        Cloze(
            text=q.prompt,
            answer=q.answer,
            delimiter="",
            group=q.split,
            where=f"{folder}/questions.jsonl:{n}",
            by_lot=chance,
        )
        for n, q in enumerate(read_questions(folder), 1)
        if q.database == DATABASE  # the others are asked with another database in its place
    )
    return Task(name="facts", questions=questions, generated=True, about=str(folder))


_MAKERS: dict[str, Maker] = {
    "agreement": agreement,
    "brackets": brackets,
    "addition": _addition,
    "copying": _copying,
}
