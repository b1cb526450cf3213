"""A shuffled order that needs no memory: a keyed bijection of 0 .. n - 1, evaluated where it is needed.

The order of an epoch must be a function of (seed, epoch, place) alone, so that any rank can find any row of any
step without the steps before it. A list of all rows, shuffled, would do but costs 8 bytes a row on every rank
and seconds at every resume; an affine map i -> (a i + c) mod n costs nothing but leaves neighbours in step,
which shows as waves in the loss. A Feistel network is both free and well mixed.

Source: M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988;
the walk back into range: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", 2002; the mixing
function is SplitMix64's (G. Steele, D. Lea, C. Flood, 2014).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_ROUNDS = 6  # Luby and Rackoff need 4 with ideal functions; ours are merely good


class Permutation:
    """A bijection of range(n), determined by `key`. Calling it maps an array of places to an array of rows."""

    def __init__(self, n: int, *key: int | str) -> None:
        self.n = n
        # Places are pairs (a, b) of digits below `wide` and `high`; wide * high is barely above n.
        self.wide = max(1, math.isqrt(max(0, n - 1)) + 1)
        self.high = max(1, -(-n // self.wide))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self.keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64 [k] with values in range(n) -> int64 [k] with values in range(n)."""
        rows = self._once(np.asarray(places, dtype=np.int64))
        # The few that left range(n) go on through the network until they are back: still a bijection.
        while (outside := rows >= self.n).any():
            rows[outside] = self._once(rows[outside])
        return rows

    def _once(self, places: np.ndarray) -> np.ndarray:
        a, b = places // self.high, places % self.high
        for number, key in enumerate(self.keys):
            if number % 2 == 0:
                a = (a + _mixed(b, key, self.wide)) % self.wide
            else:
                b = (b + _mixed(a, key, self.high)) % self.high
        return a * self.high + b


def _mixed(x: np.ndarray, key: np.uint64, below: int) -> np.ndarray:
    """A hash of (x, key) in range(below)."""
    z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key  # arrays wrap around, as meant
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(below)).astype(np.int64)
