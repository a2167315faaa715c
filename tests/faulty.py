"""python tests/faulty.py hang|stop|kill ARGS: tidar.train whose rank 1 does so in its third step, once."""

import os
import signal
import sys
import time

import uneven  # noqa: F401  (registers the source)

from tidar import train


class Faulty(train.Trainer):
    def forward(self, rows, weights):
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.world.rank == 1 and self.step == 2 and first_attempt:
            print(f"fault at {time.time()}", flush=True)
            if FAULT == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSTOP if FAULT == "stop" else signal.SIGKILL)
        return super().forward(rows, weights)


if __name__ == "__main__":
    FAULT = sys.argv.pop(1)
    train.Trainer = Faulty
    train.main()
