"""Weights & Biases in its offline mode: what is sent, and what a resumed run sends."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import train_run

wandb = pytest.importorskip("wandb")

OPTIONS = [
    *"--training.seq_len 32 --training.local_batch_size 2 --metrics.log_freq 1 --validation.freq 2".split(),
    *"--validation.generate_prompts 1 --validation.steps 1 --lr_scheduler.warmup_steps 0".split(),
    *"--checkpoint.interval 2 --metrics.enable_wandb true".split(),
]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, behind a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last fragment
            yield record
            record = b""


def sent(folder: Path) -> list[dict]:
    """The rows of history in all of a run's offline files, in the order of time."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


def test_a_resumed_run_is_the_same_and_repeats_no_step(tmp_path, offline):
    options = [*OPTIONS, "--job.dump_folder", str(tmp_path), "--lr_scheduler.total_steps", "4"]
    train_run([*options, "--training.steps", "3"])
    first = json.loads((tmp_path / "wandb.json").read_text())
    for path in (tmp_path / "checkpoint").glob("step-3"):  # as after a crash: step 3 is repeated
        path.rename(tmp_path / "lost")
    train_run([*options, "--training.steps", "4"])
    second = json.loads((tmp_path / "wandb.json").read_text())
    assert first["id"] == second["id"] and first["last"]["train/batch_loss"] == 3
    assert all(first["id"] in path.name for path in tmp_path.glob("wandb/offline-run-*"))
    rows = sent(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/batch_loss", "train/lr", "val/loss", "val/tokens_per_forward"):
        found = [(row["step"], row[name]) for row in rows if name in row]
        assert len(dict(found)) == len(found)
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert {step: value for step, value in found if step in expected} == pytest.approx(expected)
    assert any("val/sample" in row for row in rows)


def test_what_fails_in_wandb_ends_no_run(tmp_path, offline, monkeypatch, capsys):
    options = [*OPTIONS, "--training.steps", "1", "--job.dump_folder"]
    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    assert train_run([*options, str(tmp_path / "a")]).step == 1
    assert "continues without Weights & Biases (division by zero)" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    assert train_run([*options, str(tmp_path / "b")]).step == 1
    assert "(no API key: set WANDB_API_KEY, run wandb login" in capsys.readouterr().out
