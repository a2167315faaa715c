"""Layout, masks and what is drawn, against the loops."""

import random

import pytest
import torch
from reference import (
    HALVES,
    block_of,
    document_positions,
    expected_mask,
    ids_of,
    random_lengths,
    random_pattern,
    tidar_mask,
    tidar_targets,
)

from tidar.config import UserError
from tidar.models import MaskBuilder
from tidar.patterns import PATTERNS, Documents, get_pattern

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


@pytest.mark.parametrize("name", PATTERNS)
def test_dense_mask_equals_the_loops(name):
    for rng, seq_len, block_size in cases(60, longest=30):
        pattern = random_pattern(name, rng, block_size)
        rows, seeds = [random_lengths(rng, seq_len) for _ in range(2)], [rng.randrange(2**60) for _ in range(2)]
        ids = torch.cat([ids_of(lengths) for lengths in rows])
        documents = pattern.documents(ids, seeds)
        expected = torch.stack([expected_mask(name, pattern, documents, row, rows[row]) for row in range(2)])
        assert pattern.dense_mask(seq_len, ids, seeds).equal(expected), (rows, pattern)
        assert MaskBuilder(pattern, "sdpa")(documents).allowed_pairs == expected.sum()
        if documents.blocks is None:
            whole = expected_mask(name, pattern, documents, 0, [seq_len])
            assert pattern.dense_mask(seq_len).equal(whole)
        # what FlexAttention evaluates inside partial tiles
        index = torch.arange(pattern.model_positions(seq_len))
        at = pattern.mask_mod(documents)(torch.tensor(1), None, index[:, None], index)
        assert at.equal(expected[1])


def test_layout_of_tidar_equals_the_loops():
    for rng, seq_len, block_size in cases(60, longest=30):
        offsets = rng.random() < 0.5
        weights = [rng.random() + 0.1 for _ in range(block_size)] if rng.random() < 0.5 else []
        options = {"random_block_offset": offsets, "place_weights": weights}
        pattern = get_pattern("tidar", block_size=block_size, mask_token_id=99, **options)
        rows = [random_lengths(rng, seq_len) for _ in range(3)]
        tokens = torch.randint(0, 90, (3, seq_len))
        loss_mask = torch.randint(0, 3, (3, seq_len)) / 2
        batch = pattern.layout(tokens, torch.cat([ids_of(lengths) for lengths in rows]), loss_mask, [3, 4, 5])
        expected_positions = torch.tensor([document_positions(lengths)[1] for lengths in rows])
        assert batch.input_ids.equal(torch.cat([tokens, torch.full_like(tokens, 99)], dim=1))
        assert batch.position_ids.equal(torch.cat([expected_positions] * 2, dim=1))
        for loss, kind in (("ar", 0), ("diffusion", 1)):
            expected = []
            for row in range(3):
                offset = batch.documents.blocks.offset[row].item() if offsets else 0
                found = tidar_targets(tokens[row].tolist(), rows[row], loss_mask[row].tolist(), block_size, offset)
                for index, label, weight, at in found[kind]:
                    weight *= weights[at] if weights and loss == "diffusion" else 1
                    expected.append((row * 2 * seq_len + index, label, pytest.approx(weight), at))
            assert columns(batch.targets[loss]) == expected


def columns(targets) -> list[tuple]:
    """(index, label, weight, position in the block) of each target."""
    return list(zip(*(getattr(targets, name).tolist() for name in ("index", "labels", "weights", "block_position"))))


def test_layout_of_the_split_equals_the_loops():
    for rng, seq_len, block_size in cases(60, longest=30):
        ratio = rng.uniform(0.01, 0.99)
        pattern = get_pattern("tidar_split", block_size=block_size, mask_token_id=99, clean_ratio=ratio)
        lengths = random_lengths(rng, seq_len)
        tokens, loss_mask = torch.randint(0, 90, (1, seq_len)), torch.randint(0, 3, (1, seq_len)) / 2
        document, position = document_positions(lengths)
        batch = pattern.layout(tokens, ids_of(lengths), loss_mask)
        ar, diffusion, inputs = [], [], []
        for t in range(seq_len):
            clean = int(ratio * lengths[document[t]])
            inputs.append(tokens[0, t].item() if position[t] < clean else 99)
            if position[t] > 0 and loss_mask[0, t] > 0:
                target = tokens[0, t].item(), loss_mask[0, t].item()
                if position[t] < clean:
                    ar.append((t - 1, *target, 0))
                else:
                    diffusion.append((t, *target, (position[t] - clean) % block_size))
        assert batch.input_ids[0].tolist() == inputs and batch.position_ids[0].tolist() == position
        assert columns(batch.targets["ar"]) == ar and columns(batch.targets["diffusion"]) == diffusion


