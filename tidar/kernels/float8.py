"""The MLP's matmuls in FP8 with dynamic tensorwise scaling, by torchao (extra fp8)."""

from typing import Any


def make_mlps_float8(model: Any, emulate: bool) -> None:
    """Replaces the linear modules of all MLPs; their parameters stay the same ones.

    Activations and weights become e4m3, gradients e5m2 (arXiv 2209.05433), each scaled by the largest magnitude of the
    whole matrix: that of all positions of a micro-batch, and that of gate and up together, which share a weight.
    Forward matmuls on Hopper GPUs accumulate with fewer bits than float32, as torchao has it by default. emulate:
    operands are rounded so, but multiplied in float32, for devices without FP8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # the sums of a weight's gradient run over the positions, which may be any number
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for layer in model.layers:
        convert_to_float8_training(layer.mlp, config=config)
