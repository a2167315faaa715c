"""Models in Hugging Face's form: config.json, weights in and out, export."""

from tidar.models.huggingface.checkpoint_files import CheckpointReader, read_metadata
from tidar.models.huggingface.config_json import decoder_config, read_config_json
from tidar.models.huggingface.export import without_generate, write_huggingface_folder
from tidar.models.huggingface.layout import published_ranges, published_shapes
from tidar.models.huggingface.spec import (
    ASSETS,
    ModelSpec,
    assets_folder,
    model_differences,
    read_model,
    recorded_model,
    resolve_model,
)
from tidar.models.huggingface.weights import (
    StepFolder,
    Weights,
    check_weights,
    fill_new_rows,
    load_weights,
    open_model,
    open_weights,
)

__all__ = [
    "ASSETS",
    "assets_folder",
    "CheckpointReader",
    "ModelSpec",
    "StepFolder",
    "Weights",
    "check_weights",
    "decoder_config",
    "fill_new_rows",
    "load_weights",
    "model_differences",
    "open_model",
    "open_weights",
    "published_ranges",
    "published_shapes",
    "read_config_json",
    "read_metadata",
    "read_model",
    "recorded_model",
    "resolve_model",
    "without_generate",
    "write_huggingface_folder",
]
