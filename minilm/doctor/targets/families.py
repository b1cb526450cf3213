"""What has to be known of families of Hugging Face models: small settings, and exceptions with their reasons.

An exception is not a way to silence a defect: it names a property that the class has by design, and the report
shows it. A defect of a library is a finding and stays one (docs/found.md).
"""

from __future__ import annotations

from typing import Any

# Set on every config that has a setting of this name.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "embedding_size",
            "embed_dim",
            "dim",
            "emb_dim",
            "word_embed_proj_dim",
        ),
        64,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 96
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
        ),
        4,
    ),
    "num_key_value_heads": 2,
    "head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "is_decoder": True,
    # Scans in plain torch make tensors of chunk x chunk x heads: minutes at the defaults.
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "mamba_d_state", "state_size", "ssm_state_size"), 16),
}

_LATENT = {  # multi-head latent attention: the head is made of a part with and a part without rotary positions
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# family -> settings of its own; None takes one of SMALL away
OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "deepseek_v32": {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 128},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "youtu": _LATENT,
    "minicpm3": {
        **_LATENT,
        "dim_model_base": 64,
        "n_group": None,
        "topk_group": None,
        "first_k_dense_replace": None,
    },
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "falcon": {"head_dim": None, "num_kv_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "mamba2": {"head_dim": 16, "num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    "flint": {"layer_types": ["sliding_attention", "full_attention"]},  # its full layers have no positions
    "hunyuan_v1_moe": {"moe_topk": 2},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "xlm": {"causal": True, "use_lang_emb": False, "n_langs": 1},
    "gemma4_text": {"hidden_size_per_layer_input": 16},
    "xlnet": {"max_position_embeddings": None, "d_inner": 96},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    **{
        family: {"layer_types": ["linear_attention", "full_attention"]}
        for family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    **{
        family: {**_LATENT, "layer_types": ["linear_attention", "full_attention"]}
        for family in ("bailing_hybrid", "kimi_linear")
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "glm_moe_dsa": {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 128},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96},
    "dots3_note_text": {"num_key_value_heads": 4},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": None},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0}, "ffn_config": {"ffn_hidden_size": 96}},
}

_OWN_SHIFT = "takes labels that are already shifted (its documentation says so): the caller shifts"
_NOT_CAUSAL = "is not a causal language model by design: "

# family -> check -> why the check does not apply
EXCEPTIONS: dict[str, dict[str, str]] = {
    "cpmant": dict.fromkeys(
        ("causality", "right_padding", "greedy", "padded_prompts"),
        _NOT_CAUSAL + "a learnt prefix and the prompt are seen in both directions",
    ),
    "prophetnet": {
        "residuals": "predicts the next n-gram with streams of their own, which see a token through attention only",
        "dead_slices": "has weights for relative distances up to 128, of which short rows use a part",
    },
    "rwkv": {"padded_prompts": "ignores attention_mask, and says so in a warning: no rows of unequal length"},
    "xlm": dict.fromkeys(
        ("greedy", "padded_prompts"), "generates by a mask token behind the prompt, without a mask"
    ),
    "xlnet": {
        "causality": _NOT_CAUSAL + "a permutation language model without its permutation mask",
        **dict.fromkeys(
            ("greedy", "padded_prompts"), "generates by a dummy token behind the prompt that it predicts"
        ),
    },
}

_OF_THE_LOSS = (
    *("loss_identity", "loss_gradient", "successor", "chunked_loss", "rows_do_not_mix", "ignored_positions"),
    *("random_floor", "initial_loss", "follows_weights"),
)

_POSITIONS_OF_ROBERTA = "the RoBERTa family generates with other positions than it is trained with"
_PADS_COUNTED = "decoders of the BART type count left padding among the positions"
_OVERWRITTEN = "Youtu and Zaya overwrite a part of what from_pretrained loaded"
_FUTURE = "ProphetNet mixes up the relative positions of its predicting streams and sees later tokens"
_UNTOLD_STEP = "Bamba takes a cached step for position 0 if it is not told positions"
_ROWS_MIXED = "RWKV mixes the rows of a batch in cached steps"

# check -> the defect that every family shares; family -> check -> its own. Each text is a heading in docs/found.md.
FOUND_EVERYWHERE: dict[str, str] = {"no_targets": "the loss of rows without a single target is NaN"}
FOUND: dict[str, dict[str, str]] = {
    **{
        family: {"padded_prompts": _PADS_COUNTED}
        for family in (
            *(
                "bart",
                "bigbird_pegasus",
                "blenderbot",
                "blenderbot-small",
                "marian",
                "mbart",
                "mvp",
                "pegasus",
            ),
            *("plbart", "trocr", "whisper"),
        )
    },
    **{
        family: dict.fromkeys(("greedy", "padded_prompts"), _POSITIONS_OF_ROBERTA)
        for family in (
            *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
            *("xlm-roberta", "xlm-roberta-xl", "xmod"),
        )
    },
    "bamba": {"cache_parity": _UNTOLD_STEP},
    "prophetnet": dict.fromkeys(
        ("causality", "right_padding", "cache_parity", "greedy", "padded_prompts"), _FUTURE
    ),
    "recurrent_gemma": {
        "padded_prompts": "RecurrentGemma lets left padding, and the text before, into its convolution",
        "precision": "RecurrentGemma computes the decay of its recurrence in bfloat16",
    },
    "rwkv": dict.fromkeys(("greedy", "stops"), _ROWS_MIXED),
    "youtu": dict.fromkeys(("initialisation", "precision", "ties", "save_load"), _OVERWRITTEN),
    "zaya": {"save_load": _OVERWRITTEN},
}

# Decoders of encoder-decoder families: their CausalLM class compares logits and labels as they are.
UNSHIFTED_LABELS = (
    *(
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
    ),
    *("trocr", "whisper", "xlm", "xlnet", "prophetnet", "cpmant"),
)


# family -> parameters that get no gradient by design (patterns of names)
UNUSED: dict[str, tuple[str, ...]] = {
    "deepseek_v4": (
        "model.layers.0.mlp.gate.weight",
    ),  # a table routes by token; ours sends all to one expert
    "roc_bert": ("*pronunciation_embed*", "*shape_embed*"),  # inputs of their own, left at padding by default
}


def exceptions_of(family: str) -> dict[str, str]:
    """Check -> reason, for a family."""
    found = dict(EXCEPTIONS.get(family, {}))
    if family in UNSHIFTED_LABELS:
        found |= dict.fromkeys(_OF_THE_LOSS, _OWN_SHIFT)
    return found
