"""The options: one dataclass per TOML section. Names follow torchtitan where it has them."""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str, *, minimum=None, maximum=None, above=None, below=None, also=None) -> Any:
    """A field with help text and range: minimum <= value <= maximum, above < value < below, or value == also."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "above": above, "below": below, "also": also}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Job:
    """The run and its folder."""

    config_file: str = option("", "TOML file with options; the command line overrides it")
    dump_folder: str = option("", "folder for everything the run writes (default: runs/<name of the config file>)")


@dataclass
class Model:
    """The decoder."""

    name: str = option("debug", "named decoder size from tidar/models/sizes.py, with random weights")
    hf_path: str = option(
        "",
        "Hugging Face model: a local folder (config.json, tokenizer, weights) or an id of the hub, ORG/NAME or "
        "ORG/NAME@REVISION; overrides name",
    )
    attention_backend: Literal["auto", "flash", "flex", "sdpa"] = option(
        "auto",
        "flex: FlexAttention with block masks (CUDA); flash: the same with FlashAttention-4 kernels (extra flash); "
        "sdpa: dense masks (any device); auto: on CUDA flash if it can run, otherwise flex; on CPU sdpa",
    )


@dataclass
class Tidar:
    """The method: pattern, blocks, mask token and loss weights."""

    pattern: str = option(
        "tidar", "tidar, tidar_split, tidar_random, block_diffusion, causal, or your own: my_package.my_file:MyPattern"
    )
    block_size: int = option(8, "tokens drafted in one block (at most training.seq_len)", minimum=1)
    clean_ratio: float = option(0.5, "tidar_split: fraction of a document's tokens that stays clean", above=0, below=1)
    mask_token_id: int = option(
        -1,
        "mask token id (-1: the first id after those of the model's tokenizer; the vocabulary grows if needed)",
        minimum=0,
        also=-1,
    )
    mask_token_init: Literal["auto", "mean", "keep"] = option(
        "auto",
        "initial embedding of the mask token when weights are loaded: mean of the used rows, or keep the loaded row "
        "(auto: mean, unless a token or a TiDAR checkpoint uses the row)",
    )
    ar_loss_weight: float = option(1.0, "weight of the autoregressive loss", minimum=0)
    diffusion_loss_weight: float = option(1.0, "weight of the diffusion loss", minimum=0)
    block_sizes: list[int] = option(
        [], "experiment: each row draws its block size from this list in every epoch; not in validation", minimum=1
    )
    random_block_offset: bool = option(
        False,
        "experiment: shorten the first block of every document of a row by a random number of tokens, drawn in every "
        "epoch; not in validation",
    )
    place_weights: list[float] = option(
        [],
        "experiment: diffusion loss weight of each position in the block, one number per position of the largest "
        "block; uniform in validation",
        minimum=0,
    )
    diffusion_share: float = option(
        1.0,
        "experiment: fraction of a row's tokens with a diffusion loss, as whole blocks drawn in every epoch; the other "
        "blocks are not part of the model's input; validation uses all blocks",
        above=0,
        maximum=1,
    )


@dataclass
class Data:
    """Training data: source, tokenizer, packing."""

    source: str = option(
        "python_source", "python_source, text, chat, gumiho, or prepared (folders written by tidar.prepare_data)"
    )
    paths: list[str] = option(
        [],
        "files, folders or globs to read (python_source: folders in addition to the standard library); text and chat: "
        "also datasets of the hub, hf://datasets/OWNER/NAME[@REVISION][/SUBSET[/SPLIT]]",
    )
    weights: list[float] = option(
        [], "how many times an epoch repeats each path's documents [1]; 0.3 takes a fixed random 30 %", minimum=0
    )
    tokenizer: str = option("", "tokenizer's folder or hub id, or bytes (default: the tokenizer of the model)")
    text_field: str = option("text", "text: record field that holds the text")
    prompt_field: str = option("", "chat: record field of the prompt (default: prompt, question or instruction)")
    response_field: str = option(
        "", "chat: record field of the response (default: response, completion, answer or output)"
    )
    end_of_document: str = option(
        "", "token appended to each document, or none (default: the tokenizer's end of text; chat: set by the template)"
    )
    end_is_target: bool = option(True, "whether the end-of-document token is a target")
    on_error: Literal["fail", "skip"] = option("fail", "when a document cannot be used: stop, or skip and count it")
    packing: bool = option(True, "pack documents into rows (false: one document per row, truncated and padded)")
    long_documents: Literal["split", "drop"] = option("split", "packing: split or drop documents longer than a row")
    num_workers: int = option(1, "background processes that build batches (0: none)", minimum=0)


@dataclass
class Training:
    """Batch size, sequence length and numerics."""

    seq_len: int = option(256, "tokens per row; the tidar pattern has twice as many model positions", minimum=2)
    local_batch_size: int = option(8, "rows per micro-batch and device", minimum=1)
    global_batch_size: int = option(
        -1,
        "rows per optimizer step over all devices and micro-batches (-1: one micro-batch per device)",
        minimum=1,
        also=-1,
    )
    steps: int = option(1000, "optimizer steps (0: only save the initial weights)", minimum=0)
    epochs: float = option(0.0, "passes over the data, instead of steps (0: use training.steps)", minimum=0)
    max_norm: float = option(1.0, "clip gradients to this global norm (0: no clipping)", minimum=0)
    mixed_precision_param: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "compute dtype; master weights and reductions stay float32 (auto: bfloat16 on CUDA, float32 on CPU; "
        "float16: see [loss_scale])",
    )
    float8: bool = option(
        False,
        "FP8 GEMMs in the MLP (e4m3, gradients e5m2; dynamic tensorwise scaling). Needs bfloat16 "
        "on an Ada, Hopper or later GPU; emulated on CPU",
    )
    enable_cpu_offload: bool = option(
        False, "keep parameters, gradients and optimizer state in host memory and run AdamW there (CUDA)"
    )
    max_steps_skipped: int = option(
        20, "stop after this many consecutive skipped steps (loss or gradient norm not finite)", minimum=1
    )
    loss_chunk_size: int = option(
        4096,
        "target positions per chunk of the loss: their logits, or what replaces them, exist at a time",
        minimum=1,
    )
    seed: int = option(
        0, "seed of the initial parameters, the data order and all random draws", minimum=0, maximum=2**63 - 1
    )
    deterministic: bool = option(False, "use deterministic kernels only: slower, reproducible bit for bit")
    gc_freq: int = option(50, "steps between garbage collections (0: Python decides)", minimum=0)


@dataclass
class Parallelism:
    """Degrees whose product is the number of devices. All but the replicas shard parameters and optimizer state."""

    data_parallel_replicate_degree: int = option(
        1, "replicas of the sharded state (-1: all devices not used for sharding)", minimum=1, also=-1
    )
    data_parallel_shard_degree: int = option(
        -1,
        "devices that one replica is sharded over (-1: all remaining devices; 1: no sharding)",
        minimum=1,
        also=-1,
    )
    context_parallel_degree: int = option(
        1,
        "devices that divide each row; training.seq_len must be a multiple of twice as many (docs/performance.md)",
        minimum=1,
    )
    tensor_parallel_degree: int = option(
        1,
        "devices that divide each layer; must divide the model's key/value heads, intermediate size and vocabulary "
        "(docs/performance.md)",
        minimum=1,
    )
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = option(
        "default",
        "always: free a layer's all-gathered parameters after its forward pass (ZeRO-3); never: keep them for the "
        "backward pass (ZeRO-2); default: always if they are sharded, gradients are reduced per micro-batch, and the "
        "gathered parameters of all layers take more than 4 GiB. One device keeps a 16-bit copy of all parameters if "
        "the compute dtype has 16 bits, unless always",
    )
    fsdp_collectives: Literal["default", "nccl"] = option(
        "default",
        "default: GPUs of one host copy parameters and gradients by copy engines, others use NCCL; nccl: all use it",
    )
    gradient_reduction: Literal["micro_batch", "step"] = option(
        "micro_batch",
        "reduce-scatter gradients after each micro-batch (least memory), or once per step (least communication, keeps "
        "unsharded gradients)",
    )


@dataclass
class ActivationCheckpoint:
    """Activations kept for the backward pass."""

    mode: Literal["none", "selective", "full"] = option(
        "none",
        "none: keep all activations; selective: keep outputs of matmuls and attention, recompute the rest; full: keep "
        "only each layer's input",
    )
    layers: int = option(
        -1,
        "apply mode to this many layers, counted from the first; the others keep all activations (-1: all layers)",
        minimum=0,
        also=-1,
    )


@dataclass
class LossScale:
    """Loss scaling for training.mixed_precision_param = float16, with DeepSpeed's rules."""

    dynamic: bool = option(
        True, "halve the scale on overflow, double it after a window without overflow (false: constant scale)"
    )
    start: float = option(2.0**16, "initial scale", above=0)
    window: int = option(1000, "consecutive steps without overflow before the scale doubles", minimum=1)
    hysteresis: int = option(2, "overflows before the scale halves; the count restarts when it doubles", minimum=1)
    minimum: float = option(1.0, "smallest scale", above=0)


