"""python tests/faulty.py hang|stop|kill|slow|slow_commit ARGS: tidar.train, rank 1 at fault in its third step, once.

slow is none: each of that step's micro-batches takes a second more, and rank 0's export too long for the others. Nor is
slow_commit: a checkpoint takes a minute to get its name.
"""

import os
import signal
import sys
import time

import uneven  # noqa: F401  (registers the source)

from tidar import train
from tidar.training.checkpoint.checkpointer import Checkpointer

FAULTS = ("hang", "stop", "kill", "slow", "slow_commit")


class Faulty(train.Trainer):
    passed_at = None

    def forward(self, *arguments):
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.world.rank == 1 and self.step == 2 and first_attempt and FAULT != "slow_commit":
            if self.passed_at is None:
                self.passed_at = time.time()
                print(f"fault at {self.passed_at}", flush=True)
            if FAULT == "slow":
                time.sleep(1)
                return super().forward(*arguments)
            if FAULT == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSTOP if FAULT == "stop" else signal.SIGKILL)
        return super().forward(*arguments)

    def write_assets(self, folder):
        super().write_assets(folder)
        if FAULT == "slow" and "export" in str(folder):
            time.sleep(12)


if __name__ == "__main__":
    FAULT = sys.argv.pop(next(i for i, word in enumerate(sys.argv) if word in FAULTS))
    if FAULT == "slow_commit":
        Checkpointer._commit = lambda *_: time.sleep(60)
    train.Trainer = Faulty
    train.main()
