"""Launching, and what happens to a run whose rank dies or hangs: real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faulty
import forks
import pytest
from results import read_metrics

from tidar.check import launcher_options
from tidar.config import UserError, load_config
from tidar.distributed import join_world, resolve_degrees

ROOT = Path(__file__).parents[2]
TIMEOUT = 8


def options_of(fault: str, folder: Path) -> list[str]:
    """Of a run on two ranks."""
    options = "--data.source uneven --data.num_workers 0 --validation.enable false --training.seq_len 16".split()
    options += "--training.local_batch_size 2 --training.steps 5 --checkpoint.interval 1 --metrics.log_freq 1".split()
    options += ["--comm.train_timeout_seconds", str(TIMEOUT), "--job.dump_folder", str(folder)]
    if fault == "slow":
        options += ["--training.global_batch_size", "48", "--training.epochs", "1", "--checkpoint.export_epochs", "1"]
    return options


def seconds_since_fault(output: str) -> float:
    (fault_at,) = re.findall(r"fault at ([\d.]+)", output)
    return time.time() - float(fault_at)


def train_with(fault: str, folder: Path, restarts: int) -> tuple[int, str, float]:
    """Trains on two ranks, one of them at fault. Exit code, output, and the seconds from the fault to the end."""
    launch, log = partial(forks.torchrun, restarts=restarts), folder.with_suffix(".log")
    code, output = forks.call(launch, 2, faulty.train_with, fault, options_of(fault, folder), log=log)
    return code, output, seconds_since_fault(output)


@pytest.fixture(scope="module")
def stuck(tmp_path_factory) -> dict[str, tuple[int, str, float]]:
    """As `train_with`, of two faults for whose ends one waits: of two runs at the same time."""
    folder, ended = tmp_path_factory.mktemp("stuck"), {}
    logs = {fault: folder / f"{fault}.log" for fault in ("hang", "stop")}
    processes = {
        fault: forks.start(forks.torchrun, 2, faulty.train_with, fault, options_of(fault, folder / fault), log=log)
        for fault, log in logs.items()
    }
    deadline = time.time() + 100
    while len(ended) < 2 and time.time() < deadline:
        for fault, process in processes.items():
            if fault not in ended and process.exitcode is not None:
                output = logs[fault].read_text()
                ended[fault] = process.exitcode, output, seconds_since_fault(output)
        time.sleep(0.05)
    for process in processes.values():
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return ended


def test_a_rank_that_hangs_ends_the_run_and_is_named(stuck):
    code, output, seconds = stuck["hang"]
    assert code != 0 and seconds < TIMEOUT + 5  # torchrun's own
    assert f"error: no progress for {TIMEOUT} s: rank 1 did not get past step 3: micro-batch 1, and the" in output
    assert "rank 1 hangs here:" in output and "time.sleep(1000)" in output


def test_a_rank_that_is_stopped_ends_the_run_and_is_named(stuck):
    code, output, seconds = stuck["stop"]
    assert code != 0 and seconds < TIMEOUT + 5
    assert f"error: no progress for {TIMEOUT} s: rank 1 sent no heartbeat, last seen at" in output


@pytest.mark.long
def test_a_long_step_is_no_hang(tmp_path):
    """Twelve micro-batches of a second, which is more than the timeout of 8; and a long export of rank 0."""
    code, output, seconds = train_with("slow", tmp_path, restarts=0)
    assert code == 0, output
    assert seconds > 20


def test_a_rank_that_dies_ends_the_run_and_is_named(tmp_path):
    """By the command torchrun, which looks at its processes otherwise and names the one that died first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [*command, "tests/faulty.py", "kill", *options_of("kill", tmp_path)], cwd=ROOT, env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    output = finished.stdout
    assert finished.returncode != 0 and seconds_since_fault(output) < TIMEOUT + 5
    assert re.search(r"rank +: 1", output) and "SIGKILL" in output
    # the SIGTERM that rank 0 gets for it is no request to save
    assert '"outcome": "failed"' in (tmp_path / "outcome.json").read_text()
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-1", "step-2"]


