"""Distributed checkpoints read as files: metadata without executing its pickle, and single rows of tensors."""

import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tidar import __version__
from tidar.config import UserError, first_line
from tidar.config.files import open_regular

METADATA = ".metadata"

# the classes in DCP's metadata of tensors; not those of byte items, which DCP unpickles without a check
_CHECKPOINT = "torch.distributed.checkpoint"
ADMITTED = {
    f"{_CHECKPOINT}.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


def _enum_member(kind: Any, name: str) -> Any:
    """Replaces getattr, with which some versions of Python pickle the member of an enum."""
    if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError(f"{name} is no memory format")
    return kind[name]


def _path(*parts: str) -> Path:
    return Path(*parts)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module.startswith("pathlib") and name in ADMITTED.get(module, ()):
            return _path  # a class could be given attributes
        if name in ADMITTED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


def parse_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint's folder. Executes nothing that the pickle names. Admits tensors only, whose chunks
    lie inside them and in files of the folder.

    Raises OSError where it cannot be read, and ValueError where it is anything else.
    """
    try:
        with open_regular(folder / METADATA) as file:
            metadata = _Unpickler(file).load()
        if not _describes_tensors(metadata):
            raise pickle.UnpicklingError("it does not describe tensors")
    except OSError:
        raise
    except Exception as error:  # damaged or malicious bytes may raise anything
        reason = first_line(error)
        raise ValueError(f"is not the metadata of a checkpoint ({reason})") from None
    return metadata


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint's folder, as `parse_metadata`.

    Raises UserError where it cannot be read, and for a checkpoint of tidar 0.1, whose parameters were not fused.
    """
    path = folder / METADATA
    try:
        metadata = parse_metadata(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if any(name.endswith("self_attn.q_proj.weight") for name in metadata.state_dict_metadata):
        raise UserError(
            f"{folder}: was saved by tidar 0.1, whose checkpoints hold q_proj, k_proj and v_proj; tidar {__version__} "
            "reads qkv_proj: export it with tidar 0.1, and start from the exported folder (model.hf_path)"
        )
    return metadata


def _describes_tensors(metadata: Any) -> bool:
    """Whether all of it has the types and ranges that DCP writes: what was unpickled may hold anything anywhere."""
    if type(metadata) is not Metadata or not all(
        type(value) is dict for value in (metadata.state_dict_metadata, metadata.storage_data)
    ):
        return False
    stored = metadata.storage_data
    for index, info in stored.items():
        if type(index) is not MetadataIndex or type(info) is not _StorageInfo:
            return False
        name = info.relative_path
        if type(name) is not str or name in ("", ".", "..") or "/" in name or "\0" in name:
            return False
        if not _are_sizes((info.offset, info.length)) or getattr(info, "transform_descriptors", None):
            return False
    for name, saved in metadata.state_dict_metadata.items():
        if type(name) is not str or type(saved) is not TensorStorageMetadata or type(saved.chunks) is not list:
            return False
        if type(saved.properties) is not TensorProperties or type(saved.properties.dtype) is not torch.dtype:
            return False
        if type(saved.size) is not torch.Size or not _are_sizes(saved.size):
            return False
        for chunk in saved.chunks:
            if type(chunk) is not ChunkStorageMetadata:
                return False
            for part in (chunk.offsets, chunk.sizes):
                if type(part) is not torch.Size or len(part) != len(saved.size) or not _are_sizes(part):
                    return False
            if any(offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, saved.size)):
                return False
            if MetadataIndex(name, chunk.offsets) not in stored:
                return False
    return True


def _are_sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader of a folder, its metadata read by `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointTensors:
    """The tensors of a checkpoint's folder by name. Reads only the rows that are asked for."""

    def __init__(self, folder: Path):
        """Raises UserError where the folder cannot be read."""
        self.path = folder
        self.metadata: Any = read_metadata(folder)
        saved: dict[str, Any] = self.metadata.state_dict_metadata
        self.shapes = {name: tuple(value.size) for name, value in saved.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor. Raises UserError for a file that is missing or damaged."""
        saved = self.metadata.state_dict_metadata[name]
        rows = torch.empty((stop - start, *saved.size[1:]), dtype=saved.properties.dtype)
        filled = 0
        for number, chunk in enumerate(saved.chunks):
            first, length = chunk.offsets[0], chunk.sizes[0]
            begin, end = max(start, first), min(stop, first + length)
            if begin >= end:
                continue
            info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets, number)]
            path = self.path / info.relative_path
            wanted = rows[begin - start : end - start]
            if len(saved.size) > 1:
                wanted = wanted.narrow(1, chunk.offsets[1], chunk.sizes[1])
            found = (
                wanted if wanted.is_contiguous() else torch.empty_like(wanted, memory_format=torch.contiguous_format)
            )
            row_bytes = found[0].nbytes
            into: Any = found.flatten().view(torch.uint8).numpy()
            try:
                file: Any
                with open_regular(path) as file:
                    values = _tensor_start(file, info.offset, info.length, length * row_bytes)
                    file.seek(values + (begin - first) * row_bytes)
                    if file.readinto(into) != len(into):
                        raise ValueError("it ends too early")
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: {name} cannot be read from it ({error})") from None
            if found is not wanted:
                wanted.copy_(found)
            filled += found.numel()
        if filled != rows.numel():
            raise UserError(f"{self.path}: holds {filled} of {rows.numel()} values of rows {start} to {stop} of {name}")
        return rows


def _tensor_start(file: BinaryIO, offset: int, length: int, n_bytes: int) -> int:
    """Where a tensor's values begin in a file that holds its torch.save archive at `offset`."""
    with zipfile.ZipFile(io.BufferedReader(_Window(file, offset, length))) as archive:
        entry = next((entry for entry in archive.infolist() if entry.filename.endswith("/data/0")), None)
    if not entry or entry.compress_type != zipfile.ZIP_STORED or entry.file_size != n_bytes:
        raise ValueError(f"it holds no plain tensor of {n_bytes} bytes")
    file.seek(offset + entry.header_offset)
    header = file.read(30)
    return offset + entry.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))


class _Window(io.RawIOBase):
    """Bytes `offset` to `offset + length` of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self.position = position + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
