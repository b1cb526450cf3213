"""A damaged folder, or one of another architecture, is refused, and everything that differs is named."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo_models import tiny

from minilm.errors import CheckpointError
from minilm.models import folder


@pytest.fixture
def saved(tmp_path):
    model = tiny("original")
    folder.save(model, tmp_path)
    return model, tmp_path


def description(path) -> dict:
    return json.loads((path / "model.json").read_text())


def rewrite(path, **changes) -> None:
    content = description(path)
    content["config"].update(changes.pop("config", {}))
    (path / "model.json").write_text(json.dumps({**content, **changes}))


def weights(path, change) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


def test_a_tied_weight_is_written_once_and_the_table_not_at_all(saved):
    model, path = saved
    state = load_file(path / "model.safetensors")
    assert sum(t.numel() for t in state.values()) == model.config.num_parameters()
    assert not [name for name in state if "head" in name or "rotary" in name]
    assert description(path)["num_parameters"] == 32_928
    assert sorted(p.name for p in path.iterdir()) == ["model.json", "model.safetensors"]


def test_both_files_can_be_read_by_the_same_people(saved):
    _, path = saved
    modes = {stat.S_IMODE((path / name).stat().st_mode) for name in ("model.json", "model.safetensors")}
    assert len(modes) == 1


def test_the_dtype_is_kept_in_the_file_and_chosen_at_load(tmp_path):
    model = tiny("original").to(torch.bfloat16)
    folder.save(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in folder.load(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in folder.load(tmp_path, dtype=None).parameters()} == {torch.bfloat16}


def test_weights_gathered_elsewhere_can_be_saved_and_are_checked(tmp_path):
    model = tiny("original").to(torch.bfloat16)
    master = {name: t.float() + 1e-4 for name, t in model.state_dict().items()}
    folder.save(model, tmp_path, state=master)
    assert torch.equal(folder.load(tmp_path).norm.weight, master["norm.weight"])
    short = dict(master)
    del short["norm.weight"]
    short["module.norm.weight"] = master["norm.weight"]
    short["embedding.weight"] = master["embedding.weight"][:5]
    with pytest.raises(
        CheckpointError, match=r"(?s)3 problems.*norm\.weight is missing.*module\.norm.*\[5, 32\]"
    ):
        folder.save(model, tmp_path, state=short)


def test_weights_load_into_a_living_model_in_place(saved):
    model, path = saved
    other = tiny("original", seed=9, dropout=0.1, attention="eager")
    before = {name: p.data_ptr() for name, p in other.named_parameters()}
    folder.load_weights(other, path)
    assert {name: p.data_ptr() for name, p in other.named_parameters()} == before
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_another_architecture_is_named_setting_by_setting(saved):
    _, path = saved
    other = tiny("original", num_layers=3, rope_theta=5e5, hidden_dim=64)
    with pytest.raises(CheckpointError) as error:
        folder.load_weights(other, path)
    text = str(error.value)
    assert "3 problems" in text
    assert "num_layers is 2 in the folder, 3 here" in text
    assert "rope_theta is 10000.0 in the folder, 500000.0 here" in text and "hidden_dim is 96" in text


def test_every_difference_of_the_weights_is_named(saved):
    _, path = saved

    def change(state):
        state["blocks.0.attention.extra"] = state.pop("blocks.0.attention.qkv.weight")
        state["norm.weight"] = torch.ones(31)

    weights(path, change)
    with pytest.raises(CheckpointError) as error:
        folder.load(path)
    text = str(error.value)
    assert "3 problems" in text
    assert "blocks.0.attention.qkv.weight is missing" in text
    assert "blocks.0.attention.extra is in model.safetensors but not in the model" in text
    assert "norm.weight has shape [31] in model.safetensors, [32] in the model" in text


def test_numbers_that_are_none_are_refused(saved):
    _, path = saved
    weights(path, lambda state: state["norm.weight"].__setitem__(3, float("nan")))
    with pytest.raises(CheckpointError, match=r"norm\.weight: 1 of 32 numbers are not finite"):
        folder.load(path)


def test_integers_where_weights_belong_are_refused(saved):
    _, path = saved
    weights(path, lambda state: state.update({"norm.weight": torch.ones(32, dtype=torch.long)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight: torch\.int64 instead of torch\.float32"):
        folder.load(path)


@pytest.mark.parametrize("keep", [0, 4, 500, 100_000])
def test_a_torn_weight_file_is_refused(saved, keep):
    _, path = saved
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        folder.load(path)


def test_missing_files_are_named_with_what_is_there(saved, tmp_path):
    _, path = saved
    (path / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors does not exist.*The folder holds: model\.json"
    ):
        folder.load(path)
    with pytest.raises(CheckpointError, match="There is no folder"):
        folder.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("[]", "holds no model config"), ('{"config": 3}', "holds no model config")],
)
def test_a_damaged_description_is_refused(saved, content, message):
    _, path = saved
    (path / "model.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        folder.load(path)


def test_a_description_from_elsewhere_is_refused(saved):
    _, path = saved
    rewrite(path, format=2)
    with pytest.raises(CheckpointError, match="has format 2, this minilm reads format 1"):
        folder.load(path)
    rewrite(path, format=1, config={"name": "orginal"})
    with pytest.raises(CheckpointError, match="did you mean 'original'"):
        folder.load(path)
    rewrite(path, config={"name": "original", "num_head": 4})
    with pytest.raises(CheckpointError, match="did you mean 'num_heads'"):
        folder.load(path)


def test_a_setting_that_is_missing_is_not_replaced_by_a_default(saved):
    _, path = saved
    content = description(path)
    del content["config"]["rope_theta"], content["config"]["norm_eps"]
    (path / "model.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lacks the settings norm_eps, rope_theta"):
        folder.load(path)


def test_a_config_changed_by_hand_is_noticed(saved):
    _, path = saved
    rewrite(path, config={"hidden_dim": 97})
    with pytest.raises(CheckpointError, match="changed by hand"):
        folder.load(path)


def test_a_checkpoint_trained_with_flash_loads_where_flash_is_missing(saved):
    model, path = saved
    rewrite(path, config={"attention": "flash"})
    assert folder.load(path).config == model.config  # auto


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written.*free space"):
        folder.save(tiny("original"), tmp_path / "file" / "below")


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    model, path = saved
    old = (path / "model.safetensors").read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.save(model, path)
    assert (path / "model.safetensors").read_bytes() == old
