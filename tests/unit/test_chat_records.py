"""Records of chats, in every form that is read, to messages, targets and variables of the template."""

import json

import pytest

from tidar.data.chat_records import Conversation, conversation, without_nulls
from tidar.data.corpus import BadDocument

ONE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SUM = [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"prompt": "Hi", "response": "Hello", "id": 3}, ONE),
        ({"prompt": "Hi", "completion": "Hello"}, ONE),
        ({"question": "Hi", "answer": "Hello", "prompt": None, "messages": None}, ONE),
        ({"messages": [{**m, "tool_calls": []} for m in ONE], "prompt": "", "response": ""}, ONE),
        # either kind of turn under either name
        ({"messages": SHAREGPT}, ONE),
        ({"conversations": ONE, "system": None}, ONE),
        ({"conversations": [{**turn, "role": None, "content": None} for turn in SHAREGPT]}, ONE),
        # texts in parts
        ({"messages": [{**m, "content": [{"type": "text", "text": m["content"], "image": None}]} for m in ONE]}, ONE),
        ({"messages": [ONE[0], {"role": "assistant", "content": [{"text": "Hel"}, {"text": "lo"}]}]}, ONE),
        ({"prompt": ONE[:1], "completion": ONE[1:]}, ONE),
        ({"prompt": [SYSTEM, *ONE[:1]], "completion": "Hello"}, [SYSTEM, *ONE]),
        # a system text of the record's own
        ({"system": "Be brief.", "conversations": SHAREGPT}, [SYSTEM, *ONE]),
        ({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, [SYSTEM, *ONE]),
        ({"system": "", "system_prompt": "Be brief.", "messages": ONE}, [SYSTEM, *ONE]),
        # Alpaca's and Dolly's
        ({"instruction": "Add", "input": "1 2", "output": "3", "system": ""}, SUM),
        ({"instruction": "Add", "context": "1 2", "response": "3", "category": "sums"}, SUM),
        ({"instruction": "Hi", "input": "", "output": "Hello", "history": []}, ONE),
        ({"prompt": "Add", "context": "1 2", "response": "3"}, SUM),
        # nothing in them
        ({"messages": ONE, "tools": "[]", "functions": [{"name": None}], "documents": "null"}, ONE),
        (
            {"messages": [{**m, "function_call": {"name": None, "arguments": None}, "tool_calls": "[]"} for m in ONE]},
            ONE,
        ),
    ],
)
def test_forms_of_records(record, messages):
    found = conversation(record)
    assert found.messages == messages and not found.variables and len(found.is_target) == len(messages)


def test_fields_that_are_named():
    assert conversation({"ask": "Hi", "response": "Hello"}, prompt_field="ask").messages == ONE
    assert conversation({"question": "Hi", "say": "Hello"}, response_field="say").messages == ONE
    # they come before all else, and input is read beside them too
    record = {"messages": 3, "ask": "Hi", "say": "Hello", "prompt": "", "response": ""}
    assert conversation(record, "ask", "say").messages == ONE
    record = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert conversation(record, "instruction", "output").messages == SUM
    assert conversation(record, "input", "output").messages == [{"role": "user", "content": "1 2"}, SUM[1]]
    with pytest.raises(BadDocument, match=r'^fields = \["prompt"\]: must have ask and say$'):
        conversation({"prompt": "Hi"}, "ask", "say")
    with pytest.raises(BadDocument, match=r": must have ask and response or ask and completion or ask and answer or"):
        conversation({"messages": ONE}, prompt_field="ask")


def test_names_of_roles():
    names = "system human gpt user chatgpt tool observation function_response assistant".split()
    roles = "system user assistant user assistant tool tool tool assistant".split()
    for keys in (("from", "value"), ("role", "content")):
        found = conversation({"conversations": [dict(zip(keys, (name, name))) for name in names]})
        assert found.messages == [{"role": role, "content": name} for role, name in zip(roles, names)]


def test_turns_that_are_no_target():
    turns = [ONE[0], {**ONE[1], "weight": 0}, ONE[0], {**ONE[1], "train": False}, ONE[0], {**ONE[1], "loss": True}]
    found = conversation({"system": "Be brief.", "messages": [*turns, {**ONE[1], "weight": 1.0, "train": None}]})
    assert found.messages == [SYSTEM, *ONE * 3, ONE[1]]
    assert [target for m, target in zip(found.messages, found.is_target) if m["role"] == "assistant"] == [0, 0, 1, 1]
    # the turns of a prompt are context
    found = conversation({"prompt": [*ONE, ONE[0]], "completion": [ONE[1], ONE[0], {**ONE[1], "weight": 0}]})
    assert found.messages == ONE * 3 and found.is_target[1::2] == [False, True, False]


def test_tools_and_reasoning():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    thoughts = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "Hm")
    tool = {"role": "tool", "content": "1", "name": "f", "tool_call_id": "x"}
    for reasoning in ("reasoning_content", "thinking"):
        for calls in ([call], json.dumps([call])):
            said = {"role": "assistant", "content": None, reasoning: "Hm", "tool_calls": calls, "refusal": None}
            found = conversation(
                {"messages": [ONE[0], said, tool, ONE[1]], "tools": json.dumps([{"x": None}, {"y": 1}])}
            )
            expected = {"role": "assistant", "content": "", "tool_calls": [call], **thoughts}
            assert found == Conversation(
                [ONE[0], expected, tool, ONE[1]], [True] * 4, {"tools": [{"x": None}, {"y": 1}]}
            )
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"b": 2}}]
    turns = [SHAREGPT[0], {"from": "function_call", "value": json.dumps(calls)}, {"from": "observation", "value": "1"}]
    assert conversation({"conversations": turns}).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": calls,
    }


