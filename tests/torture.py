"""python tests/torture.py --trials 200: kills runs at random moments, starts them again, and compares how they end.

Each trial trains the debug model on one rank or two, which may share each row or each layer, saving synchronously or
not, and is killed: most often in a chosen phase of a save, else anywhere. With two ranks both are killed at once, as by
a power cut, or one is, and the other gets SIGTERM, as from torchrun. At times the newest checkpoint is damaged after
that. Started again, once or more, the run must come to the very state and curve of one that was left alone, from a
checkpoint no older than the last that was committed. Ranks are forked from this process, which has imported all and
computed nothing, so that a trial takes seconds. Exits with 1 if any trial failed.
"""

import argparse
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import uneven  # noqa: F401  (registers the source)
from rank_pool import free_port
from results import read_metrics

from tidar import train
from tidar.distributed import Watchdog
from tidar.models.huggingface.checkpoint_files import CheckpointTensors
from tidar.models.huggingface.manifest import saved_steps
from tidar.models.sizes import SIZES
from tidar.training import trainer
from tidar.training.checkpoint import writer
from tidar.training.checkpoint.checkpointer import Checkpointer

STEPS, INTERVAL, TIMEOUT = 8, 2, 90
PHASES = ("elsewhere", "staging", "writing", "committing", "cleaning up")
# ranks, and how they divide the work: in turn, those of the short form first
SHAPES = (
    (2, "--parallelism.context_parallel_degree 2"),
    (2, "--parallelism.tensor_parallel_degree 2"),
    (2, ""),
    (1, ""),
)
METHODS = ("_stage", "_write", "_commit", "_remove_old")
# of the debug model here: how long a phase of a save lasts is set, whatever is saved
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
OPTIONS = f"""
    --training.seq_len 16 --training.local_batch_size 2 --training.global_batch_size 4 --training.steps {STEPS}
    --checkpoint.interval {INTERVAL} --checkpoint.keep_latest_k 2 --metrics.log_freq 1 --validation.enable false
"""


class Board:
    """What ranks tell the process that kills them: how often rank 0 has entered each phase, where each rank is, and the
    last step that was committed.
    """

    def __init__(self):
        self.memory = mmap.mmap(-1, 64)

    def enter(self, rank: int, phase: int) -> None:
        self.memory[16 + rank] = phase
        if rank == 0:
            self.memory[phase] += 1

    def leave(self, rank: int) -> None:
        self.memory[16 + rank] = 0

    def entries(self, phase: int) -> int:
        return self.memory[phase]

    def where(self, rank: int) -> str:
        return PHASES[self.memory[16 + rank]]

    @property
    def committed(self) -> int:
        return self.memory[32]

    @committed.setter
    def committed(self, step: int) -> None:
        self.memory[32] = step


def watch_phases(board: Board, rank: int, slowness: float) -> None:
    """Makes a rank tell its phases, and stay in each for a while. slowness: seconds."""
    for phase, name in enumerate(METHODS, start=1):
        method = getattr(Checkpointer, name)

        def slowed(self, *arguments, phase=phase, method=method):
            board.enter(rank, phase)
            time.sleep(slowness / 2)
            result = method(self, *arguments)
            if phase == 3 and rank == 0:
                board.committed = arguments[0]
            time.sleep(slowness / 2)
            board.leave(rank)
            return result

        setattr(Checkpointer, name, slowed)

    class SlowStream:
        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            if len(data) > 10_000:
                time.sleep(slowness / 100)
            return self.stream.write(data)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    create_stream = writer._FileSystem.create_stream

    @contextmanager
    def slow_stream(self, path, mode):
        with create_stream(self, path, mode) as stream:
            yield SlowStream(stream)

    if slowness:
        writer._FileSystem.create_stream = slow_stream


def come_late(seconds: float) -> None:
    """Makes a rank late where it connects to the store for the last time."""

    def watchdog(*arguments):
        time.sleep(seconds)
        return Watchdog(*arguments)

    trainer.Watchdog = watchdog


class Run:
    """A run's ranks, as processes."""

    def __init__(self, ranks: int, options: list[str], log: Path, slowness: float = 0.0, lateness: float = 0.0):
        """slowness, lateness: seconds that each phase of a save lasts, and by which ranks start after rank 0."""
        self.board, self.log = Board(), log
        port = free_port()
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                if rank:
                    come_late(lateness)
                self._become(rank, ranks, port, options, slowness)
            self.pids.append(pid)
        self.codes: dict[int, int] = {}

    def _become(self, rank: int, ranks: int, port: int, options: list[str], slowness: float) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            os.environ.update({name: str(value) for name, value in variables.items()})
            torch.set_num_threads(1)
            watch_phases(self.board, rank, slowness)
            sys.argv[1:] = options
            train.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def wait(self, timeout: float, ranks: list[int] | None = None) -> bool:
        """Whether these ranks, or all, end within so many seconds."""
        deadline = time.monotonic() + timeout
        wanted = set(range(len(self.pids)) if ranks is None else ranks)
        while not wanted <= self.codes.keys():
            for rank in wanted - self.codes.keys():
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def kill(self, rank: int, number: int) -> None:
        if rank not in self.codes:
            os.kill(self.pids[rank], number)


