"""The MLP's GEMMs in FP8: what is rounded, and that training follows."""

from functools import partial

import pytest
import torch
from results import batch_losses
from torch.library import opcheck

from tidar.config import UserError, load_config
from tidar.kernels import Kernels, Sizes, choose_kernels
from tidar.kernels.float8 import (
    float8_mlp,
    gated_float8_backward,
    gated_magnitude,
    gated_rounded,
    rounded_layouts,
    transposed_rounded,
)
from tidar.models import size_config
from tidar.models.decoder import MLP
from tidar.models.huggingface import decoder_config

CPU = torch.device("cpu")
CONFIG = decoder_config(size_config("debug") | {"vocab_size": 258})
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(matrix: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    scale = torch.finfo(kind).max / matrix.abs().max()
    return (matrix * scale).to(kind).float() / scale


@pytest.mark.parametrize("positions, with_residual", [(48, True), (37, False)])
def test_gemms_are_those_of_rounded_operands(positions, with_residual):
    """One layer's MLP, forward and backward, against GEMMs of operands that are rounded here."""
    mlp, dim = MLP(CONFIG, Kernels(float8=True)), CONFIG.dim
    weights = [torch.randn(m.weight.shape) * 0.05 for m in (mlp.gate_up_proj, mlp.down_proj)]
    with torch.no_grad():
        for module, weight in zip((mlp.gate_up_proj, mlp.down_proj), weights):
            module.weight.copy_(weight)
    x, residual = (torch.randn(positions, dim, requires_grad=True) for _ in range(2))
    d_out = torch.randn(dim, positions).T if with_residual else torch.randn(dim).expand(positions, dim)
    found = mlp(x[None], residual[None] if with_residual else None)[0]
    found.backward(d_out)

    narrow_x, w_gate_up, w_down = (rounded(matrix.detach(), E4M3) for matrix in (x, *weights))
    gate_up = (narrow_x @ w_gate_up.T).requires_grad_()
    hidden = torch.nn.functional.silu(gate_up[:, : CONFIG.hidden_dim]) * gate_up[:, CONFIG.hidden_dim :]
    narrow_hidden, narrow_d_out = rounded(hidden.detach(), E4M3), rounded(d_out, E5M2)
    d_gate_up = rounded(torch.autograd.grad(hidden, gate_up, narrow_d_out @ w_down)[0], E5M2)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    out = narrow_hidden @ w_down.T
    close(found, out + residual if with_residual else out)
    if with_residual:
        close(residual.grad, d_out)
    close(x.grad, d_gate_up @ w_gate_up)
    close(mlp.down_proj.weight.grad, narrow_d_out.T @ narrow_hidden)
    close(mlp.gate_up_proj.weight.grad, d_gate_up.T @ narrow_x)


def test_matrices_of_zeros_and_of_what_is_not_finite():
    """Zeros stay zeros, and one value that is not finite makes all results so."""
    weights = [torch.randn(2 * 32, 16), torch.randn(16, 32)]
    for value, is_expected in ((0.0, lambda y: not y.any()), (float("nan"), torch.isnan), (float("inf"), torch.isnan)):
        x = torch.zeros(5, 16)
        x[3, 2] = value
        assert torch.as_tensor(is_expected(float8_mlp(x, *weights, None))).all()


def test_operators_say_what_they_return():
    """Shapes, types and strides for torch.compile; positions of which 16 divides 48, and not 37."""
    scale = torch.tensor(30.0)
    for positions in (48, 37):
        preactivation, gradient = torch.randn(positions, 64), torch.randn(positions, 32)
        opcheck(gated_magnitude, (preactivation,))
        opcheck(gated_rounded, (preactivation, scale))
        opcheck(gated_float8_backward, (gradient, preactivation, scale))
        opcheck(rounded_layouts, (gradient, scale))
        opcheck(transposed_rounded, (gradient, scale))
        transposed = transposed_rounded(gradient, scale)
        assert transposed.shape == (32, 48) and not transposed[:, positions:].float().any()


def test_training_follows_the_plain_one(tmp_path, ranks):
    """20 steps beside those without: on one rank, sharded over two, and with layers divided over two.

    A plain run resumes from their checkpoint.
    """
    common = "--training.seq_len 32 --training.global_batch_size 4 --training.steps 20 --validation.enable false"
    common += " --metrics.log_freq 1 --checkpoint.interval 20"
    float8 = "--training.float8 true"
    runs = {
        "plain": (1, ""),
        "one": (1, float8),
        "two": (2, float8),
        "divided": (2, f"{float8} --parallelism.tensor_parallel_degree 2"),
    }
    curves = {}
    for name, (size, options) in runs.items():
        folder = tmp_path / name
        rows = 2 if name == "two" else 4
        options += f" --training.local_batch_size {rows} --job.dump_folder {folder}"
        ranks.run(size, *common.split(), *options.split())
        curves[name] = batch_losses(folder)
    assert curves["plain"][-1] < 0.8 * curves["plain"][0]
    for name in ("one", "two", "divided"):
        errors = [abs(a / b - 1) for a, b in zip(curves[name], curves["plain"])]
        print(name, max(errors))
        assert 0 < max(errors) < 2e-3
    for name in ("two", "divided"):
        print(name, "against one", max(abs(a / b - 1) for a, b in zip(curves[name], curves["one"])))
        assert curves[name] == pytest.approx(curves["one"], rel=5e-4 if name == "two" else 1e-3)
    for name in ("plain", "two"):
        more = f"--training.steps 21 --training.local_batch_size 4 --job.dump_folder {tmp_path / name}"
        ranks.run(1, *common.split(), *more.split())
    assert batch_losses(tmp_path / "two")[:20] == curves["two"]
    assert batch_losses(tmp_path / "two")[20] == pytest.approx(batch_losses(tmp_path / "plain")[20], rel=2e-3)


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value).removeprefix("training.float8 = true: ")


def test_devices_and_types_without_fp8_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    cuda = torch.device("cuda")
    assert refusal(partial(chosen, cuda, torch.bfloat16)) == "needs an Ada, Hopper or later GPU, not A100"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    chosen(cuda, torch.bfloat16)
    assert "mixed_precision_param = bfloat16, not float16" in refusal(partial(chosen, cuda, torch.float16))
    chosen(CPU, torch.float16)


@pytest.mark.parametrize("dim, hidden", [(40, 64), (64, 100)])
def test_sizes_without_fp8_matmuls_are_refused(dim, hidden):
    message = refusal(partial(chosen, CPU, torch.float32, Sizes(dim, hidden, 32, 258)))
    assert message == f"needs sizes of the MLP that are multiples of 16, not {dim} and {hidden}"
    found = chosen(CPU, torch.float32, Sizes(64, 96, 32, 258))
    assert found.float8 is True and "training.float8 is emulated on a CPU" in found.warnings[0]


def chosen(device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None):
    return choose_kernels(load_config(["--training.float8", "true"]), device, dtype, sizes)
