"""python tests/stops.py --trials 40: asks runs to stop at random moments, resumes them, and compares how they end.

Each trial trains the debug model under torchrun's agent, on two ranks or on one, with long validations, exports and
steps of several micro-batches, and sends the agent SIGTERM or SIGUSR1. Each rank may begin BATCHES more batches,
of training or validation, before it saves and ends. Resumed, the run must come to the very state, curve and exports of
one that was left alone. Processes are forked from this one, which has imported all and computed nothing. Exits with 1
if any trial failed.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import forks
import torch
import torture
from results import files_of

from tidar import train
from tidar.training.hooks import Hooks

TIMEOUT = 100
# the one at hand when the signal is sent may begin after it, and of a step the next one too: votes count a call later
BATCHES = 2
OPTIONS = """
    --training.seq_len 64 --training.local_batch_size 8 --training.global_batch_size 32 --training.steps 6
    --validation.freq 2 --validation.share 0.3 --checkpoint.interval 3 --checkpoint.export_epochs 1
    --metrics.log_freq 1 --data.num_workers 1
"""


class Board:
    """What ranks share with the process that signals them: batches begun since a rank's signal, and before it."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 8)

    def count(self, rank: int, after_signal: bool) -> None:
        self.memory[2 * rank + after_signal] += 1

    def begun(self, after_signal: bool) -> int:
        return max(self.memory[after_signal], self.memory[2 + after_signal])


class Watched(Hooks):
    """Counts batches, each of which takes `slowness` seconds more."""

    def __init__(self, board: Board, slowness: float):
        self.board, self.slowness = board, slowness

    def on_micro_batch(self, trainer, rows, loss, scores):
        self.board.count(trainer.world.rank, trainer.stops.signal is not None)
        time.sleep(self.slowness)
        return loss


def launch(ranks: int, options: list[str], log: Path, slowness: float = 0.0) -> tuple[int, Board]:
    """Process id of torchrun's agent."""
    board = Board()
    pid = os.fork()
    if pid:
        return pid, board
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        train.Trainer = partial(train.Trainer, hooks=Watched(board, slowness))
        sys.argv[1:] = options
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        forks.torchrun(ranks, train.main)
        code = 0
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a process, which is killed where it takes too long."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def end_of(folder: Path) -> tuple:
    """State and curve of a finished run, and its exports."""
    state, curve, *_ = torture.end_of(folder, 6)
    exports = files_of(folder / "export")
    return state, curve, exports


def trial(number: int, seed: int, data: str, expected: tuple, batches: int, folder: Path) -> tuple[str, str]:
    """What the run did when it was to stop, and what went wrong, empty if nothing did."""
    random.seed(f"{seed}/{number}")
    ranks, signum = 2 - number % 2, random.choice((signal.SIGTERM, signal.SIGUSR1))
    log = folder.with_suffix(".log")
    options = [*OPTIONS.split(), *data.split(), "--job.dump_folder", str(folder)]
    agent, board = launch(ranks, options, log, slowness=0.05)
    moment = random.randint(1, batches - 1)
    deadline = time.monotonic() + TIMEOUT
    while board.begun(False) < moment and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.1))
    os.kill(agent, signum)
    wait(agent)
    found = json.loads((folder / "outcome.json").read_text())
    place = f"batch {moment}"
    if found["outcome"] == "finished":
        return "finished", ""
    if (found["outcome"], found["reason"]) != ("stopped", signum.name):
        return place, f"the outcome is {found}"
    if board.begun(True) > BATCHES:
        return place, f"{board.begun(True)} more batches were begun"
    interrupted = torture.CheckpointTensors(Path(found["checkpoint"])).rows("progress.interrupted", 0, 2).tolist()
    place = {(0, 0): "step"}.get(tuple(interrupted), "validation" if interrupted[0] else "export")
    if wait(launch(ranks, options, log)[0]):
        return place, "resumed it failed"
    end = end_of(folder)
    if end[2] != expected[2]:
        return place, "other exports"
    return place, torture.difference(end[:2], expected[:2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = torture.prepare(folder)
        expected, batches = {}, {}
        for ranks in {2 - number % 2 for number in range(arguments.trials)}:
            whole = folder / f"whole-{ranks}"
            agent, board = launch(
                ranks, [*OPTIONS.split(), *data.split(), "--job.dump_folder", str(whole)], whole.with_suffix(".log")
            )
            assert wait(agent) == 0, whole.with_suffix(".log").read_text()
            expected[ranks], batches[ranks] = end_of(whole), board.begun(False)
        stopped, failures = Counter(), 0
        for number in range(arguments.trials):
            ranks = 2 - number % 2
            place, problem = trial(number, arguments.seed, data, expected[ranks], batches[ranks], folder / str(number))
            stopped[place] += 1
            print(f"trial {number}: {ranks} ranks, stopped in {place}{problem and ': ' + problem}", flush=True)
            if problem:
                failures += 1
                print((folder / f"{number}.log").read_text()[-3000:], flush=True)
            shutil.rmtree(folder / str(number), ignore_errors=True)
    print(f"{arguments.trials} trials, stopped in: {', '.join(f'{place} {n}' for place, n in stopped.items())}")
    print(f"{failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
