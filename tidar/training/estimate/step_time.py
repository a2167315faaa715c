"""Time of a step, from FLOPs, bytes and measured rates, for layers that are compiled."""

from dataclasses import dataclass
from math import ceil

from tidar.models.flops import ATTENTION_FLOPS, layer_weights, useful_flops
from tidar.patterns import TILE
from tidar.training.estimate.gpus import NETWORK, PER_HOST, Gpu
from tidar.training.estimate.memory import WIDE, exchanged_size
from tidar.training.estimate.row import RowWork
from tidar.training.plan import RunPlan

# seconds of a step in which the device waits for its host, or runs tiny kernels on scalars
BETWEEN_STEPS = 4e-3
# seconds that a second of FSDP2's communication adds to a step, although it overlaps computation: NCCL takes SMs from
# persistent kernels, copies between GPUs take bandwidth and power, and both have casts and waits beside them (measured
# on four H200s with NCCL, on two and four with copies; see docs/performance.md)
OF_NCCL, OF_COPIES = 2.2, 1.5


@dataclass(frozen=True)
class StepTime:
    """parts: seconds by what takes them. tokens_per_second: of data, by device. mfu: of useful FLOPs."""

    parts: dict[str, float]
    tokens_per_second: float
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(plan: RunPlan, gpu: Gpu, row: RowWork) -> StepTime:
    """row: work of each row."""
    layers = _layers(plan, gpu, row)
    parts = {name: plan.micro_batches * seconds for name, seconds in layers.items()}
    parts["optimizer"] = _optimizer_bytes(plan) / gpu.copy
    parts["FSDP2's copies"], parts["FSDP2's collectives"] = _fsdp(plan, gpu)
    parts["host"] = BETWEEN_STEPS
    seconds = sum(parts.values())
    rows = plan.global_batch_size / plan.world_size
    flops = useful_flops(plan.decoder, row.positions, row.scored, row.pairs)
    tokens = rows * plan.config.training.seq_len
    return StepTime(parts, tokens / seconds, rows * flops / seconds / gpu.peak)


def _layers(plan: RunPlan, gpu: Gpu, row: RowWork) -> dict[str, float]:
    """Seconds of a micro-batch's forward and backward pass."""
    decoder, positions, kernels = plan.own_sizes, plan.positions, plan.kernels
    rows, cp_size = plan.config.training.local_batch_size, plan.context_parallel
    n_layers = decoder.n_layers
    recomputing = plan.n_checkpointed if plan.config.activation_checkpoint.mode == "full" else 0

    # GEMMs; those of the MLP may be in FP8. Checkpointed layers recompute the forward pass except the down
    # projection
    mlp, down = 3 * decoder.dim * decoder.hidden_dim, decoder.dim * decoder.hidden_dim
    others = layer_weights(decoder) - mlp
    mlp_flops = 2 * positions * (3 * n_layers * mlp + recomputing * (mlp - down))
    flops = 2 * positions * (3 * n_layers + recomputing) * others
    scored = rows * row.scored // cp_size
    flops += 6 * decoder.vocab_size * decoder.dim * scored
    gemms = flops / gpu.gemm + mlp_flops / (gpu.float8_gemm if kernels.float8 else gpu.gemm)

    # attention: a third of it forward
    passes = n_layers + recomputing / 3
    pairs = rows * row.pairs / cp_size
    tiles = ceil(positions / rows / TILE) + ceil(plan.n_keys / TILE)
    rate = gpu.flash if kernels.attention == "flash" else gpu.flex
    attention = ATTENTION_FLOPS * pairs * decoder.n_heads * decoder.head_dim / rate
    attention += gpu.program * rows * tiles * decoder.n_heads / gpu.n_sms

    elements = n_layers * _elementwise(plan) + recomputing * _elementwise_forward(plan)
    moved = plan.dtype.itemsize * elements
    if not kernels.loss_without_logits:
        # passes over logits
        moved += 3 * plan.dtype.itemsize * decoder.vocab_size * scored
    seconds = {"GEMMs": gemms, "attention": passes * attention, "norms and activations": moved / gpu.elementwise}
    if kernels.float8:
        seconds["rounding to FP8"] = _float8_bytes(plan, recomputing) / gpu.rounding
    if plan.sharding:
        # all-gather of the keys and values that every rank of the group sees, reduce-scatter of their gradients
        size = 2 * plan.sharding.n_shared * rows * decoder.n_kv_heads * decoder.head_dim * plan.dtype.itemsize
        gather, scatter = (_collective(size, cp_size, plan.tensor_parallel, rate) for rate in (gpu.gather, gpu.scatter))
        seconds["context-parallel collectives"] = (n_layers + recomputing) * gather + n_layers * scatter
    if plan.tensor_parallel > 1:
        # in each layer an all-gather before and a reduce-scatter after attention and MLP, forward and backward, and one
        # of each at the embedding and the output projection; recomputing adds two gathers and one reduce-scatter
        size = positions * decoder.dim * plan.dtype.itemsize
        gather, total = (_collective(size, plan.tensor_parallel, 1, rate) for rate in (gpu.gather, gpu.scatter))
        gathers, totals = 4 * n_layers + 2 + 2 * recomputing, 4 * n_layers + 2 + recomputing
        seconds["tensor-parallel collectives"] = gathers * gather + totals * total
    return seconds


