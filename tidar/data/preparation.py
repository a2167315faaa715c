"""Any source to a prepared folder: documents tokenised once, by many processes, safe to kill and start again.

The folder holds tokens.bin (uint16 or uint32), offsets.bin (int64), targets.bin (a bit for each token; absent where all
are targets), counts.bin (int64, how often each token occurs), dropped.txt where documents were left out, and meta.json,
which is written last: a folder that has it is whole. Until then finished parts lie in .tidar-parts and are not made
again.
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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tidar.config import UserError, print_lines, printable
from tidar.config.locks import FileLock
from tidar.config.options import Data
from tidar.data.chat import Chat
from tidar.data.corpus import BadDocument, Corpus, Document
from tidar.data.source import Part, Source, lines_before
from tidar.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
BLOCK_TOKENS = 2**22  # held at one time
PARTS, LOCK = ".tidar-parts", ".tidar-lock"


@dataclass
class Progress:
    """What has been prepared by now: parts of all, documents, tokens; seconds since the start."""

    parts: int
    all_parts: int
    documents: int
    tokens: int
    seconds: float


def plan(source: Source, parts: list[Part], paths: list[str]) -> dict[str, Any]:
    """What a prepared folder is made from. Two equal plans give equal folders."""
    options = asdict(source.options)
    tokenizer = source.tokenizer
    template = str(tokenizer.chat_template) if isinstance(source, Chat) else ""
    files = hashlib.sha256()
    for part in parts:
        files.update(json.dumps([asdict(part), [_stamp(file) for file in part.files]]).encode())
    return {
        "format": FORMAT,
        "options": {name: options[name] for name in ("source", *source.meaning)},
        "tokenizer": tokenizer and {"sha256": tokenizer.digest, "size": tokenizer.size},
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "paths": paths,
        "files": files.hexdigest(),
    }


def _stamp(file: str) -> list[int]:
    try:
        stat = os.stat(file)
        return [stat.st_size, stat.st_mtime_ns]
    except OSError:
        return []  # who reads it says so


def _is_prepared(folder: Path, wanted: dict[str, Any], on_error: str) -> bool:
    """Whether `folder` is whole and made by this plan.

    Raises UserError where it is whole and made by another, or without documents that data.on_error does not forgive.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = meta["plan"]
    except (OSError, ValueError, KeyError):
        return False
    if meta["bad_documents"] and on_error == "fail":
        raise UserError(
            f"{folder}: was prepared without {meta['bad_documents']} bad documents, listed in dropped.txt; "
            "data.on_error = skip accepts that"
        )
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise UserError(
            f"{folder}: was prepared from other {' and '.join(different)}; remove it, or choose another folder"
        )
    return True


def prepare(
    source: Source,
    make_source: Callable[[Data, Tokenizer | None], Source],
    paths: list[str],
    folder: Path,
    processes: int,
    report: Callable[[Progress], None],
) -> None:
    """Makes `folder` from the documents at `paths`, or what is missing of it.

    make_source: makes `source` anew in another process. Where another process is at work in the folder, it is waited
    for. Raises UserError for a document that cannot be used where data.on_error is "fail", and for a folder that holds
    something else.
    """
    parts = source.parts(paths)
    wanted = plan(source, parts, paths)
    _refuse_other_content(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK) as lock:
        if not lock.acquire():
            print_lines(f"{folder}: waits for another process that prepares data there", file=sys.stderr)
            lock.acquire(wait=True)
        if lock.warning:
            print_lines(lock.warning, file=sys.stderr)
        if not _is_prepared(folder, wanted, source.options.on_error):
            _prepare_parts(source, make_source, parts, wanted, folder / PARTS, processes, report)
            _join_parts(folder, source, parts, wanted)
            # parts that a call with data.on_error = skip has left may lack documents
            _is_prepared(folder, wanted, source.options.on_error)
        shutil.rmtree(folder / PARTS, ignore_errors=True)


def _refuse_other_content(folder: Path) -> None:
    """Raises UserError for a folder that holds what no preparation has put there."""
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
    plan_file = folder / "plan.json"
    if not plan_file.is_file() or json.loads(plan_file.read_text(encoding="utf-8") or "null") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _write(plan_file, lambda file: file.write(json.dumps(wanted).encode()))
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
        raise UserError(f"{folder}: a process that prepares data there has died; start again to go on") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_source: Source


def _start_worker(
    parent: int, make_source: Callable, options: Data, tokenizer: str | None, vocab_size: int | None
) -> None:
    global _source
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _source = make_source(options, load_tokenizer(tokenizer) if tokenizer else None, vocab_size)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would go on beside those of the next call."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(job: tuple[Part, Path]) -> tuple[int, int]:
    return _prepare_part(_source, *job)


