"""Estimates as text."""

from tidar.config import Config, aligned
from tidar.training.estimate.gpus import GIB
from tidar.training.estimate.shapes import RESERVED, Estimate


def in_one_line(found: Estimate) -> str:
    """What a run prints about itself."""
    time, tokens = found.time, f"{found.time.tokens_per_second:,.0f} tokens/s a device"
    text = f"{found.memory.total / GIB:.1f} of {found.gpu.memory / GIB:.1f} GiB at the peak"
    text += "" if found.fits else ", which may be too much"
    return f"{text}; {time.seconds * 1e3:,.0f} ms a step, {tokens}, {time.mfu:.1%} MFU"


def describe(found: Estimate) -> list[str]:
    """Memory, time and what limits them."""
    plan, memory, time, gib = found.plan, found.memory, found.time, found.gpu.memory / GIB
    parts = {
        "states": memory.states,
        "gathered parameters and gradients": memory.gathered,
        "activations": memory.activations,
        "loss": memory.loss,
    }
    needed = ", ".join(f"{size / GIB:.1f} {name}" for name, size in parts.items() if size)
    fits = f"fits in {gib:.1f}" if found.fits else f"does not fit in {gib:.1f}"
    largest = max(parts, key=lambda name: parts[name])
    seconds = sorted(time.parts.items(), key=lambda part: -part[1])
    taken = ", ".join(f"{name} {part * 1e3:,.0f}" for name, part in seconds if part >= 5e-4)
    rows = plan.config.training.local_batch_size
    lines = {
        "shape": f"{_shape(found)}, {plan.micro_batches} x {rows} rows on each of {plan.dp_size}, "
        f"{plan.global_batch_size * plan.config.training.seq_len:,} tokens a step",
        "engine": plan.kernels.describe(),
        "memory": f"{memory.total / GIB:.1f} GiB at the peak, {memory.at}: {needed}",
        "": f"{fits} GiB, {RESERVED / GIB:.0f} of them left to CUDA, NCCL and the allocator; largest part {largest}",
        "time": f"{time.seconds * 1e3:,.0f} ms a step: {taken}",
        "speed": f"{time.tokens_per_second:,.0f} tokens/s a device, {time.mfu:.1%} MFU; "
        f"largest part {seconds[0][0]}, {seconds[0][1] / time.seconds:.0%}",
    }
    return [f"{name:<8} {text}" for name, text in lines.items()]


def table(found: list[Estimate]) -> list[str]:
    """Names of columns, and a line for each shape."""
    names = "dp", "cp", "tp", "checkpointing", "rows", "micro-batches", "GiB", "fits", "ms a step", "tokens/s", "MFU"
    cells = [list(names)]
    for each in found:
        plan, time, config = each.plan, each.time, each.plan.config
        cells.append(
            [
                str(plan.dp_size),
                str(plan.context_parallel),
                str(plan.tensor_parallel),
                _checkpointing(config),
                str(config.training.local_batch_size),
                str(plan.micro_batches),
                f"{each.memory.total / GIB:.1f}",
                "yes" if each.fits else "no",
                f"{time.seconds * 1e3:,.0f}",
                f"{time.tokens_per_second:,.0f}",
                f"{time.mfu:.1%}",
            ]
        )
    return aligned(cells)


def options(found: Estimate) -> str:
    """Options of a shape."""
    config = found.plan.config
    values = {
        "parallelism.context_parallel_degree": config.parallelism.context_parallel_degree,
        "parallelism.tensor_parallel_degree": config.parallelism.tensor_parallel_degree,
        "activation_checkpoint.mode": config.activation_checkpoint.mode,
        "activation_checkpoint.layers": config.activation_checkpoint.layers,
        "training.local_batch_size": config.training.local_batch_size,
        "training.global_batch_size": found.plan.global_batch_size,
    }
    return " ".join(f"--{name} {value}" for name, value in values.items())


def _shape(found: Estimate) -> str:
    plan, config = found.plan, found.plan.config
    parts = [f"{plan.world_size} {found.gpu.name}"]
    parts += [f"{plan.context_parallel} for each row"] if plan.context_parallel > 1 else []
    parts += [f"{plan.tensor_parallel} for each layer"] if plan.tensor_parallel > 1 else []
    parts += [f"{plan.replicas} replicas"] if plan.replicas > 1 else []
    return ", ".join([*parts, f"checkpointing {_checkpointing(config)}"])


def _checkpointing(config: Config) -> str:
    options = config.activation_checkpoint
    return options.mode if options.mode == "none" or options.layers == -1 else f"{options.mode} of {options.layers}"
