"""Processes that are ranks of one run after another: python tests/rank_pool.py is one of them.

A pool starts its processes once; each run then takes as long as it computes.
"""

import contextlib
import io
import json
import math
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port below those that the system gives to others' connections, so that nobody has taken it a moment later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("localhost", port))
            return port


class RankPool:
    """Its processes are started when a run first wants so many."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "tests/rank_pool.py"], cwd=ROOT, text=True,
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def run(self, ranks: int, *options: str, weights: Path | None = None, faults: list = ()) -> list[dict]:
        """Trains on so many ranks, and saves what was trained to the file `weights`.

        faults: (rank, step, what) of those whose "loss" is to be infinite, or nan for the last target of a "row", whose
        "targets" are to weigh nothing, or whose files cannot grow beyond a megabyte from that step on, as on a full
        "disk".

        Returns, of each rank, the "rows" of each micro-batch and its number of "targets", what it "printed", its
        "error" if it has ended with one of the user's, and the bytes of keys and values that it "gathered" for others.
        """
        while len(self.processes) < ranks:
            self.processes.append(self._start())
        port = free_port()
        for rank, process in enumerate(self.processes[:ranks]):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOG_RANK": rank}
            case = {"variables": {name: str(value) for name, value in variables.items()}, "options": options}
            case |= {"weights": weights and str(weights)}
            case |= {"faults": {step: what for faulty, step, what in faults if faulty == rank}}
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes[:ranks]]
        for answer, process in zip(answers, self.processes):
            if not answer:
                raise RuntimeError(process.communicate()[1][-3000:])
        return [json.loads(answer) for answer in answers]


def main() -> None:
    import torch
    import uneven  # noqa: F401  (registers the source)
    from results import whole

    from tidar.config import UserError, load_config
    from tidar.distributed import context_parallel, leave_world
    from tidar.training.hooks import Hooks
    from tidar.training.trainer import Trainer

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

        def __init__(self, faults: dict[str, str]):
            self.targets: list[int] = []
            self.faults = faults

        def batches(self, trainer, batches):
            for batch in batches:
                if self.faults.get(str(trainer.step + 1)) == "targets":
                    for targets in batch.rows.targets.values():
                        targets.weights.zero_()
                yield batch

        def on_micro_batch(self, trainer, rows, loss, scores):
            if torch.is_grad_enabled():
                self.targets.append(len(next(iter(rows.targets.values())).labels))
                what = self.faults.get(str(trainer.step + 1))
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

    context_parallel.collectives = Counted()
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # what a run prints is no answer
    for line in sys.stdin:
        case = json.loads(line)
        os.environ.update(case["variables"])
        config = load_config(case["options"])
        Counted.gathered = 0
        hooks, printed, error = Faults(case["faults"]), io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                trainer = Trainer(config, hooks)
        except UserError as raised:
            leave_world()
            print(json.dumps({"error": str(raised)}), file=answers, flush=True)
            continue
        trainer.batches.training_rows = rows = Recording(trainer.batches.training_rows)
        try:
            with contextlib.redirect_stdout(printed):
                trainer.train()
        except UserError as raised:
            error = str(raised)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if case["weights"]:
            weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
            if trainer.world.rank == 0:
                torch.save(weights, case["weights"])
        leave_world()
        size = config.training.local_batch_size
        rows = [rows.seen[i : i + size] for i in range(0, len(rows.seen), size)]
        answer = {"rows": rows, "targets": hooks.targets, "printed": printed.getvalue(), "error": error}
        answer["gathered"] = Counted.gathered
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
