"""The checks of losses, evaluation and generation are silent on our own functions, and on healthy foreign models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minilm import alignment, models
from minilm.alignment import Batch, align
from minilm.doctor.core import Check, Finding, run_checks, select
from minilm.doctor.probes import random_states_kept
from minilm.doctor.subject import Rows, Subject
from minilm.doctor.targets.huggingface import huggingface_subject
from minilm.evaluation.generate import Sampling, choose, generate
from minilm.evaluation.score import continuation_of_tokens, evaluate, measure, windows

CHECKS = [check for check in select(only=["loss", "evaluation"]) if "bits_per_byte" not in check.needs]
VOCABULARY, CONTEXT = 97, 32


def batch_of(rows: Rows) -> Batch:
    return align(rows.tokens, rows.segments, rows.learn)


def ours(**changes: Any) -> Subject:
    """A tiny model of ours with our loss, evaluation, cache, generator and sampler, put together by hand."""
    torch.manual_seed(0)
    config = models.preset("original", "tiny", vocab_size=VOCABULARY, max_length=CONTEXT, **changes)
    model = models.build(config)

    def logits(rows: Rows) -> Tensor:
        batch = batch_of(rows)
        return model(batch.inputs, segments=batch.segments, positions=batch.positions).logits

    def mean(logits: Tensor, batch: Batch) -> Tensor:
        total = alignment.score(logits, batch)
        return total.share(total.tokens)

    def incremental(tokens: Tensor, n: int) -> Tensor:
        cache = model.new_cache(*tokens.shape)
        parts = [tokens[:, :n], *tokens[:, n:].split(1, dim=1)]
        return torch.cat([model(part, cache=cache).logits for part in parts], dim=1)

    def following(prompt: Sequence[int], more: Sequence[int]) -> float:
        scores = continuation_of_tokens(model, [[*prompt, *more]], [len(prompt)], len(more))
        return scores[len(prompt)].total.mean

    def document(tokens: Sequence[int]) -> tuple[float, int]:
        nats, count, *_ = measure(model, windows(0, tokens, CONTEXT, CONTEXT // 2)).totals[0]
        return nats, int(count)

    def write(prompts: Sequence[Sequence[int]], max_new_tokens: int, **how: Any) -> list[list[int]]:
        return [g.tokens for g in generate(model, prompts, max_new_tokens=max_new_tokens, **how)]

    def sample(logits: Tensor, *, seed: int = 0, **how: Any) -> Tensor:
        uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return choose(logits, Sampling(max_new_tokens=1, **how), uniform)

    return Subject(
        name="minilm",
        vocab_size=VOCABULARY,
        max_length=CONTEXT,
        special_ids=(0, 1, 2),
        module=model,
        forward=lambda tokens: model(tokens).logits,
        masked_forward=lambda tokens, keep: model(tokens, segments=keep.long()).logits,
        packed_forward=lambda tokens, segments: model(tokens, segments=segments).logits,
        incremental=incremental,
        loss=lambda rows: mean(logits(rows), batch_of(rows)),
        criterion=lambda logits, rows: mean(logits[:, :-1], batch_of(rows)),
        evaluate=lambda batches: evaluate(model, [batch_of(rows) for rows in batches]).mean,
        perplexity=lambda batches: evaluate(model, [batch_of(rows) for rows in batches]).perplexity,
        continuation=following,
        document=document,
        generate=write,
        choose=sample,
    )


def labelled(subject: Subject) -> Subject:
    """The same with its loss through the border to Hugging Face's labels."""

    def loss(rows: Rows) -> Tensor:
        if bool((rows.segments > 1).any()):
            return subject.loss(rows)
        labels = torch.where(rows.learn & (rows.segments > 0), rows.tokens, alignment.IGNORED)
        batch = alignment.from_labels(rows.tokens, labels, rows.segments)
        output = subject.module(batch.inputs, segments=batch.segments, positions=batch.positions)
        total = alignment.score(output.logits, batch)
        return total.share(total.tokens)

    return subject.but(loss=loss, criterion=None)


