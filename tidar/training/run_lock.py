"""One run at a time in a dump folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from tidar.config import UserError
from tidar.distributed import World


@contextmanager
def held(folder: Path, world: World, group: dist.ProcessGroup) -> Iterator[None]:
    """Holds a run's folder for its processes; rank 0 has the lock, and loses it with its life.

    Raises UserError on all ranks where another run holds it. group: of all ranks, on the CPU.
    """
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") if world.rank == 0 else open(os.devnull) as file:
        is_free = torch.ones((), dtype=torch.int)
        if world.rank == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            except OSError:
                is_free.zero_()
        dist.broadcast(is_free, src=0, group=group)
        if not is_free:
            holder = path.read_text(encoding="utf-8")
            raise UserError(
                f"{folder}: another run is in it, {holder}; wait for its end, or choose another job.dump_folder"
            )
        yield
