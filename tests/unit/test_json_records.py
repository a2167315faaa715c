"""Records of JSON lines, JSON arrays and Parquet: each is read once, and bad ones are named."""

import gzip
import json
from importlib.util import find_spec

import numpy as np
import pytest
from corpora import as_bytes, documents, load
from small_models import write_tokenizer
from transformers import AutoTokenizer

from tidar.config import UserError, load_config
from tidar.data import load_tokenizer
from tidar.data.source import lines_before, read_records
from tidar.data.text import Text


def test_lines_are_divided_without_loss(tmp_path, monkeypatch):
    """Whatever the size of a part, shorter or longer than a line, and wherever a line ends."""
    file = tmp_path / "a.jsonl"
    texts = [f"{number}" + "-" * (number * 7 % 23) for number in range(40)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    file.write_bytes(b"".join(lines))
    for size in (1, 2, 17, len(lines[0]), len(lines[0]) + len(lines[1]), 300, 10**6):
        monkeypatch.setattr("tidar.data.source.PART_BYTES", size)
        source = Text(load_config([]).data, load_tokenizer("bytes"))
        parts = source.parts([str(file)])
        found = [
            (line, source.place(part, index, lines_before(part)))
            for part in parts
            for index, line in enumerate(read_records(part))
        ]
        assert [line for line, _ in found] == lines
        assert [place for _, place in found] == [f"{file}: line {number}" for number in range(1, 41)]


BAD_LINES = {
    '{"text": "a"': "is not JSON",
    '{"other": "a"}': 'has no text in the field "text" (data.text_field)',
    "[1]": 'has no text in the field "text"',
    '{"text": 3}': 'has no text in the field "text"',
    '{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "\xff\xfe"}': "is not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_counted(line, tmp_path, monkeypatch):
    """Its number is that in the file, also where the file is read in parts."""
    monkeypatch.setattr("tidar.data.source.PART_BYTES", 50)
    bad = line if isinstance(line, bytes) else line.encode()
    good = b'{"text": "good"}\n'
    file = tmp_path / "a.jsonl"
    file.write_bytes(good * 20 + b"\n" + bad + b"\n" + good * 3)
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(file)]
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(UserError) as error:
        load(tmp_path, *options)
    assert str(error.value).startswith(f"{file}: line 22: ") and BAD_LINES[line] in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    _, data = load(tmp_path, *options, "--data.on_error", "skip")
    assert documents(data.training[0]) == as_bytes(["good"] * 23)
    dropped = next(tmp_path.glob("run-*/data/training/dropped.txt")).read_text()
    assert dropped.startswith(f"{file}: line 22: ") and data.training[0].meta["dropped"] == 1


def json_array(layout: str, values: list) -> bytes:
    """A JSON array of these values in one of the layouts in which arrays are written."""
    if layout == "one line":
        return json.dumps(values, ensure_ascii=False).encode()
    if layout == "indented":
        return b"\xef\xbb\xbf\n " + json.dumps(values, indent=3).encode() + b"\n\n"
    return b"[\r\n" + b",\r\n".join(json.dumps(value).encode() for value in values) + b"\r\n]"


@pytest.mark.parametrize("layout", ["one line", "indented", "a line each"])
def test_json_arrays(layout, tmp_path, monkeypatch):
    """Every element once, wherever parts and blocks end; what looks like structure in strings is none."""
    rng = np.random.default_rng(len(layout))
    words = ["[", "]", "{", "}", '"', "\\", '\\"', ",", "},\n{", "ü", "三", "a", " ", "\n"]
    texts = ["".join(rng.choice(words, size=rng.integers(0, 40))) for _ in range(120)]
    content = json_array(layout, [{"text": text, "more": [[1, {"x": "]"}], None]} for text in texts])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(content)
    with gzip.open(tmp_path / "in" / "b.JSON.GZ", "wb") as file:
        file.write(content)
    (tmp_path / "in" / "c.json").write_bytes(b" [ ] ")
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "in")]
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    for part_bytes, block in ((1, 7), (100, 3), (1000, 64), (10**6, 2**20)):
        monkeypatch.setattr("tidar.data.source.PART_BYTES", part_bytes)
        monkeypatch.setattr("tidar.data.json_array.CHUNK", block)
        config, data = load(tmp_path, *options)
        assert documents(data.training[0]) == as_bytes(texts * 2)
        parts = Text(config.data, load_tokenizer("bytes")).parts([str(tmp_path / "in" / "a.json")])
        assert part_bytes == 10**6 or len(parts) > min(len(texts), len(content) / part_bytes) / 2


@pytest.mark.parametrize(
    "content, place, reason",
    [
        (b'[{"text": "a"}, {"text": }, {"text": "b"}]', "element 2", "is not JSON"),
        (b'[{"text": "a"}, {"text": "b"}, 3]', "element 3", "has no text in the field"),
        (b'[{"text": "a"}, {"text": "b"}] {}', "element 3", "there is more after the end of the JSON array"),
        (b'[{"text": "a"}, {"text": "b"},', "element 3", "the JSON array has no end"),
        (b'[{"text": "a"}, {"text": "b"}, {"text": "c', "element 3", "the JSON array has no end"),
    ],
)
def test_bad_json_arrays(content, place, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("tidar.data.source.PART_BYTES", 10)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    (tmp_path / "a.json").write_bytes(content)
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "a.json")]
    with pytest.raises(UserError) as error:
        load(tmp_path, *options)
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}: {place}: ") and reason in str(error.value)
    _, data = load(tmp_path, *options, "--data.on_error", "skip")
    assert documents(data.training[0]) == as_bytes(["a", "b"]) and data.training[0].meta["bad_documents"] == 1


def test_chats_of_parquet_and_of_arrays(tmp_path):
    """Structs whose fields are null are none, turns of weight 0 are context, and an array's records are JSON lines'."""
    write_tokenizer(tmp_path / "tokenizer")
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls or '' }}<|im_end|>\n"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    turns = [("system", "s", None), ("user", "a", 1), ("assistant", "b", 0), ("user", "c", None), ("assistant", "d", 1)]
    empty = {"tool_calls": [{"function": {"name": None, "arguments": None}}], "function_call": {"name": None}}
    messages = [{"role": role, "content": text, "weight": weight, **empty} for role, text, weight in turns[1:]]
    records = [{"system": "s", "messages": messages, "tools": [{"name": None}], "score": 1.5}] * 3
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    paths = [tmp_path / "a.json"]
    if find_spec("pyarrow"):
        import pyarrow.parquet

        paths.append(tmp_path / "b.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), paths[1])
    backend = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    expected = []
    for role, text, weight in turns:
        pieces = [
            (f"<|im_start|>{role}\n", 0),
            (f"{text}<|im_end|>", int(role == "assistant" and weight == 1)),
            ("\n", 0),
        ]
        expected += [(token, flag) for piece, flag in pieces for token in backend(piece)["input_ids"]]
    options = ["--data.source", "chat", "--data.tokenizer", str(tmp_path / "tokenizer"), "--validation.enable", "false"]
    for path in paths:
        _, data = load(tmp_path, *options, "--data.paths", str(path))
        tokens, mask = data.training[0].read(0, len(data.training[0].tokens))
        assert list(zip(tokens.tolist(), mask.tolist())) == expected * 3
