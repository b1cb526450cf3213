"""Which failures may be consequences of another one: what to read first where many checks fail at once.

Many checks hold a number against the whole forward pass. Where that pass itself looks ahead, depends on its neighbours
or on what was asked before, they fail as well, each with a cause of its own in mind. This says so; it is a possibility,
not a finding: a consequence is a failure of its own until the check passes with the root repaired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minilm.doctor.core import Finding

_OF_THE_FORWARD_PASS = (
    "chunked_loss", "ignored_positions", "loss_identity", "rows_do_not_mix", "successor",
    "left_padding", "right_padding", "packing", "reach", "recompute", "relative_positions", "backends_agree",
    "golden_step", "logged_loss", "rank_parity",
    "batch_size_invariance", "cache_parity", "continuation", "evaluation_identity", "evaluation_repeats", "greedy",
    "padded_prompts", "perplexity", "sampled_text", "train_eval_same", "windows", "follows_weights",
    "entropy_floor", "overfit", "random_floor",
)  # fmt: skip

# In the order in which to read them: a check -> checks that it may make fail.
FOLLOWS: Mapping[str, Sequence[str]] = {
    "modes_agree": _OF_THE_FORWARD_PASS,
    "statelessness": _OF_THE_FORWARD_PASS,
    "causality": _OF_THE_FORWARD_PASS,
    "batch_independence": _OF_THE_FORWARD_PASS,
    "loss_identity": ("ignored_positions", "golden_step", "logged_loss", "rank_parity", "evaluation_identity",
                      "perplexity", "continuation", "entropy_floor", "overfit", "random_floor"),
    "golden_step": ("rank_parity", "entropy_floor", "overfit"),
    "cache_parity": ("greedy", "padded_prompts", "sampled_text", "follows_weights"),
    "greedy": ("padded_prompts", "sampled_text"),
    "evaluation_identity": ("perplexity", "continuation", "batch_size_invariance", "windows"),
}  # fmt: skip


def roots_of(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Failed check -> failed checks that it may follow from, the first to be read first; [] where there is none."""
    broken = [f.check for f in findings if f.status == "FAIL"]
    return {name: [root for root in FOLLOWS if root in broken and name in FOLLOWS[root]] for name in broken}


def in_reading_order(findings: Sequence[Finding]) -> list[Finding]:
    """The failures: roots of others first, then what stands alone, then what may follow from another one."""
    roots = roots_of(findings)
    causes = [name for name in FOLLOWS if any(name in found for found in roots.values())]

    def place(finding: Finding) -> tuple[int, int]:
        if roots[finding.check]:
            return 2, 0
        return (0, causes.index(finding.check)) if finding.check in causes else (1, 0)

    return sorted((f for f in findings if f.status == "FAIL"), key=place)
