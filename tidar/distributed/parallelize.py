"""The techniques applied to a model, each in its place: compile, then FSDP2."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def parallelize(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype, compile: bool) -> None:
    """Compiles and shards a decoder on the meta device, in place."""
    if compile:
        apply_compile(model)
    apply_fsdp(model, mesh, param_dtype)


def apply_compile(model: nn.Module) -> None:
    """Each layer by itself: they share one graph, and FSDP's hooks stay outside of it."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype) -> None:
    """One group per layer, and one of the rest. Arithmetic in `param_dtype`; parameters and reductions in float32."""
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        # alone there is nothing to free: gathering is only the cast to param_dtype
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=mesh.size() > 1)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    for module in (*model.layers, model):
        # the objective divides by the targets of all ranks, so gradients are summed, not averaged;
        # gloo knows sums only
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
