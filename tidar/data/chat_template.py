"""Chats to tokens, and which of them the assistant says.

A chat template is a program, so what the assistant says is found by trial: the chat is rendered again with another text
in a turn's place, and all but that turn stays. Text is never searched for markers, which a user can write too.
"""

import inspect
import json
import re
from collections.abc import Callable
from functools import cached_property
from itertools import count, pairwise
from typing import Any

import jinja2
import jinja2.meta

from tidar.config import UserError, first_line
from tidar.data.chat_records import CALLS, REASONING, TEMPLATE_DATA, Conversation, Messages
from tidar.data.corpus import BadDocument


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Variables of the tokenizer's chat templates that a record may set: all but those that transformers sets."""
    templates = tokenizer.chat_template
    templates = templates.values() if isinstance(templates, dict) else [templates or ""]
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    found: set[str] = set()
    for template in templates:
        try:
            # transformers' own tags, which name no variable
            tree = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.tokenizer = {tokenizer.name_or_path}: bad chat template ({error.message})") from None
        found |= jinja2.meta.find_undeclared_variables(tree)
    functions = {"raise_exception", "strftime_now", "namespace", "messages"}
    arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters) - set(TEMPLATE_DATA)
    return frozenset(found - functions - arguments - set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES))


def encode_chats(tokenizer: Any, conversations: list[Conversation]) -> list[tuple[list[int], list[bool]] | BadDocument]:
    """Tokens of each chat, and whether each is a target: what the assistant says, to the end of its end-of-turn token.

    A turn's text, reasoning and tool calls are said by the assistant, as the template renders them; they start where
    the generation prompt ends, or where the text starts if there is no reasoning. Each chat is divided where a turn of
    the assistant starts and ends, and its pieces are tokenised one by one: no token is half the template's, and tokens
    are those of inference, where the assistant's turn starts with a token of its own.

    tokenizer: a fast one of transformers. A chat for which the template does not show what the assistant says is a
    BadDocument in the result. Raises UserError for a tokenizer without a chat template, and for one that tokenises
    pieces in another way than the whole.
    """
    template = _Template(tokenizer)
    template.check_pieces()
    encoded: list[Any] = []
    pieces: list[str] = []
    for chat in conversations:
        try:
            text, spans, end_of_turn = template.find_assistant(chat)
        except BadDocument as error:
            encoded.append(error.with_traceback(None))
            continue
        bounds = [0, *(bound for start, end, _ in spans for bound in (start, end)), len(text)]
        encoded.append((end_of_turn, [is_target for *_, is_target in spans]))
        pieces += [text[start:end] for start, end in pairwise(bounds)]
    tokens = iter(_encode(tokenizer, pieces))
    for i, chat in enumerate(encoded):
        if not isinstance(chat, BadDocument):
            end_of_turn, is_target = chat
            encoded[i] = _join([next(tokens) for _ in range(2 * len(is_target) + 1)], end_of_turn, is_target)
    return encoded


def prompt_encoder(tokenizer: Any) -> Callable[[Conversation], list[int]]:
    """Tokens of a chat with the template's generation prompt, its turns rendered as in training.

    tokenizer: of transformers. Raises UserError for one without a chat template; the result raises BadDocument for a
    chat that the template cannot render.
    """
    template = _Template(tokenizer)

    def encode(chat: Conversation) -> list[int]:
        messages = template.readable(chat.messages)
        return _encode(tokenizer, [template.render(messages, chat.variables, add_generation_prompt=True)])[0]

    return encode


def _join(
    pieces: list[list[int]], end_of_turn: int, is_target: list[bool]
) -> tuple[list[int], list[bool]] | BadDocument:
    """pieces: tokens of the template's and the assistant's text, alternately. is_target: of each assistant text."""
    if any(piece[-1:] != [end_of_turn] for piece in pieces[1::2]):
        return BadDocument("the tokenizer does not keep the chat template's end-of-turn token in one")
    flags = [False] * len(pieces)
    flags[1::2] = is_target
    ids = [token for piece in pieces for token in piece]
    return ids, [flag for flag, piece in zip(flags, pieces) for _ in piece]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


