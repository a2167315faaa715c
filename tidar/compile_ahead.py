"""Compiles QuACK's kernels of a run beside it, while it gets ready; what they are is read from the standard input.

Where they are first called each takes a second or three on one core, and a run has a dozen. Here a process that sees no
GPU notes the calls of a layer and of the loss on the meta device, and makes each of them in a fork of its own. QuACK
keeps what is compiled on disk, and a run that comes to a kernel that is not ready waits for it there.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidar.models import DecoderConfig, Kernels
from tidar.models.decoder import DecoderLayer


@dataclass(frozen=True)
class Work:
    """Of which kernels are compiled. positions: of a micro-batch; chunk_size: of the loss; capability: of the GPU.

    layers, loss: whether QuACK's kernels are in the layers, and whether the loss is without logits.
    """

    decoder: DecoderConfig
    dtype: torch.dtype
    positions: int
    chunk_size: int
    layers: bool
    loss: bool
    multiprocessors: int
    capability: tuple[int, int]


def start_compiling(work: Work) -> subprocess.Popen:
    """Begins to compile. The process ends by itself, and tells by its exit status whether it knew what to compile."""
    major, minor = work.capability
    blind = {"CUDA_VISIBLE_DEVICES": "", "QUACK_ARCH": f"{major}{minor}", "CUTE_DSL_ARCH": f"sm_{major}{minor}a"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tidar.compile_ahead"],
        env=os.environ | blind,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with process.stdin:
            pickle.dump(work, process.stdin)
    except BrokenPipeError:
        pass  # it has ended already
    return process


class Noted(TorchDispatchMode):
    """Notes calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "tidar":
            self.calls.append((operator.name(), args))
        return operator(*args, **(kwargs or {}))


def layer_calls(work: Work) -> list[tuple[str, tuple]]:
    """What a layer's forward and backward pass call of our operators: names and arguments, on the meta device."""
    decoder = work.decoder
    with torch.device("meta"):
        layer = DecoderLayer(decoder, Kernels(fused_products=True)).to(work.dtype)
        x = torch.empty(1, work.positions, decoder.dim, dtype=work.dtype, requires_grad=True)
        angles = torch.empty(1, 1, work.positions, decoder.head_dim, dtype=work.dtype)
    with Noted() as noted:
        out = layer(x, angles, angles, None)
        torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    return noted.calls


def kernel_calls(work: Work) -> Iterator[Callable[[], object]]:
    """Calls of QuACK, in the order in which a step comes to them."""
    import quack.gemm_interface  # noqa: F401  once, before the forks

    from tidar.models.products import BENEATH

    if work.layers:
        for name, arguments in layer_calls(work):
            yield partial(BENEATH[name], work.multiprocessors, *arguments)
    if work.loss:
        from tidar.anchored_cross_entropy import kernels

        sizes = work.chunk_size, work.decoder.vocab_size, work.decoder.dim
        yield from kernels(*sizes, work.dtype, work.multiprocessors)


def main() -> None:
    work = pickle.load(sys.stdin.buffer)
    os.nice(5)  # the run has to get ready meanwhile
    calls = list(kernel_calls(work))
    for call in calls:
        if os.fork() == 0:
            try:
                call()
            except Exception:
                pass  # its kernel is compiled by now, and has no device to run on
            finally:
                os._exit(0)
    for _ in calls:
        os.wait()


if __name__ == "__main__":
    main()
