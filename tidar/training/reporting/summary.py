"""What a run is about to do, told before it starts."""

import torch

from tidar.config import Config
from tidar.data import PackedRows
from tidar.distributed import needs_fsdp, reshards_after_forward, resolve_degrees
from tidar.models import Decoder, pattern_mask
from tidar.models.flops import batch_flops
from tidar.patterns import Pattern, experiments


def summarize(
    config: Config,
    model: Decoder,
    pattern: Pattern,
    training_rows: PackedRows,
    held_out_rows: PackedRows,
    world_size: int,
    micro_batches: int,
    steps: int,
    n_left_out: int,
    engine: str,
    dtype: torch.dtype,
) -> list[str]:
    """Parameters, data, tokens and FLOPs of a step and of the run, memory of the states.

    n_left_out: documents that could not be used. engine: how the run computes; dtype: of the arithmetic.
    """
    seq_len = config.training.seq_len
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = config.training.local_batch_size * micro_batches * world_size
    row = torch.zeros(1, seq_len, dtype=torch.long)
    batch = pattern.layout(row, row, torch.ones_like(row))
    flops = batch_flops(model.config, batch, int(pattern_mask(pattern, batch.documents).allowed_pairs()))
    padding = 1 - training_rows.n_tokens / (len(training_rows) * seq_len)
    long = training_rows.n_long / max(training_rows.n_documents, 1)
    long_documents = f"{long:.2%} of documents {'split' if config.data.packing else 'truncated'}"
    if training_rows.n_dropped:
        long_documents = f"{training_rows.n_dropped:,} long documents dropped"
    if training_rows.n_cut_tokens:
        long_documents += f", {training_rows.n_cut_tokens:,} tokens cut"
    if n_left_out:
        long_documents += f", {n_left_out:,} bad or empty ones left out"
    long_documents += _without_targets(training_rows)
    name = config.model.hf_path or config.model.name
    blocks = [f"blocks of {config.tidar.block_size}"] if "diffusion" in pattern.losses else []
    drawn = [f"{name} {value}" for name, value in experiments(config).items()]
    lines = {
        "model": f"{name}, {parameters:,} parameters, vocabulary of {model.config.vocab_size:,}",
        "data": f"{config.data.source}, {training_rows.n_tokens:,} tokens of {training_rows.n_documents:,} documents "
        f"in {len(training_rows):,} rows of {seq_len} ({padding:.2%} padding, {long_documents}), "
        f"{len(held_out_rows):,} rows held out{_without_targets(held_out_rows)}",
        "pattern": ", ".join(
            [config.tidar.pattern, *blocks, *drawn, f"{pattern.model_positions(seq_len)} model positions a row"]
        ),
        "step": f"{rows * seq_len:,} tokens: {_count(world_size, 'device')} x {_count(micro_batches, 'micro-batch')} x "
        f"{_count(config.training.local_batch_size, 'row')}, {flops * rows / 1e12:.3g} useful TFLOPs",
        "run": f"{steps:,} steps, {rows * seq_len * steps:,} tokens, {len(training_rows) / rows:,.1f} steps an epoch",
        "memory": _memory(config, parameters, dtype.itemsize, world_size, micro_batches),
        "engine": engine,
    }
    return [f"{name:<8} {text}" for name, text in lines.items()]


def _without_targets(rows: PackedRows) -> str:
    kept = f", {rows.n_without_targets:,} rows without a target" if rows.n_without_targets else ""
    return kept + (f", {rows.n_rows_dropped:,} rows without a target dropped" if rows.n_rows_dropped else "")


def _memory(config: Config, parameters: int, param_bytes: int, world_size: int, micro_batches: int) -> str:
    replicas, shards = resolve_degrees(config, world_size)
    moment_bytes = {"float32": 4, "bfloat16": 2}[config.optimizer.state_dtype]
    gib = parameters / 2**30
    if not needs_fsdp(config, world_size):
        # float32 parameters and two moments; the copies that are computed with; gradients, summed up in float32
        copies = param_bytes if param_bytes < 4 else 0
        gradients = param_bytes if micro_batches == 1 else 4
        return f"{(4 + 2 * moment_bytes + copies + gradients) * gib:.3f} GiB of states"
    # float32 parameters and gradients, and two moments
    where = "in the host's memory for" if config.training.enable_cpu_offload else "on"
    text = f"{(8 + 2 * moment_bytes) * gib / shards:.3f} GiB of states {where} each device"
    if world_size > 1:
        text += f", {_count(replicas, 'replica')} over {_count(shards, 'shard')}"
    if not reshards_after_forward(config, shards):
        text += f"; {param_bytes * gib:.3f} GiB more of gathered parameters, kept from the forward to the backward pass"
    if config.parallelism.gradient_reduction == "step" and micro_batches > 1:
        text += f"; {4 * gib:.3f} GiB more of whole gradients, kept from the first micro-batch to the last"
    return text


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('ch') else 's'}"
