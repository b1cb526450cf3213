"""The errors a user can cause, and nothing else: each says what, where and what to do.

Entry points print them as one paragraph and exit with code 2; a traceback appears only with `--debug`.
Anything that is not a `MinilmError` is a defect of minilm and keeps its traceback.
"""

from __future__ import annotations


class MinilmError(Exception):
    """Base class. `str(error)` is the paragraph that the user reads."""


class ConfigError(MinilmError):
    """A setting is unknown, has a wrong value, or contradicts another one."""


class DataError(MinilmError):
    """A source, tokenizer, store or row is missing, damaged, empty, or does not fit the others."""


class CheckpointError(MinilmError):
    """A checkpoint is missing, torn, damaged, or belongs to another model, data set or layout."""


class OutOfMemory(MinilmError):
    """The device has not enough memory for what the settings ask."""


class CheckFailed(MinilmError):
    """A correctness check found something that would make the numbers of this run wrong."""


def listed(problems: list[str]) -> str:
    """One problem as itself, several as a numbered list: a user repairs all of them in one go."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  {n}. {text}" for n, text in enumerate(problems, 1))
