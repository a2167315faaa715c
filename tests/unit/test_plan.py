"""What a run needs, known before anything is allocated; and what a run says that needs more than there is."""

import importlib.metadata
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tidar import train
from tidar.config import UserError, load_config
from tidar.distributed import leave_world
from tidar.models import size_config
from tidar.models.huggingface import decoder_config
from tidar.training.hooks import Hooks
from tidar.training.out_of_memory import memory_advice
from tidar.training.plan import RunPlan, plan_run
from tidar.training.trainer import Trainer

CPU = torch.device("cpu")
DECODER = decoder_config(size_config("qwen2.5-1.5b"))
TP = "--parallelism.tensor_parallel_degree"


def plan(options: str, world_size: int) -> RunPlan:
    found = plan_run(load_config(options.split()), world_size, CPU, DECODER, mask_token_id=1)
    assert not dist.is_initialized()
    return found


def test_a_plan_of_sixteen_devices():
    """Bytes by hand: 1.54e9 parameters, the head tied; float32 parameters and gradients, moments in bfloat16."""
    options = "--training.local_batch_size 2 --training.global_batch_size 128 --training.seq_len 4096"
    options += " --parallelism.data_parallel_replicate_degree 4 --optimizer.state_dtype bfloat16"
    found = plan(f"{options} --training.mixed_precision_param bfloat16", world_size=16)
    attention = 1536 * (12 + 2 * 2) * 128 + (12 + 2 * 2) * 128 + 12 * 128 * 1536
    n_parameters = 151936 * 1536 + 1536 + 28 * (attention + 3 * 1536 * 8960 + 2 * 1536)
    assert found.n_parameters == n_parameters and (found.replicas, found.shards, found.micro_batches) == (4, 4, 4)
    assert found.states_bytes == n_parameters * (4 + 4 + 2 + 2) / 4 and found.positions == 2 * 2 * 4096
    # below 4 GiB they stay gathered by default
    assert found.gathered_bytes == 2 * n_parameters and found.unsharded_gradient_bytes == 0 and found.uses_fsdp
    assert plan(f"{options} --parallelism.fsdp_reshard_after_forward always", world_size=16).gathered_bytes == 0
    assert plan(options, world_size=16).reshards  # in float32
    once = plan(f"{options} --training.mixed_precision_param bfloat16 --parallelism.gradient_reduction step", 16)
    assert (once.gathered_bytes, once.unsharded_gradient_bytes) == (2 * n_parameters, 4 * n_parameters)


