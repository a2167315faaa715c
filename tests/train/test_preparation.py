"""Preparing data: killed and begun again, by one process or more; and real text, packed and found again."""

import errno
import json
import os
import random
import signal
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import faulty
import forks
import numpy as np
import pytest
import torch
from small_models import write_tokenizer

from tidar import prepare_data
from tidar.config import UserError, load_config
from tidar.data import data_tokenizer, load_data, load_tokenizer, make_rows

SHARED = Path(__file__).parents[3] / "shared"
real_text = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs GSM8K and Qwen3's tokenizer")


SMALL_PARTS = 2**18  # bytes


def prepare(output: Path, *options: str) -> BaseProcess:
    """The command, which prints to a file beside its folder."""
    arguments = ["--output", str(output), *options]
    return forks.start(faulty.prepare_small_parts, SMALL_PARTS, arguments, log=output.with_suffix(".log"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".tidar-lock"}


def test_killed_it_ends_as_if_it_had_not_been(tmp_path, call, monkeypatch):
    """SIGKILL to all its processes at three random moments, one after the other; then a call that is let be."""
    for module in ("source", "text"):
        monkeypatch.setattr(f"tidar.data.{module}.PART_BYTES", SMALL_PARTS)
    write_tokenizer(tmp_path / "tokenizer")
    rng = random.Random(0)
    file = tmp_path / "a.jsonl"
    words = ["in", "the", "beginning", "—", "thin", "\n"]
    with open(file, "w", encoding="utf-8") as lines:
        for _ in range(8_000):
            text = " ".join(rng.choices(words, k=rng.randint(0, 120)))
            lines.write(json.dumps({"text": text}) + "\n" if rng.random() < 0.99 else "no JSON\n")
    assert file.stat().st_size > 8 * SMALL_PARTS
    options = ["--data.source", "text", "--data.paths", str(file), "--data.tokenizer", str(tmp_path / "tokenizer")]
    options += ["--data.on_error", "skip", "--processes"]
    code, output, error = call(prepare_data.main, "--output", tmp_path / "whole", *options, "1")
    assert code == 0, error
    expected = content(tmp_path / "whole")
    meta = json.loads(expected["meta.json"])
    assert meta["dropped"] > 50 and f"dropped: {meta['dropped']:,} documents" in output
    out = tmp_path / "killed"
    for _ in range(3):
        process = prepare(out, *options, "1")
        wanted = len(list(out.glob(".tidar-parts/*.npz"))) + rng.randint(0, 1)
        deadline = time.time() + 60
        while len(list(out.glob(".tidar-parts/*.npz"))) < wanted or not (out / ".tidar-parts").exists():
            assert time.time() < deadline and process.is_alive()
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert not (out / "meta.json").exists()
    again = prepare(out, *options, "2")
    again.join(120)
    assert again.exitcode == 0, out.with_suffix(".log").read_text()
    assert content(out) == expected
    # nothing is left to do; and other data is not mixed in
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    assert call(prepare_data.main, "--output", tmp_path / "whole", *options, "1")[0] == 0
    code, _, error = call(prepare_data.main, "--output", out, *options, "1", "--data.text_field", "other")
    assert code == 1 and "was prepared from other inputs (options); remove it" in error
    assert len(error.splitlines()) == 1
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}


def test_workers_end_with_a_killed_parent(tmp_path, call):
    """And a folder that holds something else is not touched."""
    write_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "in the beginning " * 20}) + "\n" * 2)
    file.write_text(file.read_text() * 40_000)
    options = ["--data.source", "text", "--data.paths", str(file), "--data.tokenizer", str(tmp_path / "tokenizer")]
    process = prepare(tmp_path / "out", *options, "--processes", "2")

    def group() -> list[str]:
        found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True).stdout.splitlines()
        return [line for line in found if line.split()[1] == str(process.pid) and "Z" not in line]

    deadline = time.time() + 200
    while not list((tmp_path / "out").glob(".tidar-parts/*.npz")):
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.01)
    assert len(group()) >= 3
    process.kill()
    process.join()
    while group():
        assert time.time() < deadline
        time.sleep(0.05)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    code, _, error = call(prepare_data.main, "--output", tmp_path / "mine", *options)
    assert code == 1 and "holds thesis.txt: must be empty" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content, dropped", [("", 0), ('{"text": ""}\n', 1)])
