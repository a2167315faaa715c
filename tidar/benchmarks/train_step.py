"""Measures training throughput: python -m tidar.benchmarks.train_step [--case NAME ...] [--section.option value ...]

Runs tidar.train's Trainer on packed rows of the embedded corpus, with metrics, and prints one JSON line for each case
and then a table. Further options go to the trainer. MFU is of useful FLOPs (tidar/models/flops.py).
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tidar.benchmarks.baseline import time_baseline
from tidar.benchmarks.cases import (
    CASES,
    WARM_UP,
    StepTimes,
    case_options,
    device_name,
    first_batches,
    free_memory,
    medians,
    running,
)
from tidar.benchmarks.power import power_log
from tidar.config import ArgumentParser, load_config, user_errors_exit
from tidar.data import Batch
from tidar.training.reporting.metrics import peak_memory_gib
from tidar.training.trainer import Trainer

SWEEPS = {
    # rows so that a step has about as many tokens, as far as one row allows
    "seq_len": [
        f"--training.seq_len {length} --training.local_batch_size {max(1, 8192 // length)}"
        for length in (512, 1024, 2048, 4096, 8192, 16384, 32768)
    ],
    "block_size": [f"--tidar.block_size {size}" for size in (1, 2, 4, 8, 16, 32, 64)],
}

MIN_TURN = 10  # steps of a run, and as many bare ones, that are compared
OVERHEAD_PAIRS = 5  # of such turns


class Alternating(StepTimes):
    """By turns `turn` steps as a run has them, and the same rows bare: on the device before, and nothing reported.

    A turn has one report or several, with half of the steps between two reports at each of its ends. The run must have
    `steps` steps.
    """

    def __init__(self, log_freq: int):
        super().__init__()
        self.log_freq = log_freq
        self.turn = self.log_freq * math.ceil(MIN_TURN / self.log_freq)
        self.first_turn = 2 * math.ceil(WARM_UP / self.turn) + 1
        self.steps = (self.first_turn + 2 * OVERHEAD_PAIRS) * self.turn

    def turn_of(self, step: int) -> int:
        """Even turns are bare."""
        return (step + self.log_freq // 2) // self.turn

    def batches(self, trainer: Trainer, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Not counted: that would wait for those on the device."""
        kept: deque[Batch] = deque()
        while True:
            if self.turn_of(trainer.step + 1) % 2:
                batch = next(batches)
                kept.append(batch.to(trainer.device))
                yield batch
            else:
                yield kept.popleft() if kept else next(batches)

    def reports_step(self, trainer: Trainer) -> bool:
        return self.turn_of(trainer.step) % 2 == 1

    def overhead(self) -> float:
        """Median over turns of the extra time, relative to the bare turn that follows."""
        seconds: defaultdict[int, float] = defaultdict(float)
        for number, step in enumerate(self.measured(), start=WARM_UP + 1):
            seconds[self.turn_of(number)] += step.seconds
        turns = range(self.first_turn, self.first_turn + 2 * OVERHEAD_PAIRS, 2)
        return statistics.median(seconds[turn] / seconds[turn + 1] - 1 for turn in turns)


def measure(options: list[str], steps: int) -> dict:
    """The medians of `steps` steps after the warm-up, clock and power meanwhile, and the peak of memory."""
    times = StepTimes()
    with running([*options, "--training.steps", str(WARM_UP + steps)], times) as trainer:
        with power_log(trainer.device) as power:
            trainer.train()
            measured = times.measured()
            power_used = power(sum(step.seconds for step in measured))
        result: dict[str, Any] = {
            "device": device_name(trainer.device),
            "torch": torch.__version__,
            "engine": trainer.plan.kernels.describe(),
        }
        result |= medians(measured, trainer.throughput.peak_flops)
        result |= power_used
        result["peak_gib"] = peak_memory_gib(trainer.device)
    return result


def measure_overhead(options: list[str]) -> float:
    """Share of a step that metrics, data and logging take."""
    times = Alternating(load_config(options).metrics.log_freq)
    with running([*options, "--training.steps", str(times.steps)], times) as trainer:
        trainer.train()
    return times.overhead()


