"""Memory of a device at the peak of a step, from sizes alone: tensor by tensor, for layers that are compiled."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from tidar.distributed import GATHER_BUFFERS, REDUCE_BUFFERS, exchanged_dtype
from tidar.models.flops import layer_weights
from tidar.training.estimate.gpus import PER_HOST
from tidar.training.estimate.row import RowWork
from tidar.training.plan import RunPlan

# float32
WIDE = 4


@dataclass(frozen=True)
class Memory:
    """Bytes at one moment of a step, which `at` names.

    states: parameters, moments, copies, and the gradients that exist then. gathered: unsharded parameters and gradients
    under FSDP2. activations: saved for the backward pass, and of the layer that is computed. loss: of the loss.
    """

    at: str
    states: float
    gathered: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.activations + self.loss


def peak_memory(plan: RunPlan, row: RowWork) -> Memory:
    """The moment of a step that needs most. row: work of each row."""
    return max(_moments(plan, row), key=lambda memory: memory.total)


def saved_bytes(plan: RunPlan) -> dict[str, int]:
    """What a layer that is not checkpointed saves for the backward pass, by tensor.

    Results of norms and of the activation are not among them: the backward pass recomputes them.
    """
    decoder, size = plan.own_sizes, plan.dtype.itemsize
    head = decoder.head_dim * size
    rows, keys = plan.config.training.local_batch_size, plan.n_keys
    share = 1 / plan.tensor_parallel
    saved = {
        "input": share * decoder.dim * size,
        "scales of norms": share * 2 * WIDE + (WIDE * (decoder.n_heads + decoder.n_kv_heads) if decoder.qk_norm else 0),
        "gathered results of norms": 0 if plan.tensor_parallel == 1 else 2 * decoder.dim * size,
        # saved for the norms' backward pass, or because the values are a view of them; gathered values are a copy
        "heads": _n_heads(plan) * head if plan.sharding is None or decoder.qk_norm else 0,
        "rotated queries": decoder.n_heads * head,
        "attention": decoder.n_heads * (head + WIDE),
        "after attention": share * decoder.dim * size,
        "gate and up": 2 * decoder.hidden_dim * size,
    }
    attended = decoder.n_kv_heads * head * (1 if plan.sharding is None else 2)
    return {name: int(plan.positions * each) for name, each in saved.items()} | {"attended": rows * keys * attended}


def kept_bytes(plan: RunPlan) -> list[int]:
    """What each layer keeps from the forward to the backward pass."""
    saved = saved_bytes(plan)
    everything = sum(saved.values())
    recomputed = saved["rotated queries"] + saved["attended"]
    # ranks that share layers keep outputs of matmuls for all positions, and not their sum or what is gathered
    recomputed += saved["after attention"] if plan.tensor_parallel > 1 else 0
    heads = plan.positions * _n_heads(plan) * plan.decoder.head_dim * plan.dtype.itemsize
    kept = {
        "none": everything,
        "selective": everything - recomputed - saved["heads"] + heads,
        "full": saved["input"],
    }[plan.config.activation_checkpoint.mode]
    return [kept] * plan.n_checkpointed + [everything] * (plan.decoder.n_layers - plan.n_checkpointed)


def exchanged_size(plan: RunPlan) -> int:
    """Bytes of an element of the gradients that GPUs of a host copy from each other; 0 where FSDP2 uses NCCL."""
    options = plan.config.parallelism
    if options.fsdp_collectives == "nccl" or not 1 < plan.shards <= PER_HOST // plan.tensor_parallel:
        return 0
    return exchanged_dtype(plan.config, plan.micro_batches, plan.dtype).itemsize


def _moments(plan: RunPlan, row: RowWork) -> Iterator[Memory]:
    decoder, size, positions = plan.own_sizes, plan.dtype.itemsize, plan.positions
    stream = plan.norm_positions * decoder.dim * size
    # of all positions, where devices that share layers gather them
    gathered_stream = 0 if plan.tensor_parallel == 1 else positions * decoder.dim * size
    kept = kept_bytes(plan)
    everything = sum(saved_bytes(plan).values())
    # cosines, sines, tokens and their positions
    inputs = positions * (2 * decoder.head_dim * size + 16)

    layer = layer_weights(decoder)
    root = plan.n_own_parameters - decoder.n_layers * layer
    output = decoder.vocab_size * decoder.dim
    gathers = plan.uses_fsdp and not plan.gathered_bytes
    # FSDP2 gathers the next layer while it computes one; what is in no layer stays gathered
    gathered = plan.gathered_bytes + plan.unsharded_gradient_bytes
    gathered += size * root if gathers else 0
    in_layer = 2 * size * layer if gathers else 0

    accumulates = plan.micro_batches > 1
    states = plan.states_bytes - (0 if accumulates else plan.gradient_bytes)
    if plan.config.training.enable_cpu_offload:
        states = 0.0
    gradient = 0.0 if accumulates else plan.gradient_bytes / plan.n_own_parameters
    # of a layer: its gradients in the compute dtype, a float32 buffer that reduces them, and that of the layer before;
    # on one device such a buffer becomes the gradient, unless gradients accumulate
    buffer = WIDE if plan.uses_fsdp and (plan.world_size > 1 or accumulates) else 0.0
    reduced = (size + 2 * buffer) * layer if plan.uses_fsdp or accumulates else 0.0
    if exchanged := exchanged_size(plan):
        # buffers of layers, and one for what is in no layer; copies of the others' gradients and their sum come and go
        gathered += (GATHER_BUFFERS * size + REDUCE_BUFFERS * exchanged) * layer + max(size, exchanged) * root
        buffer = exchanged * (1 - 1 / plan.shards) + WIDE / plan.shards
        reduced = (size + buffer) * layer
        in_layer //= 2  # what is gathered next lies in its buffer
    # under FSDP2 the output weight's gradient is reduced last
    of_output = size * output

    n = plan.config.training.local_batch_size * row.scored // plan.context_parallel
    targets = n * decoder.dim * size
    in_chunk = _chunk_bytes(plan, n)
    both_streams = inputs + 2 * stream + gathered_stream  # of the last norm
    yield Memory("the loss", states, gathered, sum(kept) + both_streams, 2 * targets + WIDE * output + in_chunk)
    narrowed = 2 * targets + (WIDE + size) * output
    yield Memory("the loss's gradient", states, gathered, sum(kept) + both_streams, narrowed)

    # the gradients of the stream, before the activation and of it; results of the norm and the activation
    backward = 3 * stream + 2 * gathered_stream + 3 * positions * decoder.hidden_dim * size
    for done, index in enumerate(reversed(range(decoder.n_layers))):
        recomputed = everything - kept[index]
        activations = inputs + sum(kept[: index + 1]) + recomputed + backward
        so_far = states + gradient * (done + (0 if plan.uses_fsdp else 1)) * layer
        yield Memory(f"layer {index} backward", so_far, gathered + in_layer + reduced + of_output, activations, 0)

    # the embedding's gradient is dense; with tied embeddings the output weight's exists too
    ends, embedded = float(size * output), stream + gathered_stream
    if plan.uses_fsdp:
        ends = (size + buffer) * root + (size * output if decoder.tie_embeddings else 0)
    states += gradient * plan.n_own_parameters
    yield Memory("the embedding backward", states, gathered + ends, inputs + embedded, 0)


def _chunk_bytes(plan: RunPlan, n: int) -> int:
    """Bytes of a chunk of the loss's n targets: logits or their exponentials, and hidden states."""
    chunk = ceil(n / ceil(n / plan.config.training.loss_chunk_size))
    return chunk * plan.dtype.itemsize * (plan.own_sizes.vocab_size + plan.decoder.dim)


def _n_heads(plan: RunPlan) -> int:
    """Heads of queries, keys and values."""
    return plan.own_sizes.n_heads + 2 * plan.own_sizes.n_kv_heads
