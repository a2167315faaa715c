"""Training cases of the benchmarks by name, and hooks that measure the time of each step."""

import gc
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tidar.benchmarks.ranks import common_folder, gather, n_ranks
from tidar.config import UserError, load_config
from tidar.data import Batch
from tidar.distributed import World, leave_world
from tidar.models import count_pairs, pattern_mask
from tidar.models.flops import batch_flops
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

# seconds of work after which a GPU has the clock that its power allows for long
SUSTAINED = 2.0
REPEATS = 20  # calls of which the mean is taken
WARM_UP = 8  # steps that are not counted: they compile, and fill the caches of allocators

# The rows are those of the embedded corpus, one byte a token, packed; the weights are random ones
CASES = {
    "debug": "--model.name debug --training.seq_len 128 --training.local_batch_size 4",
    "1.5b-2048": "--model.name qwen2.5-1.5b --training.seq_len 2048 --training.local_batch_size 4",
    "1.5b-4096": "--model.name qwen2.5-1.5b --training.seq_len 4096 --training.local_batch_size 2",
    # as many rows as an H200 has room for, and with them a larger chunk of the loss
    "1.5b-2048x16": "--model.name qwen2.5-1.5b --training.seq_len 2048 --training.local_batch_size 16 "
    "--training.loss_chunk_size 16384",
    "1.5b-4096x8": "--model.name qwen2.5-1.5b --training.seq_len 4096 --training.local_batch_size 8 "
    "--training.loss_chunk_size 16384",
    "1.5b-16384": "--model.name qwen2.5-1.5b --training.seq_len 16384 --training.local_batch_size 1",
    "1.5b-32768": "--model.name qwen2.5-1.5b --training.seq_len 32768 --training.local_batch_size 1",
    # without checkpointing for two H200s, --parallelism.context_parallel_degree 2
    "1.5b-65536": "--model.name qwen2.5-1.5b --training.seq_len 65536 --training.local_batch_size 1",
    "4b-4096": "--model.name qwen3-4b --training.seq_len 4096 --training.local_batch_size 2",
    "8b-4096": "--model.name qwen3-8b --training.seq_len 4096 --training.local_batch_size 2 "
    "--optimizer.state_dtype bfloat16 --parallelism.fsdp_reshard_after_forward always "
    "--activation_checkpoint.mode full --activation_checkpoint.layers 6",
}
COMMON = "--validation.enable false --checkpoint.enable false --optimizer.lr 1e-5"


def case_options(case: str) -> list[str]:
    """Options of the trainer. case: a name, and options of its own, if any. Raises UserError for an unknown name."""
    name, *own = shlex.split(case) or [""]
    if name not in CASES:
        raise UserError(f"--case {name}: must be one of {', '.join(CASES)}")
    return [*f"{CASES[name]} {COMMON}".split(), *own]


@dataclass
class Step:
    """Seconds of a step, since the end of the step before on the device, and what a device computed of it."""

    seconds: float
    tokens: float
    flops: float


class StepTimes(Hooks):
    """Records the end of each step, without waiting for it, and what the step computed."""

    def __init__(self):
        self.ends: list[Any] = []
        self.work: list[list[Any]] = [[0, 0]]  # tokens and FLOPs of each step, the one under way last

    def batches(self, trainer: Trainer, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.work[-1][0] += batch.n_tokens
            rows = batch.rows
            pairs = int(count_pairs(pattern_mask(trainer.plan.pattern, rows.documents, rows.share), rows.share))
            self.work[-1][1] += batch_flops(trainer.spec.decoder, rows, pairs)
            yield batch

    def after_step(self, trainer: Trainer) -> None:
        end: Any = time.perf_counter()
        if trainer.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
        self.ends.append(end)
        self.work.append([0, 0])

    def measured(self) -> list[Step]:
        """All steps of this rank after the warm-up."""
        synchronize()
        steps = []
        for before, end, work in list(zip(self.ends, self.ends[1:], self.work[1:]))[WARM_UP - 1 :]:
            seconds = end - before if isinstance(end, float) else before.elapsed_time(end) / 1e3
            steps.append(Step(seconds, *work))
        return steps


@contextmanager
def running(options: list[str], hooks: Hooks | None = None) -> Iterator[Trainer]:
    """A trainer with these options, in a temporary folder."""
    free_memory()
    with common_folder() as folder:
        failed = True
        try:
            yield Trainer(load_config(["--job.dump_folder", folder, *options]), hooks)
            failed = False
        except UserError:
            failed = False  # on all ranks
            raise
        finally:
            # after other errors it would wait for ranks that still compute
            if not failed or n_ranks() == 1:
                leave_world()


def train_all_steps(trainer: Trainer) -> None:
    """Raises UserError where the run is stopped before its last step."""
    trainer.train()
    if trainer.step < trainer.steps:
        raise UserError(f"stopped by {trainer.stop_reason}: the case is not measured")


def free_memory() -> None:
    """Frees the memory of an earlier trainer that nothing refers to any more, and its compiled graphs."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def first_batches(trainer: Trainer, number: int) -> list[Batch]:
    """The run's first micro-batches, on its device."""
    batches = trainer.batches.training(first_sample=0)
    return [next(batches).to(trainer.device) for _ in range(number)]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def median_seconds(work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median seconds of a call, host and device, after `warm_up` calls that are not counted."""
    times = []
    for _ in range(warm_up + repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:])


def synchronize() -> None:
    """Waits for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sustained_seconds(work: Callable[[], object], device: torch.device, seconds: float = SUSTAINED) -> float:
    """Seconds of a call: the mean of REPEATS calls, on a GPU the last of `seconds` of load."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(REPEATS):
            work()
        return (time.perf_counter() - started) / REPEATS
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            work()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS / 1e3


def steps_of_all(steps: list[Step], world: World, cpu_group: dist.ProcessGroup) -> list[Step]:
    """Steps of all ranks together: the time of the slowest one, tokens and FLOPs of a device."""
    size = world.size
    return [
        Step(
            max(step.seconds for step in ranks),
            # ranks that share rows or layers count the same tokens, those that share layers the same FLOPs
            sum(step.tokens for step in ranks) * world.dp_size / size**2,
            sum(step.flops for step in ranks) / size / world.tp_size,
        )
        for ranks in zip(*gather(steps, cpu_group))
    ]


def medians(steps: list[Step], peak_flops: float | None) -> dict[str, float]:
    """ms, tokens_per_second, tflops and mfu of the median step, and the spread of its time."""
    result = {
        "step_ms": statistics.median(step.seconds for step in steps) * 1e3,
        "step_ms_max": max(step.seconds for step in steps) * 1e3,
        "tokens_per_second": statistics.median(step.tokens / step.seconds for step in steps),
        "tflops": statistics.median(step.flops / step.seconds for step in steps) / 1e12,
    }
    if peak_flops:
        result["mfu"] = result["tflops"] * 1e12 / peak_flops
    return result