def test_nothing_to_train_on_is_an_error(tmp_path, call, content, dropped):
    (tmp_path / "a.jsonl").write_text(content)
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", tmp_path / "a.jsonl"]
    code, output, error = call(prepare_data.main, "--output", tmp_path / "out", *options)
    assert code == 1 and ("dropped: 1 documents" in output) == bool(dropped)
    assert error == f"error: data.paths = {tmp_path / 'a.jsonl'}: hold no documents to train on\n"


def test_a_file_system_without_locks_costs_one_warning(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr("fcntl.lockf", fail)
    (tmp_path / "a.txt").write_text("in the beginning")
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "a.txt")]
    config = load_config([*options, "--job.dump_folder", str(tmp_path / "run")])
    data = load_data(config, load_tokenizer("bytes"))
    assert data.training[0].tokens.tolist() == [*b"in the beginning", 256]
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot be locked" in line and "waits" not in line


def test_a_run_prepares_its_data_again_until_a_checkpoint_is_saved(tmp_path):
    """And later only where changes are allowed."""
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--job.dump_folder", str(tmp_path / "run")]

    def load(name: str, text: str, *more: str) -> bytes:
        (tmp_path / name).write_text(text)
        data = load_data(load_config([*options, "--data.paths", str(tmp_path / name), *more]), load_tokenizer("bytes"))
        return bytes(token for token in data.training[0].tokens.tolist() if token < 256)

    with pytest.raises(UserError, match="holds no documents to train on"):
        load("empty.txt", "")
    assert load("a.txt", "in the beginning") == b"in the beginning"
    (tmp_path / "run" / "checkpoint" / "step-1").mkdir(parents=True)
    assert load("a.txt", "in the beginning", "--checkpoint.allow_changes") == b"in the beginning"
    with pytest.raises(UserError, match=r"was prepared from other inputs \(paths, files\); remove it"):
        load("b.txt", "and then")
    assert load("b.txt", "and then", "--checkpoint.allow_changes") == b"and then"


def test_prepared_folders_of_two_tokenizers_do_not_train_together(tmp_path, call):
    (tmp_path / "a.txt").write_text("in the beginning")
    write_tokenizer(tmp_path / "words")
    folders = []
    for tokenizer in ("bytes", str(tmp_path / "words")):
        folders.append(str(tmp_path / f"out{len(folders)}"))
        options = ["--data.source", "text", "--data.tokenizer", tokenizer, "--data.paths", tmp_path / "a.txt"]
        assert call(prepare_data.main, "--output", folders[-1], *options)[0] == 0
    for places in (["--data.paths", *folders], ["--data.paths", folders[0], "--validation.paths", folders[1]]):
        config = load_config(["--data.source", "prepared", *places])
        with pytest.raises(UserError, match=r"out1: was prepared .* that of .*out0 is bytes \(257 ids\): prepare it"):
            load_data(config, None)


