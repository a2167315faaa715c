"""What a run needs to know before anything is allocated, resolved from its options in one place."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from tidar.config import Config, UserError, resolve_global_batch_size, resolve_micro_batches
from tidar.distributed import check_offload, compute_dtype, needs_fsdp, reshards_after_forward, resolve_degrees
from tidar.kernels import Capability, Kernels, Sizes, choose_kernels
from tidar.models import WHOLE, Decoder, DecoderConfig, TensorShard
from tidar.patterns import DECODABLE, Pattern, RowSharding, checked_pattern, configured_pattern, loss_weights
from tidar.training.reporting.weights_and_biases import check_wandb


@dataclass(frozen=True)
class RunPlan:
    """Sizes, kernels and memory of a run on `world_size` devices like `device`.

    replicas, shards: copies of the states, and the devices that each copy is sharded over. tensor_parallel:
    devices that divide each layer. context_parallel: devices that divide each row; sharding, validation_sharding: how,
    None for one device.
    global_batch_size: rows of an optimizer step. micro_batches: of each rank in a step. dtype: of compute. kernels:
    final once the model is known. model: its sizes, None until it is read; n_parameters: 0 until then, as is
    n_own_parameters, those of one device's part of the layers under tensor parallelism.
    """

    config: Config
    device: torch.device
    world_size: int
    replicas: int
    shards: int
    context_parallel: int
    tensor_parallel: int
    global_batch_size: int
    micro_batches: int
    dtype: torch.dtype
    kernels: Kernels
    pattern: Pattern
    validation_pattern: Pattern
    loss_weights: dict[str, float]
    sharding: RowSharding | None
    validation_sharding: RowSharding | None
    model: DecoderConfig | None = None
    n_parameters: int = 0
    n_own_parameters: int = 0

    @property
    def decoder(self) -> DecoderConfig:
        """Sizes of the model, which must be known."""
        assert self.model
        return self.model

    @property
    def own_sizes(self) -> DecoderConfig:
        """Sizes of the part of the model that each device has."""
        return TensorShard(0, self.tensor_parallel).sizes(self.decoder)

    @property
    def uses_fsdp(self) -> bool:
        return needs_fsdp(self.config, self.world_size // self.tensor_parallel)

    @property
    def dp_size(self) -> int:
        """Ranks with different rows; ranks that divide a row or a layer count as one."""
        return self.world_size // (self.context_parallel * self.tensor_parallel)

    @property
    def positions(self) -> int:
        """Model positions of a micro-batch on each device."""
        training, sharding = self.config.training, self.sharding
        row = sharding.n_positions if sharding else self.pattern.model_positions(training.seq_len)
        return training.local_batch_size * row

    @property
    def norm_positions(self) -> int:
        """Positions in norms and residual connections, which tensor parallelism divides (sequence parallelism)."""
        return self.positions // self.tensor_parallel

    @property
    def n_keys(self) -> int:
        """Keys that the queries of a row attend to on each device."""
        return self.sharding.n_keys if self.sharding else self.pattern.model_positions(self.config.training.seq_len)

    @property
    def n_checkpointed(self) -> int:
        """Layers with activation checkpointing, selective or full."""
        options, n_layers = self.config.activation_checkpoint, self.decoder.n_layers
        if options.mode == "none":
            return 0
        return n_layers if options.layers == -1 else min(options.layers, n_layers)

    # memory in bytes; the model must be known

    @property
    def moment_size(self) -> int:
        """Bytes of one of the two moments of a parameter."""
        return {"float32": 4, "bfloat16": 2}[self.config.optimizer.state_dtype]

    @property
    def states_bytes(self) -> float:
        """Bytes of parameters, moments, gradients and copies in the compute dtype, on each device or its host."""
        # under FSDP2 no copies: it casts what it gathers
        copies = self.dtype.itemsize if self.dtype.itemsize < 4 and not self.uses_fsdp else 0
        return (4 + 2 * self.moment_size + copies) * self.n_own_parameters / self.shards + self.gradient_bytes

    @property
    def gradient_bytes(self) -> float:
        """Bytes of the gradients, which are part of the states."""
        # without FSDP2 those of several micro-batches are accumulated in float32
        size = 4 if self.uses_fsdp or self.micro_batches > 1 else self.dtype.itemsize
        return size * self.n_own_parameters / self.shards

    @property
    def gathered_bytes(self) -> int:
        """Bytes of parameters that stay unsharded from the forward to the backward pass."""
        return self.dtype.itemsize * self.n_own_parameters if self.uses_fsdp and not self.reshards else 0

    @property
    def reshards(self) -> bool:
        """Whether FSDP2 frees gathered parameters after the forward pass of their layer."""
        return reshards_after_forward(self.config, self.shards, self.dtype.itemsize * self.n_own_parameters)

    @property
    def unsharded_gradient_bytes(self) -> int:
        """Bytes of gradients that stay unsharded from the first micro-batch to the last."""
        once = self.config.parallelism.gradient_reduction == "step" and self.micro_batches > 1
        return 4 * self.n_own_parameters if self.uses_fsdp and once else 0


def plan_run(
    config: Config,
    world_size: int,
    device: torch.device,
    decoder: DecoderConfig | None = None,
    mask_token_id: int = 0,
    elsewhere: Capability | None = None,
) -> RunPlan:
    """Resolves the options for so many devices. Allocates nothing, and needs no process group.

    decoder, mask_token_id: of the model; where it is not read yet, what depends on it is left open.
    elsewhere: capability of the devices, if they are GPUs of another machine.
    Raises UserError for options that do not fit each other, the devices or the model.
    """
    replicas, shards = resolve_degrees(config, world_size)
    check_offload(config, device)
    context_parallel = config.parallelism.context_parallel_degree
    tensor_parallel = config.parallelism.tensor_parallel_degree
    dp_size = world_size // (context_parallel * tensor_parallel)
    global_batch_size = resolve_global_batch_size(config, dp_size)
    check_wandb(config)
    dtype = compute_dtype(config, device)
    pattern = checked_pattern(config, mask_token_id)
    validation_pattern = configured_pattern(config, mask_token_id, training=False)
    sharding, validation_sharding = (
        RowSharding(rows, config.tidar.pattern, config.training.seq_len, context_parallel, tensor_parallel)
        if context_parallel > 1
        else None
        for rows in (pattern, validation_pattern)
    )
    n_prompts, name = config.validation.generate_prompts, config.tidar.pattern
    if config.validation.enable and n_prompts and name not in DECODABLE:
        raise UserError(
            f"validation.generate_prompts = {n_prompts}: tidar.pattern = {name} is not decoded; must be 0, or the "
            f"pattern one of {', '.join(DECODABLE)}"
        )
    sizes, n_parameters, n_own_parameters = None, 0, 0
    if tensor_parallel > 1:
        _check_positions(config, tensor_parallel, [sharding or pattern, validation_sharding or validation_pattern])
    if decoder:
        _check_divides(tensor_parallel, decoder)
        shard = TensorShard(0, tensor_parallel)  # with one rank it is WHOLE
        own = shard.sizes(decoder)
        sizes = Sizes(own.dim, own.hidden_dim, own.head_dim, own.vocab_size)
        n_parameters, n_own_parameters = count_parameters(decoder, WHOLE), count_parameters(decoder, shard)
    return RunPlan(
        config=config,
        device=device,
        world_size=world_size,
        replicas=replicas,
        shards=shards * context_parallel,
        context_parallel=context_parallel,
        tensor_parallel=tensor_parallel,
        global_batch_size=global_batch_size,
        micro_batches=resolve_micro_batches(config, dp_size),
        dtype=dtype,
        kernels=choose_kernels(config, device, dtype, sizes, elsewhere, several_devices=world_size > 1),
        pattern=pattern,
        validation_pattern=validation_pattern,
        loss_weights=loss_weights(config, pattern),
        sharding=sharding,
        validation_sharding=validation_sharding,
        model=decoder,
        n_parameters=n_parameters,
        n_own_parameters=n_own_parameters,
    )


@lru_cache
def count_parameters(decoder: DecoderConfig, shard: TensorShard) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(decoder, shard=shard).parameters())


def _check_divides(n_ranks: int, decoder: DecoderConfig) -> None:
    """Raises UserError where the sizes of a model cannot be divided over the ranks of tensor parallelism."""
    sizes = {
        "num_key_value_heads": decoder.n_kv_heads,
        "intermediate_size": decoder.hidden_dim,
        "vocab_size": decoder.vocab_size,
    }
    for name, size in sizes.items():
        if size % n_ranks:
            raise UserError(f"parallelism.tensor_parallel_degree = {n_ranks}: must divide the model's {name} = {size}")


def _check_positions(config: Config, n_ranks: int, rows: list[RowSharding | Pattern]) -> None:
    """Raises UserError where the positions of a row cannot be divided over the ranks of tensor parallelism."""
    for row in rows:
        seq_len = config.training.seq_len
        positions = row.n_positions if isinstance(row, RowSharding) else row.model_positions(seq_len)
        if positions % n_ranks:
            raise UserError(
                f"parallelism.tensor_parallel_degree = {n_ranks}: must divide the {positions} model positions of a row "
                f"(training.seq_len = {seq_len})"
            )
