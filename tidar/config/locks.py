"""Exclusive locks on files, between processes."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO

from tidar.config.errors import UserError


class FileLock:
    """An exclusive lock on a file. The system releases it when this process ends, however it ends.

    file: open for reading and writing, at its start. warning: one line where the file system has no locks, else empty.
    """

    def __init__(self, path: Path):
        """Opens the file, or creates it. Raises UserError where it is a link, a folder or no regular file."""
        self.path = path
        self.warning = ""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if path.is_symlink() or path.is_dir():
                raise UserError(f"{path}: must be a regular file, for the lock of this folder; remove it") from None
            raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{path}: must be a regular file, for the lock of this folder; remove it")
        self.file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")

    def acquire(self, wait: bool = False) -> bool:
        """Returns False where another process holds the lock; with `wait`, waits for it instead.

        Where the file system has no locks, sets `warning` and returns True: the caller continues without a lock.
        """
        error = lock_file(self.file, wait)
        if error and error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error:
            self.warning = (
                f"warning: {self.path}: cannot be locked ({error.strerror}); "
                f"start no second process that writes to {self.path.parent}"
            )
        return True

    def release(self) -> None:
        self.file.close()

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(file: IO, wait: bool = True) -> OSError | None:
    """Locks a file that is open for writing, until it is closed. Returns the error where it cannot be locked."""
    try:
        # lockf and not flock: a process forked from this one would share the flock, and may outlive it for seconds
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error
    return None
