"""The model checks raise no false alarm: on our own model, on a specimen of unusual parts, on very different classes.

Each healthy subject passes every check that it can be asked, or says why it cannot. And a few defects are found in
foreign classes too, so that silence there means something.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minilm import models
from minilm.doctor import specimens
from minilm.doctor.checks import (
    backends,
    batch_independence,
    causality,
    dead_slices,
    eval_collapse,
    float32_kept,
    frozen,
    gradients_reach,
    initial_loss,
    initialisation,
    modes,
    packing,
    padding,
    positions,
    precision,
    reach,
    reference,
    residuals,
    statelessness,
    ties,
    token_identity,
    token_uniformity,
)
from minilm.doctor.core import Check, Finding, run_checks
from minilm.doctor.subject import Subject

MODULES = (
    *(
        backends,
        batch_independence,
        causality,
        dead_slices,
        eval_collapse,
        frozen,
        gradients_reach,
        initial_loss,
    ),
    *(
        initialisation,
        modes,
        packing,
        padding,
        positions,
        precision,
        reach,
        reference,
        residuals,
    ),
    *(statelessness, ties, token_identity, token_uniformity, float32_kept),
)
CHECKS = [value for module in MODULES for value in vars(module).values() if isinstance(value, Check)]
LACKING = ("needs ", "no parameter of it is shared")  # honest reasons not to run


def of_ours(**changes: object) -> Subject:
    """Our original model, tiny, as a subject that is written by hand."""

    def drawn(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return models.build(models.preset("original", "tiny", **changes))

    module = drawn(0)
    return Subject(
        name="original",
        vocab_size=256,
        max_length=128,
        special_ids=(0, 1, 2),
        module=module,
        forward=lambda tokens: module(tokens).logits,
        masked_forward=lambda tokens, keep: module(tokens, segments=keep.long()).logits,
        packed_forward=lambda tokens, segments: module(tokens, segments=segments).logits,
        left_padding=True,
        windows=(None, None),
        build=lambda seed: Subject(
            module=(other := drawn(seed)), forward=lambda tokens: other(tokens).logits
        ),
    )


def of_theirs(
    config: object, *, left_padding: bool = True, windows: tuple[int | None, ...] | None = None
) -> Subject:
    """A tiny random model of transformers as a subject, written by hand."""
    from transformers import AutoModelForCausalLM

    def drawn(seed: int, backend: str = "eager") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, attn_implementation=backend).float()

    def through(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda tokens: module(input_ids=tokens, use_cache=False).logits

    module, other = drawn(0), None
    backends_: dict[str, Callable[[Tensor], Tensor]] = {}
    if getattr(module, "_supports_sdpa", False):
        other = drawn(0, "sdpa")

        def sdpa(tokens: Tensor) -> Tensor:
            other.load_state_dict(module.state_dict())
            return through(other.train(module.training))(tokens)

        backends_["sdpa"] = sdpa
    return Subject(
        name=type(module).__name__,
        vocab_size=config.vocab_size,
        max_length=64,
        module=module,
        special_ids=(0, 1, 2),
        forward=through(module),
        masked_forward=lambda t, keep: (
            module(input_ids=t, attention_mask=keep.long(), use_cache=False).logits
        ),
        left_padding=left_padding,
        windows=windows,
        backends=backends_,
        build=lambda seed: Subject(module=(fresh := drawn(seed)), forward=through(fresh)),
    )


def config_of(family: str) -> object:
    """Small settings of eight classes that have little in common."""
    import transformers as hf

    ids = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = {**ids, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
    return {
        "llama": lambda: hf.LlamaConfig(**llama, attention_dropout=0.1),
        "mistral": lambda: hf.MistralConfig(**llama, sliding_window=8),
        "gemma2": lambda: hf.Gemma2Config(**llama, sliding_window=8, attn_logit_softcapping=20.0),
        "mixtral": lambda: hf.MixtralConfig(**llama, num_local_experts=4),
        "gpt2": lambda: hf.GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**{**llama, "num_key_value_heads": None}),
        "bloom": lambda: hf.BloomConfig(**ids, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: hf.MambaConfig(**ids, hidden_size=32, num_hidden_layers=2, state_size=8),
        "opt": lambda: hf.OPTConfig(**ids, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                    word_embed_proj_dim=32, max_position_embeddings=64),
    }[family]()  # fmt: skip


class _Odd(specimens.Attention):
    """Scores with a cap and a bias by distance, no rotation, a scale of its own."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * math.sqrt(8)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        places = torch.arange(num_keys - num_queries, num_keys)[:, None]
        return 20 * torch.tanh((q @ k.mT) / 20) + 0.2 * (torch.arange(num_keys) - places)


def odd_specimen() -> Subject:
    """Unusual and right: layer norms, a cap, ALiBi, a window, tied embeddings, dropout."""
    size = {"window": 8, "tied": True, "dropout": 0.2}
    return specimens.subject(attention=_Odd, norm=nn.LayerNorm, size=size)


