"""Breaks down the time of a step: python -m tidar.benchmarks.profile [--case CASE] [--section.option value ...]

Trains a case of tidar.benchmarks.train_step, traces some steps, and prints the time of each kind of kernel in a step
and its floor: useful FLOPs at the rate of a large GEMM, bytes that must move at the rate of a large copy,
both measured first. Further options go to the trainer. With --ngpu, or under torchrun, it trains on several devices of
this machine and traces rank 0. Collectives overlap other kernels, and wait for the slowest rank; "exposed
communication" is the time in which nothing else runs, and "exposed, with copies" that in which nothing runs but
collectives, casts and copies.
"""

import json
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tidar.benchmarks.cases import (
    CASES,
    WARM_UP,
    StepTimes,
    case_options,
    device_name,
    running,
    sustained_seconds,
    train_all_steps,
)
from tidar.benchmarks.ranks import is_rank, launcher, numbers_of_devices
from tidar.config import ArgumentParser, UserError, user_errors_exit
from tidar.distributed import OneDevice, check_device_count
from tidar.models import DecoderConfig
from tidar.models.flops import useful_flops
from tidar.training.trainer import Trainer

# the first pattern that is found in a kernel's name says its kind
COLLECTIVES = {
    "all-gather": r"(?i)^nccl.*all_?gather",
    "reduce-scatter": r"(?i)^nccl.*reduce_?scatter",
    "other collectives": r"(?i)^nccl",
    # of FSDP2's all-gathers and reduce-scatters (tidar/distributed/peer_copies.py), by copy engines
    "copies between GPUs": r"PtoP|symmetric_memory",
}
KINDS = COLLECTIVES | {
    "attention backward": r"(?i)(flex|flash|fmha|attention).*(bwd|backward)",
    "attention forward": r"(?i)flex_attention|flash|fmha|attention",
    "loss": r"cross_entropy|log_softmax",
    "optimizer": r"(?i)adam|lpnorm|foreach_norm|multi_tensor_apply(?!.*copy)",
    "matmuls": r"nvjet|gemm|cutlass|splitK|xmma|^aten::(linear|matmul|mm)$",
    # FSDP2's, around collectives and between dtypes
    "cast and copy": r"(?i)^_sum_kernel|^(?!triton).*(copy|chunk_cat|catarray|split_with_sizes)|^aten::(cat|to)$",
    "memory movement": r"(?i)memcpy|memset|^(?!triton).*fill",
    "norm and elementwise": "",
}
EXPOSED = {
    "exposed communication": {*COLLECTIVES},
    "exposed, with copies": {*COLLECTIVES, "cast and copy", "memory movement"},
}


class Traced(StepTimes):
    """Traces the steps after the warm-up."""

    def __init__(self):
        super().__init__()
        activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        self.profiler = profile(activities=[activity])

    def after_step(self, trainer: Trainer) -> None:
        super().after_step(trainer)
        if trainer.world.rank:
            return
        if trainer.step == WARM_UP:
            self.profiler.start()
        if trainer.step == trainer.steps:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.stop()


def kernels(profiler: profile) -> list[tuple[str, float, float]]:
    """(name, start, end) in ms of what ran on the GPU, or of the outermost operators where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if torch.cuda.is_available() else ("cpu_op",)
    events = sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])
    found: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    for event in events:
        before = found[event["tid"]]
        start, is_operator = event["ts"] / 1e3, event["cat"] == "cpu_op"
        if is_operator and (not event["name"].startswith("aten::") or (before and start < before[-1][2])):
            continue  # called by the one before
        before.append((event["name"], start, start + event["dur"] / 1e3))
    return sum(found.values(), [])


def busy_ms(found: list[tuple[str, float, float]]) -> float:
    """Time in which anything ran."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(found, key=lambda kernel: kernel[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def exposed_ms(found: list[tuple[str, float, float]], kinds: set[str]) -> float:
    """Time in which kernels of these kinds ran and nothing else."""
    return busy_ms(found) - busy_ms([kernel for kernel in found if kind_of(kernel[0]) not in kinds])


def longest_gaps(found: list[tuple[str, float, float]], number: int) -> list[tuple[float, str, str]]:
    """The longest times in which nothing ran: (ms, kernel before, kernel after)."""
    gaps, until, before = [], float("inf"), ""
    for name, start, end in sorted(found, key=lambda kernel: kernel[1]):
        if start > until:
            gaps.append((start - until, before, name))
        if end > until or not before:
            until, before = end, name
    return sorted(gaps, reverse=True)[:number]


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large GEMM, and bytes/s, read and written, of a large copy, both sustained."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(2**28 if device.type == "cuda" else 2**20, device=device)
    y = torch.empty_like(x)
    gemm = sustained_seconds(lambda: a @ b, device)
    copy = sustained_seconds(lambda: y.copy_(x), device)
    return 2 * n**3 / gemm, 8 * x.numel() / copy


