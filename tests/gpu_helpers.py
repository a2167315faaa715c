"""What tests of kernels on a GPU share."""

import json
from pathlib import Path

import pytest
import torch

from tidar.config import load_config
from tidar.kernels import Sizes, choose_kernels
from tidar.models import size_config

CUDA = torch.device("cuda")
# what a run here uses for sizes that all kernels can compute
KERNELS = choose_kernels(
    load_config([]), CUDA if torch.cuda.is_available() else torch.device("cpu"), torch.bfloat16, Sizes(64, 64, 128, 64)
)
needs_quack = pytest.mark.skipif(
    not KERNELS.loss_without_logits,
    reason="quack is not installed, or this is no Hopper GPU",
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def options_with_heads_of_128(folder: Path, vocab: int = 384) -> str:
    """Of 50 steps of a small model whose attention FlashAttention-4 can do."""
    family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    heads = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(size_config("debug") | family | heads))
    return (
        f"--model.hf_path {folder} --training.seq_len 512 --training.local_batch_size 4 --training.steps 50 "
        "--optimizer.lr 3e-4 --validation.enable false --checkpoint.enable false"
    )
