import random

import pytest
import torch
from reference import ids_of, random_lengths, tidar_mask, tidar_targets
from torch.nn.attention.flex_attention import create_block_mask

from tidar.config import UserError
from tidar.models import MaskBuilder
from tidar.patterns import Documents, get_pattern

WORKED_EXAMPLE = """
1 0 0 0 0 0  0 0 0 0 0 0
1 1 0 0 0 0  0 0 0 0 0 0
1 1 1 0 0 0  0 0 0 0 0 0
1 1 1 1 0 0  0 0 0 0 0 0
1 1 1 1 1 0  0 0 0 0 0 0
1 1 1 1 1 1  0 0 0 0 0 0
0 0 0 0 0 0  1 1 1 0 0 0
0 0 0 0 0 0  1 1 1 0 0 0
0 0 0 0 0 0  1 1 1 0 0 0
1 1 1 0 0 0  0 0 0 1 1 1
1 1 1 0 0 0  0 0 0 1 1 1
1 1 1 0 0 0  0 0 0 1 1 1
"""


def cases(n: int, longest: int):
    rng = random.Random(1)
    for _ in range(n):
        seq_len = rng.randint(1, longest)
        yield rng, seq_len, rng.choice([1, seq_len, rng.randint(1, seq_len)])


def test_worked_example():
    expected = [[int(digit) for digit in line.split()] for line in WORKED_EXAMPLE.strip().splitlines()]
    assert get_pattern("tidar", block_size=3).dense_mask(6).int().tolist() == expected


def test_dense_mask_equals_the_loops():
    for rng, seq_len, block_size in cases(150, longest=40):
        pattern = get_pattern("tidar", block_size=block_size)
        rows = [random_lengths(rng, seq_len) for _ in range(2)]
        expected = torch.stack([tidar_mask(lengths, block_size) for lengths in rows])
        mask = pattern.dense_mask(seq_len, torch.cat([ids_of(lengths) for lengths in rows]))
        assert mask.equal(expected), (rows, block_size)
        assert pattern.dense_mask(seq_len).equal(tidar_mask([seq_len], block_size))
        assert pattern.allowed_pairs(torch.tensor(rows[0] + rows[1])) == expected.sum()


def test_block_mask_equals_the_loops():
    """The tiles that FlexAttention skips, computes in full and computes in part are those of the dense mask."""
    tile = 16
    for rng, seq_len, block_size in cases(40, longest=90):
        pattern = get_pattern("tidar", block_size=block_size)
        lengths = random_lengths(rng, seq_len)
        documents = Documents.from_ids(ids_of(lengths))
        mask_mod = pattern.mask_mod(documents)
        block_mask = create_block_mask(mask_mod, 1, None, 2 * seq_len, 2 * seq_len, device="cpu", BLOCK_SIZE=tile)
        tiles = -(-2 * seq_len // tile)
        dense = torch.zeros(tiles * tile, tiles * tile, dtype=torch.bool)
        dense[: 2 * seq_len, : 2 * seq_len] = tidar_mask(lengths, block_size)
        allowed = dense.view(tiles, tile, tiles, tile).sum(dim=(1, 3))
        full = _tiles(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, tiles)
        partial = _tiles(block_mask.kv_num_blocks, block_mask.kv_indices, tiles)
        assert full.equal(allowed == tile * tile)
        assert partial.equal((allowed > 0) & ~full)
        # what the kernel evaluates inside partial tiles
        index = torch.arange(2 * seq_len)
        assert mask_mod(torch.tensor(0), None, index[:, None], index).equal(tidar_mask(lengths, block_size))


def _tiles(counts, indices, n: int) -> torch.Tensor:
    tiles = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        tiles[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    return tiles


def test_layout_equals_the_loops():
    for rng, seq_len, block_size in cases(60, longest=30):
        pattern = get_pattern("tidar", block_size=block_size, mask_token_id=99)
        rows = [random_lengths(rng, seq_len) for _ in range(3)]
        tokens = torch.randint(0, 90, (3, seq_len))
        loss_mask = torch.randint(0, 3, (3, seq_len)) / 2
        batch = pattern.layout(tokens, torch.cat([ids_of(lengths) for lengths in rows]), loss_mask)
        places = torch.tensor([[place for length in lengths for place in range(length)] for lengths in rows])
        assert batch.input_ids.equal(torch.cat([tokens, torch.full_like(tokens, 99)], dim=1))
        assert batch.position_ids.equal(torch.cat([places, places], dim=1))
        for loss, kind in (("ar", 0), ("diffusion", 1)):
            expected = []
            for row in range(3):
                targets = tidar_targets(tokens[row].tolist(), rows[row], loss_mask[row].tolist(), block_size)[kind]
                expected += [(row * 2 * seq_len + index, *rest) for index, *rest in targets]
            targets = batch.targets[loss]
            found = [column.tolist() for column in (targets.index, targets.labels, targets.weights, targets.place)]
            assert list(zip(*found)) == expected


def test_masks_are_built_once_per_shape_or_once_per_packed_batch():
    builder = MaskBuilder(get_pattern("tidar", block_size=2), "sdpa")
    whole = Documents.from_ids(torch.zeros(2, 6))
    assert builder(whole) is builder(Documents.from_ids(torch.ones(2, 6)))
    packed = Documents.from_ids(ids_of([2, 4]).repeat(2, 1))
    assert builder(packed)[0, 0].equal(tidar_mask([2, 4], 2))
    assert builder(Documents.from_ids(ids_of([3, 3]).repeat(2, 1)))[1, 0].equal(tidar_mask([3, 3], 2))


def test_bad_input():
    with pytest.raises(UserError, match="tidar.pattern = tydar: must be one of tidar"):
        get_pattern("tydar")
    with pytest.raises(ValueError, match=r"must be \[batch, 5\]"):
        get_pattern("tidar").dense_mask(5, torch.zeros(1, 6))
