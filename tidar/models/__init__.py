"""One decoder for the Qwen family, its sizes and first values, and the attention backends."""

from tidar.models.attention import Mask, MaskBuilder, attention, resolve_backend
from tidar.models.decoder import Decoder, DecoderConfig
from tidar.models.initialize import initialize
from tidar.models.sizes import decoder_config

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Mask",
    "MaskBuilder",
    "attention",
    "decoder_config",
    "initialize",
    "resolve_backend",
]
