"""One folder, several processes: who works on what, and how long all of them have worked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidar.config import print_lines
from tidar.config.files import write_atomically
from tidar.config.locks import FileLock

SECONDS = "seconds.txt"


@contextmanager
def held(folder: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock `name` of the folder inside the context; the system releases it if this process is killed.

    Yields False where another process holds it. wait: waits for it instead.
    """
    locks = folder / "locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / name) as lock:
        is_held = lock.acquire(wait)
        if lock.warning:
            print_lines(lock.warning)
        yield is_held


def seconds_of_all(folder: Path) -> float:
    """Wall time that the processes have worked, summed up, each up to its last report; waiting is not counted."""
    try:
        return float((folder / SECONDS).read_text())
    except (OSError, ValueError):
        return 0.0


def add_seconds(folder: Path, seconds: float) -> None:
    """The caller holds a lock against other processes that do the same."""
    write_atomically(folder / SECONDS, f"{seconds_of_all(folder) + seconds:.1f}\n")
