"""Small models and tokenizers in Hugging Face's form, written as the published ones are."""

import json
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

CLASSES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_model(family: str, seed: int = 0, **options) -> PreTrainedModel:
    """A random one whose every parameter matters: norms and biases are random too."""
    config_class, model_class = CLASSES[family]
    shape = dict(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=8192,
    )
    if family == "qwen3":
        shape["head_dim"] = 16
    torch.manual_seed(seed)
    model = model_class(config_class(**(shape | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer of Qwen's class, with its special tokens; returns its number of ids."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the")]
    tokens = alphabet + ["".join(merge) for merge in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    special = {str(len(tokens) + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": special,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(tokens) + len(special)


def published_tensors(tensors: dict[str, torch.Tensor], n_heads: int, n_kv_heads: int) -> dict[str, torch.Tensor]:
    """Tensors by the names of the decoder's parameters as Hugging Face's, fused ones split: one row at a time."""
    found, rows = {}, {}
    for name, tensor in tensors.items():
        name = name if name == "lm_head.weight" else f"model.{name}"
        if "qkv_proj" not in name and "gate_up_proj" not in name:
            found[name] = tensor
            continue
        head_dim, group = len(tensor) // (n_heads + 2 * n_kv_heads), n_heads // n_kv_heads + 2
        for number, row in enumerate(tensor):
            if "qkv_proj" in name:
                kind = {group - 2: "k_proj", group - 1: "v_proj"}.get(number // head_dim % group, "q_proj")
            else:
                kind = "gate_proj" if number < len(tensor) // 2 else "up_proj"
            rows.setdefault(name.replace("qkv_proj", kind).replace("gate_up_proj", kind), []).append(row)
    return found | {name: torch.stack(those) for name, those in rows.items()}
