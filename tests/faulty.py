"""python tests/faulty.py hang|stop|kill|slow|slow_commit ARGS: tidar.train, rank 1 at fault in its third step, once.

slow is none: each of that step's micro-batches takes a second more, and rank 0's export too long for the others. Nor is
slow_commit: a checkpoint takes a minute to get its name.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import uneven  # noqa: F401  (registers the source)

from tidar import train
from tidar.models.huggingface import ModelSpec
from tidar.training.checkpoint.checkpointer import Checkpointer
from tidar.training.hooks import Hooks

FAULTS = ("hang", "stop", "kill", "slow", "slow_commit")


class Faulty(Hooks):
    failed_at = None

    def on_micro_batch(self, trainer, rows, loss, scores):
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if trainer.world.rank == 1 and trainer.step == 2 and first_attempt and FAULT != "slow_commit":
            if self.failed_at is None:
                self.failed_at = time.time()
                print(f"fault at {self.failed_at}", flush=True)
            if FAULT == "slow":
                time.sleep(1)
                return loss
            if FAULT == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSTOP if FAULT == "stop" else signal.SIGKILL)
        return loss


def write_slowly(spec: ModelSpec, folder: Path, *arguments) -> None:
    write(spec, folder, *arguments)
    if "export" in str(folder):
        time.sleep(12)


if __name__ == "__main__":
    FAULT = sys.argv.pop(next(i for i, word in enumerate(sys.argv) if word in FAULTS))
    if FAULT == "slow_commit":
        Checkpointer._commit = lambda *_: time.sleep(60)
    if FAULT == "slow":
        write, ModelSpec.write = ModelSpec.write, write_slowly
    train.Trainer = partial(train.Trainer, hooks=Faulty())
    train.main()