class _Template:
    """A tokenizer's chat template, and where in its text the assistant speaks."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.name = f"data.tokenizer = {tokenizer.name_or_path}"
        try:
            tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"{self.name}: must have a chat template") from None
        self.added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_token = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def check_pieces(self) -> None:
        """Raises UserError for a tokenizer that tokenises pieces of a text in another way than the whole."""
        whole, *pieces = _encode(self.tokenizer, ["\na", "\n", "a"])
        if whole != sum(pieces, []):
            raise UserError(f"{self.name}: must not change the beginning of a text, as chats are tokenised in pieces")

    @cached_property
    def keeps_json(self) -> bool:
        """Whether arguments of a tool call that are JSON already are rendered as they are, not as a text in quotes."""
        arguments = '{"a": "b"}'
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return arguments in self.render([{"role": "user", "content": "x"}, said], {})
        except BadDocument:
            return False

    def find_assistant(self, chat: Conversation) -> tuple[str, list[tuple[int, int, bool]], int]:
        """The chat's text, start and end of the assistant's turns in it and whether each is a target, and the id of the
        token that ends them.

        Raises BadDocument where the template cannot be rendered, rewrites a turn, does not render what a turn or the
        record has, or does not end a turn with a token.
        """
        messages = self.readable(chat.messages)
        trial = _Trial(self, messages, chat.variables)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        around = [trial.render_around(turn) for turn in turns]
        # where nothing follows a turn, a token after it cannot be the start of the next
        is_last = turns[-1] == len(messages) - 1
        rest = around[-1][1] if is_last else trial.render_around(turns[-1], last=turns[-1] + 1)[1]
        token = self.added_token.match(rest)
        if not token:
            raise BadDocument(f"the chat template has no end-of-turn token after the assistant's turn {turns[-1] + 1}")
        spans = []
        free = 0
        for turn, (before, after) in zip(turns, around):
            start, said = trial.find_turn(turn, before, after)
            found = self.added_token.match(trial.text, said)
            if not found or found[1] != token[1]:
                raise BadDocument(f"the chat template has no {token[1]} after the assistant's turn {turn + 1}")
            if start < free:
                raise BadDocument(f"the chat template does not keep turn {turn + 1} in its place")
            free = found.end()
            spans.append((start, free, chat.is_target is None or chat.is_target[turn]))
        trial.check_context()
        return trial.text, spans, self.added[token[1]]

    def readable(self, messages: Messages) -> Messages:
        """With arguments of calls as the template takes them: their JSON, or objects."""
        has_calls = any(name in message for message in messages for name in CALLS)
        return [_parse_arguments(m) for m in messages] if has_calls and not self.keeps_json else messages

    def render(self, messages: Messages, variables: dict[str, Any], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **variables)
        except Exception as error:  # the template is a program, and raises what it likes
            reason = first_line(error)
            raise BadDocument(f"the chat template cannot be rendered ({reason})") from None


class _Trial:
    """One chat, rendered again and again with another text in a turn's place.

    Turns are indices of messages; messages of errors count turns from 1. said: the fields that a turn of the assistant
    has besides its content: reasoning and calls.
    """

    def __init__(self, template: _Template, messages: Messages, variables: dict[str, Any]):
        """Raises BadDocument for reasoning and variables that the template does not render."""
        self.template = template
        self.messages = messages
        self.variables = variables
        self.text = self.render(messages)
        # in a case that no filter of case leaves as it is
        known = f"{self.text}{messages}"
        self.sentinel = next(word for i in count() if (word := f"wasSaid{i}x") not in known)
        for name in TEMPLATE_DATA:
            if name in variables:
                others = {other: value for other, value in variables.items() if other != name}
                if template.render(messages, others) == self.text:
                    raise BadDocument(f"{name}: the chat template does not render it")
        for turn, message in enumerate(messages):
            if REASONING[0] in message:
                self._drop_reasoning_that_is_not_rendered(turn)

    def render(self, messages: Messages, **options: Any) -> str:
        return self.template.render(messages, self.variables, **options)

    def replace(self, turn: int, without: Any = (), **fields: Any) -> Messages:
        """The messages with other fields in a turn. without: names of those that it loses."""
        kept = {name: value for name, value in self.messages[turn].items() if name not in without}
        return [*self.messages[:turn], kept | fields, *self.messages[turn + 1 :]]

    def render_around(self, turn: int, last: int | None = None) -> tuple[str, str]:
        """What the template puts before and after a turn that has a content only. last: messages up to there."""
        return self._split(turn, self.replace(turn, (*REASONING, *CALLS), content=self.sentinel)[:last])

    def find_turn(self, turn: int, before: str, after: str) -> tuple[int, int]:
        """Start and end of what the assistant says in a turn. before, after: what `render_around` gives."""
        message = self.messages[turn]
        said = [name for name in (REASONING[0], *CALLS) if name in message]
        if not said:
            return self._find_content(turn, before, after)
        content = None
        if message["content"].strip():
            content = self._find_content(turn, *self._split(turn, self.replace(turn, content=self.sentinel)))
        start, end = len(before), len(self.text) - len(after)
        if not self.text.endswith(after):
            raise self._rewritten(turn)
        if REASONING[0] in said:
            start = self._find_reasoning(turn, before)
        elif not self.text.startswith(before) and content:  # reasoning in the content, see _find_content
            start = content[0]
        elif not self.text.startswith(before):
            raise self._rewritten(turn)
        if not start <= end or (content and not start <= content[0] <= content[1] <= end):
            raise self._rewritten(turn)
        self._check_calls(turn, start, end)
        return start, end

    def check_context(self) -> None:
        """Raises BadDocument where a turn of the system, the user or a tool is not rendered."""
        context = [i for i, m in enumerate(self.messages) if m["role"] != "assistant" and m["content"].strip()]
        marks = {turn: f"{self.sentinel}c{turn}x" for turn in context}
        messages = [message | {"content": marks.get(i, message["content"])} for i, message in enumerate(self.messages)]
        rendered = self.render(messages).casefold()
        for turn in context:
            if marks[turn].casefold() not in rendered:
                role = self.messages[turn]["role"]
                raise BadDocument(f"turn {turn + 1}: role = {role}: the chat template does not render the turn")

    def _rewritten(self, turn: int) -> BadDocument:
        return BadDocument(f"the chat template rewrites what the assistant says in turn {turn + 1}")

    def _split(self, turn: int, messages: Messages) -> tuple[str, str]:
        """The rendered text before and after the sentinel."""
        parts = self.render(messages).split(self.sentinel)
        if len(parts) != 2:
            raise self._rewritten(turn)
        return parts[0], parts[1]

    def _find_content(self, turn: int, before: str, after: str) -> tuple[int, int]:
        """Start and end of a turn's content. Templates may leave out some of it, but not change it."""
        text, content = self.text, self.messages[turn]["content"]
        end = len(text) - len(after)
        if not text.endswith(after):
            raise self._rewritten(turn)
        if text.startswith(before) and len(before) <= end and text[len(before) : end] in content:
            return len(before), end
        # reasoning in the content takes the place of what the template puts before a turn without any
        said = content if text[:end].endswith(content) else content.rstrip()
        proof = text[:end] + self.sentinel + after
        if not text[:end].endswith(said) or self.render(self.replace(turn, content=said + self.sentinel)) != proof:
            raise self._rewritten(turn)
        # what the text has without it too is the template's, though it reads the same
        while said and self.render(self.replace(turn, content=said[1:])) == text:
            said = said[1:]
        return end - len(said), end

    def _drop_reasoning_that_is_not_rendered(self, turn: int) -> None:
        """Templates leave out the reasoning of earlier turns. Raises BadDocument where it is left out of a last one."""
        without = self.replace(turn, REASONING)
        if self.render(without) == self.text:
            closed = self.replace(turn, **dict.fromkeys(REASONING, self.sentinel))[: turn + 1]
            if self.sentinel not in self.render(closed):
                raise BadDocument(f"turn {turn + 1}: {REASONING[0]}: the chat template does not render it")
            self.messages = without

    def _find_reasoning(self, turn: int, before: str) -> int:
        """Where a turn with reasoning starts: after the generation prompt, which is at the tag that the template writes
        before the reasoning if the generation prompt does not have it."""
        start, rest = self._split(turn, self.replace(turn, **dict.fromkeys(REASONING, self.sentinel)))
        end = len(self.text) - len(rest)
        thought = self.text[len(start) : end]
        if not (self.text.startswith(start) and self.text.endswith(rest) and len(start) <= end):
            raise self._rewritten(turn)
        if thought not in self.messages[turn][REASONING[0]]:
            raise self._rewritten(turn)
        opening = self._opening_of_reasoning
        if opening is not None and start.endswith(opening):
            return len(start) - len(opening)
        if start.startswith(before):
            return len(before)
        raise BadDocument(f"turn {turn + 1}: {REASONING[0]}: the chat template has no generation prompt before it")

    @cached_property
    def _opening_of_reasoning(self) -> str | None:
        """What the template writes between the generation prompt and reasoning; None without a generation prompt."""
        question = {"role": "user", "content": "x"}
        answer = {"role": "assistant", "content": "x", **dict.fromkeys(REASONING, self.sentinel)}
        try:
            prompt = self.render([question], add_generation_prompt=True)
            if prompt == self.render([question]):
                return None
            before, found, _ = self.render([question, answer]).partition(self.sentinel)
        except BadDocument:
            return None
        return before.removeprefix(prompt) if found and before.startswith(prompt) else None

    def _check_calls(self, turn: int, start: int, end: int) -> None:
        """Raises BadDocument unless the template renders name and arguments of each call in the turn's place."""
        for field in CALLS:
            if field not in self.messages[turn]:
                continue
            calls = self.messages[turn][field]
            marks: list[str] = []
            marked = [self._mark_call(call, marks) for call in ([calls] if isinstance(calls, dict) else calls)]
            other = self.render(self.replace(turn, **{field: marked[0] if isinstance(calls, dict) else marked}))
            if not (other.startswith(self.text[:start]) and other.endswith(self.text[end:])):
                raise self._rewritten(turn)
            said = other[start : len(other) - (len(self.text) - end)]
            if any(mark not in said for mark in marks):
                raise BadDocument(f"turn {turn + 1}: {field}: the chat template does not render it")

    def _mark_call(self, call: dict, marks: list[str]) -> dict:
        """The call with another name and other arguments, which are appended to `marks`."""
        if isinstance(call.get("function"), dict):
            return call | {"function": self._mark_call(call["function"], marks)}
        name, argument = (f"{self.sentinel}{len(marks)}{kind}x" for kind in "na")
        marks.append(name)
        if not call.get("arguments"):
            return call | {"name": name}
        marks.append(argument)
        arguments: Any = {argument: argument}
        return call | {
            "name": name,
            "arguments": json.dumps(arguments) if isinstance(call["arguments"], str) else arguments,
        }


def _parse_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as objects, where they are the JSON of one."""

    def parse(call: dict) -> dict:
        if isinstance(call.get("function"), dict):
            return call | {"function": parse(call["function"])}
        try:
            arguments = json.loads(call["arguments"])
        except (KeyError, TypeError, ValueError, RecursionError):
            return call
        return call | {"arguments": arguments} if isinstance(arguments, dict) else call

    parsed = {name: message[name] for name in CALLS if name in message}
    return message | {
        n: parse(calls) if isinstance(calls, dict) else [*map(parse, calls)] for n, calls in parsed.items()
    }
