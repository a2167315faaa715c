"""FSDP2's collectives by copy engines: GPUs of one host read each other's memory, and no SM takes part.

NCCL's kernels hold SMs while they run. A persistent matmul whose grid has one block for each SM then waits for those
blocks in a second round. Both collectives here lie in symmetric memory: a rank writes its buffer, waits until all have,
copies its part of the others' buffers, and waits until all have copied, so that the buffer can be written again.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from tidar.config import print_lines


def can_copy(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the ranks of a group, started by torchrun, have GPUs of one host that can read each other's memory.

    All ranks of the group call it.
    """
    if device.type != "cuda" or group.size() == 1:
        return False
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = dist.get_process_group_ranks(group)
    if len({rank // per_host for rank in ranks}) > 1:
        return False
    others = {rank % per_host for rank in ranks} - {device.index}
    if not all(torch.cuda.can_device_access_peer(device, other) for other in others):
        return False
    error = ""
    try:
        Buffers(group, 1).next(1, torch.uint8, device)
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
    works = torch.tensor(not error, dtype=torch.int32)
    dist.all_reduce(works, dist.ReduceOp.MIN, group)
    if error:
        print_lines(f"warning: rank {dist.get_rank()}: FSDP2 uses NCCL, for symmetric memory does not work ({error})")
    return bool(works)


class Buffer(NamedTuple):
    """Bytes of this rank that the other ranks of a group read, and the handle to theirs."""

    memory: Tensor
    handle: Any


class Buffers:
    """Up to `number` buffers, used in turn, each as long as what it is first used for. All ranks use them alike."""

    def __init__(self, group: dist.ProcessGroup, number: int):
        self.group, self.number = group, number
        self.made: list[Buffer] = []
        self.turn = 0

    def next(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        index, self.turn = self.turn, (self.turn + 1) % self.number
        n_bytes = numel * dtype.itemsize
        if index == len(self.made):
            # not from torch's memory pool: a block that it used again would keep the handle of an earlier group
            memory = symmetric_memory._SymmetricMemory.empty_strided_p2p((n_bytes,), (1,), torch.uint8, device)
            self.made.append(Buffer(memory, symmetric_memory.rendezvous(memory, self.group)))
        return self.made[index].memory[:n_bytes].view(dtype)

    def handle(self, tensor: Tensor) -> Any:
        """Of the buffer that a tensor lies in."""
        return next(made.handle for made in self.made if made.memory.data_ptr() == tensor.data_ptr())


class PeerAllGather:
    """FSDP2's all-gather: each rank's shard lies in its place of the result, and the others copy it from there.

    FSDP2 has copied a result out of its buffer before it asks for the next but one (torch 2.11 to 2.13): two buffers
    are enough for modules that follow each other, one for a module alone.
    """

    def __init__(self, buffers: Buffers):
        self.buffers = buffers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.buffers.next(math.prod(size), dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        handle, numel = self.buffers.handle(output_tensor), input_tensor.numel()
        handle.barrier()
        for peer in peers(handle):
            theirs = handle.get_buffer(peer, (numel,), output_tensor.dtype, peer * numel)
            output_tensor[peer * numel : (peer + 1) * numel].copy_(theirs)
        handle.barrier()


class PeerReduceScatter:
    """FSDP2's reduce-scatter: copies of the other ranks' gradients, in their dtype, which are summed in float32.

    FSDP2 writes gradients into the buffer when the reduce-scatter before has ended (torch 2.11 to 2.13): one is enough
    for all modules of a size.
    """

    def __init__(self, buffers: Buffers):
        from tidar.kernels.term_sum import sum_terms  # needs Triton

        self.buffers, self.sum = buffers, sum_terms
        self.is_filled = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First the buffer for FSDP2's gradients, then the result, which FSDP2 would have in their dtype."""
        self.is_filled = not self.is_filled
        if self.is_filled:
            return self.buffers.next(math.prod(size), dtype, device)
        return torch.empty(size, dtype=torch.float32, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        handle, numel = self.buffers.handle(input_tensor), output_tensor.numel()
        first = handle.rank * numel
        others = input_tensor.new_empty(handle.world_size - 1, numel)
        handle.barrier()
        for term, peer in zip(others, peers(handle)):
            term.copy_(handle.get_buffer(peer, (numel,), term.dtype, first))
        handle.barrier()
        self.sum(output_tensor, input_tensor[first : first + numel], others)


def peers(handle: Any) -> list[int]:
    """The other ranks, in an order in which no two ranks copy from the same one."""
    return [(handle.rank + step) % handle.world_size for step in range(1, handle.world_size)]
