"""One decoder for the Qwen family, its sizes and first values, attention backends, block masks, FLOPs."""

from tidar.models.attention import Mask, attention, resolve_backend
from tidar.models.decoder import Decoder, DecoderConfig
from tidar.models.huggingface.weights import from_pretrained
from tidar.models.initialize import initialize
from tidar.models.masks import (
    TILE,
    MaskBuilder,
    block_mask_of_points,
    block_mask_of_ranges,
    build_block_mask,
    count_pairs,
    count_tiles,
    mask_of_words,
    tile_counts,
)
from tidar.models.sizes import size_config

__all__ = [
    "Decoder",
    "DecoderConfig",
    "TILE",
    "Mask",
    "MaskBuilder",
    "attention",
    "block_mask_of_points",
    "block_mask_of_ranges",
    "build_block_mask",
    "count_pairs",
    "count_tiles",
    "from_pretrained",
    "initialize",
    "mask_of_words",
    "resolve_backend",
    "size_config",
    "tile_counts",
]
