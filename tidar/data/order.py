"""Which rank sees which sample when, and which documents are held out: functions of the seed alone."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from math import isqrt

import numpy as np

from tidar.config import derive_seed
from tidar.data.packing import EMPTY_ROW

Sample = tuple[int, int]  # epoch, row


class TrainingOrder:
    """The endless order of samples: every epoch holds each row once, shuffled by (seed, epoch).

    Yields epoch and row of each sample of this rank's micro-batches, from sample number `first_sample` of the run on.
    An optimizer step takes the next `local_batch_size * world_size * micro_batches` samples. They depend only on
    this number, not on its three factors: micro-batch m of rank r takes slice m * world_size + r. The row
    of a sample is computed from its number, so there is no list of them to hold or to save.
    """

    def __init__(self, n_rows: int, seed: int, first_sample: int, local_batch_size: int, rank: int, world_size: int):
        self.n_rows = n_rows
        self.seed = seed
        self.first_sample = first_sample
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Sample]]:
        sample = self.first_sample + self.rank * self.local_batch_size
        while True:
            yield [self.sample(number) for number in range(sample, sample + self.local_batch_size)]
            sample += self.local_batch_size * self.world_size

    def first_rows(self, micro_batches: int) -> list[int]:
        """The rows of the first `micro_batches` micro-batches, in order."""
        return [row for samples in islice(self, micro_batches) for _, row in samples]

    def sample(self, number: int) -> Sample:
        """Epoch and row of sample number `number` of the run."""
        epoch, position = divmod(number, self.n_rows)
        return epoch, shuffled(position, self.n_rows, f"{self.seed}/order/{epoch}")


def shuffled(position: int, n: int, key: str) -> int:
    """The image of `position` under a permutation of 0 to n - 1 that `key` selects.

    A Feistel network over pairs (left, right) of the least square that holds n, walked until it falls below n
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    side = isqrt(n - 1) + 1
    while True:
        left, right = divmod(position, side)
        for number in range(6):
            digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
            left, right = right, (left + int.from_bytes(digest, "little")) % side
        position = left * side + right
        if position < n:
            return position


def validation_order(
    n_rows: int, max_batches: int, local_batch_size: int, rank: int, world_size: int
) -> list[list[Sample]]:
    """Samples of this rank's validation batches: all rows in turn, or those of the first `max_batches` (-1: all).

    They are of epoch 0 whenever they are seen, so that what is drawn for a row repeats. Ranks get equally many batches
    of equal size, the last of them filled up with EMPTY_ROW.
    """
    stride = local_batch_size * world_size
    n_batches = -(-n_rows // stride)
    if max_batches != -1:
        n_batches = min(n_batches, max_batches)
    firsts = [batch * stride + rank * local_batch_size for batch in range(n_batches)]
    return [
        [(0, row if row < n_rows else EMPTY_ROW) for row in range(first, first + local_batch_size)] for first in firsts
    ]


def held_out_documents(n_documents: int, share: float, seed: int) -> np.ndarray:
    """Numbers of the documents that are not trained on, ascending: one of each stretch of 1 / share, drawn by the seed.

    At least one where share > 0 and there are two documents.
    """
    count = int(n_documents * share) or int(share > 0 and n_documents > 1)
    draws = np.random.Generator(np.random.Philox(key=derive_seed(seed, "held out") % 2**64)).random(count)
    return np.unique(((np.arange(count) + draws) * (n_documents / max(count, 1))).astype(np.int64))
