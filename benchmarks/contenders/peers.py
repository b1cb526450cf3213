"""The models and loops of others, imported from a folder that the user has: none of their code is here.

Each is given the width, the depth, the heads and the vocabulary of minilm's model as far as it knows them, and trains
as its own script does it: its own initialisation, optimizer settings and loss. Where it cannot have the same model (no
grouped heads, another feed-forward, more embeddings), the table shows its parameters and its operations per token.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contenders import Contender, Shape, count, plain_loop, training_flops

Parts = tuple[nn.Module, Callable[[Any], Callable[[Tensor, Tensor], Tensor]], torch.optim.Optimizer, str]


def build(shape: Shape, *, name: str, compiled: bool) -> Contender:
    """Contender `name` from the folder of that name within `shape.peers`. Whatever its import raises goes through."""
    assert shape.peers is not None
    sys.path.insert(0, str(Path(shape.peers) / name))
    torch.manual_seed(0)
    maker: Callable[[Shape], Parts] = getattr(sys.modules[__name__], f"_{name.lower()}")
    model, loss_with, optimizer, about = maker(shape)
    config = shape.config()
    flops = training_flops(model, num_layers=config.num_layers, width=config.dim, length=shape.length)
    loss_of = loss_with(torch.compile(model) if compiled else model)
    own_precision, clips = name == "nanochat", name != "nanochat"
    run = plain_loop(
        shape,
        loss_of,
        optimizer,
        list(model.parameters()),
        clip=1.0 if clips else None,
        autocast=not own_precision,
    )
    return Contender(about, count(model), flops, run)


def _nanogpt(shape: Shape) -> Parts:
    theirs, config = importlib.import_module("model"), shape.config()
    model = theirs.GPT(
        theirs.GPTConfig(
            block_size=shape.length,
            vocab_size=config.vocab_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.dim,
            dropout=0.0,
            bias=False,
        )
    ).to(shape.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), shape.device)

    def loss_with(forward: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda inputs, targets: forward(inputs, targets)[1]

    about = "all heads with keys of their own, learned positions, GELU of 4 x width; its own AdamW, clipped at 1.0"
    return model, loss_with, optimizer, about


def _nanochat(shape: Shape) -> Parts:
    theirs, config = importlib.import_module("nanochat.gpt"), shape.config()
    settings = theirs.GPTConfig(
        sequence_len=shape.length,
        vocab_size=config.vocab_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_kv_head=config.num_kv_heads,
        n_embd=config.dim,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = theirs.GPT(settings)
    model.to_empty(device=shape.device)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

    def loss_with(forward: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda inputs, targets: forward(inputs, targets)

    about = (
        "untied output layer, value embeddings, relu squared of 4 x width, full windows; torch's fused AdamW in place "
        "of its Muon, not clipped (as its own script), its own precision"
    )
    return model, loss_with, optimizer, about


def _litgpt(shape: Shape) -> Parts:
    theirs, config = importlib.import_module("litgpt"), shape.config()
    chunked = importlib.import_module("litgpt.utils").chunked_cross_entropy
    model = theirs.GPT(
        theirs.Config(
            block_size=shape.length,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_query_groups=config.num_kv_heads,
            n_embd=config.dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=config.hidden_dim,
        )
    )
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight
    model = model.to(shape.device)
    cuda = shape.device == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=cuda
    )

    def loss_with(forward: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda inputs, targets: chunked(forward(inputs), targets)

    about = (
        "the same model; AdamW (fused on CUDA only), loss in chunks of 128 tokens, clipped at 1.0; no Fabric"
    )
    return model, loss_with, optimizer, about


def _minimind(shape: Shape) -> Parts:
    theirs, config = importlib.import_module("model.model_minimind"), shape.config()
    model = theirs.MiniMindForCausalLM(
        theirs.MiniMindConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            vocab_size=config.vocab_size,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.hidden_dim,
        )
    )
    model = model.to(shape.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def loss_with(forward: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda inputs, targets: forward(inputs, labels=inputs).loss

    about = (
        "the same model with norms of queries and keys; torch's AdamW, one target less a row, clipped at 1.0"
    )
    return model, loss_with, optimizer, about
