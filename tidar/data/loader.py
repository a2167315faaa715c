"""Which rank sees which sample when, and batches made in the background."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tidar.config import derive_seed
from tidar.data.packing import EMPTY_ROW, PackedRows, Row
from tidar.patterns import PADDING, ModelBatch, Pattern


class TrainingOrder:
    """The endless order of samples: every epoch holds each row once, shuffled by (seed, epoch).

    Yields the rows of this rank's micro-batches, from sample number `first_sample` of the run on. An optimizer step
    takes the next `local_batch_size * world_size * micro_batches` samples, and which they are does not depend on how
    these three make up their product: micro-batch m of rank r takes slice m * world_size + r.
    """

    def __init__(self, n_rows: int, seed: int, first_sample: int, local_batch_size: int, rank: int, world_size: int):
        self.n_rows = n_rows
        self.seed = seed
        self.first_sample = first_sample
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, shuffled = -1, []
        sample = self.first_sample + self.rank * self.local_batch_size
        while True:
            rows = []
            for number in range(sample, sample + self.local_batch_size):
                if number // self.n_rows != epoch:
                    epoch = number // self.n_rows
                    shuffled = self._shuffle(epoch)
                rows.append(shuffled[number % self.n_rows])
            yield rows
            sample += self.local_batch_size * self.world_size

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.n_rows, generator=generator).tolist()


def validation_order(
    n_rows: int, max_batches: int, local_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Rows of this rank's validation batches: all in turn, or those of the first `max_batches` (-1: all).

    Ranks get equally many batches of equal size, the last of them filled up with EMPTY_ROW.
    """
    stride = local_batch_size * world_size
    n_batches = -(-n_rows // stride)
    if max_batches != -1:
        n_batches = min(n_batches, max_batches)
    firsts = [batch * stride + rank * local_batch_size for batch in range(n_batches)]
    return [[row if row < n_rows else EMPTY_ROW for row in range(first, first + local_batch_size)] for first in firsts]


@dataclass
class Batch:
    """A micro-batch: what the model sees, and how much it is.

    n_tokens: tokens of documents, padding not counted. allowed_pairs: query-key pairs of the mask.
    """

    rows: ModelBatch
    n_tokens: int
    allowed_pairs: int

    def pin_memory(self) -> "Batch":
        return _map_tensors(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`; the host does not wait for it where the batch lies in pinned memory."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def make_loader(dataset: PackedRows, order, pattern: Pattern, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of `dataset` laid out by `pattern`, in `order`, prepared by `num_workers` background processes."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=partial(_collate, pattern),
        num_workers=num_workers,
        pin_memory=pin_memory,
        # the loader draws a seed for its workers; it must not touch the run's random state
        generator=torch.Generator(),
    )


def _collate(pattern: Pattern, samples: list[Row]) -> Batch:
    tokens, document_ids, loss_mask = (torch.stack(column) for column in zip(*samples))
    rows = pattern.layout(tokens, document_ids, loss_mask)
    return Batch(rows, int((document_ids != PADDING).sum()), pattern.allowed_pairs(rows.documents.lengths()))


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value)(**{key: _map_tensors(item, function) for key, item in vars(value).items()})
    return value
