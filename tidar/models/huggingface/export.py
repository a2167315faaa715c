"""Exports weights as a Hugging Face folder."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar.config import UserError
from tidar.models.huggingface.card import model_card
from tidar.models.huggingface.config_json import DTYPE_NAMES, with_old_and_new_names
from tidar.patterns import DECODABLE

MAX_SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 2**20  # upper bound of a file's header
GENERATE = Path(__file__).with_name("custom_generate.py")
SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_huggingface_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Iterable[Tensor]],
    write_assets: Callable[[Path], object],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    step: int | None = None,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Writes an exported model to `folder`, which must be empty or not exist. Files get their final names once whole.

    shapes: of the tensors by Hugging Face's names. read: the rows of a tensor, in one piece or several, of which one at
    a time is held. write_assets: makes a folder with config.json, generation_config.json and the tokenizer. step: of
    the run; figures: what its validation has measured then. A model that TiDAR has trained gets a card, README.md, and,
    where the pattern is one of DECODABLE, custom_generate/generate.py. Raises OSError if it cannot be written, and
    UserError for a value that `dtype` cannot hold.
    """
    folder = folder.resolve()
    into = folder if folder.exists() else folder.parent
    into.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=into))
    try:
        written = partial / "model"
        write_assets(written)
        config = json.loads((written / "config.json").read_text(encoding="utf-8"))
        config = with_old_and_new_names(config | dict.fromkeys(DTYPE_NAMES, str(dtype).removeprefix("torch.")))
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        pattern = config.get("tidar", {}).get("pattern")
        if pattern:
            has_tokenizer = any(written.glob("tokenizer*.json"))
            card = model_card(config, pattern in DECODABLE, has_tokenizer, step, figures or {})
            (written / "README.md").write_text(card, encoding="utf-8")
        if pattern in DECODABLE:
            (written / "custom_generate").mkdir()
            shutil.copyfile(GENERATE, written / "custom_generate" / "generate.py")
        files = _divide(shapes, dtype, max_shard_bytes)
        for file, names in files.items():
            _write_safetensors(written / file, {name: shapes[name] for name in names}, dtype, read)
        index = {
            "metadata": {"total_size": sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        path = written / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            # config.json last: a folder without it is not taken for a model
            for path in sorted(written.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
        else:
            os.replace(written, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def without_generate(pattern: str) -> str:
    """A note for an export whose pattern custom_generate/generate.py does not decode; empty for others."""
    if pattern in DECODABLE:
        return ""
    return f", for plain decoding only: there is no custom_generate/generate.py for pattern {pattern}"


def _divide(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors by file, in order, so that a file of more than one tensor stays within `max_shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = HEADER_BYTES
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = HEADER_BYTES
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, start=1)}


def _write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Iterable[Tensor]]
) -> None:
    """Writes the length of the header, the header and the tensors. The library would need all tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for rows in read(name):
                converted = rows.to(dtype).contiguous()
                if dtype == torch.float16 and not converted.isfinite().equal(rows.isfinite()):
                    raise UserError(f"{name}: has values that float16 cannot hold; export bfloat16")
                file.write(converted.flatten().view(torch.uint8).numpy().data)
