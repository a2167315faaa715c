"""Any source to a prepared folder: documents tokenised once, by many processes, safe to kill and start again.

The folder holds tokens.bin (uint16 or uint32), offsets.bin (int64), targets.bin (a bit for each token; absent where all
are targets), counts.bin (int64, how often each token occurs), dropped.txt where documents were dropped, and meta.json
with the checksums of these files. meta.json is written last: a folder that has it is whole. Until then .tidar-parts
holds the finished parts, which the next call reuses.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tidar.config import UserError, print_lines, printable
from tidar.config.files import create_file, file_stamp, open_regular, parse_json, write_atomically
from tidar.config.locks import FileLock
from tidar.config.options import Data
from tidar.data.chat import Chat
from tidar.data.corpus import MOST_META_BYTES, REMEDY, BadDocument, Checksum, Corpus, Document, check_meta
from tidar.data.source import Part, Source, lines_before
from tidar.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
BLOCK_TOKENS = 2**22  # held at a time
PARTS, LOCK = ".tidar-parts", ".tidar-lock"
ARRAYS = ("tokens", "offsets", "targets", "counts")


@dataclass
class Progress:
    """Parts finished, out of all_parts; documents and tokens that this call prepared; seconds since its start."""

    parts: int
    all_parts: int
    documents: int
    tokens: int
    seconds: float


def plan(source: Source, parts: list[Part], paths: list[str]) -> dict[str, Any]:
    """All inputs that determine a prepared folder's content: equal plans give equal folders."""
    options, tokenizer = asdict(source.options), source.tokenizer
    template = str(tokenizer.chat_template) if isinstance(source, Chat) else ""
    files = hashlib.sha256()
    for part in parts:
        files.update(json.dumps([asdict(part), [file_stamp(file) for file in part.files]]).encode())
    return {
        "format": FORMAT,
        "options": {name: options[name] for name in ("source", *source.meaning)},
        "tokenizer": tokenizer and {"sha256": tokenizer.digest, "size": tokenizer.size},
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "paths": paths,
        "files": files.hexdigest(),
    }


def _is_prepared(folder: Path, wanted: dict[str, Any], on_error: str, replaces: bool = False) -> bool:
    """Whether `folder` is complete and has this plan. Raises UserError if it has another plan, unless that is replaced,
    or if documents were dropped and data.on_error = fail.
    """
    try:
        with open_regular(folder / "meta.json") as file:
            meta = parse_json(file.read(MOST_META_BYTES))
        if isinstance(meta, dict) and "sha256" not in meta and "plan" in meta:
            raise UserError(f"{folder}: an earlier version of tidar prepared it, without checksums; {REMEDY}")
        meta = check_meta(meta)
    except (OSError, ValueError):
        return False
    different = [name for name in wanted if meta["plan"].get(name) != wanted[name]]
    if different and replaces:
        print_lines(f"{folder}: was prepared from other inputs ({', '.join(different)}), and is prepared again")
        return False
    if meta["bad_documents"] and on_error == "fail":
        raise UserError(
            f"{folder}: was prepared without {meta['bad_documents']} bad documents, listed in dropped.txt; "
            "data.on_error = skip accepts that"
        )
    if different:
        raise UserError(
            f"{folder}: was prepared from other inputs ({', '.join(different)}); remove it, or choose another folder"
        )
    return True


def prepare(
    source: Source,
    make_source: Callable[[Data, Tokenizer | None], Source],
    paths: list[str],
    folder: Path,
    processes: int,
    report: Callable[[Progress], None],
    replaces: bool = False,
) -> None:
    """Prepares `folder` from the documents at `paths`. Parts that an earlier call finished are reused.

    make_source: makes `source` in another process. Where another process prepares the folder, this one waits for it.
    replaces: a folder that was prepared from other inputs.
    Raises UserError for a bad document if data.on_error is "fail", for a folder with other content, and if the folder
    cannot be written.
    """
    parts = source.parts(paths)
    wanted = plan(source, parts, paths)
    try:
        _refuse_other_content(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK) as lock:
            if not lock.acquire():
                print_lines(f"{folder}: waits for another process that prepares data there", file=sys.stderr)
                lock.acquire(wait=True)
            if lock.warning:
                print_lines(lock.warning, file=sys.stderr)
            if not _is_prepared(folder, wanted, source.options.on_error, replaces):
                for name in ("meta.json", "dropped.txt"):  # the first one says that the folder is whole
                    (folder / name).unlink(missing_ok=True)
                _prepare_parts(source, make_source, parts, wanted, folder / PARTS, processes, report)
                _join_parts(folder, source, parts, wanted)
                # reused parts may have dropped documents, under data.on_error = skip
                _is_prepared(folder, wanted, source.options.on_error)
            shutil.rmtree(folder / PARTS, ignore_errors=True)
    except zipfile.BadZipFile:
        raise UserError(f"{folder / PARTS}: is damaged; remove it and start again") from None
    except OSError as error:
        raise UserError(f"{folder}: the prepared data cannot be written ({error.strerror or error})") from None


