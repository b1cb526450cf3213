"""`eval.py --agreement`: what a run logged, and the model's own ways to a loss, held against the evaluation.

The loss that training logs for step s is that of the weights BEFORE the update of step s. A checkpoint at step s holds
the weights after it, so what it can be held against exactly is the logged loss of step s + 1, over the rows of that
step, and the validation loss logged at step s.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from minilm.alignment import Batch
    from minilm.data.loader import Data
    from minilm.evaluation.agreement import Comparison
    from minilm.evaluation.material import Material
    from minilm.evaluation.section import Section
    from minilm.run import RunConfig
    from minilm.training.checkpoint import Found

DOCUMENTS = 16  # for the rows that need no log
NOISE_POSITIONS = 8192  # over so many the noise of a logged loss is measured; over more it is smaller
TRAINING, VALIDATION = "training loss as logged", "validation loss as logged"
WAYS = ("logged", "evaluation")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this part of eval.py."""
    group = parser.add_argument_group("agreement", "two ways to one number, beside what rounding can do")
    group.add_argument(
        "--agreement",
        nargs="?",
        const="report",
        choices=("report", "strict"),
        help="hold the logged losses, train mode, the cache, bfloat16, batch sizes and packing against the evaluation; "
        "strict: exit code 1 if two differ by more than rounding",
    )


def sections(arguments: argparse.Namespace, material: Material) -> list[Section]:
    """Nothing without --agreement."""
    if arguments.agreement is None:
        return []
    from minilm.evaluation.agreement import Agreement
    from minilm.evaluation.agreement_rows import compare_all

    held_out, config = material.held_out, material.config
    wanted = min(DOCUMENTS, held_out.num_documents)
    numbers = [k * held_out.num_documents // wanted for k in range(wanted)]
    documents = held_out.token_documents(numbers, 512)
    rows = logged_rows(material, weights=arguments.weights, other_store=arguments.store)
    dropout = config.model.dropout if config is not None else largest_dropout(material.model)
    rows += compare_all(material.model, documents, dropout=dropout)
    return [Agreement(rows=rows, strict=arguments.agreement == "strict")]


def largest_dropout(model: Any) -> float:
    """Of a model from elsewhere, whose settings we do not know: of its layers, and of attention that keeps a number."""
    from torch import nn

    found = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in model.modules():
        found += [
            value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)
        ]
    return max(found, default=0.0)


def logged_rows(
    material: Material, *, weights: Literal["last", "ema"] = "last", other_store: str | None = None
) -> list[Comparison]:
    """The two rows about the log of the run that the checkpoint lies in. The same in every process.

    weights      those that were loaded
    other_store  a knowledge store read in place of the run's, if any
    """
    from minilm.data.loader import open_data
    from minilm.errors import MinilmError
    from minilm.track.metrics import read_metrics
    from minilm.training import checkpoint

    if material.config is None or material.run_folder is None:
        return _neither("the checkpoint does not lie in a run folder: there is no log")
    if other_store is not None:
        return _neither(f"the run did not read the knowledge store {other_store}")
    try:
        records = read_metrics(material.run_folder)
        found, _ = checkpoint.find(material.folder)
        data = open_data(material.config.data)
    except MinilmError as error:
        return _neither(str(error))
    log = _Log(material, material.config, found, records, data)
    rows = []
    for what, compare in ((TRAINING, log.training), (VALIDATION, log.validation)):
        try:
            rows.append(compare(weights))
        except MinilmError as error:  # a store that is gone must not cost the other rows
            rows.append(_not_comparable(what, str(error)))
    return rows


def _neither(why: str) -> list[Comparison]:
    return [_not_comparable(TRAINING, why), _not_comparable(VALIDATION, why)]


def _not_comparable(what: str, why: str, logged: float | None = None) -> Comparison:
    from minilm.evaluation.agreement import Comparison

    return Comparison(what=what, ways=WAYS, numbers=(logged, None), why_not=why)


