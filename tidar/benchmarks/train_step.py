"""Measures training throughput: python -m tidar.benchmarks.train_step [--case CASE ...] [--section.option value ...]

Runs tidar.train's Trainer on packed rows of the embedded corpus, with metrics, and prints one JSON line for each case
and then a table. Further options go to the trainer; those of one case are quoted with it: --case "debug
--tidar.block_size 16". With --ngpu, or under torchrun, it trains on several devices of this machine. Rates are per
device, and a step takes as long as on its slowest rank. MFU is of useful FLOPs (tidar/models/flops.py).
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
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

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
    steps_of_all,
    train_all_steps,
)
from tidar.benchmarks.power import power_log
from tidar.benchmarks.ranks import gather, is_first_rank, is_rank, launcher, n_ranks, numbers_of_devices
from tidar.config import ArgumentParser, UserError, aligned, load_config, user_errors_exit
from tidar.data import Batch
from tidar.distributed import check_device_count, resolve_degrees
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

MIN_TURN = 10  # steps of a run, compared with as many bare ones
OVERHEAD_PAIRS = 5  # of such turns

OUT_OF_MEMORY = "out of memory"
FITS_SECONDS = 60  # that ranks wait for one another where rows do not fit in memory


class Alternating(StepTimes):
    """Alternates `turn` steps of an ordinary run with the same rows bare: on the device already, and not reported.

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

    def overhead(self, trainer: Trainer) -> float:
        """Median over turns of the extra time, relative to the bare turn that follows."""
        seconds: defaultdict[int, float] = defaultdict(float)
        for number, step in enumerate(
            steps_of_all(self.measured(), trainer.world, trainer.cpu_group), start=WARM_UP + 1
        ):
            seconds[self.turn_of(number)] += step.seconds
        turns = range(self.first_turn, self.first_turn + 2 * OVERHEAD_PAIRS, 2)
        return statistics.median(seconds[turn] / seconds[turn + 1] - 1 for turn in turns)


def measure(options: list[str], steps: int) -> dict:
    """The medians of `steps` steps after the warm-up, clock and power meanwhile, and the peak of memory.

    Clock and power are means over the devices, the peak is that of the device with the highest one.
    """
    times = StepTimes()
    with running([*options, "--training.steps", str(WARM_UP + steps)], times) as trainer:
        with power_log(trainer.device) as power:
            train_all_steps(trainer)
            measured = times.measured()
            power_used = power(sum(step.seconds for step in measured))
        result: dict[str, Any] = {
            "ngpu": trainer.world.size,
            "device": device_name(trainer.device),
            "torch": torch.__version__,
            "engine": trainer.plan.kernels.describe(),
        }
        result |= medians(steps_of_all(measured, trainer.world, trainer.cpu_group), trainer.throughput.peak_flops)
        powers = gather(power_used, trainer.cpu_group)
        result |= {name: statistics.mean(power[name] for power in powers) for name in power_used}
        result["peak_gib"] = max(gather(peak_memory_gib(trainer.device), trainer.cpu_group))
    return result


def measure_overhead(options: list[str]) -> float:
    """Share of a step that metrics, data and logging take."""
    times = Alternating(load_config(options).metrics.log_freq)
    with running([*options, "--training.steps", str(times.steps)], times) as trainer:
        train_all_steps(trainer)
        return times.overhead(trainer)


def measure_baseline(options: list[str], steps: int) -> dict[str, float]:
    """Measures the baseline on the same rows: all at once, or half, a quarter …, until they fit."""
    parallelism = load_config(options).parallelism
    if parallelism.context_parallel_degree > 1 or parallelism.tensor_parallel_degree > 1:
        raise UserError(
            "--baseline: divides neither rows nor layers; parallelism.context_parallel_degree and "
            "parallelism.tensor_parallel_degree must be 1"
        )
    with running(options) as trainer:
        batches = first_batches(trainer, steps)
        size, decoder, pattern = trainer.config.model.name, trainer.spec.decoder, trainer.plan.pattern
        # all of it but its model, and what holds the model
        peak_flops, world, cpu_group = trainer.throughput.peak_flops, trainer.world, trainer.cpu_group
        trainer.resources.close()
        del trainer
        found: dict[str, Any] = {"error": OUT_OF_MEMORY}
        rows_at_once = len(batches[0].rows.input_ids)
        while rows_at_once and "error" in found:
            free_memory()
            try:
                mine = time_baseline(size, decoder.vocab_size, pattern, decoder, batches, rows_at_once, world.mesh)
                found = {"peak_gib": peak_memory_gib(world.device), "rows": rows_at_once}
            except torch.OutOfMemoryError:
                rows_at_once //= 2
            if "error" in found:
                # the shapes are those of the other ranks; one that nevertheless has room would wait for this one
                dist.monitored_barrier(cpu_group, timedelta(seconds=FITS_SECONDS))
        if "error" not in found:
            found |= medians(steps_of_all(mine, world, cpu_group), peak_flops)
    return {f"baseline_{key}": value for key, value in found.items()}


