"""Checkpoints that are not whole do not count, and old ones go only when a newer one is whole."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from results import batch_losses, read_metrics

from tidar.config import UserError, load_config
from tidar.distributed import leave_world
from tidar.export import export, list_checkpoints
from tidar.training.checkpoint.manifest import read_manifest
from tidar.training.trainer import Trainer

TINY = "--training.seq_len 16 --training.local_batch_size 2 --metrics.log_freq 1 --validation.enable false".split()


@pytest.fixture
def train(uneven_data):
    """Makes a trainer with these options, and trains unless told otherwise."""

    def run(folder: Path, *options: str, trains: bool = True) -> Trainer:
        trainer = Trainer(load_config(["--job.dump_folder", str(folder), *TINY, *uneven_data.split(), *options]))
        if trains:
            trainer.train()
        return trainer

    yield run
    leave_world()


def damages(path: Path):
    """Each way in which a file may be damaged, done one after the other."""
    content = path.read_bytes()
    first, last = bytes([content[0] ^ 1]) + content[1:], content[:-1] + bytes([content[-1] ^ 1])
    for new in (content[: len(content) // 2], b"", first, last, None):
        if new is None:
            path.unlink()
        else:
            path.write_bytes(new)
        yield
        path.write_bytes(content)


def test_the_newest_whole_checkpoint_counts(tmp_path, train):
    """Every file of the newest is truncated, emptied, altered at both ends and deleted, in turn."""
    train(tmp_path, "--training.steps", "4", "--checkpoint.interval", "2")
    leave_world()
    expected = batch_losses(tmp_path)
    trainer = train(tmp_path, "--training.steps", "4", "--checkpoint.interval", "2", trains=False)
    newest, before = tmp_path / "checkpoint" / "step-4", tmp_path / "checkpoint" / "step-2"
    warnings: list[str] = []
    trainer.checkpointer.log = warnings.append
    assert trainer.checkpointer.newest() == newest and not warnings
    files = [path for path in newest.rglob("*") if path.is_file()]
    names = {path.relative_to(newest).as_posix() for path in files}
    assert {".metadata", "__0_0.distcp", "huggingface/config.json", "manifest.json"} <= names
    for path in files:
        for _ in damages(path):
            assert trainer.checkpointer.newest() == before, path
            assert warnings.pop().startswith(f"warning: {newest} is not whole, and left out: ") and not warnings
    assert trainer.checkpointer.newest() == newest
    # killed while it was written again: the name was taken from the old one, and not given to the new one yet
    newest.rename(newest.with_name("step-4.replaced"))
    assert trainer.checkpointer.newest() == newest and not warnings
    leave_world()
    next(damages(newest / "__0_0.distcp"))
    for act in (
        lambda: export(newest, tmp_path / "out", torch.float32),
        lambda: train(tmp_path / "new", "--training.steps", "1", "--checkpoint.initial_load_path", str(newest)),
    ):
        with pytest.raises(UserError, match="step-4: is not whole: __0_0.distcp has"):
            act()
        leave_world()
    first, second = list_checkpoints(tmp_path)
    holds = r"model 1,624,384 float32  optimizer 3,248,768 float32  random state of 1 rank"
    assert re.fullmatch(rf"step +2 +0\.\d+ GiB  whole  \d{{4}}-.*  4 samples  \d+ tokens  {holds}", first), first
    assert re.fullmatch(rf"step +4 .* GiB  NOT WHOLE: __0_0.distcp has \d+ bytes, not .*  {holds}", second), second
    train(tmp_path, "--training.steps", "4", "--checkpoint.interval", "2")
    assert batch_losses(tmp_path) == expected and read_manifest(newest)["about"]["step"] == 4


def test_what_is_kept(tmp_path, train):
    """The newest two, each fourth, and the one with the lowest validation loss; half removed ones are cleared away."""
    options = "--validation.enable true --validation.freq 1 --validation.steps 1 --validation.share 0.2"
    options += " --checkpoint.interval 1 --checkpoint.keep_latest_k 2 --checkpoint.keep_every_n_steps 4"
    options += " --checkpoint.save_best --training.steps 9 --optimizer.lr 0.05 --lr_scheduler.warmup_steps 0"
    for name in ("step-3.partial", "step-1.removed"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    train(tmp_path, *options.split())
    lines = read_metrics(tmp_path)
    by_loss = sorted((line["val/loss"], line["step"]) for line in lines if "val/loss" in line)
    assert len(by_loss) == 9
    kept = {4, 8, 9, by_loss[0][1]}
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {f"step-{step}" for step in kept}


def test_a_folder_is_one_runs(tmp_path, train):
    train(tmp_path, "--training.steps", "1")
    leave_world()
    written = (tmp_path / "metrics.jsonl").read_text()
    hold = "import sys; from pathlib import Path; from tidar.training.run_lock import RunLock; "
    hold += "lock = RunLock(Path(sys.argv[1])); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(
        UserError, match=f"another run is in it, process {holder.pid} on .*; wait for its end, or choose another"
    ):
        train(tmp_path, "--training.steps", "2")
    leave_world()
    holder.kill()
    holder.wait()
    assert (tmp_path / "metrics.jsonl").read_text() == written
    train(tmp_path, "--training.steps", "2")


def test_changes_are_told_and_must_be_allowed(tmp_path, train):
    train(tmp_path, "--training.steps", "2")
    leave_world()
    changed = "--training.steps 3 --tidar.block_size 4 --training.global_batch_size 6".split()
    with pytest.raises(UserError) as error:
        train(tmp_path, *changed)
    leave_world()
    assert "tidar.block_size: 8 -> 4; training.global_batch_size: 2 -> 6\n" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    trainer = train(tmp_path, *changed, "--checkpoint.allow_changes")
    assert trainer.step == 3
    leave_world()
    shutil.rmtree(tmp_path / "checkpoint" / "step-3")
    train(tmp_path, "--training.steps", "3", "--optimizer.lr", "1e-4")  # the rate may change