@dataclass(frozen=True)
class _Log:
    """The log of a run and what its numbers are over."""

    material: Material
    config: RunConfig
    found: Found  # the checkpoint that was loaded
    records: Sequence[dict[str, Any]]
    data: Data

    def training(self, weights: str) -> Comparison:
        """The loss of step s + 1 for a checkpoint at step s: of the loaded one, else of the newest that has it."""
        from minilm.run import load_checkpoint
        from minilm.training.checkpoint import list_checkpoints

        if weights != "last":
            return _not_comparable(TRAINING, "training does not compute the loss of the averaged weights")
        if (trained_on := self.found.trainer["loader"]["store"]) != self.data.train.store.fingerprint:
            return _not_comparable(
                TRAINING, f"{self.config.data.store} is not the store of the run ({trained_on})"
            )
        logged = {record["step"]: record for record in self.records if record["kind"] == "train"}
        assert self.material.run_folder is not None
        others = list_checkpoints(self.material.run_folder / "checkpoints")
        ordered = [self.found, *sorted(others, key=lambda one: -one.step)]
        chosen = next((one for one in ordered if one.step + 1 in logged), None)
        if chosen is None:
            return _not_comparable(
                TRAINING,
                f"the run logged no step after the checkpoint of step {self.found.step}, and the loss of that step is "
                "of the weights before it: keep an earlier checkpoint (train.save_every, train.keep_last)",
            )
        record, model = logged[chosen.step + 1], self.material.model
        if record["loss"] is None or not math.isfinite(record["loss"]):
            return _not_comparable(TRAINING, f"the loss of step {chosen.step + 1} was {record['loss']}")
        if chosen.folder != self.found.folder:
            from minilm.evaluation.mode import device_of

            model = load_checkpoint(chosen.folder, device=str(device_of(model))).model
        batches = self._step(record.get("data/batch", chosen.trainer["loader"]["next_step"]))
        dropout = self.config.model.dropout
        return self._compared(
            TRAINING,
            record["loss"],
            model,
            batches,
            f"step {chosen.step + 1}, weights of {chosen.folder.name}",
            why_not=f"dropout is {dropout:g}, and the log is of train mode" if dropout else None,
        )

    def validation(self, weights: str) -> Comparison:
        """The validation loss logged at the step of the checkpoint, over the rows that training validates on."""
        from minilm.data.loader import validation_batches

        name, rows = {"last": "loss", "ema": "ema_loss"}[weights], self.data.validation
        logged = [r for r in self.records if r["kind"] == "validation" and r["step"] == self.found.step]
        if rows is None or not logged or logged[-1].get(name) is None:
            return _not_comparable(
                VALIDATION, f"the run logged no validation {name} at step {self.found.step}"
            )
        before, now = self.found.trainer.get("validation_store"), rows.store.fingerprint
        if before is not None and before != now:
            return _not_comparable(
                VALIDATION,
                f"the validation store is another one than the run's ({before}, now {now})",
                logged[-1][name],
            )
        size = max(1, NOISE_POSITIONS // rows.sequence_length)
        batches = list(validation_batches(rows, size, max_rows=self.config.train.validation_rows))
        return self._compared(
            VALIDATION, logged[-1][name], self.material.model, batches, f"step {self.found.step}"
        )

    def _step(self, number: int) -> list[Batch]:
        """The rows of global batch `number`, those of all ranks."""
        from minilm.data.loader import Loader

        size = self.config.train.batch_size
        most = max(1, NOISE_POSITIONS // self.config.data.sequence_length)
        together = max(n for n in range(1, size + 1) if size % n == 0 and n <= most)
        loader = Loader(
            self.data.train, batch_rows=size, micro_batch=together, seed=self.config.train.seed, prefetch=0
        )
        return loader.step(number)

    def _compared(
        self,
        what: str,
        logged: float,
        model: Any,
        batches: list[Batch],
        where: str,
        why_not: str | None = None,
    ) -> Comparison:
        """The logged loss and the evaluation's, in the precision of the run; processes share the rows."""
        from minilm.evaluation.agreement import Comparison
        from minilm.evaluation.agreement_rows import loss_noise
        from minilm.evaluation.intervals import processes
        from minilm.evaluation.score import evaluate

        rank, world = processes()
        precision = self.found.trainer.get("layout", {}).get("precision", "fp32")
        total = evaluate(model, batches[rank::world], precision=precision)
        tokens, rows = int(total.tokens), sum(len(batch.inputs) for batch in batches)
        return Comparison(
            what=what,
            ways=WAYS,
            numbers=(logged, total.mean),
            over=f"{tokens:,} tokens in {rows} rows, {where}, {precision}",
            noise=loss_noise(model, batches[:1], precision),
            why_not=why_not,
        )
