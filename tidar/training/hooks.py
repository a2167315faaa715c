"""Callbacks by which benchmarks and tests observe and change a run."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tidar.data import Batch
from tidar.losses.objective import TokenScores
from tidar.patterns import ModelBatch


class Hooks:
    """Called by a Trainer on each rank; these do nothing, a subclass overrides what it needs.

    trainer: the `tidar.training.trainer.Trainer`. `trainer.step` is the number of completed steps.
    """

    def batches(self, trainer: Any, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Returns the micro-batches to train on. batches: those of the data."""
        return batches

    def on_micro_batch(self, trainer: Any, rows: ModelBatch, loss: Tensor, scores: dict[str, TokenScores]) -> Tensor:
        """After the forward pass of a micro-batch, in training and, without gradients, in validation.

        loss: the micro-batch's share of the step's loss, a scalar. Returns the loss to differentiate.
        """
        return loss

    def after_step(self, trainer: Any) -> None:
        """After the update of the parameters, before validation, export and checkpoint."""

    def reports_step(self, trainer: Any) -> bool:
        """Whether to report a step that is due by metrics.log_freq."""
        return True
