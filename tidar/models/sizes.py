"""Sizes of the decoder by name."""

from tidar.config import UserError
from tidar.models.decoder import DecoderConfig

SIZES: dict[str, dict] = {
    # Qwen3's form, small enough to learn something on two CPU cores in minutes
    "debug": dict(
        dim=192, n_layers=4, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=512,
        qkv_bias=False, qk_norm=True, tie_embeddings=True,
    ),
}  # fmt: skip


def decoder_config(name: str, vocab_size: int) -> DecoderConfig:
    """Raises UserError for an unknown name."""
    if name not in SIZES:
        raise UserError(f"model.name = {name}: must be one of {', '.join(SIZES)}")
    return DecoderConfig(vocab_size=vocab_size, **SIZES[name])
