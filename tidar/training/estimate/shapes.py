"""Shapes of a run, and which of them fit on a GPU and are fastest."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tidar.config import UserError
from tidar.training.estimate.gpus import GIB, PER_HOST, Gpu
from tidar.training.estimate.memory import Memory, peak_memory
from tidar.training.estimate.row import RowWork, row_work
from tidar.training.estimate.step_time import StepTime, step_time
from tidar.training.plan import RunPlan, plan_run

# bytes that a GPU needs besides tensors: CUDA's context, NCCL's buffers, unused parts of the allocator's blocks
RESERVED = 4 * GIB
# what is tried: rows of a micro-batch, and how many quarters of the layers are checkpointed
ROWS = (1, 2, 4, 8, 16)
QUARTERS = range(5)


@dataclass(frozen=True)
class Estimate:
    plan: RunPlan
    gpu: Gpu
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total + RESERVED <= self.gpu.memory


def estimate(plan: RunPlan, gpu: Gpu, row: RowWork | None = None) -> Estimate:
    """row: work of each row, if it is known already. Raises UserError for a run that no estimate is made of."""
    if reason := not_estimated(plan):
        raise UserError(f"{reason}: is not estimated")
    row = row or row_work(plan.pattern, plan.config.training.seq_len)
    return Estimate(plan, gpu, peak_memory(plan, row), step_time(plan, gpu, row))


def not_estimated(plan: RunPlan) -> str | None:
    """The option for which no estimate is made of a run, and its value; None if one is made."""
    if plan.config.training.enable_cpu_offload:
        return "training.enable_cpu_offload = true"
    if not plan.kernels.compile:
        return f"compile.enable = {str(plan.config.compile.enable).lower()}"
    if plan.kernels.attention == "sdpa":
        return "model.attention_backend = sdpa"
    if plan.dtype.itemsize != 2:
        return f"training.mixed_precision_param = {plan.config.training.mixed_precision_param}"
    return None


def shapes(plan: RunPlan, gpu: Gpu) -> list[Estimate]:
    """Other shapes of the same step: for each degree of context and of tensor parallelism the fastest one that fits, or
    else the one that needs least memory. Those that fit come first, the fastest of them first.
    """
    row = row_work(plan.pattern, plan.config.training.seq_len)
    best = []
    for cp_size, tp_size in _degrees(plan.world_size):
        found = [estimate(shape, gpu, row) for shape in _shapes(plan, gpu, cp_size, tp_size)]
        fitting = [each for each in found if each.fits]
        if fitting:
            best.append(min(fitting, key=lambda each: each.time.seconds))
        elif found:
            best.append(min(found, key=lambda each: each.memory.total))
    return sorted(best, key=lambda each: (not each.fits, each.time.seconds))


def _degrees(world_size: int) -> list[tuple[int, int]]:
    """Degrees of context and tensor parallelism: powers of two whose product divides the devices, within a host."""
    pairs = itertools.product((1, 2, 4, 8), repeat=2)
    return [(cp, tp) for cp, tp in pairs if cp * tp <= PER_HOST and world_size % (cp * tp) == 0]


def _shapes(plan: RunPlan, gpu: Gpu, cp_size: int, tp_size: int) -> Iterator[RunPlan]:
    """The possible shapes with these degrees, with each of ROWS and of QUARTERS."""
    config = copy.deepcopy(plan.config)
    config.parallelism.context_parallel_degree, config.parallelism.tensor_parallel_degree = cp_size, tp_size
    config.training.global_batch_size, config.training.local_batch_size = plan.global_batch_size, 1
    try:
        shape = plan_run(config, plan.world_size, plan.device, plan.decoder, elsewhere=gpu.capability)
    except UserError:
        return
    for rows, quarters in itertools.product(ROWS, QUARTERS):
        if shape.micro_batches % rows == 0:
            config = copy.deepcopy(config)
            config.training.local_batch_size = rows
            recompute = config.activation_checkpoint
            recompute.mode = "full" if quarters else "none"
            recompute.layers = plan.decoder.n_layers * quarters // 4 if 0 < quarters < 4 else -1
            yield replace(shape, config=config, micro_batches=shape.micro_batches // rows)
