"""An engine from a folder: an exported model, any Qwen model, a step of a run, or a run."""

import json
from pathlib import Path

import torch

from tidar.config import UserError
from tidar.config.hub import local_folder
from tidar.decoding.engine import Engine, Method
from tidar.models import from_pretrained
from tidar.models.huggingface import assets_folder, read_config_json


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None, **options
) -> Engine:
    """The engine for a Hugging Face folder or hub id of any Qwen2, Qwen2.5 or Qwen3 model, or a checkpoint's step-<n>.

    dtype, device: by default bfloat16 on a GPU, float32 on the CPU. options: of `Engine`. Raises UserError as
    `from_pretrained` does, and for a config.json whose section `tidar` is not one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    folder = local_folder(path)
    assets = assets_folder(folder)
    config = read_config_json(assets)
    model = from_pretrained(str(folder), dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32), device)
    return Engine(
        model,
        read_method(config, str(assets / "config.json"), model.config.vocab_size),
        name=str(path),
        context=config.get("max_position_embeddings"),
        end_token_ids=end_token_ids(assets, config),
        **options,
    )


def read_method(config: dict, origin: str, vocab_size: int) -> Method | None:
    """The section `tidar` of a config.json, None if it has none. Raises UserError for one that is not whole.

    origin: names the file in messages.
    """
    section = config.get("tidar")
    if section is None:
        return None
    names = ("pattern", "block_size", "mask_token_id")
    pattern, block_size, mask_token_id = (section.get(name) if isinstance(section, dict) else None for name in names)
    if (
        isinstance(pattern, str)
        and type(block_size) is type(mask_token_id) is int
        and block_size >= 1
        and 0 <= mask_token_id < vocab_size
    ):
        return Method(pattern, block_size, mask_token_id)
    raise UserError(f"{origin}: tidar = {json.dumps(section)}: must hold pattern, block_size and mask_token_id")


def end_token_ids(folder: Path, config: dict) -> list[int]:
    """eos_token_id of generation_config.json, or else of config.json."""
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        generation = {}
    ends = generation.get("eos_token_id", config.get("eos_token_id")) if isinstance(generation, dict) else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