def hugging_face(name: str) -> Subject:
    """A tiny model of transformers with its own loss and generator."""
    import transformers

    small = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                bos_token_id=1, eos_token_id=2,
            )
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    subject = huggingface_subject(small[name]().eval(), fresh=True, name=name)

    @functools.wraps(subject.generate)
    def kept(*args: Any, **how: Any) -> Any:
        with random_states_kept():
            return subject.generate(*args, **how)

    return subject.but(generate=kept)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "ours": ours,
    "ours with tied embeddings and dropout": lambda: ours(tie_embeddings=True, dropout=0.2),
    "ours through labels": lambda: labelled(ours()),
    "ours without its criterion": lambda: ours().but(criterion=None),
    "llama": lambda: hugging_face("llama"),
    "gpt2": lambda: hugging_face("gpt2"),
}

# transformers averages over the labels: without any, the loss is 0 / 0.
KNOWN = {("llama", "no_targets"): "all-ignored-nan", ("gpt2", "no_targets"): "all-ignored-nan"}


# Our logits are a product outside of any module, and a model may have nothing that drops out.
NOT_RUN = {
    ("ours through labels", "loss_gradient"): "no part of the module makes logits",
    ("ours without its criterion", "loss_gradient"): "no part of the module makes logits",
    ("llama", "evaluation_in_eval_mode"): "no dropout",
}


def found(subject: Subject, check: Check) -> Finding:
    return next(run_checks(subject, [check]))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("name", SUBJECTS)
def test_checks_of_loss_evaluation_and_generation_are_silent_on_healthy_models(
    name: str, check: Check
) -> None:
    subject = SUBJECTS[name]()
    finding = found(subject, check)
    if (name, check.name) in KNOWN:
        assert finding.status == "FAIL"
        assert finding.bugs[0] == KNOWN[name, check.name]
    elif subject.lacks(check.needs):
        assert finding.status == "NOT RUN"
    elif (name, check.name) in NOT_RUN:
        assert NOT_RUN[name, check.name] in finding.message
    else:
        assert finding.status == "PASS", finding.message


def test_the_subject_of_our_own_functions_lacks_nothing_but_auxiliary_losses() -> None:
    lacking = {need for check in CHECKS for need in ours().lacks(check.needs)}
    assert lacking == {"auxiliary", "total_loss"}


def test_our_loss_shifted_once_more_is_found_in_the_frame_of_our_alignment() -> None:
    subject = ours()

    def loss(rows: Rows) -> Tensor:
        batch = batch_of(rows)
        later = torch.roll(batch.targets, -1, 1)
        weights = batch.weights * torch.roll(batch.weights, -1, 1)
        weights[:, -1] = 0
        wrong = Batch(batch.inputs, batch.segments, batch.positions, later, weights)
        output = subject.module(batch.inputs, segments=batch.segments, positions=batch.positions)
        total = alignment.score(output.logits, wrong)
        return total.share(total.tokens)

    (check,) = select(only=["loss_identity"])
    finding = found(subject.but(loss=loss, criterion=None), check)
    assert finding.status == "FAIL"
    assert finding.bugs[0] == "double-shift"


def test_a_generator_that_returns_its_prompt_is_found_whoever_wrote_it() -> None:
    subject = hugging_face("gpt2")

    def repeating(prompts: Sequence[Sequence[int]], max_new_tokens: int, **how: Any) -> list[list[int]]:
        new = subject.generate(prompts, max_new_tokens, **how)
        return [[*prompt, *row] for prompt, row in zip(prompts, new, strict=True)]

    for check in select(only=["greedy", "new_tokens_only"]):
        finding = found(subject.but(generate=repeating), check)
        assert finding.status == "FAIL"
        assert finding.bugs[0] == "generator-repeats-prompt"
        assert math.isfinite(finding.seconds)
