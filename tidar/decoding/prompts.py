"""Prompts of a file, as tokens, and the tokenizer of a model."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tidar.config import UserError
from tidar.config.hub import holds_tokenizer, local_folder
from tidar.data import BadDocument, Tokenizer, load_tokenizer
from tidar.data.chat_records import BEGINNINGS, Conversation, conversation, is_chat, is_empty, shown
from tidar.data.chat_template import prompt_encoder, template_variables
from tidar.data.source import parse_json
from tidar.data.tokenizer import BytesTokenizer
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


def chat_reader(
    tokenizer: Tokenizer, template_kwargs: Mapping[str, Any], asked: str
) -> Callable[[dict], tuple[Conversation, list[int]]]:
    """From a record to its chat, up to what the model answers, and to the tokens of that.

    template_kwargs: variables of the template for records that do not have them. Raises UserError for a tokenizer
    without a chat template; the result raises BadDocument for what is no chat to answer. asked: what needs a template.
    """
    if isinstance(tokenizer, BytesTokenizer) or not tokenizer.chat_template:
        raise UserError(f"{asked}: needs a chat template, which the tokenizer {tokenizer.name} does not have")
    encode, variables = prompt_encoder(tokenizer.backend), template_variables(tokenizer.backend)

    def read(record: dict) -> tuple[Conversation, list[int]]:
        own = record.get("chat_template_kwargs")
        if template_kwargs and (is_empty(own) or isinstance(own, dict)):
            given = {name: value for name, value in template_kwargs.items() if record.get(name) is None}
            record = record | {"chat_template_kwargs": given | (own or {})}
        chat = _without_answer(conversation(record, variables=variables, has_answer=False))
        return chat, encode(chat)

    return read


def read_prompts(
    path: Path, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[int, dict[str, Any], list[int]]]:
    """Index, record and tokens of each line but blank ones.

    A chat is a record as `data.source = "chat"` reads it, up to what the model answers: `messages`, and the variables
    of the template that the line has. A record with `text` and without a chat is `{"text": …}`, to be continued.
    template_kwargs: see `chat_reader`. Raises UserError, with the line, for anything else, and for a chat where the
    tokenizer has no chat template.
    """
    read: Callable[[dict], tuple[Conversation, list[int]]] | None = None
    for index, record in _records(path):
        try:
            if isinstance(record, BadDocument):
                raise record
            if not isinstance(record, dict) or not is_chat(record):
                text = _text(record)
                yield index, {"text": text}, [int(token) for token in tokenizer.encode([text])[0]]
                continue
            read = read or chat_reader(tokenizer, template_kwargs, f"{path}: line {index + 1}")
            chat, tokens = read(record)
            yield index, _as_record(chat), tokens
        except BadDocument as error:
            raise UserError(f"{path}: line {index + 1}: {error}") from None


def _text(record: Any) -> str:
    """The text of a record that is no chat. Raises BadDocument for one without, or with an empty one."""
    if not isinstance(record, dict) or "text" not in record:
        found = f"fields = {shown(list(record))}" if isinstance(record, dict) else shown(record)
        raise BadDocument(f"{found}: must have text, {', '.join(BEGINNINGS[:-1])} or {BEGINNINGS[-1]}")
    text = record["text"]
    if not isinstance(text, str) or not text:
        raise BadDocument(f"text = {shown(text)}: must be a text, and not empty")
    return text


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Index and record of each line but blank ones, a BadDocument for one that cannot be parsed."""
    try:
        with open(path, "rb") as file:
            for index, line in enumerate(file):
                if (record := parse_json(line)) is not None:
                    yield index, record
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read ({error.strerror})") from None


def _without_answer(chat: Conversation) -> Conversation:
    """A chat without its last turns of the assistant, which the model is to give.

    Raises BadDocument where no turn of the user is left.
    """
    n = max((number for number, turn in enumerate(chat.messages, 1) if turn["role"] != "assistant"), default=0)
    if all(turn["role"] != "user" for turn in chat.messages[:n]):
        raise BadDocument("has no turn of the user")
    return Conversation(chat.messages[:n], chat.is_target and chat.is_target[:n], chat.variables)


def _as_record(chat: Conversation) -> dict[str, Any]:
    """What `conversation` reads as this chat."""
    is_target = chat.is_target or [True] * len(chat.messages)
    messages = [
        message if trained or message["role"] != "assistant" else message | {"weight": 0}
        for message, trained in zip(chat.messages, is_target)
    ]
    return {"messages": messages, **chat.variables}
