"""Writes the files of a checkpoint on all ranks: tensors in DCP's format, the manifest, the final name."""

import os
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
from tidar.training.checkpoint.retention import remove_tree

T = TypeVar("T")


class SaveError(Exception):
    """A checkpoint could not be written. All ranks raise it; its text is the cause."""


class CheckpointWriter:
    """Writes step folders: `write` beside the final name, then `commit` under it. All ranks call both."""

    def __init__(self, folder: Path, rank: int, group: dist.ProcessGroup, threads: int):
        """folder: that holds the checkpoints. group: of all ranks, on the CPU, used by one thread at a time. threads:
        number of threads that read and write on this rank.
        """
        self.folder = folder
        self.rank = rank
        self.group = group
        self.threads = threads

    def write(
        self, step: int, live: dict[str, Tensor], staged: dict[str, Tensor], write_assets: Callable[[Path], None]
    ) -> dict[str, list]:
        """Writes step-<step>.partial and flushes it. Returns `describe` of the files of all ranks.

        live: the tensors by name, sharded; staged: the values of this rank's shards. Raises SaveError.
        """
        partial = self._partial(step)
        self._on_all_ranks(lambda: self._make_room(partial) if self.rank == 0 else None)
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
            # each rank describes the files that DCP has let it write, rank 0 the other files too
            names = [
                name
                for name in file_names(partial)
                if name.startswith(f"__{self.rank}_") or (self.rank == 0 and not name.startswith("__"))
            ]
            return describe(partial, names, self.threads)

        return {name: found for part in self._on_all_ranks(finish) for name, found in part.items()}

    def commit(self, step: int, files: dict[str, list], about: dict[str, Any]) -> None:
        """Writes the manifest, then gives the folder its name. Raises SaveError."""
        partial, final = self._partial(step), self.folder / f"step-{step}"

        def rename() -> None:
            if self.rank == 0:
                write_manifest(partial, files, {"step": step} | about)
                # a folder of that step exists where it was damaged, or where the run has resumed from an earlier one
                replaced = final.with_name(f"{final.name}.replaced")
                if final.exists():
                    remove_tree(replaced)
                    os.replace(final, replaced)
                os.replace(partial, final)
                flush_folder(self.folder)
                remove_tree(replaced)

        self._on_all_ranks(rename)

    def clean_up(self) -> None:
        """Removes what a killed run has left half written or half removed. A checkpoint that was about to be replaced
        gets its name back. For rank 0.
        """
        for path in self.folder.glob("step-*.replaced"):
            if not path.with_suffix("").exists():
                os.replace(path, path.with_suffix(""))
        for pattern in ("step-*.partial", "step-*.removed", "step-*.replaced"):
            for path in self.folder.glob(pattern):
                remove_tree(path)

    def discard(self, step: int) -> None:
        """Removes a checkpoint that could not be written."""
        if self.rank == 0:
            remove_tree(self._partial(step))

    def _on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on each rank and returns all results. Raises SaveError on all ranks where one fails."""
        try:
            mine: tuple[Any, str | None] = (action(), None)
        except Exception as error:  # any: the other ranks wait for this one's result
            mine = (None, error_text(error))
        parts: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, mine, group=self.group)
        problems = [f"{problem} (rank {rank})" for rank, (_, problem) in enumerate(parts) if problem]
        if problems:
            raise SaveError(problems[0] if len(parts) > 1 else parts[0][1])
        return [value for value, _ in parts]

    def _make_room(self, partial: Path) -> None:
        remove_tree(partial)
        partial.mkdir(parents=True)
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            flush_folder(folder)

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step}.partial"


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans with the sharded tensors, and writes the staged values."""

    def __init__(self, staged: dict[str, Tensor]):
        super().__init__()
        self.staged = staged

    def lookup_object(self, index: Any) -> Any:
        return self.staged[index.fqn]


class _Stream:
    """A file that records the errors of its writes: torch.save replaces them by others."""

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
    """Records the errors of streams: DCP's writing threads drop them, and the checkpoint would seem to be whole."""

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
        """on_host: no tensor is on a GPU, so DCP needs no CUDA stream to copy from."""
        options: dict[str, Any] = {"per_thread_copy_ahead": 0} if on_host else {}
        super().__init__(path, thread_count=threads, **options)
        self.fs: Any = _FileSystem()

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
    """The cause of an error in one line: the operating system's error where there is one in its chain."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}{f', {cause.filename}' if cause.filename else ''}"
    return (str(error).splitlines() or [type(error).__name__])[0]
