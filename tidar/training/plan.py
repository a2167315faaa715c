"""What a run needs to know before anything is allocated, resolved from its options in one place."""

from dataclasses import dataclass

import torch

from tidar.config import Config, UserError, resolve_global_batch_size
from tidar.distributed import check_offload, compute_dtype, needs_fsdp, reshards_after_forward, resolve_degrees
from tidar.kernels import Kernels, Sizes, choose_kernels
from tidar.models import Decoder, DecoderConfig
from tidar.patterns import DECODABLE, Pattern, RowSharding, checked_pattern, configured_pattern, loss_weights
from tidar.training.reporting.weights_and_biases import check_wandb


@dataclass(frozen=True)
class RunPlan:
    """Sizes, kernels and memory of a run on `world_size` devices like `device`.

    replicas, shards: copies of the states, and the devices that each copy is sharded over. context_parallel: devices
    that share each row; sharding, validation_sharding: how rows are dealt to them, None where it is one.
    global_batch_size: rows of an optimizer step. micro_batches: of each rank in a step. dtype: of compute. kernels:
    final once the model is known. model: its sizes, None until it is read; n_parameters: 0 until then.
    """

    config: Config
    device: torch.device
    world_size: int
    replicas: int
    shards: int
    context_parallel: int
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

    @property
    def decoder(self) -> DecoderConfig:
        """Sizes of the model, which must be known."""
        assert self.model
        return self.model

    @property
    def uses_fsdp(self) -> bool:
        return needs_fsdp(self.config, self.world_size)

    @property
    def positions(self) -> int:
        """Model positions of a micro-batch on each device."""
        training, sharding = self.config.training, self.sharding
        row = sharding.n_positions if sharding else self.pattern.model_positions(training.seq_len)
        return training.local_batch_size * row

    # memory in bytes; the model must be known

    @property
    def states_bytes(self) -> float:
        """Of parameters, moments and gradients, and of the copies in the compute dtype: of each device or its host."""
        moments = 2 * {"float32": 4, "bfloat16": 2}[self.config.optimizer.state_dtype]
        if self.uses_fsdp:
            # parameters and gradients in float32
            return (8 + moments) * self.n_parameters / self.shards
        # gradients of several micro-batches are accumulated in float32
        copies = self.dtype.itemsize if self.dtype.itemsize < 4 else 0
        gradients = self.dtype.itemsize if self.micro_batches == 1 else 4
        return (4 + moments + copies + gradients) * self.n_parameters

    @property
    def gathered_bytes(self) -> int:
        """Of parameters that stay unsharded from the forward to the backward pass."""
        keeps = self.uses_fsdp and not reshards_after_forward(self.config, self.shards)
        return self.dtype.itemsize * self.n_parameters if keeps else 0

    @property
    def unsharded_gradient_bytes(self) -> int:
        """Of gradients that stay unsharded from the first micro-batch to the last."""
        once = self.config.parallelism.gradient_reduction == "step" and self.micro_batches > 1
        return 4 * self.n_parameters if self.uses_fsdp and once else 0


def plan_run(
    config: Config,
    world_size: int,
    device: torch.device,
    decoder: DecoderConfig | None = None,
    mask_token_id: int = 0,
) -> RunPlan:
    """Resolves the options for so many devices. Allocates nothing, and needs no process group.

    decoder, mask_token_id: of the model; where it is not read yet, what depends on it is left open.
    Raises UserError for options that do not fit each other, the devices or the model.
    """
    replicas, shards = resolve_degrees(config, world_size)
    check_offload(config)
    context_parallel = config.parallelism.context_parallel_degree
    dp_size = world_size // context_parallel
    global_batch_size = resolve_global_batch_size(config, dp_size)
    check_wandb(config)
    dtype = compute_dtype(config, device)
    pattern = checked_pattern(config, mask_token_id)
    validation_pattern = configured_pattern(config, mask_token_id, training=False)
    sharding, validation_sharding = (
        RowSharding(rows, config.tidar.pattern, config.training.seq_len, context_parallel)
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
    sizes, n_parameters = None, 0
    if decoder:
        sizes = Sizes(decoder.dim, decoder.hidden_dim, decoder.head_dim, decoder.vocab_size)
        with torch.device("meta"):
            n_parameters = sum(parameter.numel() for parameter in Decoder(decoder).parameters())
    return RunPlan(
        config=config,
        device=device,
        world_size=world_size,
        replicas=replicas,
        shards=shards * context_parallel,
        context_parallel=context_parallel,
        global_batch_size=global_batch_size,
        micro_batches=global_batch_size // (config.training.local_batch_size * dp_size),
        dtype=dtype,
        kernels=choose_kernels(config, device, dtype, sizes),
        pattern=pattern,
        validation_pattern=validation_pattern,
        loss_weights=loss_weights(config, pattern),
        sharding=sharding,
        validation_sharding=validation_sharding,
        model=decoder,
        n_parameters=n_parameters,
    )
