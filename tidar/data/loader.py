"""Batches made in the background."""

import dataclasses
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tidar.data.packing import PackedRows, Row
from tidar.patterns import PADDING, ModelBatch, Pattern


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
        # with their parent's memory: a corpus is mapped, and must not be copied
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory,
        # the loader draws a seed for its workers; it must not touch the run's random state
        generator=torch.Generator(),
    )


def _collate(pattern: Pattern, samples: list[Row]) -> Batch:
    tokens, document_ids, loss_mask = (torch.stack(column) for column in zip(*samples))
    rows = pattern.layout(tokens, document_ids, loss_mask)
    return Batch(rows, int((document_ids != PADDING).sum()), pattern.allowed_pairs(rows.documents.lengths()))


def _ignore_signals(worker: int) -> None:
    """A launcher signals all processes of a rank, which decides for itself when its workers end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value)(**{key: _map_tensors(item, function) for key, item in vars(value).items()})
    return value
