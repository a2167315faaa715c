"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from tidar.config.options import LRScheduler, Optimizer


def make_optimizer(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay on those that optimizer.decay_params names."""
    decayed, plain = [], []
    for parameter in model.parameters():
        decays = options.decay_params == "all" or parameter.ndim >= 2
        (decayed if decays else plain).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def learning_rate(step: int, steps: int, lr: float, options: LRScheduler) -> float:
    """Rate of step 1, 2, … `steps`: linear up to `lr` at warmup_steps, then down to min_lr_factor * lr at the last."""
    if step <= options.warmup_steps:
        return lr * step / options.warmup_steps
    progress = (step - options.warmup_steps) / (steps - options.warmup_steps)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[options.decay_type]
    return lr * (options.min_lr_factor + (1 - options.min_lr_factor) * shape)


def state_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, to be saved or to be loaded into; made where there is none yet."""
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors
