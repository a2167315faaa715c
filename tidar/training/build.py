"""The model of a run, from its plan."""

import torch

from tidar.distributed import OneDevice, Sharded, World, parallelize
from tidar.kernels import make_mlps_float8
from tidar.models import Decoder
from tidar.training.plan import RunPlan


def build_model(plan: RunPlan, world: World) -> tuple[Decoder, Sharded | OneDevice]:
    """A decoder with memory for its parameters but without values, and how it is parallelized.

    Raises UserError where its sizes cannot be computed in float8.
    """
    with torch.device("meta"):
        model = Decoder(plan.decoder, plan.kernels)
    if plan.kernels.float8 != "off":
        make_mlps_float8(model, emulate=plan.kernels.float8 == "emulated")
    return model, parallelize(model, world, plan.config, plan.dtype, plan.kernels.compile)