def floors_ms(
    decoder: DecoderConfig,
    parameters: int,
    positions: int,
    scored: int,
    flops: float,
    rates: tuple[float, float],
    shards: int,
    gathers: int,
    with_logits: bool,
) -> dict[str, float]:
    """The least time of each kind in a step of one micro-batch, float32 states, a plain MLP, nothing recomputed.

    shards: of the states. gathers: how often FSDP2 gathers each parameter, 0 without FSDP2. with_logits: include the
    loss's reads and writes of the logits.
    """
    rate, bandwidth = rates
    heads = (2 * decoder.n_heads + 2 * decoder.n_kv_heads) * decoder.head_dim
    matmuls = useful_flops(decoder, positions, scored, allowed_pairs=0)
    # a layer reads its input and each result of a matmul once, and writes the next matmul's operand; as much back,
    # with what the forward pass has kept read again
    width = 6 * decoder.dim + 2 * heads + 3 * decoder.hidden_dim
    elementwise = decoder.n_layers * positions * 2 * width * 2.5
    # FSDP2 rounds its shard to bfloat16, copies what is gathered, and widens gradients to float32 for their reduction
    copied = gathers * (6 / shards + (4 if shards > 1 else 0)) + 6 if gathers else 0
    return {
        "matmuls": matmuls / rate * 1e3,
        "attention forward": (flops - matmuls) / 3 / rate * 1e3,
        "attention backward": (flops - matmuls) * 2 / 3 / rate * 1e3,
        "loss": with_logits * 3 * 2 * decoder.vocab_size * scored / bandwidth * 1e3,
        "norm and elementwise": elementwise / bandwidth * 1e3,
        # AdamW reads 16 bytes a parameter and writes 12, and the norm reads 4; or 14, 14 and 2
        "optimizer": (32 if gathers else 30) * parameters / shards / bandwidth * 1e3,
        "cast and copy": copied * parameters / bandwidth * 1e3,
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.profile", description=__doc__.split("\n\n")[1])
    parser.add_argument("--case", default="debug", metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--ngpu",
        type=numbers_of_devices,
        default=[],
        metavar="N,...",
        help="numbers of devices, one after the other",
    )
    parser.add_argument("--steps", type=int, default=3, help="steps that are traced [3]")
    parser.add_argument("--top", type=int, default=30, help="longest kernels that are listed [30]")
    with user_errors_exit():
        arguments, others = parser.parse_known_args()
        n_steps = arguments.steps
        if arguments.ngpu:
            profile_on(arguments, others)
            return
        options = [*case_options(arguments.case), "--training.steps", str(WARM_UP + n_steps), *others]
        times = Traced()
        with running(options, times) as trainer:
            rates = ceilings(trainer.device, trainer.plan.dtype)
            train_all_steps(trainer)
            flops = sum(work[1] for work in times.work[WARM_UP:]) / n_steps
            if trainer.world.rank == 0:
                report(trainer, kernels(times.profiler), n_steps, flops, rates, arguments.top)


def profile_on(arguments: Namespace, others: list[str]) -> None:
    """Runs the command under torchrun for each number of devices."""
    if is_rank():
        raise UserError("--ngpu starts processes itself: start this without torchrun")
    check_device_count(max(arguments.ngpu))
    options = ["--case", arguments.case, "--steps", str(arguments.steps), "--top", str(arguments.top), *others]
    for ngpu in arguments.ngpu:
        if code := subprocess.run([*launcher(ngpu), "tidar.benchmarks.profile", *options]).returncode:
            sys.exit(code)


def report(
    trainer: Trainer, found: list[tuple[str, float, float]], n_steps: int, flops: float, rates, top: int
) -> None:
    """found: what `kernels` returns, of n_steps. flops: of a step."""
    config, plan = trainer.config, trainer.plan
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in found:
        by_kind[kind_of(name)] += (end - start) / n_steps
        by_name[name].append(end - start)
    wall = (max(end for *_, end in found) - min(start for _, start, _ in found)) / n_steps
    by_kind |= {name: exposed_ms(found, kinds) / n_steps for name, kinds in EXPOSED.items()}
    by_kind["idle"] = wall - busy_ms(found) / n_steps
    tokens = config.training.local_batch_size * config.training.seq_len * plan.micro_batches
    floors = floors_ms(
        plan.decoder,
        plan.n_own_parameters,
        plan.positions * plan.micro_batches // plan.tensor_parallel,
        2 * tokens // (plan.context_parallel * plan.tensor_parallel),
        flops / plan.tensor_parallel,
        rates,
        plan.shards,
        gathers=0 if isinstance(trainer.parallel, OneDevice) else 2 if trainer.parallel.reshards else 1,
        with_logits=not plan.kernels.loss_without_logits,
    )
    devices = f"{plan.world_size} x {device_name(trainer.device)}"
    print(f"{devices}, torch {torch.__version__}, {plan.dtype}, {plan.kernels.describe()}")
    print(f"ceilings: {rates[0] / 1e12:.0f} TFLOP/s, {rates[1] / 1e12:.2f} TB/s")
    print(f"{'kind':22}{'ms a step':>10} {'floor':>8} {'of step':>8} {'times':>7}")
    for kind in [*KINDS, *EXPOSED, "idle"]:
        floor = floors.get(kind, 0.0)
        times = f" {by_kind[kind] / floor:7.2f}" if floor else ""
        print(f"{kind:22}{by_kind[kind]:10.2f} {floor:8.2f} {by_kind[kind] / wall:8.1%}{times}")
    print(f"{'a step':22}{wall:10.2f} {sum(floors.values()):8.2f} {'':8} {wall / sum(floors.values()):7.2f}")
    print("\nlongest kernels: ms a step, calls a step, kind, name")
    for name, spans in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(spans) / n_steps:8.2f} {len(spans) / n_steps:6.0f}  {kind_of(name):21} {name[:110]}")
    print("\nlongest gaps of all steps: ms, kernel before, kernel after")
    for gap, before, after in longest_gaps(found, top // 3):
        print(f"{gap:8.2f}  {before[:55]:55}  {after[:55]}")


if __name__ == "__main__":
    main()
