"""Does a knowledge store fit the model and the data of a run? Asked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilm.data.store import Store
from minilm.errors import CheckpointError, ConfigError, listed
from minilm.knowledge.store import read_description

OF_THE_STORE = {"store_side": "side", "store_width": "width", "store_code_dim": "code_dim"}


def shape_of(folder: str) -> dict[str, int]:
    """The settings of a model that a store decides: store_side, store_width, store_code_dim.

    Raises ConfigError where there is no store.
    """
    description = _description(folder)
    return {setting: int(description[name]) for setting, name in OF_THE_STORE.items()}


def refuse_misfit(folder: str, data: Store) -> None:
    """The store must speak the data's tokenizer, and be made from the file whose rows the data's labels name.

    Raises ConfigError naming all that does not fit.
    """
    description, wrong = _description(folder), []
    tokenizer, ours = description["tokenizer"], data.manifest["tokenizer"]
    if ours is None:
        wrong.append("the data were made without a tokenizer, so its words mean nothing in them")
    elif tokenizer["fingerprint"] != ours["fingerprint"]:
        theirs = f"{tokenizer['name']} ({tokenizer['fingerprint'][:12]})"
        wrong.append(
            f"it was made with the tokenizer {theirs}, the data with another ({ours['fingerprint'][:12]})"
        )
    source, labelled = description.get("source"), data.entries_of
    if labelled and source and source["sha256"] != labelled and not description["lineage"]:
        wrong.append(
            f"the labels of the data name rows of a file with sha256 {labelled[:12]}, it was made from "
            f"{source['path']} ({source['sha256'][:12]})"
        )
    if wrong:
        raise ConfigError(
            f"model.store: the knowledge store {folder} does not fit the data {data.path}: {listed(wrong)}\n"
            "Build it with that tokenizer from that file (minilm knowledge build)."
        )


def _description(folder: str) -> dict[str, Any]:
    try:
        return read_description(Path(folder))
    except CheckpointError as error:
        raise ConfigError(f"model.store: {error}") from error
