"""Layers that communicate: compiled, and under FlexAttention."""

import re
import sys

import pytest
import torch
import torch.distributed as dist
from reference import ids_of
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore

from tidar.distributed import GatheredAttention
from tidar.distributed.parallelize import apply_compile
from tidar.distributed.tensor_parallel import TensorParallel
from tidar.kernels import Kernels
from tidar.models import attention as backend
from tidar.models import pattern_mask, size_config
from tidar.models.decoder import DecoderLayer
from tidar.models.huggingface import decoder_config
from tidar.patterns import RowSharding, Tidar

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES = HEADS | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def pair():
    """A world of this process and one that is not there: what they would exchange is not."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def compiled_sources(monkeypatch, layer: DecoderLayer, mask) -> list[str]:
    """The code that Inductor writes for the forward and the backward pass. Its kernels are not compiled, which would
    take long: they compute nothing here.
    """
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    model = nn.Module()
    model.layers, model.norm = nn.ModuleList([layer]), nn.Identity()
    x = torch.randn(1, 24 // layer.shard.size, 64, requires_grad=True)
    angles = [torch.randn(1, 1, 24, 16) for _ in range(2)]
    with torch._inductor.config.patch(reorder_for_compute_comm_overlap=False, pattern_matcher=False):
        apply_compile(model, has_collectives=True)
        _, sources = run_and_get_code(lambda: model.layers[0](x, *angles, mask).sum().backward())
    return [source.split("def call(")[1] for source in sources]


def meanwhile(source: str, collective: str) -> list[str]:
    """The code between the start of each such collective and the wait for it."""
    return re.findall(rf"{collective}.default\(.*?wait_tensor", source, re.DOTALL)


def test_work_of_a_compiled_layer_overlaps_its_collectives(monkeypatch, pair):
    config, kernels = decoder_config(size_config("qwen3-8b") | SIZES), Kernels(fused_backward=True)
    order = torch.arange(32)
    allowed = torch.ones(1, 1, 24, 40, dtype=torch.bool)
    mask = GatheredAttention(allowed, order[None], order[:, None], n_ranks=2, group=pair)
    forward, backward = compiled_sources(monkeypatch, DecoderLayer(config, kernels), mask)
    (rotation,) = meanwhile(forward, "all_gather_into_tensor")
    (gradients,) = meanwhile(backward, "reduce_scatter_tensor")
    assert "cpp_fused" in rotation and gradients.count("extern_kernels.mm") >= 3

    shard = TensorParallel(0, 2, pair)
    layer = DecoderLayer(shard.sizes(config), kernels, shard)
    _, backward = compiled_sources(monkeypatch, layer, torch.ones(1, 1, 24, 24, dtype=torch.bool))
    # gradients of the weights of the MLP, then of attention
    assert [part.count("extern_kernels.mm") for part in meanwhile(backward, "all_to_all_single")] == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_exchanges_have_the_gradients_of_eager_ones(dtype):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shard = TensorParallel(0, 1, dist.group.WORLD.group_name)
    x = torch.randn(1, 6, 8, dtype=dtype, requires_grad=True)

    def exchanged(x):
        return (shard.summed(shard.gathered(x) * 3) * x).sum()

    expected, found = (
        torch.autograd.grad(run(x), x) for run in (exchanged, torch.compile(exchanged, backend="aot_eager"))
    )
    dist.destroy_process_group()
    torch.testing.assert_close(found, expected)


def test_flex_attention_takes_the_masks_of_ranks(monkeypatch):
    """Forward, the only direction that it has on a CPU: more keys than queries, of lengths that no tile divides, give
    what the dense mask gives.
    """
    module = sys.modules["tidar.models.attention"]
    monkeypatch.setattr(module, "compiled", lambda function: function)
    pattern, ids = Tidar(5, 99), torch.cat([ids_of([60, 17, 83]), ids_of([160])])
    batch = pattern.layout(torch.zeros_like(ids), ids, torch.ones(ids.shape), [0, 1])
    sharding = RowSharding(pattern, "tidar", 160, 2)
    for rank in range(2):
        mask = pattern_mask(pattern, batch.documents, sharding.share(batch, rank).share)
        assert mask.n_queries % 128 and mask.n_queries < mask.n_keys == sharding.n_keys
        q = torch.randn(2, 4, mask.n_queries, 16)
        k, v = torch.randn(2, 2, 2, mask.n_keys, 16)
        found, expected = (backend(q, k, v, form) for form in (mask.block_mask(), mask.dense()))
        torch.testing.assert_close(found, expected)
