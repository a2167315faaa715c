"""What makes a checkpoint whole: manifest.json, a list of its files with their sizes and checksums, is written last.

This is the reading side; `tidar.training.checkpoint.manifest` writes. A manifest may be a stranger's: nothing in it is
used before its type, its range and its place in the folder are checked.
"""

import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tidar.config import UserError
from tidar.config.files import open_regular, parse_json
from tidar.models.huggingface.checkpoint_files import METADATA, parse_metadata

NAME = "manifest.json"
CHUNK = 2**22
# types of what a manifest may say about its run, where code depends on them
ABOUT_TYPES = {
    "samples": (int,),
    "tokens": (int,),
    "steps": (int,),
    "seconds": (float, int),
    "val_loss": (float, type(None)),
    "compared": (dict,),
    "options": (dict,),
}


def checksum(path: Path) -> str:
    """SHA-256 of a file's content. Raises OSError, also for what is not a regular file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, which the manifest itself holds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved_steps(run: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder by their step, ascending, whole or not."""
    paths = {path.name[5:]: path for path in run.glob("checkpoint/step-*")}
    steps = {int(number): path for number, path in paths.items() if re.fullmatch("0|[1-9][0-9]{0,17}", number)}
    return dict(sorted(steps.items()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: "files", [size, SHA-256] by name, and "about", what it says of its run.

    Raises ValueError where there is none, it is damaged, or it holds anything that no checkpoint of this trainer has.
    """
    try:
        with open_regular(folder / NAME) as file:
            content = parse_json(file.read())
        if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("files", "about")):
            raise ValueError("it does not list files")
        expected = content.pop("checksum", None)
        if expected != content_checksum(content):
            raise ValueError("it is altered")
        for name, entry in content["files"].items():
            _check_entry(name, entry)
        for key, types in ABOUT_TYPES.items():
            value = content["about"].get(key, ...)
            if value is not ... and type(value) not in types:
                raise ValueError(f"{key} is {json.dumps(value)[:40]}")
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{NAME} cannot be read ({reason})") from None
    return content


def find_problem(folder: Path, rank: int = 0, n_ranks: int = 1, threads: int = 4) -> str | None:
    """Why a checkpoint is not whole, None if it is. Reads all of its files.

    rank, n_ranks: ranks that share the reading each hash their part of the files; the checkpoint is whole where none
    of them finds a problem.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    if problem := _irregular_entry(folder):
        return problem

    def file_problem(name: str) -> str | None:
        path, (size, expected) = folder / name, files[name]
        try:
            found = path.lstat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            return f"{name} is altered" if checksum(path) != expected else None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ValueError as error:  # a name that no file can have
            return f"{json.dumps(name)} cannot be read ({error})"

    with ThreadPoolExecutor(threads) as pool:
        problem = next(filter(None, pool.map(file_problem, list(files)[rank::n_ranks])), None)
    return problem or _unverified_data(folder, files)


def check_whole(folder: Path, origin: str) -> None:
    """Raises UserError, with `origin` before it, where a checkpoint is not as its manifest says. Reads all of it."""
    if problem := find_problem(folder):
        raise UserError(f"{origin}: is not whole: {problem}")


def _check_entry(name: str, entry: Any) -> None:
    """Raises ValueError unless this is a name inside the folder with [size, SHA-256]."""
    parts = name.split("/")
    if not name or name == NAME or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise ValueError(f"{json.dumps(name)} is no name of its files")
    if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and entry[0] >= 0):
        raise ValueError(f"{json.dumps(name)} has no size")
    if not (isinstance(entry[1], str) and re.fullmatch("[0-9a-f]{64}", entry[1])):
        raise ValueError(f"{json.dumps(name)} has no checksum")


def _irregular_entry(folder: Path) -> str | None:
    """The first link or special file in a folder and those below it: it could stand for anything outside."""

    def fail(error: OSError) -> None:
        raise error

    try:
        for place, folders, files in os.walk(folder, onerror=fail):
            for name in sorted(folders + files):
                path = Path(place, name)
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    return f"{path.relative_to(folder)} is a link, a device or a pipe"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _unverified_data(folder: Path, files: dict[str, Any]) -> str | None:
    """A problem with a file of the metadata that the manifest does not list; None where it lists all."""
    try:
        metadata = parse_metadata(folder)
    except OSError as error:
        return f"{METADATA} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{METADATA} {error}"
    used = {METADATA} | {info.relative_path for info in metadata.storage_data.values()}
    return next((f"{name} is not in {NAME}" for name in sorted(used - files.keys())), None)
