"""Train mode and eval mode differ by dropout and by nothing else; gradients on or off change nothing.

Why: what is validated and shipped runs in eval mode without gradients; what learns runs in train mode with them. Fast
paths, running statistics and noise that is never switched off make two models out of one.

How: with every dropout at 0, one forward in train mode, in eval mode, in eval mode again after a train forward, with
gradients, under no_grad and under inference_mode, must agree; the whole prompt through the cache must agree with the
path that trains. Then every dropout is raised to one half: two forwards in eval mode must agree bit for bit, because
in eval mode there is no chance.

Cannot see: a difference that only shows in low precision, or after training has moved running statistics (see
eval_collapse).

Sources: K8 of the catalogue; pytorch issues 124464, 106630 and 118628; transformers issues 33844 and 45242.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, RANDOM_FLOATS, culprit, difference, quiet, tokens_for
from minilm.doctor.subject import Subject

ROWS, LENGTH = 2, 24


@check(group="model", needs=("forward", "module", "vocab_size"), cost="9 forwards", quick=True)
def modes_agree(subject: Subject) -> Finding:
    """Train, eval, and back; with and without gradients; with and without the cache; eval twice with dropout set."""
    if finding := _random_in_eval(subject):
        return finding
    found, seen = _differences(subject, 0), ""
    name = max(found, key=lambda n: found[n])
    if found[name] > FLOAT32_NOISE:  # a near-tie of a router may flip once, not twice
        again = _differences(subject, 1)
        if again[name] <= FLOAT32_NOISE:
            found, name = again, max(again, key=lambda n: again[n])
    seen = f"largest difference {found[name]:.1e} std, between {name}"
    if found[name] <= FLOAT32_NOISE:
        return passed(f"{seen}, of {len(found)} pairs; eval mode is free of chance", found[name], FLOAT32_NOISE,
                      unit="logit std", details=found)  # fmt: skip
    likely, advice = _CAUSES[name]
    return failed(
        seen, found[name], FLOAT32_NOISE, unit="logit std", bugs=likely, component=_where(subject, name) or name,
        advice=advice, details=found,
    )  # fmt: skip


TRAIN_EVAL = "train mode and eval mode"
BACK = "eval mode before and after a forward in train mode"
NO_GRAD = "gradients on and no_grad"
INFERENCE = "gradients on and inference_mode"
CACHE = "with and without the cache"
_CAUSES = {
    TRAIN_EVAL: (["train-eval-diverge", "mem-bn-eval", "norm-over-time"],
                 "use nothing that behaves otherwise in eval mode but dropout: no batch norm, no fast path"),
    BACK: (["mem-bn-eval", "train-eval-diverge", "rope-state-leak"],
           "a forward in train mode must not change what eval mode computes: no running statistics"),
    NO_GRAD: (["no-grad-other-path", "train-eval-diverge"],
              "do not choose a code path by torch.is_grad_enabled() or requires_grad"),
    INFERENCE: (["no-grad-other-path", "train-eval-diverge"],
                "do not choose a code path by torch.is_grad_enabled() or is_inference_mode_enabled()"),
    CACHE: (["use-cache-false-garbage", "kv-cache-mismatch"],
            "layers must not depend on there being a cache: pass shared keys and values on without it too"),
}  # fmt: skip


def _differences(subject: Subject, seed: int) -> dict[str, float]:
    """Each pair of ways to run the model -> difference in logit std."""
    assert subject.forward is not None and subject.module is not None
    forward = subject.forward
    with quiet(subject, seed=seed):
        tokens = tokens_for(subject, ROWS, LENGTH, seed)
        with torch.enable_grad():
            graph = forward(tokens).detach()
        with torch.no_grad():
            plain = forward(tokens)
            subject.module.train()
            train = forward(tokens)
            subject.module.eval()
            back = forward(tokens)
        with torch.inference_mode():
            inference = forward(tokens)
        found = {
            TRAIN_EVAL: difference(plain, train),
            BACK: difference(plain, back),
            NO_GRAD: difference(graph, plain),
            INFERENCE: difference(graph, inference.clone()),
        }
        if subject.incremental is not None:
            failures = (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError)
            with torch.no_grad(), contextlib.suppress(*failures):  # cache_parity says why it cannot be done
                found[CACHE] = difference(plain, subject.incremental(tokens, tokens.shape[1]))
    return found


def _where(subject: Subject, name: str) -> str:
    assert subject.module is not None and subject.forward is not None
    module, forward, incremental = subject.module, subject.forward, subject.incremental
    with quiet(subject):
        tokens = tokens_for(subject, ROWS, LENGTH)

        def run(train: bool, gradients: bool) -> Callable[[], Any]:
            def one() -> None:
                module.train(train)
                with torch.set_grad_enabled(gradients):
                    forward(tokens)
                module.eval()

            return one

        def cached() -> None:
            assert incremental is not None
            with torch.no_grad():
                incremental(tokens, tokens.shape[1])

        def differ(a: Tensor, b: Tensor) -> bool:
            return difference(a, b) > FLOAT32_NOISE

        one, other = {
            TRAIN_EVAL: (run(False, False), run(True, False)),
            BACK: (run(False, False), run(True, False)),
            CACHE: (run(False, False), cached),
        }.get(name, (run(False, True), run(False, False)))
        return culprit(module, one, other, differ)


def _random_in_eval(subject: Subject) -> Finding | None:
    """Two forwards in eval mode with every dropout at one half."""
    assert subject.forward is not None and subject.module is not None
    forward = subject.forward
    with quiet(subject), dropout_of(subject.module, 0.5), torch.no_grad():
        tokens = tokens_for(subject, ROWS, LENGTH)
        torch.manual_seed(1)
        one, two = forward(tokens), forward(tokens)
        if torch.equal(one, two):
            return None
        off = difference(one, two)
        if off <= FLOAT32_NOISE:  # kernels that sum in another order
            return None

        def differ(a: Tensor, b: Tensor) -> bool:
            return difference(a, b) > FLOAT32_NOISE

        where = culprit(subject.module, lambda: forward(tokens), lambda: forward(tokens), differ)
    with quiet(subject), torch.no_grad():
        always = difference(forward(tokens), forward(tokens)) > FLOAT32_NOISE
    likely = (
        ["moe-jitter-in-eval", "dropout-in-eval"] if always else ["dropout-in-eval", "moe-jitter-in-eval"]
    )
    return failed(
        f"two forwards in eval mode differ by {off:.1e} std" + (" even with every dropout at 0" if always else ""),
        off, 0.0, unit="logit std", bugs=likely, component=where or "eval mode",
        advice="pass training=self.training to functional dropout (its default is True; for sdpa: dropout_p 0 in eval "
        "mode), and add noise to routers in train mode alone",
    )  # fmt: skip


@contextlib.contextmanager
def dropout_of(module: nn.Module, p: float) -> Iterator[None]:
    """Every dropout layer, and every float attribute that is named like one, set to `p` inside."""
    changed: list[tuple[nn.Module, str, float]] = []
    for part in module.modules():
        for name, value in list(vars(part).items()):
            named = RANDOM_FLOATS.search(name) or (
                name == "p" and isinstance(part, nn.modules.dropout._DropoutNd)
            )
            if named and isinstance(value, float) and 0 <= value < 1:
                changed.append((part, name, value))
                setattr(part, name, p)
    try:
        yield
    finally:
        for part, name, value in changed:
            setattr(part, name, value)


@modes_agree.plant("dropout-in-eval", component="attention", what="dropout_p without a look at the mode")
def _() -> Subject:
    class Always(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(
                q, self.shared(k), self.shared(v), allowed.unsqueeze(1), dropout_p=self.dropout
            )

    return specimens.subject(attention=Always, size={"dropout": 0.1})


@modes_agree.plant(
    "dropout-in-eval", component="ffn", what="functional dropout with its default, configured 0"
)
def _() -> Subject:
    class Functional(specimens.FeedForward):
        dropout = 0.0

        def __init__(self, size: specimens.model.Size) -> None:
            super().__init__(size)
            self.dropout = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), self.dropout)

    return specimens.subject(ffn=Functional)


@modes_agree.plant("moe-jitter-in-eval", component="router")
def _() -> Subject:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x)
            return scores - (-torch.rand_like(scores).clamp_min(1e-9).log()).log()  # Gumbel noise, always

    class Routed(specimens.FeedForward):
        def __init__(self, size: specimens.model.Size) -> None:
            super().__init__(size)
            self.router = Router(size.dim, 2)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.router(x).softmax(-1)[..., :1]

    return specimens.subject(ffn=Routed)


@modes_agree.plant(
    "train-eval-diverge", component="attention", what="a fast path in eval mode that has no mask"
)
def _() -> Subject:
    class Fast(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            return super().attend(q, k, v, allowed if self.training else torch.ones_like(allowed))

    return specimens.subject(attention=Fast)


@modes_agree.plant("no-grad-other-path", component="attention")
def _() -> Subject:
    class Fast(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            every = torch.ones_like(allowed)
            return super().attend(q, k, v, allowed if torch.is_grad_enabled() else every)

    return specimens.subject(attention=Fast)


class _Normed(specimens.FeedForward):
    """A batch norm in front, as in query nets of memories."""

    def __init__(self, size: specimens.model.Size) -> None:
        super().__init__(size)
        self.batch_norm = nn.BatchNorm1d(size.dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.batch_norm(x.flatten(0, 1)).view_as(x))


@modes_agree.plant("mem-bn-eval", component="batch_norm")
def _() -> Subject:
    return specimens.subject(ffn=_Normed)


@modes_agree.plant(
    "mem-bn-eval", component="ffn", what="a running mean, used in eval mode, moved in train mode"
)
def _() -> Subject:
    class Running(specimens.FeedForward):
        def __init__(self, size: specimens.model.Size) -> None:
            super().__init__(size)
            self.register_buffer("mean", torch.zeros(size.dim))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
            return super().forward(x - self.mean)

    return specimens.subject(ffn=Running)


@modes_agree.plant(
    "use-cache-false-garbage", component="attention", what="shared keys are found in the cache alone"
)
def _() -> Subject:
    class Sharing(specimens.Attention):
        def remember(self, k: Tensor, v: Tensor, segments: Tensor, places: Tensor, cache: Any) -> Any:
            if cache is None:
                v = torch.zeros_like(v)
            return super().remember(k, v, segments, places, cache)

    return specimens.subject(attention=Sharing)


@modes_agree.healthy("dropout of 0.3, honoured")
def _() -> Subject:
    return specimens.subject(size={"dropout": 0.3})