def _refuse_other_content(folder: Path) -> None:
    """Raises UserError if the folder is neither empty nor a prepared one."""
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if names and not names & {LOCK, PARTS, "meta.json"}:
            raise UserError(f"{folder}: holds {min(names)}: must be empty, or a folder that was prepared before")


def _prepare_parts(
    source: Source,
    make_source: Callable,
    parts: list[Part],
    wanted: dict[str, Any],
    folder: Path,
    processes: int,
    report: Callable[[Progress], None],
) -> None:
    if not _has_plan(folder, wanted):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_atomically(folder / "plan.json", json.dumps(wanted))
    files = [_part_file(folder, number) for number in range(len(parts))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    started = time.perf_counter()
    progress = Progress(len(parts) - len(missing), len(parts), 0, 0, 0.0)

    def count(result: tuple[int, int]) -> None:
        progress.parts += 1
        progress.documents += result[0]
        progress.tokens += result[1]
        progress.seconds = time.perf_counter() - started
        report(progress)

    jobs = [(parts[number], files[number]) for number in missing]
    if processes == 1 or len(jobs) <= 1:
        for part, file in jobs:
            count(_prepare_part(source, part, file))
        return
    # a fresh interpreter each: a tokenizer's threads do not survive a fork
    tokenizer = source.tokenizer.name if source.tokenizer else None
    initial = (os.getpid(), make_source, source.options, tokenizer, source.vocab_size)
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _start_worker, initial)
    try:
        for result in pool.map(_work, jobs):
            count(result)
    except BrokenProcessPool:
        at_work = sorted({part.files[0] for part, file in jobs if not file.is_file()})[:processes]
        raise UserError(
            f"{folder}: the system ended a process that tokenised {' or '.join(at_work)}, as where memory is short: "
            "start again with fewer processes (tidar.prepare_data --processes); finished parts are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _has_plan(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the parts in `folder` have this plan."""
    try:
        with open_regular(folder / "plan.json") as file:
            return not folder.is_symlink() and parse_json(file.read(MOST_META_BYTES)) == wanted
    except (OSError, ValueError):
        return False


_source: Source


def _start_worker(
    parent: int, make_source: Callable, options: Data, tokenizer: str | None, vocab_size: int | None
) -> None:
    global _source
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _source = make_source(options, load_tokenizer(tokenizer) if tokenizer else None, vocab_size)


def _end_with(parent: int) -> None:
    """Ends this worker once its parent is gone, so that it does not interfere with the workers of the next call."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(job: tuple[Part, Path]) -> tuple[int, int]:
    return _prepare_part(_source, *job)


def _prepare_part(source: Source, part: Part, file: Path) -> tuple[int, int]:
    """Writes a part and returns its numbers of documents and tokens. A large file's tokens are held block by block."""
    n_documents, n_tokens, n_blocks, held_tokens = -source.continues(part), 0, 0, 0
    held: list[Document] = []
    dropped: list[tuple[int, str, bool]] = []
    index = -1

    with _Output(file) as output:
        with zipfile.ZipFile(output.file, "w") as archive:

            def put(name: str, array: Any) -> None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array)

            def flush() -> None:
                nonlocal n_documents, n_tokens, n_blocks, held_tokens
                block = Corpus.of(held)
                put(f"tokens_{n_blocks}", block.tokens)
                put(f"lengths_{n_blocks}", np.diff(block.offsets))
                put(f"targets_{n_blocks}", block.target_bits)
                n_documents, n_tokens, n_blocks = n_documents + len(block), n_tokens + len(block.tokens), n_blocks + 1
                held.clear()
                held_tokens = 0

            for index, document in enumerate(source.documents(part)):
                if isinstance(document, BadDocument):
                    if source.options.on_error == "fail":
                        where = source.place(part, index, 0 if source.continues(part) else lines_before(part))
                        raise UserError(f"{where}: {document}; data.on_error = skip drops it")
                    dropped.append((index, str(document), True))
                elif document is not None and not len(document.tokens) and not source.continues(part):
                    dropped.append((index, "holds no tokens", False))  # not an error
                elif document is not None:
                    held.append(document)
                    held_tokens += len(document.tokens)
                    if held_tokens >= BLOCK_TOKENS:
                        flush()
            flush()
            put("dropped", np.frombuffer(json.dumps(dropped).encode(), np.uint8))
            put("places", np.array(index + 1))
        output.commit()
    return n_documents, n_tokens


