"""AdamW, with moments in float32 or bfloat16."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tidar.config import derive_seed
from tidar.config.options import Optimizer
from tidar.models import WHOLE, TensorShard, local_rows
from tidar.training.optim.gradients import local_gradient, local_part

# elements updated at a time without the fused kernel: bounds the temporary memory
EAGER_ELEMENTS = 2**24


def make_optimizer(
    model: nn.Module,
    options: Optimizer,
    seed: int = 0,
    copies: Mapping[nn.Parameter, nn.Parameter] | None = None,
    in_one_kernel: bool = False,
    shard: TensorShard = WHOLE,
) -> torch.optim.Optimizer:
    """AdamW over all parameters; weight decay on those that optimizer.decay_params names.

    Its `step` divides gradients by the attribute `grad_scale`, and changes nothing where the attribute `found_inf` is
    1; both are scalar float32 tensors. seed, copies, in_one_kernel, shard: see `MixedAdamW`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        decays = options.decay_params == "all" or parameter.ndim >= 2
        (decayed if decays else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": options.eps}
    if options.state_dtype == "float32" and not copies and not in_one_kernel:
        return torch.optim.AdamW(groups, **common, fused=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    dtype = getattr(torch, options.state_dtype)
    return MixedAdamW(groups, names, copies or {}, dtype, seed, in_one_kernel, shard, **common)


class MixedAdamW(torch.optim.Optimizer):
    """AdamW with two features that torch's lacks: moments in bfloat16, and 16-bit copies of float32 master weights.
    The copies hold the gradients and are overwritten by each update. All arithmetic is float32.

    Moments in bfloat16 are rounded stochastically: rounded to nearest, a second moment never decays where 1 - beta2 is
    below bfloat16's precision. The rounding of an element is a function of (seed, parameter's name, index in the
    parameter, step), so it depends neither on the sharding nor on a restart.
    """

    def __init__(
        self,
        groups: list[dict],
        names: dict[nn.Parameter, str],
        copies: Mapping[nn.Parameter, nn.Parameter],
        state_dtype: torch.dtype,
        seed: int,
        in_one_kernel: bool,
        shard: TensorShard,
        **defaults,
    ):
        """in_one_kernel: updates all parameters of a group in one CUDA kernel, not one after the other.
        shard: the part of the parameters that this rank has.
        """
        super().__init__(groups, defaults)
        self.copies = copies
        self.state_dtype = state_dtype
        # created once: a copy from pageable host memory would synchronize with the device in every step
        self.keys: list[Any] = [_keys(group["params"], names, seed) for group in self.param_groups]
        self.numbers = {parameter: _numbers(parameter, name, shard) for parameter, name in names.items()}
        self.in_one_kernel = in_one_kernel
        # set before each step: a factor of the gradients, and 1 where the step is to change nothing; float32 scalars
        self.grad_scale: Tensor
        self.found_inf: Tensor

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, keys in zip(self.param_groups, self.keys):
            if group["params"]:
                self._update(group, keys)

    def _update(self, group: dict, keys: Tensor) -> None:
        parameters = group["params"]
        states = [self._state(parameter) for parameter in parameters]
        # the same for all parameters
        steps = states[0]["step"]
        device = steps.device
        beta1, beta2 = group["betas"]
        number = steps.double() + 1
        lr = torch.full((), group["lr"], dtype=torch.double, device=device)
        rate, correction = lr / (1 - beta1**number), 1 - beta2**number
        values = (lr * group["weight_decay"], rate, correction, self.grad_scale, self.found_inf)
        scalars = torch.stack([value.to(device).float() for value in values])
        salts = _mixed((keys + 0x9E3779B9 * steps.long()).int())
        tensors = [
            OfParameter(
                local_part(parameter),
                local_gradient(parameter, self.copies),
                local_part(state["exp_avg"]),
                local_part(state["exp_avg_sq"]),
                self.copies.get(parameter),
                self.numbers[parameter],
            )
            for parameter, state in zip(parameters, states)
        ]
        if self.in_one_kernel:
            from tidar.kernels.adamw import update_all

            numbers = [slices.numbers for slices in tensors]
            update_all(addressable(tensors), numbers, salts, scalars, group["betas"], group["eps"])
        else:
            for slices, salt in zip(tensors, salts):
                _update_in_pieces(slices, salt, scalars, group["betas"], group["eps"])
        step_counts = [state["step"] for state in states]
        # one tensor for each: torch would read a single one on the host, which waits for the device
        torch._foreach_add_(step_counts, [1 - self.found_inf.to(device)] * len(step_counts))

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= _new_state(parameter, self.state_dtype)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None


class Numbers(NamedTuple):
    """The elements of a tensor as they are numbered in the whole parameter: element e has number
    `start + p + p // run * gap`, with `p = first + e`.
    """

    first: int
    start: int
    run: int
    gap: int


class OfParameter(NamedTuple):
    """This rank's shards of a parameter, its gradient, moments and copy, and the numbers of their elements."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    numbers: Numbers


def addressable(tensors: list[OfParameter]) -> list[list[Tensor | None]]:
    """Columns of parameters, gradients, both moments and copies that a kernel can read through bare pointers:
    contiguous, 16-byte aligned, one dtype for each column.

    Gradients that are not aligned are copied: FSDP2 places them anywhere in a buffer. Raises ValueError for any other
    tensor that is not as required.
    """
    columns = [list(column) for column in zip(*(slices[:-1] for slices in tensors))]
    columns[1] = [gradient if _is_aligned(gradient) else gradient.clone().contiguous() for gradient in columns[1]]
    for name, column in zip(OfParameter._fields, columns):
        if len({value if value is None else value.dtype for value in column}) > 1:
            raise ValueError(f"the tensors of {name} have several types")
        for value in column:
            if value is not None and not _is_aligned(value):
                raise ValueError(f"{name} of shape {list(value.shape)} does not lie in one piece, from 16 bytes on")
    return columns


def _is_aligned(value: Tensor) -> bool:
    return value.is_contiguous() and value.data_ptr() % 16 == 0


def _keys(parameters: list[nn.Parameter], names: dict[nn.Parameter, str], seed: int) -> Tensor | None:
    """Seeds of the rounding of each parameter, `[n]` int64."""
    keys = [derive_seed(seed, f"rounding/{names[parameter]}") % 2**31 for parameter in parameters]
    return torch.tensor(keys, device=parameters[0].device) if keys else None


def _update_in_pieces(tensors: OfParameter, *others) -> None:
    *values, numbers = tensors
    pieces = ([None] if value is None else value.view(-1).split(EAGER_ELEMENTS) for value in values)
    for number, piece in enumerate(zip_longest(*pieces)):
        own = numbers._replace(first=numbers.first + number * EAGER_ELEMENTS)
        _update(OfParameter(*piece, own), *others)  # type: ignore[call-arg]


def _update(tensors: OfParameter, salt: Tensor, scalars: Tensor, betas: tuple[float, float], eps: float) -> None:
    """Updates one flat parameter. salt: of its rounding. scalars: see `MixedAdamW._update`."""
    parameter, gradient, exp_avg, exp_avg_sq, copy, numbers = tensors
    decay, rate, correction, grad_scale, found_inf = scalars
    beta1, beta2 = betas
    gradient = gradient.float() / grad_scale
    first_moment = exp_avg.float() * beta1 + gradient * (1 - beta1)
    second_moment = exp_avg_sq.float() * beta2 + gradient * gradient * (1 - beta2)
    deviation = (second_moment / correction).sqrt() + eps
    updated = parameter * (1 - decay) - rate * first_moment / deviation

    skip = found_inf > 0
    parameter.copy_(torch.where(skip, parameter, updated))
    if exp_avg.dtype == torch.bfloat16:
        at = numbers.first + torch.arange(len(parameter), device=parameter.device)
        index = numbers.start + at + at // numbers.run * numbers.gap
        bits = _mixed(index.int() ^ salt)
        first_moment, second_moment = _rounded(first_moment, bits & 0xFFFF), _rounded(second_moment, _shifted(bits))
    exp_avg.copy_(torch.where(skip, exp_avg, first_moment))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq, second_moment))
    if copy is not None:
        copy.copy_(parameter)


def _mixed(x: Tensor) -> Tensor:
    """Pseudo-random bits from int32: two rounds of xor-shift and multiplication, modulo 2^32."""
    for factor in (0x7FEB352D, 0x846CA68B - 2**32):
        x = (x ^ _shifted(x)) * factor
    return x ^ _shifted(x)


def _shifted(x: Tensor) -> Tensor:
    """Logical right shift of int32 by 16 bits."""
    return (x >> 16) & 0xFFFF


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, rounded stochastically. bits: 16 random bits for each element."""
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32).bfloat16()


def _numbers(parameter: nn.Parameter, name: str, shard: TensorShard) -> Numbers:
    first = local_rows(parameter)[1] * (parameter.numel() // parameter.shape[0])
    return Numbers(first, *shard.numbering(name, parameter.shape))


def _new_state(parameter: nn.Parameter, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


def state_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, to save or to load into; created where there is none yet."""
    dtype = optimizer.state_dtype if isinstance(optimizer, MixedAdamW) else torch.float32
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state |= _new_state(parameter, dtype)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors
