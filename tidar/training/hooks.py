"""Where benchmarks and tests look into a run, and step in."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from tidar.data import Batch
from tidar.losses.objective import TokenScores
from tidar.patterns import ModelBatch

if TYPE_CHECKING:
    from tidar.training.trainer import Trainer


class Hooks:
    """Called by a Trainer at these moments, on each rank. Here they do nothing: a subclass says what to do.

    `trainer.step` is the number of steps done.
    """

    def batches(self, trainer: "Trainer", batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches to train on, in place of these."""
        return batches

    def on_micro_batch(
        self, trainer: "Trainer", rows: ModelBatch, loss: Tensor, scores: dict[str, TokenScores]
    ) -> Tensor:
        """After the forward pass of a micro-batch, in training and, without gradients, in validation.

        loss: the micro-batch's share of the step's loss, a scalar. Returns the loss to differentiate.
        """
        return loss

    def after_step(self, trainer: "Trainer") -> None:
        """After the update of the parameters, before what else is due: validation, export, checkpoint."""

    def reports_step(self, trainer: "Trainer") -> bool:
        """Whether to report a step that metrics.log_freq wants reported."""
        return True
