"""The source files of a model, found by following imports: a new variant needs nothing but its own files."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from safetensors.torch import load_file

import minilm.models
from minilm import models
from minilm.errors import ConfigError
from minilm.export import folder as export_of
from minilm.export.folder import export_folder
from minilm.export.sources import collect, file_name

PART = '''
"""A part in a file of its own."""

from torch import nn


class Doubled(nn.Module):
    """Twice."""

    def forward(self, x):
        return 2 * x
'''

VARIANT = '''
"""A model that nobody knows yet; `import minilm.models.parts` in a text is no import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from minilm.models import attention as kernels
from minilm.models import register
from minilm.models.original import (
    Original,
    OriginalConfig,
)
from minilm.models.parts import AttentionBlock
from minilm.models.parts import Attention

from .brand_new_part import Doubled

if TYPE_CHECKING:
    import a_package_for_type_checkers
    from minilm.training.trainer import Trainer


@register("brand_new")
@dataclass(frozen=True, kw_only=True)
class BrandNewConfig(OriginalConfig):
    """Its settings."""

    name: Literal["brand_new"] = "brand_new"
    factor: Annotated[float, Field(gt=0, description="a number")] = 1.5
    trainer: ClassVar[Any] = None

    def parameter_groups(self):
        groups = super().parameter_groups()
        del groups["feed-forward"]
        return {**groups, "norms": (self.num_layers + 1) * self.dim}

    def module(self):
        return BrandNew(self)


class BrandNew(Original):
    """Its module, with a table that is computed and not saved."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.linspace(1, config.factor, config.dim), persistent=False)

    def block(self, layer: int) -> Trainer:
        return AttentionBlock(self.config, Attention(self.config, layer))

    def stack(self, x, plan, segments):
        def rarely():
            import a_package_that_is_rare
            from minilm.models.folder import save

        assert kernels.attend is not None
        return Doubled()(x * self.table), {}
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(name, text): a file of minilm/models for the length of a test."""
    monkeypatch.setattr(minilm.models, "__path__", [*minilm.models.__path__, str(tmp_path)])
    monkeypatch.setattr(minilm.models, "_CONFIG_CLASSES", dict(minilm.models._CONFIG_CLASSES))

    def put(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"minilm.models.{name}"

    yield put
    for name in [n for n in sys.modules if n.startswith("minilm.models.brand_new")]:
        del sys.modules[name]


def test_a_variant_of_two_new_files_is_exported_and_computes_the_same(place, tmp_path):
    place("brand_new_part", PART)
    text = VARIANT.replace("            from minilm.models.folder import save\n", "")
    module = importlib.import_module(place("brand_new", text))
    torch.manual_seed(0)
    ours = models.build(
        module.BrandNewConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2)
    )
    folder = export_folder(ours, tmp_path / "out")  # compares logits, in which the table is
    files = {path.name for path in folder.glob("*.py")}
    assert {"brand_new.py", "brand_new_part.py", "original.py", "modeling_minilm.py", "attention.py"} <= files
    assert not files & {"moe.py", "folder.py", "trainer.py"}
    assert not any("table" in name for name in load_file(folder / "model.safetensors"))
    code = (folder / "brand_new.py").read_text()
    assert "from .brand_new_part import Doubled" in code and "from .fields import Field" in code
    assert "a_package_for_type_checkers" not in code and "Trainer\n" not in code
    assert "try:\n                import a_package_that_is_rare\n" in code
    assert "`import minilm.models.parts` in a text is no import" in code
    # transformers copies the files that it sees as `from .x import`; `from . import attention` it does not see.
    assert "from .attention import" in (folder / "variant.py").read_text()


def test_everything_that_cannot_be_taken_along_is_named(place):
    place("brand_new_part", PART + "\nimport minilm.errors\n")
    text = VARIANT.replace("import torch\n", "import torch\nimport a_rare_package\n", 1)
    text = text.replace("import register", "import register, names")
    sys.modules["a_rare_package"] = sys
    try:
        module = importlib.import_module(place("brand_new", text))
    finally:
        del sys.modules["a_rare_package"]
    with pytest.raises(ConfigError) as refused:
        collect(module.BrandNewConfig)
    for part in (
        "brand_new, line 10: it needs the package a_rare_package",
        "names of minilm.models is not there in an exported folder",
        "brand_new_part, line 13: `import minilm.errors`; write `from ... import ...`",
    ):
        assert part in str(refused.value)


def test_a_model_of_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="put the file of the model into minilm/models"):
        file_name("somewhere.models.mine")


def test_two_modules_never_share_a_file(place):
    place("brand_new_part", PART)
    place("errors", '"""Of the models."""\n')
    text = VARIANT.replace(
        "import AttentionBlock\n", "import AttentionBlock\nfrom minilm.models import errors\n", 1
    )
    module = importlib.import_module(place("brand_new", text))
    with pytest.raises(ConfigError, match=r"would both be errors\.py"):
        collect(module.BrandNewConfig)
    del sys.modules["minilm.models.errors"]


def test_every_file_imports_only_what_lies_beside_it():
    for name in models.names():
        files = collect(models.config_class(name))
        for text in files.values():
            needed = {line.split()[1] for line in text.splitlines() if line.lstrip().startswith("from .")}
            assert {f"{stem.removeprefix('.')}.py" for stem in needed} <= set(files), name
    assert export_of._AUTO_MAP["AutoConfig"].partition(".")[0] + ".py" in files
