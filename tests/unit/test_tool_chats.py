"""Tools, tool calls and reasoning: random chats against their text and targets, put together in plain Python."""

import json
import random
from itertools import groupby
from pathlib import Path

import pytest
from small_models import write_tokenizer
from transformers import AutoTokenizer

from tidar.config import UserError
from tidar.data.chat_records import conversation
from tidar.data.chat_template import encode_chats, template_variables
from tidar.data.corpus import BadDocument

QWEN3 = Path(__file__).parents[3] / "shared" / "tokenizers" / "qwen3"
# of Llama 3's kind: another role for results, calls as JSON with other names, trimmed texts, no generation prompt
LLAMA = (
    "{% if tools %}{{ '<|head|>system<|end_head|>\n\nTools:' }}{% for t in tools %}{{ ' ' + t|tojson }}{% endfor %}"
    "{{ '<|eot|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|head|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_head|>\n\n' + m.content|trim }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments|tojson + '}' }}"
    "{{ '' if loop.last else '; ' }}{% endfor %}{{ '<|eot|>' }}{% endfor %}"
)
# reasoning in tags of its own, in every turn; {prompt} is what its generation prompt has behind the header
TAGS = (
    "{% for t in tools or [] %}{{ '[tool]' + t|tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|head|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '[thought]' + m.reasoning_content + '[/thought]' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}{{ '[call ' + f.name + ']' }}"
    "{{ f.arguments if f.arguments is string else f.arguments|tojson }}{{ '[/call]' }}{% endfor %}{{ '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant\n{prompt}' }}{% endif %}"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|head|>", "<|end_head|>", "<|eot|>"], special_tokens=True)
    return tokenizer


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def function(call: dict) -> dict:
    return call.get("function") or call


# A reference gives the text of a chat in pieces: text, and the turn of the assistant that says it, or None.


def qwen3_pieces(messages: list[dict], tools: list[dict]) -> list[tuple[str, int | None]]:
    pieces = []
    rest = list(enumerate(messages))
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        lines = "".join("\n" + as_json(tool) for tool in tools)
        text = "<|im_start|>system\n" + ("" if system is None else system + "\n\n")
        text += (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
            f"function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\nFor each function call"
            ", return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        )
        pieces.append((text, None))
    elif system is not None:
        pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", None))
    last_query = max(i for i, message in rest if message["role"] == "user")
    for i, message in rest:
        content, role = message["content"] or "", message["role"]
        if role == "user":
            pieces.append((f"<|im_start|>user\n{content}<|im_end|>\n", None))
        elif role == "tool":
            text = "<|im_start|>user" if messages[i - 1]["role"] != "tool" else ""
            text += f"\n<tool_response>\n{content}\n</tool_response>"
            is_last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            pieces.append((text + ("<|im_end|>\n" if is_last else ""), None))
        elif role == "assistant":
            pieces.append(("<|im_start|>assistant\n", None))
            thought = message.get("reasoning_content") or ""
            if not thought and "</think>" in content:  # written "<think>\n…\n</think>\n\n…"
                thought, content = content.removeprefix("<think>\n").split("\n</think>\n\n")
            is_last = i == len(messages) - 1
            if i > last_query and thought:
                pieces.append(("<think>\n" + thought.strip("\n") + "\n</think>\n\n", i))
            elif i > last_query and is_last:
                pieces.append(("<think>\n\n</think>\n\n", None))
            pieces.append((content.lstrip("\n") if i > last_query and (thought or is_last) else content, i))
            for number, call in enumerate(map(function, message.get("tool_calls", []))):
                arguments = call["arguments"]
                arguments = arguments if isinstance(arguments, str) else as_json(arguments)
                text = "\n" if content or number else ""
                text += f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'
                pieces.append((text, i))
            pieces += [("<|im_end|>", i), ("\n", None)]
    return pieces


def llama_pieces(messages: list[dict], tools: list[dict]) -> list[tuple[str, int | None]]:
    pieces = []
    if tools:
        pieces.append(("<|head|>system<|end_head|>\n\nTools: " + " ".join(map(as_json, tools)) + "<|eot|>", None))
    for i, message in enumerate(messages):
        role = "ipython" if message["role"] == "tool" else message["role"]
        pieces.append((f"<|head|>{role}<|end_head|>\n\n", None))
        text = (message["content"] or "").strip()
        calls = []
        for call in map(function, message.get("tool_calls", [])):
            arguments = call["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append(f'{{"name": "{call["name"]}", "parameters": {as_json(arguments)}}}')
        pieces.append((text + "; ".join(calls) + "<|eot|>", i if role == "assistant" else None))
    return pieces


def tags_pieces(prompt: str | None, only_last: bool = False):
    def pieces_of(messages: list[dict], tools: list[dict]) -> list[tuple[str, int | None]]:
        pieces = [("[tool]" + as_json(tool), None) for tool in tools]
        for i, message in enumerate(messages):
            turn = i if message["role"] == "assistant" else None
            pieces.append((f"<|head|>{message['role']}\n", None))
            if message.get("reasoning_content") and (turn == len(messages) - 1 or not only_last):
                pieces.append(("[thought]", None if prompt else turn))
                pieces.append((message["reasoning_content"] + "[/thought]", turn))
            pieces.append((message["content"] or "", turn))
            for call in map(function, message.get("tool_calls", [])):
                arguments = call["arguments"]
                arguments = arguments if isinstance(arguments, str) else as_json(arguments)
                pieces.append((f"[call {call['name']}]{arguments}[/call]", turn))
            pieces += [("<|eot|>", turn), ("\n", None)]
        return pieces

    return pieces_of


WORDS = ["the", " the", "\n", "\n\n", "你好", "👋🏽", "wasSaid0x", "<|im_end|>", "<|eot|>", "<|im_start|>assistant\n"]
WORDS += ["<tool_call>", "<think>", "[thought]", "[/call]", "<|head|>assistant\n", '{"name": "', "é", " ", "x", "\\n"]


def random_record(rng: random.Random, reasons: bool, inline: bool = False) -> dict:
    def text(least: int = 0) -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(least, 5)))

    def call() -> dict:
        arguments = {rng.choice("abc"): rng.choice([text(), 3, None, ["x", {}]]) for _ in range(rng.randint(0, 2))}
        called = {"name": rng.choice(["find", "f_2"]), "arguments": rng.choice([arguments, json.dumps(arguments)])}
        return rng.choice([called, {"type": "function", "id": "c1", "function": called}])

    def said(n_calls: int) -> dict:
        message = {"role": "assistant", "content": text()}
        if n_calls:
            message |= {"tool_calls": [call() for _ in range(n_calls)]}
            message |= {"content": rng.choice([None, "", message["content"]])}
        if reasons and rng.random() < 0.5:
            thought = "so" + text() + "?"
            if inline and rng.random() < 0.3:
                thought = thought.replace("<think>", "")
                message["content"] = f"<think>\n{thought}\n</think>\n\nWell{message['content'] or ''}"
            else:
                message["reasoning_content"] = rng.choice(["\n", ""]) + thought + rng.choice(["\n", ""])
        return message | rng.choice([{}, {"weight": rng.randint(0, 1)}])

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        for n_calls in rng.choices([1, 2], k=rng.randint(0, 2)):
            messages.append(said(n_calls))
            messages += [{"role": "tool", "content": text(), "name": "find"} for _ in range(rng.randint(1, n_calls))]
        messages.append(said(rng.choice([0, 0, 1])))
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": text()})
    tools = [{"type": "function", "function": {"name": text(1), "default": None}} for _ in range(rng.randint(0, 2))]
    return {"messages": messages, "tools": rng.choice([tools, json.dumps(tools)])}


def encode(tokenizer, *records: dict) -> list:
    variables = template_variables(tokenizer)
    return encode_chats(tokenizer, [conversation(record, "", "", variables) for record in records])


def expected(tokenizer, record: dict, pieces_of) -> tuple[list[int], list[bool]]:
    messages, tools = record["messages"], record["tools"]
    pieces = pieces_of(messages, json.loads(tools) if isinstance(tools, str) else tools)
    ids, targets = [], []
    for turn, group in groupby(pieces, key=lambda piece: piece[1]):
        tokens = tokenizer("".join(text for text, _ in group), add_special_tokens=False)["input_ids"]
        ids += tokens
        targets += [turn is not None and messages[turn].get("weight", 1) == 1] * len(tokens)
    return ids, targets


def compare(tokenizer, n_chats: int, pieces_of, reasons: bool, inline: bool = False) -> None:
    rng = random.Random(n_chats)
    records = [random_record(rng, reasons, inline) for _ in range(n_chats)]
    for record, found in zip(records, encode(tokenizer, *records)):
        assert found == expected(tokenizer, record, pieces_of), (
            f"{found if isinstance(found, BadDocument) else ''}{record}"
        )


@pytest.mark.skipif(not QWEN3.is_dir(), reason="needs Qwen3's tokenizer")
def test_qwen3s_template():
    compare(AutoTokenizer.from_pretrained(QWEN3), 200, qwen3_pieces, reasons=True, inline=True)


def test_a_template_of_llamas_kind(small, monkeypatch):
    monkeypatch.setattr(small, "chat_template", LLAMA)
    compare(small, 100, llama_pieces, reasons=False)


@pytest.mark.parametrize("prompt", ["", "[thought]", None], ids=["header", "header and tag", "no generation prompt"])
def test_a_template_with_tags_of_its_own(small, monkeypatch, prompt):
    template = TAGS.replace("{prompt}", prompt or "")
    monkeypatch.setattr(small, "chat_template", template if prompt is not None else template.split("{% if add_gen")[0])
    compare(small, 60, tags_pieces(prompt), reasons=True)


def test_a_template_that_leaves_out_reasoning_of_earlier_turns(small, monkeypatch):
    template = TAGS.replace("{prompt}", "").replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
    monkeypatch.setattr(small, "chat_template", template)
    compare(small, 50, tags_pieces("", only_last=True), reasons=True)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TURN = "{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>\n' }}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}"


def record_of(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **fields}]}


