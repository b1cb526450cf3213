"""Names the config class of the exported model. The export writes this file anew for each model."""

from __future__ import annotations

from minilm.models.original import OriginalConfig as VariantConfig

__all__ = ["VariantConfig"]
