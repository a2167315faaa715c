"""What a run that is out of memory needs, and the options that lower it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tidar.distributed import buffer_bytes
from tidar.training.plan import RunPlan

GIB = 2**30


@contextmanager
def explained_out_of_memory(plan: Callable[[], RunPlan], rank: int) -> Iterator[None]:
    """Raises a torch.OutOfMemoryError again, with `memory_advice` as its text. plan: as far as it is known by then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        known = plan()
        if not known.model:
            raise
        peak = torch.cuda.max_memory_allocated() + buffer_bytes() if known.device.type == "cuda" else 0
        raise torch.OutOfMemoryError(f"rank {rank}: {memory_advice(known, peak)}") from error


def memory_advice(plan: RunPlan, peak_bytes: int) -> str:
    """Two lines for a run that is out of memory: what it needs, and the options that lower it, cheapest first.

    peak_bytes: most that this device has held.
    """
    config = plan.config
    training, parallelism, recompute = config.training, config.parallelism, config.activation_checkpoint
    on_device = 0.0 if training.enable_cpu_offload else plan.states_bytes
    states = on_device + plan.gathered_bytes + plan.unsharded_gradient_bytes
    needs = f"states of {states / GIB:.2f} GiB on each device"
    if peak_bytes > states:
        needs += f", and at least {(peak_bytes - states) / GIB:.2f} GiB of activations and buffers"
    options = []
    if training.loss_chunk_size > 1024:
        options.append(f"training.loss_chunk_size (now {training.loss_chunk_size})")
    if training.local_batch_size > 1:
        options.append(
            f"training.local_batch_size (now {training.local_batch_size}; with training.global_batch_size = "
            f"{plan.global_batch_size} the steps stay the same)"
        )
    if plan.unsharded_gradient_bytes:
        options.append("parallelism.gradient_reduction = micro_batch")
    if plan.gathered_bytes:
        options.append("parallelism.fsdp_reshard_after_forward = always")
    if recompute.mode == "none":
        options.append("activation_checkpoint.mode = selective")
    if recompute.mode != "full" or recompute.layers != -1:
        options.append("activation_checkpoint.mode = full")
    if config.optimizer.state_dtype == "float32":
        options.append("optimizer.state_dtype = bfloat16")
    if plan.replicas > 1 and parallelism.data_parallel_replicate_degree != 1:
        options.append("parallelism.data_parallel_replicate_degree = 1")
    options.append("more devices")
    if not training.enable_cpu_offload:
        options.append("training.enable_cpu_offload")
    return f"out of memory: the run needs {needs}\nwhat lowers it, cheapest first: {', '.join(options)}"
