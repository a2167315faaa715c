"""The MLP's products in FP8 with dynamic tensorwise scaling, by torchao (extra fp8)."""

from importlib import metadata

import torch
from torch import nn

from tidar.config import UserError

# the first GPUs that have such products
FLOAT8_CAPABILITY = (8, 9)
MULTIPLE = 16  # of rows and columns of the weights: what cuBLAS asks of products in FP8
# what it has been tried with; it keeps Inductor from code that Triton miscompiles to NaN (triton-lang/triton#11111)
FIRST_TORCHAO = (0, 18)


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where training.float8 cannot be had. dtype: of the arithmetic."""
    obstacle = _torchao_obstacle()
    if device.type == "cuda" and not obstacle:
        if torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
            obstacle = f"needs an Ada, Hopper or later GPU, not {torch.cuda.get_device_name(device)}"
        elif dtype != torch.bfloat16:  # what it has been tried with there
            obstacle = f"needs training.mixed_precision_param = bfloat16, not {str(dtype).removeprefix('torch.')}"
    if obstacle:
        raise UserError(f"training.float8 = true: {obstacle}")


def _torchao_obstacle() -> str | None:
    """Why torchao cannot be used, None where it can."""
    needed = f"needs torchao {'.'.join(map(str, FIRST_TORCHAO))} or later: pip install -e '.[fp8]'"
    try:
        version = metadata.version("torchao")
        if tuple(map(int, version.split(".")[:2])) < FIRST_TORCHAO:
            return f"{needed}, not {version}"
        import torchao.float8  # noqa: F401
    except (metadata.PackageNotFoundError, ValueError):
        return needed
    except (ImportError, OSError) as error:  # made for another torch
        return f"torchao {version} cannot be imported: {error}"
    return None


def make_mlps_float8(model: nn.Module, emulate: bool) -> None:
    """Replaces the linear modules of all MLPs; their parameters stay the same ones.

    Activations and weights become e4m3, gradients e5m2 (arXiv 2209.05433), each scaled by the largest magnitude of the
    whole matrix: that of all positions of a micro-batch, and that of gate and up together, which share a weight.
    Forward matmuls on Hopper GPUs accumulate with fewer bits than float32, as torchao has it by default. emulate:
    operands are rounded so, but multiplied in float32, for devices without FP8. Raises UserError for sizes that FP8
    matmuls do not have.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    dim, hidden_dim = model.config.dim, model.config.hidden_dim
    if dim % MULTIPLE or hidden_dim % MULTIPLE:
        sizes = f"multiples of {MULTIPLE}, not {dim} and {hidden_dim}"
        raise UserError(f"training.float8 = true: needs sizes of the MLP that are {sizes}")
    # the sums of a weight's gradient run over the positions, which may be any number
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for layer in model.layers:
        convert_to_float8_training(layer.mlp, config=config)
