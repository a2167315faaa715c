"""Runs at fault. Most often rank 1 is, in its third step, once.

It hangs, is stopped or killed by a signal, or has an error. Two are not: "slow", where each of that step's
micro-batches takes a second more, and rank 0's export too long for the others; and "slow_commit", where a checkpoint
takes a minute to get its name.
"""

import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path

import uneven  # noqa: F401  (registers the source)

from tidar import prepare_data, train
from tidar.benchmarks import train_step
from tidar.config import UserError
from tidar.data import source, text
from tidar.models.huggingface import ModelSpec
from tidar.models.sizes import SIZES
from tidar.training import trainer
from tidar.training.checkpoint.checkpointer import Checkpointer
from tidar.training.hooks import Hooks
from tidar.training.run_lock import RunLock


class Faulty(Hooks):
    failed_at = None

    def __init__(self, fault: str):
        self.fault = fault

    def on_micro_batch(self, run, rows, loss, scores):
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if run.world.rank == 1 and run.step == 2 and first_attempt and self.fault not in ("none", "slow_commit"):
            if self.failed_at is None:
                self.failed_at = time.time()
                print(f"fault at {self.failed_at}", flush=True)
            if self.fault == "slow":
                time.sleep(1)
                return loss
            if self.fault == "error":
                raise UserError("what only this rank knows", "on the second line")
            if self.fault == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSTOP if self.fault == "stop" else signal.SIGKILL)
        return loss


def write_slowly(write, spec: ModelSpec, folder: Path, *arguments) -> None:
    write(spec, folder, *arguments)
    if "export" in str(folder):
        time.sleep(12)


def train_with(fault: str, options: list[str]) -> None:
    """tidar.train with these options and fault: hang, stop, kill, error, slow, slow_commit or none."""
    if fault == "slow_commit":
        Checkpointer._commit = lambda *_: time.sleep(60)
    if fault == "slow":
        write = ModelSpec.write
        ModelSpec.write = lambda *arguments: write_slowly(write, *arguments)
    train.Trainer = partial(train.Trainer, hooks=Faulty(fault))
    sys.argv[1:] = options
    train.main()


def signalled_before_the_first_step(options: list[str]) -> None:
    """tidar.train that gets SIGTERM as soon as its outcome is "running", and has data after a minute."""

    class Signalled(trainer.Outcome):
        def begin(self):
            super().begin()
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.Outcome = Signalled
    trainer.read_inputs = lambda *_, **__: time.sleep(60)
    sys.argv[1:] = options
    train.main()


def train_on_full_disk(n_bytes: int, options: list[str]) -> None:
    """tidar.train whose files cannot grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    sys.argv[1:] = options
    train.main()


def measure_steps(*arguments: str) -> None:
    """tidar.benchmarks.train_step, of a smaller model."""
    SIZES["debug"] |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sys.argv[1:] = arguments
    train_step.main()


def share_attention(*arguments: str) -> None:
    """tidar.benchmarks.context_attention."""
    from tidar.benchmarks import context_attention  # torch's context parallelism takes long to import

    sys.argv[1:] = arguments
    context_attention.main()


def hold_folder(folder: Path) -> None:
    """As a run that is in it, until it is killed."""
    lock = RunLock(folder)
    print("holds", lock, flush=True)
    time.sleep(1000)


def prepare_small_parts(n_bytes: int, options: list[str]) -> None:
    """tidar.prepare_data with parts so small that few data are many of them."""
    source.PART_BYTES = text.PART_BYTES = n_bytes
    sys.argv[1:] = options
    prepare_data.main()


if __name__ == "__main__":
    train_with(sys.argv[1], sys.argv[2:])
