"""Chats to tokens, and which of them the assistant says.

A chat template is a program, so where its text has what the assistant says is found by trial: rendered again with
another text in a turn's place, all but that turn stays. Text is never searched for markers, which a user can write too.
"""

import json
import re
from itertools import count, pairwise
from typing import Any

from tidar.config import UserError
from tidar.data.corpus import BadDocument

Messages = list[dict[str, str]]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
PROMPT_AND_RESPONSE = (("prompt", "response"), ("question", "answer"))
# templates render these too, and messages here are a role and a text
LOST_WITH_A_TURN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
LOST_WITH_A_RECORD = ("tools", "functions")


def conversation(record: Any, prompt_field: str = "", response_field: str = "") -> Messages:
    """The messages (role, content) of a parsed JSON record, at least one of them the assistant's.

    Read are `messages` (role, content), ShareGPT's `conversations` (from, value) and a prompt with its response: the
    fields named here, which come before all else, or prompt and response, or question and answer.
    Raises BadDocument for anything else, and for what a template would render and a text does not hold, as tool calls.
    """
    if not isinstance(record, dict):
        raise BadDocument(f"{_shown(record)}: must be a JSON object")
    _refuse_lost(record, LOST_WITH_A_RECORD)
    pairs = [(prompt_field or prompt, response_field or response) for prompt, response in PROMPT_AND_RESPONSE]
    pair = next((pair for pair in pairs if all(name in record for name in pair)), None)
    named = bool(prompt_field or response_field)
    if not named and record.get("messages") is not None:
        messages = _turns(record, "messages", "role", "content", ROLES)
    elif not named and record.get("conversations") is not None:
        messages = _turns(record, "conversations", "from", "value", SHAREGPT_ROLES)
    elif pair:
        messages = [
            {"role": role, "content": _text(record, name, f"turn {number}: ")}
            for number, role, name in zip((1, 2), ("user", "assistant"), pair)
        ]
    else:
        fields = " or ".join(f"{prompt} and {response}" for prompt, response in dict.fromkeys(pairs))
        allowed = fields if named else f"messages, conversations, or {fields}"
        raise BadDocument(f"fields = {_shown(list(record))}: must have {allowed}")
    if all(message["role"] != "assistant" for message in messages):
        roles = [message["role"] for message in messages]
        raise BadDocument(f"roles = {_shown(roles)}: must have a turn of the assistant")
    return messages


