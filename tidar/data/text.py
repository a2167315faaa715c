"""Text: JSON lines, plain files (one is one document) and Parquet; gzip, and zstd with the extra data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidar.data.corpus import BadDocument, Document
from tidar.data.source import (
    Part,
    Source,
    batched,
    divide_files,
    divide_lines,
    find_files,
    line_number,
    parse_json,
    read_lines,
    read_parquet,
)

LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = tuple(f"{name}{end}" for name in LINES for end in (".gz", ".zst"))
PARQUET = (".parquet",)
PLAIN = (".txt",)


class RecordSource(Source):
    """Files of records: JSON lines and Parquet. What is a document in a record, subclasses say."""

    suffixes: tuple[str, ...] = LINES + COMPRESSED + PARQUET

    def parts(self, paths: list[str]) -> list[Part]:
        found = []
        for group, path in enumerate(paths):
            plain: list[str] = []
            for file in find_files(path, self.suffixes):
                if file.endswith(PLAIN):
                    plain.append(file)
                    continue
                found += divide_files(group, plain)
                plain = []
                whole = file.endswith((".gz", ".zst", ".parquet"))
                found += [Part(group, (file,))] if whole else divide_lines(group, file)
            found += divide_files(group, plain)
        return found

    def place(self, part: Part, index: int) -> str:
        file = part.files[0]
        if file.endswith(PLAIN):
            return part.files[index]
        return f"{file}: row {index + 1}" if file.endswith(PARQUET) else f"{file}: line {line_number(part, index)}"

    def records(self, part: Part) -> Iterator[Any | BadDocument | None]:
        """The records of a part; None for a blank line."""
        if part.files[0].endswith(PARQUET):
            yield from read_parquet(part)
        else:
            for line in read_lines(part):
                yield parse_json(line)


class Text(RecordSource):
    """A field of records, data.text_field, or plain files. Each text ends with data.end_of_document."""

    suffixes = RecordSource.suffixes + PLAIN
    meaning = ("text_field", "end_of_document", "end_is_target")

    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        end = self.end_of_document(self.tokenizer.end_of_text)

        def encode(texts: list[str]) -> list[Document]:
            return [self.finish(tokens, None, end) for tokens in self.tokenizer.encode(texts)]

        yield from batched(self._texts(part), encode, size=len)

    def _texts(self, part: Part) -> Iterator[str | BadDocument | None]:
        if part.files[0].endswith(PLAIN):
            for file in part.files:
                try:
                    yield Path(file).read_bytes().decode("utf-8")
                except UnicodeDecodeError as error:
                    yield BadDocument(f"is not UTF-8 (byte {error.start})")
            return
        field = self.options.text_field
        for record in self.records(part):
            if record is None or isinstance(record, BadDocument):
                yield record
            elif not isinstance(record, dict) or not isinstance(record.get(field), str):
                yield BadDocument(f'has no text in the field "{field}" (data.text_field)')
            else:
                yield record[field]
