"""How the global batch is cut does not show: ranks x micro-batch x kind of rows x wrapper, against float64."""

from __future__ import annotations

import json

import pytest
from exactness_worker import KINDS, main
from training_runs import ROOT, launched_script

GRID = [f"{kind}, micro-batch {micro}" for kind in KINDS for micro in (1, 2, 4, 8)]


def assert_exact(result, wrapper, world_size):
    assert result["world_size"] == world_size
    cases = result["cases"]
    assert [
        case.partition(f", {wrapper}")[0] for case in cases
    ] == GRID  # every case ran, on the layout that was asked
    for case, errors in cases.items():
        for what in ("loss", "gradient_norm", "gradient"):
            assert errors[what] < 1e-5, (case, what, errors[what])
    assert any(errors["empty_micro_batches"] for case, errors in cases.items() if case.startswith("masked"))


@pytest.mark.usefixtures("fresh_accelerate")
def test_one_process(tmp_path):
    main(tmp_path / "out.json")
    assert_exact(json.loads((tmp_path / "out.json").read_text()), "one process", 1)


@pytest.mark.parametrize(
    ("launcher", "wrapper"),
    [("cpu2.yaml", "DDP on 2 ranks"), ("cpu2_zero2.yaml", "DeepSpeed ZeRO-2 on 2 rank(s)")],
    ids=["DDP", "ZeRO-2"],
)
@pytest.mark.xdist_group("two ranks")
def test_two_ranks(tmp_path, launcher, wrapper):
    result = launched_script(
        ROOT / "tests" / "exactness_worker.py", [str(tmp_path / "out.json")], launcher=launcher
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_exact(json.loads((tmp_path / "out.json").read_text()), wrapper, 2)
