"""What makes a run slow: ranks that wait for data, or for one another."""

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tidar.distributed import World

DATA_SHARE = 0.05  # of the time, spent waiting for data
RANK_SHARE = 0.1  # more time than the other ranks
REPORTS = 3  # in a row that find the same, before it is logged


class LayerTimes:
    """Time of the layers' forward passes on this rank, between FSDP2's hooks and so without its collectives.

    Ranks wait for one another in collectives, so the time of a step is the same on all of them; these times are not.
    Under context and tensor parallelism they include the collectives of the layers, and show less.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device):
        """layers: under FSDP2."""
        self.device = device
        self.is_on = False
        self.moments: list[Any] = []  # before and after each forward pass
        for layer in layers:
            # after FSDP2's hook, which waits for the parameters, and before the one that frees them
            layer.register_forward_pre_hook(self._record)
            layer.register_forward_hook(self._record, prepend=True)

    def _record(self, *call: object) -> None:
        if not self.is_on:
            return
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append(moment)

    def take(self) -> float:
        """Stops timing, and returns the recorded seconds. The caller has synchronized the device."""
        pairs = zip(self.moments[::2], self.moments[1::2])
        self.is_on = False
        if self.device.type == "cuda":
            return sum(before.elapsed_time(after) for before, after in pairs) / 1e3
        return sum(after - before for before, after in pairs)


class Slowness:
    """Finds at each report which rank is slow, and why. Ranks exchange a few numbers there, and nothing in between."""

    def __init__(self, layers: Iterable[nn.Module], world: World, cpu_group: dist.ProcessGroup):
        self.size, self.cpu_group = world.size, cpu_group
        self.layer_times = LayerTimes(layers, world.device) if world.size > 1 else None
        self.reports: dict[tuple[str, int], int] = {}  # in a row, by cause and rank

    def watch(self, is_on: bool) -> None:
        """Whether the layers are timed from here on, until the next report."""
        if self.layer_times:
            self.layer_times.is_on = is_on
            self.layer_times.moments = []

    def compare(self, data_wait: float, seconds: float, steps: int) -> tuple[float, list[str]]:
        """The longest data wait of a rank, and log lines about what is slow. All ranks call it.

        data_wait: seconds of this rank in `steps` steps that took `seconds`.
        """
        mine = torch.tensor([data_wait, self.layer_times.take() if self.layer_times else 0.0], dtype=torch.float64)
        ranks = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(ranks, mine, group=self.cpu_group)
        data_waits, layers = (list(column) for column in zip(*(rank.tolist() for rank in ranks)))
        found = slow_ranks([wait / steps for wait in data_waits], layers, seconds / steps)
        self.reports = {cause: self.reports.get(cause, 0) + 1 for cause in found}
        return max(data_waits), [text for cause, text in found.items() if self.reports[cause] == REPORTS]


def slow_ranks(data_waits: list[float], layers: list[float], step: float) -> dict[tuple[str, int], str]:
    """Log lines by cause and rank.

    All in seconds. data_waits: of each rank, mean per step since the last report. layers: forward passes of all layers
    of each rank in the last step. step: mean time of a step since the last report.
    """
    found = {}
    rank, wait, others = _slowest(data_waits)
    if wait > DATA_SHARE * step:
        who = f"rank {rank} waits" if len(data_waits) > 1 else "waits"
        compared = f"; the other ranks {others:.3f} s" if len(data_waits) > 1 else ""
        found["data", rank] = (
            f"slow: {who} for data {wait:.3f} s of a step's {step:.3f} s{compared} (raise data.num_workers)"
        )
    rank, time_of_layers, others = _slowest(layers)
    if time_of_layers > (1 + RANK_SHARE) * others > 0:
        found["layers", rank] = (
            f"slow: the others wait for rank {rank}, whose layers took {time_of_layers:.3f} s in the forward pass of a "
            f"step; the other ranks' {others:.3f} s"
        )
    return found


def _slowest(seconds: list[float]) -> tuple[int, float, float]:
    """The rank with the longest time, that time, and the median of the other ranks, 0 where there are none."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = seconds[:rank] + seconds[rank + 1 :]
    return rank, seconds[rank], statistics.median(others) if others else 0.0
