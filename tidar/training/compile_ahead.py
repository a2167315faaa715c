"""Compiles a run's QuACK kernels in another process while the run prepares; reads a pickled `Work` from stdin.

At its first call a kernel compiles for one to three seconds on one core, and a step has a dozen. This process, which
sees no GPU, records the calls of a layer and of the loss without logits on the meta device, and runs each of them in a
fork. QuACK caches compiled kernels on disk; a run that reaches a kernel which is being compiled waits for it.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidar.kernels import Kernels, count_sms
from tidar.kernels.matmul import IMPLEMENTATIONS
from tidar.models import DecoderConfig, TensorShard
from tidar.models.decoder import DecoderLayer
from tidar.training.plan import RunPlan

# seconds after which a process here ends itself: one that hangs would hold a lock that the run waits for
TIMEOUT = 60


@dataclass(frozen=True)
class Work:
    """The values that determine which QuACK kernels a run calls.

    decoder: sizes of this device's part. positions: of a micro-batch. chunk_size: of the loss. num_sms, capability: of
    the GPU. ranks: that share each layer.
    """

    decoder: DecoderConfig
    dtype: torch.dtype
    positions: int
    chunk_size: int
    kernels: Kernels
    num_sms: int
    capability: tuple[int, int]
    ranks: int = 1


class Compiler:
    """Handle of the compiling process. It exits when all kernels are compiled."""

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
            stdin: Any = self.process.stdin
            with stdin:
                pickle.dump(work, stdin)
        except BrokenPipeError:
            pass  # it has ended already, which `failure` reports

    def failure(self) -> str | None:
        """Why the process failed, on one line; None if it did not."""
        if not self.process.poll():
            return None
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit status {self.process.returncode}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.errors.close()


def start_compiler(plan: RunPlan, resources: ExitStack, log: Callable[[str], None]) -> Compiler | None:
    """The process that compiles the kernels of a run ahead, one for all ranks of a machine; None if none is needed.

    resources: stops it when they are closed.
    """
    kernels = plan.kernels
    if not (kernels.fused_matmul or kernels.loss_without_logits) or plan.device.index != 0:
        return None
    work = Work(
        plan.own_sizes,
        plan.dtype,
        plan.positions,
        plan.config.training.loss_chunk_size,
        kernels,
        num_sms=count_sms(plan.device),  # type: ignore[arg-type]
        capability=torch.cuda.get_device_capability(plan.device),
        ranks=plan.tensor_parallel,
    )
    try:
        compiler = Compiler(work)
    except OSError as error:
        log(f"warning: no process can be started that compiles kernels ahead ({error.strerror})")
        return None
    resources.callback(compiler.stop)
    return compiler


class RecordedCalls(TorchDispatchMode):
    """Records calls of this package's operators that run a kernel of QuACK's: name and arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name() in IMPLEMENTATIONS:
            self.calls.append((operator.name(), args))
        return operator(*args, **(kwargs or {}))


def layer_calls(work: Work) -> tuple[list[tuple[str, tuple]], list[tuple[str, tuple]]]:
    """Calls of this package's operators in a layer's forward and in its backward pass, on the meta device."""
    decoder = work.decoder
    with torch.device("meta"):
        chosen = work.kernels
        kernels = Kernels(fused_matmul=True, dynamic_tiles=chosen.dynamic_tiles, float8=chosen.float8)
        # a shard that exchanges nothing: attention and MLP get all positions, as they do on several ranks
        layer = DecoderLayer(decoder, kernels, TensorShard(0, work.ranks)).to(work.dtype)
        x = torch.empty(1, work.positions, decoder.dim, dtype=work.dtype, requires_grad=True)
        angles = torch.empty(1, 1, work.positions, decoder.head_dim, dtype=work.dtype)
    with RecordedCalls() as forward:
        out = layer(x, angles, angles, None)
    with RecordedCalls() as backward:
        torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    return forward.calls, backward.calls


def kernel_calls(work: Work) -> Iterator[Callable[[], object]]:
    """Calls of QuACK's kernels, in the order of a step."""
    forward, backward = layer_calls(work) if work.kernels.fused_matmul else ((), ())
    for name, arguments in forward:
        yield partial(IMPLEMENTATIONS[name], work.num_sms, *arguments)
    if work.kernels.loss_without_logits:
        from tidar.kernels import anchored_cross_entropy

        sizes = work.chunk_size, work.decoder.vocab_size, work.decoder.dim
        yield from anchored_cross_entropy.kernel_calls(*sizes, work.dtype, work.num_sms)
    for name, arguments in backward:
        yield partial(IMPLEMENTATIONS[name], work.num_sms, *arguments)


def compile_kernel(call: Callable[[], object], compiled: list[dict]) -> bool:
    """Makes the call; whether a kernel was compiled. The call raises afterwards, because there is no device."""
    try:
        call()
    except Exception:
        if not any(compiled):
            traceback.print_exc()
            return False
    return True


def main() -> None:
    signal.alarm(2 * TIMEOUT)
    work = pickle.load(sys.stdin.buffer)
    os.nice(5)  # the run's own preparation goes first
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
            signal.alarm(TIMEOUT)
            succeeded = compile_kernel(call, [_compile_gemm.cache, _compile_gemm_epi.cache])
            sys.stderr.flush()
            os._exit(0 if succeeded else 1)
    ended += [os.wait()[1] for _ in calls[len(ended) :]]
    sys.exit(any(ended))


if __name__ == "__main__":
    main()
