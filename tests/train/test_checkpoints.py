"""Checkpoints that are not whole do not count, and old ones go only when a newer one is whole."""

import json
import pickle
import re
import shutil
import time
from pathlib import Path

import faulty
import forks
import pytest
import torch
from results import batch_losses, read_metrics
from small_models import make_model
from torch.distributed.checkpoint.metadata import MetadataIndex

from tidar.config import UserError, load_config
from tidar.distributed import leave_world
from tidar.export import export, list_checkpoints
from tidar.models import from_pretrained
from tidar.models.huggingface.manifest import read_manifest, saved_steps
from tidar.training.checkpoint.manifest import describe, file_names, write_manifest
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
            assert warnings.pop().startswith(f"warning: {newest} is not whole and is skipped: ") and not warnings
    assert trainer.checkpointer.newest() == newest
    # killed while it was written again: the name was taken from the old one, and not given to the new one yet
    newest.rename(newest.with_name("step-4.replaced"))
    assert trainer.checkpointer.newest() == newest and not warnings
    leave_world()
    next(damages(newest / "__0_0.distcp"))
    for act in (
        lambda: export(newest, tmp_path / "out", torch.float32),
        lambda: train(tmp_path / "new", "--training.steps", "1", "--checkpoint.initial_load_path", str(newest)),
        lambda: from_pretrained(newest),
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
    log = tmp_path / "log"
    holder = forks.start(faulty.hold_folder, tmp_path, log=log)
    while not log.exists() or not log.read_text():
        assert holder.is_alive()
        time.sleep(0.01)
    with pytest.raises(
        UserError, match=f"another run is in it, process {holder.pid} on .*; wait for its end, or choose another"
    ):
        train(tmp_path, "--training.steps", "2")
    leave_world()
    holder.kill()
    holder.join()
    assert (tmp_path / "metrics.jsonl").read_text() == written
    train(tmp_path, "--training.steps", "2")


def test_where_no_checkpoint_is_whole_nothing_is_replaced(tmp_path, train):
    train(tmp_path, "--training.steps", "4", "--checkpoint.interval", "2")
    leave_world()
    for step in (2, 4):
        next(damages(tmp_path / "checkpoint" / f"step-{step}" / "__0_0.distcp"))

    def contents():
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in (".lock", "outcome.json")]
        return {path: path.read_bytes() for path in files}

    before = contents()
    with pytest.raises(UserError, match=r"none of its checkpoints is whole: step-4 \(.*\), step-2 \(.*\)\nremove them"):
        train(tmp_path, "--training.steps", "6")
    assert contents() == before


