"""How far a run has come, and on which data."""

from pathlib import Path

import torch
from torch import Tensor

from tidar.config import UserError


class Progress:
    """Counts of a run. `state` holds them as tensors, which a checkpoint restores in place."""

    def __init__(self, n_rows: int, data_identity: int, device: torch.device):
        """n_rows: of the training data. data_identity: int64 that stands for the data and its order."""
        self.n_rows = n_rows
        self.data_identity = data_identity
        # epoch_sums: weight, nll, right arg-maxes of both losses since the last epoch's end
        self.state: dict[str, Tensor] = {
            "step": torch.zeros((), dtype=torch.long),
            "samples": torch.zeros((), dtype=torch.long),
            "rows": torch.tensor(n_rows),
            "data": torch.tensor(data_identity),
            "epoch_sums": torch.zeros(3, 2, dtype=torch.float64, device=device),
        }

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    @property
    def samples(self) -> int:
        """Samples taken in these steps, by all ranks."""
        return int(self.state["samples"])

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.samples // self.n_rows

    def add_step(self, samples: int, weights: Tensor, sums: Tensor) -> None:
        """Counts a step of so many samples, and its sums of `tidar.training.scores` where they are finite."""
        self.state["step"] += 1
        self.state["samples"] += samples
        self.state["epoch_sums"] += torch.where(sums.isfinite().all(), torch.cat([weights[None], sums]), 0)

    def take_epoch_sums(self) -> list[list[float]]:
        """What has added up since this was called last."""
        sums = self.state["epoch_sums"].tolist()
        self.state["epoch_sums"].zero_()
        return sums

    def check(self, folder: Path) -> None:
        """Raises UserError where what was restored is that of a run on other data. folder: of the run."""
        before = int(self.state["rows"])
        if before != self.n_rows:
            raise UserError(
                f"{folder} was trained on {before} rows, and the data has {self.n_rows}: "
                "go on with the same data and training.seq_len, or choose another job.dump_folder"
            )
        if int(self.state["data"]) != self.data_identity:
            raise UserError(
                f"{folder} was trained with other data, another training.seed, or other options of packing, "
                "weights or validation: go on with the same, or choose another job.dump_folder"
            )
