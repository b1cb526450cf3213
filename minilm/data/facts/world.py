"""The facts: who they are about, how often the text states them, which of them the database has.

A fact is an entity, a relation and a value. Each is of one of three sorts:

    seen            in the text and in the database
    database_only   never in the text, but its entity is there with another relation, its relation with other entities
    text_only       in the text, not in the database

The facts of the text have ranks, and the exposures (how many statements) go as 1 / rank (Zipf), at least one each.
The bands head, mid and tail are the first tenth of the ranks, the next four tenths, and the rest.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from minilm.data.facts.language import RELATIONS, num_words, words
from minilm.errors import ConfigError, listed

SORTS = ("seen", "database_only", "text_only")
BANDS = ("head", "mid", "tail")
_HEAD, _MID = 0.1, 0.5  # ranks below these shares of all are head and mid


@dataclass(frozen=True, kw_only=True)
class FactsSettings:
    """What decides the corpus, all of it."""

    entities: Annotated[int, Field(description="whom the facts are about")] = 4096
    relations: Annotated[int, Field(description="facts about each")] = 8
    values: Annotated[int, Field(description="what a fact may say; the same for all relations")] = 256
    mentions: Annotated[int, Field(description="statements of facts in the training text")] = 400_000
    validation_mentions: Annotated[int, Field(description="and in the validation text")] = 4_000
    filler: Annotated[float, Field(description="share of filler in the words of the text")] = 0.3
    database_only: Annotated[float, Field(description="share of facts that the text never states")] = 0.1
    text_only: Annotated[float, Field(description="share of facts that the database lacks")] = 0.1
    questions: Annotated[int, Field(description="of each split, if it has so many facts")] = 500
    seed: Annotated[int, Field(description="of everything that is drawn")] = 0

    def check(self) -> None:
        """ConfigError with all that does not fit."""
        facts = self.entities * self.relations
        side = name_words(self.entities)
        most = num_words("first") // 2
        problems = []
        if not 4 <= self.entities <= most**2:
            problems.append(f"entities is {self.entities}: 4 to {most**2} are possible")
        if not 2 <= self.relations <= len(RELATIONS):
            problems.append(f"relations is {self.relations}: 2 to {len(RELATIONS)} are possible")
        if not 2 <= self.values <= num_words("value") // 2:
            problems.append(f"values is {self.values}: 2 to {num_words('value') // 2} are possible")
        if not 0 <= self.filler < 1:
            problems.append(f"filler is {self.filler}: 0 or more and below 1")
        if min(self.database_only, self.text_only) < 0 or self.database_only + self.text_only > 0.5:
            problems.append(
                f"database_only and text_only are {self.database_only} and {self.text_only}: 0 or more, together at "
                "most 0.5"
            )
        elif self.mentions < facts * (1 - self.database_only):
            problems.append(
                f"mentions is {self.mentions}, but {math.ceil(facts * (1 - self.database_only))} facts are to be "
                "stated at least once"
            )
        if min(self.questions, self.validation_mentions) < 1:
            problems.append("questions and validation_mentions must be at least 1")
        if problems or side < 1:
            raise ConfigError(listed(problems))


@dataclass(frozen=True)
class Fact:
    """rank and exposures are 0 and band is empty where the text never states it; row is -1 where no entry has it."""

    subject: str
    relation: str
    value: str
    sort: str
    row: int
    rank: int
    exposures: int
    band: str

    @property
    def key(self) -> tuple[str, str]:
        return self.subject, self.relation


@dataclass(frozen=True)
class World:
    """All facts, and the words that they are made of. `others` are entities about whom the text never speaks."""

    facts: list[Fact]
    values: list[str]
    others: list[str]

    @property
    def database(self) -> list[Fact]:
        """The facts of the database in the order of its rows."""
        return sorted((f for f in self.facts if f.row >= 0), key=lambda f: f.row)

    @property
    def stated(self) -> list[Fact]:
        """The facts of the text by rank."""
        return sorted((f for f in self.facts if f.rank), key=lambda f: f.rank)


def name_words(entities: int) -> int:
    """How many first and how many last names `entities` names need."""
    return math.isqrt(max(0, entities - 1)) + 1


def make_world(settings: FactsSettings) -> World:
    """The world of these settings; the same settings give the same. Raises ConfigError."""
    settings.check()
    draw = random.Random(f"world {settings.seed}")
    # A tenth more names than entities: for entries about people of whom the text never speaks.
    number = settings.entities + max(8, settings.entities // 10)
    names = _names(number, draw)
    values = words("value", settings.values, draw)
    relations = list(RELATIONS)[: settings.relations]
    pairs = [(subject, relation) for subject in names[: settings.entities] for relation in relations]
    sorts = _sorts(pairs, settings, draw)
    said = {pair: draw.choice(values) for pair in pairs}

    stated = [pair for pair in pairs if sorts[pair] != "database_only"]
    draw.shuffle(stated)
    exposures = _exposures(len(stated), settings.mentions)
    ranks = {pair: rank for rank, pair in enumerate(stated, 1)}
    entries = [pair for pair in pairs if sorts[pair] != "text_only"]
    draw.shuffle(entries)  # so that the place in the file says nothing about the fact
    rows = {pair: row for row, pair in enumerate(entries)}
    facts = []
    for pair in pairs:
        rank = ranks.get(pair, 0)
        facts.append(
            Fact(
                *pair,
                value=said[pair],
                sort=sorts[pair],
                row=rows.get(pair, -1),
                rank=rank,
                exposures=exposures[rank - 1] if rank else 0,
                band=_band(rank, len(stated)) if rank else "",
            )
        )
    return World(facts, values, names[settings.entities :])


def _names(number: int, draw: random.Random) -> list[str]:
    """Different names of two words, a third of them with a middle one."""
    side = name_words(number)
    first, last = words("first", side, draw), words("last", side, draw)
    middle = words("middle", max(4, side // 2), draw)
    places = draw.sample(range(side * side), number)
    names = []
    for place in places:
        between = f" {draw.choice(middle)}" if draw.random() < 1 / 3 else ""
        names.append(f"{first[place // side]}{between} {last[place % side]}")
    return names


def _sorts(
    pairs: list[tuple[str, str]], settings: FactsSettings, draw: random.Random
) -> dict[tuple[str, str], str]:
    """A sort for each pair. At most half of the facts about one entity are database_only: the others introduce it."""
    sorts = dict.fromkeys(pairs, "seen")
    order = draw.sample(pairs, len(pairs))
    wanted, hidden = round(settings.database_only * len(pairs)), dict[str, int]()
    for pair in order:
        if wanted and hidden.get(pair[0], 0) < settings.relations // 2:
            sorts[pair], wanted = "database_only", wanted - 1
            hidden[pair[0]] = hidden.get(pair[0], 0) + 1
    left = [pair for pair in order if sorts[pair] == "seen"]
    for pair in left[: round(settings.text_only * len(pairs))]:
        sorts[pair] = "text_only"
    return sorts


def _exposures(facts: int, mentions: int) -> list[int]:
    """Statements by rank: as 1 / rank, at least 1, together `mentions` (largest remainders)."""
    spare = mentions - facts
    harmonic = math.fsum(1 / rank for rank in range(1, facts + 1))
    shares = [spare / harmonic / rank for rank in range(1, facts + 1)]
    counts = [int(share) for share in shares]
    left = spare - sum(counts)
    for index in sorted(range(facts), key=lambda i: counts[i] - shares[i])[:left]:
        counts[index] += 1
    return [1 + count for count in counts]


def _band(rank: int, ranks: int) -> str:
    return BANDS[0] if rank <= _HEAD * ranks else BANDS[1] if rank <= _MID * ranks else BANDS[2]