@pytest.mark.parametrize(
    "template, record, reason",
    [
        (PLAIN, record_of(tool_calls=[CALL]), "turn 2: tool_calls: the chat template does not render it"),
        (
            PLAIN,
            record_of(function_call=CALL["function"]),
            "turn 2: function_call: the chat template does not render it",
        ),
        (PLAIN, record_of(thinking="Hm"), "turn 2: reasoning_content: the chat template does not render it"),
        (PLAIN, record_of() | {"tools": [{"name": "f"}]}, "tools: the chat template does not render it"),
        (PLAIN, record_of() | {"documents": [{"text": "a"}]}, "documents: the chat template does not render it"),
        (
            PLAIN.replace("m.content", "(m.content + (m.tool_calls or [{'name': ''}])[0].name)"),
            record_of(tool_calls=[CALL["function"]]),
            "turn 2: tool_calls: the chat template does not render it",
        ),
        (
            "{% for m in messages %}{% if m.role != 'tool' %}" + TURN + "{% endif %}{% endfor %}",
            {"messages": [*record_of()["messages"], {"role": "tool", "content": "3"}]},
            "turn 3: role = tool: the chat template does not render the turn",
        ),
        # the header of a turn with reasoning is not that of a plain one, and there is no generation prompt
        (
            PLAIN.replace("m.content", "('(' + m.thinking + ')' if m.thinking else '()') + m.content"),
            record_of(thinking="Hm"),
            "turn 2: reasoning_content: the chat template has no generation prompt before it",
        ),
        (
            TAGS.replace("+ m.reasoning_content", "+ m.reasoning_content|upper"),
            record_of(reasoning="Hm"),
            "the chat template rewrites what the assistant says in turn 2",
        ),
        (
            TAGS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"),
            record_of(tool_calls=[CALL]),
            "the chat template rewrites what the assistant says in turn 2",
        ),
    ],
)
def test_what_a_template_does_not_render_is_refused(small, monkeypatch, template, record, reason):
    monkeypatch.setattr(small, "chat_template", template)
    (found,) = encode(small, record)
    assert isinstance(found, BadDocument) and str(found) == reason


