"""Useful floating-point operations, and the peak rates of devices."""

import torch

from tidar.models import DecoderConfig
from tidar.patterns import ModelBatch

# per layer, allowed query-key pair and query dimension: 4 forward, 8 backward
ATTENTION_FLOPS = 12
# dense bf16 FLOP/s by datasheet, by the first words of the device's name
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
}


def useful_flops(config: DecoderConfig, positions: int, scored: int, allowed_pairs: int) -> float:
    """FLOPs of forward and backward for `positions` model positions, of which `scored` are projected to logits.

    6 per matrix weight of the layers and position, 6 * vocab * dim per scored position, and `attention_flops`.
    Embedding look-ups and recomputation are not counted.
    """
    return (
        6 * config.n_layers * layer_weights(config) * positions
        + attention_flops(config, allowed_pairs)
        + 6 * config.vocab_size * config.dim * scored
    )


def layer_weights(config: DecoderConfig) -> int:
    """Elements of the matrices of a layer."""
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    return config.dim * heads + 3 * config.dim * config.hidden_dim


def attention_flops(config: DecoderConfig, allowed_pairs: int) -> float:
    """FLOPs of forward and backward of attention."""
    return ATTENTION_FLOPS * config.n_layers * allowed_pairs * config.n_heads * config.head_dim


def batch_flops(config: DecoderConfig, rows: ModelBatch, allowed_pairs: int) -> float:
    """Useful FLOPs, forward and backward, of rows. allowed_pairs: query-key pairs of their mask, in all rows."""
    scored = sum(len(targets.labels) for targets in rows.targets.values())
    return useful_flops(config, rows.n_positions, scored, allowed_pairs)


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s by datasheet; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for start, flops in PEAK_FLOPS.items() if name.startswith(start)), None)
