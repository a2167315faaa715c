"""Which kernels are chosen, on machines that are imitated."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tidar.config import UserError, load_config
from tidar.kernels import Sizes, choose_kernels

CUDA, BF16, SIZES = torch.device("cuda"), torch.bfloat16, Sizes(1536, 8960, 128, 151936)


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with all packages, none of which is imported."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "H100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    versions = {"quack-kernels": "0.6.5", "flash-attn-4": "4.0.0"}
    monkeypatch.setattr("tidar.kernels.selection.metadata.version", versions.get)
    monkeypatch.setattr("tidar.kernels.selection.find_spec", lambda _: True)
    modules = "flash_attn.cute quack.gemm_interface quack.epilogue.library".split()
    for name in [*modules, "tidar.kernels.anchored_cross_entropy"]:
        for package in (name.partition(".")[0], name.rpartition(".")[0], name):
            if not package.startswith("tidar") or package == name:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
    return monkeypatch


def choose(options: str = "", device=CUDA, dtype=BF16, sizes=SIZES, elsewhere=None, **further):
    return choose_kernels(load_config(options.split()), device, dtype, sizes, elsewhere, **further)


def test_a_hopper_gpu_runs_everything(hopper):
    kernels = choose()
    assert kernels.attention == "flash" and kernels.fused_matmul and kernels.loss_without_logits
    assert kernels.fused_backward and kernels.loss_kernel and kernels.loss_matmul and kernels.adamw
    assert kernels.describe() == "flash attention, compile True, QuACK matmuls, loss without logits"
    assert not kernels.warnings
    assert choose("--activation_checkpoint.mode selective") == kernels
    assert choose(elsewhere=(9, 0)) == kernels
    assert choose(several_devices=True) == replace(kernels, dynamic_tiles=True)
    assert not choose("--training.enable_cpu_offload true").adamw
    assert choose("--training.float8 true") == replace(kernels, float8=True)
    half = choose(dtype=torch.float16)
    assert half.fused_matmul and half.loss_matmul and not half.loss_without_logits
    assert half.describe().endswith(
        "; no loss without logits: needs training.mixed_precision_param = bfloat16, not float16"
    )
    # parts of it on two devices, and on four
    assert choose(sizes=SIZES._replace(vocab_size=151936 // 2)) == kernels
    quarter = choose(sizes=SIZES._replace(vocab_size=151936 // 4))
    assert quarter.loss_kernel and quarter.loss_matmul and not quarter.loss_without_logits
    reason = "no loss without logits: needs a multiple of 64 tokens on each device, not 37984"
    assert quarter.fallbacks == (reason,)


def test_a_package_that_cannot_be_imported_costs_a_warning(hopper):
    """Whatever its import raises; what was asked for explicitly is refused with the cause."""

    def fail(name: str) -> None:
        if name.startswith(("quack", "flash_attn")):
            raise TypeError("built for\nanother world")

    hopper.setattr("tidar.kernels.selection.import_module", fail)
    kernels = choose()
    assert kernels.attention == "flex" and not (kernels.fused_matmul or kernels.loss_matmul)
    cause = "cannot be imported: TypeError: built for"
    assert kernels.warnings == tuple(
        f"warning: {package} {cause}; the run continues without it"
        for package in ("flash-attn-4 4.0.0", "quack-kernels 0.6.5")
    )
    assert f"; no QuACK matmuls: quack-kernels 0.6.5 {cause}" in kernels.describe()
    with pytest.raises(UserError, match=cause) as error:
        choose("--model.attention_backend flash")
    assert "\n" not in str(error.value)


def test_reasons_are_given_for_what_does_not_run(hopper):
    assert "no flash attention: needs heads of 128, not 64" in choose(sizes=SIZES._replace(head_dim=64)).describe()
    assert "QuACK matmuls: needs sizes that are multiples of 8" in choose(sizes=SIZES._replace(dim=1540)).describe()
    kernels = choose("--training.deterministic true", dtype=torch.float32)
    assert kernels.describe().count("mixed_precision_param = bfloat16 or float16, not float32") == 2
    with pytest.raises(UserError, match="attention_backend = flash: training.deterministic = true"):
        choose("--model.attention_backend flash --training.deterministic true")
    hopper.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    assert "no flash attention: needs a Hopper GPU, not H100; no QuACK matmuls: needs a Hopper" in choose().describe()
    hopper.setattr("tidar.kernels.selection.metadata.version", lambda _: "0.7.1")
    assert "needs quack-kernels 0.6.5 or later, before 0.7, not 0.7.1" in choose().describe()


def test_what_runs_on_another_machine_is_known_here():
    """Without a GPU or packages."""
    kernels = choose(elsewhere=(9, 0))
    assert kernels.describe() == "flash attention, compile True, QuACK matmuls, loss without logits"
    assert choose("--training.float8 true", elsewhere=(9, 0)).float8 is True
    older = choose(elsewhere=(8, 0))
    assert older.describe().endswith("no flash attention: needs a Hopper GPU; no QuACK matmuls: needs a Hopper GPU")


def test_a_cpu_runs_plain_kernels():
    kernels = choose(device=torch.device("cpu"), dtype=torch.float32)
    assert kernels.describe() == "sdpa attention, compile False"
    (warning,) = choose(device=torch.device("cpu"), dtype=torch.float16).warnings
    assert "float16 is slow on a CPU" in warning
