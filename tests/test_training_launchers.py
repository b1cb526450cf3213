"""Every file of run_file/accelerate is one that Accelerate reads, says nothing twice, and starts what it says.

The files for several machines and that for ZeRO on two CPU processes are started in test_training_distributed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from training_runs import ROOT

FILES = ROOT / "run_file" / "accelerate"
# distributed type, machines, processes, ZeRO stage
SAID = {
    "single.yaml": ("NO", 1, 1, 0),
    "multi_gpu.yaml": ("MULTI_GPU", 1, 2, 0),
    "zero2.yaml": ("DEEPSPEED", 1, 1, 2),
    "multi_node.yaml": ("MULTI_GPU", 2, 2, 0),
    "multi_node_zero2.yaml": ("DEEPSPEED", 2, 2, 2),
    "cpu2.yaml": ("MULTI_GPU", 1, 2, 0),
    "cpu2_zero2.yaml": ("DEEPSPEED", 1, 2, 2),
}


def test_every_file_is_known_here_and_described_on_the_page_about_launching():
    assert {path.name for path in FILES.iterdir()} == SAID.keys()
    page = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    assert [name for name in SAID if name not in page] == []


@pytest.mark.parametrize("name", SAID)
def test_accelerate_reads_the_file_and_it_leaves_the_numbers_to_the_settings_of_the_run(name):
    config = load_config_from_file(str(FILES / name))
    assert isinstance(config, ClusterConfig)
    deepspeed = config.deepspeed_config
    found = (config.distributed_type.value, config.num_machines, config.num_processes)
    assert (*found, deepspeed.get("zero_stage", 0)) == SAID[name]
    assert config.mixed_precision is None  # "no" would be the launcher's word against train.precision
    said_twice = {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"}
    assert not said_twice & deepspeed.keys()
    # The default would log in to the other machines with pdsh.
    assert (
        config.num_machines == 1 or not deepspeed or deepspeed["deepspeed_multinode_launcher"] == "standard"
    )


@pytest.mark.xdist_group("two ranks")
def test_every_file_for_one_machine_starts_what_it_says(tmp_path):
    started = {}
    for number, (name, (_, machines, _, _)) in enumerate(SAID.items()):
        if machines > 1 or name == "cpu2_zero2.yaml":  # started elsewhere, see above
            continue
        (tmp_path / name).mkdir()
        port = str(42_000 + number + os.getpid() % 18_000)
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", str(FILES / name), "--main_process_port", port]
        command += [str(ROOT / "tests" / "launch_probe.py"), str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started[name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    for name, process in started.items():
        try:
            output = process.communicate(timeout=120)[0]
        finally:
            process.kill()
        assert process.returncode == 0, output[-2000:]
        _, _, processes, stage = SAID[name]
        told = {path.name: path.read_text() for path in (tmp_path / name).iterdir()}
        kind = "zero" if stage else "ddp" if processes > 1 else "single"
        lines = {rank: text.partition("\n")[0] for rank, text in told.items()}
        assert lines == {str(rank): f"{kind} {stage} {processes} {processes}" for rank in range(processes)}
        if name not in ("cpu2.yaml", "zero2.yaml"):
            continue
        # What other tests run in forks stands in the same environment.
        (tmp_path / "forked" / name).mkdir(parents=True)
        done = forked.run(
            ROOT / "tests" / "launch_probe.py", [str(tmp_path / "forked" / name)], launcher=name
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert {path.name: path.read_text() for path in (tmp_path / "forked" / name).iterdir()} == told


def test_a_fork_ends_as_a_new_interpreter_would(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "print('out', sys.argv[1:], __name__, os.getcwd()); print('err', file=sys.stderr)\n"
        "rank = os.environ.get('RANK')\n"
        "end = sys.argv[1]\n"
        "if end == 'die' or rank == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if end == 'wait': import time; time.sleep(60)\n"
        "if end == 'words': sys.exit('why')\n"
        "if end == 'raise': raise KeyError('broken')\n"
        "sys.exit(int(end))\n"
    )
    codes = {}
    for end in ("0", "3", "die", "words", "raise"):
        done = forked.run(script, [end])
        really = subprocess.run([sys.executable, str(script), end], capture_output=True, text=True)
        assert done.stdout == really.stdout, end
        codes[end] = done.returncode
        assert done.returncode == really.returncode, end
        assert done.stderr.splitlines()[-1] == really.stderr.splitlines()[-1]
    assert codes == {"0": 0, "3": 3, "die": -9, "words": 1, "raise": 1}
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(script, ["wait"], timeout=0.5)


def test_a_fork_that_waits_for_another_that_died_is_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(100)\n"
    )
    start = time.monotonic()
    done = forked.run(script, [str(tmp_path / "left")], launcher="cpu2.yaml", patience=2)
    assert done.returncode == -signal.SIGKILL and time.monotonic() - start < 50
    assert not Path("/proc", (tmp_path / "left").read_text()).exists()
