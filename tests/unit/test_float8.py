"""The MLP's GEMMs in FP8: what is rounded, and that training follows."""

from functools import partial

import pytest
import torch
from results import batch_losses

from tidar.config import UserError, load_config
from tidar.kernels import Kernels, Sizes, choose_kernels
from tidar.models import size_config
from tidar.models.decoder import MLP
from tidar.models.huggingface import decoder_config

CPU = torch.device("cpu")
CONFIG = decoder_config(size_config("debug") | {"vocab_size": 258})
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(matrix: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    scale = torch.finfo(kind).max / matrix.abs().max()
    return (matrix * scale).to(kind).float() / scale


@pytest.mark.parametrize("positions", [48, 37])
def test_gemms_are_those_of_rounded_operands(positions):
    """One layer's MLP, forward and backward, against GEMMs of operands that are rounded here."""
    mlp, dim = MLP(CONFIG, Kernels(float8="emulated")), CONFIG.dim
    weights = [torch.randn(m.weight.shape) * 0.05 for m in (mlp.gate_up_proj, mlp.down_proj)]
    with torch.no_grad():
        for module, weight in zip((mlp.gate_up_proj, mlp.down_proj), weights):
            module.weight.copy_(weight)
    x, d_out = torch.randn(positions, dim, requires_grad=True), torch.randn(positions, dim)
    found = mlp(x[None], torch.zeros(1, positions, dim))[0]
    found.backward(d_out)

    narrow_x, w_gate_up, w_down = (rounded(matrix.detach(), E4M3) for matrix in (x, *weights))
    gate_up = (narrow_x @ w_gate_up.T).requires_grad_()
    hidden = torch.nn.functional.silu(gate_up[:, : CONFIG.hidden_dim]) * gate_up[:, CONFIG.hidden_dim :]
    narrow_hidden, narrow_d_out = rounded(hidden.detach(), E4M3), rounded(d_out, E5M2)
    d_gate_up = rounded(torch.autograd.grad(hidden, gate_up, narrow_d_out @ w_down)[0], E5M2)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(found, narrow_hidden @ w_down.T)
    close(x.grad, d_gate_up @ w_gate_up)
    close(mlp.down_proj.weight.grad, narrow_d_out.T @ narrow_hidden)
    close(mlp.gate_up_proj.weight.grad, d_gate_up.T @ narrow_x)


def test_training_follows_the_plain_one(tmp_path, ranks):
    """20 steps beside those without, on one rank and sharded over two; a plain run goes on from their checkpoint."""
    common = "--training.seq_len 32 --training.global_batch_size 8 --training.steps 20 --validation.enable false"
    common += " --metrics.log_freq 1 --checkpoint.interval 20"
    runs = {"plain": (1, ""), "one": (1, "--training.float8 true"), "two": (2, "--training.float8 true")}
    curves = {}
    for name, (size, options) in runs.items():
        folder = tmp_path / name
        options += f" --training.local_batch_size {8 // size} --job.dump_folder {folder}"
        ranks.run(size, *common.split(), *options.split())
        curves[name] = batch_losses(folder)
    assert curves["plain"][-1] < 0.8 * curves["plain"][0]
    for name in ("one", "two"):
        errors = [abs(a / b - 1) for a, b in zip(curves[name], curves["plain"])]
        print(name, max(errors))
        assert 0 < max(errors) < 2e-3
    print("two against one", max(abs(a / b - 1) for a, b in zip(curves["two"], curves["one"])))
    assert curves["two"] == pytest.approx(curves["one"], rel=5e-4)
    for name in ("plain", "two"):
        more = f"--training.steps 21 --training.local_batch_size 8 --job.dump_folder {tmp_path / name}"
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
    assert chosen(CPU, torch.float32, Sizes(64, 96, 32, 258)).float8 == "emulated"


def chosen(device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None):
    return choose_kernels(load_config(["--training.float8", "true"]), device, dtype, sizes)
