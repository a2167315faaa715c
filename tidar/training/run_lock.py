"""One run at a time in a dump folder."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from tidar.config import UserError
from tidar.config.locks import FileLock
from tidar.distributed import World


class RunLock:
    """A lock on a run's folder, held by this process until it ends, however it ends."""

    def __init__(self, folder: Path):
        """Raises UserError where another run holds it, and where the lock file is a link or no file."""
        self.lock = FileLock(folder / ".lock")
        if not self.lock.acquire():
            holder = self.lock.file.read(100)
            self.lock.release()
            raise UserError(
                f"{folder}: another run is in it, {holder}; wait for its end, or choose another job.dump_folder"
            )
        with suppress(OSError):  # a full disk: the lock holds without its description
            self.lock.file.truncate(0)
            self.lock.file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.lock.file.flush()

    @property
    def warning(self) -> str:
        """One line where the file system has no locks, else empty."""
        return self.lock.warning

    def release(self) -> None:
        with suppress(OSError):
            self.lock.release()


def hold_folder(folder: Path, world: World, group: dist.ProcessGroup, log: Callable[[str], None]) -> RunLock | None:
    """Locks a run's folder on rank 0. Raises UserError on all ranks where another run holds it.

    group: of all ranks, on the CPU.
    """
    lock, problem = None, [()]
    if world.rank == 0:
        try:
            lock = RunLock(folder)
            if lock.warning:
                log(lock.warning)
        except UserError as error:
            problem = [error.args]
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0]:
        raise UserError(*problem[0])
    return lock