def test_variables_of_a_template(small, monkeypatch):
    """Those that neither it nor transformers sets; a record's field of that name is passed."""
    template = (
        "{% set seen = [] %}{% if mode is not defined %}{% set mode = 'calm' %}{% endif %}{{ bos_token }}"
        "{% if shout %}{{ raise_exception('too loud') }}{% endif %}{{ '<|head|>' + mode + strftime_now('') }}"
        "{% for m in messages %}{% generation %}{{ m.role + '\n' + m.content + '<|eot|>' }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{% if add_generation_prompt or tools %}{% endif %}"
    )
    monkeypatch.setattr(small, "chat_template", {"default": template, "tool_use": "{{ documents }}"})
    assert template_variables(small) == {"mode", "shout", "tools", "documents"}
    monkeypatch.setattr(small, "chat_template", template)
    records = [record_of() | {"mode": "wild", "source": "a"}, record_of(), record_of() | {"shout": True}]
    wild, calm, loud = encode(small, *records)
    assert small.decode(wild[0]).startswith("<|head|>wild") and small.decode(calm[0]).startswith("<|head|>calm")
    assert str(loud) == "the chat template cannot be rendered (too loud)"
    monkeypatch.setattr(small, "chat_template", "{% if %}")
    with pytest.raises(UserError, match="data.tokenizer = .*: bad chat template"):
        template_variables(small)
