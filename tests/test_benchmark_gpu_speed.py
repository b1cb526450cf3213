"""The report of a GPU: goals are judged by what was measured, a part that fails is told, and who waits is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmark_modules import imported

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def gpu(monkeypatch):
    with imported("gpu_speed") as module:
        monkeypatch.setattr(module.measuring, "ceiling", lambda *a, **k: 1e9)
        yield module


def step(speeds, head_size=64, mfu=0.3):
    """A record of training_step.py as far as the goals look at it; speeds in tokens/s of one turn."""
    found = {
        name: {"label": name, "tokens_per_second": {"median": float(speed)}, "seconds": [1000.0 / speed],
               "flops_per_token": 2e6, "mfu": mfu}
        for name, speed in speeds.items()
    }  # fmt: skip
    return {"results": {"cases": [{"head_size": head_size, "contenders": found}]}, "complaint": None}


def reached(gpu, parts, peak=None):
    return {goal: (said, yes) for goal, said, yes in gpu.goals(parts, peak)}


def test_goals_are_judged_by_the_better_of_ours_and_turn_by_turn(gpu):
    speeds = {"minilm": 50, "minilm-compiled": 90, "transformers": 40, "transformers-compiled": 100}
    found = reached(gpu, {"step": {"records": [step(speeds)]}}, peak=4e8)
    said, yes = found["at least 40% MFU with head size 64"]
    assert (
        yes and "45.0% of the data sheet" in said and "30.0% of the measured product" in said
    )  # 90 x 2e6 / 4e8
    assert found["at least 25% MFU with head size 16"] == ("not measured", None)
    assert found["at least 2 x transformers with head size 64"][1] is True
    assert found["at least 1 x transformers-compiled with head size 64"] == ("0.90 (0.90 to 0.90) x", False)
    assert found["ZeRO-2 on one GPU within 5 % of no wrapper"] == ("not measured", None)
    unknown = reached(gpu, {"step": {"records": [step(speeds)]}})  # a device that no data sheet is known of
    assert unknown["at least 40% MFU with head size 64"][1] is False


def test_who_failed_is_not_measured(gpu):
    record = step({"minilm": 50, "transformers": 40})
    record["results"]["cases"][0]["contenders"]["minilm"] = {"label": "minilm", "failed": "no"}
    found = reached(gpu, {"step": {"records": [record]}})
    assert {yes for _, yes in found.values()} == {None}


@pytest.mark.parametrize(("speed", "yes"), [(96, True), (94, False)])
def test_zero_is_held_against_no_wrapper(gpu, speed, yes):
    points = [{"wrapper": None, "tokens_per_second": {"median": 100.0}},
              {"wrapper": "ZeRO-2", "tokens_per_second": {"median": float(speed)}},
              {"wrapper": "DDP", "absent": "no"}]  # fmt: skip
    found = reached(gpu, {"zero": {"records": [{"results": points, "complaint": None}]}})
    assert found["ZeRO-2 on one GPU within 5 % of no wrapper"] == (
        f"{speed}.0% of the speed without a wrapper",
        yes,
    )


def inside(seen):
    kinds = {"matrix product": 0.05, "attention": 0.03}
    return {"settings": {"head_size": 16, "compile": False}, "complaint": None, "results": {
        "waiting": {"seen_by_torch": seen, "steps": 3, "asked": []}, "kinds": kinds, "busy_seconds": 0.08,
        "idle_seconds": 0.02, "seconds": {"median": 0.1}, "flops_per_step": 4e7, "product_flops": 1e9}}  # fmt: skip


def test_calls_that_wait_are_counted_and_the_rest_of_a_step_is_told(gpu):
    goal = "no call that waits for the GPU inside of a step (eager, head size 16)"
    two = {"inside": {"records": [inside([{"where": "step.py:3", "count": 2}])]}}
    assert reached(gpu, two)[goal] == ("2 in 3 steps", False)
    assert reached(gpu, {"inside": {"records": [inside([])]}})[goal][1] is True
    assert reached(gpu, {"inside": {"records": [inside(None)]}})[goal][1] is None
    (said,) = gpu.in_the_way(two)
    assert "100.0 ms a step" in said and "would take 40%" in said
    assert "matrix product 50%, attention 30%, nothing to do 20%" in said


def test_a_part_that_fails_is_told_and_the_others_go_on(gpu, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def stand_in(command, *, seconds):
        if "scaling.py" in command[1]:
            return None, "it was\nin the middle of it"
        where = Path(command[command.index("--json") + 1])
        where.write_text(json.dumps({"results": {"cases": []}}))
        return (1, "the losses differ") if "training_step.py" in command[1] else (0, "")

    monkeypatch.setattr(gpu, "run_whole", stand_in)
    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(gpu.SCRIPTS, lambda record: "the section"))
    code = gpu.main(["--scale", "cpu", "--out", str(out), "--only", "step", "zero", "parts"])
    assert code == 1
    report = json.loads((out / "report.json").read_text())
    assert list(report["parts"]) == ["step", "zero", "parts"]
    assert "the losses differ" in report["parts"]["step"]["records"][0]["complaint"]
    assert "its time" not in report["parts"]["parts"]["failed"] and report["parts"]["zero"]["records"] == []
    page = (out / "report.md").read_text()
    assert "in the middle of it" in page and "the time was over" in page and "the losses differ" in page
    assert page.count("the section") == 2 and capsys.readouterr().out.strip() == page.strip()

    monkeypatch.setattr(gpu, "run_whole", lambda command, *, seconds: (0, ""))  # wrote nothing
    assert gpu.main(["--scale", "cpu", "--out", str(out), "--only", "scaling", "--minutes", "1"]) == 1
    assert list(json.loads((out / "report.json").read_text())["parts"]) == [
        "step",
        "zero",
        "parts",
        "scaling",
    ]


def test_without_time_nothing_more_is_begun(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_whole", lambda *a, **k: pytest.fail("it was begun"))
    assert gpu.main(["--scale", "cpu", "--out", str(tmp_path), "--minutes", "0.1"]) == 1
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert list(parts) == list(gpu.SCRIPTS)
    assert {why for part in parts.values() for why in part["failed"].values()} == {
        "there was no time left for it"
    }


def test_every_command_of_the_plan_is_understood(gpu, monkeypatch):
    """A flag that is not there would cost the minutes of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parsers = {"training_step": gpu.training_step.parsed, "scaling": gpu.scaling._arguments,
               "step_inside": gpu.step_inside._arguments, "parts": gpu.parts_of_step._arguments}  # fmt: skip
    for scale in gpu.PLAN.values():
        assert list(scale) == list(gpu.SCRIPTS)
        for part, commands in scale.items():
            for given in commands.values():
                out = ["--out", "x"] if gpu.SCRIPTS[part] == "step_inside" else ["--json", "x"]
                args = parsers[gpu.SCRIPTS[part]]([*given, *out])
                assert args.device == "cuda"
    args = gpu.scaling._arguments(gpu.PLAN["gpu"]["zero"]["scaling_zero"])
    assert (args.size, args.row, args.length, args.dtype, args.ranks) == ("26m", 128, 512, "bfloat16", [1])