def trial(number: int, seed: int, data: str, expected: tuple, folder: Path) -> tuple[str, str]:
    """Where rank 0 was when it was killed first, and what went wrong, empty if nothing did."""
    random.seed(f"{seed}/{number}")
    (ranks, shape), mode = SHAPES[number % len(SHAPES)], random.choice(("disabled", "async", "async_with_pinned_mem"))
    options = [*OPTIONS.split(), *shape.split(), *data.split(), "--checkpoint.async_mode", mode]
    options += ["--job.dump_folder", str(folder)]
    options += ["--data.num_workers", random.choice("01")]
    log = folder.with_suffix(".log")
    phases, committed = [], 0
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        run = Run(ranks, options, log, slowness=0.1)
        if random.random() < 0.75:  # in a save
            phase, occurrence = random.randint(1, len(METHODS)), random.randint(1, STEPS // INTERVAL)
            while run.board.entries(phase) < occurrence and not run.wait(0.001):
                pass
            time.sleep(random.uniform(0, 0.06))
        else:
            run.wait(random.uniform(0, 3.5))
        phases.append(run.board.where(0))
        if ranks == 1 or random.random() < 0.5:
            for rank in range(ranks):
                run.kill(rank, signal.SIGKILL)
        else:
            victim = random.randrange(ranks)
            run.kill(victim, signal.SIGKILL)
            run.wait(5, [victim])
            run.kill(1 - victim, signal.SIGTERM)
        if not run.wait(20):
            for rank in range(ranks):
                run.kill(rank, signal.SIGKILL)
            run.wait(5)
            return phases[0], "a rank outlived the other"
        committed = max(committed, run.board.committed)
        steps = saved_steps(folder)
        if len(steps) > 1 and random.random() < 0.2:  # the newest is altered, too, and will be written again
            with open(steps[max(steps)] / "__0_0.distcp", "r+b") as file:
                file.truncate(1000)
            committed = sorted(steps)[-2]
    final = Run(ranks, options, log)
    if not final.wait(TIMEOUT):
        for rank in range(ranks):
            final.kill(rank, signal.SIGKILL)
        return phases[0], "started again it did not end"
    if any(final.codes.values()):
        return phases[0], f"started again it ended with {final.codes}"
    starts = re.findall(r"^(?:resumed from step (\d+)|starts from)", log.read_text(), re.MULTILINE)
    if int(starts[-1] or 0) < committed:
        return phases[0], f"went on from step {starts[-1] or 0}, though step {committed} was committed"
    return phases[0], difference(end_of(folder), expected)


def end_of(folder: Path, steps: int = STEPS) -> tuple:
    """Everything that a finished run has come to, but times."""
    tensors = CheckpointTensors(folder / "checkpoint" / f"step-{steps}")
    state = {name: tensors.rows(name, 0, shape[0]) for name, shape in tensors.shapes.items() if shape}
    lines = read_metrics(folder)
    curve = [{key: v for key, v in line.items() if not key.startswith(("perf/", "memory/"))} for line in lines]
    return state, curve, list(saved_steps(folder)), sorted(path.name for path in (folder / "checkpoint").iterdir())


def difference(found: tuple, expected: tuple) -> str:
    if found[0].keys() != expected[0].keys():
        return "other tensors"
    unequal = [name for name, tensor in expected[0].items() if not torch.equal(found[0][name], tensor)]
    if unequal:
        return f"{len(unequal)} tensors differ, {unequal[0]} among them"
    if found[1] != expected[1]:
        return f"another curve: {found[1]}"
    if found[2:] != expected[2:]:
        return f"left {found[3]}"
    return ""


def prepare(folder: Path) -> str:
    """Options that train on the source "uneven", prepared in `folder`."""
    options = ["--data.source", "uneven", "--validation.enable", "false", "--training.steps", "0"]
    assert Run(1, [*options, "--job.dump_folder", str(folder / "data")], folder / "data.log").wait(TIMEOUT)
    return f"--data.source prepared --data.paths {folder / 'data' / 'data' / 'training'}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(arguments)
    SIZES["debug"] |= SHAPE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder)
        expected = []
        for ranks, shape in SHAPES[: arguments.trials]:
            whole = folder / f"whole-{len(expected)}"
            options = [*OPTIONS.split(), *shape.split(), *data.split(), "--data.num_workers", "0"]
            options += ["--job.dump_folder", str(whole)]
            run = Run(ranks, options, whole.with_suffix(".log"))
            assert run.wait(TIMEOUT) and not any(run.codes.values()), whole.with_suffix(".log").read_text()
            expected.append(end_of(whole))
            if len(expected) == 1:
                again = Run(ranks, options, whole.with_suffix(".log"), lateness=2)
                assert again.wait(30) and not any(again.codes.values()), "a finished run started again does not end"
        killed, failures = Counter(), 0
        for number in range(arguments.trials):
            of_shape = expected[number % len(SHAPES)]
            phase, problem = trial(number, arguments.seed, data, of_shape, folder / str(number))
            killed[phase] += 1
            if problem:
                failures += 1
                print(f"trial {number} of seed {arguments.seed}, killed in {phase}: {problem}")
                print((folder / f"{number}.log").read_text()[-3000:], flush=True)
            shutil.rmtree(folder / str(number), ignore_errors=True)
    print(f"{arguments.trials} trials, killed first in: {', '.join(f'{p} {killed[p]}' for p in PHASES)}")
    print(f"{failures} failures")
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    main()
