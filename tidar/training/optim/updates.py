"""An optimizer step: clipping, learning rate, loss scale, and skipped steps."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidar.config import Config
from tidar.distributed import World
from tidar.kernels import Kernels
from tidar.losses.sums import LossSums
from tidar.models import Decoder
from tidar.training.optim.gradients import gradient_norm, local_gradient, sum_over_ranks
from tidar.training.optim.loss_scale import LossScaler
from tidar.training.optim.optimizer import make_optimizer
from tidar.training.optim.schedule import learning_rate
from tidar.training.optim.skipping import SkippedSteps


class Updates:
    """The optimizer with clipping, learning rate, loss scale and skipping.

    Whether a step is skipped is decided on the device; the host reads it while the next step is computed.
    """

    def __init__(
        self,
        model: Decoder,
        copies: Mapping[nn.Parameter, nn.Parameter],
        config: Config,
        world: World,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        kernels: Kernels,
        log: Callable[[str], None],
    ):
        """copies: parameters in the compute dtype, by master parameter; they hold the gradients.
        group: of all ranks, on the CPU. dtype: the compute dtype; with float16 the loss is scaled.
        """
        self.config = config
        self.world = world
        self.log = log
        self.parameters = list(model.parameters())
        self.is_divided = [model.shard.is_divided(name) for name, _ in model.named_parameters()]
        self.copies = copies
        self.optimizer: Any = make_optimizer(
            model, config.optimizer, config.training.seed, copies, kernels.adamw, model.shard
        )
        self.scaler = LossScaler(config.loss_scale)
        self.scales_loss = dtype == torch.float16
        self.skipped = SkippedSteps(config.training.max_steps_skipped, group, log)
        self.skipped.watch(model, weights=self.scales_loss)

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint restores in place, in addition to the optimizer's."""
        return {"skipped": self.skipped.counts, "loss_scale": self.scaler.state}

    def backward(self, loss: Tensor) -> None:
        if self.scales_loss:
            # the scale depends on whether the last step overflowed; known unless this is a step's first micro-batch
            self.finish_step()
            loss = loss * self.scaler.scale
        loss.backward()

    def apply(self, step: int, steps: int, sums: LossSums, rows: Callable[[], list[int]]) -> tuple[Tensor, float]:
        """Updates the parameters in step number `step` of a run of `steps`, and frees the gradients.

        sums: of all ranks' losses; nothing changes where one is not finite, or the norm of the gradients, or where the
        step has no target. rows: returns the row numbers of this rank's micro-batches in order, for the log.
        Returns the norm before clipping, scalar, and the learning rate. Raises TooManySkipped for the step before.
        """
        training, scale = self.config.training, self.scaler.scale if self.scales_loss else 1.0
        gradients = [local_gradient(parameter, self.copies) for parameter in self.parameters]
        norm = self._norm(gradients) / scale
        self.finish_step()
        self.skipped.check()
        found_inf = self.skipped.decide(step, sums, norm, rows)
        changes_nothing = torch.maximum(found_inf, (~sums.has_targets()).float())
        lr = learning_rate(step - self.skipped.total, steps, self.config.optimizer.lr, self.config.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clipped = (
            torch.clamp((norm + 1e-6) / training.max_norm, min=1.0) if training.max_norm else torch.ones_like(norm)
        )
        device = self.parameters[0].device
        self.optimizer.grad_scale, self.optimizer.found_inf = (clipped * scale).to(device), changes_nothing.to(device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, lr

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of the whole model's gradients, after summing those of parameters that tensor parallelism replicates."""
        world, counted = self.world, gradients
        if world.tp_size > 1:
            shared = [gradient for gradient, is_divided in zip(gradients, self.is_divided) if not is_divided]
            sum_over_ranks(shared, world.tp_group, world.device)
            if world.tp_rank > 0:
                counted = [gradient for gradient, is_divided in zip(gradients, self.is_divided) if is_divided]
        return gradient_norm(counted, (world.shard_group, world.tp_group), world.device)

    def finish_step(self) -> None:
        """Reads once whether the last step was skipped, and updates the loss scale. All ranks call it."""
        skipped = self.skipped.read_decision()
        if skipped is None or not self.scales_loss:
            return
        before = self.scaler.scale
        self.scaler.update(overflow=skipped)
        if self.scaler.scale != before:
            self.log(f"the loss scale goes from {before:g} to {self.scaler.scale:g}")

    def scalars(self) -> dict[str, float]:
        scalars = {"train/skipped_steps": self.skipped.total}
        return scalars | ({"train/loss_scale": self.scaler.scale} if self.scales_loss else {})
