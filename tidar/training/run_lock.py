"""One run at a time in a dump folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from tidar.config import UserError
from tidar.distributed import World


class RunLock:
    """Holds a run's folder for this process, which loses it with its life, whatever ends it."""

    def __init__(self, folder: Path):
        """Raises UserError where another run holds it."""
        path = folder / ".lock"
        self.file = path.open("a+", encoding="utf-8")
        self.warning = ""
        try:
            # not flock: processes forked from this one, which may outlive it for seconds, would hold that too
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.warning = f"warning: {path}: cannot be locked ({error.strerror}); start no second run in {folder}"
                return
            self.file.close()
            holder = path.read_text(encoding="utf-8")
            raise UserError(
                f"{folder}: another run is in it, {holder}; wait for its end, or choose another job.dump_folder"
            ) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def hold_folder(folder: Path, world: World, group: dist.ProcessGroup, log: Callable[[str], None]) -> RunLock | None:
    """Rank 0's lock of a run's folder. Raises UserError on all ranks where another run holds it.

    group: of all ranks, on the CPU.
    """
    lock, problem = None, [None]
    if world.rank == 0:
        try:
            lock = RunLock(folder)
            if lock.warning:
                log(lock.warning)
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0]:
        raise UserError(problem[0])
    return lock
