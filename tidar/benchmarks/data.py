"""Measures the data pipeline: python -m tidar.benchmarks.data [--documents N] [--ckpt_files N] [--folder DIR]

Starts training's data side on a prepared folder of N documents, made without tokenising, up to the first batch of an
epoch in random order; and prepares N files of data.source = gumiho, each with a sparse hidden state of 6 MB.
Prints a line for each with the time and the peak of memory. The folder takes 14 GB for 100 million documents.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tidar.config import ArgumentParser, load_config, user_errors_exit
from tidar.data import TrainingOrder, load_data, make_loader, make_rows
from tidar.data.corpus import checksum
from tidar.patterns import get_pattern


def peak_memory() -> str:
    """Most memory that this process has held: all of it, and what is its own and not a mapped file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, own = (int(status[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon"))
    return f"peak {peak:.2f} GiB with mapped files, {own:.2f} GiB of its own at the end"


def make_prepared_folder(folder: Path, n_documents: int) -> None:
    """Documents of 1 to some thousand tokens, 64 on average, each a piece of one repeated text."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    text = random.integers(0, 1000, 2**20).astype(np.uint16)
    n_tokens, counts = 0, np.zeros(1000, np.int64)
    with open(folder / "offsets.bin", "wb") as offsets, open(folder / "tokens.bin", "wb") as tokens:
        offsets.write(np.zeros(1, np.int64).tobytes())
        for first in range(0, n_documents, 2**20):
            n = min(2**20, n_documents - first)
            lengths = np.clip(random.lognormal(3.5, 1.1, n), 1, 8000).astype(np.int64)
            offsets.write((n_tokens + np.cumsum(lengths)).tobytes())
            total = int(lengths.sum())
            n_tokens += total
            repeats = -(-total // len(text))
            piece = np.tile(text, repeats)[:total]
            piece.tofile(tokens)
            counts += np.bincount(piece, minlength=1000)
    counts.tofile(folder / "counts.bin")
    meta = {
        "source": "text",
        "tokenizer": None,
        "dtype": "uint16",
        "documents": n_documents,
        "tokens": n_tokens,
        "target_tokens": n_tokens,
        "smallest_id": int(np.flatnonzero(counts)[0]),
        "largest_id": len(counts) - 1,
        "dropped": 0,
        "bad_documents": 0,
        "dropped_reasons": {},
        "paths": [{"path": "repeated text", "documents": n_documents}],
        "sha256": {name: checksum(np.memmap(folder / f"{name}.bin")) for name in ("tokens", "offsets", "counts")},
        "plan": {},
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def start(folder: Path) -> str:
    """Data, rows and order of a run on a prepared folder, to its first batch. Runs in a process of its own."""
    started = time.perf_counter()
    config = load_config(["--data.source", "prepared", "--data.paths", str(folder), "--training.seq_len", "2048"])
    training, held_out = make_rows(config, load_data(config, None))
    order = TrainingOrder(len(training), 0, 0, 8, 0, 1)
    pattern = get_pattern("tidar", block_size=8, mask_token_id=1000)
    next(iter(make_loader(training, order, pattern, seed=0, num_workers=1, pin_memory=False)))
    padding = 1 - training.n_tokens / len(training) / 2048
    return (
        f"{training.n_documents:,} documents in {len(training):,} rows of 2048 ({padding:.3%} padding), "
        f"{len(held_out):,} held out: first batch after {time.perf_counter() - started:.1f} s, {peak_memory()}"
    )


def make_ckpt_files(folder: Path, n_files: int) -> None:
    """Files of torch.save with tokens and a hidden state of 6 MB that takes no room on the disk."""
    folder.mkdir(parents=True)
    model = folder / "first.ckpt"
    tokens = torch.arange(512)
    hidden_state = torch.zeros(3 * 2**20, dtype=torch.bfloat16)
    torch.save({"hidden_state": hidden_state, "input_ids": tokens, "loss_mask": torch.ones(512)}, model)
    content = model.read_bytes()
    zeros = content.index(bytes(4096))
    end = content.rindex(bytes(4096)) + 4096
    for number in range(n_files):
        with open(folder / f"{number:06}.ckpt", "wb") as file:
            file.write(content[:zeros])
            file.seek(end)
            file.write(content[end:])
    model.unlink()


def prepare_ckpt_files(folder: Path, output: Path) -> str:
    """Prepares them in this process and reads each document. Runs in a process of its own."""
    started = time.perf_counter()
    options = ["--data.source", "gumiho", "--data.paths", str(folder), "--job.dump_folder", str(output)]
    data = load_data(load_config(options), None)
    (corpus,) = data.training
    n_tokens = sum(len(corpus.read(int(start), 512)[0]) for start in corpus.offsets[:-1])
    held = sum(file.stat().st_size for file in folder.iterdir()) / 2**30
    return (
        f"{len(corpus):,} files of {held:.1f} GiB with their hidden states: {n_tokens:,} tokens prepared and read "
        f"in {time.perf_counter() - started:.1f} s, {peak_memory()}"
    )


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.data", description=__doc__.split("\n\n")[1])
    parser.add_argument("--documents", type=int, default=0, help="documents of the prepared folder")
    parser.add_argument("--ckpt_files", type=int, default=0, help="files with hidden states")
    parser.add_argument("--folder", type=Path, default=None, help="where to make them; removed at the end")
    parser.add_argument("--run", nargs="+", help="a step of the above, in a process of its own")
    with user_errors_exit():
        arguments = parser.parse_args()
        if arguments.run:
            step, *paths = arguments.run
            steps: dict[str, Callable] = {"start": start, "prepare": prepare_ckpt_files}
            print(steps[step](*map(Path, paths)), flush=True)
            return
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            command = [sys.executable, "-m", "tidar.benchmarks.data", "--run"]
            if arguments.documents:
                make_prepared_folder(folder / "prepared", arguments.documents)
                subprocess.run([*command, "start", str(folder / "prepared")], check=True)
            if arguments.ckpt_files:
                make_ckpt_files(folder / "files", arguments.ckpt_files)
                subprocess.run([*command, "prepare", str(folder / "files"), str(folder / "run")], check=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
