"""Symmetric memory of ranks without GPUs: what tidar.distributed.peer_copies needs of torch's."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tidar.distributed import peer_copies


class Handle:
    """To the buffers of all ranks. wait: what its barrier does; without it, nothing."""

    def __init__(self, memories: list[Tensor], rank: int, wait: Callable[[], Any] | None = None):
        self.memories, self.rank, self.world_size = memories, rank, len(memories)
        self.barrier = wait or (lambda: None)

    def get_buffer(self, peer: int, sizes: tuple[int], dtype: torch.dtype, offset: int) -> Tensor:
        return self.memories[peer].view(dtype)[offset : offset + sizes[0]]


def sum_terms(total: Tensor, term: Tensor, others: Tensor) -> None:
    """What tidar.kernels.term_sum does, without Triton."""
    total.copy_(term.float())
    for other in others:
        total += other.float()


def imitate_kernel(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "tidar.kernels.term_sum", SimpleNamespace(sum_terms=sum_terms))


@contextmanager
def copies_through_files(folder: Path) -> Iterator[None]:
    """Processes on a CPU copy as GPUs do, from files in `folder` that all of them have mapped."""
    numbers = itertools.count()

    def mapped(number: int, rank: int, n_bytes: int) -> Tensor:
        name = f"{os.environ['MASTER_PORT']}-{number}-{rank}"
        return torch.from_file(str(folder / name), shared=True, size=n_bytes, dtype=torch.uint8)

    def empty_strided_p2p(size: tuple[int], *_: Any) -> Tensor:
        return mapped(next(numbers), dist.get_rank(), *size)

    def rendezvous(memory: Tensor, group: dist.ProcessGroup) -> Handle:
        dist.barrier(group)
        number = int(Path(memory.untyped_storage().filename).name.split("-")[1])
        memories = [mapped(number, rank, len(memory)) for rank in dist.get_process_group_ranks(group)]
        return Handle(memories, group.rank(), partial(dist.barrier, group))

    memory = SimpleNamespace(empty_strided_p2p=empty_strided_p2p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_copies.symmetric_memory, "rendezvous", rendezvous)
        patch.setattr(peer_copies.symmetric_memory, "_SymmetricMemory", memory)
        module = sys.modules["tidar.distributed.parallelize"]  # the package's attribute is a function
        patch.setattr(module, "can_copy", lambda group, device: group.size() > 1)
        imitate_kernel(patch)
        yield
