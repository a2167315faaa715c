"""Files to documents: every format, and every way in which they are bad."""

import gzip
import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SPECIAL_TOKENS, write_tokenizer
from transformers import AutoTokenizer

from tidar.config import UserError, load_config
from tidar.data import Corpus, data_tokenizer, load_data, load_tokenizer, make_rows
from tidar.data.source import lines_before, read_records
from tidar.data.text import Text


def load(tmp_path: Path, *options: str):
    """The corpora of a run in a folder of its own."""
    number = len(list(tmp_path.glob("run-*")))
    config = load_config([*options, "--job.dump_folder", str(tmp_path / f"run-{number}")])
    name = config.data.tokenizer
    return config, load_data(config, data_tokenizer(config.data, load_tokenizer(name) if name else None))


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(start, end - start)[0].tolist() for start, end in zip(corpus.offsets, corpus.offsets[1:])]


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), 256] for text in texts if text]


TEXTS = ["one", "zwei — ü", "三\nlines", "x" * 5000, "", "last"]


def write_texts(folder: Path) -> dict[str, list[str]]:
    """The same texts in every format; what each path holds."""
    folder.mkdir()
    lines = "\r\n\n".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) for text in TEXTS)
    (folder / "a.jsonl").write_bytes(lines.encode())  # no newline at its end
    with gzip.open(folder / "b.JSONL.GZ", "wt", encoding="utf-8") as file:
        file.write(lines)
    (folder / "plain").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "plain" / f"{number}.txt").write_text(text, encoding="utf-8")
    return {
        "a.jsonl": TEXTS,
        "b.JSONL.GZ": TEXTS,
        "plain": TEXTS,
        "plain/[13].txt": [TEXTS[1], TEXTS[3]],
        "": TEXTS * 3,
    }


def test_text_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr("tidar.data.preparation.BLOCK_TOKENS", 7)  # a part is written in many blocks
    for path, texts in write_texts(tmp_path / "in").items():
        options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "in" / path)]
        _, data = load(tmp_path, *options)
        assert documents(data.training[0]) == as_bytes(texts)
        assert data.training[0].target_bits is None and data.training[0].meta["dropped"] == texts.count("")


def test_parquet_and_zstd(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "in" / "a.parquet", row_group_size=2)
    with pyarrow.output_stream(tmp_path / "in" / "b.jsonl.zst", compression="zstd") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "in")]
    _, data = load(tmp_path, *options)
    assert documents(data.training[0]) == as_bytes(TEXTS * 2)
    parquet.write_table(pyarrow.table({"text": [*TEXTS[:4], None]}), tmp_path / "in" / "a.parquet", row_group_size=2)
    with pytest.raises(UserError, match=r"a.parquet: row 5: has no text in the field"):
        load(tmp_path, *options)


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