def test_the_error_of_one_rank_is_shown(tmp_path):
    _, output, _ = train_with("error", tmp_path / "run", restarts=0)
    assert "\nerror: rank 1: what only this rank knows\non the second line\n" in output, output
    assert '"reason": "rank 1: what only this rank knows' in (tmp_path / "run" / "outcome.json").read_text()


def test_a_rank_that_dies_is_brought_back(tmp_path):
    """From the last checkpoint, with the curve of a run that was not disturbed."""
    code, output, _ = train_with("kill", tmp_path / "killed", restarts=1)
    assert code == 0 and f"resumed from step 2: {tmp_path / 'killed' / 'checkpoint' / 'step-2'}" in output, output
    assert "step 5/5" in output
    lines = read_metrics(tmp_path / "killed")
    assert [line["step"] for line in lines if "train/batch_loss" in line] == [1, 2, 3, 4, 5]


STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODEID": "1"}


def test_srun_names_the_nodes(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames n[1-2]' ] && printf 'n1\\nn2\\n'\n")
    scontrol.chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | STEP
    for change, expected in (
        ({}, "--max_restarts 0 --node_rank 1 --master_addr n1 --master_port 29500"),
        ({"MASTER_ADDR": "n7"}, "--max_restarts 0 --node_rank 1 --master_addr n7 --master_port 29500"),
        ({"MAX_RESTARTS": "2"}, "--max_restarts 2 --rdzv_backend c10d --rdzv_endpoint n1:29500 --rdzv_id tidar"),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID: is not set, though SLURM_STEP_NUM_NODES = 2"),
        ({"SLURM_STEP_NUM_TASKS": "16"}, "SLURM_STEP_NUM_TASKS = 16: must be one task on each of 2 nodes"),
        (
            {"PATH": os.environ["PATH"]},
            "MASTER_ADDR: must be the first of n[1-2], which scontrol does not resolve here",
        ),
        ({"SLURM_NODEID": "2"}, "NODE_RANK = 2: must be integer from 0 to 1"),
    ):
        with monkeypatch.context() as patch:
            for name, value in (here | change).items():
                patch.setenv(name, value)
            if expected.startswith("--"):
                assert launcher_options() == (f"--nnodes 2 {expected}", 2, 1)
                continue
            with pytest.raises(UserError) as error:
                launcher_options()
            assert expected in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_tasks_that_would_each_be_a_run_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS = 8: srun has started each of these as a separate run"):
        join_world(load_config([]))


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "1"}, "RANK = 1, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK = 0, WORLD_SIZE = 2, but MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE = x: must be integer >= 0"),
    ],
)
def test_half_of_what_torchrun_sets(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_world(load_config([]))


@pytest.mark.parametrize(
    "replicate, shard, devices, expected",
    [(1, -1, 8, (1, 8)), (-1, 1, 8, (8, 1)), (2, -1, 8, (2, 4)), (-1, 4, 8, (2, 4)), (2, 2, 4, (2, 2))]
    + [(1, 4, 8, None), (3, -1, 8, None), (-1, 3, 8, None), (16, -1, 8, None), (-1, 16, 8, None), (-1, -1, 4, None)],
)  # fmt: skip
def test_degrees(replicate, shard, devices, expected):
    options = ["--parallelism.data_parallel_replicate_degree", str(replicate)]
    config = load_config([*options, "--parallelism.data_parallel_shard_degree", str(shard)])
    if expected:
        assert resolve_degrees(config, devices) == expected
        return
    with pytest.raises(
        UserError, match=f"data_parallel_replicate_degree = .*{shard}: (.|\n)*(devices, {devices}|from the other)"
    ):
        resolve_degrees(config, devices)
