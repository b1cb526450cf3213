"""A run as it lies on the disk, without its weights: what records, comparisons and lists are made from.

RUN/manifest.json, metrics.jsonl, config.yaml, samples.md, and eval.json where `eval.py --json RUN/eval.json` wrote one.
Only these files are read, so that a copy of them (experiment/runs/NAME) tells the same as the run folder itself.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm import manifest, models
from minilm.errors import CheckpointError, MinilmError
from minilm.track.metrics import FILE as METRICS
from minilm.track.metrics import read_metrics

EVALUATION = "eval.json"
SAMPLES = "samples.md"
CONFIG = "config.yaml"
SOURCES = (CONFIG, manifest.FILE, METRICS, SAMPLES, EVALUATION)
NO_END = "no end recorded"


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say. `evaluation` is None where nobody evaluated; `digests` {file: sha256}."""

    folder: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    digests: dict[str, str]

    @classmethod
    def read(cls, folder: Path | str) -> RunFiles:
        """Raises CheckpointError where the folder or one of its files is missing or damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"There is no run folder {folder}: it was moved or removed, or never kept.")
        digests = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in SOURCES
            if (folder / name).is_file()
        }
        record = manifest.Manifest.read(folder).record
        return cls(folder, record, read_metrics(folder), _evaluation(folder / EVALUATION), digests)

    @property
    def name(self) -> str:
        return str(self.settings.get("run.name") or self.folder.resolve().name)

    @property
    def settings(self) -> dict[str, Any]:
        """{dotted name: value}, as the run resolved them."""
        return dict(self.manifest.get("config") or {})

    @property
    def state(self) -> str:
        """As the files tell it, the same on every machine: finished, interrupted, failed or "no end recorded"."""
        state = str(self.manifest["state"])
        return NO_END if state == "running" else state

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((int(r["step"]) for r in self.of("train")), default=int(self.manifest.get("step") or 0))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Records of one kind in the order of the file."""
        return [record for record in self.metrics if record["kind"] == kind]

    @property
    def data_fingerprint(self) -> str | None:
        """Of the store that was trained on."""
        return (self.manifest.get("data") or {}).get("fingerprint")

    @property
    def tokenizer_fingerprint(self) -> str | None:
        return (self.manifest.get("tokenizer") or {}).get("fingerprint")

    @functools.cached_property
    def flops_per_step(self) -> float | None:
        """Arithmetic of one step, forward and backward, computed from the settings; None for a model unknown here."""
        given = {k.removeprefix("model."): v for k, v in self.settings.items() if k.startswith("model.")}
        length, rows = self.settings.get("data.sequence_length"), self.settings.get("train.batch_size")
        if not (given and length and rows):
            return None
        try:
            return float(models.from_dict(given).training_flops_per_token(length) * length * rows)
        except (MinilmError, TypeError):  # a setting that this version of the program does not have
            return None


def utc(moment: str | float | None) -> str:
    """`2026-11-22 19:48:47 UTC`, from seconds or from the ISO text of a manifest; the same wherever it is computed."""
    if moment is None:
        return "-"
    if isinstance(moment, str):
        found = datetime.datetime.fromisoformat(moment)
    else:
        found = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    return f"{found.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Write it again with eval.py --json.") from error
    if not isinstance(found, dict) or not isinstance(found.get("scores"), dict):
        raise CheckpointError(f"{path}: not what eval.py --json writes (it has no scores).")
    return found
