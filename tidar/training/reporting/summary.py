"""What a run is about to do, logged before it starts."""

from tidar.data import PackedRows
from tidar.models.flops import useful_flops
from tidar.patterns import experiments
from tidar.training.batches import Batches
from tidar.training.estimate.gpus import this_gpu
from tidar.training.estimate.report import in_one_line
from tidar.training.estimate.row import row_work
from tidar.training.estimate.shapes import estimate, not_estimated
from tidar.training.plan import RunPlan


def summarize(plan: RunPlan, batches: Batches, n_unusable: int, steps: int) -> list[str]:
    """Parameters, data, tokens and FLOPs of a step and of the run, memory of the states, kernels, an estimate.

    n_unusable: documents that were dropped at preparation.
    """
    config, rows = plan.config, batches.training_rows
    seq_len = config.training.seq_len
    row = row_work(plan.pattern, seq_len)
    flops = useful_flops(plan.decoder, *row) * plan.global_batch_size
    padding = 1 - rows.n_tokens / (len(rows) * seq_len)
    long = rows.n_long / max(rows.n_documents, 1)
    long_documents = f"{long:.2%} of documents {'split' if config.data.packing else 'truncated'}"
    if rows.n_dropped:
        long_documents = f"{rows.n_dropped:,} long documents dropped"
    if rows.n_truncated_tokens:
        long_documents += f", {rows.n_truncated_tokens:,} tokens truncated"
    if n_unusable:
        long_documents += f", {n_unusable:,} malformed or empty ones dropped"
    long_documents += _without_targets(rows)
    name = config.model.hf_path or config.model.name
    blocks = [f"blocks of {config.tidar.block_size}"] if "diffusion" in plan.pattern.losses else []
    changed = [f"{name} {value}" for name, value in experiments(config).items()]
    step_tokens = plan.global_batch_size * seq_len
    lines = {
        "model": f"{name}, {plan.n_parameters:,} parameters, vocabulary of {plan.decoder.vocab_size:,}",
        "data": f"{config.data.source}, {rows.n_tokens:,} tokens of {rows.n_documents:,} documents "
        f"in {len(rows):,} rows of {seq_len} ({padding:.2%} padding, {long_documents}), "
        f"{len(batches.held_out_rows):,} rows held out{_without_targets(batches.held_out_rows)}",
        "pattern": ", ".join([config.tidar.pattern, *blocks, *changed, f"{row.positions} model positions a row"]),
        "step": f"{step_tokens:,} tokens: {_devices(plan)} x "
        f"{_count(plan.micro_batches, 'micro-batch')} x {_count(config.training.local_batch_size, 'row')}, "
        f"{flops / 1e12:.3g} useful TFLOPs",
        "run": f"{steps:,} steps, {step_tokens * steps:,} tokens, "
        f"{len(rows) / plan.global_batch_size:,.1f} steps an epoch",
        "memory": _memory(plan),
        "engine": f"{plan.device.type}, {plan.dtype}, {plan.kernels.describe()}",
    }
    gpu = this_gpu(plan.device)
    if gpu and not not_estimated(plan):
        lines["estimate"] = in_one_line(estimate(plan, gpu, row))
    return [f"{name:<8} {text}" for name, text in lines.items()]


def _devices(plan: RunPlan) -> str:
    shared = {"row": plan.context_parallel, "layer": plan.tensor_parallel}
    each = ", ".join(f"{degree} for each {what}" for what, degree in shared.items() if degree > 1)
    return _count(plan.world_size, "device") + (f" ({each})" if each else "")


def _without_targets(rows: PackedRows) -> str:
    kept = f", {rows.n_without_targets:,} rows without a target" if rows.n_without_targets else ""
    return kept + (f", {rows.n_rows_dropped:,} rows without a target dropped" if rows.n_rows_dropped else "")


def _memory(plan: RunPlan) -> str:
    gib = 2**30
    if not plan.uses_fsdp:
        return f"{plan.states_bytes / gib:.3f} GiB of states"
    where = "in the host's memory for" if plan.config.training.enable_cpu_offload else "on"
    text = f"{plan.states_bytes / gib:.3f} GiB of states {where} each device"
    if plan.world_size > 1:
        text += f", {_count(plan.replicas, 'replica')} over {_count(plan.shards * plan.tensor_parallel, 'shard')}"
    if plan.gathered_bytes:
        text += f"; {plan.gathered_bytes / gib:.3f} GiB more of gathered parameters, "
        text += "kept from the forward to the backward pass"
    if plan.unsharded_gradient_bytes:
        text += f"; {plan.unsharded_gradient_bytes / gib:.3f} GiB more of unsharded gradients, "
        text += "kept from the first micro-batch to the last"
    return text


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('ch') else 's'}"
