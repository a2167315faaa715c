"""Records of chats, in the forms that data sets have, to one form: messages as chat templates read them.

A field of a turn is passed to the chat template, and so is a field of a record whose name is a variable of the
template, or that is given in `chat_template_kwargs`. Other fields of a record (id, source, score, …) are metadata and
are ignored. A field that changes what is said, and that neither the template nor this module reads, is refused by name.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidar.data.corpus import BadDocument

Messages = list[dict[str, Any]]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TURNS = ("messages", "conversations")
PROMPT_AND_RESPONSE = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
BEGINNINGS = (*TURNS, *dict.fromkeys(prompt for prompt, _ in PROMPT_AND_RESPONSE))
SYSTEM = ("system", "system_prompt", "system_message")
INPUT = ("input", "context")
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the same thing
CALLS = ("tool_calls", "function_call")
TEMPLATE_DATA = ("tools", "functions", "documents")
NOT_SUPPORTED = ("history", "image", "images", "video", "videos", "audio", "audios")
MEDIA = ("image", "image_url", "video", "video_url", "audio", "input_audio")


@dataclass
class Conversation:
    """A chat as its template reads it.

    messages: role (system, user, assistant or tool), content (a text), and other fields, as tool_calls. is_target: for
    each message, whether it may be a target; None: all may, of which only those of the assistant are. variables: the
    template's other variables, as tools.
    """

    messages: Messages
    is_target: list[bool] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def is_chat(record: dict) -> bool:
    """Whether a record has a field that a chat begins with."""
    return any(record.get(name) is not None for name in BEGINNINGS)


def conversation(
    record: Any,
    prompt_field: str = "",
    response_field: str = "",
    variables: Collection[str] = TEMPLATE_DATA,
    has_answer: bool = True,
) -> Conversation:
    """The chat of a parsed record, with at least one turn of the assistant unless `has_answer` is false.

    Read are `messages` and `conversations` (turns with role or from, content or value) and a prompt with its response,
    each a text or a list of turns: the fields named here, which come before all else, or one of PROMPT_AND_RESPONSE.
    A prompt's `input` or `context` follows it on a new line; `system` or `system_prompt` becomes the first turn.
    variables: names of the template's variables. has_answer: false for a chat that is to be answered; then a prompt
    needs no response. Raises BadDocument for anything else.
    """
    if not isinstance(record, dict):
        raise BadDocument(f"{shown(record)}: must be a JSON object")
    pairs = list(dict.fromkeys((prompt_field or p, response_field or r) for p, r in PROMPT_AND_RESPONSE))
    if not has_answer:
        pairs += dict.fromkeys((prompt, "") for prompt, _ in pairs)
    present = [pair for pair in pairs if all(name in record for name in pair if name)]
    whole = (pair for pair in present if all(record[name] is not None for name in pair if name))
    pair = next(whole, (*present, None)[0])
    named = bool(prompt_field or response_field)
    turns = next((name for name in TURNS if not named and record.get(name) is not None), None)
    if turns:
        read = {turns}
        messages, is_target = _read_turns(record, turns)
    elif pair:
        read = {*pair, *INPUT}
        messages, is_target = _read_prompt_and_response(record, *pair)
    else:
        asked = [f"{prompt} and {response}" if has_answer else prompt for prompt, response in pairs]
        fields = " or ".join(dict.fromkeys(asked))
        raise BadDocument(
            f"fields = {shown(list(record))}: must have {fields if named else f'messages, conversations, or {fields}'}"
        )
    for name in NOT_SUPPORTED:
        if name not in read and not is_empty(record.get(name)):
            raise BadDocument(f"{name} = {shown(record[name])}: is not supported")
    name = _only_one(record, [name for name in SYSTEM if name not in read])
    if name:
        if any(message["role"] == "system" for message in messages):
            raise BadDocument(f"{name} = {shown(record[name])}: must not be given together with a turn of the system")
        messages, is_target = [{"role": "system", "content": _text(record, name)}, *messages], [False, *is_target]
    if has_answer and all(message["role"] != "assistant" for message in messages):
        raise BadDocument(f"roles = {shown([m['role'] for m in messages])}: must have a turn of the assistant")
    return Conversation(messages, is_target, _read_variables(record, read.union(SYSTEM), variables))


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: null, an empty text, or lists and objects of such values, as Parquet has them."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None or value == "" or (isinstance(value, list) and all(map(is_empty, value)))


def without_nulls(value: Any) -> Any:
    """A value of Parquet without the nulls of its objects: there, an object has every field that any row has."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_variables(record: dict, read: set[str], variables: Collection[str]) -> dict[str, Any]:
    found = {name: record[name] for name in record if name not in read and name in {*variables, *TEMPLATE_DATA}}
    given = record.get("chat_template_kwargs")
    if not is_empty(given):
        if not isinstance(given, dict):
            raise BadDocument(f"chat_template_kwargs = {shown(given)}: must be an object")
        for name in given:
            if name not in variables and not is_empty(given[name]):
                raise BadDocument(f"chat_template_kwargs: {name}: is no variable of the chat template")
        found |= given
    for name in TEMPLATE_DATA:
        if name in found:
            found[name] = _objects(found, name)
    return {name: value for name, value in found.items() if not is_empty(value)}


