"""Files in folders that others may have made: links in them are never followed, and a file is whole at any time."""

import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tidar.config.errors import UserError


def check_output(path: Path) -> None:
    """Raises UserError unless --output can be written at `path`: what takes long to compute must not be lost."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: must be a file in a folder that can be written to")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file by one that is whole and flushed to the disk. A link at `path` is replaced, not followed.

    Raises OSError; the file is unchanged then.
    """
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with create_file(partial) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def create_file(path: Path) -> BinaryIO:
    """A new file, open for writing. Raises FileExistsError for any name that is taken, a dangling link's too."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def open_regular(path: Path) -> BinaryIO:
    """A file open for reading. Raises OSError for a link, a folder, a device or a pipe, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for. Raises ValueError where it is not JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def file_stamp(file: str) -> list[int]:
    """Size and time of modification, which tell that a file has changed; empty where it cannot be read."""
    try:
        stat = os.stat(file)
        return [stat.st_size, stat.st_mtime_ns]
    except OSError:
        return []  # reading it raises the error
