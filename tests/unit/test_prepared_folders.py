"""Prepared folders that were damaged, or made by a stranger; texts that are tokenised in pieces."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SPECIAL_TOKENS, write_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tidar.config import UserError, load_config
from tidar.data import Corpus, data_tokenizer, load_data, load_tokenizer, make_source, prepare
from tidar.data.pieces import BETWEEN_CHARACTERS, CUTS, cut_pattern, cut_points
from tidar.data.tokenizer import BytesTokenizer

VALUES = [None, True, "O", "V8", "uint8", "float16", "", -1, 0, 1, 7, 2**31, 2**62, 2**80, 1.5, float("nan"), [], {}]
VALUES += [[[]], {"a": 1}, "../../x", "\x1b[31m\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Documents with targets and without, from two paths."""
    root = tmp_path_factory.mktemp("prepared")
    paths = [root / "a", root / "b"]
    for number, path in enumerate(paths):
        path.mkdir()
        for i in range(5 + number):
            tokens = torch.arange(3 + i * 7) % 300
            torch.save({"input_ids": tokens, "loss_mask": tokens % 2}, path / f"{i}.ckpt")
    (paths[0] / "9.ckpt").write_bytes(b"bad")
    options = load_config(["--data.source", "gumiho", "--data.on_error", "skip", "--data.paths", str(root)]).data
    source = make_source(options, None)
    prepare(source, make_source, list(map(str, paths)), root / "out", 1, lambda progress: None)
    return root / "out"


def content(corpus: Corpus) -> list:
    arrays = corpus.tokens, corpus.offsets, corpus.target_bits, corpus.counts
    return [array.tolist() for array in arrays] + [corpus.groups]


def nodes(value) -> list[tuple]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, item in list(items) for pair in [(value, key), *nodes(item)]]


def test_a_changed_meta_gives_the_data_or_one_line(folder, tmp_path):
    """Several hundred changes of meta.json: a value of any type, a key removed, text that is no JSON."""
    meta, expected = (folder / "meta.json").read_text(), content(Corpus.open(folder))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rng = random.Random(0)
    loaded = 0
    for trial in range(600):
        changed = json.loads(meta)
        for _ in range(rng.choice([1, 1, 2])):
            top = list(changed) if isinstance(changed, dict) else []
            container, key = rng.choice(nodes(changed)) if rng.random() < 0.5 or not top else (changed, rng.choice(top))
            if rng.random() < 0.2:
                del container[key]
            elif type(container[key]) is int and rng.random() < 0.5:
                container[key] += rng.choice([-1, 1, 8, 2**33])
            else:
                container[key] = rng.choice(VALUES)
        text = json.dumps(changed)
        if trial % 20 == 0:
            text = rng.choice([text[: rng.randrange(len(text))], "[" * 10**5, "null", "[]", "3", "", "\0", "9" * 9999])
        (copy / "meta.json").write_text(text)
        try:
            corpus = Corpus.open(copy)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(copy) in str(error)
        else:
            assert content(corpus) == expected
            int(corpus.meta["dropped"]), corpus.meta["tokenizer"], sum(corpus.meta["dropped_reasons"].values())
            loaded += 1
    assert 10 < loaded < 300


def test_changed_files_are_refused(folder, tmp_path):
    """Any bit flipped, any length changed, files swapped; links, pipes and devices in place of files."""
    copy = tmp_path / "copy"
    rng = random.Random(1)
    names = ["tokens.bin", "offsets.bin", "targets.bin", "counts.bin"]
    for trial in range(120):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        path = copy / rng.choice(names)
        data = bytearray(path.read_bytes())
        if trial % 3 == 0:
            os.truncate(path, rng.choice([0, len(data) - 1, len(data) + 1, len(data) * 2]))
        elif trial % 3 == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        else:
            path.unlink()
            kinds = [lambda path: path.symlink_to(folder / path.name), lambda path: path.symlink_to("/dev/zero")]
            rng.choice([*kinds, os.mkfifo, Path.mkdir, lambda path: None])(path)
        with pytest.raises(UserError) as error:
            Corpus.open(copy)
        assert len(str(error.value).splitlines()) == 1 and path.name in str(error.value)


