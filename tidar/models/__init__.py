"""One decoder for the Qwen family, its sizes and first values, attention backends, block masks, FLOPs."""

from tidar.models.attention import (
    CachedAttention,
    FusedStepAttention,
    Mask,
    PrefillAttention,
    StepAttention,
    attention,
)
from tidar.models.decoder import Decoder, DecoderConfig
from tidar.models.huggingface.weights import from_pretrained
from tidar.models.initialize import initialize
from tidar.models.masks import (
    BatchMask,
    MaskBuilder,
    PointMask,
    RangeMask,
    count_pairs,
    make_mask,
    mask_of_words,
    pattern_mask,
)
from tidar.models.shards import WHOLE, TensorShard, local_blocks, local_rows
from tidar.models.sizes import size_config

__all__ = [
    "CachedAttention",
    "FusedStepAttention",
    "PrefillAttention",
    "StepAttention",
    "Decoder",
    "DecoderConfig",
    "TensorShard",
    "WHOLE",
    "BatchMask",
    "Mask",
    "MaskBuilder",
    "PointMask",
    "RangeMask",
    "attention",
    "count_pairs",
    "from_pretrained",
    "initialize",
    "local_blocks",
    "local_rows",
    "make_mask",
    "mask_of_words",
    "pattern_mask",
    "size_config",
]
