"""The products of the MLP with operands of 8 bits, by torchao (extra fp8)."""

from dataclasses import replace
from importlib.util import find_spec

import torch

from tidar.config import UserError
from tidar.models.decoder import Decoder, DecoderConfig

# the first GPUs that have such products
FLOAT8_CAPABILITY = (8, 9)
MULTIPLE = 16  # of rows and columns of the weights


def check_float8(device: torch.device, dtype: torch.dtype, decoder: DecoderConfig) -> None:
    """Raises UserError where training.float8 cannot be had. dtype: of the arithmetic."""
    dim, hidden_dim, obstacle = decoder.dim, decoder.hidden_dim, None
    if find_spec("torchao") is None:
        obstacle = "torchao is not installed: pip install -e .[fp8]"
    elif dim % MULTIPLE or hidden_dim % MULTIPLE:
        obstacle = f"needs sizes of the MLP that are multiples of {MULTIPLE}, not {dim} and {hidden_dim}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        obstacle = f"needs an Ada, Hopper or later GPU, not {torch.cuda.get_device_name(device)}"
    elif device.type == "cuda" and dtype != torch.bfloat16:
        obstacle = f"needs training.mixed_precision_param = bfloat16, not {dtype}"
    if obstacle:
        raise UserError(f"training.float8 = true: {obstacle}")


def make_mlps_float8(model: Decoder, emulate: bool) -> None:
    """Replaces the linear modules of all MLPs; their parameters stay the same ones.

    Activations and weights become e4m3, gradients e5m2, each scaled by its largest value of the moment, one for a
    whole matrix (arXiv 2209.05433). emulate: rounded so, but multiplied in the type of the arithmetic, for devices that
    have no products of 8 bits.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # the sums of a weight's gradient run over the positions, which may be any number
    config = replace(Float8LinearConfig(), emulate=emulate, pad_inner_dim=True)
    for layer in model.layers:
        convert_to_float8_training(layer.mlp, config=config)
