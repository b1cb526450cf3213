"""Bugs in the model, in evaluation and in generation."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from unseen.bug import bug
from unseen.plain import Kit
from unseen.plain_model import Attention, Block, Cache, evaluating


@bug(
    "mask-corner",
    part="attention",
    severity="high",
    mistake="The causal mask is a table of the full length, cut as table[-new:, :total] to suit cached decoding.",
    symptom="Full rows and single cached tokens are right; every shorter input or prompt sees its own future.",
    when="a forward over fewer tokens than `length`: scoring a short text, the prompt of a generation",
)
def mask_corner(kit: Kit) -> Kit:
    class Model(kit.model):
        def causal(self, total, new):
            length = self.settings.length
            return torch.ones(length, length, dtype=torch.bool).tril()[-new:, :total]

    return replace(kit, model=Model)


@bug(
    "document-mask-late",
    part="attention",
    severity="medium",
    mistake="Other documents are zeroed after the softmax and the weights are not renormalised.",
    symptom="The second document of a row attends with weights that sum to less than one, "
    "by an amount that depends on the first; alone it is scored otherwise.",
    when="rows with several documents, or padding on the left",
)
def document_mask_late(kit: Kit) -> Kit:
    class Late(Attention):
        def weights(self, q, k, causal, same):
            return super().weights(q, k, causal, torch.ones_like(same)) * same

    class LateBlock(Block):
        attention = Late

    class Model(kit.model):
        def block(self, layer):
            return LateBlock(self.settings, layer)

    return replace(kit, model=Model)


@bug(
    "restart-once",
    part="positions",
    severity="low",
    mistake="The border of documents is found with argmax, which gives the first one only.",
    symptom="The second document of a row starts at position 0, the third and later ones do not.",
    when="rows with three or more documents",
    settings={"length": 128, "rotary": False},
)
def restart_once(kit: Kit) -> Kit:
    class Model(kit.model):
        def positions(self, segments):
            index = torch.arange(segments.shape[1]).expand_as(segments)
            change = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
            border = change.int().argmax(1, keepdim=True)
            return torch.where(index >= border, index - border, index)

    return replace(kit, model=Model)


@bug(
    "cache-counts-calls",
    part="positions (cache)",
    severity="high",
    mistake="With a cache, the position of a new token is the number of calls so far, not of tokens.",
    symptom="Training and scoring are right. Text made with the cache falls apart after a long prompt.",
    when="cached decoding after a prompt of two tokens or more",
)
def cache_counts_calls(kit: Kit) -> Kit:
    class Model(kit.model):
        def new_positions(self, segments, new, cache):
            calls = getattr(cache, "calls", 0)
            if cache is not None:
                cache.calls = calls + 1
            if calls == 0:
                return super().new_positions(segments, new, cache)
            return (calls + torch.arange(new)).expand(len(segments), new)

    return replace(kit, model=Model)


@bug(
    "branch-input-detached",
    part="gradient flow",
    severity="medium",
    mistake="A detach() left from debugging cuts the input of the attention branch in the last layer.",
    symptom="The forward pass is exact and every parameter gets a gradient, but the first layer "
    "and the embedding miss the share that comes through that branch.",
    when="always in training, last layer only",
)
def branch_input_detached(kit: Kit) -> Kit:
    class Cut(Block):
        def forward(self, x, *how):
            x = x + self.drop(self.attn(self.norm1(x.detach()), *how))
            return x + self.drop(self.ffn(self.norm2(x)))

    class Model(kit.model):
        def block(self, layer):
            return Cut(self.settings, layer) if layer == self.settings.layers - 1 else super().block(layer)

    return replace(kit, model=Model)


@bug(
    "tie-by-data",
    part="tied embeddings",
    severity="medium",
    mistake="Head and embedding are tied by their data: two parameters on one storage.",
    symptom="Outputs look tied. The optimizer updates the shared numbers twice a step, with two "
    "sets of moments, and as the head is a matrix it is decayed as well.",
    when="tied embeddings",
)
def tie_by_data(kit: Kit) -> Kit:
    class Model(kit.model):
        def tie(self):
            if self.settings.tied:
                self.head.weight = nn.Parameter(self.token.weight.data)

    return replace(kit, model=Model)


@bug(
    "continuation-skips-first",
    part="evaluation",
    severity="medium",
    mistake="The logits are cut from len(prompt) instead of len(prompt) - 1, and the targets to match.",
    symptom="Each token is scored by the right logits, but the first token of the continuation, "
    "often the hardest, is left out. A continuation of one token costs nothing.",
    when="always in scoring continuations",
)
def continuation_skips_first(kit: Kit) -> Kit:
    def continuation_loss(model, prompt, continuation):
        with evaluating(model):
            logits = model(torch.tensor([prompt + continuation]))[0, len(prompt) : -1]
        targets = torch.tensor(continuation[1:], dtype=torch.long)
        return float(F.cross_entropy(logits, targets, reduction="sum")) / max(1, len(targets))

    return replace(kit, continuation_loss=continuation_loss)


@bug(
    "temperature-no-op",
    part="generation",
    severity="medium",
    mistake="The probabilities, not the logits, are divided by the temperature and then normalised.",
    symptom="Every temperature above 0 samples the same distribution.",
    when="sampling with a temperature other than 0 and 1",
)
def temperature_no_op(kit: Kit) -> Kit:
    class Sampler(kit.sampler):
        def probabilities(self, logits, temperature, top_k, top_p):
            kept = super().probabilities(logits, 1.0, top_k, top_p) / temperature
            return kept / kept.sum(-1, keepdim=True)

    return replace(kit, sampler=Sampler)


@bug(
    "stale-prefill",
    part="generation",
    severity="high",
    mistake="Keys and values of a prompt are kept for the next call, under the prompt alone.",
    symptom="Samples during training: the prompt is still seen by the weights of the first sample, "
    "the new tokens by those of today. The text lags behind the loss.",
    when="the same prompt twice, with training or loading in between",
)
def stale_prefill(kit: Kit) -> Kit:
    class Sampler(kit.sampler):
        def prefill(self, ids, segments):
            kept = self.model.__dict__.setdefault("prefills", {})
            key = (ids.shape, *ids.flatten().tolist())
            if key not in kept:
                kept[key] = super().prefill(ids, segments)
            logits, first = kept[key]
            cache = Cache()
            cache.layers, cache.segments = dict(first.layers), first.segments
            return logits, cache

    return replace(kit, sampler=Sampler)


@bug(
    "average-aliases-model",
    part="evaluation (averaged weights)",
    severity="medium",
    mistake="The moving average starts from detach() without clone(), so it is the model itself.",
    symptom="Averaged and live weights always evaluate the same; averaging does nothing.",
    when="evaluating the averaged weights",
)
def average_aliases_model(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def start_average(self):
            return {name: weight.detach() for name, weight in self.model.named_parameters()}

    return replace(kit, trainer=Trainer)