def test_a_tokenizer_and_the_end_of_documents(tmp_path):
    """Tokens are those of transformers; the end is the tokenizer's end of text, another token or none."""
    write_tokenizer(tmp_path / "tokenizer")
    backend = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = [backend(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    write_texts(tmp_path / "in")
    base = ["--data.source", "text", "--data.paths", str(tmp_path / "in" / "a.jsonl")]
    base += ["--data.tokenizer", str(tmp_path / "tokenizer")]
    ends = {"": SPECIAL_TOKENS[0], "none": None, SPECIAL_TOKENS[2]: SPECIAL_TOKENS[2]}
    for option, token in ends.items():
        end = [] if token is None else [backend.convert_tokens_to_ids(token)]
        for is_target in ("true", "false"):
            options = ["--data.end_of_document", option, "--data.end_is_target", is_target]
            _, data = load(tmp_path, *base, *options)
            (corpus,) = data.training
            assert documents(corpus) == [tokens + end for tokens in ids if tokens]
            masks = [corpus.read(a, b - a)[1].tolist() for a, b in zip(corpus.offsets, corpus.offsets[1:])]
            assert masks == [[1] * len(tokens) + [float(is_target == "true")] * len(end) for tokens in ids if tokens]
            assert data.n_ids == 263 and corpus.meta["dtype"] == "uint16"
    with pytest.raises(UserError, match="data.end_of_document = <eos>: is no token"):
        load(tmp_path, *base, "--data.end_of_document", "<eos>")


def test_weights_and_validation_paths(tmp_path):
    """Each path's documents as often as its weight says, in an epoch; none of them held out where paths are named."""
    for name, n in (("a", 300), ("b", 1000), ("c", 10)):
        lines = [json.dumps({"text": f"{name}{number}"}) + "\n" for number in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    options = [
        "--data.source",
        "text",
        "--data.tokenizer",
        "bytes",
        "--training.seq_len",
        "64",
        "--data.weights",
        "2",
        "0.3",
    ]
    options += ["--data.paths", *(str(tmp_path / f"{name}.jsonl") for name in "ab")]
    config, data = load(tmp_path, *options, "--validation.paths", str(tmp_path / "c.jsonl"))
    training, held_out = make_rows(config, data)

    def texts(rows) -> list[str]:
        found = []
        for row in range(len(rows)):
            tokens, ids, _ = rows[row]
            found += [bytes(tokens[ids == i].tolist()[:-1]).decode() for i in range(int(ids.max()) + 1)]
        return found

    found = texts(training)
    assert sorted(text for text in found if text[0] == "a") == sorted(
        f"a{number}" for number in range(300) for _ in "ab"
    )
    b = [text for text in found if text[0] == "b"]
    assert 230 < len(b) < 370 and len(set(b)) == len(b)
    assert sorted(texts(held_out)) == [f"c{number}" for number in range(10)]
    # a share, in place of paths: never trained on, however often documents are taken
    config, data = load(tmp_path, *options, "--validation.share", "0.1")
    training, held_out = make_rows(config, data)
    assert not set(texts(training)) & set(texts(held_out)) and 100 <= len(texts(held_out)) <= 130
    with pytest.raises(UserError, match="data.weights: 1 numbers for 2 paths"):
        make_rows(*load(tmp_path, *options, "--data.weights", "1"))


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_gumiho_files(tmp_path):
    """Tensors or lists, of shape [S] or [1, S], in a fixed order, links followed; other keys do not matter."""
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    expected = []
    kinds = [
        (lambda x: torch.tensor(x), lambda x: torch.tensor(x)),
        (lambda x: [x], lambda x: torch.tensor([x]).float()),
        (lambda x: x, lambda x: torch.tensor(x).bool()),
        (lambda x: torch.tensor([x], dtype=torch.int32), lambda x: [x]),
    ]
    for number, (make_ids, make_mask) in enumerate(kinds):
        ids = list(range(number, number + 5))
        mask = [i % 2 for i in ids]
        where = tmp_path / "elsewhere" if number == 3 else folder
        saved = {"input_ids": make_ids(ids), "loss_mask": make_mask(mask), "hidden_state": torch.ones(100)}
        torch.save(saved, where / f"{number}.ckpt")
        expected.append((ids, mask))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "link" / "loop").symlink_to(tmp_path / "in")
    _, data = load(tmp_path, "--data.source", "gumiho", "--data.paths", str(tmp_path / "in"))
    (corpus,) = data.training
    assert documents(corpus) == [ids for ids, _ in expected]
    assert corpus.read(0, 20)[1].tolist() == [value for _, mask in expected for value in mask]
    assert data.n_ids == 8


def test_bad_gumiho_files(tmp_path):
    trap, folder = tmp_path / "trap", tmp_path / "in"
    folder.mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    good = {"input_ids": torch.arange(5), "loss_mask": torch.ones(5)}
    torch.save(good, folder / "0.ckpt")
    torch.save(good, tmp_path / "whole.ckpt")
    contents = {
        "cannot be read safely": lambda file: file.write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-200]),
        "has no loss_mask": lambda file: torch.save({"input_ids": [1, 2]}, file),
        "has 5 input_ids and 4 values": lambda file: torch.save(good | {"loss_mask": torch.ones(4)}, file),
        "holds the token 263: must be from 0 to 262": lambda file: torch.save(
            good | {"input_ids": [1, 263, 2, 3, 4]}, file
        ),
        "holds the token -1": lambda file: torch.save(good | {"input_ids": [1, -1, 2, 3, 4]}, file),
        "holds no tokens": lambda file: torch.save({"input_ids": [], "loss_mask": []}, file),
        "is empty": lambda file: file.write_bytes(b""),
        "cannot be read safely as": lambda file: torch.save(good | {"more": Malicious(trap)}, file),
        "cannot be read safely as a": lambda file: file.write_bytes(pickle.dumps(Malicious(trap))),
        "must be a dict": lambda file: torch.save([1, 2], file),
        "input_ids are float32": lambda file: torch.save(good | {"input_ids": torch.ones(5)}, file),
        "shape [2, 5]": lambda file: torch.save(good | {"input_ids": torch.ones(2, 5)}, file),
        "must be numbers": lambda file: torch.save(good | {"loss_mask": ["a"] * 5}, file),
        "other values than 0 and 1": lambda file: torch.save(good | {"loss_mask": torch.full((5,), 0.5)}, file),
    }
    options = ["--data.source", "gumiho", "--data.paths", str(folder), "--data.tokenizer", str(tmp_path / "tokenizer")]
    for message, write in contents.items():
        write(folder / "1.ckpt")
        with pytest.raises(UserError) as error:
            load(tmp_path, *options)
        assert str(error.value).startswith(f"{folder / '1.ckpt'}: ") and message in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        _, data = load(tmp_path, *options, "--data.on_error", "skip")
        assert len(data.training[0]) == 1 and data.training[0].meta["dropped"] == 1
    assert not trap.exists()


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


