"""Sums over target tokens by loss. Means are made of them once, so they do not depend on how a batch is cut."""

import torch
from torch import Tensor

from tidar.losses.objective import TokenScores
from tidar.patterns import LOSSES, Targets

# names of the arg-max accuracies
ACCURACIES = {"ar": "accuracy", "diffusion": "accuracy_diff"}


def target_weights(targets: dict[str, Targets]) -> Tensor:
    """Sum of the target weights of each of LOSSES, `[2]` float64; 0 for one that the pattern does not have."""
    sums = {loss: target.weights.double().sum() for loss, target in targets.items()}
    none = torch.zeros_like(next(iter(sums.values())))
    return torch.stack([sums.get(loss, none) for loss in LOSSES])


def score_sums(targets: dict[str, Targets], scores: dict[str, TokenScores]) -> Tensor:
    """Weighted sums of nll (first row) and of right arg-maxes (second row) of each of LOSSES, `[2, 2]` float64."""
    columns = {}
    for loss, target in targets.items():
        weights = target.weights.double()
        columns[loss] = torch.stack([scores[loss].nll.double() @ weights, scores[loss].correct.double() @ weights])
    none = torch.zeros_like(next(iter(columns.values())))
    return torch.stack([columns.get(loss, none) for loss in LOSSES], dim=1)


def mean_scores(weights: list[float], sums: list[list[float]], loss_weights: dict[str, float]) -> dict[str, float]:
    """loss, and of each of the pattern's losses its mean and its accuracy; 0 where there was no target.

    loss_weights: of the losses that the pattern has. The names of one that it does not have are absent.
    """
    means, accuracies = {}, {}
    for loss, weight, *totals in zip(LOSSES, weights, *sums):
        if loss in loss_weights:
            means[f"{loss}_loss"], accuracies[ACCURACIES[loss]] = (
                total / weight if weight else 0.0 for total in totals
            )
    total = sum(weight * means[f"{loss}_loss"] for loss, weight in loss_weights.items())
    return {"loss": total / sum(loss_weights.values())} | means | accuracies