def test_a_lock_that_is_a_folder_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("in the beginning")
    (tmp_path / "run" / "data" / "training" / ".tidar-lock").mkdir(parents=True)
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "a.txt")]
    config = load_config([*options, "--job.dump_folder", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r".tidar-lock: must be a regular file[^\n]*$"):
        load_data(config, load_tokenizer("bytes"))


@pytest.mark.parametrize("limit", [10**5, 11 * 10**6])
def test_a_disk_that_is_full_while_training_prepares(limit, tmp_path):
    """While a part is written, and while the parts are joined: one line, a failed run, no partial file."""
    (tmp_path / "in").mkdir()
    for number in range(14):
        (tmp_path / "in" / f"{number}.txt").write_text("in the beginning " * 30_000)
    run = tmp_path / "run"
    options = ["--job.dump_folder", str(run), "--model.name", "debug"]
    options += ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "in")]
    code, output = forks.call(faulty.train_on_full_disk, limit, options, log=tmp_path / "log")
    folder = run / "data" / "training"
    assert code, output
    errors = [line for line in output.splitlines() if line.startswith(("error", "Traceback"))]
    assert errors == [f"error: {folder}: the prepared data cannot be written (File too large)"], output
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "failed"
    assert not list(run.rglob("*partial*")) and not (folder / "meta.json").exists()
    assert bool(list(folder.glob(".tidar-parts/*.npz"))) == (limit > 10**6)  # finished parts are kept


@real_text
@pytest.mark.parametrize("source", ["text", "chat"])
def test_gsm8k_is_found_again(source, tmp_path):
    """Packed at 2048: at least 97 % of positions are tokens, and every document is there, whole and unchanged."""
    records = (SHARED / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:1500]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(records), encoding="utf-8")
    options = ["--data.source", source, "--data.paths", str(file), "--data.text_field", "question"]
    options += ["--data.tokenizer", str(SHARED / "tokenizers" / "qwen3"), "--validation.enable", "false"]
    config = load_config([*options, "--training.seq_len", "2048", "--job.dump_folder", str(tmp_path)])
    data = load_data(config, data_tokenizer(config.data, load_tokenizer(config.data.tokenizer)))
    rows, _ = make_rows(config, data)
    backend = load_tokenizer(config.data.tokenizer).backend
    found = []
    for row in range(len(rows)):
        tokens, ids, mask = rows[row]
        for number in range(int(ids.max()) + 1):
            found.append((tuple(tokens[ids == number].tolist()), mask[ids == number].tolist()))
    records = list(map(json.loads, records))
    share = rows.n_tokens / (len(rows) * 2048)
    print(
        f"{source}: {len(records):,} documents, {rows.n_tokens:,} tokens, {len(rows):,} rows, padding {1 - share:.3%}"
    )
    assert len(found) == len(records) == 1500 and share >= 0.97
    by_tokens = dict(found)
    for record in records:
        if source == "text":
            ids = tuple(backend(record["question"], add_special_tokens=False)["input_ids"] + [151643])
            assert all(by_tokens[ids])
        else:
            head = f"<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            pieces = [backend(text)["input_ids"] for text in (head, record["answer"] + "<|im_end|>", "\n")]
            ids = tuple(sum(pieces, []))
            assert by_tokens[ids] == [float(number == 1) for number, piece in enumerate(pieces) for _ in piece]


def test_a_step_sees_targets_only(tmp_path):
    """From a chat on disk to the trainer's targets: both losses score what the assistant says, and nothing else."""
    write_tokenizer(tmp_path / "tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "in the", "response": "beginning"}) + "\n")
    options = ["--data.source", "chat", "--data.paths", str(tmp_path / "a.jsonl"), "--validation.enable", "false"]
    options += ["--data.tokenizer", str(tmp_path / "tokenizer"), "--training.seq_len", "64"]
    config = load_config([*options, "--job.dump_folder", str(tmp_path / "run")])
    tokenizer = load_tokenizer(config.data.tokenizer)
    rows, _ = make_rows(config, load_data(config, tokenizer))
    tokens, ids, mask = (part[None] for part in rows[0])
    from tidar.patterns import get_pattern

    batch = get_pattern("tidar", block_size=4, mask_token_id=263).layout(tokens, ids, mask)
    for targets in batch.targets.values():
        assert tokenizer.backend.decode(targets.labels) == "beginning<|im_end|>"
    assert torch.equal(batch.input_ids[0, batch.targets["ar"].index + 1], batch.targets["ar"].labels)
    assert np.all(mask.numpy()[ids.numpy() < 0] == 0)
