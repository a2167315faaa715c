"""The base class of data sources, and how files are divided into parts that processes prepare independently."""

import codecs
import glob
import gzip
import io
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from tidar.config import UserError, first_line
from tidar.config.options import Data
from tidar.config.packages import install
from tidar.data.corpus import BadDocument, Document
from tidar.data.json_array import begins_array, split_array
from tidar.data.tokenizer import Tokenizer

PART_BYTES = 2 * 2**20
BATCH_CHARACTERS = 2**18  # tokenised at a time
# what reading a damaged or vanished file raises; any other exception is a bug and ends the run with its traceback
UNREADABLE = (OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Part:
    """A unit of work: whole files, or one file from `start` to `stop` (bytes; row groups of Parquet).

    group: index of the path in data.paths.
    """

    group: int
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None


class Source(ABC):
    """A kind of corpus. Its documents, in order, are those of its parts, in order."""

    needs_tokenizer = needs_paths = True
    # options of [data] on which its documents depend
    meaning: tuple[str, ...] = ()

    def __init__(self, options: Data, tokenizer: Tokenizer | None, vocab_size: int | None = None):
        """vocab_size: rows of the model's embedding, if known. Raises UserError for options that exclude each other."""
        self.options = options
        self.tokenizer: Any = tokenizer  # a Tokenizer, if needs_tokenizer
        self.vocab_size = vocab_size
        if self.needs_tokenizer and tokenizer is None:
            raise UserError(
                f"data.source = {options.source}: needs data.tokenizer: a tokenizer's folder or hub id, or bytes"
            )

    @abstractmethod
    def parts(self, paths: list[str]) -> list[Part]:
        """The parts of these paths. Raises UserError for a path that does not exist or holds no file of this kind."""

    def training_paths(self, paths: list[str]) -> list[str]:
        """The paths of the training documents if data.paths is `paths`; each is a group."""
        return paths

    @abstractmethod
    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        """The documents of a part, one for each record or file; None for a blank line."""

    def place(self, part: Part, index: int, before: int) -> str:
        """File and position of the part's document number `index`, for messages.

        before: number of documents in earlier parts of the same file.
        """
        return part.files[index]

    def continues(self, part: Part) -> bool:
        """Whether a part is one piece of a document of which the part before is another."""
        return False

    def end_of_document(self, default: int | None) -> int | None:
        """Id of the token of data.end_of_document, which is appended to each document; None: none is appended.

        Raises UserError for a text that is not a token.
        """
        text = self.options.end_of_document
        if not text:
            return default
        if text == "none":
            return None
        token = self.tokenizer.token(text)
        if token is None:
            raise UserError(
                f"data.end_of_document = {text}: is no token of {self.tokenizer.name}: must be one, or none"
            )
        return token

    def finish(self, tokens: np.ndarray, targets: np.ndarray | None, end: int | None) -> Document:
        """The document with its end token appended, which is a target if data.end_is_target is true."""
        if end is None or not len(tokens):
            return Document(tokens, targets)
        tokens = np.append(tokens.astype(np.uint32), np.uint32(end))
        if targets is None and self.options.end_is_target:
            return Document(tokens)
        targets = np.ones(len(tokens) - 1, bool) if targets is None else targets
        return Document(tokens, np.append(targets, self.options.end_is_target))


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files at a path: the file itself, those of a folder with these suffixes, at any depth, or those of a glob.

    A folder's files and subfolders whose names begin with a dot are not read, unless the path names or matches them.
    Links are followed; the order depends on names alone. Raises UserError for a path that does not exist or holds no
    such file, and for a folder that cannot be read.
    """
    found, seen = [], set()
    for match in _expand(path):
        if not os.path.isdir(match):
            found.append(match)
            continue
        for folder, subfolders, names in os.walk(match, onerror=_cannot_be_read, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = visible(subfolders)
            found += [os.path.join(folder, name) for name in visible(names) if name.lower().endswith(suffixes)]
    found = list(dict.fromkeys(found))
    if not found:
        raise UserError(
            f"{path}: holds no file of {', '.join(suffixes)} (names that begin with a dot are read only where a path "
            "names them)"
        )
    return found


def visible(names: Iterable[str]) -> list[str]:
    """Names of a folder that do not begin with a dot (as .git, .ipynb_checkpoints), sorted."""
    return sorted(name for name in names if not name.startswith("."))


def _expand(path: str) -> list[str]:
    """The path itself, or what it matches as a glob. Raises UserError where there is neither."""
    try:
        os.stat(path)
        return [path]
    except OSError as error:
        if matches := sorted(glob.glob(path, recursive=True)):
            return matches
        if glob.has_magic(path):
            raise UserError(f"{path}: matches no file or folder") from None
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            _cannot_be_read(error)
        raise UserError(f"{path}: does not exist") from None


def _cannot_be_read(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def file_size(file: str) -> int:
    """Bytes of a file; 0 if it cannot be read, which is reported when it is opened."""
    try:
        return os.path.getsize(file)
    except OSError:
        return 0


def divide_files(group: int, files: list[str]) -> list[Part]:
    """Parts of whole files, each of about PART_BYTES."""
    parts, held, size = [], [], 0
    for file in files:
        held.append(file)
        size += file_size(file)
        if size >= PART_BYTES or len(held) == 1024:
            parts.append(Part(group, tuple(held)))
            held, size = [], 0
    return parts + ([Part(group, tuple(held))] if held else [])


def divide_lines(group: int, file: str) -> list[Part]:
    """Parts of a file of lines. A line belongs to the part in which it begins."""
    size = file_size(file)
    return [Part(group, (file,), start, min(start + PART_BYTES, size)) for start in range(0, max(size, 1), PART_BYTES)]


def divide_array(group: int, file: str) -> list[Part]:
    """Parts of a JSON array, which begin at elements. Reads the file if it is larger than a part."""
    size = file_size(file)
    starts = [0]
    if size > PART_BYTES:
        with suppress(BadDocument, *UNREADABLE), open(file, "rb") as stream:  # reported when the last part is read
            for offset, _ in split_array(stream):
                if offset - starts[-1] >= PART_BYTES:
                    starts.append(offset)
    return [Part(group, (file,), start, stop) for start, stop in pairwise([*starts, max(size, starts[-1] + 1)])]


def is_array(file: str) -> bool:
    """Whether a file of records is one JSON array; false if it cannot be read, which is reported when its part is."""
    try:
        with _open(file) as stream:
            return begins_array(stream.peek(4096))
    except UNREADABLE:
        return False


@contextmanager
def _open(file: str) -> Iterator[Any]:
    """A file for reading, decompressed."""
    if file.lower().endswith(".gz"):
        with gzip.open(file) as stream:
            yield stream
    elif file.lower().endswith(".zst"):
        with _pyarrow("", file).input_stream(file, compression="zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        with open(file, "rb") as stream:
            yield stream


def read_records(part: Part) -> Iterator[bytes]:
    """The unparsed JSON of a part: its lines, or the elements of an array; all of a compressed file.

    Raises BadDocument after the last element of an array that is not whole.
    """
    with _open(part.files[0]) as stream:
        if begins_array(stream.peek(4096)):
            if part.start:
                stream.seek(part.start)
            for offset, element in split_array(stream, part.start):
                if part.stop is not None and offset >= part.stop:
                    break
                yield element
        elif part.stop is None:
            yield from stream
        else:
            if part.start:
                stream.seek(part.start - 1)
                stream.readline()  # belongs to the part before, unless it ends here
            while stream.tell() < part.stop and (line := stream.readline()):
                yield line


def lines_before(part: Part) -> int:
    """Records of the file that begin before a part: lines, elements of an array or rows. Reads the file up to there."""
    if not part.start:
        return 0
    if part.files[0].lower().endswith(".parquet"):
        return rows_before(part)
    with open(part.files[0], "rb") as stream:
        if begins_array(stream.peek(4096)):
            return sum(1 for _ in takewhile(lambda found: found[0] < part.start, split_array(stream)))
        count, left = 1, part.start - 1
        while left and (block := stream.read(min(left, 2**24))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def parse_json(record: bytes) -> Any | BadDocument | None:
    """The value of a record's JSON; None for a blank line."""
    if not record.strip():
        return None
    try:
        text = record.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a half of a pair is no character
        return value
    except UnicodeEncodeError:
        return BadDocument("is not Unicode: it has a lone surrogate")
    except UnicodeDecodeError as error:
        return BadDocument(f"is not UTF-8 (byte {error.start} of the record)")
    except (ValueError, RecursionError) as error:
        return BadDocument(f"is not JSON: {error}")


def divide_rows(group: int, file: str) -> list[Part]:
    """Parts of a Parquet file: its row groups. A damaged file is one part, and reported when that is read."""
    parquet = _pyarrow(".parquet", file)
    try:
        with parquet.ParquetFile(file) as opened:
            return [Part(group, (file,), number, number + 1) for number in range(opened.num_row_groups)]
    except _damaged_parquet(file):
        return [Part(group, (file,), 0, 1)]


def read_parquet(part: Part, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a part of a Parquet file, with those of these columns that exist; with all columns if none exists.

    Raises BadDocument if the file is damaged.
    """
    parquet = _pyarrow(".parquet", part.files[0])
    try:
        with parquet.ParquetFile(part.files[0]) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            groups = range(part.start, part.stop)  # type: ignore[arg-type]
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=there or None):
                yield from batch.to_pylist()
    except _damaged_parquet(part.files[0]) as error:
        raise unreadable(error) from None


def _damaged_parquet(file: str) -> tuple[type[Exception], ...]:
    """What pyarrow raises for a damaged file, and for values that Python cannot hold."""
    return (*UNREADABLE, _pyarrow("", file).ArrowException, ValueError, OverflowError)


def unreadable(error: Exception) -> BadDocument:
    """A file that cannot be read to its end."""
    return BadDocument(f"cannot be read from here on ({first_line(error)})")


def rows_before(part: Part) -> int:
    """Rows of a Parquet file before a part."""
    if not part.start:
        return 0
    with _pyarrow(".parquet", part.files[0]).ParquetFile(part.files[0]) as file:
        return sum(file.metadata.row_group(number).num_rows for number in range(part.start))


def batched(
    records: Iterable[Any], encode: Callable[[list[Any]], list[Any]], size: Callable[[Any], int]
) -> Iterator[Document | BadDocument | None]:
    """Documents of records, encoded in batches of about BATCH_CHARACTERS; BadDocument and None pass through in order.

    encode: records to as many documents. size: characters of a record.
    """
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
        raise UserError(f"{file}: needs pyarrow: {install('data')}") from None
    return pyarrow.parquet if module else pyarrow
