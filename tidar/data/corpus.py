"""Tokenised documents end to end, as memory-mapped files or as arrays."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidar.config import UserError
from tidar.config.files import open_regular, parse_json

MOST_IDS = 2**24  # no vocabulary has more
MOST_META_BYTES = 2**26
PIECE = 2**22  # bytes or values that are hashed or checked at a time
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # set bits of a byte
REMEDY = "remove the folder and prepare the data again"


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
    def open(folder: Path, verify: bool = True) -> "Corpus":
        """A prepared folder, memory-mapped. Types, sizes and lengths are checked before anything is mapped.

        verify: also compares the content of all files with their checksums, which reads them once.
        Raises UserError where the folder is not whole.
        """
        try:
            with open_regular(folder / "meta.json") as file:
                meta = check_meta(parse_json(file.read(MOST_META_BYTES)))
            dtype = {"tokens": meta["dtype"], "offsets": "int64", "targets": "uint8", "counts": "int64"}
            maps = {name: _map(folder / f"{name}.bin", dtype[name], length) for name, length in _lengths(meta).items()}
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); prepared folders are made by "
                "python -m tidar.prepare_data"
            ) from None
        except ValueError as error:
            raise UserError(f"{folder / 'meta.json'}: {error}; {REMEDY}") from None
        if verify:
            for name, values in maps.items():
                if checksum(values) != meta["sha256"][name]:
                    raise UserError(f"{folder / name}.bin: differs from its checksum in meta.json; {REMEDY}")
        corpus = Corpus(
            maps["tokens"],
            maps["offsets"],
            maps.get("targets"),
            maps["counts"],
            [path["documents"] for path in meta["paths"]],
            meta,
        )
        if verify and (problem := corpus.find_damage()):
            raise UserError(f"{folder}: {problem}; {REMEDY}")
        return corpus

    def find_damage(self) -> str | None:
        """How the arrays contradict each other or `meta`; None where they agree. Reads them once."""
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != len(self.tokens):
            return "offsets.bin does not cover tokens.bin"
        for first in range(0, len(self), PIECE):
            piece = offsets[first : first + PIECE + 1]
            if (piece[1:] < piece[:-1]).any():
                return "offsets.bin does not ascend"
        used = np.flatnonzero(self.counts)
        ends = (int(used[0]), int(used[-1])) if len(used) else (0, len(self.counts) - 1)
        if self.counts.min() < 0 or self.counts.sum() != len(self.tokens):
            return "counts.bin does not add up to the number of tokens"
        if ends != (self.meta["smallest_id"], self.meta["largest_id"]):
            return "counts.bin has other smallest and largest ids than meta.json"
        largest = max((int(self.tokens[i : i + PIECE].max()) for i in range(0, len(self.tokens), PIECE)), default=0)
        if len(self.tokens) and largest != self.meta["largest_id"]:
            return "tokens.bin has another largest id than meta.json"
        if self.target_bits is not None:
            n = sum(
                int(ONES[self.target_bits[i : i + PIECE]].sum(dtype=np.int64))
                for i in range(0, len(self.target_bits), PIECE)
            )
            if n != self.meta["target_tokens"]:
                return "targets.bin has another number of targets than meta.json"
        return None

    @property
    def digest(self) -> str:
        """SHA-256 that stands for the tokens, their targets, and the division into documents and groups."""
        content = [self.meta["sha256"], self.groups]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def is_chat(self) -> bool:
        return self.meta.get("source") == "chat"

    def have_targets(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether each piece of tokens holds a target, `[pieces]` bool. Its first token is none: nothing predicts it.

        starts, ends: `[pieces]` int64, of pieces in order that do not overlap and are not empty.
        """
        if self.target_bits is None:
            return ends - starts > 1
        found = np.empty(2 * len(starts), np.int64)
        positions = np.stack([starts, ends], axis=1).ravel()
        done = before = 0
        begin = int(positions[0]) // 8 if len(positions) else 0
        while done < len(positions):
            # a byte more, for a piece that ends with the block
            block = np.append(self.target_bits[begin : begin + PIECE], np.uint8(0))
            end = 8 * (begin + len(block) - 1)
            stop = done + int(np.searchsorted(positions[done:], end, side="right"))
            sums = before + np.concatenate([[0], np.cumsum(ONES[block], dtype=np.int64)])
            byte, bit = np.divmod(positions[done:stop] - 8 * begin, 8)
            found[done:stop] = sums[byte] + ONES[block[byte].astype(np.uint16) >> (8 - bit)]
            done, before, begin = stop, sums[-1], begin + len(block) - 1
        first = self.target_bits[starts // 8] >> (7 - starts % 8).astype(np.uint8) & 1
        return found[1::2] - found[::2] > first

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


class Checksum:
    """SHA-256 over the SHA-256 of each PIECE bytes, so that several threads can compute it for a file."""

    def __init__(self) -> None:
        self.pieces = hashlib.sha256()
        self.piece = hashlib.sha256()
        self.filled = 0

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            head, view = view[: PIECE - self.filled], view[PIECE - self.filled :]
            self.piece.update(head)
            self.filled += len(head)
            if self.filled == PIECE:
                self._end_piece()

    def _end_piece(self) -> None:
        self.pieces.update(self.piece.digest())
        self.piece, self.filled = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        """The checksum of all data. Nothing can be added afterwards."""
        if self.filled:
            self._end_piece()
        return self.pieces.hexdigest()


def checksum(values: np.ndarray) -> str:
    """`Checksum` of an array's bytes, computed by all cores."""
    content: Any = values.view(np.uint8)
    pieces = hashlib.sha256()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for digest in threads.map(
            lambda first: hashlib.sha256(content[first : first + PIECE]).digest(), range(0, len(content), PIECE)
        ):
            pieces.update(digest)
    return pieces.hexdigest()


def check_meta(meta: Any) -> dict[str, Any]:
    """Returns the content of a meta.json. Raises ValueError where it is not that of a prepared folder."""
    number = range(2**48)
    shape = {
        "dtype": ("uint16", "uint32"),
        "documents": number,
        "tokens": number,
        "target_tokens": number,
        "smallest_id": range(MOST_IDS),
        "largest_id": range(MOST_IDS),
        "dropped": number,
        "bad_documents": number,
    }
    if not isinstance(meta, dict):
        raise ValueError("is not that of a prepared folder")
    for name, allowed in shape.items():
        _check(name in meta and type(meta[name]) is type(allowed[0]) and meta[name] in allowed, name)
    _check(meta["target_tokens"] <= meta["tokens"], "target_tokens")
    _check(meta["bad_documents"] <= meta["dropped"], "bad_documents")
    _check(meta["smallest_id"] <= meta["largest_id"] <= np.iinfo(meta["dtype"]).max, "largest_id")
    _check("tokenizer" in meta, "tokenizer")
    paths: Any = meta.get("paths")
    reasons: Any = meta.get("dropped_reasons")
    tokenizer = meta["tokenizer"]
    _check(isinstance(paths, list) and all(map(_is_group, paths)), "paths")
    _check(sum(path["documents"] for path in paths) == meta["documents"], "paths")
    _check(isinstance(reasons, dict) and all(type(count) is int for count in reasons.values()), "dropped_reasons")
    _check(isinstance(meta.get("source"), str) and isinstance(meta.get("plan"), dict), "source or plan")
    if tokenizer is not None:
        _check(isinstance(tokenizer, dict) and {"name", "sha256", "size"} <= tokenizer.keys(), "tokenizer")
        _check(isinstance(tokenizer["name"], str) and isinstance(tokenizer["sha256"], str), "tokenizer")
        _check(type(tokenizer["size"]) is int and meta["largest_id"] < tokenizer["size"] <= MOST_IDS, "tokenizer")
    if "sha256" not in meta:
        raise ValueError("has no checksums: an earlier version of tidar made it")
    _check(isinstance(meta["sha256"], dict) and meta["sha256"].keys() == _lengths(meta).keys(), "sha256")
    _check(all(isinstance(value, str) for value in meta["sha256"].values()), "sha256")
    return meta


def _is_group(path: Any) -> bool:
    return isinstance(path, dict) and type(path.get("documents")) is int and path["documents"] >= 0


def _check(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"is not that of a prepared folder: it has no valid {name}")


def _lengths(meta: dict[str, Any]) -> dict[str, int]:
    """Numbers of values in the files of a prepared folder."""
    lengths = {"tokens": meta["tokens"], "offsets": meta["documents"] + 1, "counts": meta["largest_id"] + 1}
    if meta["target_tokens"] < meta["tokens"]:
        lengths["targets"] = -(-meta["tokens"] // 8)
    return lengths


def _map(path: Path, dtype: str, length: int) -> np.ndarray:
    size = length * np.dtype(dtype).itemsize
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise UserError(f"{path}: holds {found} bytes, and meta.json asks for {size}; {REMEDY}")
        return np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
