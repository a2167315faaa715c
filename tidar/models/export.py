"""Weights out: a folder that everything reads that reads Hugging Face's models."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tidar.models.weights import published_name

MAX_SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 2**20  # more than the header of a file ever takes
SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_huggingface_folder(
    folder: Path,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    write_assets: Callable[[Path], None],
    writes: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes an exported model: beside `folder` first, which it replaces when it is whole.

    shapes: of the decoder's parameters by name. read: the whole tensor of a name; it is asked for one at a time, and
    no more than one is held. write_assets: makes the folder with all but the weights. writes: false on ranks that take
    part only because `read` needs all of them.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if writes:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        write_assets(partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    try:
        files = _divide(shapes, dtype, max_shard_bytes)
        for file, names in files.items():
            _write_safetensors(partial / file if writes else None, {name: shapes[name] for name in names}, dtype, read)
        if writes:
            index = {
                "metadata": {"total_size": sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize},
                "weight_map": {published_name(name): file for file, names in files.items() for name in names},
            }
            path = partial / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
    except BaseException:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _divide(shapes: dict[str, torch.Size], dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[str]]:
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
    path: Path | None, shapes: dict[str, torch.Size], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """One file: the length of its header, the header, the tensors. The library wants them all in memory at one time."""
    if path is None:
        for name in shapes:
            read(name)
        return
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[published_name(name)] = {
            "dtype": SAFETENSORS_TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = read(name).to(dtype).contiguous()
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))