def _turns(record: dict, field: str, role_field: str, content_field: str, roles: dict[str, str]) -> Messages:
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise BadDocument(f"{field} = {_shown(turns)}: must be a list of one turn or more")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"turn {number}: "
        if not isinstance(turn, dict):
            raise BadDocument(f"{place}{_shown(turn)}: must be an object with {role_field} and {content_field}")
        _refuse_lost(turn, LOST_WITH_A_TURN, place)
        role = _text(turn, role_field, place)
        if role not in roles:
            raise BadDocument(f"{place}{role_field} = {_shown(role)}: must be one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _text(turn, content_field, place)})
    return messages


def _text(record: dict, name: str, place: str) -> str:
    if name not in record:
        raise BadDocument(f"{place}{name} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise BadDocument(f"{place}{name} = {_shown(value)}: must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = _shown(value[error.start])
        raise BadDocument(f"{place}{name} has {found}: must be Unicode without lone surrogates") from None
    return value


def _refuse_lost(record: dict, names: tuple[str, ...], place: str = "") -> None:
    for name in names:
        if record.get(name):
            raise BadDocument(f"{place}{name} = {_shown(record[name])}: is not supported, only texts are")


def _shown(value: Any) -> str:
    """In one line, not too long."""
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def encode_chats(tokenizer: Any, conversations: list[Messages]) -> list[tuple[list[int], list[bool]] | BadDocument]:
    """Tokens of each chat, and whether each is a target: what the assistant says, to the end of its end-of-turn token.

    Each chat is cut where a turn of the assistant starts and ends, and its pieces are tokenised one by one: no token is
    half the template's, and tokens are those of inference, where the assistant's turn starts with a token of its own.

    tokenizer: a fast one of transformers. conversations: as `conversation` gives them. A chat of which the template
    does not tell for certain what the assistant says is a BadDocument in the answer. Raises UserError for a tokenizer
    without a chat template, and for one that tokenises pieces in another way than the whole.
    """
    template = _Template(tokenizer)
    encoded: list[Any] = []
    pieces: list[str] = []
    for messages in conversations:
        try:
            text, spans, end_of_turn = template.find_assistant(messages)
        except BadDocument as error:
            encoded.append(error.with_traceback(None))
            continue
        bounds = [0, *(bound for span in spans for bound in span), len(text)]
        encoded.append((len(bounds) - 1, end_of_turn))
        pieces += [text[start:end] for start, end in pairwise(bounds)]
    tokens = iter(_encode(tokenizer, pieces))
    for i, chat in enumerate(encoded):
        if not isinstance(chat, BadDocument):
            n_pieces, end_of_turn = chat
            encoded[i] = _join([next(tokens) for _ in range(n_pieces)], end_of_turn)
    return encoded


def _join(pieces: list[list[int]], end_of_turn: int) -> tuple[list[int], list[bool]] | BadDocument:
    """pieces: tokens of the template's and of the assistant's text by turns."""
    if any(piece[-1:] != [end_of_turn] for piece in pieces[1::2]):
        return BadDocument("the tokenizer does not keep the chat template's end-of-turn token in one")
    ids = [token for piece in pieces for token in piece]
    return ids, [bool(i % 2) for i, piece in enumerate(pieces) for _ in piece]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


class _Template:
    """A tokenizer's chat template, and where in its text the assistant speaks."""

    def __init__(self, tokenizer: Any):
        name = f"data.tokenizer = {tokenizer.name_or_path}"
        try:
            tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"{name}: must have a chat template") from None
        whole, *pieces = _encode(tokenizer, ["\na", "\n", "a"])
        if whole != sum(pieces, []):
            raise UserError(f"{name}: must not change the beginning of a text, as chats are tokenised in pieces")
        self.tokenizer = tokenizer
        self.added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_token = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def find_assistant(self, messages: Messages) -> tuple[str, list[tuple[int, int]], int]:
        """The chat's text, start and end of the assistant's turns in it, and the id of the token that ends them.

        Raises BadDocument where the template cannot be rendered, rewrites a turn or does not end it with a token.
        """
        text = self._render(messages)
        # in a case that no filter of case leaves as it is
        sentinel = next(word for i in count() if (word := f"wasSaid{i}x") not in text)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        around = [self._render_around(messages, turn, sentinel) for turn in turns]
        # where nothing follows a turn, a token after it cannot be the start of the next
        closed = messages[: turns[-1] + 1]
        rest = around[-1][1] if len(closed) == len(messages) else self._render_around(closed, turns[-1], sentinel)[1]
        token = self.added_token.match(rest)
        if not token:
            raise BadDocument(f"the chat template has no end-of-turn token after the assistant's turn {turns[-1] + 1}")
        spans = []
        free = 0
        for turn, (before, after) in zip(turns, around):
            start, said = self._find_turn(messages, turn, text, before, after, sentinel)
            found = self.added_token.match(text, said)
            if not found or found[1] != token[1]:
                raise BadDocument(f"the chat template has no {token[1]} after the assistant's turn {turn + 1}")
            if start < free:
                raise BadDocument(f"the chat template does not keep turn {turn + 1} in its place")
            free = found.end()
            spans.append((start, free))
        return text, spans, self.added[token[1]]

    def _find_turn(
        self, messages: Messages, turn: int, text: str, before: str, after: str, sentinel: str
    ) -> tuple[int, int]:
        """Start and end of what the assistant says in a turn. Templates may leave out some of it, but not change it."""
        content = messages[turn]["content"]
        end = len(text) - len(after)
        rewritten = BadDocument(f"the chat template rewrites what the assistant says in turn {turn + 1}")
        if not text.endswith(after):
            raise rewritten
        if text.startswith(before) and len(before) <= end and text[len(before) : end] in content:
            return len(before), end
        # reasoning in the turn takes the place of what the template puts before a turn without any
        said = content if text[:end].endswith(content) else content.rstrip()
        proof = text[:end] + sentinel + after
        if not text[:end].endswith(said) or self._render(_say(messages, turn, said + sentinel)) != proof:
            raise rewritten
        # what the text has without it too is the template's, though it reads the same
        while said and self._render(_say(messages, turn, said[1:])) == text:
            said = said[1:]
        return end - len(said), end

    def _render_around(self, messages: Messages, turn: int, sentinel: str) -> tuple[str, str]:
        """What the template puts before and after a turn's content."""
        parts = self._render(_say(messages, turn, sentinel)).split(sentinel)
        if len(parts) != 2:
            raise BadDocument(f"the chat template rewrites what the assistant says in turn {turn + 1}")
        return parts[0], parts[1]

    def _render(self, messages: Messages) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # the template is a program, and raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadDocument(f"the chat template cannot be rendered ({reason})") from None


def _say(messages: Messages, turn: int, content: str) -> Messages:
    return [*messages[:turn], {"role": "assistant", "content": content}, *messages[turn + 1 :]]
