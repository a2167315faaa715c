"""Rows dealt to the ranks of context parallelism: what each rank sees, scores and has to do."""

import random
from dataclasses import dataclass

import pytest
import torch
from reference import expected_mask, ids_of, random_lengths, random_pattern

import tidar.patterns.sharding
from tidar.config import UserError
from tidar.models import pattern_mask
from tidar.patterns import PATTERNS, Blocks, Causal, ModelBatch, Pattern, RowSharding, Tidar, TidarSplit, in_range


class Points(TidarSplit):
    """The same mask, which is not made of ranges."""

    def mask_mod(self, documents):
        whole = super().mask_mod(documents)
        return lambda b, h, q, k: whole(b, h, q, k)


def laid_out(pattern: Pattern, rows: list[list[int]], seeds: list[int]) -> ModelBatch:
    ids = torch.cat([ids_of(lengths) for lengths in rows])
    return pattern.layout(torch.randint(0, 90, ids.shape), ids, torch.rand(ids.shape).round(), seeds)


def test_every_rank_sees_what_the_whole_row_does(monkeypatch):
    """Random patterns, options, documents, ranks and chunks: each position and target is on one rank and sees the same,
    and keys that are gathered are put into the row's order.
    """
    rng = random.Random(6)
    private, straddling, many_chunks = 0, 0, 0
    for number in range(60):
        name, n_ranks = [*PATTERNS, "points"][number % 6], rng.choice([2, 3, 4])
        seq_len = 2 * n_ranks * rng.randint(1, 12)
        block_size = rng.randint(1, max(1, seq_len // 2))
        pattern = Points(block_size, 99) if name == "points" else random_pattern(name, rng, block_size)
        rows = [random_lengths(rng, seq_len) if rng.random() < 0.7 else [seq_len] for _ in range(2)]
        batch = laid_out(pattern, rows, [number, number + 1])
        monkeypatch.setattr(tidar.patterns.sharding, "TILE", rng.choice([1, 128]))
        sharding = RowSharding(pattern, name, seq_len, n_ranks)
        name = "tidar_split" if name == "points" else name
        expected = [expected_mask(name, pattern, batch.documents, row, lengths) for row, lengths in enumerate(rows)]
        length, n_shared = batch.input_ids.shape[1], sharding.n_shared
        private += n_shared < length
        is_shared = torch.cat([torch.full((n,), part not in sharding.private) for part, n in sharding.parts.items()])
        many_chunks += sharding.n_chunks > 2
        seen, gathered, targets = [], [], {loss: [] for loss in batch.targets}
        for rank in range(n_ranks):
            local = sharding.share(batch, rank)
            positions, used = local.share.positions, local.share.used
            assert positions.shape[1] == sharding.n_positions and local.n_positions == used.sum()
            dense = pattern_mask(pattern, batch.documents, local.share).dense()[:, 0]
            assert dense.shape[2] == sharding.n_keys
            gathered.append(positions[:, : n_shared // n_ranks].T)
            for row in range(2):
                mine = positions[row, used[row]]
                seen.append(mine + row * length)
                assert local.input_ids[row, used[row]].equal(batch.input_ids[row, mine])
                assert local.position_ids[row, used[row]].equal(batch.position_ids[row, mine])
                # the position of each key, or what no position sees
                own = positions[row, sharding.n_positions - (sharding.n_keys - n_shared) :]
                keys = torch.cat([is_shared.nonzero()[:, 0], own])
                allowed = torch.zeros(len(mine), length + 1, dtype=torch.int)
                allowed.index_add_(1, keys % (length + 1), dense[row, used[row]].int())
                assert allowed[:, :-1].equal(expected[row][mine].int()) and not allowed[:, -1].any()
                unused = (~used[row]).nonzero()[:, 0]
                itself = torch.zeros(len(unused), sharding.n_keys, dtype=torch.bool)
                itself[torch.arange(len(unused)), unused - sharding.n_positions + sharding.n_keys] = True
                assert dense[row, unused].equal(itself)
                chunks = mine[~is_shared[mine]] - n_shared
                size = -(-(length - n_shared) // (sharding.n_chunks * n_ranks))
                straddling += n_shared < length and len(set((chunks // size).tolist())) > sharding.n_chunks
            for loss, target in local.targets.items():
                row, slot = target.index // sharding.n_positions, target.index % sharding.n_positions
                at = row * length + positions[row, slot]
                targets[loss].append(torch.stack([at, target.labels, target.weights, target.block_position]))
        assert torch.cat(seen).sort().values.equal(torch.arange(2 * length))
        keys = torch.cat(gathered).flatten()[local.share.order]
        assert keys.equal(is_shared.nonzero()[:, 0].expand(2, -1))
        assert keys.flatten()[local.share.dealt].equal(torch.cat(gathered))
        for loss, target in batch.targets.items():
            columns = torch.stack([target.index, target.labels, target.weights, target.block_position])
            found = torch.cat(targets[loss], dim=1)
            assert found[:, found[0].sort().indices].equal(columns[:, columns[0].sort().indices])
    assert private > 10 and straddling > 10 and 10 < many_chunks < 50


@pytest.mark.parametrize("lengths", [[8192], [100, 5000, 92, 3000], [7000, *[149] * 8]], ids=str)
@pytest.mark.parametrize("pattern", [Tidar(8, 99), Causal()], ids=["tidar", "causal"])
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_have_equally_much_to_do(pattern, n_ranks, lengths):
    """Pairs of queries and keys, of a row of one document and of packed ones."""
    batch = laid_out(pattern, [lengths], [0])
    sharding = RowSharding(pattern, "x", 8192, n_ranks)
    pairs = []
    for rank in range(n_ranks):
        pairs.append(pattern_mask(pattern, batch.documents, sharding.share(batch, rank).share).allowed_pairs().item())
    assert max(pairs) < 1.05 * min(pairs)


@dataclass
class Odd(Tidar):
    """Its noisy half has a position more, which all see."""

    def parts(self, seq_len):
        return {"row": seq_len, "extra": 1}

    def layout(self, tokens, document_ids, loss_mask, seeds=None):
        batch = Causal().layout(tokens, document_ids, loss_mask)
        batch.input_ids, batch.position_ids = (
            torch.cat([x, x[:, :1]], dim=1) for x in (batch.input_ids, batch.position_ids)
        )
        return batch

    def mask_mod(self, documents):
        end = torch.full((len(documents.index), documents.index.shape[1] + 1), documents.index.shape[1] + 1)
        return in_range((torch.zeros_like(end), end))


class Evaluated(Tidar):
    """TiDAR's mask, which is not made of ranges."""

    def mask_mod(self, documents):
        whole = super().mask_mod(documents)
        return lambda b, h, q, k: whole(b, h, q, k)


class LongBlocks(Tidar):
    """Blocks of some rows are longer than it states."""

    def documents(self, document_ids, seeds=None):
        found = super().documents(document_ids, seeds)
        found.blocks = Blocks(*(torch.full((len(document_ids), 1), size) for size in (2 + 2 * max(seeds), 0)))
        return found


@pytest.mark.parametrize(
    "pattern, seq_len, message",
    [
        (Tidar(4, 9), 20, "training.seq_len = 20: must be a multiple of 8, twice .*context_parallel_degree = 4"),
        (Odd(4, 9), 16, "tidar.pattern = mine: cannot be sharded .* = 4: part extra, whose keys others see, has 1 pos"),
        (LongBlocks(4, 9), 64, "tidar.pattern = mine: cannot be sharded .*more than the block_size = 4 positions"),
        (Evaluated(4, 9), 64, "tidar.pattern = mine: cannot be sharded .* = 4: its mask_mod .* parts clean, noisy"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_divided_are_refused_by_name(pattern, seq_len, message):
    with pytest.raises(UserError, match=message) as refused:
        sharding = RowSharding(pattern, "mine", seq_len, 4)
        sharding.share(laid_out(pattern, [[seq_len]], [30]), 0)
    assert str(refused.value).count("\n") <= 1
