"""The options: one dataclass per section of the TOML file. Names follow torchtitan where it has them."""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str, *, minimum=None, maximum=None, above=None, below=None, beside=None) -> Any:
    """A field, its meaning, its range: minimum <= value <= maximum and above < value < below, or value == beside."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "above": above, "below": below, "beside": beside}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Job:
    """The run and its folder."""

    config_file: str = option("", "TOML file with the options; the command line wins over it")
    dump_folder: str = option("", "folder of everything the run writes (default: runs/<name of the config file>)")


@dataclass
class Model:
    """The decoder."""

    name: str = option("debug", "size of the decoder, one of those in tidar/models/sizes.py")
    hf_path: str = option(
        "", "local folder of a Hugging Face model: its config.json, tokenizer and weights; wins over name"
    )
    attention_backend: Literal["auto", "flash", "flex", "sdpa"] = option(
        "auto",
        "flex: FlexAttention with block masks (CUDA); flash: the same with FlashAttention-4's kernels (extra flash); "
        "sdpa: dense masks (anywhere); auto: on CUDA flash where it is installed and can be used, else flex",
    )


@dataclass
class Tidar:
    """The method: which positions see which, and how the two losses are weighed."""

    pattern: str = option(
        "tidar", "tidar, tidar_split, tidar_random, block_diffusion, causal, or your own: my_package.my_file:MyPattern"
    )
    block_size: int = option(8, "tokens drafted together (at most training.seq_len)", minimum=1)
    clean_ratio: float = option(0.5, "tidar_split: share of a document's tokens that stays clean", above=0, below=1)
    mask_token_id: int = option(
        -1,
        "token of masked positions (-1: the first id after the tokenizer's last; the vocabulary grows if it must)",
        minimum=0,
        beside=-1,
    )
    mask_token_init: Literal["auto", "mean", "keep"] = option(
        "auto",
        "first embedding of the mask token where weights are loaded: the mean of the used rows, or as it is "
        "(auto: mean, unless a token or a TiDAR checkpoint uses the row)",
    )
    ar_loss_weight: float = option(1.0, "weight of the autoregressive loss", minimum=0)
    diffusion_loss_weight: float = option(1.0, "weight of the diffusion loss", minimum=0)
    block_sizes: list[int] = option(
        [],
        "experiment: each row takes one of these in place of block_size, drawn anew in every epoch; a validation keeps "
        "block_size",
        minimum=1,
    )
    random_block_offset: bool = option(
        False,
        "experiment: the first block of all documents of a row is shorter, by a number drawn anew in every epoch; not "
        "in a validation",
    )
    place_weights: list[float] = option(
        [],
        "experiment: weight of each place of a block in the diffusion loss, one number for each place of the largest "
        "block; all alike in a validation",
        minimum=0,
    )
    diffusion_share: float = option(
        1.0,
        "experiment: share of a row's tokens that the diffusion loss trains, in whole blocks drawn anew each epoch; "
        "other blocks are not part of the model's input; all of them in a validation",
        above=0,
        maximum=1,
    )


@dataclass
class Data:
    """Where the text comes from."""

    source: str = option(
        "python_source", "python_source, text, chat, gumiho, or prepared: folders of tidar.prepare_data"
    )
    paths: list[str] = option(
        [], "files, folders or globs of the source (python_source: folders to add to the standard library)"
    )
    weights: list[float] = option(
        [],
        "how often an epoch takes the documents of each path [1]; 0.3 takes three in ten, drawn once",
        minimum=0,
    )
    tokenizer: str = option("", "local folder of a tokenizer, or bytes (default: that of the model's folder)")
    text_field: str = option("text", "text: field of a record that holds the text")
    prompt_field: str = option("", "chat: field of the prompt (default: prompt or question)")
    response_field: str = option("", "chat: field of the response (default: response or answer)")
    end_of_document: str = option(
        "", "token that ends a document, or none (default: the tokenizer's end of text; chat: what the template has)"
    )
    end_is_target: bool = option(True, "whether the end of a document is to be predicted")
    on_error: Literal["fail", "skip"] = option(
        "fail", "a document that cannot be used: stop, or count and leave it out"
    )
    packing: bool = option(True, "pack documents into rows (false: one document a row, truncated and padded)")
    long_documents: Literal["split", "drop"] = option("split", "documents longer than a row, where they are packed")
    num_workers: int = option(1, "background processes that prepare batches (0: none)", minimum=0)


@dataclass
class Training:
    """Batch, length and numerics."""

    seq_len: int = option(256, "tokens of a row; tidar's model sees twice as many positions", minimum=2)
    local_batch_size: int = option(8, "rows of a micro-batch on one device", minimum=1)
    global_batch_size: int = option(
        -1,
        "rows of an optimizer step over all devices and micro-batches (-1: one micro-batch on each)",
        minimum=1,
        beside=-1,
    )
    steps: int = option(1000, "optimizer steps of the run (0: only saves the first weights)", minimum=0)
    epochs: float = option(0.0, "passes over the data, in place of steps (0: as training.steps says)", minimum=0)
    max_norm: float = option(1.0, "gradients are clipped to this global norm (0: not clipped)", minimum=0)
    mixed_precision_param: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "type of the arithmetic; parameters and reductions stay float32 (auto: bfloat16 on CUDA; float16: see "
        "[loss_scale])",
    )
    float8: bool = option(
        False,
        "matrix products of the MLP in FP8 (e4m3, gradients e5m2; dynamic tensorwise scaling by torchao, extra fp8); "
        "all else stays as it is. Ada, Hopper or later GPUs, bfloat16; emulated on a CPU",
    )
    enable_cpu_offload: bool = option(
        False, "parameters, gradients and optimizer state stay in the host's memory, where AdamW runs (CUDA)"
    )
    max_steps_skipped: int = option(
        20, "steps skipped in a row, for a loss or gradient norm that is not finite, before the run stops", minimum=1
    )
    loss_chunk_size: int = option(
        4096, "scored positions whose logits, or what is in their place, exist at one time", minimum=1
    )
    seed: int = option(0, "seed of the first parameters and of the order of the data", minimum=0, maximum=2**63 - 1)
    deterministic: bool = option(False, "only deterministic kernels: slower, repeats bit for bit")
    gc_freq: int = option(50, "steps between collections of Python's garbage (0: Python decides)", minimum=0)


@dataclass
class Parallelism:
    """How parameters, gradients and optimizer state lie on the devices: replicate x shard degree are all of them."""

    data_parallel_replicate_degree: int = option(
        1, "groups of devices that each hold all of the state (-1: as many as there are)", minimum=1, beside=-1
    )
    data_parallel_shard_degree: int = option(
        -1,
        "devices that the state is sharded over (-1: all that are left; 1: each holds it whole)",
        minimum=1,
        beside=-1,
    )
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = option(
        "default",
        "free a layer's gathered parameters after its forward pass, as ZeRO-3 does (always), or keep them for the "
        "backward pass, as ZeRO-2 does (never); default: always where they are sharded and reduced each micro-batch. "
        "One device keeps a copy of all parameters where the arithmetic has 16 bits, unless always",
    )
    gradient_reduction: Literal["micro_batch", "step"] = option(
        "micro_batch",
        "when the gradients of a group's devices are added up: after each micro-batch (least memory), or once a step "
        "(least communication, keeps whole gradients)",
    )


@dataclass
class ActivationCheckpoint:
    """What of a layer is kept for the backward pass."""

    mode: Literal["none", "selective", "full"] = option(
        "none",
        "none: all activations; selective: results of matrix products and attention, the rest is recomputed; full: "
        "only the layer's input",
    )
    layers: int = option(
        -1,
        "layers, counted from the first, that mode is applied to; the others keep all (-1: all layers)",
        minimum=0,
        beside=-1,
    )


@dataclass
class LossScale:
    """Scaling of the loss where training.mixed_precision_param = float16, as DeepSpeed does it."""

    dynamic: bool = option(True, "halve the scale on overflow, double it after a window without (false: constant)")
    start: float = option(2.0**16, "first scale", above=0)
    window: int = option(1000, "steps in a row without overflow after which the scale doubles", minimum=1)
    hysteresis: int = option(2, "overflows before the scale halves; counted anew when it doubles", minimum=1)
    minimum: float = option(1.0, "smallest scale", above=0)


@dataclass
class Optimizer:
    """AdamW."""

    lr: float = option(8e-4, "highest learning rate", above=0)
    beta1: float = option(0.9, "decay of the first moment", minimum=0, maximum=0.999999)
    beta2: float = option(0.95, "decay of the second moment", minimum=0, maximum=0.999999)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", minimum=0)
    decay_params: Literal["matrices", "all"] = option(
        "matrices", "what is decayed: parameters of two dimensions, or all"
    )
    state_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "type of both moments; bfloat16 is rounded stochastically and saves 4 bytes a parameter"
    )


@dataclass
class LRScheduler:
    """The learning rate over the run, by its steps that were not skipped."""

    schedule: Literal["warmup", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"] = option(
        "warmup", "warmup: linear from 0, then as decay_type says; or DeepSpeed's of that name, the same at every step"
    )
    warmup_steps: int = option(20, "steps of the warm-up", minimum=0)
    decay_type: Literal["cosine", "linear", "constant"] = option("cosine", "warmup: form of the decay")
    min_lr_factor: float = option(
        0.0,
        "rate after the last step's decay, as a share of optimizer.lr (WarmupCosineLR: its cos_min_ratio)",
        minimum=0,
        maximum=1,
    )
    total_steps: int = option(-1, "step with which the decay ends (-1: the last of the run)", minimum=1, beside=-1)
    warmup_type: Literal["log", "linear"] = option("log", "DeepSpeed's schedules: form of the warm-up")
    warmup_min_lr_factor: float = option(
        0.0,
        "DeepSpeed's schedules: rate before the warm-up, as a share of optimizer.lr; WarmupDecayLR ends there too",
        minimum=0,
    )


@dataclass
class Compile:
    """torch.compile."""

    enable: Literal["auto", True, False] = option("auto", "compile each decoder layer and the loss (auto: on CUDA)")


@dataclass
class Validation:
    """Passes over held-out rows."""

    enable: bool = option(True, "validate at all")
    freq: int = option(100, "steps between validations; one more comes at the end (0: only that one)", minimum=0)
    paths: list[str] = option([], "data to validate on, as data.paths (default: a share of the training data)")
    share: float = option(0.01, "share of the documents that is held out of training", minimum=0, maximum=0.5)
    steps: int = option(-1, "batches of a validation on each device (-1: all held-out rows)", minimum=1, beside=-1)


@dataclass
class Checkpoint:
    """Saving and going on."""

    enable: bool = option(True, "save checkpoints, and go on from the last one in job.dump_folder")
    interval: int = option(500, "steps between checkpoints; one more comes at the end", minimum=1)
    keep_latest_k: int = option(
        10, "newest checkpoints that are kept; older ones are removed (0: all are kept)", minimum=0
    )
    keep_every_n_steps: int = option(0, "checkpoints of each so many steps are kept too (0: none)", minimum=0)
    save_best: bool = option(False, "the checkpoint with the lowest val/loss is kept too, of those saved with one")
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = option(
        "disabled",
        "async: copy what is saved to the host's memory and write it while training goes on; async_with_pinned_mem: "
        "copy beside the next step too, to page-locked memory that is kept (CUDA; elsewhere as async)",
    )
    on_error: Literal["stop", "continue"] = option(
        "stop", "a checkpoint that cannot be written: stop the run, or warn and train on without it"
    )
    max_wall_minutes: float = option(
        0.0, "save and stop after so many minutes, those of the start included (0: never)", minimum=0
    )
    allow_changes: bool = option(
        False, "go on from a checkpoint although pattern, block size, seed, length, batch or data differ"
    )
    initial_load_path: str = option(
        "",
        "weights that a new run starts from: a Hugging Face folder, a checkpoint's step-<n> or a state dict saved "
        "with torch.save (default: those in model.hf_path, or random ones)",
    )
    export_epochs: int = option(0, "epochs between exports to export/epoch_<n> (0: none)", minimum=0)


@dataclass
class Metrics:
    """What is reported."""

    log_freq: int = option(10, "steps between reports", minimum=1)


@dataclass
class Profiling:
    """Traces of the PyTorch profiler, for chrome://tracing or Perfetto."""

    enable_profiling: bool = option(False, "write a trace of one step now and then")
    profile_freq: int = option(100, "steps between traces", minimum=3)
    save_traces_folder: str = option("profile_traces", "where in job.dump_folder they are written")


@dataclass
class Comm:
    """The process group."""

    init_timeout_seconds: int = option(
        300,
        "longest time without progress until the first step has ended, and in a validation's first batch",
        minimum=5,
        maximum=10**6,
    )
    train_timeout_seconds: int = option(
        100,
        "longest time without progress after that: for a micro-batch, or in wait of another rank",
        minimum=5,
        maximum=10**6,
    )
    save_timeout_seconds: int = option(
        1800, "longest time that a checkpoint or an export may take", minimum=5, maximum=10**6
    )


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
