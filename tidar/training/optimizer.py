"""AdamW, with moments in float32 or bfloat16."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tidar.config import derive_seed
from tidar.config.options import Optimizer

# elements of a parameter that are updated at one time where nothing fuses the update: bounds what it holds meanwhile
EAGER_ELEMENTS = 2**24


def make_optimizer(model: nn.Module, options: Optimizer, seed: int = 0, compile: bool = False) -> torch.optim.Optimizer:
    """AdamW over all parameters; weight decay on those that optimizer.decay_params names.

    Its `step` divides gradients by the attribute `grad_scale` and changes nothing where the attribute `found_inf` is 1,
    both scalar float32 tensors. seed, compile: of `BFloat16AdamW`.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        decays = options.decay_params == "all" or parameter.ndim >= 2
        (decayed if decays else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    common = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": options.eps}
    if options.state_dtype == "float32":
        return torch.optim.AdamW(groups, **common, fused=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return BFloat16AdamW(groups, names, seed, compile, **common)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW whose moments are bfloat16. They are updated in float32, and so rounded stochastically.

    Rounded to nearest, a second moment never decays where 1 - beta2 is below bfloat16's precision. How an element is
    rounded is a function of (seed, name of its parameter, its place in it, step), and so depends neither on the
    sharding nor on a restart.
    """

    def __init__(self, groups: list[dict], names: dict[nn.Parameter, str], seed: int, compile: bool, **defaults):
        super().__init__(groups, defaults)
        self.keys = {parameter: derive_seed(seed, f"rounding/{name}") % 2**31 for parameter, name in names.items()}
        self.first_elements = {parameter: _first_element(parameter) for parameter in names}
        self.update = torch.compile(_update, dynamic=True, fullgraph=True) if compile else _update_in_pieces

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= _new_state(parameter, torch.bfloat16)
                values = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
                local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
                if not local[0].numel():
                    continue
                device = local[0].device
                self.update(
                    *(value.view(-1) for value in local),
                    state["step"],
                    torch.full((), group["lr"], device=device),
                    group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    self.grad_scale,
                    self.found_inf,
                    torch.full((), self.keys[parameter], dtype=torch.int64, device=device),
                    torch.full((), self.first_elements[parameter], dtype=torch.int64, device=device),
                )
                state["step"] += 1 - self.found_inf


def _update_in_pieces(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *rest) -> None:
    *scalars, first = rest
    pieces = (tensor.split(EAGER_ELEMENTS) for tensor in (parameter, gradient, exp_avg, exp_avg_sq))
    for number, piece in enumerate(zip(*pieces)):
        _update(*piece, *scalars, first + number * EAGER_ELEMENTS)


def _update(
    parameter: Tensor,  # [n]
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,  # before this one
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    found_inf: Tensor,
    key: Tensor,
    first: Tensor,  # place of the first element in the whole parameter
) -> None:
    beta1, beta2 = betas
    gradient = gradient / grad_scale
    first_moment = exp_avg.float() * beta1 + gradient * (1 - beta1)
    second_moment = exp_avg_sq.float() * beta2 + gradient * gradient * (1 - beta2)
    step = steps.double() + 1
    rate = (lr / (1 - beta1**step)).float()
    deviation = (second_moment / (1 - beta2**step).float()).sqrt() + eps
    updated = parameter * (1 - lr * weight_decay) - rate * first_moment / deviation

    place = first.int() + torch.arange(len(parameter), device=parameter.device, dtype=torch.int32)
    bits = _mixed(place ^ _mixed((key + 0x9E3779B9 * step.long()).int()))
    skip = found_inf > 0
    parameter.copy_(torch.where(skip, parameter, updated))
    exp_avg.copy_(torch.where(skip, exp_avg, _rounded(first_moment, bits & 0xFFFF)))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq, _rounded(second_moment, _shifted(bits))))


def _mixed(x: Tensor) -> Tensor:
    """Bits that look random, of int32: two rounds of xor-shift and multiplication, modulo 2^32."""
    for factor in (0x7FEB352D, 0x846CA68B - 2**32):
        x = (x ^ _shifted(x)) * factor
    return x ^ _shifted(x)


def _shifted(x: Tensor) -> Tensor:
    """The upper 16 bits of int32, without its sign."""
    return (x >> 16) & 0xFFFF


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: up or down, as likely as it is near. bits: 16 random ones."""
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32).bfloat16()


def _first_element(parameter: nn.Parameter) -> int:
    """Place of this rank's first element in the whole parameter, whose rows may be sharded."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets[0] * (parameter.numel() // parameter.shape[0])


def _new_state(parameter: nn.Parameter, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


def state_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, to be saved or to be loaded into; made where there is none yet."""
    dtype = torch.bfloat16 if isinstance(optimizer, BFloat16AdamW) else torch.float32
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state |= _new_state(parameter, dtype)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors
