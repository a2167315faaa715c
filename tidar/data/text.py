"""Text: JSON lines, JSON arrays, plain files (one is one document) and Parquet; gzip; with the extra data, zstd and
datasets on the hub.
"""

import mmap
from collections.abc import Iterator
from typing import Any

from tidar.data.corpus import BadDocument, Document
from tidar.data.hub_dataset import find_shards, is_on_hub, read_shard
from tidar.data.pieces import cut_points
from tidar.data.source import (
    PART_BYTES,
    UNREADABLE,
    Part,
    Source,
    batched,
    divide_array,
    divide_files,
    divide_lines,
    divide_rows,
    file_size,
    find_files,
    is_array,
    parse_json,
    read_parquet,
    read_records,
    unreadable,
)

LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = tuple(f"{name}{end}" for name in LINES for end in (".gz", ".zst"))
PARQUET = (".parquet",)
PLAIN = (".txt",)


def is_table(part: Part) -> bool:
    """Whether all records have the same fields, null where a record has none."""
    return is_on_hub(part.files[0]) or part.files[0].lower().endswith(PARQUET)


def _is_plain(part: Part) -> bool:
    return part.files[0].lower().endswith(PLAIN)


class RecordSource(Source):
    """Records of JSON lines, JSON arrays, Parquet and datasets on the hub. Subclasses make a document of a record."""

    suffixes: tuple[str, ...] = LINES + COMPRESSED + PARQUET

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a table that are read; empty: all."""
        return ()

    def parts(self, paths: list[str]) -> list[Part]:
        found = []
        for group, path in enumerate(paths):
            if is_on_hub(path):
                found += [Part(group, (shard,)) for shard in find_shards(path)]
                continue
            plain: list[str] = []
            for file in find_files(path, self.suffixes):
                if file.lower().endswith(PLAIN) and PLAIN[0] in self.suffixes:
                    pieces = self.divide_text(group, file)
                    if len(pieces) > 1:
                        found += divide_files(group, plain) + pieces
                        plain = []
                    else:
                        plain.append(file)
                    continue
                found += divide_files(group, plain)
                plain = []
                if file.lower().endswith(PARQUET):
                    found += divide_rows(group, file)
                elif file.lower().endswith((".gz", ".zst")):
                    found.append(Part(group, (file,)))
                elif is_array(file):
                    found += divide_array(group, file)
                else:
                    found += divide_lines(group, file)
            found += divide_files(group, plain)
        return found

    def divide_text(self, group: int, file: str) -> list[Part]:
        """Parts of one text that give the tokens of the whole; none where it is small or cannot be cut."""
        try:
            if file_size(file) <= PART_BYTES:
                return []
            with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                ends = cut_points(content, self.tokenizer.cuts, PART_BYTES)
        except OSError:
            return []  # its reader says so
        return [Part(group, (file,), start, stop) for start, stop in zip([0, *ends], ends)]

    def place(self, part: Part, index: int, before: int) -> str:
        if part.stop is None and not is_table(part) and not part.files[0].lower().endswith((".gz", ".zst")):
            return part.files[index]
        unit = "row" if is_table(part) else "element" if is_array(part.files[0]) else "line"
        return f"{part.files[0]}: {unit} {before + index + 1}"

    def records(self, part: Part) -> Iterator[Any | BadDocument | None]:
        """The parsed records of a part; None for a blank line. A file that is damaged ends with a BadDocument."""
        try:
            if is_on_hub(part.files[0]):
                yield from read_shard(part.files[0], self.columns)
            elif is_table(part):
                yield from read_parquet(part, self.columns)
            else:
                for record in read_records(part):
                    yield parse_json(record)
        except BadDocument as error:
            yield error
        except UNREADABLE as error:
            yield unreadable(error)


class Text(RecordSource):
    """A field of records, data.text_field, or plain files. Each text ends with data.end_of_document."""

    suffixes = RecordSource.suffixes + PLAIN
    meaning = ("text_field", "end_of_document", "end_is_target")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.options.text_field,)

    def continues(self, part: Part) -> bool:
        return _is_plain(part) and part.start > 0

    def place(self, part: Part, index: int, before: int) -> str:
        return part.files[index] if _is_plain(part) else super().place(part, index, before)

    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        end = self.end_of_document(self.tokenizer.end_of_text)
        if _is_plain(part) and part.stop is not None and part.stop < file_size(part.files[0]):
            end = None  # the text continues in the next part

        def encode(texts: list[str]) -> list[Document]:
            return [self.finish(tokens, None, end) for tokens in self.tokenizer.encode(texts)]

        yield from batched(self._texts(part), encode, size=len)

    def _texts(self, part: Part) -> Iterator[str | BadDocument | None]:
        if _is_plain(part):
            for file in part.files:
                try:
                    with open(file, "rb") as stream:
                        stream.seek(part.start)
                        content = stream.read(-1 if part.stop is None else part.stop - part.start)
                    yield content.decode("utf-8" if part.start else "utf-8-sig")
                except UnicodeDecodeError as error:
                    yield BadDocument(f"is not UTF-8 (byte {part.start + error.start})")
                except OSError as error:
                    yield BadDocument(f"cannot be read ({error.strerror})")
            return
        field = self.options.text_field
        for record in self.records(part):
            if record is None or isinstance(record, BadDocument):
                yield record
            elif not isinstance(record, dict) or not isinstance(record.get(field), str):
                yield BadDocument(f'has no text in the field "{field}" (data.text_field)')
            else:
                yield record[field]
