"""minilm: pretrain small language models, and be able to believe every number.

The public names. They are imported when first used, so that `minilm --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Batch": "minilm.alignment",
    "Sum": "minilm.alignment",
    "align": "minilm.alignment",
    "from_labels": "minilm.alignment",
    "last": "minilm.alignment",
    "nll": "minilm.alignment",
    "score": "minilm.alignment",
    "score_hidden": "minilm.alignment",
    "MinilmError": "minilm.errors",
    "ConfigError": "minilm.errors",
    "DataError": "minilm.errors",
    "CheckpointError": "minilm.errors",
    "CheckFailed": "minilm.errors",
    "Subject": "minilm.doctor.subject",
    "Training": "minilm.doctor.subject",
    "DataView": "minilm.doctor.subject",
    "Rows": "minilm.doctor.subject",
    "examine": "minilm.examination",
    "evaluate": "minilm.assessment",
}
_MODULES = (
    "alignment",
    "config",
    "data",
    "doctor",
    "errors",
    "evaluation",
    "manifest",
    "models",
    "track",
    "training",
)

__all__ = [
    "Batch",
    "CheckFailed",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DataView",
    "MinilmError",
    "Rows",
    "Subject",
    "Sum",
    "Training",
    "__version__",
    "align",
    "alignment",
    "config",
    "data",
    "doctor",
    "errors",
    "evaluate",
    "evaluation",
    "examine",
    "from_labels",
    "last",
    "manifest",
    "models",
    "nll",
    "score",
    "score_hidden",
    "track",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"minilm.{name}")
    raise AttributeError(f"module 'minilm' has no attribute {name!r}")
