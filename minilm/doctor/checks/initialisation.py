"""A fresh model depends on its seed, on all of it and on nothing else.

Why: a parameter that is never initialised keeps whatever the memory held: zeros on one day, garbage on another. A seed
that is set too late makes runs that cannot be repeated, or repeats that were meant to differ. A rule that compares the
wrong variable is never applied. An initialisation that runs after loading takes the loaded weights away.

How: two builds with one seed and one with another, while torch fills uninitialised memory with NaN and the global
random state differs: equal, equal, different, and finite. No matrix may start as a copy of another. Where the owner's
rule is handed over (`initial_stds`), the measured deviation of each matrix against it (5 % or six standard errors of a
deviation's estimate, whichever is more: a chance below 1e-8). Where there is saving and loading: weights drawn anew
must come back as they were.

Cannot see: a bad rule that is followed.

Sources: nanochat commit 94b73ad; OLMo-core 2.5.0; nanotron commit 37cc8b0; transformers issue 35141.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks
from minilm.doctor.checks.gradients_reach import BLOCK_NUMBER
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, difference, quiet, random_states_kept, worst_name
from minilm.doctor.subject import Subject

RULE = 0.05


@check(group="model", needs=("build",), cost="3 builds, a save and a load")
def initialisation(subject: Subject) -> Finding:
    """Build three times; compare with the rule; save and load drawn weights."""
    assert subject.build is not None
    states = []
    for seed, surroundings in ((3, 10), (3, 20), (4, 10)):
        with random_states_kept(surroundings), uninitialised_is_nan():
            module = subject.build(seed).module
        if module is None:
            raise NotApplicable("what is built has no module")
        states.append({n: p.detach() for n, p in [*module.named_parameters(), *module.named_buffers()]})
    finding = _garbage(states[0], module) or _seeds(states, module) or _copies(subject, states, module)
    finding = finding or _rule(subject, states[0], module) or _overwritten(subject)
    if finding:
        return finding
    random = sum(not torch.equal(states[0][n], states[2][n]) for n in states[0])
    rule = ", its matrices follow the rule" if subject.initial_stds else ""
    return passed(
        f"one seed gives one model, another seed changes {random} of {len(states[0])} tensors; none is left "
        f"uninitialised{rule}", 0.0, 0.0, unit="tensors that differ",
    )  # fmt: skip


@contextlib.contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Inside, torch.empty and its like return NaN (the largest value for whole numbers)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _garbage(state: Mapping[str, Tensor], module: nn.Module) -> Finding | None:
    """Values that are not numbers: the memory that nobody wrote to."""
    bad = [n for n, v in state.items() if v.is_floating_point() and bool(torch.isnan(v).any())]
    if not bad:
        return None
    return failed(
        f"{len(bad)} tensors keep what the memory held: {', '.join(bad[:4])}", float(len(bad)), 0.0, unit="tensors",
        bugs=["init-uninitialised-meta"], component=bad[0],
        advice="give every parameter a value in the initialisation, also after to_empty() and torch.empty()",
    )  # fmt: skip


def _seeds(states: list[dict[str, Tensor]], module: nn.Module) -> Finding | None:
    one, again, other = states
    differ = [n for n in one if not torch.equal(one[n], again[n])]
    if differ:
        whole = len(differ) == sum(not torch.equal(one[n], other[n]) for n in one)
        return failed(
            f"two builds with one seed differ in {len(differ)} tensors: {', '.join(differ[:4])}",
            float(len(differ)), 0.0, unit="tensors", bugs=["seed-not-applied", "init-uninitialised-meta"],
            component="seed" if whole else f"seed of {differ[0]}",
            advice="set the seed before the module is built, and draw from that generator alone",
        )  # fmt: skip
    matrices = [
        n for n, v in one.items() if v.dim() >= 2 and v.is_floating_point() and float(v.double().std()) > 0
    ]
    if matrices and all(torch.equal(one[n], other[n]) for n in matrices):
        return failed(
            "another seed builds the same model", 0.0, 1.0, unit="tensors that differ", bugs=["seed-not-applied"],
            component="seed", advice="use the seed that is asked for; look for one that is fixed further in",
        )  # fmt: skip
    return None


def _copies(subject: Subject, states: list[dict[str, Tensor]], module: nn.Module) -> Finding | None:
    """Blocks that start as copies of each other, or are one and the same; an output layer that copies the embedding."""
    one, other = states[0], states[2]
    stack = [part for _, part in blocks(module)]
    same = len(stack) > 1 and len({id(part) for part in stack}) == 1
    first: dict[tuple[torch.Size, float], str] = {}
    copies: list[tuple[str, str]] = []
    for name, value in one.items():
        if value.dim() < 2 or not value.is_floating_point() or torch.equal(value, other[name]):
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in subject.same_start):
            continue
        earlier = first.setdefault((value.shape, float(value.double().sum())), name)
        if earlier != name and torch.equal(one[earlier], value):
            copies.append((earlier, name))
    if not copies and not same:
        return None
    alike = same or any(BLOCK_NUMBER.sub(".*.", a) == BLOCK_NUMBER.sub(".*.", b) for a, b in copies)
    what = f"{len(copies)} matrices start as copies: {', '.join(' = '.join(pair) for pair in copies[:3])}"
    return failed(
        f"all {len(stack)} blocks are one and the same module" if same else what, float(len(copies) or len(stack) - 1),
        0.0, unit="copies", bugs=["seed-not-applied"] if alike else ["tie-lost-on-load", "seed-not-applied"],
        component="blocks" if same else " = ".join(copies[0]),
        advice="build each block anew, and draw it from the generator as it stands: no seed of its own, no deepcopy; "
        "tie by assigning the parameter, not its values",
    )  # fmt: skip


def _rule(subject: Subject, state: Mapping[str, Tensor], module: nn.Module) -> Finding | None:
    """Deviations against the owner's rule, 0 for what starts at zero; the longest pattern that fits is a parameter's
    own."""
    off: dict[str, float] = {}
    said: dict[str, str] = {}
    for name, value in state.items():
        fitting = [p for p in subject.initial_stds if fnmatch.fnmatch(name, p)]
        if not fitting or value.dim() < 2 or name not in dict(module.named_parameters()):
            continue
        planned = subject.initial_stds[max(fitting, key=len)]
        measured = float(value.double().std())
        limit = max(RULE, 6 / math.sqrt(2 * value.numel()))
        off[name] = abs(measured / planned - 1) / limit if planned else (math.inf if measured else 0.0)
        said[name] = f"{name} has a deviation of {measured:.4g}, the rule says {planned:.4g}"
    if not off or max(off.values()) <= 1:
        return None
    name = worst_name(off)
    role = [n for n in off if off[n] > 1]
    return failed(
        f"{said[name]} ({len(role)} parameters are off)", off[name], 1.0, unit="of what chance allows",
        bugs=["init-rescale-noop", "init-wrong-scale"], component=f"initialisation of {name}",
        advice="see whether the rule's condition is ever true, and whether another initialisation runs after it",
    )  # fmt: skip


def _overwritten(subject: Subject) -> Finding | None:
    """Weights of another draw must come back from saving and loading."""
    module, save, load = subject.module, subject.save, subject.load
    if module is None or save is None or load is None:
        return None
    with quiet(subject, redraw=0.3, seed=7), tempfile.TemporaryDirectory() as folder:
        save(module, Path(folder))
        loaded = dict(load(Path(folder)).named_parameters())
        off = {
            n: difference(p.detach().cpu().float(), loaded[n].detach().cpu().float())
            for n, p in module.named_parameters()
            if n in loaded and p.dim() >= 2 and p.shape == loaded[n].shape
        }
        if not off or max(off.values()) <= 0.1:  # a cast is found by the checks of checkpoints
            return None
        name = worst_name(off)
        where = described(module, name.rpartition(".")[0])
    return failed(
        f"{sum(v > 0.1 for v in off.values())} matrices come back from a checkpoint with other values ({name})",
        off[name], 0.1, unit="std of the weight", bugs=["init-overwrites-loaded", "strict-false", "tie-lost-on-load"],
        component=f"loading of {where}", advice="initialise first, load afterwards, and load strictly",
    )  # fmt: skip


class _Scaled(specimens.model.Model):
    """Output projections drawn smaller with depth, as in GPT-2."""

    rescaled = True

    def initialise(self) -> None:
        super().initialise()
        for layer in self.layers if self.rescaled else ():
            for projection in (layer.attention.out, layer.ffn.down):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.size.num_layers))


_GPT2 = {"*": 0.02, "*.attention.out.weight": 0.01, "*.ffn.down.weight": 0.01}


@initialisation.plant("init-rescale-noop", component="layers")
def _() -> Subject:
    class Never(_Scaled):
        rescaled = False

    return specimens.subject(model=Never).but(initial_stds=_GPT2)


@initialisation.plant("init-uninitialised-meta", component="lambdas", what="torch.empty that nobody fills")
def _() -> Subject:
    class Empty(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            self.lambdas = nn.Parameter(torch.empty(2))

    return specimens.subject(model=Empty)


@initialisation.plant("init-uninitialised-meta", component="norm", what="built on meta, moved with to_empty")
def _() -> Subject:
    class Meta(specimens.model.Model):
        def initialise(self) -> None:
            for part in self.modules():
                if isinstance(part, specimens.Norm):
                    part.to("meta").to_empty(device="cpu")
            super().initialise()  # matrices alone

    return specimens.subject(model=Meta)


@initialisation.plant("seed-not-applied", component="seed", what="seeded after the module was built")
def _() -> Subject:
    def build(seed: int) -> Subject:
        plain = specimens.subject()
        assert isinstance(plain.module, specimens.Model)
        plain.module.initialise()  # from whatever the global generator holds
        torch.manual_seed(seed)
        return plain

    return specimens.subject().but(build=build)


@initialisation.plant("seed-not-applied", component="seed", what="one fixed seed further in")
def _() -> Subject:
    return specimens.subject().but(build=lambda seed: specimens.subject(seed=0))


@initialisation.plant(
    "seed-not-applied", component="layers.1", what="copies of one block, as nn.TransformerEncoder makes"
)
def _() -> Subject:
    class Copies(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            self.layers[1].load_state_dict(self.layers[0].state_dict())

    return specimens.subject(model=Copies)


@initialisation.plant("seed-not-applied", component="blocks", what="[block] * n")
def _() -> Subject:
    class Same(specimens.model.Model):
        def initialise(self) -> None:
            self.layers = nn.ModuleList([self.layers[0]] * self.size.num_layers)
            super().initialise()

    return specimens.subject(model=Same)


@initialisation.plant(
    "tie-lost-on-load", component="head.weight", what="tied by value: equal, and two parameters"
)
def _() -> Subject:
    class ByValue(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())

    return specimens.subject(model=ByValue)


@initialisation.plant("init-overwrites-loaded", component="loading")
def _() -> Subject:
    subject = specimens.subject()
    load = subject.load

    def load_then_initialise(folder: Path) -> nn.Module:
        module = load(folder)  # type: ignore[misc]
        module.initialise()
        return module

    return subject.but(load=load_then_initialise)


@initialisation.healthy("output projections drawn smaller with depth, as the rule says")
def _() -> Subject:
    return specimens.subject(model=_Scaled).but(initial_stds=_GPT2)


@initialisation.healthy("a matrix that begins alike in every block, as declared")
def _() -> Subject:
    class Alike(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            with torch.no_grad():
                for layer in self.layers:
                    layer.attention.out.weight.copy_(self.layers[0].attention.out.weight)

    return specimens.subject(model=Alike).but(same_start=("*.attention.out.weight",))
