"""No position learns what the table does not allow it to see: tested on the model, against the loops."""

import random
from unittest.mock import patch

import pytest
import torch
from reference import expected_mask, ids_of, random_lengths, random_pattern, tidar_mask

from tidar.models import Decoder, DecoderConfig, MaskBuilder, attention, initialize
from tidar.patterns import PATTERNS, Documents, Pattern, Tidar, get_pattern

VOCAB, MASK_TOKEN = 32, 31


def make_model(n_layers: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=VOCAB,
        dim=16,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=24,
        qkv_bias=True,
        o_bias=False,
        qk_norm=True,
        tie_embeddings=True,
        initializer_range=0.3,
    )
    model = Decoder(config).double()
    initialize(model, seed=0)
    return model


def influence(pattern: Pattern, lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Which input (column) moves which output (row) of a one-layer model: embeddings, and values of the attention.

    Both `[positions, positions]` bool. The second sees what a position's own residual stream hides in the first.
    """
    model = make_model(n_layers=1)
    tokens = torch.randint(0, 30, (1, sum(lengths)))
    batch = pattern.layout(tokens, ids_of(lengths), torch.ones(1, sum(lengths)), [seed])
    inputs = []
    model.embed_tokens.register_forward_hook(lambda module, args, output: inputs.append(output))

    def watched(q, k, v, *rest):
        inputs.append(v.transpose(1, 2).flatten(2))
        return attention(q, k, inputs[-1].unflatten(2, (v.shape[1], -1)).transpose(1, 2), *rest)

    with patch("tidar.models.decoder.attention", watched):
        logits = model(batch.input_ids, batch.position_ids, MaskBuilder(pattern, "sdpa")(batch.documents).attention)
    rows = []
    for position in range(logits.shape[1]):
        direction = torch.randn(VOCAB, dtype=torch.double)
        gradients = torch.autograd.grad(logits[0, position] @ direction, inputs, retain_graph=True)
        rows.append(torch.stack([(gradient[0] != 0).any(dim=-1) for gradient in gradients]))
    return torch.stack(rows, dim=1).unbind()


def layouts():
    rng = random.Random(2)
    yield [6], 3
    yield [7, 1, 9, 2], 4
    for _ in range(4):
        lengths = random_lengths(rng, rng.randint(8, 20))
        yield lengths, rng.randint(1, 6)


def patterns(name: str):
    """Plain, and with what its options draw."""
    rng = random.Random(7)
    for seed, (lengths, block_size) in enumerate(layouts()):
        options = {} if name == "causal" else {"block_size": block_size, "mask_token_id": MASK_TOKEN}
        yield get_pattern(name, **options), lengths, seed
        pattern = random_pattern(name, rng, block_size)
        pattern.mask_token_id = MASK_TOKEN
        yield pattern, lengths, seed


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_flow_exactly_where_the_mask_allows(name):
    for pattern, lengths, seed in patterns(name):
        expected = expected_mask(name, pattern, pattern.documents(ids_of(lengths), [seed]), 0, lengths)
        of_embeddings, of_values = influence(pattern, lengths, seed)
        assert of_embeddings.equal(expected) and of_values.equal(expected), (pattern, lengths)


# each bound of the mask, shifted by one: (query half, key half, what is seen instead), i and j places in the document
SHIFTED = {
    "clean sees one ahead": (False, False, lambda i, j, b: j <= i + 1),
    "clean sees not itself": (False, False, lambda i, j, b: j < i),
    "masked sees its block's first clean token": (True, False, lambda i, j, b: j <= i // b * b),
    "masked misses the last clean token": (True, False, lambda i, j, b: j < i // b * b - 1),
    "block begins early": (True, True, lambda i, j, b: (i // b * b - 1 <= j) & (j < i // b * b + b)),
    "block begins late": (True, True, lambda i, j, b: (i // b * b + 1 <= j) & (j < i // b * b + b)),
    "block ends late": (True, True, lambda i, j, b: (i // b * b <= j) & (j <= i // b * b + b)),
    "block ends early": (True, True, lambda i, j, b: (i // b * b <= j) & (j < i // b * b + b - 1)),
    "clean sees a masked one": (False, True, lambda i, j, b: j == i),
}


class Shifted(Tidar):
    def mask_mod(self, documents: Documents):
        right, seq_len, position = super().mask_mod(documents), documents.index.shape[1], documents.position
        q_masked, k_masked, sees = SHIFTED[self.shift]

        def mask_mod(b, h, q, k):
            i, j = position[b, q % seq_len], position[b, k % seq_len]
            same_document = documents.index[b, q % seq_len] == documents.index[b, k % seq_len]
            in_quarter = ((q >= seq_len) == q_masked) & ((k >= seq_len) == k_masked)
            return torch.where(in_quarter, same_document & sees(i, j, self.block_size), right(b, h, q, k))

        return mask_mod


@pytest.mark.parametrize("shift", SHIFTED)
def test_a_shifted_bound_is_seen(shift):
    pattern = Shifted(block_size=3, mask_token_id=MASK_TOKEN)
    pattern.shift = shift
    expected = tidar_mask([8, 5], 3)
    of_embeddings, of_values = influence(pattern, [8, 5])
    assert not of_values.equal(expected)
    # a position always sees itself through the residual stream
    assert shift == "clean sees not itself" or not of_embeddings.equal(expected)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_changes_no_prediction_of_itself(name):
    """Through four layers, changed in whichever half it stands; it does move others, so the test is not blind."""
    model = make_model(n_layers=4)
    moved_elsewhere = 0
    for pattern, lengths, seed in patterns(name):
        seq_len = sum(lengths)
        # the row as it is, then with each of its tokens changed
        tokens = torch.randint(0, 30, (1, seq_len)).repeat(seq_len + 1, 1)
        tokens[1:] = (tokens[1:] + torch.eye(seq_len, dtype=torch.long)) % 30
        ids = ids_of(lengths).repeat(seq_len + 1, 1)
        batch = pattern.layout(tokens, ids, torch.ones_like(tokens), [seed] * (seq_len + 1))
        with torch.no_grad():
            logits = model(batch.input_ids, batch.position_ids, MaskBuilder(pattern, "sdpa")(batch.documents).attention)
        moved = ((logits - logits[0]).abs() > 1e-12).any(dim=-1)
        for targets in batch.targets.values():
            row, position = targets.index // logits.shape[1], targets.index % logits.shape[1]
            by_row = targets.labels.view(seq_len + 1, -1)
            is_own = (by_row != by_row[0]).flatten()
            assert is_own.sum() <= seq_len and not moved[row[is_own], position[is_own]].any(), (pattern, lengths)
            moved_elsewhere += moved[row[~is_own], position[~is_own]].sum()
    assert moved_elsewhere > 0


def test_a_token_changes_only_what_may_see_it():
    model = make_model(n_layers=4)
    for lengths, block_size in layouts():
        pattern = get_pattern("tidar", block_size=block_size, mask_token_id=MASK_TOKEN)
        seq_len = sum(lengths)
        tokens = torch.randint(0, 30, (1, seq_len))
        expected = tidar_mask(lengths, block_size)
        before = forward(model, pattern, tokens, lengths)
        for changed in range(seq_len):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 1) % 30
            moved = (forward(model, pattern, other, lengths) != before).any(dim=-1)[0]
            assert moved.equal(expected[:, changed]), (lengths, block_size, changed)


@torch.no_grad()
def forward(model, pattern, tokens, lengths):
    batch = pattern.layout(tokens, ids_of(lengths), torch.ones_like(tokens))
    return model(batch.input_ids, batch.position_ids, MaskBuilder(pattern, "sdpa")(batch.documents).attention)
