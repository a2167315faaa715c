"""The block mask that is made of ranges equals the one that is evaluated at all points."""

import random

import torch
from reference import ids_of, listed, random_lengths, random_pattern
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from tidar.models import block_mask_of_ranges, build_block_mask, count_pairs, mask_of_words, tile_counts
from tidar.patterns import PATTERNS, Tidar, dense_pieces, key_ranges


def test_direct_equals_generic():
    """500 random cases: pattern, options, tile, lengths of documents, among them rows that no tile divides."""
    rng = random.Random(4)
    kinds = set()
    for number in range(500):
        tile = rng.choice([1, 4, 16, 32])
        seq_len = rng.randint(1, 90)
        pattern = random_pattern(list(PATTERNS)[number % len(PATTERNS)], rng, rng.randint(1, seq_len))
        rows = [random_lengths(rng, seq_len) if rng.random() < 0.7 else [seq_len] for _ in range(2)]
        documents = pattern.documents(torch.cat([ids_of(lengths) for lengths in rows]), [number, number + 1])
        mask_mod, positions = pattern.mask_mod(documents), pattern.model_positions(seq_len)
        direct = block_mask_of_ranges(key_ranges(mask_mod), mask_mod, tile)
        generic = create_block_mask(mask_mod, 2, None, positions, positions, device="cpu", BLOCK_SIZE=tile)
        assert direct.seq_lengths == generic.seq_lengths and direct.BLOCK_SIZE == generic.BLOCK_SIZE
        for of in ("kv", "full_kv", "q", "full_q"):
            assert listed(direct, of) == listed(generic, of), (pattern, rows, tile)
            kinds.add((of, any(listed(direct, of))))
        # the pairs of each tile, against the dense mask
        index = torch.arange(positions)
        dense = mask_mod(torch.arange(2)[:, None, None], None, index[:, None], index)
        tiles = -(-positions // tile)
        padded = torch.zeros(2, tiles * tile, tiles * tile, dtype=torch.int32)
        padded[:, :positions, :positions] = dense
        words = mask_of_words(key_ranges(mask_mod))
        assert words(torch.arange(2)[:, None, None], None, index[:, None], index).equal(dense)
        counts = padded.view(2, tiles, tile, tiles, tile).sum(dim=(2, 4))
        assert tile_counts(key_ranges(mask_mod), tile).equal(counts)
        assert count_pairs(mask_mod, 2, positions, torch.device("cpu")) == dense.sum()
    assert len(kinds) == 8  # each list was empty once and filled once


def test_words_hold_the_longest_rows():
    """Ranges with bounds at either end of 32768 positions, empty ones among them."""
    rng = random.Random(0)
    bounds = [0, 1, 2, 16383, 16384, 32766, 32767, 32768]
    pairs = [sorted(rng.choices(bounds, k=2)) for _ in range(400)]
    starts, ends = torch.tensor(pairs, dtype=torch.int32).view(2, 1, 200, 2).unbind(-1)
    ranges = list(zip(starts, ends))
    index = torch.arange(200)[:, None]
    for keys in (torch.arange(32768), torch.arange(32768, dtype=torch.int32)):
        expected = ((starts[:, 0, :, None] <= keys) & (keys < ends[:, 0, :, None])).any(dim=0)
        assert mask_of_words(ranges)(0, None, index, keys).equal(expected)
        assert mask_of_words(ranges[:1])(0, None, index, keys).equal(
            (starts[0, 0, :, None] <= keys) & (keys < ends[0, 0, :, None])
        )


class Window(Tidar):
    """Another mask, made from TiDAR's."""

    def mask_mod(self, documents):
        tidar_mask = super().mask_mod(documents)
        return lambda b, h, q, k: tidar_mask(b, h, q, k) & ((q - k).abs() % 256 < 60)


def test_a_mask_made_from_one_of_ranges_is_evaluated():
    pattern = Window(block_size=4)
    documents = pattern.documents(ids_of([512]), [0])
    mask_mod = pattern.mask_mod(documents)
    found = build_block_mask(mask_mod, 1, 1024, torch.device("cpu"))
    expected = create_block_mask(mask_mod, 1, None, 1024, 1024, device="cpu")
    tidar = build_block_mask(Tidar(block_size=4).mask_mod(documents), 1, 1024, torch.device("cpu"))
    assert listed(found, "full_kv") == listed(expected, "full_kv") != listed(tidar, "full_kv")
    assert listed(found, "kv") == listed(expected, "kv") and found.BLOCK_SIZE == expected.BLOCK_SIZE


def test_a_mask_of_points_is_counted_in_pieces(monkeypatch):
    monkeypatch.setattr("tidar.patterns.base.PIECE", 600)

    def mask_mod(b, h, q, k):
        return (q - k) % (b + 2) == 0

    assert key_ranges(mask_mod) is None
    dense = create_mask(mask_mod, 2, None, 40, 40, device="cpu")[:, 0]
    assert torch.cat(list(dense_pieces(mask_mod, 2, 40, torch.device("cpu"))), dim=1).equal(dense)
    pieces = list(dense_pieces(mask_mod, 2, 40, torch.device("cpu"), multiple=3))
    assert [piece.shape[1] for piece in pieces] == [6, 6, 6, 6, 6, 6, 4]
    assert count_pairs(mask_mod, 2, 40, torch.device("cpu")) == dense.sum()
