"""A user's own pattern, as docs/patterns.md says, and the errors for one that is not right."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from results import read_metrics

from tidar import masks, train
from tidar.config import UserError, load_config
from tidar.patterns import checked_pattern, configured_pattern, loss_weights

ROOT = Path(__file__).parents[2]


def chapter(kind: str) -> str:
    """The first code of that kind in the chapter."""
    return re.search(rf"```{kind}\n(.*?)```", (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8"), re.S)[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    yield tmp_path
    for name in ("own", "broken", "my_pattern"):
        sys.modules.pop(name, None)


def test_the_chapter_works_in_a_folder_of_its_own(folder, call, smaller_debug):
    """Its pattern is shown, plotted, measured and trained by its commands, without a change to the project."""
    (folder / "my_pattern.py").write_text(chapter("python"), encoding="utf-8")
    commands = [shlex.split(line) for line in chapter("sh").replace("\\\n", "").splitlines()]
    assert [command[2:4] for command in commands] == [
        ["tidar.masks", "show"],
        ["tidar.masks", "plot"],
        ["tidar.masks", "stats"],
        ["tidar.train", "--tidar.pattern"],
    ]
    shown, _, stats = (call(masks.main, *command[3:])[1] for command in commands[:3])
    assert "my_pattern:Window: 28 tokens, 56 model positions" in shown
    # token 23 of the second document, in the block from 20 on, sees the clean tokens 7 to 19
    expected = f"M23 ┃ ···· │ {7 * '·'}{13 * '■'}···· ┃ ···· │ ···· ···· ···· ···· ····■■■■"
    assert shown.splitlines()[-1].split() == expected.split()
    assert (folder / "mask.png").read_bytes().startswith(b"\x89PNG")
    causal, drafts = 1024 * 1025 // 2 + 1024 * 8, sum(min(i // 8 * 8, max(16 - i % 8, 0)) for i in range(1024))
    assert f"{causal + drafts:,}" in stats
    options = "--checkpoint.enable false --validation.steps 2 --metrics.log_freq 1 --data.num_workers 0".split()
    options += ["--optimizer.lr", "4e-3"]
    code, _, error = call(train.main, *commands[3][3:], *options)
    assert code == 0, error
    lines = read_metrics(folder / "runs" / "window")
    losses = [line["train/batch_diffusion_loss"] for line in lines if "train/batch_diffusion_loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1 and "val/accepted_prefix" in lines[-1]


OWN = """
import torch
from tidar.patterns import Causal, Pattern, Tidar

class NotBool(Causal):
    def mask_mod(self, documents):
        return lambda b, h, q, k: (q >= k).float()

class Wide(Causal):
    def mask_mod(self, documents):
        return lambda b, h, q, k: documents.index[b] == documents.index[b, k]

class NoTensor(Causal):
    def mask_mod(self, documents):
        return lambda b, h, q, k: True

class Fails(Causal):
    def mask_mod(self, documents):
        return lambda b, h, q, k: documents.nothing[b]

class Blind(Causal):
    def mask_mod(self, documents):
        return lambda b, h, q, k: (documents.index[b, q] == documents.index[b, k]) & (q > k)

class BlindInPieces(Causal):
    def mask_mod(self, documents):
        return lambda b, h, q, k: (q >= k) & (q != 20)

class BlindRange(Causal):
    def mask_mod(self, documents):
        from tidar.patterns import in_range
        return in_range((documents.start, documents.tokens))

class Short(Tidar):
    def parts(self, seq_len):
        return {"clean": seq_len}

class Far(Tidar):
    def layout(self, *arguments):
        rows = super().layout(*arguments)
        rows.targets["diffusion"].block_position += 8
        return rows

class OneLoss(Tidar):
    losses = ("diffusion",)
    def layout(self, *arguments):
        rows = super().layout(*arguments)
        rows.targets["ar"] = rows.targets["diffusion"]
        return rows

class Abstract(Pattern):
    def parts(self, seq_len):
        return {"row": seq_len}

class Demanding(Causal):
    def __init__(self, width):
        self.width = width

not_a_pattern = 3
"""
WRONG = {
    "NotBool": "mask_mod returns torch.float32 of []",
    "Wide": "mask_mod returns torch.bool of [64]",
    "NoTensor": "mask_mod returns bool for one query and one key: must be one bool tensor",
    "Fails": "mask_mod fails on b = h = q = k = 0 (AttributeError: 'Documents' object has no attribute 'nothing')",
    "Blind": "position 0 of 64 sees no key in a row of one document",
    "BlindInPieces": "position 20 of 64 sees no key",
    "BlindRange": "position 0 of 64 sees no key",
    "Short": "layout gives input_ids of torch.int64 of [2, 128] for 2 rows of 64 tokens: must be int64 of [2, 64]",
    "Far": "block_position of diffusion targets is 8 to 15: must be from 0 to 7",
    "OneLoss": "layout gives targets of diffusion, ar, and losses = ('diffusion',)",
    "Abstract": "must define layout, mask_mod",
    "Demanding": "cannot be created: Demanding.__init__() missing 1 required positional argument: 'width'",
    "not_a_pattern": "own has no subclass of tidar.patterns.Pattern with that name; it has Causal, Tidar, Not",
    "Missing": "own has no subclass of tidar.patterns.Pattern with that name",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pattern_is_refused_at_the_start(folder, name):
    (folder / "own.py").write_text(OWN)
    message = refusal(f"own:{name}")
    assert f"tidar.pattern = own:{name}: {WRONG[name]}" in message


def test_an_import_that_fails(folder):
    (folder / "broken.py").write_text("import torch\ndef f(:\n")
    failed = "broken cannot be imported (SyntaxError: invalid syntax (broken.py, line 2))\nit must be a Python module"
    assert failed in refusal("broken:A")
    assert "none cannot be imported (ModuleNotFoundError: No module named 'none')" in refusal("none:A")
    assert "a module without a name cannot be imported" in refusal(":A")
    known = "must be one of tidar, tidar_split, tidar_random, block_diffusion, causal, or your own"
    assert f"tidar.pattern = tydar: {known}" in refusal("tydar")


def test_options_that_a_pattern_does_not_have():
    for options in ("--tidar.diffusion_share 0.5", "--tidar.block_sizes 2 4", "--tidar.place_weights 1 2"):
        option = options.split()[0][2:]
        assert f"{option} = " in refusal("causal", *options.split())
    assert "is no option of tidar.pattern = tidar_split" in refusal("tidar_split", "--tidar.diffusion_share", "0.5")
    config = load_config("--tidar.pattern causal --tidar.ar_loss_weight 0".split())
    with pytest.raises(UserError, match="tidar.ar_loss_weight = 0: must be above 0, as pattern causal has no other"):
        loss_weights(config, configured_pattern(config, 1))
    # a validation does without the experiments
    options = "--tidar.block_sizes 2 16 --tidar.random_block_offset --tidar.diffusion_share 0.3"
    plain = configured_pattern(load_config(options.split()), 1, training=False)
    assert plain == configured_pattern(load_config([]), 1)


def refusal(name: str, *options: str) -> str:
    """The message of the UserError, one or two lines."""
    config = load_config(["--tidar.pattern", name, "--training.seq_len", "64", *options])
    with pytest.raises(UserError) as error:
        checked_pattern(config, 1)
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)
