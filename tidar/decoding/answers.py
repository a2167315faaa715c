"""Answers to a file of chats or texts, in the model's own words: what `data.source` chat and text train on."""

import hashlib
import json
import operator
import os
import time
from collections.abc import Callable, Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from tidar.config import UserError
from tidar.config.locks import lock_file
from tidar.decoding.engine import Engine

# prompts that the engine is given at a time, and seconds between writes of their answers
CHUNK, SECONDS = 256, 1.0
NO_LINE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


def write_answers(
    engine: Engine,
    prompts: Iterator[tuple[int, dict[str, Any], list[int]]],
    output: Path,
    decode: Callable[[list[int]], str],
    done: dict[int, str],
    **options,
) -> tuple[int, int, int, int]:
    """Appends a line for each prompt that is not done: JSON with `index`, its record with the answer, and
    `finish_reason`: stop, or length for an answer that is cut off. Of a text, `prompt_characters` were the prompt.

    prompts: see `read_prompts`. done: what to skip, see `read_done`. options: of `Engine.stream`. Answers are written
    in the order of the prompts while others are decoded; an interruption writes those that are finished. Several
    processes may write to one file. Returns how many answers, empty ones of chats, new tokens and forward passes.
    Raises UserError for a prompt that is not the one that was answered.
    """
    n_answers = n_empty = n_tokens = n_forwards = 0
    todo = _without(done, prompts, output)
    while chunk := list(islice(todo, CHUNK)):
        indices, records, tokens = zip(*chunk)
        lines: dict[int, str] = {}  # that are not written, by their number in the chunk
        following, written_at = 0, time.monotonic()
        try:
            for completion in engine.stream(tokens, indices=indices, **options):
                if not completion.finished:
                    continue
                number, answer = completion.index, decode(completion.tokens)
                lines[number] = _line(indices[number], records[number], answer, completion.cut_off)
                n_answers += 1
                n_empty += "messages" in records[number] and not answer.strip()
                n_tokens, n_forwards = n_tokens + len(completion.tokens), n_forwards + completion.n_forwards
                if time.monotonic() - written_at >= SECONDS:
                    ready = list(takewhile(lines.__contains__, count(following)))
                    _append(output, "".join(lines.pop(number) for number in ready))
                    following, written_at = following + len(ready), time.monotonic()
        finally:
            if lines:
                _append(output, "".join(lines[number] for number in sorted(lines)))
    return n_answers, n_empty, n_tokens, n_forwards


def _line(index: int, record: dict[str, Any], answer: str, cut_off: bool) -> str:
    if cut_off:
        answer = answer.rstrip("\ufffd")  # of a character whose last bytes are missing
    whole: dict[str, Any]
    if "messages" in record:
        whole = {"messages": [*record["messages"], {"role": "assistant", "content": answer}]}
    else:
        whole = {"text": record["text"] + answer, "prompt_characters": len(record["text"])}
    answered = {"index": index, **record, **whole, "finish_reason": "length" if cut_off else "stop"}
    return json.dumps(answered, ensure_ascii=False) + "\n"


def _read_line(line: bytes) -> tuple[int, dict[str, Any]]:
    """The index and the record that `_line` has got. Raises NO_LINE for what it does not write."""
    answered = json.loads(line)
    index = int(answered.pop("index"))
    answered.pop("finish_reason", None)
    if "messages" in answered:
        return index, answered | {"messages": answered["messages"][:-1]}
    end = operator.index(answered.pop("prompt_characters"))
    return index, answered | {"text": answered["text"][:end]}


def _without(done: dict[int, str], prompts: Iterator, output: Path) -> Iterator:
    for index, record, tokens in prompts:
        if index not in done:
            yield index, record, tokens
        elif done[index] != _digest(record):
            raise UserError(
                f"--output {output}: holds an answer to another prompt {index} than --prompts has now: must be a new "
                "file, or the answers of the same prompts"
            )


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_done(output: Path) -> dict[int, str]:
    """Indices of the answers that a file already holds, each with a digest of its prompt. A last line that is not whole
    is removed from the file.
    """
    done: dict[int, str] = {}
    if not output.exists():
        return done
    whole = 0
    try:
        with open(output, "r+b") as file:
            lock_file(file)  # another process may be writing a line
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    index, record = _read_line(line)
                    done[index] = _digest(record)
                except NO_LINE:
                    raise UserError(f"--output {output}: line {number} is no answer of this command") from None
                whole += len(line)
            file.truncate(whole)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read and written ({error.strerror})") from None
    return done


def _append(output: Path, text: str) -> None:
    try:
        with open(output, "a", encoding="utf-8") as file:
            lock_file(file)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
