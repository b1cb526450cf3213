"""All bugs: `for bug in BUGS: broken = bug.plant(Kit())`."""

from __future__ import annotations

from unseen import bugs_model, bugs_training
from unseen.bug import Bug

BUGS: tuple[Bug, ...] = tuple(
    value
    for module in (bugs_training, bugs_model)
    for value in vars(module).values()
    if isinstance(value, Bug)
)
