import random
import statistics

import pytest
import torch
from small_models import make_model, published_tensors

from tidar.config import UserError, derive_seed
from tidar.config.options import ActivationCheckpoint
from tidar.distributed.parallelize import apply_activation_checkpointing
from tidar.kernels import Kernels
from tidar.kernels.counter_random import mix, normals
from tidar.kernels.norm_rotary import heads_backward, norm_backward
from tidar.models import Decoder, DecoderConfig, from_pretrained, initialize, size_config
from tidar.models.huggingface import decoder_config
from tidar.training.compile_ahead import RecordedCalls, Work, layer_calls

# of the published checkpoints; an output weight that is tied to the embedding counts once
PUBLISHED_PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = Decoder(decoder_config(size_config(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


def random_options(rng: random.Random) -> tuple[str, dict]:
    """Family and shape of a small model, of any kind that config.json can describe."""
    family = rng.choice(["qwen2", "qwen3"])
    n_kv_heads = rng.choice([1, 2, 4])
    n_heads = n_kv_heads * rng.choice([1, 2, 3])
    head_dim = rng.choice([8, 16, 24, 32])
    rope = {"rope_type": rng.choice(["default", "linear", "yarn"]), "rope_theta": rng.choice([1e4, 1e6])}
    if rope["rope_type"] != "default":
        rope["factor"] = rng.choice([2.0, 4.0, 8.5])
    if rope["rope_type"] == "yarn" and rng.random() < 0.7:
        rope |= rng.choice(
            [
                {"original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2},
                {"original_max_position_embeddings": 512, "attention_factor": 1.3, "truncate": False},
                {"original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.2},
            ]
        )
    options = {
        "vocab_size": rng.randint(50, 300),
        "hidden_size": n_heads * head_dim if rng.random() < 0.3 else rng.choice([40, 56, 72]),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": rng.randint(20, 100),
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "rope_parameters": rope,
    }
    if family == "qwen3":
        options["attention_bias"] = rng.random() < 0.5
    return family, options


@pytest.mark.parametrize("case", range(12))
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_and_gradients_are_those_of_transformers(case, dtype, bound, tmp_path):
    """Causal, on the published implementation of both families, as it saves them; positions start again."""
    rng = random.Random(case)
    family, options = random_options(rng)
    published = make_model(family, seed=case, **options).to(dtype)
    published.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, dtype=dtype)

    rows, length, first = (1, 4200, 0) if case == 0 else (2, 60, 4080)
    tokens = torch.randint(0, options["vocab_size"], (rows, length))
    position_ids = torch.cat([torch.arange(20), first + torch.arange(length - 20)]).expand(rows, -1)
    causal = torch.ones(rows, 1, length, length).tril().bool()
    expected = published(tokens, position_ids=position_ids, attention_mask=causal).logits
    logits = model(tokens, position_ids)
    direction = torch.randn_like(logits)
    (expected * direction).sum().backward()
    (logits * direction).sum().backward()
    assert (logits - expected).norm() <= bound * expected.norm()
    theirs = {name: parameter.grad for name, parameter in published.named_parameters()}
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = published_tensors(ours, options["num_attention_heads"], options["num_key_value_heads"])
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert difference.norm() <= bound * torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 90,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 4096,
}
REFUSED_OPTIONS = {
    "another architecture": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "Qwen2ForCausalLM (qwen2)",
    ),
    "experts": ({"model_type": "qwen3_moe"}, "model_type = qwen3_moe"),
    "another head": ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    "a missing shape": ({"hidden_size": None}, "hidden_size is missing"),
    "a text for a number": ({"vocab_size": "90"}, 'vocab_size = "90": must be an integer >= 1'),
    "uneven groups": ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "sliding windows": (
        {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2},
        "use_sliding_window = true: layers from 2 on",
    ),
    "a sliding layer": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "sliding_attention",
    ),
    "dynamic scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "supported are default, linear and yarn"),
    "llama's scaling": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8}}, "llama3"),
    "rotary by layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of parameters"),
    "part of the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
}


