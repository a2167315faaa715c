"""The command that decodes: text as it comes, ends, files of answers, and bad input."""

import errno
import io
import json
import random
import re
from unittest.mock import Mock

import pytest
from small_models import make_model, write_tokenizer

from tidar import generate
from tidar.data import load_tokenizer
from tidar.data.chat_records import Conversation, conversation
from tidar.data.chat_template import encode_chats, template_variables
from tidar.decoding import Engine
from tidar.decoding.prompts import read_prompts
from tidar.decoding.text import TextStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random TiDAR model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen2", eos_token_id=None).save_pretrained(folder)
    write_tokenizer(folder)
    turns = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}assistant:{% endif %}")
    config = json.loads((folder / "config.json").read_text())
    config["tidar"] = {"pattern": "tidar", "block_size": 4, "mask_token_id": 299}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_text_stream_shows_every_character_once_and_nothing_of_a_stop_string():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("aäb…🙂 \n") for _ in range(rng.randint(0, 30)))
        tokens = list(text.encode())
        stops = [text[i : i + rng.randint(1, 4)] for i in rng.sample(range(len(text) + 1), min(len(text), 2))]
        stops = [stop for stop in stops if stop] if rng.random() < 0.7 else []
        stream = TextStream(lambda tokens: bytes(tokens).decode("utf-8", "replace"), stops)
        shown, n = "", 0
        while n < len(tokens):
            step = rng.randint(1, 6)
            for _ in range(step):  # token by token, as the engine asks
                n = min(n + 1, len(tokens))
                if stream.stops(tokens[:n]):
                    break
            finished = n == len(tokens) or stream.stops(tokens[:n])
            shown += stream.new(tokens[:n], finished)
            if finished:
                break
        # the stop string that ends first decides
        end = next((n for n in range(len(text)) if any(stop in text[:n] for stop in stops)), len(text))
        expected = min((text[:end].split(stop)[0] for stop in stops), key=len, default=text)
        assert shown == expected, (text, stops)


def test_a_model_cannot_steer_the_terminal():
    assert generate.safe_text("a\x1b[31m\tb\ncé\u200d\x9b\x07") == "a\\x1b[31m\tb\ncé\u200d\\x9b\\x07"


def test_modes_print_the_same_text(folder, capsys):
    texts = []
    for mode in ("tidar", "ar"):
        generate.main(["--model", str(folder), "--prompt", "the in", "--max_new_tokens", "24", "--mode", mode])
        out, err = capsys.readouterr()
        assert out.startswith("the in") and "24 tokens in" in err and "tokens per forward" in err
        texts.append(out)
    assert texts[0] == texts[1]
    passes = []
    for lookup in "01":
        words = ["--prompt", "the in the in", "--max_new_tokens", "60", "--lookup", lookup]
        generate.main(["--model", str(folder), *words])
        out, err = capsys.readouterr()
        texts.append(out)
        passes.append(int(re.search(r"in (\d+) forward", err)[1]))
    assert texts[2] == texts[3] and passes[1] < passes[0]
    generate.main(["--model", str(folder), "--prompt", "the in", "--max_new_tokens", "24", "--show_drafts"])
    coloured = capsys.readouterr().out
    for code in (*generate.COLOURS, generate.RESET):
        coloured = coloured.replace(code, "")
    assert coloured == texts[0]


