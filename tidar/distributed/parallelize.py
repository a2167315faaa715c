"""The techniques applied to a model, in order: activation checkpointing, compile, then FSDP2.

It has been built with this rank's part of its layers (tensor parallelism), and its masks gather keys and values
(context parallelism).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tidar.kernels.float8
import tidar.kernels.matmul  # noqa: F401  (both register torch.ops.tidar)
from tidar.config import Config, resolve_micro_batches
from tidar.config.options import ActivationCheckpoint
from tidar.distributed.one_device import OneDevice
from tidar.distributed.peer_copies import can_copy, exchanged_dtype, use_copies
from tidar.distributed.world import World
from tidar.models import Decoder

aten = torch.ops.aten
# operators whose results selective checkpointing saves, because they are expensive to recompute: matmuls and attention;
# and FP8's largest magnitudes
SAVED = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.tidar.matmul.default,
    torch.ops.tidar.gated_matmul.default,
    # numbers for which large matrices are read
    aten.amax.default,
    torch.ops.tidar.gated_magnitude.default,
}

# bytes of all parameters in the compute dtype up to which they stay gathered by default: gathering them a second time
# by NCCL cost 4 % of a step of 1.5B on two H200s, and memory of that size is rarely what a run lacks
KEPT_GATHERED = 4 * 2**30


def parallelize(
    model: Decoder, world: World, config: Config, param_dtype: torch.dtype, compile: bool
) -> "Sharded | OneDevice":
    """Makes a decoder on the meta device ready for training, in place, and allocates its parameters.

    param_dtype: the compute dtype; parameters and accumulated gradients are float32.
    """
    apply_activation_checkpointing(model, config.activation_checkpoint)
    if compile:
        apply_compile(model, has_collectives=world.cp_size * world.tp_size > 1)
    if not needs_fsdp(config, world.size // world.tp_size):
        model.to_empty(device=world.device)
        return OneDevice(model, param_dtype, accumulates=resolve_micro_batches(config, 1) > 1)
    sharded = Sharded(model, world, config, param_dtype)
    model.to_empty(device="cpu" if config.training.enable_cpu_offload else world.device)
    return sharded


def needs_fsdp(config: Config, n_devices: int) -> bool:
    """Whether FSDP2 is needed: on one device only to save memory, by offload or by resharding after forward.

    n_devices: that have the same part of the layers.
    """
    parallelism = config.parallelism
    return n_devices > 1 or config.training.enable_cpu_offload or parallelism.fsdp_reshard_after_forward == "always"


def apply_activation_checkpointing(model: Any, options: ActivationCheckpoint) -> None:
    """Checkpoints inside of each layer, so that FSDP's hooks do not run twice and compile sees what is recomputed.

    Where only some layers recompute, they are the first ones, which would hold their activations longest.
    """
    if options.mode == "none":
        return
    forward = _full if options.mode == "full" else _selective
    for layer in model.layers if options.layers == -1 else model.layers[: options.layers]:
        layer.forward = MethodType(forward, layer)


# Plain functions of the layer, so that the layers share one compiled graph
def _full(layer: nn.Module, *inputs):
    # nothing in a layer is random
    return checkpoint(partial(type(layer).forward, layer), *inputs, use_reentrant=False, preserve_rng_state=False)


def _selective(layer: nn.Module, *inputs):
    return checkpoint(
        partial(type(layer).forward, layer),
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


def _policy(context, operation: Callable, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def apply_compile(model: Any, has_collectives: bool = False) -> None:
    """Compiles each layer by itself, and the last norm: layers share one graph, and FSDP's hooks stay outside of it.

    Without checkpointing, results of norms and of the MLP's gate are not saved for the matmuls of the backward pass,
    but recomputed there from their operands, which are saved and read anyway.
    has_collectives: layers communicate. Each collective starts as early and is waited for as late as data allow, so
    that other work of its layer overlaps it: rotation of the queries forward, gradients of weights backward. In this
    order: the first pass delays what no collective needs until the last one has started, the second fills each wait
    with what is ready.
    """
    # they take a second, and most commands compile nothing
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    functorch_config.ban_recompute_materialized_backward = False
    inductor_config.reorder_for_compute_comm_overlap = has_collectives
    if has_collectives:
        inductor_config.reorder_for_compute_comm_overlap_passes = ["raise_comms", "sink_waits"]
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    model.norm.forward = torch.compile(model.norm.forward, fullgraph=True, dynamic=False)


def compile_seconds() -> float:
    """Time that this process has spent in torch.compile so far."""
    return torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0)


class Sharded:
    """A model under FSDP2: one group per layer, and one of the rest. Parameters and reductions in float32.

    A mesh of one dimension shards over it; one of two replicates over the first and shards over the second.
    """

    def __init__(self, model: Any, world: World, config: Config, param_dtype: torch.dtype):
        self.model, self.param_dtype, self.device = model, param_dtype, world.device
        self.reduces_each = config.parallelism.gradient_reduction == "micro_batch"
        self.copies: dict[nn.Parameter, nn.Parameter] = {}  # FSDP2 casts parameters itself
        mesh = world.mesh
        gathered = sum(parameter.numel() for parameter in model.parameters()) * param_dtype.itemsize
        self.reshards = reshards_after_forward(config, mesh.size(-1), gathered)
        copies = config.parallelism.fsdp_collectives == "default" and can_copy(world.shard_group, world.device)
        exchanged = exchanged_dtype(config, resolve_micro_batches(config, world.dp_size), param_dtype)
        reduce_dtype = exchanged if copies else torch.float32
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype, reduce_dtype),
            "offload_policy": CPUOffloadPolicy() if config.training.enable_cpu_offload else OffloadPolicy(),
        }
        for layer in model.layers:
            fully_shard(layer, reshard_after_forward=self.reshards, **options)
        fully_shard(model, **options)
        if copies:
            use_copies(model, world.shard_group, world.device, param_dtype.itemsize, reduce_dtype.itemsize)
        for module in (*model.layers, model):
            if mesh.size() > 1:
                # the objective divides by the targets of all ranks, so gradients are summed, not averaged;
                # gloo knows sums only
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
            elif _reduces_in_place(config):
                module.set_custom_reduce_scatter(_InPlaceReduceScatter())

    @contextmanager
    def training(self, is_last: bool) -> Iterator[None]:
        """Context of the forward and backward pass of one micro-batch. is_last: of its step."""
        self.model.set_requires_gradient_sync(is_last or self.reduces_each)
        # replicas are reduced once a step in any case: until then they hold no more than their shards
        self.model.set_requires_all_reduce(is_last)
        # parameters that stay gathered for the backward pass may also stay for the next micro-batch
        self.model.set_reshard_after_backward(is_last or self.reshards)
        yield

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Context of forward passes without backward."""
        yield
        # without a backward pass they leave parameters gathered
        for module in (*self.model.layers, self.model):
            module.reshard()

    def whole_parameters(self) -> dict[str, Tensor]:
        """The parameters by name in the compute dtype, whole on each rank. All ranks call it, outside of contexts."""
        narrow = {name: p.detach().to(self.param_dtype) for name, p in self.model.named_parameters()}
        return {name: self.model.shard.whole(name, p.full_tensor().to(self.device)) for name, p in narrow.items()}


