"""The learning rate: a function of the number of steps that were not skipped."""

import math

from tidar.config.options import LRScheduler


def learning_rate(update: int, total: int, lr: float, options: LRScheduler) -> float:
    """Learning rate of update 1, 2, … of a run of `total` updates, in the unit of `lr`, which is the highest.

    schedule = "warmup": linear up to `lr` at update warmup_steps, `lr` once more, then down. The decay would reach
    min_lr_factor * lr one update after its last, as torchtitan's (components/lr_scheduler.py): no update is wasted on
    a rate of 0. Others: DeepSpeed's of that name (deepspeed/runtime/lr_schedules.py). They start at -1 and are stepped
    after the optimizer, so update n has the rate of iteration n - 2.
    """
    end = total if options.total_steps == -1 else options.total_steps
    if options.schedule != "warmup":
        return lr * _deepspeed_factor(update - 2, end, options)
    if update <= options.warmup_steps:
        return lr * update / options.warmup_steps
    progress = min(1.0, (update - 1 - options.warmup_steps) / max(1, end - options.warmup_steps))
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[options.decay_type]
    return lr * (options.min_lr_factor + (1 - options.min_lr_factor) * shape)


def _deepspeed_factor(iteration: int, end: int, options: LRScheduler) -> float:
    lowest = options.warmup_min_lr_factor
    warmup_steps = max(2, options.warmup_steps)
    if iteration < 0:
        return 0.0 if options.schedule == "WarmupCosineLR" else lowest
    if iteration < warmup_steps:
        linear = options.warmup_type == "linear"
        share = iteration / warmup_steps if linear else math.log(iteration + 1) / math.log(warmup_steps)
        return lowest + (1 - lowest) * share
    decay_steps = max(1, end - warmup_steps)
    if options.schedule == "WarmupDecayLR":
        return lowest + (1 - lowest) * max(0.0, (end - iteration) / decay_steps)
    if options.schedule == "WarmupCosineLR":
        progress = min(1.0, (iteration - warmup_steps + 1) / decay_steps)
        return options.min_lr_factor + (1 - options.min_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
