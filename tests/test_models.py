import itertools

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tidar.models import Decoder, DecoderConfig, initialize


@pytest.mark.parametrize("family, tie_embeddings", list(itertools.product(["qwen2", "qwen3"], [True, False])))
def test_logits_and_gradients_are_those_of_transformers(family, tie_embeddings):
    """Causal, with position ids that start again, on the published implementation of both families."""
    config = DecoderConfig(
        vocab_size=90,
        dim=48,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=24 if family == "qwen3" else 12,
        hidden_dim=80,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=tie_embeddings,
        initializer_range=0.2,
    )
    model = Decoder(config)
    initialize(model, seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, -1, 1)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[
        family
    ]
    published = model_class(
        config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.hidden_dim,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            **({"head_dim": config.head_dim} if family == "qwen3" else {}),
        )
    )
    names = {name: name if name == "lm_head.weight" else f"model.{name}" for name, _ in model.named_parameters()}
    missing, unexpected = published.load_state_dict(
        {names[name]: parameter.detach() for name, parameter in model.named_parameters()}, strict=False
    )
    assert not unexpected and missing == (["lm_head.weight"] if tie_embeddings else [])

    tokens = torch.randint(0, config.vocab_size, (2, 40))
    position_ids = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    published_logits = published(
        tokens, position_ids=position_ids, attention_mask=torch.ones(2, 1, 40, 40).tril().bool()
    )
    logits = model(tokens, position_ids)
    direction = torch.randn_like(logits)
    (published_logits.logits * direction).sum().backward()
    (logits * direction).sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    expected = {name: parameter.grad for name, parameter in published.named_parameters()}
    expected = torch.cat([expected[names[name]].flatten() for name, _ in model.named_parameters()])
    assert (logits - published_logits.logits).norm() <= 1e-5 * logits.norm()
    assert (gradients - expected).norm() <= 1e-5 * expected.norm()


def test_first_values_depend_on_seed_and_name_alone():
    def values(n_layers: int, seed: int) -> dict[str, torch.Tensor]:
        config = DecoderConfig(30, 16, n_layers, 2, 1, 8, 24, qkv_bias=True, qk_norm=True, tie_embeddings=False)
        model = Decoder(config)
        torch.rand(3)  # what was drawn before does not matter
        initialize(model, seed)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    deep, shallow, other = values(4, seed=0), values(2, seed=0), values(2, seed=1)
    assert all(deep[name].equal(value) for name, value in shallow.items())
    matrices = [name for name, value in shallow.items() if value.ndim == 2]
    assert not any(other[name].equal(shallow[name]) for name in matrices)
    assert len({shallow[name].flatten()[0].item() for name in matrices}) == len(matrices)
    assert all(value.eq(0 if name.endswith("bias") else 1).all() for name, value in shallow.items() if value.ndim == 1)
