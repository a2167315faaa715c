"""One decoder for the Qwen family, its sizes and first values, attention backends, Hugging Face weights in and out."""

from tidar.models.attention import Mask, attention, resolve_backend
from tidar.models.checkpoint_files import CheckpointReader, read_metadata
from tidar.models.config_json import decoder_config, read_config_json
from tidar.models.decoder import Decoder, DecoderConfig
from tidar.models.export import write_huggingface_folder
from tidar.models.float8 import check_float8, make_mlps_float8
from tidar.models.initialize import initialize
from tidar.models.kernels import Kernels, has_fast_products, multiprocessors
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
from tidar.models.spec import ASSETS, ModelSpec, read_model, recorded_model, resolve_model
from tidar.models.weights import (
    StepFolder,
    check_weights,
    fill_new_rows,
    from_pretrained,
    load_weights,
    open_weights,
)

__all__ = [
    "ASSETS",
    "CheckpointReader",
    "Decoder",
    "DecoderConfig",
    "Kernels",
    "StepFolder",
    "TILE",
    "Mask",
    "MaskBuilder",
    "ModelSpec",
    "attention",
    "block_mask_of_points",
    "block_mask_of_ranges",
    "build_block_mask",
    "check_float8",
    "check_weights",
    "count_pairs",
    "count_tiles",
    "decoder_config",
    "fill_new_rows",
    "from_pretrained",
    "has_fast_products",
    "initialize",
    "load_weights",
    "make_mlps_float8",
    "mask_of_words",
    "multiprocessors",
    "open_weights",
    "read_config_json",
    "read_metadata",
    "read_model",
    "recorded_model",
    "resolve_backend",
    "resolve_model",
    "size_config",
    "tile_counts",
    "write_huggingface_folder",
]
