"""Runs that are asked to stop: by signals to the launcher, and by the clock."""

import gc
import json
import multiprocessing.popen_fork
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import faulty
import forks
import pytest
import torch
from results import batch_losses, files_of, read_metrics
from runs import train_run
from torture import difference, end_of

from tidar.config import UserError, load_config
from tidar.data import make_loader
from tidar.distributed import leave_world
from tidar.models.huggingface.manifest import read_manifest, saved_steps
from tidar.patterns import get_pattern
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
OPTIONS = "--data.source uneven --validation.enable false --training.seq_len 16 --training.local_batch_size 2"
OPTIONS += " --metrics.log_freq 1 --checkpoint.interval 1000 --training.steps"


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def wait_for(condition, is_alive, log: Path) -> None:
    deadline = time.time() + 200
    while not condition():
        assert is_alive() and time.time() < deadline, log.read_text()
        time.sleep(0.02)


def is_past(folder: Path, step: int) -> bool:
    return (folder / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(folder))


def test_a_signal_to_the_launcher_saves_and_stops(tmp_path, ranks, uneven_data):
    """The script starts as many ranks as NGPU says, and the run ends as one that was left alone."""
    folder, whole, log = tmp_path / "stopped", tmp_path / "whole", tmp_path / "log"
    options = [*uneven_data.split(), *OPTIONS.split()[2:], "24", "--job.dump_folder"]
    command = ["env", f"PYTHON={sys.executable}", "NGPU=2", "LOG_RANK=0, 1", "./run_train.sh", *options, str(folder)]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, start_new_session=True, stdout=output, stderr=output
        )
    try:
        wait_for(lambda: is_past(folder, 3), lambda: process.poll() is None, log)
        process.send_signal(signal.SIGUSR1)
        process.wait(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found, output = outcome(folder), log.read_text()
    assert "2 devices x 1 micro-batch x 2 rows" in output and len(re.findall(r"^step +1/24", output, re.M)) == 2
    assert (found["outcome"], found["reason"]) == ("stopped", "SIGUSR1"), output
    assert 3 <= found["step"] < 24
    saved = folder / "checkpoint" / f"step-{found['step']}"
    assert found["checkpoint"] == str(saved) and saved.exists()
    assert f"stopped after step {found['step']} by SIGUSR1: saved in {saved}" in output
    for path in (folder, whole):
        ranks.run(2, "--job.config_file", str(ROOT / "train_configs" / "debug.toml"), *options, str(path))
        assert outcome(path)["outcome"] == "finished"
    assert len(batch_losses(folder)) == 24 and batch_losses(folder) == batch_losses(whole)


def test_a_second_signal_ends_the_run_at_once(tmp_path, uneven_data):
    options = [*uneven_data.split(), *OPTIONS.split()[2:], "100000", "--job.dump_folder", str(tmp_path)]
    log = tmp_path / "log"
    process = forks.start(forks.torchrun, 2, faulty.train_with, "slow_commit", options, log=log)
    try:
        wait_for(lambda: is_past(tmp_path, 2), process.is_alive, log)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: list(tmp_path.glob("checkpoint/*.partial")), process.is_alive, log)
        time.sleep(0.6)
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)  # the commit would take a minute
        assert process.exitcode, log.read_text()
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    assert outcome(tmp_path)["outcome"] == "failed"
    assert not list(tmp_path.glob("checkpoint/step-?")) + list(tmp_path.glob("checkpoint/step-??"))


def test_the_clock_saves_and_stops(tmp_path, ranks, uneven_data):
    """All ranks at the same step; the next start counts its minutes from 0."""
    options = [*uneven_data.split(), *OPTIONS.split()[2:], "100000", "--job.dump_folder", str(tmp_path)]
    late = [(0, step, "data") for step in range(1000)]  # a step takes time, and little of the processor's
    answers = ranks.run(2, *options, "--checkpoint.max_wall_minutes", "0.05", faults=late)
    assert all(answer["error"] is None for answer in answers)
    (first,) = re.findall(r"stopped after step (\d+) by checkpoint.max_wall_minutes", answers[0]["printed"])
    assert outcome(tmp_path)["step"] == int(first) > 2
    ranks.run(2, *options, "--checkpoint.max_wall_minutes", "0.05", faults=late)
    assert outcome(tmp_path)["outcome"] == "stopped" and outcome(tmp_path)["step"] > int(first)