def _reduces_in_place(config: Config) -> bool:
    """Whether on one device the result of a reduction becomes the gradient, and is not accumulated or offloaded.

    Then it may stay in memory of FSDP2's main stream, which otherwise could reuse it too early.
    """
    once = config.parallelism.gradient_reduction == "step" or resolve_micro_batches(config, 1) == 1
    return once and not config.training.enable_cpu_offload


class _InPlaceReduceScatter:
    """FSDP2's reduce-scatter on one device: the output is the input, and so is its buffer.

    Without it FSDP2 copies the gradients of one device a second time (torch 2.11 to 2.13).
    """

    def __init__(self):
        self.input: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First the buffer for FSDP2's input, then the same one for its output."""
        buffer, self.input = self.input, None
        if buffer is None:
            buffer = self.input = torch.empty(size, dtype=dtype, device=device)
        return buffer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args, **kwargs) -> None:
        """The output is the input."""


def reshards_after_forward(config: Config, shards: int, gathered_bytes: int) -> bool:
    """Whether the gathered parameters of a layer are freed after its forward pass. gathered_bytes: of all layers."""
    parallelism = config.parallelism
    if parallelism.fsdp_reshard_after_forward == "default":
        # with unsharded gradients on each device the parameters stay gathered as well, as in ZeRO-1
        return shards > 1 and parallelism.gradient_reduction == "micro_batch" and gathered_bytes > KEPT_GATHERED
    return parallelism.fsdp_reshard_after_forward == "always"