@pytest.mark.parametrize("change, message", REFUSED_OPTIONS.values(), ids=list(REFUSED_OPTIONS))
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(UserError) as error:
        decoder_config(QWEN3 | change, "here/config.json")
    assert message in str(error.value) and str(error.value).startswith("here/config.json")
    assert "\n" not in str(error.value)


def test_options_without_effect_are_accepted():
    windows = {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 3}
    old_form = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "use_sliding_window": False}
    new_form = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}
    assert decoder_config(QWEN3 | windows) == decoder_config(QWEN3)
    assert decoder_config(QWEN3 | old_form) == decoder_config(QWEN3 | new_form)
    assert decoder_config(QWEN3 | new_form).rope_scaling.original_max_position_embeddings == 4096


def test_first_values_depend_on_seed_and_name_alone():
    def values(n_layers: int, seed: int) -> dict[str, torch.Tensor]:
        config = DecoderConfig(
            30, 16, n_layers, 2, 1, 8, 24, qkv_bias=True, o_bias=False, qk_norm=True, tie_embeddings=False
        )
        model = Decoder(config)
        torch.rand(3)  # what was drawn before does not matter
        initialize(model, seed)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    deep, shallow, other = values(4, seed=0), values(2, seed=0), values(2, seed=1)
    assert all(deep[name].equal(value) for name, value in shallow.items())
    # seeded by the names of Hugging Face's base model
    q, k, v, *_ = shallow["layers.1.self_attn.qkv_proj.weight"].split([16, 8, 8])
    gate, up = shallow["layers.0.mlp.gate_up_proj.weight"].chunk(2)
    named = {"1.self_attn.q_proj": q, "1.self_attn.k_proj": k, "1.self_attn.v_proj": v, "0.mlp.gate_proj": gate}
    for name, value in (named | {"0.mlp.up_proj": up}).items():
        key = mix(derive_seed(0, f"layers.{name}.weight"))
        assert value.flatten()[:20].tolist() == pytest.approx([0.02 * normal(key, i) for i in range(20)], rel=1e-5)
    matrices = [name for name, value in shallow.items() if value.ndim == 2]
    assert not any(other[name].equal(shallow[name]) for name in matrices)
    assert len({shallow[name].flatten()[0].item() for name in matrices}) == len(matrices)
    assert all(value.eq(0 if name.endswith("bias") else 1).all() for name, value in shallow.items() if value.ndim == 1)


