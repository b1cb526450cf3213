"""Every model as a Hugging Face folder: the same logits, loss, text and cache there, with nothing of minilm."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from remote_code import kept_apart
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo_models import every_model, tiny, tokens

from minilm import examine, models
from minilm.errors import CheckpointError, ConfigError
from minilm.export import folder as export_of
from minilm.export.folder import export_folder
from minilm.knowledge.store import DECIDE, FOLLOW, KnowledgeStore

WITH_CODE = [name for name in models.names() if name != "original"]


@dataclass
class Exported:
    ours: torch.nn.Module
    folder: Path
    theirs: transformers.PreTrainedModel


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(name) -> our tiny model, its folder, and what transformers makes of the folder."""
    made: dict[str, Exported] = {}
    root = tmp_path_factory.mktemp("exported")
    transformers.utils.logging.disable_progress_bar()

    def get(name):
        if name not in made:
            ours = tiny(name)
            folder = export_folder(ours, root / name)
            made[name] = Exported(ours, folder, loaded(folder))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:  # where transformers keeps the code of folders
        kept_apart(patch, root / "modules")
        yield get
    transformers.utils.logging.enable_progress_bar()


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def by_hand(ours, prompt, count):
    """Greedy tokens by a full forward pass of our model for each."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(ours(torch.tensor([text])).logits[0, -1].argmax()))
    return text


GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}


@every_model
def test_the_logits_are_ours_under_both_kernels_and_any_padding(exported, name):
    e = exported(name)
    ids = tokens(e.ours, 3, 24)
    with torch.no_grad():
        want = e.ours(ids).logits
        assert want.std() > 0.3
        for kernel in ("eager", "sdpa"):
            e.theirs.set_attn_implementation(kernel)
            got = e.theirs(input_ids=ids).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-6)
            assert name == "original" or e.theirs.model.config.attention == kernel
        mask = torch.ones_like(ids)
        mask[1, :5] = 0  # left
        mask[2, 20:] = 0  # right
        padded = e.theirs(input_ids=ids.masked_fill(mask == 0, 7), attention_mask=mask).logits
        alone = e.ours(ids[1:2, 5:]).logits
        torch.testing.assert_close(padded[1:2, 5:], alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(padded[2, :20], want[2, :20], atol=2e-5, rtol=1e-5)
    assert e.theirs.config.vocab_size == e.ours.config.vocab_size
    assert e.theirs.num_parameters() == e.ours.config.num_parameters()


@every_model
def test_generate_gives_our_tokens_with_a_cache_without_and_padded(exported, name):
    e = exported(name)
    ids = tokens(e.ours, 2, 9)
    ids[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    want = [by_hand(e.ours, ids[0].tolist(), 10), by_hand(e.ours, ids[1, 4:].tolist(), 10)]
    for cached in (True, False):
        got = e.theirs.generate(ids, attention_mask=mask, use_cache=cached, **GREEDY)
        assert [got[0].tolist(), got[1, 4:].tolist()] == want


@pytest.mark.parametrize("name", WITH_CODE)
def test_beams_take_their_rows_of_the_cache_along(exported, name):
    e = exported(name)
    ids = tokens(e.ours, 2, 8)
    ids[0, :3] = 0
    mask = (torch.arange(8) >= torch.tensor([[3], [0]])).long()
    options = {**GREEDY, "attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
    want = e.theirs.generate(ids, use_cache=False, **options)
    assert torch.equal(e.theirs.generate(ids, use_cache=True, **options), want)
    assert not torch.equal(want[::2, :18], e.theirs.generate(ids, attention_mask=mask, **GREEDY))  # two-sided


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_cache_in_pieces_remembers_padding_tokens_and_places(exported, name):
    """Also where later calls bring no mask, and after tokens were taken back (as assisted generation does)."""
    e = exported(name)
    ids = tokens(e.ours, 2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        want = e.theirs(input_ids=ids, attention_mask=mask).logits
        out = e.theirs(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        wrong = e.theirs(input_ids=ids[:, :4].flip(1), past_key_values=out.past_key_values)
        wrong.past_key_values.crop(-4)
        rest = [
            e.theirs(input_ids=ids[:, 5:9], past_key_values=out.past_key_values).logits,
            e.theirs(input_ids=ids[:, 9:], past_key_values=out.past_key_values, logits_to_keep=2).logits,
        ]
    kept = torch.cat([want[:, 5:9], want[:, 10:]], dim=1)
    torch.testing.assert_close(torch.cat(rest, dim=1), kept, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["moe", "knowledge"])
def test_the_loss_is_the_cross_entropy_of_the_next_token(exported, name):
    e = exported(name)
    ids = tokens(e.ours, 2, 15)
    labels = ids.clone()
    labels[0, 1:6] = -100  # the first of a row is nobody's target, marked or not
    out = e.theirs.train()(input_ids=ids, labels=labels)
    each = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    counted = (labels[:, 1:] != -100).sum()
    assert out.loss.item() == pytest.approx((each.sum() / counted).item(), rel=1e-6)
    whole = e.theirs(input_ids=ids, labels=labels, num_items_in_batch=50).loss
    assert whole.item() == pytest.approx(each.sum().item() / 50, rel=1e-6)
    assert e.theirs(input_ids=ids, labels=torch.full_like(ids, -100)).loss.item() == 0
    out.loss.backward()
    assert e.theirs.model.embedding.weight.grad.abs().sum() > 0
    e.theirs.zero_grad()
    e.theirs.eval()
    assert name != "moe" or "balance" in out.auxiliary  # beside the loss, not in it


def test_a_later_mask_decides_about_earlier_tokens(exported):
    """As in every model of transformers: the first call told nothing, the second says that it was padding."""
    e = exported("moe")
    ids = tokens(e.ours, 1, 9)
    mask = (torch.arange(9) >= 4).long()[None]
    with torch.no_grad():
        out = e.theirs(input_ids=ids[:, :4], use_cache=True)
        got = e.theirs(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=out.past_key_values).logits
        torch.testing.assert_close(got, e.ours(ids[:, 4:]).logits, atol=2e-5, rtol=1e-5)


def test_documents_in_a_row_are_told_apart_by_their_positions(exported):
    e = exported("no_ffn")
    ids = tokens(e.ours, 1, 14)
    places = torch.tensor([[*range(5), *range(9)]])
    with torch.no_grad():
        want = torch.cat([e.ours(ids[:, :5]).logits, e.ours(ids[:, 5:]).logits], dim=1)
        for cached in (True, False):
            got = e.theirs(input_ids=ids, position_ids=places, use_cache=cached).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WITH_CODE)
def test_saved_and_loaded_again_it_is_the_same_in_both_precisions(exported, name, tmp_path):
    e = exported(name)
    ids = tokens(e.ours, 2, 16)
    e.theirs.save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (e.folder, tmp_path / "again"))
    assert {f"model.{n}": None for n, _ in e.ours.named_parameters()}.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(first[f"model.{n}"], p) for n, p in e.ours.named_parameters())
    low = loaded(tmp_path / "again", dtype=torch.bfloat16)
    with torch.no_grad():
        want = e.ours(ids).logits
        torch.testing.assert_close(loaded(tmp_path / "again")(ids).logits, want, atol=1e-5, rtol=1e-6)
        got = low(ids).logits.float()
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.model.rotary.cos.dtype == torch.float32
    # A router near a tie may choose otherwise in 16 bits, and so may a retriever: the middle of the errors.
    assert (got - want).abs().median() < 0.05 * want.std()


def test_bfloat16_and_an_untied_head_are_written_as_they_are(exported, tmp_path):
    ours = tiny("persistent", tie_embeddings=False)
    folder = export_folder(ours, tmp_path / "low", dtype=torch.bfloat16)
    state = load_file(folder / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16} and "model.head.weight" in state
    assert all(torch.equal(state[f"model.{n}"], p.bfloat16()) for n, p in ours.named_parameters())
    theirs = loaded(folder)
    assert theirs.dtype == torch.bfloat16 and theirs.get_output_embeddings() is theirs.model.head
    assert {p.dtype for p in ours.parameters()} == {torch.float32}  # the exported model itself is left alone


def test_the_code_needs_nothing_that_transformers_does_not_bring(exported):
    for name in WITH_CODE:
        files = sorted(exported(name).folder.glob("*.py"))
        assert {f"{name.removesuffix('_matched')}.py", "modeling_minilm.py"} & {f.name for f in files}
        for file in files:
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                elif isinstance(node, ast.ImportFrom):
                    assert (file.parent / f"{node.module}.py").is_file()
                tops = {n.partition(".")[0] for n in names} - set(sys.stdlib_module_names)
                assert tops <= {"torch", "transformers", "safetensors", "numpy", "flash_attn"}, file
        required = {top for f in files for top in transformers.dynamic_module_utils.get_imports(f)}
        assert not required & {"flash_attn", "minilm", "pydantic"}


def written(store, folder):
    folder.mkdir()
    save_file(
        {n: getattr(store, n).contiguous() for n in (*DECIDE, *FOLLOW)}, folder / "knowledge.safetensors"
    )
    (folder / "knowledge.json").write_text(json.dumps(store.description))
    return folder


ALONE = """
    import sys, torch

    class NoMinilm:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "minilm":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, NoMinilm())
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    ids = torch.load("ids.pt", weights_only=True)
    for folder in ("moved", "again"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        torch.save({"logits": model(ids).logits.detach(), "text": text}, f"{folder}.pt")
        model.save_pretrained("again")
"""


def test_a_folder_with_a_store_works_where_there_is_no_minilm(tmp_path):
    """The store's files go along, also with save_pretrained, and are found wherever the folder is moved to."""
    config = models.preset("knowledge", "tiny")
    store = KnowledgeStore.random(
        config.store_side, config.store_width, config.vocab_size, 200, config.store_code_dim
    )
    ours = tiny("knowledge", store=str(written(store, tmp_path / "store")))
    ids = tokens(ours, 1, 12)
    torch.save(ids, tmp_path / "ids.pt")
    export_folder(ours, tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(ALONE)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    want = by_hand(ours, ids[0].tolist(), 6)
    for name in ("moved", "again"):
        got = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(got["logits"], ours(ids).logits, atol=1e-5, rtol=1e-6)
        assert got["text"][0].tolist() == want
    assert str(tmp_path) not in (tmp_path / "moved" / "config.json").read_text()


@pytest.mark.parametrize("name", ["persistent", "knowledge", "moe"])
def test_the_doctor_examines_a_folder_with_code_if_it_may_run_it(exported, name):
    folder = exported(name).folder
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        examine(str(folder), suite="quick")
    examination = examine(str(folder), suite="quick", trust_remote_code=True)
    passed = {finding.check for finding in examination.findings if finding.status == "PASS"}
    assert examination.exit_code == 0
    assert {"causality", "right_padding", "loss_identity", "batch_independence", "gradients_reach"} <= passed


def test_what_the_exported_model_cannot_do_is_said(exported, tmp_path):
    theirs = exported("moe").theirs
    ids = tokens(exported("moe").ours, 1, 6)
    for wrong in ({"output_hidden_states": True}, {"inputs_embeds": torch.zeros(1, 6, 32)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            theirs(input_ids=ids, **wrong)
    with pytest.raises(ValueError, match="takes input_ids"):
        theirs()
    with pytest.raises(ValueError, match="attention_mask must be"):
        theirs(input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="StaticCache"):
        theirs.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="vocabulary"):
        theirs.resize_token_embeddings(300)
    theirs.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    state = load_file(path)
    del state["model.blocks.1.ffn.router.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weight weight of a"):
        loaded(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    settings["architecture"]["top_n"] = settings["architecture"].pop("top_k")
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"(?s)unknown settings \['top_n'\].*lacks \['top_k'\]"):
        loaded(tmp_path / "m")


@pytest.mark.parametrize("name", ["original", "moe"])
def test_a_folder_that_computes_otherwise_is_not_written(tmp_path, monkeypatch, name):
    """An export that is wrong by a little, an interrupt, a full disk: nothing is left."""
    ours = tiny(name)
    real = export_of._write_llama if name == "original" else export_of._write_with_code

    def slightly_wrong(model, folder, tokenizer):
        again = real(model, folder, tokenizer)
        with torch.no_grad():
            next(again.parameters()).mul_(1.001)
        return again

    monkeypatch.setattr(export_of, real.__name__, slightly_wrong)
    with pytest.raises(CheckpointError, match="was not written: loaded again, its logits differ"):
        export_folder(ours, tmp_path / "out")
    for accident, raised in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "full"), CheckpointError),
    ):
        monkeypatch.setattr(
            export_of, real.__name__, lambda *_, accident=accident: (_ for _ in ()).throw(accident)
        )
        with pytest.raises(raised):
            export_folder(ours, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="overwrites nothing"):
        export_folder(tiny("original"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