def test_bad_chats_and_plain_files(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    file = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "robot", "content": "ho"}]
    file.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    options = ["--data.source", "chat", "--data.tokenizer", str(tmp_path / "tokenizer"), "--data.paths", str(file)]
    with pytest.raises(UserError, match=rf"{file}: line 2: turn 2: role = .robot.: must be one of"):
        load(tmp_path, *options)
    _, data = load(tmp_path, *options, "--data.on_error", "skip")
    tokens, mask = data.training[0].read(0, len(data.training[0].tokens))
    backend = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    pieces = [("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", 0), ("b<|im_end|>", 1), ("\n", 0)]
    expected = [(token, flag) for text, flag in pieces for token in backend(text)["input_ids"]]
    assert list(zip(tokens.tolist(), mask.tolist())) == expected
    with pytest.raises(UserError, match="data.tokenizer = bytes: has no chat template"):
        load(tmp_path, "--data.source", "chat", "--data.paths", str(file), "--data.tokenizer", "bytes")
    (tmp_path / "b.txt").write_bytes(b"good \xff")
    options = ["--data.source", "text", "--data.tokenizer", "bytes"]
    with pytest.raises(UserError, match=r"b.txt: is not UTF-8 \(byte 5\)"):
        load(tmp_path, *options, "--data.paths", str(tmp_path / "b.txt"))
    with pytest.raises(UserError, match="nothing.*: matches no file or folder"):
        load(tmp_path, *options, "--data.paths", str(tmp_path / "nothing*"))
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as archive:
        archive.write(b'{"text": "a"}\n' * 100)
    (tmp_path / "c.jsonl.gz").write_bytes((tmp_path / "c.jsonl.gz").read_bytes()[:-10])
    with pytest.raises(UserError, match="c.jsonl.gz: line [0-9]+: cannot be read from here on"):
        load(tmp_path, *options, "--data.paths", str(tmp_path / "c.jsonl.gz"))
    with pytest.raises(UserError, match="data.source = text: needs data.tokenizer"):
        load(tmp_path, "--data.source", "text", "--data.paths", str(file))
    with pytest.raises(UserError, match="data.paths: is empty"):
        load(tmp_path, *options)
    with pytest.raises(UserError, match="data.source = shirt: must be one of python_source, text"):
        load(tmp_path, "--data.source", "shirt")


