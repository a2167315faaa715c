"""Tokenised documents end to end, as memory-mapped files or as arrays."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidar.config import UserError


class BadDocument(Exception):
    """A document that cannot be used. Its text is the reason, in one line; who reads it knows the place."""


@dataclass
class Document:
    """tokens: `[length]`, any integer dtype. targets: `[length]` bool, the tokens to be predicted; None: all."""

    tokens: np.ndarray
    targets: np.ndarray | None = None


@dataclass(eq=False)
class Corpus:
    """Documents end to end.

    tokens: `[tokens]` uint16 or uint32. offsets: `[documents + 1]` int64, where each document starts and the last ends.
    target_bits: `[ceil(tokens / 8)]` uint8, a bit for each token, true where it is a target; None: all are.
    counts: `[largest id + 1]` int64, how often each token stands there.
    groups: documents of each of data.paths, in order. meta: what meta.json says.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    target_bits: np.ndarray | None
    counts: np.ndarray
    groups: list[int]
    meta: dict[str, Any]

    @staticmethod
    def of(documents: Iterable[Document]) -> "Corpus":
        """From documents in memory."""
        documents = list(documents)
        tokens = np.concatenate(
            [np.zeros(0, np.uint32), *(document.tokens.astype(np.uint32) for document in documents)]
        )
        targets = [
            np.ones(len(document.tokens), bool) if document.targets is None else document.targets
            for document in documents
        ]
        offsets = np.cumsum([0, *(len(document.tokens) for document in documents)])
        bits = np.packbits(np.concatenate([np.zeros(0, bool), *targets]))
        return Corpus(tokens, offsets, bits, np.bincount(tokens), [len(documents)], {})

    @staticmethod
    def open(folder: Path) -> "Corpus":
        """A prepared folder. Nothing of its tokens is read. Raises UserError where it is not whole."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            arrays = {
                "tokens": (meta["dtype"], meta["tokens"]),
                "offsets": ("int64", meta["documents"] + 1),
                "targets": ("uint8", -(-meta["tokens"] // 8)),
                "counts": ("int64", meta["largest_id"] + 1),
            }
            if meta["target_tokens"] == meta["tokens"]:
                arrays.pop("targets")
            maps = {}
            for name, (dtype, length) in arrays.items():
                path = folder / f"{name}.bin"
                size = length * np.dtype(dtype).itemsize
                if path.stat().st_size != size:
                    raise UserError(
                        f"{path}: holds {path.stat().st_size} bytes, and meta.json asks for {size}: "
                        "remove the folder and prepare it anew"
                    )
                maps[name] = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
            groups = [group["documents"] for group in meta["paths"]]
            if maps["offsets"][0] != 0 or maps["offsets"][-1] != meta["tokens"]:
                raise UserError(f"{folder / 'offsets.bin'}: is damaged: remove the folder and prepare it anew")
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); prepared folders are made by "
                "python -m tidar.prepare_data"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'meta.json'}: is not that of a prepared folder ({error!r})") from None
        return Corpus(maps["tokens"], maps["offsets"], maps.get("targets"), maps["counts"], groups, meta)

    @cached_property
    def digest(self) -> str:
        """Tells its content from another's: SHA-256 of its numbers of documents and tokens and of `counts`."""
        numbers = [len(self), len(self.tokens), self.meta.get("target_tokens")]
        return hashlib.sha256(json.dumps(numbers).encode() + self.counts.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def read(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens, int64, and loss mask, float32, both `[length]`, from token number `start` on."""
        tokens = torch.from_numpy(self.tokens[start : start + length].astype(np.int64))
        if self.target_bits is None:
            return tokens, torch.ones(length)
        first = start // 8
        bits = np.unpackbits(self.target_bits[first : -(-(start + length) // 8)])
        return tokens, torch.from_numpy(bits[start - 8 * first :][:length].astype(np.float32))
