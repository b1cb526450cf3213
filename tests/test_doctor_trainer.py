"""`transformers.Trainer` under examination: what it does right passes, what is known of it is found, and so is a bug
in a subclass of ours.

What a healthy Llama is told here is true of transformers alone; each is reproduced below without the doctor.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import minilm
from minilm.doctor import core
from minilm.doctor.checks import entropy_floor
from minilm.doctor.stepping import logits_of
from minilm.doctor.subject import Rows, Subject
from minilm.doctor.targets.hf_trainer import trainer_subject

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
]

SIZE = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KNOWN = {  # of transformers 5.23 with LlamaForCausalLM
    "no_targets",  # the loss of rows without a target is NaN
    "nonfinite",  # a NaN in the gradient reaches every weight
    "batch_size_invariance",  # eval_loss is a mean of the means of batches
    "evaluation_leaves_no_trace",  # its loader draws from the generator of training
}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **SIZE,
        )
    )  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, **SIZE)
    )


def arguments(folder: Any, **more: Any) -> Any:
    settings = {"report_to": [], "use_cpu": True, "learning_rate": 1e-3, "weight_decay": 0.1}
    return transformers.TrainingArguments(output_dir=str(folder), **{**settings, **more})


def subject(folder: Any, model: Any, kind: Any = None) -> Subject:
    kind = kind or transformers.Trainer
    return trainer_subject(kind(model=model, args=arguments(folder)))


def found(examined: Any, *only: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {f.check: f for f in minilm.examine(examined, only=only).findings}


def test_llama_with_the_trainer_fails_in_nothing_but_what_is_known(tmp_path: Any) -> None:
    said = found(subject(tmp_path, llama()), "training", "loss", "evaluation", "checkpoint")
    failures = {name: f.message for name, f in said.items() if f.status == "FAIL"}
    assert set(failures) == KNOWN, failures
    for check in ("golden_step", "logged_loss", "clipping", "real_updates", "optimizer_math", "decay_groups"):
        assert said[check].status == "PASS", said[check]
    for check in ("evaluation_identity", "train_eval_same", "evaluation_in_eval_mode", "train_mode"):
        assert said[check].status == "PASS", said[check]
    assert "modes" not in failures["evaluation_leaves_no_trace"]


def test_a_trainer_itself_is_a_target(tmp_path: Any) -> None:
    trainer = transformers.Trainer(model=llama(), args=arguments(tmp_path))
    assert found(trainer, "optimizer_covers")["optimizer_covers"].status == "PASS"


def test_gpt2_is_divided_by_labels_counted_before_the_shift(tmp_path: Any) -> None:
    checks = ("golden_step", "logged_loss", "evaluation_identity", "real_updates")
    said = found(subject(tmp_path, gpt2()), *checks)
    for check in checks[:3]:
        assert said[check].status == "FAIL" and said[check].bugs[0] == "denominator-unshifted", said[check]
    assert "81/89" in said["golden_step"].message
    assert said["real_updates"].status == "PASS", said["real_updates"]


def test_a_subclass_that_averages_means_is_found(tmp_path: Any) -> None:
    class Forgets(transformers.Trainer):  # type: ignore[misc, name-defined]
        """Its loss is written by hand, and does not know the number of targets of the whole step."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(**inputs)
            loss = output.loss / self.args.gradient_accumulation_steps
            return (loss, output) if return_outputs else loss

    said = found(subject(tmp_path, llama(), Forgets), "golden_step")["golden_step"]
    assert said.status == "FAIL" and "mean-of-means-accum" in said.bugs, said


def test_a_subclass_that_forgets_to_divide_by_accumulation_steps_is_found(tmp_path: Any) -> None:
    class Forgets(transformers.Trainer):  # type: ignore[misc, name-defined]
        """What the Trainer hands to backward when it is told that the loss is divided already, and it is not."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss

    said = found(subject(tmp_path, llama(), Forgets), "golden_step")["golden_step"]
    assert said.status == "FAIL" and {"accum-not-divided", "mean-of-means-accum"} & set(said.bugs), said


def test_examining_changes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy_floor, "PATIENCE_SECONDS", 1.0)
    trainer = transformers.Trainer(model=llama(), args=arguments(tmp_path))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state, given = torch.get_rng_state(), trainer.args.to_dict()
    found(trainer, "golden_step", "evaluation_identity", "entropy_floor")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and trainer.args.to_dict() == given
    assert trainer.optimizer is None and trainer.state.global_step == 0 and not list(tmp_path.iterdir())


def test_packed_rows_are_not_run_with_the_reason(tmp_path: Any) -> None:
    @core.check(group="training", needs=("training",), cost="nothing")
    def packed_loss(examined: Subject) -> core.Finding:
        """Why: -. How: -. Cannot see: -. Sources: -."""
        assert examined.training is not None
        tokens, segments = (
            torch.arange(3, 15).view(2, 6),
            torch.tensor([[1, 1, 1, 2, 2, 0], [4, 4, 4, 4, 4, 4]]),
        )
        rows = Rows(tokens, segments, torch.ones_like(segments, dtype=torch.bool))
        logits_of(examined.training(), rows.take([1]))  # one document, whatever its number
        logits_of(examined.training(), rows)
        raise AssertionError("a row of two documents was taken for one")

    said = packed_loss(subject(tmp_path, llama()))
    assert (said.status, said.message) == (
        "NOT RUN",
        "packed rows: a Trainer gives its model no document borders",
    )


def test_a_slow_set_up_is_given_a_limited_time(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy_floor, "PATIENCE_SECONDS", 0.5)
    said = found(subject(tmp_path, llama()), "entropy_floor")["entropy_floor"]
    assert said.status == "NOT RUN" and "s were over" in said.message and said.seconds < 10, said


def test_what_is_known_is_true_of_transformers_alone(tmp_path: Any) -> None:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    rows = [{"input_ids": torch.arange(3, 3 + n) * 7 % 58 + 3} for n in (3, 24, 5, 20)]

    def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([i["input_ids"] for i in items], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": ids.masked_fill(ids == 0, -100),
        }

    losses, states = [], [torch.get_rng_state()]
    for size in (1, 4):
        given = arguments(tmp_path, per_device_eval_batch_size=size, disable_tqdm=True, seed=0)
        trainer = transformers.Trainer(model=model, args=given, data_collator=padded, eval_dataset=rows)
        states = [torch.get_rng_state()]
        losses.append(trainer.evaluate()["eval_loss"])
        states.append(torch.get_rng_state())
    assert abs(losses[0] / losses[1] - 1) > 1e-2  # the same rows, the same model
    assert not torch.equal(*states)  # and the dropout of the next step is another one