def test_without_checkpoints_nothing_is_saved(tmp_path, uneven_data, capsys):
    options = [*uneven_data.split(), *OPTIONS.split()[2:], "100", "--job.dump_folder", str(tmp_path)]
    options += ["--checkpoint.max_wall_minutes", "1e-6", "--checkpoint.enable", "false"]
    train_run(options)
    assert "stopped after step 2 by checkpoint.max_wall_minutes: nothing is saved" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint").exists() and outcome(tmp_path)["checkpoint"] is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    """From the moment that the outcome is "running"."""
    options = [*OPTIONS.split(), "9", "--job.dump_folder", str(tmp_path)]
    code, output = forks.call(faulty.signalled_before_the_first_step, options, log=tmp_path / "log")
    assert code == 128 + signal.SIGTERM and "error: SIGTERM before the first step" in output
    assert outcome(tmp_path)["outcome"] == "failed"


def test_a_signal_at_the_fork_kills_no_worker(monkeypatch):
    """Each worker gets SIGTERM and SIGUSR1 before it has run a line, with the handlers that a plain process has."""
    forked = multiprocessing.popen_fork.os.fork

    def fork_signalled() -> int:
        pid = forked()
        if pid == 0:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return pid

    monkeypatch.setattr(multiprocessing.popen_fork.os, "fork", fork_signalled)
    rows = [(torch.zeros(4, dtype=torch.long),) * 3] * 6
    batches = make_loader(rows, [[(0, i)] for i in range(6)], get_pattern("causal"), 0, 2, pin_memory=False)
    assert len(list(batches)) == 6


INTERRUPTED = """
    --training.seq_len 64 --training.local_batch_size 8 --training.global_batch_size 32 --training.steps 6
    --validation.share 0.3 --validation.freq 2 --checkpoint.interval 3 --checkpoint.export_epochs 1 --metrics.log_freq 1