def _join_parts(folder: Path, source: Source, parts: list[Part], wanted: dict[str, Any]) -> None:
    """Concatenates the parts, and writes meta.json last."""
    tokenizer = wanted["tokenizer"]
    dtype = np.uint16 if tokenizer and tokenizer["size"] <= 2**16 else np.uint32
    counts = np.zeros(1, np.int64)
    n_documents = n_tokens = n_targets = n_bad = before = 0
    groups = [0] * len(wanted["paths"])
    dropped: list[tuple[str, str]] = []
    left_bits = np.zeros(0, np.uint8)
    damaged = _damaged_texts(folder / PARTS, source, parts)
    for left in folder.glob("*.partial"):  # left by a killed process
        left.unlink()
    with ExitStack() as stack:
        files = {name: stack.enter_context(_Output(folder / f"{name}.bin")) for name in ARRAYS}
        for number, part in enumerate(parts):
            with np.load(_part_file(folder / PARTS, number)) as arrays:
                before = before if part.start else 0
                if damaged.get(number, number) == number:
                    for index, reason, is_bad in json.loads(arrays["dropped"].tobytes()):
                        dropped.append((source.place(part, index, before), reason))
                        n_bad += is_bad
                before += int(arrays["places"])
                if number in damaged:
                    continue
                for block in itertools.count():
                    if f"tokens_{block}" not in arrays:
                        break
                    tokens, lengths = arrays[f"tokens_{block}"], arrays[f"lengths_{block}"].astype(np.int64)
                    starts = n_tokens + np.cumsum(lengths) - lengths
                    if block == 0 and source.continues(part):
                        starts = starts[1:]
                    files["tokens"].write(tokens.astype(dtype))
                    files["offsets"].write(starts)
                    bits = np.unpackbits(arrays[f"targets_{block}"])[: len(tokens)]
                    n_targets += int(bits.sum())
                    bits = np.concatenate([left_bits, bits])
                    whole = len(bits) // 8 * 8
                    files["targets"].write(np.packbits(bits[:whole]))
                    left_bits = bits[whole:]
                    found = np.bincount(tokens, minlength=len(counts))
                    counts = np.pad(counts, (0, len(found) - len(counts))) + found
                    n_tokens += len(tokens)
                    n_documents += len(starts)
                    groups[part.group] += len(starts)
        files["offsets"].write(np.array([n_tokens], np.int64))
        files["targets"].write(np.packbits(left_bits))
        files["counts"].write(counts)
        if n_targets == n_tokens:
            files.pop("targets")
            (folder / "targets.bin").unlink(missing_ok=True)
        for file in files.values():
            file.commit()
    if dropped:
        lines = [printable(f"{where}: {reason}") + "\n" for where, reason in dropped]
        write_atomically(folder / "dropped.txt", "".join(lines))
    used = np.flatnonzero(counts)
    reasons = dict(sorted(Counter(reason for _, reason in dropped).items(), key=lambda item: (-item[1], item[0]))[:20])
    if sum(reasons.values()) < len(dropped):
        reasons["others"] = len(dropped) - sum(reasons.values())
    meta = {
        "source": wanted["options"]["source"],
        "tokenizer": tokenizer and {"name": source.tokenizer.name, **tokenizer},
        "dtype": np.dtype(dtype).name,
        "documents": n_documents,
        "tokens": n_tokens,
        "target_tokens": n_targets,
        "smallest_id": int(used[0]) if len(used) else 0,
        "largest_id": len(counts) - 1,
        "dropped": len(dropped),
        "bad_documents": n_bad,
        "dropped_reasons": reasons,
        "paths": [{"path": path, "documents": n} for path, n in zip(wanted["paths"], groups)],
        "sha256": {name: file.checksum.hexdigest() for name, file in files.items()},
        "plan": wanted,
    }
    write_atomically(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


def _damaged_texts(folder: Path, source: Source, parts: list[Part]) -> dict[int, int]:
    """Parts of texts that span several parts, one of them bad: part number -> number of the text's first bad part."""
    heads: list[int] = []
    for number, part in enumerate(parts):
        heads.append(heads[-1] if source.continues(part) else number)
    sizes = Counter(heads)
    bad: dict[int, int] = {}
    for number, head in enumerate(heads):
        if sizes[head] > 1 and head not in bad:
            with np.load(_part_file(folder, number)) as arrays:
                if json.loads(arrays["dropped"].tobytes()):
                    bad[head] = number
    return {number: bad[head] for number, head in enumerate(heads) if head in bad}


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"


class _Output:
    """A file that appears at `path` only on `commit`, complete. checksum: of the bytes written."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self.partial.unlink(missing_ok=True)
        self.file = create_file(self.partial)
        self.checksum = Checksum()

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        self.file.write(data)
        self.checksum.update(data)

    def commit(self) -> None:
        """Flushes the file to the disk and renames it to `path`."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.partial, self.path)

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk fails the flush again
            self.file.close()
        self.partial.unlink(missing_ok=True)
