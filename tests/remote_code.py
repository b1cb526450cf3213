"""Folders with their own code: transformers copies it and imports it from a place that all tests would share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers


def kept_apart(patch: pytest.MonkeyPatch, place: Path) -> None:
    """Copies go to `place`, and modules that were imported from another place are forgotten until `patch` ends."""
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(place))
    patch.syspath_prepend(str(place))
    for module in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        patch.delitem(sys.modules, module)
