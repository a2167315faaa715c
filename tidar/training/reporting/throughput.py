"""How fast a rank trains, measured between reports."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tidar.data import Batch
from tidar.models import DecoderConfig
from tidar.models.flops import attention_flops, batch_flops, peak_flops
from tidar.training.reporting.slowness import Slowness


class Throughput:
    """Tokens, useful FLOPs and data wait of this rank's training steps since the last report."""

    def __init__(self, decoder: DecoderConfig, device: torch.device, context_parallel: int, tensor_parallel: int):
        """context_parallel: ranks that share each row. tensor_parallel: ranks that share each layer."""
        self.decoder, self.context_parallel, self.tensor_parallel = decoder, context_parallel, tensor_parallel
        self.device = device
        self.peak_flops = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.steps = self.tokens = 0
        self.flops = self.data_wait = 0.0
        self.allowed_pairs = torch.zeros((), dtype=torch.long, device=self.device)

    def count_step(self, micro_batches: list[Batch], data_wait: float) -> None:
        """Adds a step's micro-batches, for which it waited `data_wait` seconds."""
        self.steps += 1
        self.data_wait += data_wait
        for batch in micro_batches:
            self.tokens += batch.n_tokens
            self.flops += batch_flops(self.decoder, batch.rows, allowed_pairs=0)

    def compare_ranks(self, slowness: Slowness) -> list[str]:
        """Log lines about ranks that are slow. From here on the data wait is the longest one of any rank."""
        seconds = time.perf_counter() - self.started
        self.data_wait, lines = slowness.compare(self.data_wait, seconds, self.steps)
        return lines

    def count_pairs(self, allowed_pairs: Tensor) -> None:
        """Adds the query-key pairs that a micro-batch's mask allows: a scalar that the host does not wait for."""
        self.allowed_pairs += allowed_pairs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside, which is not training: validation, export, saving."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the steps before still run
        paused_at = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused_at

    @property
    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self.started) / self.steps

    def scalars(self) -> dict[str, float]:
        """The `perf/` scalars, per device. The caller has waited for the device."""
        seconds = time.perf_counter() - self.started
        flops = (self.flops + attention_flops(self.decoder, int(self.allowed_pairs))) / self.tensor_parallel
        scalars = {
            "perf/tokens_per_second": self.tokens / (self.context_parallel * self.tensor_parallel) / seconds,
            "perf/tflops": flops / seconds / 1e12,
            "perf/data_wait_fraction": self.data_wait / seconds,
        }
        if self.peak_flops:
            scalars["perf/mfu"] = flops / seconds / self.peak_flops
        return scalars