def test_a_text_of_ten_million_characters(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    text = "in the beginning " * 600_000
    (tmp_path / "a.txt").write_text(text)
    options = ["--data.source", "text", "--data.paths", str(tmp_path / "a.txt")]
    _, data = load(tmp_path, *options, "--data.tokenizer", str(tmp_path / "tokenizer"), "--validation.enable", "false")
    (corpus,) = data.training
    backend = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (
        len(corpus) == 1
        and backend.decode(corpus.tokens[:100].tolist()) == text[: len(backend.decode(corpus.tokens[:100].tolist()))]
    )
    assert len(text) > 10**7 and np.isin(corpus.tokens[:-1], corpus.tokens[:200]).all()


def test_prepared_folders(tmp_path):
    """Several are one corpus after another; one of another tokenizer, or that is not whole, is refused."""
    write_texts(tmp_path / "in")
    config, first = load(
        tmp_path, "--data.tokenizer", "bytes", "--data.source", "text", "--data.paths", str(tmp_path / "in" / "a.jsonl")
    )
    folder = Path(config.job.dump_folder) / "data" / "training"
    options = ["--data.source", "prepared", "--data.paths", str(folder), str(folder), "--training.seq_len", "64"]
    config, data = load(tmp_path, *options, "--validation.share", "0.2")
    training, held_out = make_rows(config, data)
    assert training.n_documents + held_out.n_documents == 2 * len(first.training[0]) and data.n_ids == 257
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"was prepared with the tokenizer bytes \(257 ids\)"):
        load(tmp_path, *options, "--data.tokenizer", str(tmp_path / "tokenizer"))
    tokens = folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match="tokens.bin: holds .* bytes, and meta.json asks for"):
        load(tmp_path, *options)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="meta.json: is not that of a prepared folder"):
        load(tmp_path, *options)
    with pytest.raises(UserError, match="prepared folders are made by"):
        load(tmp_path, "--data.source", "prepared", "--data.paths", str(tmp_path / "in"))


def test_a_tokenizer_saved_with_truncation_cuts_nothing(tmp_path):
    """Nor does padding that was saved with it add tokens; and merges are part of what a tokenizer is."""
    write_tokenizer(tmp_path / "plain")
    plain = load_tokenizer(str(tmp_path / "plain"))
    backend = AutoTokenizer.from_pretrained(tmp_path / "plain")
    backend.backend_tokenizer.enable_truncation(4)
    backend.backend_tokenizer.enable_padding(length=64)
    backend.save_pretrained(tmp_path / "cut")
    cut = load_tokenizer(str(tmp_path / "cut"))
    text = "in the beginning was the word"
    assert cut.encode([text])[0].tolist() == plain.encode([text])[0].tolist() and cut.digest == plain.digest
    merges = tmp_path / "plain" / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:3]) + "\n")
    other = load_tokenizer(str(tmp_path / "plain"))
    assert len(other.encode([text])[0]) > len(plain.encode([text])[0]) and other.digest != plain.digest


def test_files_are_found_or_missed_aloud(tmp_path):
    """Suffixes in capitals, folders that a glob matches, a byte order mark; a link to nothing is a bad document."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "A.JSONL").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    (tmp_path / "in" / "deep" / "b.txt").write_bytes(b"\xef\xbb\xbfb")
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths"]
    for path in ("in", "in/*"):
        _, data = load(tmp_path, *options, str(tmp_path / path))
        assert documents(data.training[0]) == as_bytes(["a", "b"])
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="c.txt: cannot be read"):
        load(tmp_path, *options, str(tmp_path / "in"))
    _, data = load(tmp_path, *options, str(tmp_path / "in"), "--data.on_error", "skip")
    assert documents(data.training[0]) == as_bytes(["a", "b"]) and data.training[0].meta["bad_documents"] == 1
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="d.parquet: row 1: cannot be read from here on"):
        load(tmp_path, *options, str(tmp_path / "d.parquet"))


def test_odd_tensors_are_bad_documents(tmp_path):
    """What torch.save can hold and a row of tokens cannot be; a tensor that takes a graph is one like any other."""
    folder = tmp_path / "in"
    folder.mkdir()
    ids = torch.arange(5)
    torch.save({"input_ids": ids, "loss_mask": torch.ones(5, requires_grad=True)}, folder / "0.ckpt")
    for number, mask in enumerate(
        [torch.zeros(1).expand(10**13), torch.ones(5).to_sparse(), torch.ones(5, device="meta"), torch.ones(5, 1, 1)], 1
    ):
        torch.save({"input_ids": ids, "loss_mask": mask}, folder / f"{number}.ckpt")
    torch.save({"input_ids": [2**32 - 1], "loss_mask": [1]}, folder / "5.ckpt")
    _, data = load(tmp_path, "--data.source", "gumiho", "--data.paths", str(folder), "--data.on_error", "skip")
    assert documents(data.training[0]) == [ids.tolist()] and data.training[0].meta["bad_documents"] == 5


def test_validation_paths_of_python_source(tmp_path):
    """The standard library is there to train on, and not among them."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.py").write_text("x = 1\n")
    _, data = load(tmp_path, "--validation.paths", str(tmp_path / "own"))
    assert documents(data.validation[0]) == as_bytes(["x = 1\n"]) and len(data.training[0]) > 100


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
        (b'[{"text": "a"}, {"text": "b"}] {}', "element 3", "there is more behind the end of the JSON array"),
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


