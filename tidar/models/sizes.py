"""Model sizes by name: the config.json of the published models."""

from typing import Any

from tidar.config import UserError

# number of ids of the published tokenizers: the first free one
TOKENIZER_SIZES = {"qwen2": 151665, "qwen3": 151669}


def _qwen2_5(dim, layers, heads, kv_heads, hidden, vocab_size, tied, eps, max_positions) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "tie_word_embeddings": tied,
        "rms_norm_eps": eps,
        "max_position_embeddings": max_positions,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }


def _qwen3(dim, layers, heads, hidden, tied) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": hidden,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }


SIZES: dict[str, dict[str, Any]] = {
    # Qwen3's architecture, small enough to learn on two CPU cores within minutes; its vocabulary is the data's
    "debug": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    # 88 M parameters with a vocabulary of 16,384: that of the data, too
    "qwen3-90m": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 2048,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "qwen2.5-0.5b": _qwen2_5(896, 24, 14, 2, 4864, 151936, True, 1e-6, 32768),
    "qwen2.5-1.5b": _qwen2_5(1536, 28, 12, 2, 8960, 151936, True, 1e-6, 131072),
    "qwen2.5-3b": _qwen2_5(2048, 36, 16, 2, 11008, 151936, True, 1e-6, 32768),
    "qwen2.5-7b": _qwen2_5(3584, 28, 28, 4, 18944, 152064, False, 1e-6, 131072),
    "qwen2.5-14b": _qwen2_5(5120, 48, 40, 8, 13824, 152064, False, 1e-5, 131072),
    "qwen2.5-32b": _qwen2_5(5120, 64, 40, 8, 27648, 152064, False, 1e-5, 131072),
    "qwen2.5-72b": _qwen2_5(8192, 80, 64, 8, 29568, 152064, False, 1e-5, 131072),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, False),
}


def size_config(name: str) -> dict[str, Any]:
    """The config.json of a size. Raises UserError for an unknown name."""
    if name not in SIZES:
        raise UserError(f"model.name = {name}: must be one of {', '.join(SIZES)}")
    return dict(SIZES[name])
