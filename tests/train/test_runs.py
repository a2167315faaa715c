"""Whole runs: real processes, real files."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import faulty
import forks
import pytest
import torch
from results import read_metrics
from runs import train_run

from tidar import check
from tidar.config import UserError, load_config
from tidar.distributed import leave_world
from tidar.kernels import Kernels
from tidar.losses.sums import LossSums
from tidar.training.compile_ahead import Compiler, Work
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = "--training.seq_len 32 --training.local_batch_size 2 --metrics.log_freq 1 --data.num_workers 0".split()


def train_here(folder: Path, *options: str, hooks: Hooks | None = None) -> Trainer:
    return train_run(["--job.dump_folder", str(folder), *TINY, *options], hooks)


def metrics(folder: Path, *names: str) -> list[dict]:
    lines = read_metrics(folder)
    return [{name: line[name] for name in ("step", *names)} for line in lines if all(name in line for name in names)]


def results(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what is not repeatable."""
    lines = read_metrics(folder)
    return [{key: v for key, v in line.items() if not key.startswith(("perf/", "memory/"))} for line in lines]


def test_stopped_after_any_step_it_repeats_bit_for_bit(tmp_path, small_model):
    options = f"{small_model} --validation.share 0.17 --training.steps 6 --training.global_batch_size 4".split()
    options += "--checkpoint.interval 1 --validation.freq 3".split()
    train_here(tmp_path / "whole", *options, "--validation.steps", "2")
    expected = results(tmp_path / "whole")
    assert [line["step"] for line in expected] == [1, 2, 3, 3, 4, 5, 6, 6]
    for step in range(1, 6):
        folder = tmp_path / f"stopped-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        for later in range(step + 1, 7):
            shutil.rmtree(folder / "checkpoint" / f"step-{later}")
        train_here(folder, *options, "--validation.steps", "2")
        assert results(folder) == expected
    again = train_here(tmp_path / "whole", *options)
    assert again.step == 6 and results(tmp_path / "whole") == expected


def test_a_killed_run_resumes(tmp_path, capsys, uneven_data):
    options = [
        *uneven_data.split(),
        "--training.steps",
        "24",
        "--checkpoint.interval",
        "3",
        "--validation.enable",
        "false",
    ]
    killed = [*TINY, *options, "--job.dump_folder", str(tmp_path / "killed")]
    process = forks.start(faulty.train_with, "none", killed, log=tmp_path / "log")
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "checkpoint" / "step-6").exists():
        assert process.is_alive() and time.time() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    train_here(tmp_path / "killed", *options)
    assert "resumed from step " in capsys.readouterr().out
    train_here(tmp_path / "whole", *options)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


class KilledInValidation(Hooks):
    def on_micro_batch(self, trainer, rows, loss, scores):
        if not torch.is_grad_enabled():
            raise KeyboardInterrupt
        return loss


def test_killed_in_its_last_validation_it_validates_again(tmp_path, small_model):
    options = [*small_model.split(), "--training.steps", "4", "--checkpoint.interval", "3", "--validation.steps", "2"]
    options += ["--validation.share", "0.17"]
    with pytest.raises(KeyboardInterrupt):
        train_here(tmp_path / "killed", *options, hooks=KilledInValidation())
    train_here(tmp_path / "killed", *options)
    train_here(tmp_path / "whole", *options)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_run_learns_and_writes_what_it_says(tmp_path, smaller_debug):
    """Both losses fall, a draft gets worse with its place in the block, and the resolved options train again."""
    options = "--training.seq_len 128 --training.local_batch_size 8 --training.steps 80 --optimizer.lr 6e-3".split()
    options += "--lr_scheduler.warmup_steps 5 --metrics.log_freq 20 --validation.steps 10".split()
    options += "--checkpoint.interval 100".split()
    train_here(tmp_path, *options)
    (validation,) = [line for line in results(tmp_path) if "val/loss" in line]
    # untrained: 5.6; without any context: 3.26
    assert validation["val/ar_loss"] < 3.2 and validation["val/diffusion_loss"] < 3.35
    by_place = [validation[f"val/diffusion_loss_at/{place}"] for place in range(8)]
    assert by_place[0] < by_place[7] and sum(by_place[:4]) < sum(by_place[4:])
    assert 0 < validation["val/accepted_prefix"] < 8 and 0 < validation["val/accuracy_diff_at/7"] < 1
    logged = read_metrics(tmp_path)[0]
    assert {
        "train/batch_loss", "train/batch_ar_loss", "train/batch_diffusion_loss", "train/batch_accuracy",
        "train/batch_accuracy_diff", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/tflops",
        "perf/data_wait_fraction", "memory/peak_gib",
    } < logged.keys()  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "tb",
        "checkpoint",
        "data",
        ".lock",
        "outcome.json",
    }
    again = train_here(tmp_path / "again", "--job.config_file", str(tmp_path / "config.toml"), "--training.steps", "1")
    assert again.config.optimizer.lr == 6e-3