""".split()


class SignalAt(Hooks):
    """Sends the signal in the second batch of step 3 or of a validation, or before the export of an epoch."""

    def __init__(self, place: str):
        self.place = place
        self.batches_seen: Counter = Counter()

    def on_micro_batch(self, trainer, rows, loss, scores):
        place = "step" if torch.is_grad_enabled() else "validation"
        self.batches_seen[place, trainer.step] += 1
        if place == self.place and self.batches_seen[place, 2] == 2:
            self.send(trainer)
        return loss

    def after_step(self, trainer):
        if self.place == "export" and trainer.progress.epoch:
            self.send(trainer)

    def send(self, trainer):
        if trainer.stops.signal is None:
            os.kill(os.getpid(), signal.SIGUSR1)
            while trainer.stops.signal is None:
                time.sleep(0.001)


def train_interrupted(folder: Path, model_and_data: str, hooks: Hooks | None = None) -> Trainer:
    return train_run([*INTERRUPTED, *model_and_data.split(), "--job.dump_folder", str(folder)], hooks)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, small_model) -> tuple:
    folder = tmp_path_factory.mktemp("left-alone")
    train_interrupted(folder, small_model)
    return end_of(folder, 6)[:2], files_of(folder / "export")


@pytest.mark.parametrize("place, step, left", [("step", 2, [0, 0]), ("validation", 2, [1, 0]), ("export", 5, [0, 1])])
def test_what_a_stop_interrupts_is_done_after_the_resume(tmp_path, small_model, left_alone, place, step, left):
    """At the same step, with the state, the curve and the exports of a run that was left alone."""
    stopped = train_interrupted(tmp_path, small_model, SignalAt(place))
    assert outcome(tmp_path)["outcome"] == "stopped" and outcome(tmp_path)["step"] == step
    assert stopped.progress.state["interrupted"].tolist() == left and not list(tmp_path.glob("export/*"))
    assert (
        not any("val/loss" in line and line["step"] == step for line in read_metrics(tmp_path)) or place != "validation"
    )
    train_interrupted(tmp_path, small_model)
    assert outcome(tmp_path)["outcome"] == "finished"
    assert difference(end_of(tmp_path, 6)[:2], left_alone[0]) == ""
    assert files_of(tmp_path / "export") == left_alone[1]


def test_a_stop_in_an_export_keeps_the_validation_before_it(tmp_path, small_model, monkeypatch):
    """Of the same step: its line of metrics.jsonl, and the loss by which checkpoint.save_best keeps the best."""
    options = f"{small_model} --validation.freq 5 --training.steps 8 --optimizer.lr 10 --checkpoint.interval 5"
    options += " --checkpoint.save_best --checkpoint.keep_latest_k 1"
    ends, export = [], Trainer.export_epoch

    def export_signalled(trainer: Trainer, number: int) -> None:
        SignalAt("export").send(trainer)
        export(trainer, number)

    for name in ("alone", "stopped"):
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "export_epoch", export_signalled)
                assert train_interrupted(tmp_path / name, options).step == 5
        train_interrupted(tmp_path / name, options)
        losses = [line.get("val/loss") for line in read_metrics(tmp_path / name)]
        kept = {step: read_manifest(path)["about"]["val_loss"] for step, path in saved_steps(tmp_path / name).items()}
        ends.append((losses, kept))
    assert ends[0] == ends[1] and list(ends[0][1]) == [5, 8]


@pytest.mark.long
def test_stopped_anywhere_it_ends_the_same():
    """On two ranks and one, under torchrun's agent, at random moments."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "tests/stops.py", "--trials", "40"], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert finished.returncode == 0 and "0 failures" in finished.stdout, finished.stdout + finished.stderr


def test_an_error_is_the_outcome(tmp_path, uneven_data):
    class Broken(Hooks):
        def on_micro_batch(self, *_):
            raise RuntimeError("something broke")

    options = [*uneven_data.split(), *OPTIONS.split()[2:], "100", "--job.dump_folder", str(tmp_path)]
    with pytest.raises(RuntimeError):
        try:
            Trainer(load_config(options), Broken()).train()
        finally:
            leave_world()
    assert outcome(tmp_path)["outcome"] == "failed" and outcome(tmp_path)["reason"] == "rank 0: something broke"
    with pytest.raises(UserError):
        Trainer(load_config([*options, "--checkpoint.initial_load_path", str(tmp_path)]))
    leave_world()
    assert outcome(tmp_path)["outcome"] == "failed" and "must be a Hugging Face folder" in outcome(tmp_path)["reason"]


@pytest.mark.parametrize("place", ["read_inputs", "build_model", "RunState", "Watchdog", "validate", "StepTraces"])
def test_what_fails_half_way_closes_what_it_opened(tmp_path, uneven_data, monkeypatch, place):
    def fail(*_, **__):
        raise RuntimeError(f"{place} broke")

    monkeypatch.setattr(f"tidar.training.trainer.{place}", fail)
    options = [*uneven_data.split(), "--training.seq_len", "16", "--validation.share", "0.2", "--training.gc_freq", "1"]
    options += ["--training.steps", "1", "--job.dump_folder", str(tmp_path), "--checkpoint.async_mode", "async"]
    with pytest.raises(RuntimeError, match=f"{place} broke"):
        try:
            Trainer(load_config(options)).train()
        finally:
            leave_world()
    assert outcome(tmp_path)["outcome"] == "failed" and outcome(tmp_path)["reason"] == f"rank 0: {place} broke"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and gc.isenabled() and not gc.get_freeze_count()
    assert {thread.name for thread in threading.enumerate()} & {"signals", "watchdog", "checkpoint"} == set()
    files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not any(file.startswith(str(tmp_path)) for file in files)
