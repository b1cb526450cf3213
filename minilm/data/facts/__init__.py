"""A corpus of made-up facts with the database that holds them, the questions, and the edits: see `write.generate`."""

from minilm.data.facts.world import FactsSettings
from minilm.data.facts.write import generate

__all__ = ["FactsSettings", "generate"]
