"""What makes a checkpoint whole: a list of its files with their sizes and checksums, written last."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tidar.config import UserError

NAME = "manifest.json"
CHUNK = 2**22


def checksum(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def saved_steps(run: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder by their step, ascending, whole or not."""
    paths = {int(path.name[5:]): path for path in run.glob("checkpoint/step-*") if path.name[5:].isdigit()}
    return dict(sorted(paths.items()))


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
    """Writes it, and flushes the folders. files: see `describe`. about: what else is to be known of the checkpoint."""
    content = {"files": files, "about": about}
    text = json.dumps(content | {"checksum": _content_checksum(content)}, indent=1)
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for path in {folder, *(folder / name for name in files)}:
        flush_folder(path if path.is_dir() else path.parent)


def flush_folder(folder: Path) -> None:
    """Which names a folder holds is on the disk when it returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError where there is none or it is damaged."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        expected = content.pop("checksum")
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{NAME} cannot be read ({error})") from None
    if expected != _content_checksum(content):
        raise ValueError(f"{NAME} is altered")
    return content


def check_files(folder: Path, files: dict[str, list], threads: int = 1) -> str | None:
    """What is wrong with the first of these files that is not as described, None where all are."""

    def problem(name: str) -> str | None:
        path, (size, expected) = folder / name, files[name]
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            return f"{name} is altered" if checksum(path) != expected else None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(threads) as pool:
        return next(filter(None, pool.map(problem, files)), None)


def check_whole(folder: Path, origin: str) -> None:
    """Raises UserError, with `origin` before it, where a checkpoint is not as its manifest says. Reads all of it."""
    try:
        problem = check_files(folder, read_manifest(folder)["files"], threads=4)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UserError(f"{origin}: is not whole: {problem}")


def _content_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