@dataclass
class Optimizer:
    """AdamW."""

    lr: float = option(8e-4, "peak learning rate", above=0)
    beta1: float = option(0.9, "decay rate of the first moment", minimum=0, maximum=0.999999)
    beta2: float = option(0.95, "decay rate of the second moment", minimum=0, maximum=0.999999)
    eps: float = option(1e-8, "added to the square root of the second moment", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", minimum=0)
    decay_params: Literal["matrices", "all"] = option("matrices", "parameters with weight decay: matrices only, or all")
    state_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "dtype of both moments; bfloat16 uses stochastic rounding and saves 4 bytes per parameter"
    )


@dataclass
class LRScheduler:
    """Learning rate schedule, counted in steps that were not skipped."""

    schedule: Literal["warmup", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"] = option(
        "warmup", "warmup: linear from 0, then decay_type; or the DeepSpeed schedule of that name, equal at every step"
    )
    warmup_steps: int = option(20, "warmup steps", minimum=0)
    decay_type: Literal["cosine", "linear", "constant"] = option("cosine", "warmup: shape of the decay")
    min_lr_factor: float = option(
        0.0,
        "rate after the last step's decay, as a share of optimizer.lr (WarmupCosineLR: its cos_min_ratio)",
        minimum=0,
        maximum=1,
    )
    total_steps: int = option(
        -1,
        "last step of the decay (-1: that of the run); schedule = warmup is at its lowest one step later",
        minimum=1,
        also=-1,
    )
    warmup_type: Literal["log", "linear"] = option("log", "DeepSpeed schedules: shape of the warmup")
    warmup_min_lr_factor: float = option(
        0.0,
        "DeepSpeed schedules: initial rate as a fraction of optimizer.lr; WarmupDecayLR also ends there",
        minimum=0,
    )


