"""Saves during training, and saves that fail."""

import errno
import gc
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import forks
import pytest
import torch
import torture
from results import read_metrics
from runs import train_run

from tidar.config import UserError
from tidar.models.huggingface.checkpoint_files import CheckpointTensors
from tidar.models.huggingface.manifest import find_problem, read_manifest, saved_steps
from tidar.training.checkpoint.checkpointer import Checkpointer
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = "--training.seq_len 16 --training.local_batch_size 2 --metrics.log_freq 1 --validation.enable false".split()


def train(folder: Path, *options: str, hooks: Hooks | None = None) -> Trainer:
    return train_run(["--job.dump_folder", str(folder), *TINY, *options], hooks)


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    tensors = CheckpointTensors(step)
    return {name: tensors.rows(name, 0, shape[0]) for name, shape in tensors.shapes.items() if shape}


def is_whole(step: Path) -> bool:
    return find_problem(step) is None


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_training_continues_while_a_checkpoint_is_written(tmp_path, uneven_data, monkeypatch, mode):
    """Every second step is saved, as it is at that step, though the writing takes longer than the steps."""
    options = [*uneven_data.split(), "--training.steps", "7", "--checkpoint.interval", "2"]
    train(tmp_path / "disabled", *options)
    write, step_writing, overlapped = Checkpointer._write, [0], []

    def slow(self, step, *rest):
        step_writing[0] = step
        time.sleep(0.3)
        files = write(self, step, *rest)
        step_writing[0] = 0
        return files

    class Watching(Hooks):
        def after_step(self, trainer):
            overlapped.append(step_writing[0])

    monkeypatch.setattr(Checkpointer, "_write", slow)
    train(tmp_path / mode, *options, "--checkpoint.async_mode", mode, hooks=Watching())
    assert {2, 4, 6} <= set(overlapped)
    for step in (2, 4, 6, 7):
        expected, found = (tensors_of(tmp_path / name / "checkpoint" / f"step-{step}") for name in ("disabled", mode))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stalls = {line["step"]: line.get("perf/save_stall_seconds") for line in read_metrics(tmp_path / mode)}
    # the second save waits for the first, which takes longer than the two steps between them
    assert stalls[2] is None and 0 < stalls[3] < 0.2 and stalls[5] > stalls[3]


def test_what_a_checkpoint_counts(tmp_path, ranks, small_model):
    """Tokens of all ranks, samples, and the time of all processes that have trained the run."""
    options = [*TINY, *small_model.split(), "--training.global_batch_size", "4", "--checkpoint.interval", "2"]
    options += ["--job.dump_folder", str(tmp_path)]
    ranks.run(2, *options, "--training.steps", "2")
    ranks.run(1, *options, "--training.steps", "4")
    first, last = (read_manifest(tmp_path / "checkpoint" / f"step-{step}")["about"] for step in (2, 4))
    assert (first["samples"], last["samples"]) == (8, 16) and (first["devices"], last["devices"]) == (2, 1)
    assert 0 < first["seconds"] < last["seconds"] < 60
    # rows of 16 are nearly full
    assert 0.9 * 8 * 16 < first["tokens"] <= 8 * 16 and 0.9 * 16 * 16 < last["tokens"] <= 16 * 16
    assert first["torch"] == torch.__version__ and last["options"]["training"]["seq_len"] == 16


