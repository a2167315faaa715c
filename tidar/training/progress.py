"""The counts of a run, and the identity of its data."""

import math
import time

import torch
from torch import Tensor

from tidar.config.options import Training
from tidar.losses.sums import LossSums


class Progress:
    """Counts of a run. `state` holds them as tensors, which a checkpoint restores in place."""

    def __init__(self, n_rows: int, data_identity: int, device: torch.device):
        """n_rows: of the training data. data_identity: int64 hash of the data and their order."""
        self.n_rows = n_rows
        self.data_identity = data_identity
        self.clock = time.monotonic()
        # seconds: wall time of all processes that have trained the run, startup included
        # epoch_sums: the values of the LossSums since the end of the last epoch;
        # interrupted: what is due after the last step and a stop has interrupted: a validation (1), an epoch's export
        # (its number)
        self.state: dict[str, Tensor] = {
            "step": torch.zeros((), dtype=torch.long),
            "samples": torch.zeros((), dtype=torch.long),
            "tokens": torch.zeros((), dtype=torch.long, device=device),
            "seconds": torch.zeros((), dtype=torch.float64),
            "interrupted": torch.zeros(2, dtype=torch.long),
            "rows": torch.tensor(n_rows),
            "data": torch.tensor(data_identity),
            "epoch_sums": LossSums.zeros(device).values,
        }

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    @property
    def samples(self) -> int:
        """Samples of these steps, over all ranks."""
        return int(self.state["samples"])

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.samples // self.n_rows

    def add_step(self, samples: int, tokens: Tensor, sums: LossSums) -> None:
        """Counts a step with these samples and tokens, and adds its sums to those of the epoch if they are finite."""
        self.state["step"] += 1
        self.state["samples"] += samples
        self.state["tokens"] += tokens.long()
        self.state["epoch_sums"] += torch.where(sums.is_finite(), sums.values, 0)

    @property
    def is_interrupted(self) -> bool:
        """Whether a validation or an export was due after the last step, and a stop has interrupted it."""
        return bool(self.state["interrupted"].any())

    @property
    def validates_again(self) -> bool:
        """Whether it was the validation that was interrupted."""
        return bool(self.state["interrupted"][0])

    def interrupt(self, validates: bool, epoch: int) -> None:
        """Notes what is due after the step: a validation, and the export of an epoch (0 for none)."""
        self.state["interrupted"].copy_(torch.tensor([validates, epoch]))

    def epoch_to_export(self, every: int, epochs_before: int) -> int:
        """The last ended epoch that is a multiple of `every`, if it ended after epoch `epochs_before`; otherwise 0."""
        number = self.epoch // every * every if every else 0
        return number if number > epochs_before else 0

    def steps_of(self, training: Training, global_batch_size: int) -> int:
        """Steps of the whole run, the ones done included."""
        if not training.epochs:
            return training.steps
        samples_left = training.epochs * self.n_rows - self.samples
        # without the rounding of a number of epochs like 1.1
        return self.step + max(0, math.ceil(round(samples_left / global_batch_size, 6)))

    def is_due(self, every: int, last: int, ahead: int = 0) -> bool:
        """Whether something is due now that happens every `every` steps (0: never) and after step `last`.

        ahead: asks the same for so many steps later.
        """
        step = self.step + ahead
        return step == last or (every > 0 and step % every == 0)

    def count_time(self) -> None:
        """Adds the time since the last call, or since this object was created."""
        now = time.monotonic()
        self.state["seconds"] += now - self.clock
        self.clock = now

    def counts(self) -> dict[str, float]:
        """Samples, tokens and seconds so far. Synchronizes the device."""
        return {name: self.state[name].item() for name in ("samples", "tokens", "seconds")}

    def take_epoch_sums(self) -> LossSums:
        """Sums since the last call."""
        sums = LossSums(self.state["epoch_sums"].clone())
        self.state["epoch_sums"].zero_()
        return sums

    def differences(self) -> list[str]:
        """How the data differ from those of the checkpoint that was loaded. Then records this run's data."""
        found = []
        before = int(self.state["rows"])
        if before != self.n_rows:
            found.append(f"rows of data: {before} -> {self.n_rows}")
        elif int(self.state["data"]) != self.data_identity:
            found.append("data, or options of packing, weights or validation")
        self.state["rows"].fill_(self.n_rows)
        self.state["data"].fill_(self.data_identity)
        return found
