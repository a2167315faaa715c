"""Batches made in the background."""

import atexit
import dataclasses
import mmap
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tidar.config import derive_seed
from tidar.data.order import Sample
from tidar.data.packing import PackedRows, Row
from tidar.patterns import PADDING, ModelBatch, Pattern

# what a launcher or a scheduler sends to all processes of a run
SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
# shared with workers, and set when the process that forked them ends: only then do they obey the SIGTERM with which
# multiprocessing ends them
_parent_ends = mmap.mmap(-1, 1)
atexit.register(_parent_ends.__setitem__, 0, 1)


@dataclass
class Batch:
    """A micro-batch: what the model sees, and how many tokens of documents it is, padding not counted.

    The tokens are those of whole rows, where the model sees a rank's share of them.
    """

    rows: ModelBatch
    n_tokens: int

    def pin_memory(self) -> "Batch":
        return _map_tensors(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`; the host does not wait for it where the batch lies in pinned memory."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


class _Loader(DataLoader):
    def __iter__(self):
        # workers inherit the blocked signals: one that came before their handlers stand would kill them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Samples(torch.utils.data.Dataset):
    """Rows by (epoch, row), which are given out with them."""

    def __init__(self, rows: PackedRows):
        self.rows = rows

    def __getitem__(self, sample: Sample) -> tuple[Sample, Row]:
        return sample, self.rows[sample[1]]


def make_loader(
    dataset: PackedRows,
    order,
    pattern: Pattern,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    share: Callable[[ModelBatch], ModelBatch] | None = None,
) -> DataLoader:
    """Batches of `dataset` laid out by `pattern`, in `order`, prepared by `num_workers` background processes.

    order: an iterable of lists of samples. seed: all that is random about a sample is a function of it, the sample's
    epoch and its row. share: takes this rank's positions of the rows; by default all.
    """
    return _Loader(
        _Samples(dataset),
        batch_sampler=order,
        collate_fn=partial(_collate, pattern, seed, share),
        num_workers=num_workers,
        # with their parent's memory: a corpus is mapped, and must not be copied
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory,
        # the loader draws a seed for its workers; it must not touch the run's random state
        generator=torch.Generator(),
    )


def _collate(
    pattern: Pattern,
    seed: int,
    share: Callable[[ModelBatch], ModelBatch] | None,
    samples: list[tuple[Sample, Row]],
) -> Batch:
    tokens, document_ids, loss_mask = (torch.stack(column) for column in zip(*(row for _, row in samples)))
    seeds = [derive_seed(seed, "pattern", *sample) for sample, _ in samples]
    rows = pattern.layout(tokens, document_ids, loss_mask, seeds)
    return Batch(share(rows) if share else rows, int((document_ids != PADDING).sum()))


def _ignore_signals(worker: int) -> None:
    """A launcher signals all processes of a rank, which decides for itself when its workers end."""

    def end_with_parent(*_: Any) -> None:
        if _parent_ends[0]:
            os._exit(0)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_with_parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        build: Any = type(value)
        return build(**{key: _map_tensors(item, function) for key, item in vars(value).items()})
    return value
