"""Collectives by copies, of ranks that are simulated one after the other; real ones are in tests/gpu."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tidar.distributed import peer_copies
from tidar.distributed.peer_copies import Buffer, Buffers, PeerAllGather, PeerReduceScatter

CUDA = torch.device("cuda", 0)


class Handle:
    """To the buffers of all ranks. Barriers do not wait: the test writes all buffers before it lets a rank copy."""

    def __init__(self, memories: list[Tensor], rank: int):
        self.memories, self.rank, self.world_size = memories, rank, len(memories)

    def barrier(self) -> None:
        pass

    def get_buffer(self, peer: int, sizes: tuple[int], dtype: torch.dtype, offset: int) -> Tensor:
        return self.memories[peer].view(dtype)[offset : offset + sizes[0]]


def simulated(n_ranks: int, number: int, n_bytes: int) -> list[Buffers]:
    """The buffers of each rank."""
    memories = [[torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(n_ranks)] for _ in range(number)]
    ranks = [object.__new__(Buffers) for _ in range(n_ranks)]
    for rank, buffers in enumerate(ranks):
        buffers.made = [Buffer(of_all[rank], Handle(of_all, rank)) for of_all in memories]
        buffers.turn = 0
    return ranks


def sum_terms(total: Tensor, term: Tensor, others: Tensor) -> None:
    """What tidar.kernels.term_sum does, without Triton."""
    total.copy_(term.float())
    for other in others:
        total += other.float()


def test_ranks_get_what_the_collectives_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "tidar.kernels.term_sum", SimpleNamespace(sum_terms=sum_terms))
    rng = random.Random(0)
    for _ in range(20):
        n_ranks, dtype = rng.randint(2, 5), rng.choice([torch.bfloat16, torch.float32])
        numel, dtype_size = rng.randint(1, 9), dtype.itemsize
        gathers = [PeerAllGather(one) for one in simulated(n_ranks, 2, 9 * n_ranks * dtype_size)]
        reduces = [PeerReduceScatter(one) for one in simulated(n_ranks, 1, 9 * n_ranks * dtype_size)]
        for _ in range(3):
            shards = torch.randn(n_ranks, numel).to(dtype)
            outputs = [gather.allocate((n_ranks * numel,), dtype=dtype, device=CUDA) for gather in gathers]
            inputs = [output[rank * numel : (rank + 1) * numel] for rank, output in enumerate(outputs)]
            for mine, shard in zip(inputs, shards):
                mine.copy_(shard)
            for gather, output, mine in zip(gathers, outputs, inputs):
                gather(output, mine, group=None)
                assert output.equal(shards.flatten())

            gradients = torch.randn(n_ranks, n_ranks, numel).to(dtype)  # of a rank, for a rank
            inputs = [reduce.allocate((n_ranks * numel,), dtype=dtype, device=CUDA) for reduce in reduces]
            for mine, gradient in zip(inputs, gradients):
                mine.copy_(gradient.flatten())
            for rank, (reduce, mine) in enumerate(zip(reduces, inputs)):
                total = reduce.allocate((numel,), dtype=dtype, device=torch.device("cpu"))
                reduce(total, mine, group=None, op=None)
                assert total.dtype == torch.float32
                torch.testing.assert_close(total, gradients[:, rank].float().sum(0))


@pytest.mark.parametrize(
    "ranks, per_host, unreachable, near",
    [
        ([0, 1], 2, set(), True),
        ([0, 1, 2, 3], 4, {2}, False),
        ([4, 5, 6, 7], 8, set(), True),
        ([4, 5, 6, 7], 4, set(), True),  # of the second host
        ([2, 3, 4, 5], 4, set(), False),
        ([0, 1], 1, set(), False),
    ],
)
def test_only_gpus_of_one_host_that_reach_each_other_copy(monkeypatch, ranks, per_host, unreachable, near):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_host))
    monkeypatch.setattr(peer_copies.dist, "get_process_group_ranks", lambda group: ranks)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: other not in unreachable)
    assert peer_copies._are_near(None, torch.device("cuda", ranks[0] % per_host)) == near


def test_padding_makes_all_shards_equal():
    parameters = [torch.empty(5, 3), torch.empty(7), torch.empty(4, 2, 2)]
    assert peer_copies._padded_numel(parameters, 2) == 6 * 3 + 8 + 16
    assert peer_copies._padded_numel(parameters, 3) == 6 * 3 + 9 + 6 * 4