class Recorded(Hooks):
    """Keeps the sums of each micro-batch."""

    def __init__(self):
        self.sums = []

    def on_micro_batch(self, trainer, rows, loss, scores):
        if torch.is_grad_enabled():
            self.sums.append(LossSums.of(rows.targets, scores).values)
        return loss


def test_epochs_are_reported(tmp_path, small_model):
    """Means over the target tokens of the epoch's steps, whatever a restart in its middle."""
    options = f"{small_model} --validation.share 0.17 --training.steps 20 --checkpoint.interval 4".split()
    options += "--training.global_batch_size 40 --training.local_batch_size 20".split()
    trainer = train_here(tmp_path, *options, hooks=Recorded())
    names = ["train/epoch_loss", "train/epoch_ar_loss", "train/epoch_diffusion_loss"]
    epochs = metrics(tmp_path, *names)
    n_rows = len(trainer.batches.training_rows)
    assert [epoch["step"] for epoch in epochs] == [-(-n_rows // 40), -(-2 * n_rows // 40)]
    weights, nll, _ = sum(trainer.hooks.sums[: 2 * epochs[0]["step"]])
    ar_loss, diffusion_loss = (nll / weights).tolist()
    means = dict(zip(names, [(ar_loss + diffusion_loss) / 2, ar_loss, diffusion_loss]))
    assert epochs[0] == pytest.approx({"step": epochs[0]["step"]} | means, rel=1e-12)
    for step in (12, 16, 20):
        shutil.rmtree(tmp_path / "checkpoint" / f"step-{step}")
    train_here(tmp_path, *options)
    assert metrics(tmp_path, *names) == epochs


def test_epochs_count_samples_and_not_steps(tmp_path, small_model):
    """One and a half passes over the data, the first half of them with smaller steps."""
    options = [*small_model.split(), "--validation.enable", "false", "--training.local_batch_size", "20"]
    options += ["--training.global_batch_size"]
    first = train_here(tmp_path, *options, "20", "--training.epochs", "0.5")
    n_rows = len(first.batches.training_rows)
    assert first.step == -(-n_rows // 40)
    second = train_here(tmp_path, *options, "60", "--training.epochs", "1.5", "--checkpoint.allow_changes")
    samples = second.progress.samples
    assert samples == 20 * first.step + 60 * (second.step - first.step)
    assert 1.5 * n_rows <= samples < 1.5 * n_rows + 60


def test_bfloat16_follows_float32(tmp_path, uneven_data):
    losses = {}
    for name in ("float32", "bfloat16"):
        options = f"{uneven_data} --validation.share 0.17 --validation.steps 1 --training.steps 3".split()
        options += ["--training.mixed_precision_param", name]
        train_here(tmp_path / name, *options, "--training.gc_freq", "2")
        losses[name] = [line["train/batch_loss"] for line in metrics(tmp_path / name, "train/batch_loss")]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)


def test_two_runs_are_not_mixed_in_one_folder(tmp_path, small_model):
    options = [*small_model.split(), "--training.steps", "1", "--validation.enable", "false"]
    train_here(tmp_path, *options)
    written = (tmp_path / "metrics.jsonl").read_text(), (tmp_path / "config.toml").read_text()
    for change, words in (
        (["--checkpoint.enable", "false"], "checkpoint.enable = false: .* holds the checkpoints of another run"),
        (["--training.steps", "2", "--training.seq_len", "16"], "training.seq_len: 32 -> 16; rows of data: "),
        (["--training.steps", "2", "--validation.enable", "true"], "validation.enable: False -> True; rows of data: "),
        (["--training.steps", "2", "--training.seed", "7"], "training.seed: 0 -> 7; data, or options of packing"),
    ):
        with pytest.raises(UserError, match=words):
            train_here(tmp_path, *options, *change)
    assert written == ((tmp_path / "metrics.jsonl").read_text(), (tmp_path / "config.toml").read_text())


BAD_RUNS = {
    ("NGPU=two",): "NGPU = two: must be integer >= 1",
    ("LOG_RANK=1",): "LOG_RANK = 1: must be ranks from 0 to 0",
    ("NNODES=2", "MASTER_ADDR=localhost"): "NODE_RANK: must be this node's number where NNODES = 2",
    ("NNODES=2", "NODE_RANK=1"): "MASTER_ADDR: must be the address of node 0 where NNODES = 2",
    ("NNODES=2", "MASTER_ADDR=localhost", "NODE_RANK=2"): "NODE_RANK = 2: must be integer from 0 to 1",
    ("NGPU=3", "--training.global_batch_size", "16"): "must be a multiple of 24",
    ("--data.paths", "{empty}"): "holds no .py file",
    ("--data.paths", "{empty}/none"): "none: does not exist",
    ("--job.dump_folder", "/proc/run"): "job.dump_folder = /proc/run: cannot be written",
    ("--model.attention_backend", "flex"): "has no backward pass without CUDA",
}


def test_bad_runs_are_refused_in_two_lines(tmp_path, call, monkeypatch):
    for number, arguments in enumerate(BAD_RUNS):
        words = ["--job.dump_folder", str(tmp_path / "runs" / str(number))]
        words += [word.format(empty=tmp_path) for word in arguments]
        with monkeypatch.context() as patch:
            for variable in ("NGPU=1", *(word for word in words if word[0].isupper())):
                patch.setenv(*variable.split("="))
            code, output, error = call(check.main, *(word for word in words if not word[0].isupper()))
        assert code == 1 and not output, arguments
        assert BAD_RUNS[arguments] in error and len(error.splitlines()) <= 2


def test_the_launcher_passes_a_refusal_on(tmp_path, call):
    """What the check prints and no more, and starts nothing."""
    code, _, error = call(check.main, "--job.config_file", "/no/such.toml")
    assert code == 1 and "job.config_file = /no/such.toml: cannot be read" in error and len(error.splitlines()) <= 2
    # an interpreter that is asked where the environment is, and then to check
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n*environment.py) echo "$0" ;;\n"-m tidar.check --job.config_file /no/such.toml") '
        "echo refused >&2; exit 1 ;;\n*) echo started ;;\nesac\n"
    )
    python.chmod(0o755)
    command = ["env", f"PYTHON={python}", "CONFIG_FILE=/no/such.toml", "./run_train.sh"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", "refused\n")


def test_a_run_continues_where_nothing_was_compiled_ahead(tmp_path, capsys, small_model):
    """It is told that the process which should have done so has failed."""
    options = f"{small_model} --training.steps 2 --validation.enable false --checkpoint.enable false".split()
    trainer = Trainer(load_config(["--job.dump_folder", str(tmp_path), *TINY, *options]))
    try:
        trainer.compiler = Compiler(Work(None, torch.float32, 1, 1, Kernels(fused_matmul=True), 132, (9, 0)))
        assert trainer.compiler.process.wait(timeout=60) == 1
        trainer.train()
    finally:
        leave_world()
    output = capsys.readouterr().out
    assert re.search(
        "warning: step 1 was slow because its kernels were not compiled ahead: \\w+Error.*\nstep 2/2", output
    )


def test_what_a_run_sets_for_its_process_ends_with_it(tmp_path, small_model):
    """So the next run of the process has its own kernels: not all of them are deterministic."""

    class Seen(Hooks):
        def after_step(self, trainer):
            seen.append(modes())

    def modes() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch._inductor.config.deterministic

    seen: list[tuple[bool, bool]] = []
    options = f"{small_model} --training.steps 1 --validation.enable false --checkpoint.enable false".split()
    for given in (["--training.deterministic"], []):
        train_here(tmp_path / str(len(seen)), *options, *given, hooks=Seen())
    assert [is_on for is_on, _ in seen] == [True, False] and seen[1] == modes() == (False, False)