def _elementwise_forward(plan: RunPlan) -> int:
    """Elements of a layer's forward pass that norms, rotary embeddings and the activation read and write."""
    decoder = plan.own_sizes
    rotated = (decoder.n_heads + decoder.n_kv_heads) * decoder.head_dim
    of_norms, elements = 4 * decoder.dim, 2 * rotated
    if not plan.kernels.fused_matmul and not plan.kernels.float8:
        elements += 3 * decoder.hidden_dim
    if not plan.kernels.fused_matmul or plan.tensor_parallel > 1:
        of_norms += 6 * decoder.dim  # the residual connections
    elif plan.kernels.float8:
        of_norms += 3 * decoder.dim  # that of the MLP
    if plan.tensor_parallel > 1:
        of_norms += 2 * plan.tensor_parallel * decoder.dim  # terms of both sums
    return plan.norm_positions * of_norms + plan.positions * elements


def _elementwise(plan: RunPlan) -> int:
    """The same for forward and backward together; the backward pass recomputes norms and the activation."""
    decoder = plan.own_sizes
    heads = (decoder.n_heads + 2 * decoder.n_kv_heads) * decoder.head_dim
    of_norms, elements = 12 * decoder.dim, 2 * heads
    if plan.tensor_parallel > 1:
        of_norms += 2 * plan.tensor_parallel * decoder.dim
    if decoder.qkv_bias:
        elements += heads
    if decoder.qk_norm:
        elements += 3 * (decoder.n_heads + decoder.n_kv_heads) * decoder.head_dim
    if not plan.kernels.fused_matmul and not plan.kernels.float8:
        elements += 6 * decoder.hidden_dim
    return _elementwise_forward(plan) + plan.norm_positions * of_norms + plan.positions * elements


def _float8_bytes(plan: RunPlan, recomputing: int) -> int:
    """Bytes of a micro-batch's MLPs in FP8 besides those of GEMMs: magnitudes, rounding, the activation, and backward.

    recomputing: layers whose forward pass runs twice.
    """
    dim, hidden = plan.own_sizes.dim, plan.own_sizes.hidden_dim
    weights = 3 * dim * hidden
    # operands are read for their largest magnitude, and for rounding
    forward = plan.positions * (5 * dim + 9 * hidden) + 5 * weights
    # both gradients are rounded in two layouts, x and weights once more in the other one, the activation as well
    backward = plan.positions * (9 * dim + 19 * hidden) + 3 * weights
    return plan.own_sizes.n_layers * (forward + backward) + recomputing * forward


def _optimizer_bytes(plan: RunPlan) -> float:
    """Bytes that the gradients' norm and AdamW move. Both moments are read and written."""
    copies = 0 if plan.uses_fsdp else plan.dtype.itemsize
    return (2 * WIDE + 4 * plan.moment_size + copies) * plan.n_own_parameters / plan.shards + 2 * plan.gradient_bytes


def _fsdp(plan: RunPlan, gpu: Gpu) -> tuple[float, float]:
    """Seconds that it adds to a step that parameters and gradients are copied, and that they travel."""
    size, n, micro_batches = plan.dtype.itemsize, plan.n_own_parameters, plan.micro_batches
    if not plan.uses_fsdp:
        # gradients of several micro-batches are added up
        return ((size + 2 * WIDE) * n * micro_batches / gpu.copy if micro_batches > 1 else 0.0), 0.0
    options, stride = plan.config.parallelism, plan.tensor_parallel
    once = options.gradient_reduction == "step"
    gathers = 2 * micro_batches if plan.reshards else 1
    reduces = 1 if once else micro_batches
    copies = exchanged_size(plan)
    exchanged = copies or WIDE
    # cast to the compute dtype, and from the gathered buffer to each parameter; gradients to the buffer that is reduced
    copied = gathers * ((WIDE + size) / plan.shards + 2 * size) * n + micro_batches * (size + exchanged) * n
    copied += bool(copies) * reduces * (exchanged + WIDE / plan.shards) * n  # their sum
    seconds = gathers * _collective(size * n, plan.shards, stride, gpu.gather)
    seconds += reduces * _collective(exchanged * n, plan.shards, stride, gpu.scatter)
    of_replicas = 2 * _collective(WIDE * n / plan.shards, plan.replicas, stride * plan.shards, gpu.scatter)
    return copied / gpu.copy, (OF_COPIES if copies else OF_NCCL) * seconds + OF_NCCL * of_replicas


def _collective(size: float, ranks: int, stride: int, rate: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes in all over ranks that are `stride` apart."""
    if ranks * stride > PER_HOST:
        # each GPU of a host has its own link to other hosts
        rate = min(rate, NETWORK * max(PER_HOST // stride, 1))
    return size * (ranks - 1) / ranks / rate
