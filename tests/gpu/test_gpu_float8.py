"""Kernels that round to FP8, beside plain torch."""

import pytest
import torch
from gpu_helpers import CUDA, relative

from tidar.kernels.float8 import (
    gated_float8_backward,
    gated_magnitude,
    gated_rounded,
    rounded_layouts,
    transposed_rounded,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m, hidden", [(37, 96), (1000, 80), (4096, 1024)])
def test_the_float8_kernels_equal_plain_torch(m, hidden):
    """But for results that lie on the boundary of two numbers in FP8, of which there are few."""
    torch.manual_seed(m)
    preactivation = torch.randn(m, 2 * hidden, dtype=torch.bfloat16)
    d_hidden = torch.randn(m, hidden, dtype=torch.bfloat16)
    scale = torch.tensor(50.0)
    for operator, arguments in (
        (gated_magnitude, (preactivation,)),
        (gated_rounded, (preactivation, scale)),
        (gated_float8_backward, (d_hidden, preactivation, scale)),
        (rounded_layouts, (d_hidden, 1000 * scale)),
        (transposed_rounded, (d_hidden, scale)),
    ):
        expected = operator(*arguments)
        found = operator(*(value.to(CUDA) for value in arguments))
        for one, other in zip(
            *(results if isinstance(results, tuple) else (results,) for results in (found, expected))
        ):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
            one, other = one.cpu().float(), other.float()
            differ = (one - other).abs() > 1e-5 * other.abs()
            assert differ.float().mean() < 2e-3 and relative(one, other) < 1e-2
    for value in (float("nan"), float("inf")):
        preactivation[m // 2, hidden // 2] = value
        magnitude = gated_magnitude(preactivation.to(CUDA))
        assert not magnitude.isfinite()
        on_device, scale = preactivation.to(CUDA), 448 / magnitude
        assert not gated_rounded(on_device, scale).float()[m // 2, hidden // 2].isfinite()
        d_preactivation, _, magnitude = gated_float8_backward(d_hidden.to(CUDA), on_device, scale)
        assert not magnitude.isfinite()
        for rounded in rounded_layouts(d_preactivation, 57344 / magnitude):
            assert not rounded.float().isfinite().all()
