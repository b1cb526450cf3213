"""Minimal pairs: two sentences that differ in what a grammar rule decides, and in nothing else."""

from __future__ import annotations

import random

from minilm.evaluation.tasks.questions import Choice

NOUNS = (  # singular, plural
    ("key", "keys"), ("child", "children"), ("teacher", "teachers"), ("dog", "dogs"), ("letter", "letters"),
    ("woman", "women"), ("car", "cars"), ("painting", "paintings"), ("farmer", "farmers"), ("song", "songs"),
    ("book", "books"), ("bird", "birds"), ("house", "houses"), ("man", "men"), ("table", "tables"),
)  # fmt: skip
VERBS = (("is", "are"), ("was", "were"), ("has been", "have been"), ("seems", "seem"))  # singular, plural
PLACES = ("near", "behind", "next to", "in front of", "beside")
ENDS = ("old", "new", "here", "in the city", "important", "beautiful", "ready", "far away")
BRACKETS = ("( )", "[ ]", "{ }")
ATTRACTORS = (0, 1, 2)
DEPTHS = (2, 3, 4)


def agreement(drawn: random.Random, number: int) -> list[Choice]:
    """The verb agrees with the first noun. Each noun between the two is of the other number, to attract the verb."""
    found = []
    for place in range(number):
        attractors = ATTRACTORS[place % len(ATTRACTORS)]
        plural = drawn.randrange(2)
        subject, *others = drawn.sample(NOUNS, 1 + attractors)
        between = "".join(f" {drawn.choice(PLACES)} the {other[1 - plural]}" for other in others)
        verb, end = drawn.choice(VERBS), drawn.choice(ENDS)
        right, wrong = (
            f"The {subject[plural]}{between} {verb[form]} {end}." for form in (plural, 1 - plural)
        )
        group = f"{attractors} attractor{'' if attractors == 1 else 's'}"
        found.append(_pair(drawn, right, wrong, group, f"agreement {place + 1}"))
    return found


def brackets(drawn: random.Random, number: int) -> list[Choice]:
    """In the wrong sentence two neighbouring closing brackets have changed places: the same words, the same counts."""
    found = []
    for place in range(number):
        depth = DEPTHS[place % len(DEPTHS)]
        kinds: list[tuple[str, str]] = []
        while len(kinds) < depth:
            opening, closing = drawn.choice(BRACKETS).split()
            if not kinds or kinds[-1][0] != opening:  # two equal ones could change places unseen
                kinds.append((opening, closing))
        nouns = [noun[drawn.randrange(2)] for noun in drawn.sample(NOUNS, depth + 1)]
        begun = f"The {nouns[0]}" + "".join(
            f" {opening} {drawn.choice(PLACES)} the {noun}"
            for (opening, _), noun in zip(kinds, nouns[1:], strict=True)
        )
        closings = [closing for _, closing in reversed(kinds)]
        swapped, at = list(closings), drawn.randrange(depth - 1)
        swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
        right, wrong = (f"{begun} {' '.join(order)} {_VERB}." for order in (closings, swapped))
        found.append(_pair(drawn, right, wrong, f"depth {depth}", f"brackets {place + 1}"))
    return found


_VERB = "can be seen"  # of either number


def _pair(drawn: random.Random, right: str, wrong: str, group: str, where: str) -> Choice:
    answer = drawn.randrange(2)
    choices = (right, wrong) if answer == 0 else (wrong, right)
    return Choice(choices=choices, answer=answer, delimiter="", group=group, where=where)
