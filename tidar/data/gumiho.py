"""Data of the DeepSpeed script and SpecForge: files of torch.save, each a document of input_ids and loss_mask."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tidar.config import first_line
from tidar.data.corpus import MOST_IDS, BadDocument, Document
from tidar.data.source import Part, Source, find_files

FILES_IN_A_PART = 256
MOST_BYTES = 2**33  # of a file that is decompressed in memory


class Gumiho(Source):
    """Folders of .ckpt and .ckpt.gz files, searched at any depth.

    Other keys of a .ckpt file, as a `hidden_state`, are not read into memory; those of a .ckpt.gz file are.
    """

    needs_tokenizer = False

    def parts(self, paths: list[str]) -> list[Part]:
        found = []
        for group, path in enumerate(paths):
            files = find_files(path, (".ckpt", ".ckpt.gz"))
            for first in range(0, len(files), FILES_IN_A_PART):
                found.append(Part(group, tuple(files[first : first + FILES_IN_A_PART])))
        return found

    def documents(self, part: Part) -> Iterator[Document | BadDocument]:
        for file in part.files:
            try:
                yield self._read(file)
            except BadDocument as error:
                yield error

    def _read(self, file: str) -> Document:
        saved = _load(file)
        if not isinstance(saved, dict):
            raise BadDocument(f"holds a {type(saved).__name__}: must be a dict with input_ids and loss_mask")
        tokens, targets = (_vector(saved, key) for key in ("input_ids", "loss_mask"))
        if len(tokens) != len(targets):
            raise BadDocument(
                f"has {len(tokens)} input_ids and {len(targets)} values of loss_mask: must be equally many"
            )
        if not len(tokens):
            raise BadDocument("holds no tokens")
        if tokens.dtype.kind not in "iu":
            raise BadDocument(f"input_ids are {tokens.dtype}: must be integers")
        limit = self.tokenizer.size if self.tokenizer else self.vocab_size or MOST_IDS
        if tokens.min() < 0 or tokens.max() >= limit:
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise BadDocument(f"holds the token {wrong}: must be from 0 to {limit - 1}")
        if not np.isin(targets, (0, 1)).all():
            raise BadDocument("loss_mask holds other values than 0 and 1")
        return Document(tokens, targets.astype(bool))


def _load(file: str) -> Any:
    """What torch.save wrote. Runs no code of the file's pickle. Raises BadDocument for a file that cannot be read."""
    try:
        if os.path.getsize(file) == 0:
            raise BadDocument("is empty")
        content: str | io.BytesIO = file
        if file.lower().endswith(".gz"):
            with gzip.open(file) as stream:
                content = io.BytesIO(stream.read(MOST_BYTES))
                if stream.read(1):
                    raise BadDocument(f"holds more than {MOST_BYTES:,} bytes when decompressed")
    except (OSError, EOFError, zlib.error) as error:
        raise BadDocument(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        # mapped: tensors that are not used are not read
        return torch.load(content, map_location="cpu", weights_only=True, mmap=content is file)
    except Exception as error:  # torch.load raises exceptions of any type for damaged and malicious files
        reason = first_line(error)
        raise BadDocument(f"cannot be read safely as a file of torch.save: {reason}") from None


def _vector(saved: dict, key: str) -> np.ndarray:
    """A copy of the numbers saved under `key`, `[S]`. Raises BadDocument for anything but numbers of that shape."""
    if key not in saved:
        raise BadDocument(f"has no {key}")
    try:
        value = torch.as_tensor(saved[key]).detach()
        if value.ndim == 2 and value.shape[0] == 1:
            value = value[0]
        if value.ndim != 1:
            raise BadDocument(f"{key} has shape {list(value.shape)}: must be [S] or [1, S]")
        # a tensor of a few bytes can claim to be large
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise BadDocument(f"{key} has {value.numel()} values, more than the file holds of it")
        return (value.float() if value.is_floating_point() else value).numpy().copy()
    except BadDocument:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # lists of anything, sparse tensors, …
        reason = first_line(error)
        raise BadDocument(f"{key} must be numbers of shape [S] or [1, S] ({reason})") from None
