"""Answers to a file of chats, in the model's own words: what `data.source = chat` trains on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tidar.config import UserError
from tidar.config.locks import lock_file
from tidar.decoding.engine import Engine

# prompts that are decoded before their answers are written
CHUNK = 256


def write_answers(
    engine: Engine,
    prompts: Iterator[tuple[int, list[dict[str, Any]], list[int]]],
    output: Path,
    decode: Callable[[list[int]], str],
    done: dict[int, str],
    **options,
) -> tuple[int, int, int]:
    """Appends a chat for each prompt that is not done: one JSON line with `index` and `messages`.

    prompts: index, messages and tokens of each. done: what to skip, see `read_done`. options: of `Engine.generate`.
    Several processes may write to one file. Returns how many answers, new tokens and forward passes.
    Raises UserError for a prompt that is not the one that was answered.
    """
    n_answers = n_tokens = n_forwards = 0
    todo = _without(done, prompts, output)
    while chunk := list(islice(todo, CHUNK)):
        indices, chats, tokens = zip(*chunk)
        completions = engine.generate(tokens, indices=indices, **options)
        lines = []
        for index, messages, completion in zip(indices, chats, completions):
            answer = {"role": "assistant", "content": decode(completion.tokens)}
            lines.append(json.dumps({"index": index, "messages": [*messages, answer]}, ensure_ascii=False) + "\n")
            n_tokens, n_forwards = n_tokens + len(completion.tokens), n_forwards + completion.n_forwards
        _append(output, "".join(lines))
        n_answers += len(chunk)
    return n_answers, n_tokens, n_forwards


def _without(done: dict[int, str], prompts: Iterator, output: Path) -> Iterator:
    for index, messages, tokens in prompts:
        if index not in done:
            yield index, messages, tokens
        elif done[index] != _digest(messages):
            raise UserError(
                f"--output {output}: holds an answer to another prompt {index} than --prompts has now: must be a new "
                "file, or the answers of the same prompts"
            )


def _digest(messages: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


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
                    answered = json.loads(line)
                    done[int(answered["index"])] = _digest(answered["messages"][:-1])
                except (ValueError, TypeError, KeyError):
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


def without_answer(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat up to the last turn of the user, which the model answers."""
    last = max((number for number, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
    return list(messages[: last + 1])
