"""Locks between processes, and file systems that have none."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidar.config import UserError
from tidar.config.locks import FileLock

HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def test_another_process_holds_it(tmp_path):
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        with FileLock(path) as lock:
            assert not lock.acquire() and not lock.warning
            holder.communicate("\n")
            assert lock.acquire() and lock.acquire(wait=True) and not lock.warning


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_costs_one_warning(number, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", fail)
    monkeypatch.setattr("fcntl.flock", fail)
    with FileLock(tmp_path / ".lock") as lock:
        assert lock.acquire() and len(lock.warning.splitlines()) == 1 and os.strerror(number) in lock.warning


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_a_lock_is_a_regular_file(kind, tmp_path):
    path, target = tmp_path / ".lock", tmp_path / "precious"
    target.write_text("precious")
    {"folder": Path.mkdir, "link": lambda path: path.symlink_to(target), "fifo": os.mkfifo}[kind](path)
    with pytest.raises(UserError, match="must be a regular file") as error:
        FileLock(path)
    assert len(str(error.value).splitlines()) == 1 and target.read_text() == "precious"