@pytest.mark.parametrize("installed, accepted", [(None, False), ("0.29.1", False), ("0.30.0", True), ("1.0", True)])
def test_wandb_is_there_and_new_enough(monkeypatch, installed, accepted):
    def version(package: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    expected = nullcontext() if accepted else pytest.raises(UserError, match="enable_wandb = true: needs wandb 0.30")
    with expected:
        plan("--metrics.enable_wandb true", world_size=1)


def test_a_plan_where_devices_share_layers():
    """All but the norms is divided; two devices need no FSDP2, and eight have slots that two can divide."""
    found = plan(f"{TP} 2 --training.local_batch_size 3", world_size=2)
    norms = (2 * 28 + 1) * 1536
    assert found.n_own_parameters == (found.n_parameters - norms) / 2 + norms
    assert found.global_batch_size == 3 and not found.uses_fsdp
    more = plan(f"{TP} 2 --parallelism.context_parallel_degree 2 --tidar.block_size 7", world_size=8)
    assert more.uses_fsdp and (more.shards, more.global_batch_size) == (4, 2 * more.config.training.local_batch_size)
    assert more.positions % 2 == 0


@pytest.mark.parametrize("micro_batches, expected", [(1, 4 + 8 + 2 + 2), (3, 4 + 8 + 2 + 4)])
def test_a_plan_of_one_device(micro_batches, expected):
    """Parameters, moments, copies in bfloat16, and gradients, which several micro-batches accumulate in float32."""
    options = f"--training.local_batch_size 2 --training.global_batch_size {2 * micro_batches}"
    found = plan(f"{options} --training.mixed_precision_param bfloat16", world_size=1)
    assert not found.uses_fsdp and found.states_bytes == expected * found.n_parameters


@pytest.mark.parametrize(
    "options, message",
    [
        ("--parallelism.data_parallel_shard_degree 3", "their product must be the number of devices, 4"),
        ("--training.global_batch_size 33", "training.global_batch_size = 33: must be a multiple of"),
        ("--model.attention_backend flex", "has no backward pass without CUDA"),
        ("--training.enable_cpu_offload", "needs CUDA"),
        ("--parallelism.tensor_parallel_degree 3", "parallelism.tensor_parallel_degree = 3: must divide the number of"),
        (f"{TP} 2 --training.seq_len 33 --tidar.pattern causal", "must divide the 33 model positions of a row"),
        (
            f"{TP} 2 --parallelism.context_parallel_degree 4",
            "context_parallel_degree = 4 x .*_parallel_degree = 2: must",
        ),
        (f"{TP} 2 --training.global_batch_size 33", "on each of 2 data-parallel ranks"),
        (
            "--parallelism.context_parallel_degree 3",
            "^parallelism.context_parallel_degree = 3: must divide the number of devices, 4$",
        ),
        (
            "--parallelism.context_parallel_degree 2 --training.seq_len 98",
            "^training.seq_len = 98: must be a multiple of 4, twice parallelism.context_parallel_degree = 2$",
        ),
        ("--tidar.ar_loss_weight 0 --tidar.diffusion_loss_weight 0", "must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_read(options, message):
    with pytest.raises(UserError, match=message):
        plan_run(load_config(options.split()), 4, CPU)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({}, "num_key_value_heads = 2"),
        ({"n_kv_heads": 4, "hidden_dim": 8962}, "intermediate_size = 8962"),
        ({"n_kv_heads": 4, "vocab_size": 151_937}, "vocab_size = 151937"),
    ],
)
def test_sizes_that_cannot_be_divided_are_refused_by_name(sizes, message):
    with pytest.raises(UserError, match=f"tensor_parallel_degree = 4: must divide the model's {message}"):
        plan_run(load_config(f"{TP} 4".split()), 4, CPU, replace(DECODER, **sizes))


class OutOfMemory(Hooks):
    def on_micro_batch(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_says_what_to_do(tmp_path, capsys, monkeypatch):
    """In two lines, and outcome.json says it too."""
    options = (
        "--training.seq_len 32 --training.steps 2 --data.num_workers 0 --validation.enable false --job.dump_folder"
    )
    monkeypatch.setattr(sys, "argv", ["train", *options.split(), str(tmp_path)])
    monkeypatch.setattr(train, "Trainer", partial(Trainer, hooks=OutOfMemory()))
    try:
        with pytest.raises(SystemExit) as ended:
            train.main()
    finally:
        leave_world()
    first, second = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert first.startswith("error: rank 0: out of memory: the run needs states of 0.02 GiB on each device")
    assert second.startswith("what lowers it, cheapest first: training.loss_chunk_size (now ")
    assert '"outcome": "failed"' in (tmp_path / "outcome.json").read_text()


def test_advice_names_only_what_is_left():
    """Cheapest first; not what the run does already."""
    names = ("training.loss_chunk_size", "training.local_batch_size", "gradient_reduction", "reshard_after_forward")
    names += ("mode = selective", "mode = full", "state_dtype", "replicate_degree", "more devices", "cpu_offload")
    options = "--training.local_batch_size 2 --training.global_batch_size 64"
    options += " --parallelism.gradient_reduction step --parallelism.data_parallel_replicate_degree 2"
    every = memory_advice(plan(options, 8), peak_bytes=40 * 2**30)
    places = [every.index(name) for name in names]
    assert places == sorted(places) and "GiB of activations and buffers" in every
    options = "--training.local_batch_size 1 --training.loss_chunk_size 512 --activation_checkpoint.mode full"
    few = memory_advice(plan(f"{options} --optimizer.state_dtype bfloat16", 8), peak_bytes=0)
    assert few.splitlines()[1] == "what lowers it, cheapest first: more devices, training.enable_cpu_offload"
