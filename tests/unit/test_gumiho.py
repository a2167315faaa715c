"""Folders of .ckpt files, whole, odd and hostile."""

import gzip
import os
import pickle
from pathlib import Path

import pytest
import torch
from corpora import documents, load
from small_models import write_tokenizer

from tidar.config import UserError


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
