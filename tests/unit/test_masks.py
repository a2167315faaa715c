"""The command tidar.masks."""

import random
import sys

import pytest
import torch
from reference import pattern_mask, random_lengths

from tidar import masks
from tidar.laboratory.picture import LARGEST_CELL, MARGIN, SIDE, TOP, UNSEEN
from tidar.laboratory.stats import mask_stats
from tidar.patterns import PATTERNS, get_pattern


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns its exit code and what it has printed."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["masks", *arguments])
        try:
            masks.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return command


@pytest.mark.parametrize("name", PATTERNS)
def test_csv_is_the_mask_and_nothing_else(run, name):
    rng = random.Random(3)
    for _ in range(5):
        lengths, block_size = random_lengths(rng, rng.randint(2, 20)), rng.randint(1, 2)
        documents = ",".join(map(str, lengths))
        options = ["--pattern", name, "--documents", documents, "--block_size", str(block_size), "--format", "csv"]
        code, out, err = run("show", *options)
        expected = pattern_mask(name, lengths, block_size).int().tolist()
        found = [[int(cell) for cell in line.split(",")] for line in out.splitlines()]
        assert (code, err) == (0, "") and found == expected


EXPECTED = """
tidar: 5 tokens, 10 model positions, 20 of 100 pairs (20%)

           ┃ clean    ┃ noisy
clean x0   ┃ ■·· │ ·· ┃ ·· · │ ··
      x1   ┃ ■■· │ ·· ┃ ·· · │ ··
      x2   ┃ ■■■ │ ·· ┃ ·· · │ ··
          ───────────────────────
      x0   ┃ ··· │ ■· ┃ ·· · │ ··
      x1   ┃ ··· │ ■■ ┃ ·· · │ ··
          ━━━━━━━━━━━━━━━━━━━━━━━
noisy M0   ┃ ··· │ ·· ┃ ■■ · │ ··
      M1   ┃ ··· │ ·· ┃ ■■ · │ ··
      M2╶  ┃ ■■· │ ·· ┃ ·· ■ │ ··
          ───────────────────────
      M0   ┃ ··· │ ·· ┃ ·· · │ ■■
      M1   ┃ ··· │ ·· ┃ ·· · │ ■■
"""


def test_text_marks_halves_documents_and_blocks(run):
    code, out, _ = run("show", "--documents", "3,2", "--block_size", "2")
    assert code == 0 and out.strip() == EXPECTED.strip()


@pytest.mark.parametrize("name", PATTERNS)
def test_picture(run, tmp_path, name):
    """Every pair has its color, at the middle of its cell."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "mask.png"
    options = ["--pattern", name, "--documents", "7,9", "--block_size", "3", "--seed", "1", "--output", str(path)]
    assert run("plot", *options)[0] == 0 and path.stat().st_size < 8000
    mask = pattern_mask(name, [7, 9], 3)
    cell = min(LARGEST_CELL, -(-SIDE // len(mask)))
    picture = image.open(path).convert("RGB")
    for q, row in enumerate(mask.tolist()):
        for k, sees in enumerate(row):
            pixel = picture.getpixel((MARGIN + k * cell + cell // 2, TOP + q * cell + cell // 2))
            assert (pixel != UNSEEN) == sees


@pytest.mark.parametrize("name", [*PATTERNS, "points"])
def test_stats_count_what_the_mask_has(name, monkeypatch):
    """Also of a mask that is not made of ranges, in pieces."""
    lengths, tile = [300, 1, 29, 70], 128
    pattern = get_pattern("tidar" if name == "points" else name)
    if name == "points":
        monkeypatch.setattr("tidar.patterns.base.PIECE", 2**18)
        monkeypatch.setattr("tidar.models.masks.key_ranges", lambda mask_mod: None)
    mask = pattern_mask("tidar" if name == "points" else name, lengths, 8)
    stats = mask_stats(pattern, lengths, 0, torch.device("cpu"))
    tiles = -(-len(mask) // tile)
    starts = range(0, tiles * tile, tile)
    counts = [int(mask[q : q + tile, k : k + tile].sum()) for q in starts for k in starts]
    assert (stats.seq_len, stats.positions, stats.allowed) == (400, len(mask), sum(counts))
    assert (stats.full, stats.empty) == (counts.count(tile**2), counts.count(0))
    assert stats.full + stats.partial + stats.empty == tiles**2
    dense = 12 * 4 * 32 * len(mask) ** 2 / 1e12
    assert float(stats.line(heads=4, head_dim=32).split()[-1]) == pytest.approx(dense, abs=1e-4)


def test_stats_go_to_32768_tokens(run):
    code, out, _ = run("stats", "--pattern", "causal")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and [line[0] for line in lines if line[0].isdecimal()] == [str(512 * 2**n) for n in range(7)]
    assert lines[-1][2] == f"{32768 * 32769 // 2:,}"


REFUSED = {
    "show --pattern x": "tidar.pattern = x: must be one of tidar, tidar_split",
    "show --documents 3,4 --seq_len 8": "--documents 3,4: add up to 7, must add up to --seq_len 8",
    "show --documents 3,x": "--documents 3,x: must be integers >= 1, separated by commas",
    "show --documents 3,0": "--documents 3,0: must be integers >= 1",
    "show --seq_len 0": "argument --seq_len: 0: must be integer >= 1",
    "show --block_size no": "tidar.block_size = no: must be integer >= 1",
    "show --pattern no:X": "no cannot be imported (ModuleNotFoundError",
    "show --pattern tidar_split --tidar.clean_ratio 1": "tidar.clean_ratio = 1: must be number > 0 and < 1",
    "show --wide": "unknown option wide",
    "plot": "the following arguments are required: --output",
    "plot --output /no/such/mask.png": "--output /no/such/mask.png: cannot be written (No such file or directory)",
    "plot --output mask.jpg": "argument --output: mask.jpg: must end with .png",
    "plot --output mask.png --seq_len 2000": "4000 model positions: must be at most 2048",
    "plot --output mask.png --seq_len 2000000": "4000000 model positions: must be at most 2048",
    "bench": "masks bench: needs a CUDA GPU",
    "paint": "invalid choice: 'paint'",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input(run, arguments):
    code, out, err = run(*arguments.split())
    assert code == 1 and out == "" and REFUSED[arguments] in err and len(err.splitlines()) <= 2


def test_plot_says_what_is_missing(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, _, err = run("plot", "--output", str(tmp_path / "mask.png"))
    assert code == 1 and "masks plot: needs Pillow: pip install" in err


def test_help(run):
    for command in ([], ["show"], ["plot"], ["stats"], ["bench"]):
        code, out, _ = run(*command, "--help")
        assert code == 0 and "usage: python -m tidar.masks" in out
