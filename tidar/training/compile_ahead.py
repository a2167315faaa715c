"""Compiles QuACK's kernels of a run beside it, while it gets ready; what they are is read from the standard input.

Where they are first called each takes a second or three on one core, and a step has a dozen. Here a process that sees
no GPU notes the calls of a layer and of the loss without logits on the meta device, and makes each of them in a fork of
its own. QuACK keeps what is compiled on disk, and a run that comes to a kernel that is not ready waits for it there.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidar.kernels import Kernels
from tidar.models import DecoderConfig
from tidar.models.decoder import DecoderLayer

# seconds after which a process here ends itself: one that hangs holds a lock which the run waits for
LIMIT = 60


@dataclass(frozen=True)
class Work:
    """What decides which kernels a run calls.

    positions: of a micro-batch. chunk_size: of the loss. layers, loss: whether QuACK's kernels are in the layers, and
    whether the loss is without logits. multiprocessors, capability: of the GPU.
    """

    decoder: DecoderConfig
    dtype: torch.dtype
    positions: int
    chunk_size: int
    layers: bool
    loss: bool
    multiprocessors: int
    capability: tuple[int, int]


class Compiler:
    """The process that compiles, as the run sees it. It ends by itself."""

    def __init__(self, work: Work):
        """Raises OSError where no process can be started."""
        major, minor = work.capability
        blind = {"CUDA_VISIBLE_DEVICES": "", "QUACK_ARCH": f"{major}{minor}", "CUTE_DSL_ARCH": f"sm_{major}{minor}a"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tidar.training.compile_ahead"],
            env=os.environ | blind,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )
        try:
            with self.process.stdin:
                pickle.dump(work, self.process.stdin)
        except BrokenPipeError:
            pass  # it has ended already, which `trouble` tells

    def trouble(self) -> str | None:
        """Why it has failed, in a line, if it has."""
        if not self.process.poll():
            return None
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit status {self.process.returncode}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.errors.close()


class Noted(TorchDispatchMode):
    """Notes calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "tidar":
            self.calls.append((operator.name(), args))
        return operator(*args, **(kwargs or {}))


def layer_calls(work: Work) -> tuple[list[tuple[str, tuple]], list[tuple[str, tuple]]]:
    """What a layer's forward and backward pass call of our operators: names and arguments, on the meta device."""
    decoder = work.decoder
    with torch.device("meta"):
        layer = DecoderLayer(decoder, Kernels(fused_products=True)).to(work.dtype)
        x = torch.empty(1, work.positions, decoder.dim, dtype=work.dtype, requires_grad=True)
        angles = torch.empty(1, 1, work.positions, decoder.head_dim, dtype=work.dtype)
    with Noted() as forward:
        out = layer(x, angles, angles, None)
    with Noted() as backward:
        torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    return forward.calls, backward.calls


def kernel_calls(work: Work) -> Iterator[Callable[[], object]]:
    """Calls of QuACK, in the order in which a step comes to them."""
    from tidar.kernels.matmul import BENEATH

    forward, backward = layer_calls(work) if work.layers else ((), ())
    for name, arguments in forward:
        yield partial(BENEATH[name], work.multiprocessors, *arguments)
    if work.loss:
        from tidar.kernels import anchored_cross_entropy

        sizes = work.chunk_size, work.decoder.vocab_size, work.decoder.dim
        yield from anchored_cross_entropy.kernel_calls(*sizes, work.dtype, work.multiprocessors)
    for name, arguments in backward:
        yield partial(BENEATH[name], work.multiprocessors, *arguments)


def compiles(call: Callable[[], object], compiled: list[dict]) -> bool:
    """Makes the call. QuACK's ends in an error, for there is no device, once its kernel is among those `compiled`."""
    try:
        call()
    except Exception:
        if not any(compiled):
            traceback.print_exc()
            return False
    return True


def main() -> None:
    signal.alarm(2 * LIMIT)
    work = pickle.load(sys.stdin.buffer)
    os.nice(5)  # the run has to get ready meanwhile
    import quack.cache
    import quack.gemm_interface  # once, before the forks
    from quack.gemm import _compile_gemm
    from quack.gemm_runtime.host import _compile_gemm_epi

    calls = list(kernel_calls(work)) if quack.cache.CACHE_ENABLED else []
    ended = []
    for number, call in enumerate(calls):
        if number >= len(os.sched_getaffinity(0)):
            ended.append(os.wait()[1])
        if os.fork() == 0:
            signal.alarm(LIMIT)
            fine = compiles(call, [_compile_gemm.cache, _compile_gemm_epi.cache])
            sys.stderr.flush()
            os._exit(0 if fine else 1)
    ended += [os.wait()[1] for _ in calls[len(ended) :]]
    sys.exit(any(ended))


if __name__ == "__main__":
    main()