def test_names_that_begin_with_a_dot(tmp_path):
    """They are left out of a folder, and read where a path names or matches them."""
    for name in ("a.jsonl", ".b.jsonl", ".c/d.jsonl", "e/.f/g.jsonl", "e/h.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(json.dumps({"text": name}) + "\n")
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths"]
    found = {
        "in": ["a.jsonl", "e/h.jsonl"],
        "in/*": ["a.jsonl", "e/h.jsonl"],
        "in/.*": [".b.jsonl", ".c/d.jsonl"],
        "in/e/.f": ["e/.f/g.jsonl"],
        "in/.b.jsonl": [".b.jsonl"],
    }
    for path, names in found.items():
        _, data = load(tmp_path, *options, str(tmp_path / path))
        assert documents(data.training[0]) == as_bytes(names), path
    with pytest.raises(UserError, match=r"e: holds no file of .*begin with a dot"):
        (tmp_path / "in" / "e" / "h.jsonl").unlink()
        load(tmp_path, *options, str(tmp_path / "in" / "e"))
    for name in ("a.ckpt", ".b.ckpt", ".c/d.ckpt"):
        (tmp_path / "ids" / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"input_ids": [len(name)], "loss_mask": [1]}, tmp_path / "ids" / name)
    _, data = load(tmp_path, "--data.source", "gumiho", "--data.paths", str(tmp_path / "ids"))
    assert documents(data.training[0]) == [[6]]
    for name in ("a.py", ".b.py", ".git/c.py", "d/.e/f.py", "d/g.py"):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(name)
    _, data = load(tmp_path, "--validation.paths", str(tmp_path / "code"))
    assert documents(data.validation[0]) == as_bytes(["a.py", "d/g.py"])


@pytest.mark.parametrize("source", ["text", "gumiho", "python_source"])
def test_a_path_that_does_not_exist(source, tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path / 'nothing'}: does not exist$"):
        load(tmp_path, "--data.source", source, "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "nothing"))


def test_compressed_gumiho_files(tmp_path, monkeypatch):
    """SpecForge writes them. One that is damaged, or grows beyond a bound, is a bad document."""
    (tmp_path / "in").mkdir()
    torch.save({"input_ids": torch.arange(5), "loss_mask": torch.ones(1, 5)}, tmp_path / "a.ckpt")
    packed = gzip.compress((tmp_path / "a.ckpt").read_bytes())
    (tmp_path / "in" / "a.ckpt.gz").write_bytes(packed)
    (tmp_path / "in" / "B.CKPT.GZ").write_bytes(packed)
    options = ["--data.source", "gumiho", "--data.paths", str(tmp_path / "in")]
    _, data = load(tmp_path, *options)
    assert documents(data.training[0]) == [[0, 1, 2, 3, 4]] * 2
    bad = {
        "cannot be read": packed[:-20],
        "cannot be read (Not a gzipped file": b"plain" + packed,
        "cannot be read safely as a file of torch.save": gzip.compress(pickle.dumps(Malicious(tmp_path / "trap"))),
        "is empty": b"",
    }
    for reason, content in bad.items():
        (tmp_path / "in" / "a.ckpt.gz").write_bytes(content)
        with pytest.raises(UserError) as error:
            load(tmp_path, *options)
        assert str(error.value).startswith(f"{tmp_path / 'in' / 'a.ckpt.gz'}: {reason}")
    monkeypatch.setattr("tidar.data.gumiho.MOST_BYTES", 100)
    with pytest.raises(UserError, match="B.CKPT.GZ: holds more than 100 bytes when decompressed"):
        load(tmp_path, *options)
    assert not (tmp_path / "trap").exists()


def test_a_bug_is_no_bad_document(tmp_path, monkeypatch):
    """An exception of the trainer's own code ends the run; data.on_error = skip does not hide it."""
    monkeypatch.setattr("tidar.data.text.parse_json", lambda record: record < 3)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.on_error", "skip"]
    with pytest.raises(TypeError):
        load(tmp_path, *options, "--data.paths", str(tmp_path / "a.jsonl"))


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
