"""Files to documents: formats, tokens, paths, and every way in which they are bad."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import TEXTS, as_bytes, documents, load, write_texts
from small_models import SPECIAL_TOKENS, write_tokenizer
from transformers import AutoTokenizer

from tidar.config import UserError
from tidar.data import load_tokenizer, make_rows


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
    options = "--data.source text --data.tokenizer bytes --training.seq_len 64 --data.weights 2 0.3".split()
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
    with pytest.raises(UserError, match="data.weights = 0.0, 0.0: leave no documents to train on; raise one"):
        make_rows(*load(tmp_path, *options, "--data.weights", "0", "0"))


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
    beginning = backend.decode(corpus.tokens[:100].tolist())
    assert len(corpus) == 1 and len(beginning) > 100 and text.startswith(beginning)
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


def test_a_tokenizer_saved_with_truncation_truncates_nothing(tmp_path):
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


def test_files_are_found_or_reported_missing(tmp_path):
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


def test_validation_paths_of_python_source(tmp_path):
    """The standard library is there to train on, and not among them."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.py").write_text("x = 1\n")
    _, data = load(tmp_path, "--validation.paths", str(tmp_path / "own"))
    assert documents(data.validation[0]) == as_bytes(["x = 1\n"]) and len(data.training[0]) > 100


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


def test_a_bug_is_no_bad_document(tmp_path, monkeypatch):
    """An exception of the trainer's own code ends the run; data.on_error = skip does not hide it."""
    monkeypatch.setattr("tidar.data.text.parse_json", lambda record: record < 3)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.on_error", "skip"]
    with pytest.raises(TypeError):
        load(tmp_path, *options, "--data.paths", str(tmp_path / "a.jsonl"))
