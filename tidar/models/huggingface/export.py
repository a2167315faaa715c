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
from tidar.models.huggingface.config_json import DTYPE_NAMES, with_old_and_new_names

MAX_SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 2**20  # upper bound of a file's header
SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_huggingface_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Iterable[Tensor]],
    write_assets: Callable[[Path], object],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes an exported model to `folder`, which must be empty or not exist. Files get their final names once whole.

    shapes: of the tensors by Hugging Face's names. read: the rows of a tensor, in one piece or several, of which one at
    a time is held. write_assets: makes a folder with everything but the weights. Raises OSError if it cannot be
    written, and UserError for a value that `dtype` cannot hold.
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
