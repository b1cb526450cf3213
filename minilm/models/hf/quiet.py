"""Loading and saving with transformers without its progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """A check or an export loads a model several times; transformers would draw a bar for each.

    What was set before is set again afterwards: `transformers.utils.logging` is one for the whole process.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