def test_causal_predicts_the_next_token():
    tokens, loss_mask = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[1, 0, 1, 1, 2]])
    batch = get_pattern("causal").layout(tokens, ids_of([3, 2]), loss_mask)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]] and batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert columns(batch.targets["ar"]) == [(1, 7, 1.0, 0), (3, 9, 2.0, 0)] and list(batch.targets) == ["ar"]


@pytest.mark.parametrize("name", ["tidar_random", "block_diffusion"])
def test_random_masking_is_a_bound_on_every_block(name):
    """In each block 1 to n of its n targets are masked and scored, with weights that add up to n; no others are."""
    counts = torch.zeros(5)
    for rng, seq_len, block_size in cases(60, longest=40):
        pattern = get_pattern(name, block_size=block_size, mask_token_id=99)
        lengths = random_lengths(rng, seq_len)
        tokens, loss_mask = torch.randint(0, 90, (1, seq_len)), torch.randint(0, 2, (1, seq_len)).float()
        batch = pattern.layout(tokens, ids_of(lengths), loss_mask, [rng.randrange(2**60)])
        document, position = document_positions(lengths)
        is_target = [position[t] > 0 and loss_mask[0, t] > 0 for t in range(seq_len)]
        blocks = {}
        for t in range(seq_len):
            blocks.setdefault((document[t], block_of(position[t], block_size)), []).append(t)
        noisy = batch.input_ids[0, seq_len:].tolist()
        scored = {index - seq_len: (label, weight) for index, label, weight, _ in columns(batch.targets["diffusion"])}
        assert set(scored) == {t for t in range(seq_len) if noisy[t] == 99}
        assert all(noisy[t] in (99, tokens[0, t]) for t in range(seq_len))
        assert all(label == tokens[0, t] for t, (label, _) in scored.items())
        for members in blocks.values():
            n, masked = sum(is_target[t] for t in members), [t for t in members if t in scored]
            assert all(is_target[t] for t in masked) and (0 < len(masked) <= n or n == 0)
            assert sum(scored[t][1] for t in masked) == pytest.approx(n)
            if n == 4:
                counts[len(masked)] += 1
    assert (counts[1:] > 0).all()  # every number of masked tokens is drawn


def test_draws_are_what_they_say():
    sizes, offsets = set(), set()
    for seed in range(60):
        pattern = get_pattern("tidar", block_sizes=[2, 5], random_block_offset=True, diffusion_share=0.4)
        lengths = random_lengths(random.Random(seed), 33)
        blocks = pattern.documents(ids_of(lengths), [seed]).blocks
        size, offset = blocks.size.item(), blocks.offset.item()
        sizes.add(size)
        offsets.add((size, offset))
        assert blocks.tokens.shape == (1, 15)  # 0.4 of 33 tokens, in whole blocks of at most 5
        document, position = document_positions(lengths)
        block = [(document[t], block_of(position[t], size, offset)) for t in range(33)]
        kept = [t for t in blocks.tokens[0].tolist() if t >= 0]
        assert kept == sorted(set(kept))
        # one block more might not fit
        longest = sorted((block.count(b) for b in set(block)), reverse=True)
        n_shown = len({block[t] for t in kept})
        assert sum(longest[:n_shown]) <= 15 < sum(longest[: n_shown + 1])
        assert all((t in kept) == (u in kept) for t in range(33) for u in range(33) if block[t] == block[u])
    assert sizes == {2, 5} and offsets == {(2, 0), (2, 1), *((5, offset) for offset in range(5))}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("options", [{}, {"random_block_offset": True, "block_sizes": [2, 4]}])
