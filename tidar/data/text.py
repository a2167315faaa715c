"""Text: JSON lines, JSON arrays, plain files (one is one document) and Parquet; gzip, and zstd with the extra data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidar.data.corpus import BadDocument, Document
from tidar.data.source import (
    UNREADABLE,
    Part,
    Source,
    batched,
    divide_array,
    divide_files,
    divide_lines,
    divide_rows,
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


def is_parquet(part: Part) -> bool:
    return part.files[0].lower().endswith(PARQUET)


class RecordSource(Source):
    """Files of records: JSON lines, JSON arrays and Parquet. Subclasses make a document of a record."""

    suffixes: tuple[str, ...] = LINES + COMPRESSED + PARQUET

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of Parquet that are read; empty: all."""
        return ()

    def parts(self, paths: list[str]) -> list[Part]:
        found = []
        for group, path in enumerate(paths):
            plain: list[str] = []
            for file in find_files(path, self.suffixes):
                if file.lower().endswith(PLAIN) and PLAIN[0] in self.suffixes:
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

    def place(self, part: Part, index: int, before: int) -> str:
        if part.stop is None and not part.files[0].lower().endswith((".gz", ".zst")):
            return part.files[index]
        unit = "row" if is_parquet(part) else "element" if is_array(part.files[0]) else "line"
        return f"{part.files[0]}: {unit} {before + index + 1}"

    def records(self, part: Part) -> Iterator[Any | BadDocument | None]:
        """The parsed records of a part; None for a blank line. A file that is damaged ends with a BadDocument."""
        try:
            if is_parquet(part):
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

    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        end = self.end_of_document(self.tokenizer.end_of_text)

        def encode(texts: list[str]) -> list[Document]:
            return [self.finish(tokens, None, end) for tokens in self.tokenizer.encode(texts)]

        yield from batched(self._texts(part), encode, size=len)

    def _texts(self, part: Part) -> Iterator[str | BadDocument | None]:
        if part.stop is None and part.files[0].lower().endswith(PLAIN):
            for file in part.files:
                try:
                    yield Path(file).read_bytes().decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    yield BadDocument(f"is not UTF-8 (byte {error.start})")
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