def _read_prompt_and_response(record: dict, prompt: str, response: str) -> tuple[Messages, list[bool]]:
    """response: "" where there is none."""
    messages: Messages = []
    is_target: list[bool] = []
    for name, role in ((prompt, "user"), *([(response, "assistant")] if response else [])):
        if isinstance(record[name], list):
            turns, targets = _read_turns(record, name)
        else:
            turns, targets = [{"role": role, "content": _text(record, name, f"turn {len(messages) + 1}: ")}], [True]
        messages += turns
        is_target += targets if name == response else [False] * len(turns)  # a prompt is context
        name = _only_one(record, [name for name in INPUT if name not in (prompt, response)])
        if role == "user" and name:
            if isinstance(record[prompt], list):
                raise BadDocument(f"{name} = {shown(record[name])}: must not be given together with a list of turns")
            turns[0]["content"] += "\n" + _text(record, name)
    return messages, is_target


def _read_turns(record: dict, name: str) -> tuple[Messages, list[bool]]:
    turns = record[name]
    if not isinstance(turns, list) or not turns:
        raise BadDocument(f"{name} = {shown(turns)}: must be a list of one turn or more")
    messages, is_target = [], []
    for number, turn in enumerate(turns, 1):
        place = f"turn {number}: "
        if not isinstance(turn, dict):
            raise BadDocument(f"{place}{shown(turn)}: must be an object with role and content, or from and value")
        messages.append(_message(turn, place))
        is_target.append(_is_target(turn, place))
    return messages, is_target


def _message(turn: dict, place: str) -> dict[str, Any]:
    role_field, content_field = _first(turn, ("role", "from")), _first(turn, ("content", "value"))
    role = _text(turn, role_field, place)
    if role not in ROLES:
        raise BadDocument(f"{place}{role_field} = {shown(role)}: must be one of {', '.join(ROLES)}")
    known = {role_field, content_field, "weight", "train", "loss"}
    more = {name: value for name, value in turn.items() if name not in known and not is_empty(value)}
    if role == "function_call":  # ShareGPT's: the calls are the turn's text
        more["tool_calls"], turn = turn.get(content_field), {}
    for name in CALLS:
        if name in more:
            calls = _objects(more, name, place) if name == "tool_calls" or role == "function_call" else [more[name]]
            functions = [call.get("function") or call if isinstance(call, dict) else None for call in calls]
            if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
                raise BadDocument(f"{place}{name} = {shown(more[name])}: must have the name of each function")
            if not calls:
                del more[name]
            elif name == "tool_calls":
                more[name] = calls
    if reasoning := _only_one(more, REASONING, place):
        more |= dict.fromkeys(REASONING, _text(more, reasoning, place))
    says_more = [name for name in (*REASONING, *CALLS) if name in more]
    if says_more and ROLES[role] != "assistant":
        raise BadDocument(f"{place}{says_more[0]} = {shown(more[says_more[0]])}: only the assistant's turns have it")
    if says_more and turn.get(content_field) is None:
        return {"role": ROLES[role], "content": "", **more}
    return {"role": ROLES[role], "content": _content(turn, content_field, place), **more}


def _is_target(turn: dict, place: str) -> bool:
    """Whether a turn's marks let it be a target: `weight` (0, 1), `train` and `loss` (true, false)."""
    marks = {name: turn[name] for name in ("weight", "train", "loss") if turn.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadDocument(f"{place}{name} = {shown(value)}: must be 0 or 1, or true or false")
    if len(set(marks.values())) > 1:
        raise BadDocument(f"{place}{' and '.join(marks)}: must say the same")
    return all(marks.values())


def _content(turn: dict, name: str, place: str) -> str:
    """The text of a turn, which may be a list of parts of type text."""
    if not isinstance(turn.get(name), list):
        return _text(turn, name, place)
    texts = []
    for part in turn[name]:
        if not isinstance(part, dict):
            raise BadDocument(f"{place}{name} has the part {shown(part)}: must be an object")
        media = [key for key in MEDIA if not is_empty(part.get(key))]
        if media or part.get("type", "text") != "text":
            raise BadDocument(
                f"{place}{name} has a part of type {(*media, part.get('type'))[0]}: only text is supported"
            )
        texts.append(_text(part, "text", f"{place}{name}: "))
    return "".join(texts)


def _objects(record: dict, name: str, place: str = "") -> list[dict]:
    """A list of objects, or one object, or the JSON text of either."""
    value = record[name]
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = 0
    parsed = [] if is_empty(parsed) else [parsed] if isinstance(parsed, dict) else parsed
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        raise BadDocument(f"{place}{name} = {shown(value)}: must be a list of objects, or the JSON text of one")
    return parsed


def _first(record: dict, names: Sequence[str]) -> str:
    """The name that has a value, else the one that is there, else the first."""
    return min(names, key=lambda name: (record.get(name) is None, name not in record))


def _only_one(record: dict, names: Sequence[str], place: str = "") -> str:
    """The name of these that has a value, or "". Raises BadDocument where several have different ones."""
    found = [name for name in names if not is_empty(record.get(name))]
    if any(record[name] != record[found[0]] for name in found):
        raise BadDocument(f"{place}{' and '.join(found)}: must not differ, as they mean the same")
    return found[0] if found else ""


def _text(record: dict, name: str, place: str = "") -> str:
    if name not in record:
        raise BadDocument(f"{place}{name} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise BadDocument(f"{place}{name} = {shown(value)}: must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = shown(value[error.start])
        raise BadDocument(f"{place}{name} has {found}: must be Unicode without lone surrogates") from None
    return value


def shown(value: Any) -> str:
    """In one line, not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