def test_a_diffusion_share_expects_the_loss_of_all_blocks(name, options):
    """Weighted sums over many draws, against the loop over all tokens; all blocks are shown equally often."""
    n, lengths, loss_mask = 4000, [9, 1, 4, 6, 2, 1], torch.tensor([[1.0, 2, 0, 1, 0.5] * 5])[:, :23]
    pattern = get_pattern(name, block_size=4, mask_token_id=99, diffusion_share=0.4, **options)
    tokens, ids = torch.arange(23), ids_of(lengths)
    batch = pattern.layout(tokens.repeat(n, 1), ids.repeat(n, 1), loss_mask.repeat(n, 1), range(n))
    targets = batch.targets["diffusion"]
    document, position = document_positions(lengths)
    # what is drawn besides does not change what is expected: every target's own weight
    expected = torch.tensor([loss_mask[0, t] if position[t] > 0 else 0 for t in range(23)])
    weights = torch.zeros(n, 23).index_put_(
        (targets.index // batch.input_ids.shape[1], targets.labels), targets.weights
    )
    within = 5 * weights.std(dim=0) / n**0.5 + 1e-6
    assert ((weights.mean(dim=0) - expected).abs() <= within).all(), weights.mean(dim=0)
    # the loss of a model, as a number for each token, and its denominator
    for nll in (torch.rand(23), torch.ones(23)):
        sums = weights @ nll
        assert abs(sums.mean() - expected @ nll) <= 5 * sums.std() / n**0.5
    if not options:
        shown = batch.documents.blocks.tokens
        times = torch.zeros(24).index_add_(0, shown.flatten() % 24, torch.ones(shown.numel()))[:23] / n
        blocks = {(document[t], position[t] // 4): times[t] for t in range(23)}
        assert len(blocks) == 9 and all(abs(p - 1 / 3) < 5 * (2 / 9 / n) ** 0.5 for p in blocks.values())


@pytest.mark.parametrize("name", ["tidar", "tidar_random", "block_diffusion", "tidar_split"])
def test_a_row_is_a_function_of_its_seed(name):
    """Not of the rows beside it, nor of the random state; and another option's draws do not change those there were."""
    options = {"block_size": 4, "mask_token_id": 99, "block_sizes": [2, 3, 4]}
    pattern = get_pattern(name, **options, random_block_offset=True)
    tokens, ids = torch.randint(0, 90, (3, 24)), ids_of([9, 15]).repeat(3, 1)
    together = pattern.layout(tokens, ids, torch.ones(3, 24), [7, 8, 9])
    torch.manual_seed(1)
    alone = pattern.layout(tokens[1:2], ids[1:2], torch.ones(1, 24), [8])
    assert alone.input_ids.equal(together.input_ids[1:2])
    assert alone.documents.blocks.offset.equal(together.documents.blocks.offset[1:2])
    without = get_pattern(name, **options).layout(tokens, ids, torch.ones(3, 24), [7, 8, 9])
    assert without.documents.blocks.size.equal(together.documents.blocks.size)


def test_masks_are_built_once_per_shape_or_once_per_packed_batch():
    builder = MaskBuilder(get_pattern("tidar", block_size=2), "sdpa")
    whole = Documents.from_ids(torch.zeros(2, 6))
    assert builder(whole) is builder(Documents.from_ids(torch.ones(2, 6)))
    packed = Documents.from_ids(ids_of([2, 4]).repeat(2, 1))
    assert builder(packed).attention[0, 0].equal(tidar_mask([2, 4], 2))
    assert builder(Documents.from_ids(ids_of([3, 3]).repeat(2, 1))).attention[1, 0].equal(tidar_mask([3, 3], 2))
    drawing = get_pattern("tidar", block_size=3, random_block_offset=True)
    builder = MaskBuilder(drawing, "sdpa")
    documents = [drawing.documents(torch.zeros(1, 6), [seed]) for seed in range(30)]
    masks = {tuple(builder(of).attention.flatten().tolist()) for of in documents}
    assert len(masks) == 3


def test_bad_input():
    with pytest.raises(ValueError, match=r"must be \[batch, 5\]"):
        get_pattern("tidar").dense_mask(5, torch.zeros(1, 6))
    with pytest.raises(ValueError, match="block_size = 0"):
        get_pattern("tidar", block_size=0)
    for ratio in (0, 1, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"tidar.clean_ratio = {ratio}: must be number > 0 and < 1"):
            get_pattern("tidar_split", clean_ratio=ratio)
    for weights in ([1.0, 2.0], [0.0] * 8):
        with pytest.raises(UserError, match="tidar.place_weights: .* must be 8"):
            get_pattern("tidar", place_weights=weights)