def test_variables_of_the_template():
    """Fields with the name of a variable, and chat_template_kwargs, are passed; other fields are metadata."""
    record = {"messages": ONE, "date": "today", "think": False, "score": 3, "source": {"tools": 1}, "empty": None}
    assert conversation(record, "", "", {"date", "think", "empty"}).variables == {"date": "today", "think": False}
    record["chat_template_kwargs"] = {"think": True, "date": None}
    assert conversation(record, "", "", {"date", "think"}).variables == {"think": True}
    with pytest.raises(BadDocument, match="^chat_template_kwargs: think: is no variable of the chat template$"):
        conversation(record, "", "", {"date"})


def test_nulls_of_parquet():
    value = {"a": None, "b": [{"c": None, "d": 1}, None], "e": {"f": None}}
    assert without_nulls(value) == {"b": [{"d": 1}, None], "e": {}}


def said(**fields) -> dict:
    return {"messages": [ONE[0], {"role": "assistant", "content": "", **fields}]}


@pytest.mark.parametrize(
    "record, message",
    [
        ([1], "[1]: must be a JSON object"),
        (
            {"text": "Hi"},
            'fields = ["text"]: must have messages, conversations, or prompt and response or prompt and completion or '
            "question and answer or question and response or instruction and output or instruction and response",
        ),
        ({"messages": []}, "messages = []: must be a list of one turn or more"),
        ({"conversations": "Hi"}, 'conversations = "Hi": must be a list of one turn or more'),
        ({"messages": ["Hi"]}, 'turn 1: "Hi": must be an object with role and content, or from and value'),
        ({"messages": ONE[:1]}, 'roles = ["user"]: must have a turn of the assistant'),
        (
            {"conversations": [*ONE, {"from": "bot\n", "value": ""}]},
            'turn 3: from = "bot\\n": must be one of system, user, human, assistant, gpt, chatgpt, function_call, '
            "tool, observation, function_response",
        ),
        ({"messages": [{"role": ["user"], "content": ""}]}, 'turn 1: role = ["user"]: must be a text'),
        ({"messages": [{"content": ""}]}, "turn 1: role is missing"),
        ({"messages": [{"role": "user"}]}, "turn 1: content is missing"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "turn 1: value = null: must be a text"),
        ({"question": "Hi", "answer": 3}, "turn 2: answer = 3: must be a text"),
        ({"question": "Hi", "answer": None}, "turn 2: answer = null: must be a text"),
        ({"prompt": "\ud800", "response": ""}, 'turn 1: prompt has "\\ud800": must be Unicode without lone surrogates'),
        (said(content=["Hi"]), 'turn 2: content has the part "Hi": must be an object'),
        (
            said(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            "turn 2: content has a part of type image_url: only text is supported",
        ),
        (said(content=[{"type": "image"}]), "turn 2: content has a part of type image: only text is supported"),
        (said(content=[{"type": "text"}]), "turn 2: content: text is missing"),
        (said(weight=0.5), "turn 2: weight = 0.5: must be 0 or 1, or true or false"),
        (said(weight="0"), 'turn 2: weight = "0": must be 0 or 1, or true or false'),
        (said(weight=1, train=False), "turn 2: weight and train: must say the same"),
        (said(tool_calls=[{"id": 3}]), 'turn 2: tool_calls = [{"id": 3}]: must have the name of each function'),
        (said(tool_calls="f()"), 'turn 2: tool_calls = "f()": must be a list of objects, or the JSON text of one'),
        (said(function_call="f"), 'turn 2: function_call = "f": must have the name of each function'),
        (said(reasoning_content=3), "turn 2: reasoning_content = 3: must be a text"),
        (
            said(reasoning="a", thinking="b"),
            "turn 2: reasoning and thinking: must not differ, as they mean the same",
        ),
        (
            {"messages": [{**ONE[0], "thinking": "Hm"}, ONE[1]]},
            'turn 1: reasoning_content = "Hm": only the assistant\'s turns have it',
        ),
        ({"messages": ONE, "tools": "[f]"}, 'tools = "[f]": must be a list of objects, or the JSON text of one'),
        (
            {"messages": [SYSTEM, *ONE], "system_prompt": "Hm"},
            'system_prompt = "Hm": must not be given together with a turn of the system',
        ),
        (
            {"messages": ONE, "system": "a", "system_prompt": "b"},
            "system and system_prompt: must not differ, as they mean the same",
        ),
        ({"messages": ONE, "system": ["Hm"]}, 'system = ["Hm"]: must be a text'),
        ({"question": "Hi", "answer": "", "context": {"a": 1}}, 'context = {"a": 1}: must be a text'),
        (
            {"prompt": ONE[:1], "completion": ONE[1:], "input": "Hm"},
            'input = "Hm": must not be given together with a list of turns',
        ),
        ({"prompt": "Hi", "response": "", "history": [["a", "b"]]}, 'history = [["a", "b"]]: is not supported'),
        ({"conversations": SHAREGPT, "image": "a.png"}, 'image = "a.png": is not supported'),
        ({"messages": ONE, "chat_template_kwargs": [1]}, "chat_template_kwargs = [1]: must be an object"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(BadDocument) as error:
        conversation(record)
    assert str(error.value) == message and len(message.splitlines()) == 1
