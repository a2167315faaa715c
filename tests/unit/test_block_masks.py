"""The block mask, the dense mask and the counts of a mask of ranges equal those that are evaluated at all points."""

import random

import torch
from reference import ids_of, listed, random_lengths, random_pattern
from torch.nn.attention.flex_attention import create_block_mask

from tidar.models import MaskBuilder, PointMask, RangeMask, make_mask, mask_of_words, pattern_mask
from tidar.patterns import PATTERNS, Tidar, dense_pieces, key_ranges

CPU = torch.device("cpu")


def check(mask: RangeMask, tile: int) -> set:
    """Compares all that a mask gives with its mask_mod at all points; returns which lists of tiles were (not) empty."""
    batch, n_queries, n_keys = mask.batch, mask.n_queries, mask.n_keys
    at = torch.arange(batch)[:, None, None], None, torch.arange(n_queries)[:, None], torch.arange(n_keys)
    dense = mask.mask_mod(*at)
    assert dense.shape == (batch, n_queries, n_keys) and mask.dense()[:, 0].equal(dense)
    assert mask_of_words(mask.ranges)(*at).equal(dense)
    assert mask.allowed_pairs() == dense.sum()
    query_tiles, key_tiles = -(-n_queries // tile), -(-n_keys // tile)
    padded = torch.zeros(batch, query_tiles * tile, key_tiles * tile, dtype=torch.int32)
    padded[:, :n_queries, :n_keys] = dense
    counts = padded.view(batch, query_tiles, tile, key_tiles, tile).sum(dim=(2, 4))
    points = PointMask(mask.mask_mod, batch, n_queries, n_keys, CPU)
    assert mask.tile_counts(tile).equal(counts) and points.tile_counts(tile).equal(counts)
    assert points.allowed_pairs() == dense.sum()
    direct = mask.block_mask(tile=tile)
    generic = create_block_mask(mask.mask_mod, batch, None, n_queries, n_keys, device="cpu", BLOCK_SIZE=tile)
    assert direct.seq_lengths == generic.seq_lengths and direct.BLOCK_SIZE == generic.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        assert listed(direct, name) == listed(generic, name), (mask.ranges, tile)
        for kind in ("num_blocks", "indices"):
            ours, theirs = getattr(direct, f"{name}_{kind}"), getattr(generic, f"{name}_{kind}")
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
    return {(name, any(listed(direct, name))) for name in ("kv", "full_kv", "q", "full_q")}


def test_masks_of_patterns():
    """Random cases: pattern, options, tile, lengths of documents, among them rows that no tile divides."""
    rng = random.Random(4)
    kinds = set()
    for number in range(100):
        seq_len = rng.randint(1, 90)
        pattern = random_pattern(list(PATTERNS)[number % len(PATTERNS)], rng, rng.randint(1, seq_len))
        rows = [random_lengths(rng, seq_len) if rng.random() < 0.7 else [seq_len] for _ in range(2)]
        documents = pattern.documents(torch.cat([ids_of(lengths) for lengths in rows]), [number, number + 1])
        kinds |= check(pattern_mask(pattern, documents), tile=rng.choice([1, 4, 16, 32]))
    assert len(kinds) == 8  # each list was empty once and filled once


def test_rectangular_masks():
    """Random ranges, one or two for each query, of other numbers of keys than of queries; queries may see nothing."""
    rng = random.Random(5)
    shapes = set()
    for _ in range(50):
        batch, n_queries, n_keys, n_ranges = (rng.randint(1, most) for most in (3, 60, 60, 2))
        bounds = [sorted(rng.choices(range(n_keys + 1), k=2 * n_ranges)) for _ in range(batch * n_queries)]
        bounds = torch.tensor(bounds, dtype=torch.int32).view(batch, n_queries, n_ranges, 2)
        ranges = [tuple(bounds[:, :, number].unbind(-1)) for number in rng.sample(range(n_ranges), n_ranges)]
        check(RangeMask(ranges, n_keys), tile=rng.choice([1, 4, 8, 16]))
        shapes.add((n_queries > n_keys) - (n_queries < n_keys))
    assert shapes >= {-1, 1}


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
    """Another mask, made from TiDAR's. Counts how often it is made."""

    made = 0

    def mask_mod(self, documents):
        self.made += 1
        tidar_mask = super().mask_mod(documents)
        return lambda b, h, q, k: tidar_mask(b, h, q, k) & ((q - k).abs() % 256 < 60)


def test_a_mask_made_from_one_of_ranges_is_evaluated():
    pattern = Window(block_size=4)
    documents = pattern.documents(ids_of([512]), [0])
    found = pattern_mask(pattern, documents).block_mask()
    expected = create_block_mask(pattern.mask_mod(documents), 1, None, 1024, 1024, device="cpu")
    tidar = pattern_mask(Tidar(block_size=4), documents).block_mask()
    assert listed(found, "full_kv") == listed(expected, "full_kv") != listed(tidar, "full_kv")
    assert listed(found, "kv") == listed(expected, "kv") and found.BLOCK_SIZE == expected.BLOCK_SIZE


def test_a_mask_is_made_once_per_batch():
    """The pattern's mask_mod is called once for the mask and its number of pairs."""
    for ids, times in ((ids_of([5, 7]), 2), (ids_of([12]), 1)):  # packed rows twice, a whole row once per shape
        pattern = Window(block_size=4)
        build = MaskBuilder(pattern, "sdpa")
        for _ in range(2):
            mask = build(pattern.documents(ids))
            assert mask.allowed_pairs == mask.attention.sum()
        assert pattern.made == times


def test_a_mask_of_points_is_evaluated_in_pieces(monkeypatch):
    monkeypatch.setattr("tidar.patterns.base.PIECE", 600)

    def mask_mod(b, h, q, k):
        return (q - k) % (b + 2) == 0

    assert key_ranges(mask_mod) is None
    mask = make_mask(mask_mod, 2, 40, 30, CPU)
    dense = mask.dense()[:, 0]
    assert dense.shape == (2, 40, 30)
    assert torch.cat(list(dense_pieces(mask_mod, 2, 40, 30, CPU)), dim=1).equal(dense)
    pieces = list(dense_pieces(mask_mod, 2, 40, 30, CPU, multiple=3))
    assert [piece.shape[1] for piece in pieces] == [9, 9, 9, 9, 4]
    assert mask.allowed_pairs() == dense.sum() == mask.tile_counts(16).sum()
