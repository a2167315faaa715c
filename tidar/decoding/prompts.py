"""Prompts of a file, as tokens, and the tokenizer of a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidar.config import UserError, first_line
from tidar.config.hub import holds_tokenizer, local_folder
from tidar.data import BadDocument, Tokenizer, load_tokenizer
from tidar.data.chat_records import conversation
from tidar.data.source import parse_json
from tidar.data.tokenizer import BytesTokenizer
from tidar.decoding.answers import without_answer
from tidar.decoding.engine import Engine
from tidar.models.huggingface import assets_folder


def model_tokenizer(model: Path, name: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer called `name`, see `load_tokenizer`, or else that in the model's folder, or else bytes.

    Raises UserError where a model without a tokenizer has no vocabulary of bytes, and where the tokenizer that is named
    has more ids than the vocabulary.
    """
    folder = assets_folder(local_folder(model))
    chosen = name or (str(folder) if holds_tokenizer(folder) else "bytes")
    tokenizer = load_tokenizer(chosen, "--tokenizer")
    if chosen == "bytes" and not name and vocab_size > 512:
        raise UserError(f"{folder}: holds no tokenizer; name one with --tokenizer")
    if name and tokenizer.size > vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer.name}: has {tokenizer.size} ids, and the vocabulary of {folder} {vocab_size}"
        )
    return tokenizer


def end_tokens(engine: Engine, tokenizer: Tokenizer | None) -> list[int]:
    """Tokens that end a text: the model's and the tokenizer's."""
    ends = [*engine.end_token_ids, tokenizer.end_of_text if tokenizer else None]
    return [end for end in dict.fromkeys(ends) if end is not None]


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]], where: str = "") -> list[int]:
    """Tokens of a chat up to the model's answer. where: file and line of the chat, for messages.

    Raises UserError for a tokenizer without a template, and for a chat that the template refuses.
    """
    if isinstance(tokenizer, BytesTokenizer) or not tokenizer.chat_template:
        raise UserError(f"tokenizer {tokenizer.name}: has no chat template, which --chat and --prompts need")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        return tokenizer.backend.apply_chat_template(messages, **options)
    except Exception as error:  # the template is a program, and raises what it likes
        reason = first_line(error)
        raise UserError(f"{where}the chat template of {tokenizer.name} cannot be rendered ({reason})") from None


def read_prompts(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[int, list[dict[str, Any]], list[int]]]:
    """Index, messages and tokens of each line but blank ones: a chat without its last answer, or a `prompt`.

    Raises UserError, with the line, for what is neither.
    """
    try:
        with open(path, "rb") as file:
            for index, line in enumerate(file):
                record = parse_json(line)
                if record is None:
                    continue
                where = f"{path}: line {index + 1}: "
                try:
                    messages = _messages(record)
                except BadDocument as error:
                    raise UserError(f"{where}{error}") from None
                yield index, messages, render(tokenizer, messages, where)
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read ({error.strerror})") from None


def _messages(record: Any) -> list[dict[str, Any]]:
    """The turns of a record that the model answers. Raises BadDocument where there are none."""
    if isinstance(record, BadDocument):
        raise record
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = without_answer(conversation(record).messages)
    if not messages:
        raise BadDocument("has no turn of the user")
    return messages
