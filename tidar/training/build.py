"""The model of a run and its masks, from its plan."""

import torch

from tidar.distributed import OneDevice, Sharded, World, gathered_attention, parallelize, tensor_shard
from tidar.losses.objective import Objective
from tidar.models import Decoder, MaskBuilder
from tidar.training.plan import RunPlan


def build_model(plan: RunPlan, world: World) -> tuple[Decoder, Sharded | OneDevice]:
    """A decoder with memory for its parameters but without values, and how it is parallelized."""
    with torch.device("meta"):
        model = Decoder(plan.decoder, plan.kernels, tensor_shard(world))
    return model, parallelize(model, world, plan.config, plan.dtype, plan.kernels.compile)


def build_objective(plan: RunPlan, world: World) -> Objective:
    return Objective(plan.loss_weights, plan.config.training.loss_chunk_size, plan.kernels, tensor_shard(world))


def build_mask_builders(plan: RunPlan, world: World) -> tuple[MaskBuilder, MaskBuilder]:
    """The mask builders of training and of validation."""
    attention, around = plan.kernels.attention, gathered_attention(world)
    return (
        MaskBuilder(plan.pattern, attention, around),
        MaskBuilder(plan.validation_pattern, attention, around),
    )