def test_answers_are_resumed_and_do_not_depend_on_where(folder, tmp_path, capsys, monkeypatch):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": f"in {i}"}, {"role": "assistant", "content": "x"}]} for i in range(5)
    ]
    chats.append({"prompt": "the"})
    prompts.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    command = ["--model", str(folder), "--prompts", str(prompts), "--output", str(output), "--max_new_tokens", "6"]
    command += ["--temperature", "1", "--batch_size", "2"]
    generate.main(command)
    whole = output.read_text()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["index"] for answer in answers] == list(range(6))
    for answer, chat in zip(answers, chats):
        asked = chat["messages"][:1] if "messages" in chat else [{"role": "user", "content": "the"}]
        assert answer["messages"][:-1] == asked and answer["messages"][-1]["role"] == "assistant"
        assert answer["finish_reason"] == "length"
    generate.main([*command, "--output", str(tmp_path / "stopped"), "--stop", *"abcdefghijklmnopqrstuvwxyz ", "\n"])
    stopped = [json.loads(line) for line in (tmp_path / "stopped").read_text().splitlines()]
    assert "stop" in {answer["finish_reason"] for answer in stopped}
    # killed in the middle of a line, on a file system without locks
    output.write_text(whole[: whole.index("\n", len(whole) // 2) - 5])
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(errno.ENOSYS, "not implemented")))
    generate.main(command)
    assert output.read_text() == whole
    output.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "stream", until_finished(3))
        with pytest.raises(SystemExit) as ended:
            generate.main(command)
    assert ended.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert len(output.read_text().splitlines()) == 3
    generate.main(command)
    assert sorted(output.read_text().splitlines()) == sorted(whole.splitlines())
    output.write_text(whole)
    unwritten = tmp_path / "unwritten"
    with pytest.raises(SystemExit):
        generate.main([*command, "--output", str(unwritten), "--top_p", "0"])
    assert not unwritten.exists()
    prompts.write_text(prompts.read_text().replace("in 3", "in three"))
    with pytest.raises(SystemExit):
        generate.main(command)
    assert "holds an answer to another prompt 3 than --prompts has now" in capsys.readouterr().err
    assert output.read_text() == whole


def test_variables_of_the_template_reach_prompts_and_chats(folder, tmp_path, capsys, monkeypatch):
    """A record's own ones come first. A chat gives the answer of the same prompt in a file."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ style }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    )
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "in"}\n{"prompt": "in", "style": "long"}\n')
    tokenizer = load_tokenizer(str(tmp_path), "--tokenizer")
    rendered = [tokenizer.decode(tokens) for *_, tokens in read_prompts(prompts, tokenizer, {"style": "short"})]
    assert rendered == ["shortuser:in\n", "longuser:in\n"]
    command = ["--model", str(folder), "--tokenizer", str(tmp_path), "--max_new_tokens", "9", "--chat_template_kwargs"]
    asked = ["--prompts", str(prompts), "--output", str(output)]
    generate.main([*command, '{"style": "short"}', *asked])
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["style"] for answer in answers] == ["short", "long"]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("in\n"))
    generate.main([*command, '{"style": "short"}', "--chat"])
    assert capsys.readouterr().out == generate.safe_text(answers[0]["messages"][-1]["content"]) + "\n"
    stops = ["--stop", answers[0]["messages"][-1]["content"][0], "--output", str(tmp_path / "empty")]
    generate.main([*command, '{"style": "short"}', *asked, *stops])
    n_empty = sum('"content": ""' in line for line in (tmp_path / "empty").read_text().splitlines())
    assert n_empty and f"warning: {n_empty} of 2 answers are empty" in capsys.readouterr().err
    for value, message in (
        ('{"styl": 1}', "line 1: chat_template_kwargs: styl: is no variable of the chat template"),
        ("[]", "--chat_template_kwargs: []: must be a JSON object"),
    ):
        with pytest.raises(SystemExit) as ended:
            generate.main([*command, value, *asked])
        assert ended.value.code and message in capsys.readouterr().err


def test_texts_are_continued_and_resumed(folder, tmp_path, capsys):
    """As --prompt continues them; a chat may have a field `text`. What is cut off ends with a whole character."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    texts = ["the in", "a…🙂 b"]
    lines = [{"text": texts[0], "id": 7}, {"text": texts[1], "messages": None}, {"prompt": "the", "text": "x"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--model", str(folder), "--prompts", str(prompts), "--output", str(output), "--max_new_tokens", "6"]
    generate.main(command)
    whole = output.read_text()
    answers = [json.loads(line) for line in whole.splitlines()]
    for index, (answer, text) in enumerate(zip(answers, texts)):
        capsys.readouterr()
        generate.main(["--model", str(folder), "--prompt", text, "--max_new_tokens", "6"])
        assert capsys.readouterr().out.rstrip("\ufffd\n") == generate.safe_text(answer["text"]).rstrip("\n")
        assert not answer["text"].endswith("\ufffd")
        assert answer["text"][: answer["prompt_characters"]] == text
        assert (answer["index"], answer["finish_reason"]) == (index, "length")
    assert [message["role"] for message in answers[2]["messages"]] == ["user", "assistant"]
    output.write_text("".join(whole.splitlines(keepends=True)[1:]))
    generate.main(command)
    assert sorted(output.read_text().splitlines()) == sorted(whole.splitlines())
    prompts.write_text(prompts.read_text().replace("the in", "the on"))
    with pytest.raises(SystemExit):
        generate.main(command)
    assert "holds an answer to another prompt 0" in capsys.readouterr().err


def until_finished(n: int):
    """`Engine.stream` that Ctrl-C interrupts when n texts are finished."""
    stream = Engine.stream

    def interrupted(*arguments, **options):
        finished = 0
        for completion in stream(*arguments, **options):
            yield completion
            finished += completion.finished
            if finished == n:
                raise KeyboardInterrupt

    return interrupted


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]}
ASKED, SAID = {"role": "user", "content": "in"}, {"role": "assistant", "content": "the"}
RECORDS = [
    {"prompt": "do", "input": "more", "system": "be nice", "response": "the"},
    {"instruction": "do", "context": "more", "output": "the"},
    {"prompt": [ASKED, SAID, ASKED], "response": "the"},
    {"messages": [ASKED, SAID], "tools": TOOLS},
    {"messages": [ASKED, SAID], "chat_template_kwargs": {"style": "short"}},
    {"messages": [ASKED, CALL, {"role": "tool", "content": "sun"}, SAID], "style": "long"},
    {"conversations": [{"from": "human", "value": "in"}, {"from": "gpt", "value": "a", "weight": 0}, ASKED, SAID]},
]


