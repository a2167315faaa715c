"""Reports of steps, epochs and validations: scalars to files, lines to the console."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from torch import nn

from tidar.config import Config
from tidar.distributed import World
from tidar.losses.sums import LossSums
from tidar.training.reporting.metrics import MetricWriter, peak_memory_gib, step_line, validation_lines
from tidar.training.reporting.samples import decoded_lines, sample_markdown
from tidar.training.reporting.slowness import Slowness
from tidar.training.reporting.throughput import Throughput
from tidar.training.reporting.weights_and_biases import WandbRun
from tidar.training.validation import DecodedPrompts


class Reports:
    """Writes to `metrics` the means of a step's or an epoch's `LossSums`."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        throughput: Throughput,
        loss_weights: dict[str, float],
        layers: Iterable[nn.Module],
        world: World,
        cpu_group: dist.ProcessGroup,
        log: Callable[..., None],
    ):
        """layers: of the model. cpu_group: of all ranks, of which rank 0 writes the files."""
        wandb = WandbRun(folder, config, log) if config.metrics.enable_wandb else None
        self.metrics = MetricWriter(folder, world.rank == 0, log, wandb)
        self.slowness = Slowness(layers, world, cpu_group)
        self.throughput = throughput
        self.loss_weights = loss_weights
        self.log = log

    def step(self, step: int, steps: int, sums: LossSums, more: dict[str, float]) -> None:
        """Reports step number `step` of `steps`. more: further scalars, train/lr and train/grad_norm among them.

        All ranks call it.
        """
        means = sums.means(self.loss_weights)
        scalars = {f"train/batch_{name}": value for name, value in means.items()} | more
        lines = self.throughput.compare_ranks(self.slowness)
        scalars |= self.throughput.scalars() | {"memory/peak_gib": peak_memory_gib(self.throughput.device)}
        self.metrics.write(step, scalars)
        seconds_left = (steps - step) * self.throughput.seconds_per_step
        self.log(step_line(step, steps, scalars, seconds_left), *lines)
        self.throughput.restart()

    def epoch(self, step: int, epoch: int, sums: LossSums) -> None:
        """Reports epoch number `epoch`, which ends with the step that takes its last row."""
        means = sums.means(self.loss_weights)
        scalars = {f"train/epoch_{name}": value for name, value in means.items() if name.endswith("loss")}
        self.metrics.write(step, scalars)
        texts = [f"{name} {value:.4f}" for name, value in scalars.items()]
        self.log(f"epoch {epoch} ends  {'  '.join(texts) or 'no targets'}")

    def validation(self, step: int, scalars: dict[str, float], decoded: DecodedPrompts | None) -> None:
        """decoded: what was decoded of held-out prompts, if anything."""
        if decoded:
            scalars |= {"val/tokens_per_forward": decoded.tokens_per_forward}
        self.metrics.write(step, scalars)
        self.log(*validation_lines(scalars))
        if decoded:
            self.log(*decoded_lines(decoded))
            if decoded.sample:
                self.metrics.write_text(step, "val/sample", sample_markdown(*decoded.sample))