@dataclass
class Compile:
    """torch.compile."""

    enable: Literal["auto", True, False] = option("auto", "compile each decoder layer and the loss (auto: on CUDA)")


@dataclass
class Validation:
    """Validation on held-out rows."""

    enable: bool = option(True, "run validation")
    freq: int = option(100, "steps between validations; one more runs at the end (0: only at the end)", minimum=0)
    paths: list[str] = option([], "validation data, in the form of data.paths (default: hold out validation.share)")
    share: float = option(0.01, "fraction of the documents held out of training", minimum=0, maximum=0.5)
    steps: int = option(-1, "validation batches per device (-1: all held-out rows)", minimum=1, also=-1)
    generate_prompts: int = option(
        0,
        "held-out prompts that each validation decodes greedily, at most 256 new tokens each: val/tokens_per_forward "
        "and a sample. Sharded weights are gathered once for it, whole on each device (0: none)",
        minimum=0,
    )


@dataclass
class Checkpoint:
    """Saving and resuming."""

    enable: bool = option(True, "save checkpoints, and resume from the newest one in job.dump_folder")
    interval: int = option(500, "steps between checkpoints; one more is saved at the end", minimum=1)
    keep_latest_k: int = option(
        10, "number of newest checkpoints to keep; older ones are removed (0: keep all)", minimum=0
    )
    keep_every_n_steps: int = option(0, "also keep the checkpoint of every n-th step (0: none)", minimum=0)
    save_best: bool = option(False, "also keep the checkpoint with the lowest val/loss")
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = option(
        "disabled",
        "async: copy the state to host memory and write it while training continues; async_with_pinned_mem: overlap "
        "the copy with the next step too, through pinned memory that stays allocated (CUDA; otherwise like async)",
    )
    on_error: Literal["stop", "continue"] = option(
        "stop", "when a checkpoint cannot be written: stop the run, or warn and continue without it"
    )
    max_wall_minutes: float = option(
        0.0, "save and stop after this many minutes, startup included (0: never)", minimum=0
    )
    allow_changes: bool = option(
        False,
        "resume although pattern, block size, seed, sequence length, batch size or data differ from the checkpoint",
    )
    initial_load_path: str = option(
        "",
        "initial weights of a new run: a Hugging Face folder or hub id, a checkpoint's step-<n>, or a state dict "
        "saved with torch.save (default: the weights in model.hf_path, or random ones)",
    )
    export_epochs: int = option(0, "epochs between exports to export/epoch_<n> (0: none)", minimum=0)


@dataclass
class Metrics:
    """Reporting."""

    log_freq: int = option(10, "steps between reports", minimum=1)
    enable_wandb: bool = option(
        False, "also report to Weights & Biases (extra wandb; WANDB_PROJECT, WANDB_NAME, WANDB_MODE, … as there)"
    )


@dataclass
class Profiling:
    """Traces of the PyTorch profiler, for chrome://tracing or Perfetto."""

    enable_profiling: bool = option(False, "write a trace of one step every profile_freq steps")
    profile_freq: int = option(100, "steps between traces", minimum=3)
    save_traces_folder: str = option("profile_traces", "subfolder of job.dump_folder for the traces")


@dataclass
class Comm:
    """Timeouts of the process group and of the watchdog, in seconds."""

    init_timeout_seconds: int = option(
        300,
        "longest time without progress until the end of the first step, and in the first batch of a validation",
        minimum=5,
        maximum=10**6,
    )
    train_timeout_seconds: int = option(
        100,
        "longest time without progress after that: one micro-batch, or waiting for another rank",
        minimum=5,
        maximum=10**6,
    )
    save_timeout_seconds: int = option(1800, "longest time for a checkpoint or an export", minimum=5, maximum=10**6)


@dataclass
class Config:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    tidar: Tidar = field(default_factory=Tidar)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    loss_scale: LossScale = field(default_factory=LossScale)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    compile: Compile = field(default_factory=Compile)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