def test_a_strangers_checksums_do_not_make_up_for_what_is_wrong(folder, tmp_path):
    """Offsets that leave the tokens or descend, ids beyond largest_id, with checksums that fit."""
    from tidar.data.corpus import checksum

    corpus = Corpus.open(folder)
    n = len(corpus.tokens)
    changes = {"tokens": (3, 2**31), "counts": (2, 10**6)}
    for name, (place, value), problem in [
        ("offsets", (3, n + 1), "does not ascend"),
        ("offsets", (3, -(2**63)), "does not ascend"),
        ("offsets", (0, 1), "does not cover"),
        ("offsets", (-1, n - 1), "does not cover"),
        ("tokens", changes["tokens"], "another largest id"),
        ("counts", changes["counts"], "does not add up"),
        ("targets", (0, 255), "another number of targets"),
    ]:
        copy = tmp_path / f"{name}{value}{place}"
        shutil.copytree(folder, copy)
        values = np.fromfile(copy / f"{name}.bin", {"tokens": "uint32", "targets": "uint8"}.get(name, "int64"))
        values[place] = value
        values.tofile(copy / f"{name}.bin")
        meta = json.loads((copy / "meta.json").read_text())
        meta["sha256"][name] = checksum(values)
        (copy / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(UserError, match=problem):
            Corpus.open(copy)


def test_checksums_follow_what_is_written(folder, monkeypatch):
    """Written in bits and read by threads they agree, whatever the pieces are."""
    from tidar.data.corpus import Checksum, checksum

    monkeypatch.setattr("tidar.data.corpus.PIECE", 7)
    rng = random.Random(3)
    for length in (0, 1, 6, 7, 8, 14, 100):
        data, whole = rng.randbytes(length), Checksum()
        cuts = sorted(rng.choices(range(length + 1), k=4))
        for start, stop in zip([0, *cuts], [*cuts, length]):
            whole.update(data[start:stop])
        assert whole.hexdigest() == checksum(np.frombuffer(data, np.uint8))


def test_a_folder_of_before_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    (tmp_path / "copy" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="has no checksums: an earlier version of tidar made it; remove .* again$"):
        Corpus.open(tmp_path / "copy")


def identity(root: Path, texts: list[str], validation: list[str] = (), *options: str) -> int:
    root.mkdir()
    paths = {"train": texts, "validation": validation}
    for name, lines in paths.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = ["--data.source", "text", "--data.tokenizer", "bytes", "--job.dump_folder", str(root / "run")]
    arguments += ["--data.paths", str(root / "train.jsonl"), *options]
    if validation:
        arguments += ["--validation.paths", str(root / "validation.jsonl")]
    config = load_config(arguments)
    return load_data(config, BytesTokenizer()).identity(config)


def test_identity_is_that_of_the_content(tmp_path):
    """Order, division into documents, targets and held-out documents count; where the files lie does not."""
    first = identity(tmp_path / "a", ["ab", "cd"], ["ef"])
    assert first == identity(tmp_path / "b", ["ab", "cd"], ["ef"])
    others = [
        identity(tmp_path / "c", ["cd", "ab"], ["ef"]),
        identity(tmp_path / "d", ["ab", "cd"], ["fe"]),
        identity(tmp_path / "e", ["ab", "cd"]),
        identity(tmp_path / "f", ["ab", "cd"], ["ef"], "--data.end_is_target", "false"),
        identity(tmp_path / "g", ["ba", "cd"], ["ef"]),
    ]
    assert len({first, *others}) == 6


def make_tokenizer(folder: Path, pre_tokenizer, normalizer=None, added=()) -> Path:
    """A byte-level BPE that has learnt merges over white space and punctuation where its pre-tokenizer lets it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([random_text(rng, 3000) for _ in range(4)], trainer)
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *added])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


PARTS = [
    "\n",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "\r\n",
    "\r",
    "a",
    "th",
    "he ",
    "the",
    "'s",
    "'LL",
    "12",
    "345",
    ".",
    "...",
    "!?",
    "。",
]
PARTS += [
    "第",
    "中文",
    "é",
    "e\u0301",
    "\u0301",
    "\u1100\u1161",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    "\x1c",
    "\ufeff",
    "🙂",
    "A",
    "<|im",
]
PARTS += [*SPECIAL_TOKENS, "<|im_end|>\n", "\n<|im_start|>"]  # fmt: skip


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(PARTS, k=length))


def split(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


QWEN, LLAMA = CUTS
TOKENIZERS = {
    "qwen": lambda: dict(pre_tokenizer=split(QWEN), normalizer=normalizers.NFC()),
    "llama": lambda: dict(pre_tokenizer=split(LLAMA)),
    "gpt2": lambda: dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
}


@pytest.mark.parametrize("name", [*TOKENIZERS, "bytes", "qwen3"])
def test_pieces_give_the_tokens_of_the_whole(name, tmp_path, monkeypatch):
    if name == "bytes":
        tokenizer = BytesTokenizer()
    elif name == "qwen3":
        folder = Path(__file__).parents[3] / "shared" / "tokenizers" / "qwen3"
        if not folder.is_dir():
            pytest.skip("needs Qwen3's tokenizer")
        tokenizer = load_tokenizer(str(folder))
    else:
        tokenizer = load_tokenizer(str(make_tokenizer(tmp_path / name, **TOKENIZERS[name]())))
    monkeypatch.setattr("tidar.data.text.PART_BYTES", 20)
    monkeypatch.setattr("tidar.data.tokenizer.PIECE_BYTES", 10)
    config = load_config(["--data.source", "text", "--data.end_is_target", "false", "--data.paths", str(tmp_path)])
    source = make_source(config.data, tokenizer)
    rng = random.Random(4)
    n_parts, file = 0, tmp_path / "a.txt"
    for trial in range(200):
        text = random_text(rng, rng.randint(5, 120))
        file.write_bytes((b"\xef\xbb\xbf" if trial % 2 else b"") + text.encode())
        whole = tokenizer._encode([text])[0] if name != "bytes" else tokenizer.encode([text])[0]
        assert tokenizer.encode([text])[0].tolist() == whole.tolist()
        parts = source.parts([str(file)])
        documents = [document for part in parts for document in source.documents(part)]
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        if trial % 2 == 0 and text.startswith("\ufeff"):
            continue  # read as the file's byte order mark
        assert np.concatenate([document.tokens for document in documents]).tolist() == [*whole.tolist(), *end]
        n_parts += len(parts)
    assert n_parts > 400  # texts are cut


@pytest.mark.parametrize(
    "options",
    [
        dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        dict(pre_tokenizer=pre_tokenizers.Metaspace()),
        dict(pre_tokenizer=split(r"\s+|\S+|\n\w")),
        dict(pre_tokenizer=split(QWEN), normalizer=normalizers.Replace("\n", " ")),
        dict(pre_tokenizer=split(QWEN), normalizer=normalizers.Sequence([normalizers.Strip()])),
        dict(pre_tokenizer=split(QWEN), added=["end\nof"]),
    ],
)
def test_a_text_is_whole_where_a_cut_is_not_known_to_be_safe(options, tmp_path):
    tokenizer = load_tokenizer(str(make_tokenizer(tmp_path / "tokenizer", **options)))
    assert tokenizer.cuts is None
    assert cut_points(b"a\nb\n" * 100, tokenizer.cuts, 10) == [400]


def test_a_text_in_pieces_is_one_document(tmp_path, monkeypatch):
    """Beside small texts and a bad one, by one process; bytes are cut between characters."""
    monkeypatch.setattr("tidar.data.text.PART_BYTES", 20)
    rng = random.Random(5)
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [random_text(rng, 40), "small", random_text(rng, 90), random_text(rng, 60), "ü" * 50]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text.encode())
    bad = bytearray(("ü" * 50).encode())
    bad[60] = 255
    (folder / "2b.txt").write_bytes(bad)
    options = ["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(folder)]
    options += ["--job.dump_folder", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"2b.txt: is not UTF-8 \(byte 60\)"):
        load_data(load_config(options), BytesTokenizer())
    config = load_config([*options, "--data.on_error", "skip"])
    (corpus,) = load_data(config, data_tokenizer(config.data, None)).training
    found = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets, corpus.offsets[1:])]
    assert found == [[*text.encode(), 256] for text in texts]
    assert corpus.meta["dropped"] == corpus.meta["bad_documents"] == 1 and corpus.groups == [5]
    assert "2b.txt: is not UTF-8 (byte 60)\n" in (tmp_path / "run" / "data" / "training" / "dropped.txt").read_text()


def test_cuts_of_bytes_lie_between_characters():
    text = "aü🙂第" * 20
    ends = cut_points(text.encode(), BETWEEN_CHARACTERS, 3)
    content = text.encode()
    assert "".join(content[a:b].decode() for a, b in zip([0, *ends], ends)) == text and len(ends) > 20


def test_texts_for_the_tokenizers_of_qwen_are_cut(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    backend = load_tokenizer(str(tmp_path / "tokenizer")).backend.backend_tokenizer
    assert cut_pattern(json.loads(backend.to_str())) is CUTS[QWEN]


def test_a_worker_that_is_ended_for_lack_of_memory_names_its_file(tmp_path, monkeypatch):
    """The files whose parts are missing are named; a finished part is kept."""
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        def __init__(self, *_):
            pass

        def map(self, work, jobs):
            for number, (_, file) in enumerate(jobs):
                if number == 1:
                    raise BrokenProcessPool
                file.touch()
                yield 1, 1

        def shutdown(self, **_):
            pass

    monkeypatch.setattr("tidar.data.preparation.ProcessPoolExecutor", Pool)
    monkeypatch.setattr("tidar.data.source.PART_BYTES", 1)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("text")
    options = load_config(["--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path)]).data
    source = make_source(options, BytesTokenizer())
    with pytest.raises(
        UserError, match="ended a process that tokenised .*b.txt or .*c.txt, .*fewer processes"
    ) as error:
        prepare(source, make_source, [str(tmp_path)], tmp_path / "out", 2, lambda progress: None)
    assert "a.txt" not in str(error.value) and len(str(error.value).splitlines()) == 1
