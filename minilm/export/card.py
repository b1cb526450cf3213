"""The README of an exported folder: what the model is, and what is known of its numbers. Nothing is made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minilm import __version__
from minilm.alignment import Sum
from minilm.track.metrics import read_metrics

if TYPE_CHECKING:
    from minilm.run import Loaded

LAST_STEPS = 100  # the loss of one batch is noise


def facts_of(loaded: Loaded, weights: str) -> dict[str, str]:
    """What the checkpoint and the run around it say about the training, as rows of a table."""
    record: Mapping[str, Any] = json.loads((loaded.folder / "trainer.json").read_text(encoding="utf-8"))
    facts = {"optimizer steps": f"{loaded.step:,}"}
    if "total_tokens" in record:
        facts["training tokens"] = f"{record['total_tokens']:,}"
    facts["fingerprint of the training data"] = f"`{loaded.store_fingerprint}`"
    if loaded.tokenizer is not None:
        facts["fingerprint of the tokenizer"] = f"`{loaded.tokenizer.fingerprint}`"
    facts["weights"] = "moving average (ema)" if weights == "ema" else "of the last step"
    return facts | (_losses(loaded, weights) if loaded.run_folder is not None else {})


def _losses(loaded: Loaded, weights: str) -> dict[str, str]:
    """As they were logged up to the checkpoint; left out where the log says nothing."""
    assert loaded.run_folder is not None
    if not (loaded.run_folder / "metrics.jsonl").is_file():
        return {}
    records = [r for r in read_metrics(loaded.run_folder) if r["step"] <= loaded.step]
    found = {}
    train = [r for r in records if r["kind"] == "train" and r.get("loss") is not None][-LAST_STEPS:]
    if train:
        steps = ((r["loss"], r.get("step_tokens", 1)) for r in train)
        total = sum((Sum.of(loss * tokens, tokens) for loss, tokens in steps), Sum.zero())
        what = f"training loss, last {len(train)} steps" if len(train) > 1 else "training loss, last step"
        found[what] = f"{total.mean:.4f} nats per token"
    column = "ema_loss" if weights == "ema" else "loss"
    validation = [r for r in records if r["kind"] == "validation" and r.get(column) is not None][-1:]
    for r in validation:
        found[f"validation loss, step {r['step']:,}"] = f"{r[column]:.4f} nats per token"
    return found


def card(config: Any, facts: Mapping[str, str], *, own_code: bool, dtype: str, files: str = "hf") -> str:
    """The text of README.md, with the head that the Hugging Face hub reads."""
    rows = {
        "architecture": f"`{config.name}`" + ("" if own_code else " (a Llama)"),
        "parameters": f"{config.num_parameters():,}",
        "layers, width": f"{config.num_layers}, {config.dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest text": f"{config.max_length:,} tokens",
        "stored as": dtype,
        **facts,
    }
    if config.active_parameters() != config.num_parameters():
        rows["parameters active for a token"] = f"{config.active_parameters():,}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    library = "transformers" if files == "hf" else "gguf"
    tags = "".join(f"- {tag}\n" for tag in ("minilm", *(["custom_code"] if own_code else [])))
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n{tags}---\n\n"
        f"# {config.name}, {config.num_parameters():,} parameters\n\n"
        f"Exported by minilm {__version__}, loaded again and compared with the model it came from.\n\n"
        f"|  |  |\n| --- | --- |\n{table}\n\n{_usage(own_code, files)}"
    )


def _usage(own_code: bool, files: str) -> str:
    if files == "gguf":
        return "`model.gguf` is for llama.cpp and what builds on it.\n"
    trust = ", trust_remote_code=True" if own_code else ""
    code = (
        "The Python files of this folder are the model; they need torch and transformers 5, and nothing else.\n"
        "Read them before you trust them.\n\n"
        if own_code
        else ""
    )
    return (
        f"{code}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})\n```\n'
    )
