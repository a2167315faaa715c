"""Measurements by several processes of this machine, one for each device."""

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from tidar.config import UserError


def launcher(ngpu: int) -> list[str]:
    """The first words of a command that runs a module in `ngpu` processes."""
    return [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ngpu), "-m"]


def numbers_of_devices(text: str) -> list[int]:
    """The numbers that the option --ngpu holds. Raises UserError for anything else."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--ngpu {text}: must be numbers of devices, separated by commas")
    return [int(part) for part in parts]


_folders = itertools.count()


@contextmanager
def common_folder() -> Iterator[str]:
    """A temporary folder for all ranks, which are on one machine: rank 0 creates and removes it."""
    store, rank = None, 0
    if is_rank():
        store, rank, _ = next(iter(dist.rendezvous("env://")))
    key = f"benchmark-folder-{next(_folders)}"
    if store and rank:
        yield store.get(key).decode()
        return
    with tempfile.TemporaryDirectory() as folder:
        if store:
            store.set(key, folder)
        yield folder


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ


def n_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process prints."""
    return os.environ.get("RANK", "0") == "0"


def gather(value: Any, cpu_group: dist.ProcessGroup) -> list:
    """The value that each rank has."""
    values: list[Any] = [None] * cpu_group.size()
    dist.all_gather_object(values, value, group=cpu_group)
    return values
