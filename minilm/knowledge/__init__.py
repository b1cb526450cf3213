"""A store of short texts that a model reads: entries on a square grid, found by the words before a position."""
