"""Layers that gather keys and values, compiled."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

from tidar.distributed import GatheredAttention
from tidar.distributed.parallelize import apply_compile
from tidar.kernels import Kernels
from tidar.models import size_config
from tidar.models.decoder import DecoderLayer
from tidar.models.huggingface import decoder_config

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES = HEADS | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def alone():
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_work_of_a_compiled_layer_overlaps_its_collectives(monkeypatch, alone):
    """In the code that Inductor writes there is other work between the start of a collective and the wait for it. Its
    kernels are not compiled, which would take long: they compute nothing here.
    """
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    config = decoder_config(size_config("qwen3-8b") | SIZES)
    model = nn.Module()
    model.layers, model.norm = nn.ModuleList([DecoderLayer(config, Kernels(fused_backward=True))]), nn.Identity()
    x = torch.randn(1, 24, 64, requires_grad=True)
    angles = [torch.randn(1, 1, 24, 16) for _ in range(2)]
    mask = GatheredAttention(torch.ones(1, 1, 24, 24, dtype=torch.bool), (16,), n_ranks=1, group=alone)
    with torch._inductor.config.patch(reorder_for_compute_comm_overlap=False, pattern_matcher=False):
        apply_compile(model, has_collectives=True)
        _, sources = run_and_get_code(lambda: model.layers[0](x, *angles, mask).sum().backward())
    forward, backward = (source.split("def call(")[1] for source in sources)
    (rotation,) = re.findall(r"all_gather_into_tensor.default\(.*?wait_tensor", forward, re.DOTALL)
    (gradients,) = re.findall(r"reduce_scatter_tensor.default\(.*?wait_tensor", backward, re.DOTALL)
    assert "cpp_fused" in rotation and gradients.count("extern_kernels.mm") >= 3
