"""AdamW for many tensors in one launch: a Triton kernel that reads their addresses from a table. Needs CUDA."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements and warps of a program
BLOCK, WARPS = 1024, 4
# columns of the table
COLUMNS = tl.constexpr(10)


def update_all(
    columns: Sequence[Sequence[Any]],
    numbers: Sequence[tuple[int, int, int, int]],
    salts: Tensor,
    scalars: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """What `tidar.training.optim.optimizer._update` does, for all parameters of `addressable` columns at once.

    numbers: of each one's elements in the whole parameter: first, start, run and gap (see `Numbers` there).
    """
    sizes = tuple(parameter.numel() for parameter in columns[0])
    owners, starts = _blocks(sizes, BLOCK, scalars.device)
    if not len(owners):
        return
    addresses = [[0 if value is None else value.data_ptr() for value in column] for column in columns]
    rows = torch.tensor([*addresses, sizes, *zip(*numbers)]).T.contiguous()
    # from pinned memory, so that the copy does not block the host
    table = rows.pin_memory().to(scalars.device, non_blocking=True)
    _, gradients, moments, _, copies = columns
    _adamw_kernel[(len(owners),)](
        table,
        owners,
        starts,
        salts,
        scalars,
        gradients[0],
        moments[0],
        copies[0],
        betas[0],
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        moments[0].dtype == torch.bfloat16,
        copies[0] is not None,
        any(start or gap for _, start, _, gap in numbers),
        BLOCK,
        num_warps=WARPS,
    )


@lru_cache(maxsize=2)  # the optimizer's groups
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of tensors of these sizes, the tensor's index and the block's first element, int64."""
    counts = torch.tensor([-(-size // block) for size in sizes])
    owners = torch.arange(len(sizes)).repeat_interleave(counts)
    starts = (torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]) * block
    return owners.to(device), starts.to(device)


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2073254261  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _rounded(x, bits):
    return ((x.to(tl.int32, bitcast=True) + bits) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _adamw_kernel(
    table,
    owners,
    starts,
    salts,
    scalars,
    like_gradient,
    like_moment,
    like_copy,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    rounds: tl.constexpr,
    copies: tl.constexpr,
    divided: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program updates one block of one tensor. like_*: tensors of which only the dtype is used."""
    owner = tl.load(owners + tl.program_id(0))
    entry = table + owner * COLUMNS
    size = tl.load(entry + 5)
    start = tl.multiple_of(tl.load(starts + tl.program_id(0)), BLOCK)
    index = start + tl.arange(0, BLOCK)
    pointers = (
        tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16) + index,
        tl.multiple_of(tl.load(entry + 1).to(like_gradient.dtype), 16) + index,
        tl.multiple_of(tl.load(entry + 2).to(like_moment.dtype), 16) + index,
        tl.multiple_of(tl.load(entry + 3).to(like_moment.dtype), 16) + index,
    )
    copied = None
    if copies:
        copied = tl.multiple_of(tl.load(entry + 4).to(like_copy.dtype), 16) + index
    number = tl.load(entry + 6) + index
    if rounds and divided:
        number += tl.load(entry + 7) + number // tl.load(entry + 8) * tl.load(entry + 9)
    noise = number.to(tl.int32) ^ tl.load(salts + owner)
    factors = (beta1, rest1, beta2, rest2, eps)
    # whole blocks are loaded without a mask
    if start + BLOCK <= size:
        _update(pointers, copied, noise, scalars, factors, None, rounds, copies)
    else:
        _update(pointers, copied, noise, scalars, factors, index < size, rounds, copies)


@triton.jit
def _update(pointers, copied, noise, scalars, factors, inside, rounds: tl.constexpr, copies: tl.constexpr):
    parameters, gradients, first_moments, second_moments = pointers
    beta1, rest1, beta2, rest2, eps = factors
    # loaded before it is known whether the step is skipped, because loads take longest
    parameter = tl.load(parameters, mask=inside)
    gradient = tl.load(gradients, mask=inside).to(tl.float32)
    first_moment = tl.load(first_moments, mask=inside).to(tl.float32)
    second_moment = tl.load(second_moments, mask=inside).to(tl.float32)
    decay, rate, correction = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    if tl.load(scalars + 4) == 0:
        gradient /= tl.load(scalars + 3)
        first_moment = first_moment * beta1 + gradient * rest1
        second_moment = second_moment * beta2 + gradient * gradient * rest2
        parameter = parameter * (1 - decay) - rate * first_moment / (tl.sqrt(second_moment / correction) + eps)
        tl.store(parameters, parameter, mask=inside)
        if copies:
            tl.store(copied, parameter.to(copied.dtype.element_ty), mask=inside)
        if rounds:
            bits = _mixed(noise)
            first_moment = _rounded(first_moment, bits & 0xFFFF)
            second_moment = _rounded(second_moment, (bits >> 16) & 0xFFFF)
        tl.store(first_moments, first_moment.to(first_moments.dtype.element_ty), mask=inside)
        tl.store(second_moments, second_moment.to(second_moments.dtype.element_ty), mask=inside)
