"""Sums over target tokens by loss. Means are computed from them once, so they do not depend on how a batch is split."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tidar.losses.objective import TokenScores
from tidar.patterns import LOSSES, Targets

# names of the arg-max accuracies
ACCURACIES = {"ar": "accuracy", "diffusion": "accuracy_diff"}


def target_weights(targets: dict[str, Targets]) -> Tensor:
    """Sum of the target weights of each of LOSSES, `[2]` float64; 0 for a loss that the pattern does not have."""
    return _by_loss({loss: target.weights.double().sum() for loss, target in targets.items()})


@dataclass(frozen=True)
class LossSums:
    """Sums over target tokens for each of LOSSES; 0 for a loss that the pattern does not have.

    `values`: `[3, 2]` float64. Columns are LOSSES. Rows are the sum of the target weights, and the weighted sums of the
    cross-entropy in nats and of the correct arg-maxes.
    """

    values: Tensor

    @staticmethod
    def zeros(device: torch.device) -> "LossSums":
        return LossSums(torch.zeros(3, len(LOSSES), dtype=torch.float64, device=device))

    @staticmethod
    def of(targets: dict[str, Targets], scores: dict[str, TokenScores]) -> "LossSums":
        """Sums of one micro-batch. targets and scores have the same losses."""
        columns = {}
        for loss, target in targets.items():
            weights, score = target.weights.double(), scores[loss]
            columns[loss] = torch.stack([weights.sum(), score.nll.double() @ weights, score.correct.double() @ weights])
        return LossSums(_by_loss(columns))

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(self.values + other.values)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds the sums of all ranks of `group` (default: of all ranks), in place."""
        dist.all_reduce(self.values, group=group)

    def is_finite(self) -> Tensor:
        """Whether all sums are, scalar bool on their device."""
        return self.values.isfinite().all()

    def has_targets(self) -> Tensor:
        """Whether any target weighs more than 0, scalar bool on their device."""
        return self.values[0].sum() > 0

    def means(self, loss_weights: dict[str, float]) -> dict[str, float]:
        """`loss`, and the mean (`<loss>_loss`) and accuracy of each loss that has targets; nothing where none has.

        loss_weights: of the losses that the pattern has. Waits for the device.
        """
        total, means, accuracies = 0.0, {}, {}
        for loss, (weight, nll, correct) in zip(LOSSES, self.values.T.tolist()):
            if loss in loss_weights and weight:
                means[f"{loss}_loss"], accuracies[ACCURACIES[loss]] = nll / weight, correct / weight
                total += loss_weights[loss] * means[f"{loss}_loss"]
        return {"loss": total / sum(loss_weights.values())} | means | accuracies if means else {}


def _by_loss(columns: dict[str, Tensor]) -> Tensor:
    """The tensors of each of LOSSES side by side in a new last dimension; 0 for one that is missing."""
    zero = torch.zeros_like(next(iter(columns.values())))
    return torch.stack([columns.get(loss, zero) for loss in LOSSES], dim=-1)