def normal(key: int, counter: int) -> float:
    """Quantile of splitmix64's bits, of 65,536 cells, interpolated: not in the outermost two, nor of variance 1."""
    state = (key + counter * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % 2**64
    state ^= state >> 31
    cell, within = state % 2**16, (state >> 16) % 2**24 / 2**24
    lower, upper = (statistics.NormalDist().inv_cdf((cell + n) / 2**16) for n in (0, 1))
    return lower + within * (upper - lower)


def test_normal_numbers_are_normal():
    n = 2**20
    values, _ = normals(3, torch.arange(n)).double().sort()
    assert abs(values.mean()) < 4 / n**0.5 and abs(values.var() - 1) < 4 * (2 / n) ** 0.5
    distance = (torch.special.ndtr(values) - torch.arange(n) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov and Smirnov, one in a thousand
    lags = [(normals(3, torch.arange(n)) * normals(3, torch.arange(n) + lag)).mean().abs() for lag in (1, 7, 1024)]
    assert max(lags) < 4 / n**0.5
    assert abs((normals(3, torch.arange(n)) * normals(4, torch.arange(n))).mean()) < 4 / n**0.5


def test_fused_matmuls_compute_as_plain_ones():
    """The plain path (tests/gpu compares the kernels): the model and all its gradients, in float64."""
    outputs = []
    for fused in (False, True):
        config = decoder_config(size_config("debug") | {"vocab_size": 258})
        model = Decoder(config, Kernels(fused_matmul=fused))
        initialize(model, seed=0)
        logits = model.double()(torch.arange(40).view(2, 20))
        logits.square().sum().backward()
        outputs.append([logits, *(parameter.grad for parameter in model.parameters())])
    for plain, other in zip(*outputs):
        assert (plain - other).norm() <= 1e-12 * plain.norm()


@pytest.mark.parametrize("family, float8", [("qwen2", False), ("qwen3", False), ("qwen3", True)])
def test_what_is_compiled_ahead_is_what_a_layer_calls(family, float8):
    """Operators of matmuls, with shapes and strides, of a layer's forward and backward pass with all that is fused."""
    config = decoder_config(make_model(family).config.to_dict())
    kernels = Kernels(fused_matmul=True, float8=float8)
    work = Work(config, torch.float32, 40, 8, kernels, num_sms=132, capability=(9, 0))
    model = Decoder(config, Kernels(fused_matmul=True, fused_backward=True, float8=float8))
    initialize(model, seed=0)
    x, angles = torch.randn(2, 20, config.dim, requires_grad=True), torch.randn(2, 1, 20, config.head_dim)
    with RecordedCalls() as recorded:
        model.layers[0](x, angles, angles, None).sin().sum().backward()

    def layouts(calls):
        tensors = [(name, filter(torch.is_tensor, arguments)) for name, arguments in calls]
        return [(name, [(one.dtype, one.shape, one.stride()) for one in those]) for name, those in tensors]

    forward, backward = layer_calls(work)
    # two GEMMs of attention, and two of the MLP that are not in FP8; twice as many backward
    assert (len(forward), len(backward)) == ((2, 4) if float8 else (4, 8))
    assert layouts(recorded.calls) == layouts(forward + backward)


@pytest.mark.parametrize(
    "mode, float8, recomputed",
    [("full", False, 4), ("full", True, 2), ("selective", False, 0), ("selective", True, 0)],
)
def test_selective_checkpointing_saves_fused_matmuls(mode, float8, recomputed):
    """Eager: gradients are those without checkpointing, and the forward pass's matmuls run once, or twice in `full`."""
    config = decoder_config(size_config("debug") | {"vocab_size": 258, "num_hidden_layers": 1})
    models = [Decoder(config, Kernels(fused_matmul=True, float8=float8)) for _ in range(2)]
    apply_activation_checkpointing(models[1], ActivationCheckpoint(mode=mode))
    gradients, counts = [], []
    for model in models:
        initialize(model, seed=0)
        loss = model(torch.arange(40).view(2, 20)).square().sum()
        with RecordedCalls() as recorded:
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        counts.append(len(recorded.calls))
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))
    assert counts[1] - counts[0] == recomputed


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_fused_backward_computes_as_the_plain_one(family, tmp_path):
    """Eager and compiled: logits, and the gradients of all parameters."""
    make_model(family).save_pretrained(tmp_path)
    plain = from_pretrained(tmp_path)
    fused = Decoder(plain.config, Kernels(fused_backward=True))
    fused.load_state_dict(plain.state_dict())
    tokens, weights = torch.randint(0, 300, (2, 21)), torch.randn(2, 21, 300)
    expected = logits_and_gradients(plain, tokens, weights)
    names = operations(fused(tokens))
    assert "NormWithResidualBackward" in names and ("RotatedHeadsBackward" in names) == (family == "qwen2")
    for pair in zip(logits_and_gradients(fused, tokens, weights), expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    for layer in fused.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for pair in zip(logits_and_gradients(fused, tokens, weights), expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def operations(result: torch.Tensor) -> set[str]:
    """Names of all that leads to it."""
    left, found = [result.grad_fn], set()
    while left:
        node = left.pop()
        if node and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return {node.name() for node in found}


def test_backward_operators_are_what_they_say_to_compilers():
    x, d_out = torch.randn(3, 12, 5).mT, torch.randn(3, 5, 12)
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.library.opcheck(norm_backward, (d_out, d_out, x, torch.rand(12), scale))
    q, k = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 2, 5, 8)
    torch.library.opcheck(heads_backward, (q, k, k, torch.rand(1, 1, 5, 8), torch.rand(1, 1, 5, 8)))


def logits_and_gradients(model, tokens, weights):
    logits = model(tokens)
    return logits.detach(), *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
