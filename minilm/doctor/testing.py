"""For people's own test suites.

from minilm.doctor.testing import assert_healthy

def test_my_model_is_healthy():
    assert_healthy(MyModel(config), vocab_size=1000)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minilm.doctor.core import run_checks, select
from minilm.doctor.report import Examination, explained
from minilm.doctor.targets.foreign import subject_of_object


def assert_healthy(
    subject: Any, *, suite: str = "full", only: Iterable[str] = (), must_run: Iterable[str] = (), **parts: Any
) -> Examination:
    """Examine, and raise AssertionError with the whole explanation if anything failed.

    subject    a `Subject`, a torch module, a Hugging Face model, or a function tokens [B, T] -> logits [B, T, V]
    must_run   checks that may not be left out for lack of something: NOT RUN of one of these fails, too
    parts      further fields of `Subject`, for instance vocab_size=..., loss=...

    Returns the examination. Nothing checked at all is a failure, too.
    """
    whole = subject_of_object(subject, **parts)
    examination = Examination(whole.name, suite, list(run_checks(whole, select(suite, only))))
    problems = [
        "\n".join(
            [f"FAIL {f.check}", *(f"  {name}: {text}" for name, text in explained(f, examination.roots(f)))]
        )
        for f in examination.failures
    ]
    wanted = set(must_run)
    problems += [f"NOT RUN {f.check}: {f.message}" for f in examination.of("NOT RUN") if f.check in wanted]
    if not examination.of("PASS") and not problems:
        problems.append(
            "nothing could be checked: " + "; ".join(f"{f.check}: {f.message}" for f in examination.findings)
        )
    assert not problems, "\n\n".join(problems)
    return examination
