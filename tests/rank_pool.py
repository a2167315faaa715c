"""Processes that are ranks of one run after another.

A pool starts its processes once; each run then takes as long as it computes.
"""

import contextlib
import faulthandler
import io
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import forks
import torch
import uneven  # noqa: F401  (registers the source)
from peer_memory import copies_through_files
from results import whole

from tidar.config import UserError, load_config
from tidar.distributed import buffer_bytes, context_parallel, leave_world
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

SLOW = 0.1
TIMEOUT = 200  # seconds for a run

_given: set[int] = set()


def free_port() -> int:
    """A port below those that the system gives to others' connections, so that nobody has taken it a moment later.

    Each one once: a rank counts the worlds that it has joined at an address, and ranks that have not met there before
    would wait for each other in different ones.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("localhost", port))
            if port not in _given:
                _given.add(port)
                return port


class RankPool:
    """Its processes are started when a run first wants so many, and again after one in which some have not answered."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.connections = [], []
        self.running = 0

    def _start(self) -> None:
        log = Path(self.folder.name) / str(len(self.processes))
        if self.device == "cpu":
            connection, theirs = forks.Pipe()
            process = forks.start(serve, theirs, log=log)
        else:
            # forked processes would not have the GPUs
            context = multiprocessing.get_context("spawn")
            connection, theirs = context.Pipe()
            process = context.Process(target=forks._run, args=(serve, (theirs,), log))
            process.start()
        self.processes.append(process)
        self.connections.append(connection)
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._end()
        self.folder.cleanup()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []

    def run(
        self, ranks: int, *options: str, weights: Path | None = None, faults: list = (), copies: bool = False
    ) -> list[dict]:
        """Trains on so many ranks, and saves what was trained to the file `weights`.

        copies: whether ranks without GPUs copy parameters and gradients from each other as those with GPUs do.

        faults: (rank, step, what) of those whose "loss" is to be infinite, or nan for the last target of a "row", whose
        "targets" are to weigh nothing, whose files cannot grow beyond a megabyte from that step on, as on a full
        "disk", whose "data" come SLOW seconds late, or whose "layer" takes so much longer from that step on.

        Returns, of each rank, the "rows" of each micro-batch and its number of "targets", what it "printed", its
        "error" if it has ended with one of the user's, the bytes of keys and values that it "gathered" for others, and
        those of the "buffers" of copies between GPUs.
        """
        while len(self.processes) < ranks:
            self._start()
        port, self.running = free_port(), ranks
        for rank, connection in enumerate(self.connections[:ranks]):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOG_RANK": rank}
            case = {"variables": {name: str(value) for name, value in variables.items()}, "options": options}
            case |= {"weights": weights, "copies": self.folder.name if copies else ""}
            case |= {"faults": {step: what for faulty, step, what in faults if faulty == rank}}
            connection.send(case)
        return [self._answer(rank) for rank in range(ranks)]

    def _answer(self, rank: int) -> dict:
        try:
            if self.connections[rank].poll(TIMEOUT):
                return self.connections[rank].recv()
        except EOFError:
            pass
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR2)
        time.sleep(1)  # they print their stacks
        self._end()
        logs = (f"rank {i}: {(Path(self.folder.name) / str(i)).read_text()[-10_000:]}" for i in range(self.running))
        raise RuntimeError(f"rank {rank} has not answered\n" + "\n".join(logs))


class Recording:
    """Rows that remember which of them were asked for."""

    def __init__(self, rows):
        self.rows = rows
        self.seen: list[int] = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int):
        self.seen.append(row)
        return self.rows[row]

    def __getattr__(self, name: str):
        return getattr(self.rows, name)


class Faults(Hooks):
    """Keeps the number of targets of each micro-batch, and makes the faults of a run."""

    def __init__(self, faults: dict[int, str]):
        self.targets: list[int] = []
        self.faults = faults

    def batches(self, trainer, batches):
        for batch in batches:
            what = self.faults.get(trainer.step + 1)
            if what == "data":
                time.sleep(SLOW)
            if what == "layer":
                trainer.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(SLOW))
            if what == "targets":
                for targets in batch.rows.targets.values():
                    targets.weights.zero_()
            yield batch

    def on_micro_batch(self, trainer, rows, loss, scores):
        if torch.is_grad_enabled():
            self.targets.append(len(next(iter(rows.targets.values())).labels))
            what = self.faults.get(trainer.step + 1)
            if what == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
            if what == "loss":
                loss = loss * math.inf
            if what == "row":
                scores["ar"].nll[-1] = math.nan
                print(f"row {rows.targets['ar'].index[-1] // rows.input_ids.shape[1]} of its micro-batch")
        return loss


class Counted:
    """The collectives of context parallelism, which count the bytes that this rank gives to all-gathers."""

    gathered = 0

    def __getattr__(self, name: str):
        return getattr(torch.ops._c10d_functional, name)

    def all_gather_into_tensor(self, local, *arguments):
        Counted.gathered += local.nbytes
        return torch.ops._c10d_functional.all_gather_into_tensor(local, *arguments)


def serve(connection: Connection) -> None:
    """Trains as the pool says, one run after another."""
    faulthandler.register(signal.SIGUSR2)
    if not torch.cuda.is_available():  # on GPUs they are compiled
        context_parallel.collectives = Counted()
    while True:
        case = connection.recv()
        os.environ.update(case["variables"])
        torch._dynamo.reset()  # what was compiled for other models
        # without collections of all that is imported, which take longer than a small run
        config = load_config(["--training.gc_freq", "0", *case["options"]])
        Counted.gathered = 0
        hooks, printed, error = Faults(case["faults"]), io.StringIO(), None
        memory = copies_through_files(Path(case["copies"])) if case["copies"] else contextlib.nullcontext()
        try:
            with contextlib.redirect_stdout(printed), memory:
                trainer = Trainer(config, hooks)
        except UserError as raised:
            leave_world()
            connection.send({"error": str(raised)})
            continue
        trainer.batches.training_rows = rows = Recording(trainer.batches.training_rows)
        try:
            with contextlib.redirect_stdout(printed):
                trainer.train()
        except UserError as raised:
            error = str(raised)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if case["weights"]:
            model = trainer.model
            weights = {name: model.shard.whole(name, whole(p.detach())).cpu() for name, p in model.named_parameters()}
            if trainer.world.rank == 0:
                torch.save(weights, case["weights"])
        buffers = buffer_bytes()
        leave_world()
        size = config.training.local_batch_size
        rows = [rows.seen[i : i + size] for i in range(0, len(rows.seen), size)]
        answer = {"rows": rows, "targets": hooks.targets, "printed": printed.getvalue(), "error": error}
        connection.send(answer | {"gathered": Counted.gathered, "buffers": buffers})
