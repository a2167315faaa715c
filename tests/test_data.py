import random

import pytest
import torch

from tidar.config import UserError, load_config
from tidar.data import SOURCES, Corpus, PackedRows, TrainingOrder, load_rows, make_loader, validation_order
from tidar.patterns import PADDING, get_pattern


def random_corpus(rng: random.Random, seq_len: int) -> Corpus:
    lengths = [rng.randint(1, 3 * seq_len) for _ in range(rng.randint(1, 60))]
    offsets = torch.tensor([0] + lengths).cumsum(0)
    tokens = torch.arange(offsets[-1])  # every token is its own number, so it can be found again
    return Corpus(tokens, offsets, loss_mask=torch.rand(len(tokens)))


def test_packing_keeps_every_token_once_in_its_place():
    rng = random.Random(0)
    for _ in range(40):
        seq_len = rng.randint(2, 50)
        corpus = random_corpus(rng, seq_len)
        rows = PackedRows(corpus, seq_len, padding_token_id=-7)
        found, pieces = [], []
        for row in range(len(rows)):
            tokens, ids, loss_mask = rows[row]
            assert tokens[ids == PADDING].eq(-7).all() and not loss_mask[ids == PADDING].any()
            for number in range(int(ids.max()) + 1):
                piece = tokens[ids == number]
                assert piece.equal(torch.arange(int(piece[0]), int(piece[0]) + len(piece)))
                assert loss_mask[ids == number].equal(corpus.loss_mask[piece])
                document = torch.searchsorted(corpus.offsets, piece[0], right=True)
                assert piece[-1] < corpus.offsets[document]  # never across two documents
                pieces.append((int(document), len(piece)))
                found += piece.tolist()
        assert sorted(found) == list(range(len(corpus.tokens)))
        for document, length in pieces:
            whole = int(corpus.offsets[document] - corpus.offsets[document - 1])
            assert length == min(whole, seq_len) or length == whole % seq_len  # cut into full rows and a rest


def test_every_cut_of_a_batch_sees_the_same_samples():
    """Steps of 12 samples from sample 8 on, over the ends of epochs of 31 rows."""
    expected = [row for batch in take(TrainingOrder(31, 5, 0, 1, 0, 1), 140) for row in batch]
    for epoch in range(4):
        assert sorted(expected[31 * epoch : 31 * (epoch + 1)]) == list(range(31))
    assert expected[:31] != expected[31:62]
    assert take(TrainingOrder(31, 6, 0, 1, 0, 1), 31) != [[row] for row in expected[:31]]
    for local_batch_size, world_size in ((12, 1), (3, 1), (6, 2), (2, 2), (1, 3), (4, 3)):
        micro_batches = 12 // (local_batch_size * world_size)
        ranks = [
            take(TrainingOrder(31, 5, 8, local_batch_size, rank, world_size), 10 * micro_batches)
            for rank in range(world_size)
        ]
        seen = [row for micro_batch in zip(*ranks) for rows in micro_batch for row in rows]
        assert seen == expected[8:128]


def take(order, n: int) -> list[list[int]]:
    iterator = iter(order)
    return [next(iterator) for _ in range(n)]


def test_validation_sees_every_row_once():
    for n_rows, local_batch_size, world_size in ((10, 2, 2), (7, 3, 1), (3, 2, 3), (8, 2, 2)):
        ranks = [validation_order(n_rows, -1, local_batch_size, rank, world_size) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = [row for batches in ranks for batch in batches for row in batch]
        assert sorted(row for row in rows if row >= 0) == list(range(n_rows))
        assert [len(batches) for batches in validation_orders_of_two(n_rows, local_batch_size, world_size)] == [
            min(2, len(ranks[0]))
        ] * world_size


def validation_orders_of_two(n_rows, local_batch_size, world_size):
    return [validation_order(n_rows, 2, local_batch_size, rank, world_size) for rank in range(world_size)]


def test_python_source():
    training, held_out, vocabulary = load_rows(load_config(["--training.seq_len", "64"]))
    assert vocabulary.size == 257
    tokens, ids, loss_mask = training[0]
    assert 0 <= tokens.min() and tokens.max() < vocabulary.size
    files = len(training.corpus.offsets) - 1, len(held_out.corpus.offsets) - 1
    assert files[1] == sum(files) // 100
    assert training.corpus.tokens[training.corpus.offsets[1:] - 1].eq(256).all()  # every document ends
    # the same again, in this order
    again, _, _ = load_rows(load_config(["--training.seq_len", "64"]))
    assert again.corpus.tokens.equal(training.corpus.tokens)


def test_a_corpus_without_documents_is_refused(monkeypatch):
    empty = Corpus(torch.zeros(0), torch.zeros(1, dtype=torch.long))
    one = Corpus(torch.arange(5), torch.tensor([0, 5]))
    for training, held_out, words in ((empty, one, "no documents to train on"), (one, empty, "no held-out documents")):
        monkeypatch.setitem(SOURCES, "short", (SOURCES["python_source"][0], lambda paths, c=(training, held_out): c))
        with pytest.raises(UserError, match=words):
            load_rows(load_config(["--data.source", "short"]))
    assert load_rows(load_config(["--data.source", "short", "--validation.enable", "false"]))
    with pytest.raises(UserError, match="data.source = shirt: must be one of python_source"):
        load_rows(load_config(["--data.source", "shirt"]))


def test_background_workers_change_nothing():
    rows = PackedRows(random_corpus(random.Random(3), 16), 16, padding_token_id=0)
    pattern = get_pattern("tidar", block_size=4, mask_token_id=0)
    order = [[0, 1], [2, -1]]
    state = torch.get_rng_state()
    for here, there in zip(make_loader(rows, order, pattern, 0, False), make_loader(rows, order, pattern, 2, False)):
        assert here.rows.input_ids.equal(there.rows.input_ids)
        assert here.rows.targets["ar"].index.equal(there.rows.targets["ar"].index)
        assert here.allowed_pairs == there.allowed_pairs == pattern.allowed_pairs(here.rows.documents.lengths())
    assert there.n_tokens == sum(length for _, length in rows.rows[2])
    assert torch.get_rng_state().equal(state)
