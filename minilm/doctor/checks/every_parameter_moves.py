"""Every trainable parameter gets a gradient and moves.

Why: a detached activation or a forgotten freeze trains half of a model, a part that is not in the optimizer stays as it
was drawn. The loss falls all the same.

How: four steps (a warm-up from 0 and parts that begin at 0 need more than one), in which each trainable parameter must
get a gradient and change. One without a gradient is changed by hand: if the logits do not notice, it is a spare part
(or an expert that was not visited), and only counted.

Cannot see: what was frozen on purpose (it is counted in the message).

Sources: K13 of the catalogue; mmpretrain issue 702; accelerate issue 2665.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import no_randomness, random_states_kept
from minilm.doctor.stepping import (
    logits_of,
    start,
    trainable,
    uneven_rows,
    watched_step,
    weights_of,
)
from minilm.doctor.subject import Subject

STEPS = 4


@check(group="training", needs=("training", "vocab_size"), cost="4 steps")
def every_parameter_moves(subject: Subject) -> Finding:
    """Trainable parameters without a gradient, or without a movement."""
    training = start(subject, seed=0)
    named = trainable(training.module)
    before, with_gradient, seen_any = weights_of(training.module), set(), False
    for step in range(STEPS):
        updates = watched_step(training, uneven_rows(subject, seed=step).split(4), weights=False).updates
        for update in updates:
            seen_any = seen_any or bool(update.gradients)
            with_gradient |= {name for name, g in update.gradients.items() if bool(g.any())}
    still = [name for name, p in named.items() if torch.equal(before[name], p.detach())]
    blind = [name for name in named if name not in with_gradient] if seen_any else []
    frozen = sum(1 for p in training.module.parameters() if not p.requires_grad)
    unused = _unused(subject, blind)
    blind = [name for name in blind if name not in unused]
    still = [name for name in still if name not in unused]
    if blind:
        return failed(
            f"{len(blind)} of {len(named)} parameters get no gradient in {STEPS} steps: {', '.join(blind[:4])}",
            float(len(blind)), 0.0, unit="parameters", bugs=["frozen-by-accident", "grad-none-ckpt", "params-missing"],
            component=f"gradient of {blind[-1]}",
            advice="look behind it for detach(), no_grad, or a product that cuts the graph",
        )  # fmt: skip
    if still:
        return failed(
            f"{len(still)} of {len(named)} parameters have a gradient and do not move: {', '.join(still[:4])}",
            float(len(still)), 0.0, unit="parameters", bugs=["params-missing", "bf16-no-master", "frozen-by-accident"],
            component=f"update of {still[0]}", advice="hand it to the optimizer: build the optimizer after the model",
        )  # fmt: skip
    aside = f"; {frozen} are frozen" * (
        frozen > 0
    ) + f"; {len(unused)} are not used by the forward pass" * bool(unused)
    moved = len(named) - len(unused)
    return passed(
        f"all {moved} trainable parameters moved in {STEPS} steps{aside}", 0.0, 0.0, unit="parameters"
    )


def _unused(subject: Subject, names: list[str]) -> set[str]:
    """Those of the parameters that change nothing when they are changed: an unvisited expert, a spare part."""
    training = start(subject, seed=0)
    if not names or training.forward is None:
        return set()
    rows = uneven_rows(subject)

    def logits() -> Tensor:
        with random_states_kept(1):
            return logits_of(training, rows)

    tables = [
        m for m in training.module.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None
    ]
    padding = {table.weight.data_ptr(): [table.padding_idx] for table in tables}
    unused = set()
    with no_randomness(training.module), torch.no_grad():
        training.module.train()
        before = logits()
        for name in names[:64]:
            parameter = trainable(training.module)[name]
            kept = parameter.detach().clone()
            parameter.add_(1).mul_(3)
            for row in padding.get(parameter.data_ptr(), ()):  # it gets no gradient by design
                parameter[row] = kept[row]
            if torch.equal(logits(), before):
                unused.add(name)
            parameter.copy_(kept)
    return unused


@every_parameter_moves.plant("frozen-by-accident", component="attention", what="a detached activation")
def _() -> Subject:
    class Detached(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            return super().attend(q, k, v, allowed).detach()

    return specimens.subject(attention=Detached)


@every_parameter_moves.plant("params-missing", component="update of")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.layers.parameters(), lr=1.0)

    return specimens.subject(trainer=Broken)


@every_parameter_moves.healthy("the first rate is 0, output projections begin at 0, the embedding is frozen")
def _() -> Subject:
    class Zero(specimens.Model):
        def initialise(self) -> None:
            super().initialise()
            for layer in self.layers:
                nn.init.zeros_(layer.attention.out.weight)
                nn.init.zeros_(layer.ffn.down.weight)
            self.embedding.weight.requires_grad_(False)

    class Late(specimens.Trainer):
        def rate(self, step: int) -> float:
            return 0.01 * step

    return specimens.subject(model=Zero, trainer=Late)


@every_parameter_moves.healthy("a spare part that the forward pass does not use")
def _() -> Subject:
    class Spare(specimens.Model):
        def initialise(self) -> None:
            self.pooler = nn.Linear(4, 4)
            super().initialise()

    return specimens.subject(model=Spare)


@every_parameter_moves.healthy("a table of which only the padding row is used")
def _() -> Subject:
    class Shapes(specimens.Model):
        def initialise(self) -> None:
            self.shapes = nn.Embedding(5, self.size.dim, padding_idx=0)
            super().initialise()

        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) + self.shapes(torch.zeros_like(tokens))

    return specimens.subject(model=Shapes)