def measure_start(options: list[str], launcher: list[str]) -> dict[str, float]:
    """Seconds from the start of the processes to the end of step 1, without and with what earlier ones have compiled.

    launcher: the first words of a command that runs a module.
    """
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
            command = [*launcher, "tidar.train", *options, "--training.steps", "1"]
            command += ["--metrics.log_freq", "1", "--job.dump_folder", f"{folder}/{kind}"]
            started = time.perf_counter()
            with subprocess.Popen(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    if line.startswith("step 1/"):
                        result[f"start_{kind}_s"] = time.perf_counter() - started
            if process.returncode:
                sys.exit(process.returncode)  # it has printed its error
    return result


def table(results: list[dict]) -> str:
    """Names of columns, and a row for each case and number of devices, those of a case one after the other."""
    cases = list(dict.fromkeys(result["case"] for result in results))
    results = sorted(results, key=lambda result: cases.index(result["case"]))
    alone = {result["case"]: result for result in results if result["ngpu"] == 1}
    results = [result | _share_of_one_device(result, alone.get(result["case"], {})) for result in results]
    columns: dict[str, tuple[str, Callable]] = {
        "case": ("case", str),
        "ngpu": ("GPUs", str),
        "step_ms": ("step ms", "{:.1f}".format),
        "tokens_per_second": ("tokens/s each", "{:,.0f}".format),
        "of_one": ("of one", "{:.1%}".format),
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
    return "\n".join(aligned(cells))


def _share_of_one_device(result: dict, alone: dict) -> dict[str, float]:
    """The rate of each of several devices, relative to a device alone. alone: the result of one device."""
    rate = "tokens_per_second"
    return {"of_one": result[rate] / alone[rate]} if result["ngpu"] > 1 and rate in result and rate in alone else {}


def measure_all(options: list[str], arguments: Namespace) -> dict:
    """All measurements of one case that the arguments name."""
    free_memory()
    # while this process holds no memory of the device
    result: dict[str, Any] = measure_start(options, [sys.executable, "-u", "-m"]) if arguments.start else {}
    result |= measure(options, arguments.steps)
    if arguments.overhead:
        result["overhead"] = measure_overhead(options)
    if arguments.baseline:
        result |= measure_baseline(options, arguments.steps)
        if "baseline_error" not in result:
            result["ratio"] = result["tokens_per_second"] / result["baseline_tokens_per_second"]
    return result


def measure_here(cases: list[str], arguments: Namespace, others: list[str]) -> Iterator[dict]:
    """The result of each case, measured by this process, one rank of several or the only one."""
    for case in cases:
        result: dict[str, Any] = {"case": case, "ngpu": n_ranks()}
        try:
            result |= measure_all([*case_options(case), *others], arguments)
        except torch.OutOfMemoryError:
            if result["ngpu"] > 1:
                # the others wait for this one, and end with it
                print(f"error: rank {os.environ['RANK']}: {OUT_OF_MEMORY}", file=sys.stderr, flush=True)
                sys.exit(1)
            result["error"] = OUT_OF_MEMORY
        yield result


def measure_on(ngpu: int, cases: list[str], arguments: Namespace, others: list[str]) -> Iterator[dict]:
    """The result of each case, measured by `ngpu` processes; by new ones after a case in which some have failed."""
    start = {}
    for case in cases if arguments.start else ():
        start[case] = measure_start([*case_options(case), *others], launcher(ngpu))
    command = [*launcher(ngpu), "tidar.benchmarks.train_step", *others, "--steps", str(arguments.steps)]
    command += ["--baseline"] * arguments.baseline + ["--overhead"] * arguments.overhead
    while cases:
        done, errors = 0, []
        with subprocess.Popen(
            [*command, "--case", *cases], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    result = json.loads(line)
                    yield result | start.get(result["case"], {})
                    done += 1
                elif done < len(cases):  # its table comes last
                    print(line, end="", flush=True)
                    errors += [line.strip().removeprefix("error: ")] * line.startswith("error: ")
        if done < len(cases):
            yield {"case": cases[done], "ngpu": ngpu, "error": (errors or ["failed"])[0]}
        cases = cases[done + 1 :]


def check(cases: list[str], arguments: Namespace, others: list[str]) -> None:
    """Raises UserError for options that no process needs to be started for."""
    configs = [load_config([*case_options(case), *others]) for case in cases]
    if is_rank() and (arguments.ngpu or arguments.start):
        raise UserError("--ngpu and --start start processes themselves: start this without torchrun")
    for ngpu in arguments.ngpu:
        check_device_count(ngpu)
        for config in configs:
            resolve_degrees(config, ngpu)


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.train_step", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--case", nargs="+", default=["debug"], metavar="CASE", help=f"{', '.join(CASES)}, options of its own after it"
    )
    parser.add_argument(
        "--ngpu",
        type=numbers_of_devices,
        default=[],
        metavar="N,...",
        help="numbers of devices, one after the other",
    )
    parser.add_argument("--steps", type=int, default=20, help=f"steps that are measured, after {WARM_UP} [20]")
    parser.add_argument("--sweep", choices=SWEEPS, help="each case over a range of lengths or block sizes")
    parser.add_argument("--baseline", action="store_true", help="also train a transformers model with dense masks")
    parser.add_argument("--overhead", action="store_true", help="what metrics, data and logging take, by more steps")
    parser.add_argument("--start", action="store_true", help="seconds to the end of step 1, cold and warm")
    with user_errors_exit():
        arguments, others = parser.parse_known_args()
        cases = arguments.case
        if arguments.sweep:
            cases = [f"{case} {change}" for case in cases for change in SWEEPS[arguments.sweep]]
        check(cases, arguments, others)
        measured = [measure_on(ngpu, cases, arguments, others) for ngpu in arguments.ngpu]
        results = []
        for result in chain(*measured) if measured else measure_here(cases, arguments, others):
            results.append(result)
            if is_first_rank():
                print(json.dumps(result), flush=True)
        if is_first_rank():
            print(table(results))
        if any(OUT_OF_MEMORY not in result.get("error", OUT_OF_MEMORY) for result in results):
            sys.exit(1)


if __name__ == "__main__":
    main()
