"""The files of a checkpoint, written by all ranks together: tensors in DCP's format, the manifest, the name."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from tidar.models.huggingface import ASSETS
from tidar.training.checkpoint.manifest import describe, file_names, flush_folder, write_manifest

T = TypeVar("T")


class SaveError(Exception):
    """A checkpoint could not be written; all ranks raise it. Its text is the cause."""


class CheckpointWriter:
    """Writes step folders: `write` beside the final name, then `commit` under it. All ranks call both."""

    def __init__(self, folder: Path, rank: int, group: dist.ProcessGroup, threads: int):
        """folder: of the checkpoints. group: of all ranks, on the CPU, used by one thread at a time. threads: that
        write and read at one time on this rank.
        """
        self.folder = folder
        self.rank = rank
        self.group = group
        self.threads = threads

    def write(
        self, step: int, live: dict[str, Tensor], staged: dict[str, Tensor], write_assets: Callable[[Path], None]
    ) -> dict[str, list]:
        """Writes step-<step>.partial and flushes it. What `describe` says of its files, of all ranks.

        live: the tensors by name, as they are sharded; staged: this rank's values of them. Raises SaveError.
        """
        partial = self._partial(step)
        self.together(lambda: self.rank == 0 and self._make_room(partial))
        writer = _Writer(partial, self.threads, on_host=not any(tensor.is_cuda for tensor in staged.values()))
        try:
            dcp.save(live, storage_writer=writer, planner=_StagedPlanner(staged), process_group=self.group)
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise SaveError(
                error_text(cause) + (f" (rank {rank})" if dist.get_world_size(self.group) > 1 else "")
            ) from None

        def finish() -> dict[str, list]:
            if self.rank == 0:
                write_assets(partial / ASSETS)
            # each rank vouches for the files that DCP has let it write, rank 0 for the others too
            names = [
                name
                for name in file_names(partial)
                if name.startswith(f"__{self.rank}_") or (self.rank == 0 and not name.startswith("__"))
            ]
            return describe(partial, names, self.threads)

        return {name: found for part in self.together(finish) for name, found in part.items()}

    def commit(self, step: int, files: dict[str, list], about: dict[str, Any]) -> None:
        """Writes the manifest, then gives the folder its name. Raises SaveError."""
        partial, final = self._partial(step), self.folder / f"step-{step}"

        def name_it() -> None:
            if self.rank == 0:
                write_manifest(partial, files, {"step": step} | about)
                # one of that step is there where it was not whole, or was gone on from no more
                replaced = final.with_name(f"{final.name}.replaced")
                if final.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                    os.replace(final, replaced)
                os.replace(partial, final)
                flush_folder(self.folder)
                shutil.rmtree(replaced, ignore_errors=True)

        self.together(name_it)

    def clean_up(self) -> None:
        """Removes what a killed run has left half written or half removed, and gives back a name that one had taken
        away to replace what bore it. For rank 0.
        """
        for path in self.folder.glob("step-*.replaced"):
            if not path.with_suffix("").exists():
                os.replace(path, path.with_suffix(""))
        for pattern in ("step-*.partial", "step-*.removed", "step-*.replaced"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def give_up(self, step: int) -> None:
        """Frees the space of what could not be written."""
        if self.rank == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)

    def together(self, action: Callable[[], T]) -> list[T]:
        """What the action returns, of each rank. Raises SaveError on all of them where it cannot be done on one."""
        try:
            mine = (action(), None)
        except Exception as error:  # of whatever kind: the other ranks wait
            mine = (None, error_text(error))
        parts: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, mine, group=self.group)
        problems = [f"{problem} (rank {rank})" for rank, (_, problem) in enumerate(parts) if problem]
        if problems:
            raise SaveError(problems[0] if len(parts) > 1 else parts[0][1])
        return [value for value, _ in parts]

    def _make_room(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            flush_folder(folder)

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step}.partial"


def remove_folder(path: Path) -> None:
    """Takes the name away first, so that what bears it is never half removed. Raises OSError where that fails."""
    doomed = path.with_name(f"{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans by the tensors as they are sharded, and writes the values that were staged."""

    def __init__(self, staged: dict[str, Tensor]):
        super().__init__()
        self.staged = staged

    def lookup_object(self, index: Any) -> Any:
        return self.staged[index.fqn]


class _Stream:
    """A file that keeps the errors of its writes: torch.save raises others in their place."""

    def __init__(self, file: Any, errors: list[Exception]):
        self.file, self.errors = file, errors

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.errors.append(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _FileSystem(FileSystem):
    """Keeps the errors of streams: DCP's own writing threads drop theirs, and the checkpoint seems to be whole."""

    def __init__(self):
        super().__init__()
        self.errors: list[Exception] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        try:
            with super().create_stream(path, mode) as stream:
                yield _Stream(stream, self.errors)
        except Exception as error:
            self.errors.append(error)


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path, threads: int, on_host: bool):
        """on_host: nothing is on a GPU, where the writing thread would have streams to choose."""
        super().__init__(path, thread_count=threads, **({"per_thread_copy_ahead": 0} if on_host else {}))
        self.fs = _FileSystem()

    def write_data(self, plan: Any, planner: Any) -> Any:
        return self._checked(super().write_data, plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        self._checked(super().finish, metadata, results)

    def _checked(self, method: Callable, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        finally:
            if self.fs.errors:
                raise self.fs.errors[0]


def error_text(error: BaseException) -> str:
    """The cause of an error in one line: what the operating system says, where it had a part in it."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}{f', {cause.filename}' if cause.filename else ''}"
    return (str(error).splitlines() or [type(error).__name__])[0]
