"""Writes a checkpoint from all ranks: tensors in DCP's format, then the manifest, then the rename to step-<step>."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from tidar.config import first_line
from tidar.models.huggingface import ASSETS
from tidar.training.checkpoint.manifest import describe, file_names, flush_folder, write_manifest
from tidar.training.checkpoint.retention import remove_tree
from tidar.training.checkpoint.state import Blocks

T = TypeVar("T")


class SaveError(Exception):
    """A checkpoint could not be written. All ranks raise it with the same text, the cause of the first failure."""


class CheckpointWriter:
    """Writes checkpoints in two phases: `write` fills step-<step>.partial, `commit` renames it to step-<step>.

    All ranks call both, in the same order.
    """

    def __init__(self, folder: Path, rank: int, group: dist.ProcessGroup, threads: int):
        """folder: the parent of the step folders. group: CPU process group of all ranks; only one thread may use it at
        a time. threads: number of threads that write and checksum files on this rank.
        """
        self.folder = folder
        self.rank = rank
        self.group = group
        self.threads = threads

    def write(
        self, step: int, live: dict[str, Any], staged: dict[str, Tensor], write_assets: Callable[[Path], None]
    ) -> dict[str, list]:
        """Writes step-<step>.partial and flushes it to the disk. Returns what `describe` returns, for the files of all
        ranks.

        live: the state by name, as the run's sharded tensors; DCP reads only their layout. staged: by the same names,
        copies of this rank's shards; DCP writes their values. write_assets: writes config and tokenizer into a folder.
        Raises SaveError.
        """
        partial = self._partial(step)
        self._on_all_ranks(lambda: self._create_empty(partial) if self.rank == 0 else None)
        writer = _Writer(partial, self.threads, on_host=not any(tensor.is_cuda for tensor in staged.values()))
        try:
            dcp.save(live, storage_writer=writer, planner=_StagedPlanner(live, staged), process_group=self.group)
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise SaveError(
                error_text(cause) + (f" (rank {rank})" if dist.get_world_size(self.group) > 1 else "")
            ) from None

        def finish() -> dict[str, list]:
            if self.rank == 0:
                write_assets(partial / ASSETS)
            # DCP names a rank's files __<rank>_*; rank 0 also describes the files that are not DCP's data
            names = [
                name
                for name in file_names(partial)
                if name.startswith(f"__{self.rank}_") or (self.rank == 0 and not name.startswith("__"))
            ]
            return describe(partial, names, self.threads)

        return {name: found for part in self._on_all_ranks(finish) for name, found in part.items()}

    def commit(self, step: int, files: dict[str, list], about: dict[str, Any]) -> None:
        """Writes the manifest, then renames step-<step>.partial to step-<step>. Raises SaveError.

        files: from `write`. about: further entries of the manifest's "about".
        """
        partial, final = self._partial(step), self.folder / f"step-{step}"

        def rename() -> None:
            if self.rank == 0:
                write_manifest(partial, files, {"step": step} | about)
                # the folder exists if that checkpoint is damaged, or if the run resumed from an earlier step
                replaced = final.with_name(f"{final.name}.replaced")
                if final.exists():
                    remove_tree(replaced)
                    os.replace(final, replaced)
                os.replace(partial, final)
                flush_folder(self.folder)
                remove_tree(replaced)

        self._on_all_ranks(rename)

    def clean_up(self) -> None:
        """Removes partial folders that a killed run left. If the run was killed while it replaced a checkpoint, the old
        one gets its name back. Only rank 0 calls it.
        """
        for path in self.folder.glob("step-*.replaced"):
            if not path.with_suffix("").exists():
                os.replace(path, path.with_suffix(""))
        for pattern in ("step-*.partial", "step-*.removed", "step-*.replaced"):
            for path in self.folder.glob(pattern):
                remove_tree(path)

    def discard(self, step: int) -> None:
        """Removes step-<step>.partial after a failed `write` or `commit`. All ranks may call it; rank 0 acts."""
        if self.rank == 0:
            remove_tree(self._partial(step))

    def _on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on each rank; returns the results of all ranks. If it fails on one, all raise SaveError."""
        try:
            mine: tuple[Any, str | None] = (action(), None)
        except Exception as error:  # of any kind, because the other ranks wait in the all-gather below
            mine = (None, error_text(error))
        parts: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, mine, group=self.group)
        problems = [f"{problem} (rank {rank})" for rank, (_, problem) in enumerate(parts) if problem]
        if problems:
            raise SaveError(problems[0] if len(parts) > 1 else parts[0][1])
        return [value for value, _ in parts]

    def _create_empty(self, partial: Path) -> None:
        remove_tree(partial)
        partial.mkdir(parents=True)
        for folder in (self.folder, self.folder.parent):
            flush_folder(folder)
        with suppress(OSError):  # the folder that holds the run's may be one that only others can read
            flush_folder(self.folder.parent.parent)

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step}.partial"


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans from the run's sharded tensors, but writes the values of the staged copies."""

    def __init__(self, live: dict[str, Any], staged: dict[str, Tensor]):
        super().__init__()
        self.live, self.staged = live, staged

    def lookup_object(self, index: Any) -> Any:
        live, staged = self.live[index.fqn], self.staged[index.fqn]
        return staged[live.rows[index.offset]] if isinstance(live, Blocks) else staged


class _Stream:
    """A file that records OSErrors of its writes, because torch.save raises other errors in their stead."""

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
    """Records errors of its streams. DCP's writer threads drop them, so that a failed save would look successful."""

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
    """Raises the first error that its file system recorded."""

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
    return first_line(error)
