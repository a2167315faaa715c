"""The embedded corpus: the Python files of the running interpreter's standard library, byte by byte.

Real text on every machine, without a download. A token is a byte; 256 ends a document.
"""

import os
import sysconfig
from pathlib import Path

import torch

from tidar.config import UserError
from tidar.data.corpus import Corpus, Vocabulary

END_OF_DOCUMENT = 256
VOCABULARY = Vocabulary(size=257, padding_token_id=END_OF_DOCUMENT)

# installed packages are not the standard library, and test suites are there on some systems only
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT_EVERY = 100


def load(paths: list[str]) -> tuple[Corpus, Corpus]:
    """Training and held-out documents: the standard library's files and those below `paths`, one in a hundred held out.

    Raises UserError for a path that is no folder, holds no .py file or cannot be read.
    """
    files = _find_files(Path(sysconfig.get_paths()["stdlib"]), SKIPPED_FOLDERS)
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"data.paths: {path}: must be a folder that holds .py files")
        added = _find_files(Path(path), {"__pycache__"})
        if not added:
            raise UserError(f"data.paths: {path}: holds no .py file")
        files += added
    files = list({file.resolve(): file for file in files}.values())  # folders may lie in each other
    # counted from the end of each hundred, so that a corpus of fewer files still trains on some
    held_out = files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [file for i, file in enumerate(files) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return _tokenize(training), _tokenize(held_out)


def _find_files(root: Path, skipped_folders: set[str]) -> list[Path]:
    """The .py files below `root`, in an order that depends on their names alone."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped_folders)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return [file for file in found if file.is_file() and file.stat().st_size > 0]


def _tokenize(files: list[Path]) -> Corpus:
    documents = []
    for file in files:
        try:
            content = bytearray(file.read_bytes())
        except OSError as error:
            raise UserError(f"data.paths: {file}: cannot be read ({error.strerror})") from None
        documents.append(torch.frombuffer(content, dtype=torch.uint8).to(torch.int16))
        documents.append(torch.tensor([END_OF_DOCUMENT], dtype=torch.int16))
    lengths = torch.tensor([0] + [len(document) + 1 for document in documents[::2]])
    # torch.cat takes no empty list
    tokens = torch.cat([torch.empty(0, dtype=torch.int16), *documents])
    return Corpus(tokens, offsets=lengths.cumsum(0))
