"""What a source of documents is, and how files become units of work."""

import codecs
import glob
import gzip
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidar.config import UserError
from tidar.config.options import Data
from tidar.data.corpus import BadDocument, Document
from tidar.data.tokenizer import Tokenizer

PART_BYTES = 2 * 2**20
BATCH_CHARACTERS = 2**18  # tokenised at one time


@dataclass(frozen=True)
class Part:
    """A unit of work: files, or bytes `start` to `stop` of one. group: which of data.paths it belongs to."""

    group: int
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None


class Source(ABC):
    """A kind of corpus. Its parts, in order, hold its documents, in order."""

    needs_tokenizer = needs_paths = True
    # options of [data] that change what its documents are
    meaning: tuple[str, ...] = ()

    def __init__(self, options: Data, tokenizer: Tokenizer | None, vocab_size: int | None = None):
        """vocab_size: rows of the model's embedding, where that is known. Raises UserError for options that clash."""
        self.options = options
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        if self.needs_tokenizer and tokenizer is None:
            raise UserError(
                f"data.source = {options.source}: needs data.tokenizer: a local folder with a tokenizer, or bytes"
            )

    @abstractmethod
    def parts(self, paths: list[str]) -> list[Part]:
        """Units of work for these paths. Raises UserError for a path that holds nothing of this kind."""

    def training_paths(self, paths: list[str]) -> list[str]:
        """Where documents to train on lie, if data.paths are `paths`; each is a group."""
        return paths

    @abstractmethod
    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        """What each place of a part holds; None: nothing, as a blank line."""

    def place(self, part: Part, index: int, before: int) -> str:
        """Where what `documents` gives as number `index` lies, for messages.

        before: how many it gives for earlier parts of the same file.
        """
        return part.files[index]

    def end_of_document(self, default: int | None) -> int | None:
        """The token of data.end_of_document, which ends each document; None: nothing is added."""
        text = self.options.end_of_document
        if not text:
            return default
        if text == "none":
            return None
        token = self.tokenizer.token(text)
        if token is None:
            raise UserError(f"data.end_of_document = {text}: is no token of {self.tokenizer.name}; or none")
        return token

    def finish(self, tokens: np.ndarray, targets: np.ndarray | None, end: int | None) -> Document:
        """A document with its end token, which is a target where data.end_is_target says so."""
        if end is None or not len(tokens):
            return Document(tokens, targets)
        tokens = np.append(tokens.astype(np.uint32), np.uint32(end))
        if targets is None and self.options.end_is_target:
            return Document(tokens)
        targets = np.ones(len(tokens) - 1, bool) if targets is None else targets
        return Document(tokens, np.append(targets, self.options.end_is_target))


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files at a path: the file itself, those of a folder with these suffixes, at any depth, or those of a glob.

    Links are followed; the order depends on names alone. Raises UserError where there is none, and for a folder that
    cannot be read.
    """
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    found, seen = [], set()
    for match in matches:
        if not os.path.isdir(match):
            found.append(match)
            continue
        for folder, subfolders, names in os.walk(match, onerror=_cannot_be_read, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
                subfolders.clear()
                continue
            seen.add(real)
            subfolders.sort()
            found += [os.path.join(folder, name) for name in sorted(names) if name.lower().endswith(suffixes)]
    found = list(dict.fromkeys(found))
    if not found:
        raise UserError(f"data.paths: {path}: holds no file of {', '.join(suffixes)}")
    return found


def _cannot_be_read(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def file_size(file: str) -> int:
    """Bytes of a file; 0 for one that cannot be read, which its reader then says."""
    try:
        return os.path.getsize(file)
    except OSError:
        return 0


def divide_files(group: int, files: list[str]) -> list[Part]:
    """Parts of whole files, of about PART_BYTES."""
    parts, held, size = [], [], 0
    for file in files:
        held.append(file)
        size += file_size(file)
        if size >= PART_BYTES or len(held) == 1024:
            parts.append(Part(group, tuple(held)))
            held, size = [], 0
    return parts + ([Part(group, tuple(held))] if held else [])


def divide_lines(group: int, file: str) -> list[Part]:
    """Parts of a file of lines: each has the lines that begin in it."""
    size = file_size(file)
    return [Part(group, (file,), start, min(start + PART_BYTES, size)) for start in range(0, max(size, 1), PART_BYTES)]


def read_lines(part: Part) -> Iterator[bytes]:
    """The lines of a part, of the whole file where it is compressed."""
    file = part.files[0]
    if file.endswith(".gz"):
        with gzip.open(file) as lines:
            yield from lines
    elif file.endswith(".zst"):
        with _pyarrow("", file).input_stream(file, compression="zstd") as stream:
            import io

            yield from io.BufferedReader(stream)
    else:
        with open(file, "rb") as lines:
            if part.start:
                lines.seek(part.start - 1)
                lines.readline()  # belongs to the part before, unless it ends here
            while lines.tell() < part.stop and (line := lines.readline()):
                yield line


def lines_before(part: Part) -> int:
    """Lines of the file that begin before a part. Reads all of it up to there."""
    if not part.start:
        return 0
    if part.files[0].lower().endswith(".parquet"):
        return rows_before(part)
    count, left = 1, part.start - 1
    with open(part.files[0], "rb") as file:
        while left and (block := file.read(min(left, 2**24))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def parse_json(line: bytes) -> Any | BadDocument | None:
    """The value of a line of JSON; None for a blank one."""
    if not line.strip():
        return None
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a half of a pair is no character
        return value
    except UnicodeEncodeError:
        return BadDocument("is not Unicode: it has a lone surrogate")
    except UnicodeDecodeError as error:
        return BadDocument(f"is not UTF-8 (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return BadDocument(f"is not JSON: {error}")


def divide_rows(group: int, file: str) -> list[Part]:
    """Parts of a Parquet file: its row groups. One that cannot be read is one part, whose reader then says so."""
    parquet = _pyarrow(".parquet", file)
    try:
        with parquet.ParquetFile(file) as opened:
            return [Part(group, (file,), number, number + 1) for number in range(opened.num_row_groups)]
    except Exception:  # of a damaged file
        return [Part(group, (file,), 0, 1)]


def read_parquet(part: Part, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a part of a Parquet file: those of these columns that it has, all where it has none of them."""
    with _pyarrow(".parquet", part.files[0]).ParquetFile(part.files[0]) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, row_groups=range(part.start, part.stop), columns=there or None):
            yield from batch.to_pylist()


def rows_before(part: Part) -> int:
    """Rows of a Parquet file before a part."""
    if not part.start:
        return 0
    with _pyarrow(".parquet", part.files[0]).ParquetFile(part.files[0]) as file:
        return sum(file.metadata.row_group(number).num_rows for number in range(part.start))


def batched(
    records: Iterable[Any], encode: Callable[[list[Any]], list[Any]], size: Callable[[Any], int]
) -> Iterator[Document | BadDocument | None]:
    """Documents of records, encoded many at a time; what is no record (BadDocument, None) keeps its place."""
    held: list[Any] = []
    characters = 0

    def flush() -> Iterator[Document | BadDocument | None]:
        found = iter(encode([record for record in held if record is not None and not isinstance(record, BadDocument)]))
        for record in held:
            yield record if record is None or isinstance(record, BadDocument) else next(found)

    for record in records:
        held.append(record)
        if record is not None and not isinstance(record, BadDocument):
            characters += size(record)
        if characters >= BATCH_CHARACTERS or len(held) == 4096:
            yield from flush()
            held, characters = [], 0
    yield from flush()


def _pyarrow(module: str, file: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: needs pyarrow, of the extra data: pip install 'tidar[data]'") from None
    return pyarrow.parquet if module else pyarrow
