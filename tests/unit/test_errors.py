"""Error and log lines: nothing that a file holds can begin a line of its own or act on the terminal."""

import json
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tidar.config import UserError, packages, print_lines, printable, user_errors_exit
from tidar.models import from_pretrained
from tidar.models.sizes import size_config
from tidar.prepare_data import main as prepare_data

HOSTILE = "x\nerror: none\r\x1b[2J\x9b1m\x7f\u202eabc\u2066\u2028\u2029\x85y"


def is_one_safe_line(text: str) -> bool:
    """No character of Unicode's categories of controls, formats, surrogates and separators but the space."""
    return all(unicodedata.category(c)[0] != "C" and (c == " " or unicodedata.category(c)[0] != "Z") for c in text)


def test_each_argument_of_an_error_is_one_line(capsys):
    rng = random.Random(0)
    for _ in range(300):
        lines = ["".join(chr(rng.choice([rng.randrange(160), rng.randrange(0x110000)])) for _ in range(20))] * 2
        error = pickle.loads(pickle.dumps(UserError(*lines)))  # as from another process
        first, second = str(error).split("\n")
        assert first == second == printable(first) and is_one_safe_line(first)
    assert str(UserError("naïve 模型 \\n = 3", "two")) == "naïve 模型 \\n = 3\ntwo"
    print_lines(HOSTILE, "second")
    first, second = capsys.readouterr().out[:-1].split("\n")
    assert is_one_safe_line(first) and first.startswith("x\\nerror") and second == "second"


def test_output_that_nobody_reads_is_no_traceback():
    words = "from tidar.config import user_errors_exit\nwith user_errors_exit():\n    print('x' * 10**6)"
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 1
    words = words.replace("print('x' * 10**6)", "raise BrokenPipeError('of a worker')")
    finished = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert finished.stderr.endswith("BrokenPipeError: of a worker\n")


@pytest.mark.parametrize("place", ["model_type", "tensor"])
def test_what_a_model_folder_holds_cannot_forge_a_line(tmp_path, capsys, place):
    options = size_config("debug") | {"vocab_size": 300} | ({"model_type": HOSTILE} if place == "model_type" else {})
    (tmp_path / "config.json").write_text(json.dumps(options))
    save_file({HOSTILE: torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit), user_errors_exit():
        from_pretrained(str(tmp_path))
    text = capsys.readouterr().err
    assert text.endswith("\n") and is_one_safe_line(text[:-1]) and "abc" in text


def test_dropped_documents_have_one_line_each(tmp_path, capsys, monkeypatch):
    """A file's name and a document's content may hold anything."""
    file = tmp_path / f"{HOSTILE}.jsonl"
    rows = [{"text": "good"}, {HOSTILE: 1}, {"text": 3}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{" + HOSTILE.replace("\n", "") + "\n")
    options = ["--data.source", "text", "--data.paths", str(file), "--data.tokenizer", "bytes"]
    options += ["--data.on_error", "skip", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare_data", "--output", str(tmp_path / "out"), *options])
    prepare_data()
    lines = Path(tmp_path / "out" / "dropped.txt").read_bytes().decode().removesuffix("\n").split("\n")
    assert len(lines) == 3 and all(is_one_safe_line(line) for line in lines)
    assert all(is_one_safe_line(line) for line in capsys.readouterr().out.removesuffix("\n").split("\n"))


def test_the_command_that_installs_an_extra(monkeypatch, tmp_path):
    monkeypatch.chdir(packages.ROOT)
    assert packages.install("data") == "pip install -e '.[data]'"
    monkeypatch.chdir(packages.ROOT / "tests")
    assert packages.install("data") == f"pip install -e '{packages.ROOT}[data]'"
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert packages.install("data") == "pip install 'tidar[data]'"
