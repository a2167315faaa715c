"""Processes that are ranks of one run after another: python tests/rank_pool.py is one of them.

A pool starts its processes once; each run then takes as long as it computes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class RankPool:
    def __init__(self, size: int):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "tests/rank_pool.py"], cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(size)
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def run(self, ranks: int, *options: str) -> list[list[list[int]]]:
        """Trains on so many ranks; returns the rows of each micro-batch of each rank."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank, process in enumerate(self.processes[:ranks]):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            case = {"variables": {name: str(value) for name, value in variables.items()}, "options": options}
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes[:ranks]]
        for answer, process in zip(answers, self.processes):
            if not answer:
                raise RuntimeError(process.communicate()[1][-3000:])
        return [json.loads(answer) for answer in answers]


def main() -> None:
    import uneven  # noqa: F401  (registers the source)

    from tidar.config import load_config
    from tidar.distributed import leave_world
    from tidar.train import Trainer

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

    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # what a run prints is no answer
    for line in sys.stdin:
        case = json.loads(line)
        os.environ.update(case["variables"])
        config = load_config(case["options"])
        trainer = Trainer(config)
        trainer.training_rows = rows = Recording(trainer.training_rows)
        trainer.train()
        leave_world()
        size = config.training.local_batch_size
        print(json.dumps([rows.seen[i : i + size] for i in range(0, len(rows.seen), size)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
