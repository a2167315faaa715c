"""The rows of a run, and the batches that this rank takes of them."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from tidar.data import Batch, Dataset, TrainingOrder, make_loader, make_rows, validation_order
from tidar.distributed import World
from tidar.losses.sums import target_weights
from tidar.patterns import LOSSES, Pattern, RowSharding
from tidar.training.plan import RunPlan


class Batches:
    """training_rows, held_out_rows: of all ranks."""

    def __init__(self, plan: RunPlan, dataset: Dataset, world: World):
        self.plan = plan
        self.world = world
        self.training_rows, self.held_out_rows = make_rows(plan.config, dataset)

    def order(self, first_sample: int) -> TrainingOrder:
        """Order of this rank's training rows, from sample number `first_sample` of the run."""
        training, world = self.plan.config.training, self.world
        n_rows = len(self.training_rows)
        return TrainingOrder(
            n_rows, training.seed, first_sample, training.local_batch_size, world.dp_rank, world.dp_size
        )

    def training(self, first_sample: int) -> Iterator[Batch]:
        """Endless micro-batches, from sample number `first_sample` of the run."""
        return iter(self._loader(self.training_rows, self.order(first_sample), self.plan.pattern, self.plan.sharding))

    def validation(self) -> DataLoader:
        """The validation batches of this rank; all ranks have equally many."""
        config, world = self.plan.config, self.world
        n_rows, size = len(self.held_out_rows), config.training.local_batch_size
        order = validation_order(n_rows, config.validation.steps, size, world.dp_rank, world.dp_size)
        return self._loader(self.held_out_rows, order, self.plan.validation_pattern, self.plan.validation_sharding)

    def _loader(self, rows, order: Iterable, pattern: Pattern, sharding: RowSharding | None) -> DataLoader:
        config, pins = self.plan.config, self.world.device.type == "cuda"
        share = partial(sharding.share, rank=self.world.cp_rank) if sharding else None
        return make_loader(rows, order, pattern, config.training.seed, config.data.num_workers, pins, share)


def count_targets(micro_batches: list[Batch], world: World) -> tuple[dict[str, Tensor], Tensor]:
    """The denominator of each loss and the number of tokens of a step, over all ranks and micro-batches.

    A loss's denominator is the sum of its target weights. All are scalars, float64. Ranks that divide a row (context
    parallelism) have different targets and count the same tokens; ranks that divide layers have the same of both.
    """
    weights = torch.stack([target_weights(batch.rows.targets) for batch in micro_batches]).sum(dim=0)
    n_tokens = weights.new_full((1,), sum(batch.n_tokens for batch in micro_batches))
    counts = torch.cat([weights, n_tokens])
    dist.all_reduce(counts, group=world.loss_group)
    return dict(zip(LOSSES, counts)), counts[-1] / world.cp_size
