"""Sums over target tokens by loss. Means are made of them once, so they do not depend on how a batch is cut."""

import torch
from torch import Tensor

from tidar.objective import TokenScores
from tidar.patterns import Targets

LOSSES = ("ar", "diffusion")


def target_weights(targets: dict[str, Targets]) -> Tensor:
    """Sum of the target weights of each of LOSSES, `[2]` float64."""
    return torch.stack([targets[loss].weights.double().sum() for loss in LOSSES])


def score_sums(targets: dict[str, Targets], scores: dict[str, TokenScores]) -> Tensor:
    """Weighted sums of nll (first row) and of right arg-maxes (second row) of each of LOSSES, `[2, 2]` float64."""
    columns = []
    for loss in LOSSES:
        weights = targets[loss].weights.double()
        columns.append(torch.stack([scores[loss].nll.double() @ weights, scores[loss].correct.double() @ weights]))
    return torch.stack(columns, dim=1)


def mean_scores(weights: list[float], sums: list[list[float]], loss_weights: dict[str, float]) -> dict[str, float]:
    """loss, ar_loss, diffusion_loss, accuracy, accuracy_diff of the sums; 0 where there was no target."""
    (ar_loss, diffusion_loss), (accuracy, accuracy_diff) = (
        [total / weight if weight else 0.0 for total, weight in zip(row, weights)] for row in sums
    )
    loss = (loss_weights["ar"] * ar_loss + loss_weights["diffusion"] * diffusion_loss) / sum(loss_weights.values())
    return {
        "loss": loss,
        "ar_loss": ar_loss,
        "diffusion_loss": diffusion_loss,
        "accuracy": accuracy,
        "accuracy_diff": accuracy_diff,
    }
