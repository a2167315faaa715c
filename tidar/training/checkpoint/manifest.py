"""Writes manifest.json, which makes a checkpoint whole; `tidar.models.huggingface.manifest` reads it."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tidar.config.files import write_atomically
from tidar.models.huggingface.manifest import NAME, checksum, content_checksum


def describe(folder: Path, names: Iterable[str], threads: int = 1) -> dict[str, list]:
    """Size and checksum of files of a folder, by name; all that they hold is on the disk when it returns."""

    def one(name: str) -> tuple[str, list]:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        return name, [(folder / name).stat().st_size, checksum(folder / name)]

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(one, names))


def file_names(folder: Path) -> list[str]:
    """All files in a folder and those below it but its manifest, in order."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.as_posix() != NAME)


def write_manifest(folder: Path, files: dict[str, list], about: dict[str, Any]) -> None:
    """Writes it, and flushes the folders. files: see `describe`. about: a description of the checkpoint and its run."""
    content = {"files": files, "about": about}
    text = json.dumps(content | {"checksum": content_checksum(content)}, indent=1)
    write_atomically(folder / NAME, text)
    for path in {folder, *(folder / name for name in files)}:
        flush_folder(path if path.is_dir() else path.parent)


def flush_folder(folder: Path) -> None:
    """The names that a folder holds are on the disk when it returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
