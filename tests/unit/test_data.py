import random
from functools import partial

import numpy as np
import pytest
import torch

from tidar.config import UserError, load_config
from tidar.data import (
    Corpus,
    Document,
    PackedRows,
    TrainingOrder,
    data_tokenizer,
    held_out_documents,
    load_data,
    make_loader,
    make_rows,
    shuffled,
    validation_order,
)
from tidar.data.packing import best_fit
from tidar.patterns import PADDING, get_pattern


def random_corpus(rng: random.Random, seq_len: int) -> Corpus:
    """Every token is its own number, so that it can be found again."""
    lengths = [rng.randint(0, 3 * seq_len) for _ in range(rng.randint(1, 60))]
    ends = np.cumsum(lengths)
    targets = [np.array([rng.random() < 0.5 for _ in range(length)], bool) for length in lengths]
    return Corpus.of(
        Document(np.arange(end - length, end), target) for length, end, target in zip(lengths, ends, targets)
    )


def best_fit_by_loops(lengths: list[int], seq_len: int) -> list[int]:
    """Space left in each row, one piece at a time."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(space, row) for row, space in enumerate(spaces) if space >= length]
        row = min(fitting)[1] if fitting else len(spaces)
        spaces += [] if fitting else [seq_len]
        spaces[row] -= length
    return sorted(spaces)


def test_best_fit_equals_the_loops():
    rng = np.random.default_rng(0)
    for _ in range(200):
        seq_len = int(rng.integers(1, 40))
        lengths = rng.integers(1, seq_len + 1, int(rng.integers(0, 80)))
        filled = np.bincount(best_fit(lengths, seq_len), weights=lengths)
        assert sorted(seq_len - filled) == best_fit_by_loops(lengths.tolist(), seq_len)


@pytest.mark.parametrize("long_documents", ["split", "drop"])
def test_packing_keeps_every_token_once_in_its_place(long_documents, monkeypatch):
    """Corpora one after the other, in chunks smaller than they are."""
    monkeypatch.setattr("tidar.data.packing.CHUNK_DOCUMENTS", 17)
    rng = random.Random(0)
    for _ in range(40):
        seq_len = rng.randint(2, 50)
        corpora = [random_corpus(rng, seq_len) for _ in range(2)]
        rows = PackedRows(corpora, seq_len, padding_token_id=7, long_documents=long_documents)
        lengths = [np.diff(corpus.offsets) for corpus in corpora]
        found, pieces = ([], []), ([], [])
        for row in range(len(rows)):
            tokens, ids, loss_mask = rows[row]
            which = corpora.index(rows.pieces(row)[0])
            offsets = corpora[which].offsets
            assert tokens[ids == PADDING].eq(7).all() and not loss_mask[ids == PADDING].any()
            assert ids.max() >= 0
            for number in range(int(ids.max()) + 1):
                piece = tokens[ids == number]
                assert piece.equal(torch.arange(int(piece[0]), int(piece[0]) + len(piece)))
                bits = np.unpackbits(corpora[which].target_bits)[piece.numpy()]
                assert loss_mask[ids == number].tolist() == bits.tolist()
                document = np.searchsorted(offsets, int(piece[0]), side="right") - 1
                assert piece[-1] < offsets[document + 1]  # never across two documents
                pieces[which].append((document, len(piece)))
                found[which].extend(piece.tolist())
        for which, corpus in enumerate(corpora):
            kept = [i for i, n in enumerate(lengths[which]) if long_documents == "split" or n <= seq_len]
            expected = [t for i in kept for t in range(corpus.offsets[i], corpus.offsets[i + 1])]
            assert sorted(found[which]) == expected
            for document, length in pieces[which]:
                whole = lengths[which][document]
                assert length == min(whole, seq_len) or length == whole % seq_len  # full rows and a rest
        assert rows.n_tokens == sum(map(len, found))
        assert rows.n_dropped == (0 if long_documents == "split" else sum((n > seq_len).sum() for n in lengths))


def test_without_packing_a_row_is_a_document():
    rng = random.Random(1)
    corpus = random_corpus(rng, 20)
    rows = PackedRows([corpus], 20, packing=False)
    documents = [(a, b) for a, b in zip(corpus.offsets, corpus.offsets[1:]) if b > a]
    assert len(rows) == len(documents)
    for row, (start, end) in enumerate(documents):
        tokens, ids, _ = rows[row]
        length = min(end - start, 20)
        assert tokens[:length].tolist() == list(range(start, start + length))
        assert ids.tolist() == [0] * length + [PADDING] * (20 - length)


def take_times(times: np.ndarray, corpus: int, documents: np.ndarray) -> np.ndarray:
    return times[documents]


def has_target(rows: PackedRows, row: int) -> bool:
    _, ids, mask = rows[row]
    return bool((mask[1:].bool() & (ids[1:] == ids[:-1])).any())


@pytest.mark.parametrize("packing, long_documents", [(True, "split"), (True, "drop"), (False, "split")])
@pytest.mark.parametrize("source", ["chat", "gumiho"])
def test_rows_without_targets(source, packing, long_documents, monkeypatch):
    """Counted for any source, dropped for chats; nothing else changes. Documents may be taken several times."""
    monkeypatch.setattr("tidar.data.packing.CHUNK_DOCUMENTS", 17)
    monkeypatch.setattr("tidar.data.corpus.PIECE", 3)  # bytes of target bits that are read at one time
    rng = random.Random(2)
    seen = 0
    for _ in range(60):
        seq_len = rng.randint(1, 30)
        corpus = random_corpus(rng, seq_len)
        share = rng.choice([0.0, 0.02, 0.1, 0.9])
        bits = np.array([rng.random() < share for _ in corpus.tokens], bool)
        corpus.target_bits = None if share == 0.9 and rng.random() < 0.5 else np.packbits(bits)
        times = np.array([rng.choice([0, 1, 1, 3]) for _ in range(len(corpus))])
        options = dict(packing=packing, long_documents=long_documents, copies=partial(take_times, times))
        every = PackedRows([corpus], seq_len, **options)
        corpus.meta = {"source": source}
        rows = PackedRows([corpus], seq_len, **options)

        without = [row for row in range(len(every)) if not has_target(every, row)]
        kept = [row for row in range(len(every)) if source != "chat" or row not in without]
        assert every.n_without_targets == len(without) and every.n_rows_dropped == 0
        assert (rows.n_rows_dropped if source == "chat" else rows.n_without_targets) == len(without)
        assert [rows.pieces(row)[1] for row in range(len(rows))] == [every.pieces(row)[1] for row in kept]
        assert rows.n_tokens == sum(length for row in kept for _, length in every.pieces(row)[1])
        seen += len(without)
    assert seen > 200


def test_data_without_any_target_is_an_error(tmp_path):
    """Before a step: rows of truncated prompts, only long documents to drop, and no targets at all."""
    torch.save({"input_ids": torch.arange(40), "loss_mask": (torch.arange(40) > 30).long()}, tmp_path / "a.ckpt")
    torch.save({"input_ids": torch.arange(40), "loss_mask": torch.zeros(40)}, tmp_path / "none.ckpt")
    options = ["--data.source", "gumiho", "--validation.enable", "false", "--training.seq_len", "16", "--data.paths"]
    truncated = [*options, str(tmp_path / "a.ckpt"), "--data.packing", "false"]
    with pytest.raises(
        UserError, match="none of the 1 rows .* holds a token to predict; .* data.packing = true"
    ) as error:
        load(tmp_path / "a", *truncated)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="none of the 3 rows"):
        load(tmp_path / "b", *options, str(tmp_path / "none.ckpt"))
    with pytest.raises(UserError, match="drop: all 1 documents to train on are longer than training.seq_len = 16"):
        load(tmp_path / "c", *options, str(tmp_path / "a.ckpt"), "--data.long_documents", "drop")
    _, rows, _ = load(tmp_path / "d", *options, str(tmp_path / "a.ckpt"))
    assert len(rows) == 3 and rows.n_without_targets == 1
    validation = ["--validation.enable", "true", "--validation.paths", str(tmp_path / "none.ckpt")]
    with pytest.raises(UserError, match="none of the 3 rows held out"):
        load(tmp_path / "e", *options, str(tmp_path / "a.ckpt"), *validation)


def test_a_shuffle_is_a_permutation():
    for n in (1, 2, 3, 5, 64, 100, 1000):
        orders = [[shuffled(position, n, key) for position in range(n)] for key in ("a", "b")]
        assert all(sorted(order) == list(range(n)) for order in orders)
        if n > 10:
            fixed = [sum(i == j for i, j in enumerate(order)) for order in orders]
            assert orders[0] != orders[1] and max(fixed) < 10


def test_ranks_and_micro_batches_see_the_same_samples():
    """Steps of 12 samples from sample 8 on, over the ends of epochs of 31 rows."""
    expected = [sample for batch in take(TrainingOrder(31, 5, 0, 1, 0, 1), 140) for sample in batch]
    for epoch in range(4):
        assert sorted(expected[31 * epoch : 31 * (epoch + 1)]) == [(epoch, row) for row in range(31)]
    assert [row for _, row in expected[:31]] != [row for _, row in expected[31:62]]
    assert take(TrainingOrder(31, 6, 0, 1, 0, 1), 31) != [[sample] for sample in expected[:31]]
    for local_batch_size, world_size in ((12, 1), (3, 1), (6, 2), (2, 2), (1, 3), (4, 3)):
        micro_batches = 12 // (local_batch_size * world_size)
        ranks = [
            take(TrainingOrder(31, 5, 8, local_batch_size, rank, world_size), 10 * micro_batches)
            for rank in range(world_size)
        ]
        seen = [sample for micro_batch in zip(*ranks) for samples in micro_batch for sample in samples]
        assert seen == expected[8:128]


def take(order, n: int) -> list[list[tuple[int, int]]]:
    iterator = iter(order)
    return [next(iterator) for _ in range(n)]


def test_validation_sees_every_row_once():
    for n_rows, local_batch_size, world_size in ((10, 2, 2), (7, 3, 1), (3, 2, 3), (8, 2, 2)):
        ranks = [validation_order(n_rows, -1, local_batch_size, rank, world_size) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        samples = [sample for batches in ranks for batch in batches for sample in batch]
        assert all(epoch == 0 for epoch, _ in samples)
        assert sorted(row for _, row in samples if row >= 0) == list(range(n_rows))
        first = [validation_order(n_rows, 2, local_batch_size, rank, world_size) for rank in range(world_size)]
        assert [list(batches) for batches in first] == [list(batches)[:2] for batches in ranks]


def test_held_out_documents_are_a_share_fixed_by_the_seed():
    for n in (0, 1, 2, 3, 10, 1000, 12345):
        for share in (0.0, 0.001, 0.01, 0.3, 0.5):
            held_out = held_out_documents(n, share, seed=3)
            assert len(set(held_out.tolist())) == len(held_out)
            assert all(0 <= document < n for document in held_out)
            assert max(int(n * share), share > 0 and n > 1) * 0.6 <= len(held_out) <= max(int(n * share), 1)
            assert held_out.tolist() == held_out_documents(n, share, seed=3).tolist()
    assert held_out_documents(1000, 0.1, 3).tolist() != held_out_documents(1000, 0.1, 4).tolist()


def load(folder, *options: str):
    config = load_config(["--job.dump_folder", str(folder), *options])
    data = load_data(config, data_tokenizer(config.data, None))
    return data, *make_rows(config, data)


def documents_of(rows: PackedRows) -> list[int]:
    """First tokens of the pieces."""
    return sorted(start for row in range(len(rows)) for start, _ in rows.pieces(row)[1])


def test_python_source(tmp_path):
    data, training, held_out = load(tmp_path / "a", "--training.seq_len", "1000000")
    (corpus,) = data.training
    assert data.n_ids == 257 and corpus.tokens.max() == 256
    assert corpus.tokens[corpus.offsets[1:] - 1].min() == 256  # every document ends
    starts = documents_of(training) + documents_of(held_out)
    assert sorted(starts) == corpus.offsets[:-1].tolist()  # held out is what is not trained on
    assert len(documents_of(held_out)) == len(corpus) // 100
    again = load(tmp_path / "b", "--training.seq_len", "1000000")
    assert (again[0].training[0].tokens == corpus.tokens).all()
    other_seed = load(tmp_path / "a", "--training.seq_len", "1000000", "--training.seed", "1")
    assert documents_of(again[2]) == documents_of(held_out) != documents_of(other_seed[2])


def test_background_workers_change_nothing():
    rows = PackedRows([random_corpus(random.Random(3), 16)], 16)
    pattern = get_pattern("tidar", block_size=4, mask_token_id=0)
    order = [[(0, 0), (0, 1)], [(1, 2), (0, -1)]]
    state = torch.get_rng_state()
    loaders = [make_loader(rows, order, pattern, 0, workers, pin_memory=False) for workers in (0, 2)]
    for here, there in zip(*loaders):
        assert here.rows.input_ids.equal(there.rows.input_ids)
        assert here.rows.targets["ar"].index.equal(there.rows.targets["ar"].index)
    assert there.n_tokens == sum(length for _, length in rows.pieces(2)[1])
    assert torch.get_rng_state().equal(state)


def test_what_is_drawn_for_a_row_follows_seed_epoch_and_row():
    rows = PackedRows([random_corpus(random.Random(3), 16)], 16)
    pattern = get_pattern("tidar_random", block_size=4, mask_token_id=0)

    def laid_out(seed: int, *samples: tuple[int, int]) -> list[list[int]]:
        (batch,) = make_loader(rows, [list(samples)], pattern, seed, num_workers=0, pin_memory=False)
        return batch.rows.input_ids.tolist()

    first, second = laid_out(5, (3, 0), (3, 1))
    assert laid_out(5, (2, 7), (3, 1), (3, 0))[1:] == [second, first]
    assert len({str(laid_out(seed, (epoch, 0))) for seed in (5, 6) for epoch in range(4)}) > 4
