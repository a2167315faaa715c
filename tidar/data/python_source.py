"""The built-in corpus: the Python files of the running interpreter's standard library.

It needs no download. Without a tokenizer, a token is a byte.
"""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tidar.config import UserError
from tidar.data.corpus import BadDocument, Document
from tidar.data.source import Part, Source, batched, divide_files, visible
from tidar.data.tokenizer import BytesTokenizer

# installed packages are not part of the standard library, and its tests are not installed on every system
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

STANDARD_LIBRARY = "the standard library"


class PythonSource(Source):
    """The standard library's files and those in the folders of data.paths; each file is a document."""

    needs_paths = False
    meaning = ("end_of_document", "end_is_target")

    def training_paths(self, paths: list[str]) -> list[str]:
        return [STANDARD_LIBRARY, *paths]

    def parts(self, paths: list[str]) -> list[Part]:
        groups = []
        for path in paths:
            if path == STANDARD_LIBRARY:
                groups.append(_find_files(Path(sysconfig.get_paths()["stdlib"]), SKIPPED_FOLDERS))
                continue
            if not os.path.isdir(path):
                wrong = "must be a folder that holds .py files" if os.path.exists(path) else "does not exist"
                raise UserError(f"{path}: {wrong}")
            added = _find_files(Path(path), {"__pycache__"})
            if not added:
                raise UserError(f"{path}: holds no .py file (names that begin with a dot are not read)")
            groups.append(added)
        parts, seen = [], set()
        for group, files in enumerate(groups):
            new = [file for file in files if file.resolve() not in seen]  # a folder may be inside another
            seen |= {file.resolve() for file in new}
            parts += divide_files(group, [str(file) for file in new])
        return parts

    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        end = self.end_of_document(self.tokenizer.end_of_text)
        if isinstance(self.tokenizer, BytesTokenizer):
            for file in part.files:
                yield self.finish(np.frombuffer(Path(file).read_bytes(), np.uint8), None, end)
            return

        def encode(texts: list[str]) -> list[Document]:
            return [self.finish(tokens, None, end) for tokens in self.tokenizer.encode(texts)]

        yield from batched(map(_read_text, part.files), encode, size=len)


def _read_text(file: str) -> str | BadDocument:
    try:
        with tokenize.open(file) as text:  # in the encoding that its first lines name
            return text.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        return BadDocument(f"is not Python text ({error})")


def _find_files(root: Path, skipped_folders: set[str]) -> list[Path]:
    """The .py files below `root` whose names do not begin with a dot, in an order that depends on names alone."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = visible(set(subfolders) - skipped_folders)
        found += [Path(folder, name) for name in visible(names) if name.endswith(".py")]
    return [file for file in found if file.is_file() and file.stat().st_size > 0]