@contextmanager
def file_limit(n_bytes: int):
    """Files of this process cannot grow beyond it, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk(tmp_path, uneven_data, capsys, monkeypatch, mode, on_error):
    """The save of step 4 finds no room: the run stops or goes on, and the one before is untouched."""
    options = [*uneven_data.split(), "--training.steps", "6", "--checkpoint.interval", "2"]
    options += ["--checkpoint.async_mode", mode, "--checkpoint.on_error", on_error]

    save = Checkpointer.save

    def save_on_full_disk(self, step, about):
        self.finish()
        with file_limit(1_000_000) if step == 4 else nullcontext():
            save(self, step, about)
            if self.thread and step == 4:
                self.thread.join()

    monkeypatch.setattr(Checkpointer, "save", save_on_full_disk)
    message = f"{tmp_path / 'checkpoint' / 'step-4'}: could not be saved: File too large"
    if on_error == "stop":
        with pytest.raises(UserError) as error:
            train(tmp_path, *options)
        assert str(error.value) == f"{message}\nthe newest whole one is {tmp_path / 'checkpoint' / 'step-2'}"
        assert f'"reason": "rank 0: {message}' in (tmp_path / "outcome.json").read_text()
        assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-2"]
        monkeypatch.setattr(Checkpointer, "save", save)
        train(tmp_path, *options)
    else:
        trainer = train(tmp_path, *options)
        assert f"warning: {message}" in capsys.readouterr().out and trainer.step == 6
        assert '"outcome": "finished"' in (tmp_path / "outcome.json").read_text()
    steps = saved_steps(tmp_path)
    assert list(steps) == ([2, 4, 6] if on_error == "stop" else [2, 6]) and all(map(is_whole, steps.values()))
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {path.name for path in steps.values()}


def test_the_last_save_must_be_whole(tmp_path, uneven_data):
    """The run has nothing to show for its end without it, whatever checkpoint.on_error says."""
    options = [*uneven_data.split(), "--training.steps", "2", "--checkpoint.on_error", "continue"]
    message = "step-2: could not be saved: see above\nthe run has no whole one yet"
    with pytest.raises(UserError, match=message), file_limit(1_000_000):
        train(tmp_path, *options)
    assert '"outcome": "failed"' in (tmp_path / "outcome.json").read_text()


def test_what_cannot_be_removed_stays(tmp_path, uneven_data, capsys, monkeypatch):
    def refuse(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr("tidar.training.checkpoint.retention.remove_folder", refuse)
    options = [*uneven_data.split(), "--training.steps", "3", "--checkpoint.interval", "1"]
    train(tmp_path, *options, "--checkpoint.keep_latest_k", "2")
    assert f"warning: {tmp_path / 'checkpoint' / 'step-1'}: cannot be removed (Device or" in capsys.readouterr().out
    assert list(saved_steps(tmp_path)) == [1, 2, 3] and '"finished"' in (tmp_path / "outcome.json").read_text()


def test_an_error_ends_the_process(tmp_path):
    """And the workers that prepare its batches."""
    script = "import resource, uneven; from tidar import train; "
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); train.main()"
    options = ["--data.source", "uneven", "--data.num_workers", "2", "--training.steps", "2", *TINY]
    finished = subprocess.run(
        [sys.executable, "-c", script, *options, "--job.dump_folder", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert finished.returncode == 1 and "step-2: could not be saved: File too large" in finished.stderr


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_is_full_for_one_rank(tmp_path, ranks, uneven_data, mode):
    options = [*TINY, *uneven_data.split(), "--training.steps", "4", "--checkpoint.interval", "2"]
    options += ["--checkpoint.async_mode", mode, "--job.dump_folder", str(tmp_path)]
    answers = ranks.run(2, *options, faults=[(1, 1, "disk")])
    message = "step-2: could not be saved: File too large (rank 1)\nthe run has no whole one yet"
    assert [answer["error"].split("/")[-1] for answer in answers] == [message] * 2
    assert not any((tmp_path / "checkpoint").iterdir())


def growth(tmp_path: Path, uneven_data: str, saves: int) -> None:
    """Saves after each step, and fails where memory, threads or open files grow."""
    found = []
    logging.disable()  # pytest would keep each line that DCP logs

    class Measuring(Hooks):
        def after_step(self, trainer):
            if trainer.step in (saves // 4, saves):
                trainer.checkpointer.finish()
                gc.collect()
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
                found.append((len(os.listdir("/proc/self/fd")), threading.active_count(), resident))

    options = [*uneven_data.split(), "--training.steps", str(saves), "--checkpoint.interval", "1"]
    options += ["--checkpoint.async_mode", "async", "--training.gc_freq", "10"]
    try:
        train(tmp_path, *options, hooks=Measuring())
    finally:
        logging.disable(logging.NOTSET)
    files, threads, memory = (after - before for before, after in zip(*found))
    print(f"{saves} saves: {files} files, {threads} threads, {memory / 1e6:.1f} MB more")
    assert files <= 0 and threads <= 0 and memory < 30e6


def test_saves_leave_nothing_behind(tmp_path, uneven_data):
    growth(tmp_path, uneven_data, saves=24)


@pytest.mark.long
def test_a_thousand_saves_leave_nothing_behind(tmp_path, uneven_data):
    growth(tmp_path, uneven_data, saves=1000)


HSDP = "--parallelism.data_parallel_replicate_degree 2 --parallelism.data_parallel_shard_degree 2"


def test_a_resharded_run_resumes(tmp_path, ranks, small_model):
    """Saved on 4 ranks, HSDP 2 x 2; resumed on 1, 2 and 3 with the same losses, on 4 bit for bit."""
    options = [*TINY, *small_model.split(), "--training.global_batch_size", "12", "--training.local_batch_size", "1"]
    options += ["--training.steps", "4", "--checkpoint.interval", "2", "--lr_scheduler.warmup_steps", "0"]
    whole = tmp_path / "whole"
    ranks.run(4, *options, *HSDP.split(), "--job.dump_folder", str(whole), weights=tmp_path / "whole.pt")
    expected = [line["train/batch_loss"] for line in read_metrics(whole)]
    for size in (1, 2, 3, 4):
        folder = tmp_path / str(size)
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "step-2").symlink_to(whole / "checkpoint" / "step-2")
        sharding = HSDP.split() if size == 4 else []
        ranks.run(size, *options, *sharding, "--job.dump_folder", str(folder), weights=tmp_path / f"{size}.pt")
        losses = [line["train/batch_loss"] for line in read_metrics(folder)]
        assert losses == pytest.approx(expected[2:], rel=1e-5)
        if size == 4:
            before, after = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", size))
            assert losses == expected[2:] and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_killed_anywhere_it_ends_the_same(tmp_path):
    code, output = forks.call(torture.main, ["--trials", "2"], log=tmp_path / "log", timeout=400)
    assert code == 0 and "0 failures" in output, output
