"""Text: JSON lines, plain files (one is one document) and Parquet; gzip, and zstd with the extra data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidar.config import UserError
from tidar.data.corpus import BadDocument, Document
from tidar.data.source import (
    Part,
    Source,
    batched,
    divide_files,
    divide_lines,
    divide_rows,
    find_files,
    parse_json,
    read_lines,
    read_parquet,
)

LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = tuple(f"{name}{end}" for name in LINES for end in (".gz", ".zst"))
PARQUET = (".parquet",)
PLAIN = (".txt",)


def _is_parquet(part: Part) -> bool:
    return part.files[0].lower().endswith(PARQUET)


class RecordSource(Source):
    """Files of records: JSON lines and Parquet. What is a document in a record, subclasses say."""

    suffixes: tuple[str, ...] = LINES + COMPRESSED + PARQUET

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of a record that are looked at; none: all."""
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
                else:
                    found += divide_lines(group, file)
            found += divide_files(group, plain)
        return found

    def place(self, part: Part, index: int, before: int) -> str:
        if part.stop is None and not part.files[0].lower().endswith((".gz", ".zst")):
            return part.files[index]
        return f"{part.files[0]}: {'row' if _is_parquet(part) else 'line'} {before + index + 1}"

    def records(self, part: Part) -> Iterator[Any | BadDocument | None]:
        """The records of a part; None for a blank line."""
        try:
            if _is_parquet(part):
                yield from read_parquet(part, self.columns)
            else:
                for line in read_lines(part):
                    yield parse_json(line)
        except UserError:
            raise
        except Exception as error:  # a damaged file, read by one of several libraries
            yield BadDocument(f"cannot be read from here on ({(str(error).splitlines() or [type(error).__name__])[0]})")


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
