"""FSDP2's collectives by copy engines: GPUs of one host read each other's memory, and no SM takes part.

NCCL's kernels hold SMs while they run. A persistent matmul whose grid has one block for each SM then waits for those
blocks in a second round. Both collectives here lie in symmetric memory: a rank writes its buffer, waits until all have,
and copies its part of the others' buffers. That all have copied it shows when they wait in the next collective. With
enough buffers, each is written again only after that; those who have one buffer wait a second time.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from tidar.config import Config, print_lines

# of all layers: enough that a rank has met all others between two uses of a buffer (see the collectives below)
GATHER_BUFFERS, REDUCE_BUFFERS = 3, 2


def can_copy(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the ranks of a group, started by torchrun, have GPUs of one host that can read each other's memory.

    All ranks of the group call it, and get the same answer.
    """
    if device.type != "cuda" or group.size() == 1:
        return False
    if not _agreed(_are_near(group, device), group, device):
        return False
    error = ""
    try:
        Buffers(group, device, number=1, n_bytes=1)
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
        print_lines(f"warning: rank {dist.get_rank()}: symmetric memory does not work, so FSDP2 uses NCCL ({error})")
    return _agreed(not error, group, device)


def _are_near(group: dist.ProcessGroup, device: torch.device) -> bool:
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = dist.get_process_group_ranks(group)
    if len({rank // per_host for rank in ranks}) > 1:
        return False
    others = {rank % per_host for rank in ranks} - {device.index}
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def _agreed(holds: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    flag = torch.tensor(int(holds), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group)
    return bool(flag.item())


def exchanged_dtype(config: Config, micro_batches: int, param_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which ranks copy each other's gradients, whose sum is float32 in any case.

    Gradients that a rank accumulates over its micro-batches first stay float32.
    """
    reduces_each = config.parallelism.gradient_reduction == "micro_batch" or micro_batches == 1
    return param_dtype if reduces_each else torch.float32


def use_copies(model: Any, group: dist.ProcessGroup, device: torch.device, size: int, reduced_size: int) -> None:
    """Lets the layers of a model and the rest of it, each under FSDP2, copy from the other ranks of their group.

    size, reduced_size: bytes of an element that is gathered, and of one that is reduced.
    """
    layers = list(model.layers)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    of_layer = max(_padded_numel(layer.parameters(), group.size()) for layer in layers)
    others = (parameter for parameter in model.parameters() if id(parameter) not in inside)
    of_rest = _padded_numel(others, group.size())
    # made before anything computes: ranks wait for one another
    gathered = Buffers(group, device, GATHER_BUFFERS, of_layer * size)
    reduced = Buffers(group, device, REDUCE_BUFFERS, of_layer * reduced_size)
    # gathered first in a step and reduced last, so that one buffer does for both
    rest = Buffers(group, device, 1, of_rest * max(size, reduced_size))
    for layer in layers:
        layer.set_custom_all_gather(PeerAllGather(gathered))
        layer.set_custom_reduce_scatter(PeerReduceScatter(reduced))
    model.set_custom_all_gather(PeerAllGather(rest))
    model.set_custom_reduce_scatter(PeerReduceScatter(rest))


def _padded_numel(parameters: Iterable[Tensor], n_ranks: int) -> int:
    """Elements of parameters whose first dimension FSDP2 has sharded, each padded so that all its shards are equal."""
    return sum(-(-len(p) // n_ranks) * n_ranks * math.prod(p.shape[1:]) for p in parameters)


class Buffer(NamedTuple):
    """Bytes of this rank that the other ranks of a group read, and the handle to theirs."""

    memory: Tensor
    handle: Any


class Buffers:
    """`number` buffers of `n_bytes`, used in turn. All ranks of the group make and use them alike."""

    existing: ClassVar[WeakSet["Buffers"]] = WeakSet()

    def __init__(self, group: dist.ProcessGroup, device: torch.device, number: int, n_bytes: int):
        self.made: list[Buffer] = []
        self.turn, self.n_bytes = 0, number * n_bytes
        self.existing.add(self)
        for _ in range(number):
            # not from torch's memory pool: a block that it used again would keep the handle of an earlier group
            try:
                memory = symmetric_memory._SymmetricMemory.empty_strided_p2p((n_bytes,), (1,), torch.uint8, device)
            except RuntimeError as error:
                if "out of memory" in str(error):
                    raise torch.OutOfMemoryError(str(error)) from None
                raise
            self.made.append(Buffer(memory, symmetric_memory.rendezvous(memory, group)))

    def next(self, numel: int, dtype: torch.dtype) -> Tensor:
        memory = self.made[self.turn].memory
        self.turn = (self.turn + 1) % len(self.made)
        return memory[: numel * dtype.itemsize].view(dtype)

    def handle(self, tensor: Tensor) -> Any:
        """Handle of the buffer that a tensor lies in."""
        return next(made.handle for made in self.made if made.memory.data_ptr() == tensor.data_ptr())

    def finish(self, handle: Any) -> None:
        """After this rank's copies: a buffer that is used alone may be written again once all ranks have copied."""
        if len(self.made) == 1:
            handle.barrier()


def buffer_bytes() -> int:
    """Memory of this device in buffers, which is not in what torch counts."""
    return sum(buffers.n_bytes for buffers in Buffers.existing)


class PeerAllGather:
    """FSDP2's all-gather: each rank's shard lies in its place of the result, and the others copy it from there.

    FSDP2 has copied a result out of its buffer before the next but one is written (torch 2.11 to 2.13). So when a rank
    writes one of GATHER_BUFFERS again, it has met all others in the collective after the buffer's last one.
    """

    def __init__(self, buffers: Buffers):
        self.buffers = buffers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.buffers.next(math.prod(size), dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        handle, numel = self.buffers.handle(output_tensor), input_tensor.numel()
        handle.barrier()
        for peer in peers(handle):
            theirs = handle.get_buffer(peer, (numel,), output_tensor.dtype, peer * numel)
            output_tensor[peer * numel : (peer + 1) * numel].copy_(theirs)
        self.buffers.finish(handle)


class PeerReduceScatter:
    """FSDP2's reduce-scatter: copies of the other ranks' gradients, in their dtype, which are summed in float32.

    FSDP2 writes gradients into a buffer when the reduce-scatter before has ended (torch 2.11 to 2.13). So when a rank
    writes one of REDUCE_BUFFERS again, it has met all others in the collective after the buffer's last one.
    """

    def __init__(self, buffers: Buffers):
        from tidar.kernels.term_sum import sum_terms  # needs Triton

        self.buffers, self.sum = buffers, sum_terms
        self.is_filled = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First the buffer for FSDP2's gradients, then the result, which FSDP2 would have in their dtype."""
        self.is_filled = not self.is_filled
        if self.is_filled:
            return self.buffers.next(math.prod(size), dtype)
        return torch.empty(size, dtype=torch.float32, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        handle, numel = self.buffers.handle(input_tensor), output_tensor.numel()
        first = handle.rank * numel
        others = input_tensor.new_empty(handle.world_size - 1, numel)
        handle.barrier()
        for term, peer in zip(others, peers(handle)):
            term.copy_(handle.get_buffer(peer, (numel,), term.dtype, first))
        self.buffers.finish(handle)
        self.sum(output_tensor, input_tensor[first : first + numel], others)


def peers(handle: Any) -> list[int]:
    """The other ranks, in an order in which no two ranks copy from the same one."""
    return [(handle.rank + step) % handle.world_size for step in range(1, handle.world_size)]
