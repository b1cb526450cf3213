"""The language of the facts corpus: made-up names and values, five ways to state each relation, and filler.

Names and values are words of syllables, of another pattern for each kind, so no word is of two kinds and none is the
beginning of another. Everything else is English words in a small grammar. In every statement subject and relation
come before the object, else the object could not be known when it is predicted; between them stand 0 to some 10
further words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# c a consonant, v a vowel. All words of one kind have one length.
_PATTERNS = {"first": "cvcv", "last": "cvccv", "middle": "cvc", "value": "cvcvc"}

# {s} subject, {c} an optional clause about it, {o} object
RELATIONS: dict[str, tuple[str, ...]] = {
    "birthplace": (
        "{s}{c} was born in {o}",
        "the birthplace of {s}{c} is {o}",
        "{s}{c} first saw the light of day in {o}",
        "the town where {s}{c} came into the world is {o}",
        "the cradle of {s}{c} stood in {o}",
    ),
    "employer": (
        "{s}{c} works for {o}",
        "the employer of {s}{c} is {o}",
        "{s}{c} earns a wage at {o}",
        "the company that pays {s}{c} is {o}",
        "{s}{c} has a job with {o}",
    ),
    "language": (
        "{s}{c} speaks {o}",
        "the language of {s}{c} is {o}",
        "the mother tongue of {s}{c} is {o}",
        "{s}{c} thinks and dreams in {o}",
        "with the children {s}{c} talks in {o}",
    ),
    "teacher": (
        "{s}{c} was taught by {o}",
        "the teacher of {s}{c} was {o}",
        "{s}{c} learned everything from {o}",
        "the lessons of {s}{c} were given by {o}",
        "{s}{c} studied under {o}",
    ),
    "instrument": (
        "{s}{c} plays the {o}",
        "the instrument of {s}{c} is the {o}",
        "{s}{c} makes music on the {o}",
        "when {s}{c} performs we hear the {o}",
        "in the band {s}{c} sits behind the {o}",
    ),
    "dish": (
        "{s}{c} likes to eat {o}",
        "the favourite dish of {s}{c} is {o}",
        "{s}{c} would never refuse a bowl of {o}",
        "on the plate of {s}{c} lies some {o}",
        "the cook brings {s}{c} more {o}",
    ),
    "pet": (
        "{s}{c} keeps a {o}",
        "the pet of {s}{c} is a {o}",
        "the animal that follows {s}{c} is a {o}",
        "{s}{c} feeds a {o}",
        "in the garden of {s}{c} lives a {o}",
    ),
    "rival": (
        "{s}{c} competes with {o}",
        "the rival of {s}{c} is {o}",
        "{s}{c} cannot beat {o}",
        "the opponent of {s}{c} is {o}",
        "in every race {s}{c} runs against {o}",
    ),
}
NUM_TEMPLATES = 5

HEADINGS = (
    "Notes:",
    "Report:",
    "Letter:",
    "Memo:",
)  # so that no name ever begins a document, without its space
_PREFIXES = (
    "as everyone knows, ", "it is said that ", "according to old letters, ", "in those days ", "we read that ",
    "by all accounts ",
)  # fmt: skip
_SUFFIXES = (", they say", " to this day", ", as far as we know", ", which surprised nobody")
_ADVERBS = ("often", "rarely", "always", "slowly", "gladly", "never", "quietly", "sometimes")
_VERBS = ("paints", "repairs", "sells", "collects", "counts", "hides", "finds", "carries", "cleans", "draws")
_ADJECTIVES = ("old", "green", "heavy", "small", "bright", "broken", "wooden", "strange", "cheap", "warm")
_NOUNS = (
    "boats",
    "clocks",
    "stones",
    "lamps",
    "shoes",
    "books",
    "maps",
    "chairs",
    "coats",
    "bottles",
    "ropes",
)
_PEOPLE = ("farmer", "sailor", "baker", "painter", "doctor", "miller", "guard", "child", "merchant", "fisher")
_PLACES = ("market", "harbour", "forest", "kitchen", "valley", "tower", "mill", "church", "station", "field")
_TIMES = ("winter", "spring", "summer", "autumn", "morning", "evening", "rain", "harvest")

CLAUSES_SHARE, PREFIXES_SHARE, SUFFIXES_SHARE = 0.3, 0.2, 0.1  # of the statements


@dataclass(frozen=True)
class Sentence:
    """A sentence, where its object stands in it (None in filler), and what came before that."""

    text: str
    answer: tuple[int, int] | None = None

    @property
    def prompt(self) -> str:
        """The text up to the answer, without the space between them."""
        assert self.answer is not None
        return self.text[: self.answer[0]].rstrip(" ")


def words(kind: str, number: int, draw: random.Random) -> list[str]:
    """`number` different words of a kind; names with a capital letter. ValueError for more than there are."""
    letters = {"c": _CONSONANTS, "v": _VOWELS}
    pattern, found = _PATTERNS[kind], dict[str, None]()
    if number > num_words(kind) // 2:  # beyond it drawing at random would take long
        raise ValueError(f"{number} words of the kind {kind} are too many: {num_words(kind) // 2} at most")
    while len(found) < number:
        word = "".join(draw.choice(letters[c]) for c in pattern)
        found[word if kind == "value" else word.capitalize()] = None
    return list(found)


def num_words(kind: str) -> int:
    """How many words of a kind there could be."""
    sizes = {"c": len(_CONSONANTS), "v": len(_VOWELS)}
    total = 1
    for c in _PATTERNS[kind]:
        total *= sizes[c]
    return total


def statement(subject: str, relation: str, value: str, draw: random.Random) -> Sentence:
    """One of the ways to state a fact, perhaps with a clause, something before and something after it."""
    template = RELATIONS[relation][draw.randrange(NUM_TEMPLATES)]
    clause = _clause(draw) if draw.random() < CLAUSES_SHARE else ""
    before, after = template.format(s=subject, c=clause, o="\0").split("\0")
    if draw.random() < PREFIXES_SHARE:
        before = draw.choice(_PREFIXES) + before
    if draw.random() < SUFFIXES_SHARE:
        after += draw.choice(_SUFFIXES)
    before = before[0].upper() + before[1:]
    return Sentence(f"{before}{value}{after}.", (len(before), len(before) + len(value)))


def filler(draw: random.Random) -> Sentence:
    """A sentence about nobody."""
    parts = [
        "the", draw.choice(_PEOPLE), draw.choice(_ADVERBS), draw.choice(_VERBS), draw.choice(_ADJECTIVES),
        draw.choice(_NOUNS),
    ]  # fmt: skip
    if draw.random() < 0.5:
        parts += ["in the", draw.choice(_PLACES)]
    if draw.random() < 0.4:
        parts += ["before the", draw.choice(_TIMES)]
    text = " ".join(parts)
    return Sentence(f"{text[0].upper()}{text[1:]}.")


def entry_text(subject: str, relation: str, value: str) -> str:
    """How the database writes a fact: like none of the statements."""
    return f"{subject} | {relation} | {value}"


def _clause(draw: random.Random) -> str:
    parts = ["who", draw.choice(_ADVERBS), draw.choice(_VERBS)]
    if draw.random() < 0.5:
        parts.append(draw.choice(_ADJECTIVES))
    parts.append(draw.choice(_NOUNS))
    if draw.random() < 0.3:
        parts += ["in the", draw.choice(_PLACES)]
    return f", {' '.join(parts)},"
