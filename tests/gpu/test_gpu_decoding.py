"""Decoding on a GPU: its kernels against the dense mask, graphs against eager, and the CPU's tokens."""

import json
import random

import pytest
import torch
from gpu_helpers import CUDA, relative
from small_models import make_model
from torch import nn
from transformers import AutoModelForCausalLM

from tidar.decoding import Engine, Method, load
from tidar.decoding.layout import step_layout
from tidar.kernels.norm import RMSNorm
from tidar.kernels.rotary import inverse_frequencies, rotary, rotate, split_heads
from tidar.models import Decoder, DecoderConfig, FusedStepAttention, StepAttention, attention, initialize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_kernels_equal_the_dense_mask(qk_norm, dtype, rounding):
    """Attention of a step, and what it leaves in the cache: any lengths, batches, heads and sizes."""
    rng = random.Random(0)
    for _ in range(4):
        block, head_dim = rng.choice([1, 2, 5, 8, 16]), rng.choice([16, 64, 128] + [256] * (dtype != torch.float32))
        batch, n_kv_heads, group, capacity = (
            rng.randint(1, 4),
            rng.randint(1, 4),
            rng.randint(1, 7),
            rng.choice([64, 700]),
        )
        masks = rng.random() < 0.7
        lengths = torch.tensor(
            [rng.choice([0, capacity - block, rng.randrange(capacity - block)]) for _ in range(batch)]
        )
        layout = step_layout(lengths.to(CUDA), block, capacity, masks)
        queries = layout.slots.shape[1]
        shape = batch, n_kv_heads, layout.mask.n_keys, head_dim
        caches = [torch.randn(shape, device=CUDA).to(dtype) for _ in range(2)]
        heads = torch.randn(batch, queries, n_kv_heads * (group + 2), head_dim, device=CUDA).to(dtype)
        norms = [RMSNorm(head_dim, 1e-6).to(CUDA, dtype) if qk_norm else nn.Identity() for _ in range(2)]
        for norm in norms if qk_norm else ():
            norm.weight.data.normal_()
        cos, sin = (
            angles.to(dtype)
            for angles in rotary(layout.position_ids, inverse_frequencies(head_dim, 1e4, None, CUDA), None)
        )

        expected_caches = [cache.double() for cache in caches]
        q, k, v = split_heads(heads.double(), n_kv_heads)
        q, k = (rotate(norm.double()(part), cos.double(), sin.double()) for norm, part in zip(norms, (q, k)))
        expected = attention(q, k, v, StepAttention(*expected_caches, layout.slots, layout.mask.dense()))
        expected = expected.transpose(1, 2).flatten(2)

        (_, end), own = layout.mask.ranges
        norms = [norm.to(dtype) for norm in norms]
        found = FusedStepAttention(*caches, layout.slots, end, *own).attend(heads, tuple(norms), cos, sin)
        assert relative(found, expected) < rounding
        for cache, expected_cache in zip(caches, expected_caches):
            assert relative(cache, expected_cache) < rounding


def random_decoder(rng: random.Random, dtype: torch.dtype) -> Decoder:
    qwen3 = rng.random() < 0.5
    config = DecoderConfig(
        vocab_size=23, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, qkv_bias=not qwen3,
        o_bias=False, qk_norm=qwen3, tie_embeddings=rng.random() < 0.5, rope_theta=100.0, initializer_range=0.3,
    )  # fmt: skip
    model = Decoder(config).to(dtype).eval()
    initialize(model, rng.randrange(2**30))
    return model


@pytest.mark.parametrize("block_size", [2, 8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_and_eager_steps_choose_the_tokens_of_the_cpu(temperature, block_size):
    """In float32, in both modes and with lookup, more prompts than rows; of the groups all are projected, or one."""
    rng = random.Random(block_size)
    model = random_decoder(rng, torch.float32)
    prompts = [[rng.randrange(rng.choice([4, 22])) for _ in range(rng.randint(1, 40))] for _ in range(7)]
    for asked in (dict(), dict(lookup=2), dict(mode="ar")):
        outputs = []
        for device, graph, batch in (("cpu", False, 3), ("cuda", False, 4), ("cuda", True, 4), ("cuda", True, 7)):
            engine = Engine(model.to(device), Method("tidar", block_size, 22), max_batch_size=batch, graph=graph)
            found = engine.generate(prompts, 30, temperature=temperature, seed=1, **asked)
            outputs.append([(completion.tokens, completion.accepted) for completion in found])
        assert all(output == outputs[0] for output in outputs[1:])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bfloat16_follows_transformers_but_for_near_ties(tmp_path, family):
    """Each token is within 0.1 nats of the one that transformers prefers after the same tokens."""
    make_model(family, hidden_size=64).to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tidar"] = {"pattern": "tidar", "block_size": 4, "mask_token_id": 299}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to(CUDA).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(257) for _ in range(rng.randint(1, 60))] for _ in range(16)]
    for mode in ("ar", "tidar"):
        for prompt, found in zip(prompts, load(tmp_path).generate(prompts, 48, mode=mode)):
            ids = torch.tensor([prompt + found.tokens], device=CUDA)
            with torch.no_grad():
                logits = theirs(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            for row, token in zip(logits, found.tokens):
                margin = float(row.max() - row[token])
                assert margin < 0.1, f"{mode}: {margin:.3f} nats"
