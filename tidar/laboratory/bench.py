"""Speed and correctness of each attention backend under a pattern's mask."""

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

from tidar.config import named_error
from tidar.config.packages import install
from tidar.models import Mask, MaskBuilder, PointMask, RangeMask, attention, pattern_mask
from tidar.models.flops import ATTENTION_FLOPS
from tidar.patterns import Documents, Pattern

# tokens of the row on which results are compared; largest relative error of bfloat16 against float64, in the 2-norm
CHECKED, TOLERANCE = 512, 2e-2
REPEATS = 20
HEADER = f"{'backend':<8} {'forward':>19} {'backward':>21}   error against dense float64"


def bench(
    pattern: Pattern, lengths: list[int], rows: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[list[str], list[str]]:
    """Measures `rows` rows with documents of these lengths on the current CUDA device, in bfloat16.

    Returns the lines of a table and the backends whose results are wrong. TFLOP/s count allowed pairs only.
    """
    device = torch.device("cuda")
    shape = heads, kv_heads, head_dim
    documents, positions = _documents(pattern, lengths, rows, device)
    pairs = int(pattern_mask(pattern, documents).allowed_pairs())
    lines = [*_build_times(pattern, documents), "", HEADER]
    wrong = []
    backends: dict[str, Callable] = {"flex": attention, "flash": partial(attention, flash=True), "sdpa": attention}
    for name, attend in backends.items():
        if name == "flash" and find_spec("flash_attn") is None:
            lines.append(f"{name:<8} is not installed: {install('flash')}")
            continue
        try:
            error = _error(name, attend, pattern, lengths, shape, device)
            mask = MaskBuilder(pattern, name)(documents).attention
            forward, backward = _times(attend, mask, rows, positions, shape, device)
        except Exception as failure:  # a kernel that this device or torch lacks, or too little memory
            torch.cuda.empty_cache()
            lines.append(f"{name:<8} fails: {named_error(failure)[:110]}")
            continue
        wrong += [name] if error > TOLERANCE else []
        cells = []
        for seconds, share in ((forward, 1 / 3), (backward, 2 / 3)):
            rate = pairs * ATTENTION_FLOPS * share * heads * head_dim / seconds / 1e12
            cells.append(f"{seconds * 1e3:8.3f} ms {rate:5.0f} TFLOP/s")
        lines.append(f"{name:<8} {cells[0]} {cells[1]}   {error:.1e}")
    return lines, wrong


def _documents(pattern: Pattern, lengths: list[int], rows: int, device: torch.device) -> tuple[Documents, int]:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].repeat(rows, 1)
    return pattern.documents(ids.to(device), range(rows)), pattern.model_positions(sum(lengths))


def _build_times(pattern: Pattern, documents: Documents) -> list[str]:
    def milliseconds(build: Callable) -> str:
        def timed() -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            build(pattern_mask(pattern, documents))
            torch.cuda.synchronize()
            return (time.perf_counter() - started) * 1e3

        first = timed()
        return f"{median(timed() for _ in range(REPEATS)):8.3f} ms (the first time {first:.0f} ms)"

    lines = []
    if isinstance(pattern_mask(pattern, documents), RangeMask):
        lines.append(f"block mask, from ranges {milliseconds(RangeMask.block_mask)}")
    return [*lines, f"block mask, all points  {milliseconds(PointMask.block_mask)}"]


def _inputs(rows: int, positions: int, shape: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    heads, kv_heads, head_dim = shape
    random = torch.Generator(device).manual_seed(0)
    sizes = [(rows, n, positions, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(size, generator=random, device=device, dtype=torch.bfloat16) for size in sizes]


def _error(name: str, attend: Callable, pattern: Pattern, lengths: list[int], shape, device: torch.device) -> float:
    """Largest error of output and gradients, on rows shortened to CHECKED tokens."""
    shortened: list[int] = []
    left = CHECKED
    for length in lengths:
        shortened, left = shortened + [min(length, left)], left - min(length, left)
    documents, positions = _documents(pattern, [length for length in shortened if length], 2, device)
    *inputs, d_out = _inputs(2, positions, shape, device)
    results = []
    exactly: tuple[torch.dtype, str, Callable] = (torch.float64, "sdpa", attention)
    for kind, backend, function in (exactly, (torch.bfloat16, name, attend)):
        tensors = [tensor.to(kind).requires_grad_() for tensor in inputs]
        out = function(*tensors, MaskBuilder(pattern, backend)(documents).attention)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, d_out.to(kind))])
    return max(float((found.double() - exact).norm() / exact.norm()) for exact, found in zip(*results))


def _times(attend: Callable, mask: Mask, rows: int, positions: int, shape, device: torch.device) -> tuple[float, float]:
    """Median seconds of a forward and of a backward pass on the device."""
    *inputs, d_out = _inputs(rows, positions, shape, device)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = attend(*inputs, mask)
    return (
        _median_seconds(lambda: attend(*inputs, mask)),
        _median_seconds(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)),
    )


def _median_seconds(call: Callable) -> float:
    for _ in range(3):
        call()
    # keeps the device busy first, so that the host is ahead, as in training, and its time is not measured
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        busy @ busy
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3