def test_a_gpu_that_is_not_there_is_named(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "--scale cpu runs the same path in small" in capsys.readouterr().err


def test_inside_of_a_step_everything_is_told(gpu, tmp_path, capsys):
    assert gpu.step_inside.main(["--quick", "--out", str(tmp_path), "--head-size", "16"]) == 0
    record = json.loads((tmp_path / "step_inside-head16.json").read_text())
    found = record["results"]
    assert (tmp_path / "trace-head16.json.gz").stat().st_size > 1000
    assert sum(found["kinds"].values()) == pytest.approx(found["busy_seconds"])
    assert any(one["name"] == "aten::mm" and one["kind"] == "matrix product" for one in found["top"])
    assert len(found["losses"]) == 18 and found["losses"][-1] < found["losses"][0]
    assert found["waiting"]["seen_by_torch"] is None and found["idle_seconds"] is None
    page = capsys.readouterr().out
    assert gpu.step_inside.section(record) in page and "Nobody waits for a CPU" in page


def test_who_asks_a_tensor_for_a_number_is_found(gpu):
    from minilm.alignment import Sum

    with gpu.step_inside._Asked() as asked:
        total = Sum.of(2.0, 4.0)
        assert total.mean == 0.5
        torch.tensor([0, 1]).nonzero()
    found = {(name, where.split(":")[0]): count for (name, _, where), count in asked.found.items()}
    assert found["nonzero", "not in minilm"] == 1
    assert found["_local_scalar_dense", "minilm/alignment.py"] >= 2  # nats and tokens of the mean


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix product"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            "optimizer",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "element by element",
        ),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>", "softmax and loss"),
        ("triton_poi_fused_add_mul_silu_0", "compiled"),
        ("Memcpy HtoD (Pinned -> Device)", "copy and fill"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float>>", "reduction"),
        ("something new", "other"),
    ],
)
def test_kernels_are_put_where_they_belong(gpu, name, kind):
    assert gpu.step_inside.kind_of(name) == kind
