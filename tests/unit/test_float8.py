"""The MLP's GEMMs in FP8: what is rounded, and that training follows."""

import sys
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from results import batch_losses

from tidar import check
from tidar.config import UserError, load_config
from tidar.config.packages import install
from tidar.distributed import leave_world
from tidar.kernels import Sizes, choose_kernels, make_mlps_float8
from tidar.models import Decoder, size_config
from tidar.models.huggingface import decoder_config
from tidar.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = decoder_config(size_config("debug") | {"vocab_size": 258})
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(matrix: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    scale = torch.finfo(kind).max / matrix.abs().max()
    return (matrix * scale).to(kind).float() / scale


@pytest.mark.parametrize("positions", [48, 37])
def test_gemms_are_those_of_rounded_operands(positions):
    """One layer's MLP, forward and backward, against GEMMs of operands that are rounded here."""
    pytest.importorskip("torchao")
    with torch.device("meta"):
        model = Decoder(CONFIG)
    model.to_empty(device="cpu")
    mlp, dim = model.layers[0].mlp, model.config.dim
    weights = [torch.randn(m.weight.shape) * 0.05 for m in (mlp.gate_up_proj, mlp.down_proj)]
    before = list(model.named_parameters())
    make_mlps_float8(model, emulate=True)
    for (name, parameter), (name_before, parameter_before) in zip(model.named_parameters(), before, strict=True):
        assert name == name_before and parameter is parameter_before
    replaced = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    kinds = ("gate_up_proj", "down_proj")
    assert sorted(replaced) == sorted(
        f"layers.{layer}.mlp.{kind}" for layer in range(CONFIG.n_layers) for kind in kinds
    )
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
    pytest.importorskip("torchao")
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


def test_missing_packages_and_devices_are_named(monkeypatch, tmp_path):
    """Before data are prepared: no torchao, an old one, one that cannot be imported; a GPU or type without FP8."""
    options = ["--training.float8", "true", "--job.dump_folder", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["check", *options])
    for version, found in ((None, ""), ("0.17.3", ", not 0.17.3"), ("nightly", "")):
        monkeypatch.setattr("tidar.kernels.selection.metadata.version", partial(installed, version))
        expected = f"needs torchao 0.18 or later: {install('fp8')}{found}"
        assert refusal(lambda: Trainer(load_config(options))) == expected
        leave_world()
        with pytest.raises(SystemExit):
            check.main()
        assert not (tmp_path / "run" / "data").exists()
    monkeypatch.setattr("tidar.kernels.selection.metadata.version", lambda _: "0.18.0")
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    assert refusal(partial(chosen, CPU, torch.float32)).startswith("torchao 0.18.0 cannot be imported: ")

    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "torchao.float8", SimpleNamespace())
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    cuda = torch.device("cuda")
    assert refusal(partial(chosen, cuda, torch.bfloat16)) == "needs an Ada, Hopper or later GPU, not A100"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    chosen(cuda, torch.bfloat16)
    assert "mixed_precision_param = bfloat16, not float16" in refusal(partial(chosen, cuda, torch.float16))
    chosen(CPU, torch.float16)


def installed(version: str | None, name: str) -> str:
    if version is None:
        raise metadata.PackageNotFoundError(name)
    return version


@pytest.mark.parametrize("dim, hidden", [(40, 64), (64, 100)])
def test_sizes_without_fp8_matmuls_are_refused(dim, hidden, monkeypatch):
    monkeypatch.setattr("tidar.kernels.selection._import_obstacle", lambda *_: None)
    monkeypatch.setattr("tidar.kernels.selection.metadata.version", lambda _: "0.18.0")
    message = refusal(partial(chosen, CPU, torch.float32, Sizes(dim, hidden, 32, 258)))
    assert message == f"needs sizes of the MLP that are multiples of 16, not {dim} and {hidden}"
    assert chosen(CPU, torch.float32, Sizes(64, 96, 32, 258)).float8 == "emulated"


def chosen(device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None):
    return choose_kernels(load_config(["--training.float8", "true"]), device, dtype, sizes)