def test_names_that_are_no_step_are_ignored(tmp_path, train):
    for name in ("step-²", "step-007", "step-٣", "step-", "step--1", "step-1e3"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert train(tmp_path, "--training.steps", "1").step == 1
    assert list(saved_steps(tmp_path)) == [1]


def test_another_model_is_refused(tmp_path, train):
    """Whatever its config.json says otherwise, and tensors that only the checkpoint or only the run has."""
    model, run = tmp_path / "model", tmp_path / "run"
    make_model("qwen3", tie_word_embeddings=False).save_pretrained(model)
    options = json.loads((model / "config.json").read_text())
    # as older versions write it
    options = {name: value for name, value in options.items() if "rope" not in name} | {"rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps(options))
    train(run, "--model.hf_path", str(model), "--training.steps", "1")
    leave_world()
    changes = {
        "num_hidden_layers": (1, "n_layers: 2 -> 1"),
        "tie_word_embeddings": (True, "tie_embeddings: False -> True"),
        "rope_theta": (5000.0, "rope_theta: 10000.0 -> 5000.0"),
        "rms_norm_eps": (1e-5, "norm_eps: 1e-06 -> 1e-05"),
        "initializer_range": (0.5, "initializer_range: 0.02 -> 0.5"),
        "intermediate_size": (32, "hidden_dim: 64 -> 32"),
        "vocab_size": (320, "vocab_size: 300 -> 320"),
    }
    for name, (value, words) in changes.items():
        (model / "config.json").write_text(json.dumps(options | {name: value}))
        with pytest.raises(UserError, match=f"another model: {re.escape(words)}\nresume with the same"):
            train(run, "--model.hf_path", str(model), "--training.steps", "2")
        leave_world()
    (model / "config.json").write_text(json.dumps(options))
    step = run / "checkpoint" / "step-1"
    honest = (step / ".metadata").read_bytes()
    for name in ("model.norm.weight", "optimizer.norm.weight.exp_avg"):
        for words in ("misses", "has"):
            metadata = pickle.loads(honest)
            if words == "misses":
                del metadata.state_dict_metadata[name]
            else:
                metadata.state_dict_metadata[f"{name}.more"] = metadata.state_dict_metadata[name]
                stored = {i: info for i, info in metadata.storage_data.items() if i.fqn == name}
                metadata.storage_data |= {MetadataIndex(f"{name}.more", i.offset): info for i, info in stored.items()}
            (step / ".metadata").write_bytes(pickle.dumps(metadata))
            write_manifest(step, describe(step, file_names(step)), {"step": 1})
            with pytest.raises(UserError, match=f"step-1: {words} the tensor {name}"):
                train(run, "--model.hf_path", str(model), "--training.steps", "2")
            leave_world()
            if name.startswith("model."):
                with pytest.raises(UserError, match=f"{words} the tensor {name}"):
                    from_pretrained(step)


def test_links_in_a_run_folder_are_not_followed(tmp_path, train):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious")
    written = ["config.toml", "outcome.json", "metrics.jsonl"]
    for name in [*written, "config.toml.partial", "metrics.partial", "metrics.jsonl.partial"]:
        (run / name).symlink_to(victim)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        train(run, "--training.steps", "1")
    leave_world()
    (run / "metrics.jsonl").unlink()
    train(run, "--training.steps", "1")
    leave_world()
    assert victim.read_text() == "precious" and not any((run / name).is_symlink() for name in written)
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="lock: must be a regular file"):
        train(run, "--training.steps", "1")
    leave_world()
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with pytest.raises(UserError, match="lock: must be a regular file"):
        train(run, "--training.steps", "1")
    assert victim.read_text() == "precious"


def test_a_moved_run_is_resumed_where_it_is(tmp_path, train, monkeypatch, capsys):
    """By its own config.toml, whose job.dump_folder is the old place; the rate of more steps is reported."""
    monkeypatch.chdir(tmp_path)
    train(Path("old"), "--training.steps", "2", "--lr_scheduler.warmup_steps", "1", "--optimizer.lr", "1e-3")
    leave_world()
    (tmp_path / "other").mkdir()
    Path("old").rename("other/moved")
    for file, folder in (("other/moved/config.toml", "other/moved"), (str(tmp_path / "other/moved/config.toml"), None)):
        config = load_config(["--job.config_file", file, "--training.steps", "4"])
        assert config.job.dump_folder == (folder or str(tmp_path / "other/moved"))
    trainer = Trainer(config)
    trainer.train()
    leave_world()
    assert trainer.step == 4 and not Path("old").exists()
    assert (
        "warning: the learning rate jumps from 1.00e-03 to 7.50e-04 at step 3 (steps: 2 -> 4)"
        in capsys.readouterr().out
    )
    # elsewhere a file of this name is as any other, and the command line wins
    shutil.copy("other/moved/config.toml", "config.toml")
    assert load_config(["--job.config_file", "config.toml"]).job.dump_folder == str(tmp_path / "other/moved")
    assert load_config(["--job.config_file", file, "--job.dump_folder", "new"]).job.dump_folder == "new"


def test_changes_are_listed_and_must_be_allowed(tmp_path, train):
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