def _prepare_part(source: Source, part: Part, file: Path) -> tuple[int, int]:
    """Writes a part and returns its numbers of documents and tokens. A large file's tokens are held block by block."""
    n_documents = n_tokens = n_blocks = held_tokens = 0
    held: list[Document] = []
    dropped: list[tuple[int, str, bool]] = []
    index = -1

    def write(stream: BinaryIO) -> None:
        nonlocal n_documents, n_tokens, n_blocks, held_tokens, index
        with zipfile.ZipFile(stream, "w") as archive:

            def put(name: str, array: np.ndarray) -> None:
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
                        place = source.place(part, index, lines_before(part))
                        raise UserError(f"{place}: {document}; data.on_error = skip would leave it out")
                    dropped.append((index, str(document), True))
                elif document is not None and not len(document.tokens):
                    dropped.append((index, "holds no tokens", False))  # nothing that could be mended
                elif document is not None:
                    held.append(document)
                    held_tokens += len(document.tokens)
                    if held_tokens >= BLOCK_TOKENS:
                        flush()
            flush()
            put("dropped", np.frombuffer(json.dumps(dropped).encode(), np.uint8))
            put("places", np.array(index + 1))

    _write(file, write)
    return n_documents, n_tokens


def _join_parts(folder: Path, source: Source, parts: list[Part], wanted: dict[str, Any]) -> None:
    """Puts the parts one behind the other, and writes meta.json last."""
    tokenizer = wanted["tokenizer"]
    dtype = np.uint16 if tokenizer and tokenizer["size"] <= 2**16 else np.uint32
    names = ("tokens", "offsets", "targets")
    files = {name: open(folder / f"{name}.bin.partial", "wb") for name in names}  # noqa: SIM115
    counts = np.zeros(1, np.int64)
    n_documents = n_tokens = n_targets = 0
    groups = [0] * len(wanted["paths"])
    dropped: list[tuple[str, str]] = []
    n_bad = before = 0
    left_bits = np.zeros(0, np.uint8)
    files["offsets"].write(np.zeros(1, np.int64).tobytes())
    for number, part in enumerate(parts):
        with np.load(_part_file(folder / PARTS, number)) as arrays:
            before = before if part.start else 0
            for index, reason, is_bad in json.loads(arrays["dropped"].tobytes()):
                dropped.append((source.place(part, index, before), reason))
                n_bad += is_bad
            before += int(arrays["places"])
            for block in itertools.count():
                if f"tokens_{block}" not in arrays:
                    break
                tokens, lengths = arrays[f"tokens_{block}"], arrays[f"lengths_{block}"]
                files["tokens"].write(tokens.astype(dtype).tobytes())
                files["offsets"].write((n_tokens + np.cumsum(lengths)).astype(np.int64).tobytes())
                bits = np.unpackbits(arrays[f"targets_{block}"])[: len(tokens)]
                n_targets += int(bits.sum())
                bits = np.concatenate([left_bits, bits])
                whole = len(bits) // 8 * 8
                files["targets"].write(np.packbits(bits[:whole]).tobytes())
                left_bits = bits[whole:]
                found = np.bincount(tokens, minlength=len(counts))
                counts = np.pad(counts, (0, len(found) - len(counts))) + found
                n_tokens += len(tokens)
                n_documents += len(lengths)
                groups[part.group] += len(lengths)
    files["targets"].write(np.packbits(left_bits).tobytes())
    for name, file in files.items():
        _close(file)
        if name == "targets" and n_targets == n_tokens:
            (folder / "targets.bin.partial").unlink()
            (folder / "targets.bin").unlink(missing_ok=True)
        else:
            os.replace(folder / f"{name}.bin.partial", folder / f"{name}.bin")
    _write(folder / "counts.bin", lambda file: file.write(counts.tobytes()))
    if dropped:
        lines = "".join(printable(f"{place}: {reason}") + "\n" for place, reason in dropped)
        _write(folder / "dropped.txt", lambda file: file.write(lines.encode()))
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
        "plan": wanted,
    }
    _write(folder / "meta.json", lambda file: file.write((json.dumps(meta, indent=2) + "\n").encode()))


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is whole or not there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    file = open(partial, "wb")  # noqa: SIM115
    write(file)
    _close(file)
    os.replace(partial, path)


def _close(file: BinaryIO) -> None:
    """Closes a file that is on the disk then."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