def trained_turns(chat: Conversation) -> list[int]:
    turns = enumerate(zip(chat.messages, chat.is_target, strict=True))
    return [turn for turn, (message, is_target) in turns if is_target and message["role"] == "assistant"]


def test_prompts_are_rendered_as_in_training_and_answers_keep_what_the_record_has(folder, tmp_path, capsys):
    tokenizer_folder = tmp_path / "tokenizer"
    write_tokenizer(tokenizer_folder)
    (tokenizer_folder / "chat_template.jinja").write_text(
        "{{ style }}{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | "
        "tojson if m.tool_calls }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = load_tokenizer(str(tokenizer_folder), "--tokenizer")
    variables = template_variables(tokenizer.backend)
    chats = [conversation(record, variables=variables) for record in RECORDS]
    expected = []
    for tokens, is_target in encode_chats(tokenizer.backend, chats):
        end = len(tokens) - is_target[::-1].index(False)  # of the prompt: the last answer ends the text
        expected.append(tokens[:end])
    without = []
    for record in RECORDS:
        kept = {name: value for name, value in record.items() if name not in ("response", "output")}
        without.append({name: v[:-1] if name in ("messages", "conversations") else v for name, v in kept.items()})
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    for records in (RECORDS, without):
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert [tokens for _, _, tokens in read_prompts(prompts, tokenizer)] == expected
    command = ["--model", str(folder), "--tokenizer", str(tokenizer_folder), "--prompts", str(prompts)]
    command += ["--output", str(output), "--max_new_tokens", "2"]
    generate.main(command)
    for line, chat in zip(output.read_text().splitlines(), chats, strict=True):
        answered = conversation(json.loads(line), variables=variables)
        assert answered.messages[:-1] == chat.messages[:-1] and answered.variables == chat.variables
        assert trained_turns(answered) == trained_turns(chat)
    prompts.write_text(prompts.read_text().replace("weather", "tides"))
    with pytest.raises(SystemExit):
        generate.main(command)
    assert "holds an answer to another prompt 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "exactly one is needed, but none of them is given"),
        ("--prompt a --chat", "exactly one is needed, but --prompt and --chat"),
        ("--prompts x", "--prompts and --output: one needs the other"),
        ("--prompt a --max_new_tokens 0", "max_new_tokens = 0: must be at least 1"),
        ("--prompt a --temperature -1", "temperature = -1.0: must be at least 0"),
        ("--prompt a --top_p 0", "top_p = 0.0: must be above 0 and at most 1"),
        ("--prompt a --mode ar --draft_mix 0.5", "draft_mix = 0.5: must be 1"),
        ("--prompt a --mode ar --lookup 2", "lookup = 2: must be 0"),
        ("--prompt a --lookup -1", "lookup = -1: must be a whole number from 0 to 8"),
        ("--prompt a --max_new_tokens 9000", "exceed the context"),
        ("--prompts /no/such --output y", "/no/such: cannot be read"),
        ("--prompts {bad} --output y", "bad.jsonl: line 3: is not UTF-8 (byte 12 of the record)"),
        ("--prompts {empty} --output y", 'empty.jsonl: line 1: text = "": must be a text, and not empty'),
        (
            "--prompts {bad} --output y --tokenizer bytes",
            "bad.jsonl: line 2: needs a chat template, which the tokenizer bytes does not have",
        ),
        ("--prompts {other} --output y", "must have text, messages, conversations, prompt, question or instruction\n"),
        ("--prompts {other} --output y --tokenizer bytes", 'line 1: fields = ["id"]: must have text, messages'),
        (
            "--prompts {bad} --output y --tokenizer {strict}",
            "line 2: the chat template cannot be rendered (no",
        ),
        ("--prompts {bad} --output /no/such/y", "--output /no/such/y: must be a file in a folder that can be written"),
        ("--prompts {bad} --output {folder}", ": must be a file in a folder that can be written to"),
        ("--prompt a --tokenizer {large}", " ids, and the vocabulary of {folder} "),
        ("--prompt a --tokenizer /no/such", "--tokenizer /no/such: does not exist, and is no id of the hub"),
    ],
)
def test_bad_input(folder, arguments, message, capsys, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'\n{"prompt": "a"}\n{"prompt": "\xff"}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "a"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    places = {
        "bad": bad,
        "other": other,
        "empty": empty,
        "folder": folder,
        "strict": tmp_path / "strict",
        "large": tmp_path / "large",
    }
    write_tokenizer(places["strict"])
    write_tokenizer(places["large"])
    vocabulary = json.loads((places["large"] / "vocab.json").read_text()) | {f"w{i}": 1000 + i for i in range(600)}
    (places["large"] / "vocab.json").write_text(json.dumps(vocabulary))
    (places["strict"] / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    with pytest.raises(SystemExit) as ended:
        generate.main(["--model", str(folder), *arguments.format(**places).split()])
    printed, error = capsys.readouterr()
    assert ended.value.code == 1 and message.format(**places) in error and len(error.splitlines()) <= 2 and not printed


def test_folders_that_are_not_decoded(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    for section, message in (
        (None, "is not a TiDAR model"),
        (
            {**config["tidar"], "pattern": "block_diffusion"},
            "pattern block_diffusion, which the engine does not decode",
        ),
        ({"pattern": "tidar"}, "must hold pattern, block_size and mask_token_id"),
    ):
        changed = {name: value for name, value in config.items() if name != "tidar"} | (
            {"tidar": section} if section else {}
        )
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(SystemExit):
            generate.main(["--model", str(folder), "--prompt", "a"])
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) <= 2
    (folder / "config.json").write_text(json.dumps(config))
