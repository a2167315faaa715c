"""Any source to a prepared folder: documents tokenised once, by many processes, safe to kill and start again.

The folder holds tokens.bin (uint16 or uint32), offsets.bin (int64), targets.bin (a bit for each token; absent where all
are targets), counts.bin (int64, how often each token occurs), dropped.txt where documents were left out, and meta.json,
which is written last: a folder that has it is whole. Until then finished parts lie in parts/ and are not made again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tidar.config import UserError
from tidar.config.options import Data
from tidar.data.chat import Chat
from tidar.data.corpus import BadDocument
from tidar.data.source import Part, Source
from tidar.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1


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
        stats = [os.stat(file) for file in part.files]
        files.update(json.dumps([asdict(part), [[stat.st_size, stat.st_mtime_ns] for stat in stats]]).encode())
    return {
        "format": FORMAT,
        "options": {name: options[name] for name in ("source", "on_error", *source.meaning)},
        "tokenizer": tokenizer and {"sha256": tokenizer.digest, "size": tokenizer.size},
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "groups": source.groups(paths),
        "files": files.hexdigest(),
    }


def is_prepared(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether `folder` is whole and made by this plan. Raises UserError where it is whole and made by another."""
    try:
        found = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError):
        return False
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

    make_source: makes `source` anew in another process. Raises UserError for a document that cannot be used where
    data.on_error is "fail", for a folder made from something else, and where another process is at work in it.
    """
    parts = source.parts(paths)
    wanted = plan(source, parts, paths)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process prepares data there") from None
        if not is_prepared(folder, wanted):
            _prepare_parts(source, make_source, parts, wanted, folder / "parts", processes, report)
            _join_parts(folder, parts, wanted, source.tokenizer.name if source.tokenizer else "")
        shutil.rmtree(folder / "parts", ignore_errors=True)


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
    initial = (make_source, source.options, tokenizer)
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _start_worker, initial)
    try:
        for result in pool.map(_work, jobs):
            count(result)
    except BrokenProcessPool:
        raise UserError(f"{folder}: a process that prepares data there has died; start again to go on") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_source: Source


def _start_worker(make_source: Callable, options: Data, tokenizer: str | None) -> None:
    global _source
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _source = make_source(options, load_tokenizer(tokenizer) if tokenizer else None)


def _work(job: tuple[Part, Path]) -> tuple[int, int]:
    return _prepare_part(_source, *job)


def _prepare_part(source: Source, part: Part, file: Path) -> tuple[int, int]:
    """Writes a part and returns its numbers of documents and tokens."""
    documents, dropped = [], []
    try:
        for index, document in enumerate(source.documents(part)):
            if isinstance(document, BadDocument):
                reason = str(document)
            elif document is not None and not len(document.tokens):
                reason = "holds no tokens"
            else:
                documents += [] if document is None else [document]
                continue
            place = source.place(part, index)
            # a document without a token is nothing to be mended
            if source.options.on_error == "fail" and isinstance(document, BadDocument):
                raise UserError(f"{place}: {reason}; data.on_error = skip would leave it out")
            dropped.append([place, reason])
    except (OSError, EOFError) as error:
        raise UserError(f"{', '.join(part.files[:1])}: cannot be read ({error})") from None
    tokens = np.concatenate([np.zeros(0, np.uint32), *(document.tokens.astype(np.uint32) for document in documents)])
    targets = [np.ones(len(d.tokens), bool) if d.targets is None else d.targets for d in documents]
    arrays = {
        "tokens": tokens,
        "lengths": np.array([len(document.tokens) for document in documents], np.int64),
        "targets": np.packbits(np.concatenate([np.zeros(0, bool), *targets])),
        "dropped": np.frombuffer(json.dumps(dropped).encode(), np.uint8),
    }
    _write(file, lambda stream: np.savez(stream, **arrays))
    return len(documents), len(tokens)


def _join_parts(folder: Path, parts: list[Part], wanted: dict[str, Any], tokenizer_name: str) -> None:
    """Puts the parts one behind the other, and writes meta.json last."""
    tokenizer = wanted["tokenizer"]
    dtype = np.uint16 if tokenizer and tokenizer["size"] <= 2**16 else np.uint32
    names = ("tokens", "offsets", "targets")
    files = {name: open(folder / f"{name}.bin.partial", "wb") for name in names}  # noqa: SIM115
    counts = np.zeros(1, np.int64)
    n_documents = n_tokens = n_targets = 0
    groups = [0] * len(wanted["groups"])
    dropped: list[list[str]] = []
    left_bits = np.zeros(0, np.uint8)
    files["offsets"].write(np.zeros(1, np.int64).tobytes())
    for number, part in enumerate(parts):
        with np.load(_part_file(folder / "parts", number)) as arrays:
            tokens, lengths, bits = arrays["tokens"], arrays["lengths"], arrays["targets"]
            dropped += json.loads(arrays["dropped"].tobytes())
        files["tokens"].write(tokens.astype(dtype).tobytes())
        files["offsets"].write((n_tokens + np.cumsum(lengths)).astype(np.int64).tobytes())
        bits = np.unpackbits(bits)[: len(tokens)]
        n_targets += int(bits.sum())
        bits = np.concatenate([left_bits, bits])
        whole = len(bits) // 8 * 8
        files["targets"].write(np.packbits(bits[:whole]).tobytes())
        left_bits = bits[whole:]
        found = np.bincount(tokens) if len(tokens) else np.zeros(1, np.int64)
        counts, found = (np.pad(c, (0, max(len(counts), len(found)) - len(c))) for c in (counts, found))
        counts = counts + found
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
        lines = "".join(f"{place}: {reason}\n" for place, reason in dropped)
        _write(folder / "dropped.txt", lambda file: file.write(lines.encode("utf-8", "surrogatepass")))
    used = np.flatnonzero(counts)
    reasons = Counter(reason for _, reason in dropped).most_common(20)
    meta = {
        "source": wanted["options"]["source"],
        "tokenizer": tokenizer and {"name": tokenizer_name, **tokenizer},
        "dtype": np.dtype(dtype).name,
        "documents": n_documents,
        "tokens": n_tokens,
        "target_tokens": n_targets,
        "smallest_id": int(used[0]) if len(used) else 0,
        "largest_id": len(counts) - 1,
        "dropped": len(dropped),
        "dropped_reasons": dict(sorted(reasons)),
        "paths": [{"path": path, "documents": n} for path, n in zip(wanted["groups"], groups)],
        "plan": wanted,
    }
    _write(folder / "meta.json", lambda file: file.write((json.dumps(meta, indent=2) + "\n").encode()))


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    file = open(partial, "wb")  # noqa: SIM115
    write(file)
    _close(file)
    os.replace(partial, path)


def _close(file: BinaryIO) -> None:
    """Closes a file that is on the disk then."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