HEALTHY: dict[str, Callable[[], Subject]] = {
    "original with dropout": lambda: of_ours(dropout=0.1),
    "original, untied, eager": lambda: of_ours(tie_embeddings=False, attention="eager"),
    "odd specimen": odd_specimen,
    "llama": lambda: of_theirs(config_of("llama"), windows=(None, None)),
    "mistral": lambda: of_theirs(config_of("mistral"), windows=(8, 8)),
    "gemma2": lambda: of_theirs(config_of("gemma2"), windows=(8, None)),
    "mixtral": lambda: of_theirs(config_of("mixtral"), windows=(None, None)),
    "gpt2": lambda: of_theirs(config_of("gpt2"), left_padding=False),
    "gpt_neox": lambda: of_theirs(config_of("gpt_neox")),
    "bloom": lambda: of_theirs(config_of("bloom")),
    "mamba": lambda: of_theirs(config_of("mamba"), left_padding=False),
    "opt": lambda: of_theirs(config_of("opt")),
}


@functools.lru_cache(maxsize=1)
def findings(name: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in run_checks(HEALTHY[name](), CHECKS)}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_raises_no_alarm(name: str) -> None:
    for check, finding in findings(name).items():
        assert finding.status != "FAIL", f"{check}: {finding.message}"
        asked = finding.status == "PASS" or finding.message.startswith(LACKING)
        assert asked, f"{check} did not run: {finding.message} {finding.details.get('traceback', '')}"
    assert sum(finding.status == "PASS" for finding in findings(name).values()) >= 13


def test_a_subject_is_left_as_it_was() -> None:
    subject = of_ours(dropout=0.1)
    before = {name: value.clone() for name, value in subject.module.state_dict().items()}
    subject.module.train()
    random = torch.get_rng_state()
    for _ in run_checks(subject, CHECKS):
        pass
    after = subject.module.state_dict()
    assert all(
        torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items()
    )
    assert all(part.training for part in subject.module.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in subject.module.parameters())
    assert not [part for part in subject.module.modules() if part._forward_hooks or part._forward_pre_hooks]


def one(check: Check, subject: Subject) -> Finding:
    return next(run_checks(subject, [check]))


def test_a_window_that_is_not_the_declared_one_is_found_in_a_foreign_class() -> None:
    finding = one(reach.reach, of_theirs(config_of("mistral"), windows=(9, 9)))
    assert (finding.status, finding.bugs[0]) == ("FAIL", "swa-off-by-one")
    finding = one(reach.reach, of_theirs(config_of("llama"), windows=(8, 8)))
    assert (finding.status, finding.bugs[0]) == ("FAIL", "swa-lost")


def test_left_padding_that_moves_positions_is_found_in_gpt2() -> None:
    finding = one(padding.left_padding, of_theirs(config_of("gpt2"), left_padding=True))
    assert (finding.status, finding.bugs[0]) == ("FAIL", "pos-ids-leftpad")


def test_a_cast_of_the_whole_module_rounds_the_rotary_table_of_llama() -> None:
    config = config_of("llama")
    config.max_position_embeddings = 512
    subject = of_theirs(config).but(max_length=512)

    def lowered() -> Subject:
        fresh = of_theirs(config)
        fresh.module.load_state_dict(subject.module.state_dict())
        fresh.module.bfloat16()
        return fresh

    finding = one(precision.precision, subject.but(lowered=lowered))
    assert (finding.status, finding.bugs[0]) == ("FAIL", "rope-buffer-downcast")
    assert "rotary_emb" in finding.component


def test_a_logit_cap_that_a_backend_skips_is_found_in_gemma2() -> None:
    plain = config_of("gemma2")
    subject = of_theirs(plain)
    uncapped = config_of("gemma2")
    uncapped.attn_logit_softcapping = None
    other = of_theirs(uncapped)

    def without(tokens: Tensor) -> Tensor:
        other.module.load_state_dict(subject.module.state_dict())
        return other.forward(tokens)

    finding = one(backends.backends_agree, subject.but(backends={"fast": without}))
    assert finding.status == "FAIL"
    assert "softcap-skipped" in finding.bugs


@pytest.mark.parametrize("seed", range(20))
def test_the_initial_loss_of_a_healthy_model_passes_for_any_seed(seed: int) -> None:
    for tied in (False, True):
        subject = specimens.subject(size={"tied": tied, "init_std": 0.1}, seed=seed)
        assert one(initial_loss.initial_loss, subject).status == "PASS"


@pytest.mark.parametrize("seed", range(20))
def test_initial_weights_follow_their_rule_for_any_seed(seed: int) -> None:
    assert one(initialisation.initialisation, specimens.subject(seed=seed)).status == "PASS"