def measure_baseline(options: list[str], steps: int) -> dict[str, float]:
    """Measures the replaced script's method on the same rows: all at once, or half, a quarter …, until they fit."""
    with running(options) as trainer:
        batches = first_batches(trainer, steps)
        size, decoder, pattern = trainer.config.model.name, trainer.spec.decoder, trainer.plan.pattern
        peak_flops = trainer.throughput.peak_flops
        device = trainer.device
    del trainer
    found: dict[str, Any] = {"error": "out of memory"}
    rows_at_once = len(batches[0].rows.input_ids)
    while rows_at_once and "error" in found:
        free_memory()
        try:
            steps_done = time_baseline(size, decoder.vocab_size, pattern, decoder, batches, rows_at_once)
            found = medians(steps_done, peak_flops) | {"peak_gib": peak_memory_gib(device), "rows": rows_at_once}
        except torch.OutOfMemoryError:
            rows_at_once //= 2
    return {f"baseline_{key}": value for key, value in found.items()}


def measure_start(options: list[str]) -> dict[str, float]:
    """Seconds from the start of a process to the end of step 1, without and with what an earlier one has compiled."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        variables = (
            "TORCHINDUCTOR_CACHE_DIR",
            "TRITON_CACHE_DIR",
            "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
            "QUACK_CACHE_DIR",
        )
        caches = {variable: f"{folder}/{variable}" for variable in variables}
        for kind in ("cold", "warm"):
            command = [sys.executable, "-u", "-m", "tidar.train", *options, "--training.steps", "1"]
            command += ["--metrics.log_freq", "1", "--job.dump_folder", f"{folder}/{kind}"]
            started = time.perf_counter()
            with subprocess.Popen(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    if line.startswith("step 1/"):
                        result[f"start_{kind}_s"] = time.perf_counter() - started
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
    return result


def table(results: list[dict]) -> str:
    """Names of columns, and a row for each case."""
    columns: dict[str, tuple[str, Callable]] = {
        "case": ("case", str),
        "step_ms": ("step ms", "{:.1f}".format),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "tflops": ("TFLOP/s", "{:.1f}".format),
        "mfu": ("MFU", "{:.1%}".format),
        "clock_mhz": ("MHz", "{:.0f}".format),
        "watts": ("W", "{:.0f}".format),
        "power_capped": ("capped", "{:.0%}".format),
        "peak_gib": ("GiB", "{:.1f}".format),
        "baseline_tokens_per_second": ("baseline tokens/s", "{:,.0f}".format),
        "baseline_rows": ("its rows", str),
        "baseline_peak_gib": ("its GiB", "{:.1f}".format),
        "ratio": ("ratio", "{:.2f}".format),
        "error": ("error", str),
        "baseline_error": ("baseline's error", str),
        "overhead": ("overhead", "{:.2%}".format),
        "start_cold_s": ("start cold s", "{:.1f}".format),
        "start_warm_s": ("warm s", "{:.1f}".format),
    }
    columns = {key: column for key, column in columns.items() if any(key in result for result in results)}
    cells = [[title for title, _ in columns.values()]]
    cells += [[show(result[key]) if key in result else "" for key, (_, show) in columns.items()] for result in results]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def measure_all(options: list[str], arguments: Namespace) -> dict:
    """Everything that was asked for of one case."""
    free_memory()
    # while this process holds no memory of the device
    result = measure_start(options) if arguments.start else {}
    result |= measure(options, arguments.steps)
    if arguments.overhead:
        result["overhead"] = measure_overhead(options)
    if arguments.baseline:
        result |= measure_baseline(options, arguments.steps)
        if "baseline_error" not in result:
            result["ratio"] = result["tokens_per_second"] / result["baseline_tokens_per_second"]
    return result


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.train_step", description=__doc__.split("\n\n")[1])
    parser.add_argument("--case", nargs="+", default=["debug"], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=20, help=f"steps that are measured, after {WARM_UP} [20]")
    parser.add_argument("--sweep", choices=SWEEPS, help="each case over a range of lengths or block sizes")
    parser.add_argument("--baseline", action="store_true", help="also train a transformers model with dense masks")
    parser.add_argument("--overhead", action="store_true", help="what metrics, data and logging take, by more steps")
    parser.add_argument("--start", action="store_true", help="seconds to the end of step 1, cold and warm")
    with user_errors_exit():
        arguments, others = parser.parse_known_args()
        results = []
        for case in arguments.case:
            for change in SWEEPS[arguments.sweep] if arguments.sweep else [""]:
                result = {"case": " ".join([case, *change.split()[:2]])}
                try:
                    result |= measure_all([*case_options(case), *change.split(), *others], arguments)
                except torch.OutOfMemoryError:
                    result["error"] = "out of memory"
                print(json.dumps(result), flush=True)
                results.append(result)
        print(table(results))


if __name__ == "__main__":
    main()
