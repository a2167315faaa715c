"""Collectives by copies, of ranks that are simulated in one process; real ones are in processes and gpu."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peer_memory import Handle, imitate_kernel

from tidar.distributed import peer_copies
from tidar.distributed.peer_copies import (
    GATHER_BUFFERS,
    REDUCE_BUFFERS,
    Buffer,
    Buffers,
    PeerAllGather,
    PeerReduceScatter,
)

CUDA = torch.device("cuda", 0)
WORKS = 100  # of each stream


def simulated(n_ranks: int, number: int, n_bytes: int, wait: Callable[[], Any] | None = None) -> list[Buffers]:
    """The buffers of each rank. Without `wait` a test writes all of them before it lets a rank copy."""
    memories = [[torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(n_ranks)] for _ in range(number)]
    ranks = [object.__new__(Buffers) for _ in range(n_ranks)]
    for rank, buffers in enumerate(ranks):
        buffers.made = [Buffer(of_all[rank], Handle(of_all, rank, wait)) for of_all in memories]
        buffers.turn = 0
    return ranks


def test_ranks_get_what_the_collectives_give(monkeypatch):
    imitate_kernel(monkeypatch)
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


class Streams:
    """Threads that work as a rank's streams do, each as late as it likes."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.done = {name: [threading.Event() for _ in range(WORKS)] for name in ("write", "communicate", "use")}
        self.threads: list[threading.Thread] = []

    def start(self, stream: str, work: Callable[[int], Any], other: str, distance: int) -> None:
        """The i-th work of a stream begins when the other stream has done its work i - distance."""

        def run() -> None:
            for i, late in enumerate(delays):
                assert i < distance or self.done[other][i - distance].wait(30)
                time.sleep(late)
                work(i)
                self.done[stream][i].set()

        delays = [self.rng.choice([0, 0, 1e-3]) for _ in range(WORKS)]
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()


@pytest.mark.parametrize(
    "collective, number, distance",
    [("gather", GATHER_BUFFERS, 2), ("gather", 1, 1), ("reduce", REDUCE_BUFFERS, 1), ("reduce", 1, 1)],
)
def test_no_buffer_is_written_before_all_ranks_have_copied(monkeypatch, collective, number, distance):
    """Streams of ranks in the order that FSDP2 keeps: a buffer is written when the all-gather before the last one has
    been copied out (of a module alone: the last one), or when the last reduce-scatter has ended.
    """
    imitate_kernel(monkeypatch)
    n_ranks, rng, found = 3, random.Random(0), []
    barrier, delays = threading.Barrier(n_ranks), iter(lambda: rng.choice([0, 0, 2e-3]), None)

    def wait() -> None:
        barrier.wait(30)
        time.sleep(next(delays))

    is_gather = collective == "gather"
    all_buffers = simulated(n_ranks, number, 4 * n_ranks, wait)

    def start(rank: int, buffers: Buffers) -> Streams:
        one = PeerAllGather(buffers) if is_gather else PeerReduceScatter(buffers)
        streams, written, result = Streams(rng), {}, {}

        def write(i: int) -> None:
            written[i] = one.allocate((n_ranks,), dtype=torch.float32, device=CUDA)
            written[i][rank if is_gather else slice(None)] = 10.0 * i + rank

        def communicate(i: int) -> None:
            if is_gather:
                one(written[i], written[i][rank : rank + 1], group=None)
                result[i] = written[i]
            else:
                result[i] = one.allocate((1,), dtype=torch.float32, device=torch.device("cpu"))
                one(result[i], written[i])

        def use(i: int) -> None:
            expected = [10.0 * i + other for other in range(n_ranks)]
            found.append(result[i].tolist() == (expected if is_gather else [sum(expected)]))

        streams.start("write", write, "use" if is_gather else "communicate", distance)
        streams.start("communicate", communicate, "write", 0)
        streams.start("use", use, "communicate", 0)
        return streams

    for streams in [start(rank, buffers) for rank, buffers in enumerate(all_buffers)]:
        for thread in streams.threads:
            thread.join()
    assert found == [True] * n_ranks * WORKS


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
