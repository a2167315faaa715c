"""The baseline: training as in the DeepSpeed script that this project replaces, in its fastest form."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from tidar.benchmarks.cases import WARM_UP, Step, free_memory, synchronize
from tidar.data import Batch
from tidar.models import MaskBuilder, size_config
from tidar.models.flops import batch_flops
from tidar.patterns import ModelBatch, Pattern


def time_baseline(
    name: str, vocab_size: int, pattern: Pattern, decoder, batches: list[Batch], rows_at_once: int, mesh: DeviceMesh
) -> list[Step]:
    """Steps of the transformers model of this size with SDPA under a dense mask, one for each batch after the warm-up.

    Full logits, the losses row by row, fused AdamW, no clipping; batches on the device. Batches of more than
    `rows_at_once` rows are divided into micro-batches of this size, whose gradients are accumulated. Weights are
    bfloat16; on several devices float32 under FSDP2, with layers gathered and gradients reduced in bfloat16.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds, and other measurements need none of it

    device = batches[0].rows.input_ids.device
    config = AutoConfig.for_model(**size_config(name) | {"vocab_size": vocab_size, "use_cache": False})
    dtype = torch.bfloat16 if mesh.size() == 1 else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.train()
    if mesh.size() > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            if device.type == "cpu":  # gloo knows sums only
                module.set_gradient_divide_factor(mesh.size())
                module.set_force_sum_reduction_for_comms(True)
        free_memory()  # that of the whole model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dense = MaskBuilder(pattern, "sdpa")
    steps, ends = [], [_now()]
    for batch in [*(batches[i % len(batches)] for i in range(WARM_UP)), *batches]:
        rows = batch.rows
        mask_of_batch = dense(rows.documents)
        seen: Any = mask_of_batch.attention  # a bool tensor
        for start in range(0, len(rows.input_ids), rows_at_once):
            part = slice(start, start + rows_at_once)
            mask = torch.zeros(seen[part].shape, dtype=torch.bfloat16, device=device)
            mask.masked_fill_(~seen[part], float("-inf"))
            inputs = {"input_ids": rows.input_ids[part], "position_ids": rows.position_ids[part]}
            logits = model(**inputs, attention_mask=mask).logits
            _loss(logits, rows, start).backward()
            del logits
        optimizer.step()
        optimizer.zero_grad()
        ends.append(_now())
        pairs = int(mask_of_batch.allowed_pairs)
        steps.append(Step(ends[-1] - ends[-2], batch.n_tokens, batch_flops(decoder, rows, pairs)))
    return steps[WARM_UP:]


def _loss(logits: Tensor, rows: ModelBatch, first: int) -> Tensor:
    """The share of the rows from `first` on in the mean of both losses, each computed for one row at a time."""
    positions = logits.shape[1]
    total = logits.new_zeros((), dtype=torch.float32)
    for targets in rows.targets.values():
        for row in range(len(logits)):
            mine = targets.index // positions == first + row
            nll = F.cross_entropy(logits[row, targets.index[mine] % positions], targets.labels[mine], reduction="sum")
            total = total + nll / len(targets.labels) / len(rows.targets)
    return total


def _now() -> float:
    synchronize()
    return time.perf_counter()
