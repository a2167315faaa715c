"""Documents packed into rows of seq_len tokens."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tidar.data.corpus import Corpus
from tidar.patterns import PADDING

EMPTY_ROW = -1
# best-fit packing runs on this many documents at a time, which bounds the memory of a row's index
CHUNK_DOCUMENTS = 2**20

Row = tuple[Tensor, Tensor, Tensor]  # tokens, document ids, loss mask, each [seq_len]
Copies = Callable[[int, np.ndarray], np.ndarray]


@dataclass
class Packed:
    """Rows of one chunk of a corpus: first those that a long document fills, then those of packed pieces.

    first_row: its number in all rows. first_document: the chunk's first in the corpus. long_documents, long_ends:
    documents longer than a row, and the cumulative number of rows that they fill. kept_long: indices of these rows that
    are kept; None: all. pieces: documents of the packed rows, in order, counted from `first_document`. ends: where each
    packed row ends in `pieces`.
    """

    corpus: Corpus
    first_row: int
    first_document: int
    long_documents: np.ndarray
    long_ends: np.ndarray
    pieces: np.ndarray
    ends: np.ndarray
    kept_long: np.ndarray | None = None

    @property
    def n_long_rows(self) -> int:
        if self.kept_long is not None:
            return len(self.kept_long)
        return int(self.long_ends[-1]) if len(self.long_ends) else 0


class PackedRows(Dataset[Row]):
    """Rows of corpora. A row is a sample, and its number the sample's id.

    Documents that fit are kept whole and packed together, by best fit, longest first. A longer one is split into full
    rows and a rest ("split"), or dropped ("drop"); a piece of a document is a document of its own: nothing predicts
    its first token. Without packing every document is a row, truncated. Row EMPTY_ROW is padding.

    A row without a target predicts nothing. Such rows of chats are dropped; others are kept.
    n_without_targets: rows without a target that are kept. n_rows_dropped: those that are dropped.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        seq_len: int,
        padding_token_id: int = 0,
        packing: bool = True,
        long_documents: str = "split",
        copies: Copies | None = None,
    ):
        """copies: how often each document is taken: (number of the corpus, numbers of documents `[n]`) -> `[n]`."""
        self.seq_len = seq_len
        self.padding_token_id = padding_token_id
        self.packing = packing
        self.chunks: list[Packed] = []
        self.n_rows = self.n_documents = self.n_tokens = self.n_long = self.n_dropped = self.n_truncated_tokens = 0
        self.n_without_targets = self.n_rows_dropped = 0
        for number, corpus in enumerate(corpora):
            for first in range(0, len(corpus), CHUNK_DOCUMENTS):
                lengths = np.diff(corpus.offsets[first : first + CHUNK_DOCUMENTS + 1])
                documents = np.flatnonzero(lengths)
                if copies:
                    documents = np.repeat(documents, copies(number, first + documents))
                self._add(corpus, first, documents, lengths[documents], long_documents)
        self.first_rows = [chunk.first_row for chunk in self.chunks]

    def _add(self, corpus: Corpus, first: int, documents: np.ndarray, lengths: np.ndarray, long_documents: str) -> None:
        is_long = lengths > self.seq_len
        if self.packing and long_documents == "drop":
            self.n_dropped += int(is_long.sum())
            documents, lengths = documents[~is_long], lengths[~is_long]
            is_long = np.zeros(len(documents), bool)
        self.n_documents += len(documents)
        self.n_long += int(is_long.sum())
        if self.packing:
            full_rows = np.where(is_long, lengths // self.seq_len, 0)
            rests = lengths - full_rows * self.seq_len
            self.n_tokens += int(lengths.sum())
            with_rest = np.flatnonzero(rests)
            rows = best_fit(rests[with_rest], self.seq_len)
            # by row and, inside it, in the corpus' order
            order = np.sort(rows << 32 | documents[with_rest])
            pieces, ends = order & 0xFFFFFFFF, np.cumsum(np.bincount(rows))
            long, long_ends = documents[is_long], np.cumsum(full_rows[is_long])
        else:
            pieces, ends = documents, np.arange(1, len(documents) + 1)
            long, long_ends = documents[:0], documents[:0]
            kept = np.minimum(lengths, self.seq_len)
            self.n_tokens += int(kept.sum())
            self.n_truncated_tokens += int((lengths - kept).sum())
        chunk = Packed(
            corpus,
            self.n_rows,
            first,
            long.astype(np.uint32),
            long_ends,
            pieces.astype(np.uint32),
            ends.astype(np.uint32),
        )
        self._drop_rows_without_targets(chunk)
        self.chunks.append(chunk)
        self.n_rows += chunk.n_long_rows + len(chunk.ends)

    def _drop_rows_without_targets(self, chunk: Packed) -> None:
        """Drops a chat's rows without a target from a chunk that is not added yet; counts those of others."""
        long, packed = self._rows_with_targets(chunk)
        n_without = int((~long).sum() + (~packed).sum())
        if not n_without or not chunk.corpus.is_chat:
            self.n_without_targets += n_without
            return
        self.n_rows_dropped += n_without
        sizes: np.ndarray = np.diff(chunk.ends.astype(np.int64), prepend=0)
        starts, ends = self._bounds(chunk, chunk.pieces[np.repeat(~packed, sizes)])
        self.n_tokens -= int((ends - starts).sum() + (~long).sum() * self.seq_len)
        chunk.pieces = chunk.pieces[np.repeat(packed, sizes)]
        chunk.ends = np.cumsum(sizes[packed]).astype(np.uint32)
        chunk.kept_long = np.flatnonzero(long).astype(np.uint32)

    def _rows_with_targets(self, chunk: Packed) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row of a chunk holds a target: of those that long documents fill, and of the packed ones."""
        corpus = chunk.corpus
        # a document that is taken several times has its rows several times
        n_rows = np.diff(chunk.long_ends, prepend=0)
        numbers = np.arange(n_rows.sum()) - np.repeat(chunk.long_ends - n_rows, n_rows)
        starts = np.repeat(corpus.offsets[chunk.first_document + chunk.long_documents.astype(np.int64)], n_rows)
        unique, inverse = np.unique(starts + numbers * self.seq_len, return_inverse=True)
        long = corpus.have_targets(unique, unique + self.seq_len)[inverse]
        # by document
        has_target = np.zeros(CHUNK_DOCUMENTS, bool)
        has_target[chunk.pieces] = True
        documents = np.flatnonzero(has_target)
        has_target[documents] = corpus.have_targets(*self._bounds(chunk, documents))
        begins = np.concatenate([[0], chunk.ends[:-1]]).astype(np.int64)
        packed = np.logical_or.reduceat(has_target[chunk.pieces], begins) if len(chunk.ends) else np.zeros(0, bool)
        return long, packed

    def _bounds(self, chunk: Packed, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where pieces of packed rows lie in the corpus: the first token of each and the one after its last."""
        documents = chunk.first_document + pieces.astype(np.int64)
        starts, ends = chunk.corpus.offsets[documents], chunk.corpus.offsets[documents + 1]
        if not self.packing:
            return starts, np.minimum(ends, starts + self.seq_len)
        lengths = ends - starts
        # of a long document the rest
        return np.where(lengths > self.seq_len, ends - lengths % self.seq_len, starts), ends

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> Row:
        tokens = torch.full((self.seq_len,), self.padding_token_id)
        document_ids = torch.full((self.seq_len,), PADDING)
        loss_mask = torch.zeros(self.seq_len)
        filled = 0
        corpus: Any
        corpus, pieces = (None, []) if row == EMPTY_ROW else self.pieces(row)
        for number, (start, length) in enumerate(pieces):
            span = slice(filled, filled + length)
            tokens[span], loss_mask[span] = corpus.read(start, length)
            document_ids[span] = number
            filled += length
        return tokens, document_ids, loss_mask

    def pieces(self, row: int) -> tuple[Corpus, list[tuple[int, int]]]:
        """The corpus of a row, and where its pieces lie there: (first token, length)."""
        chunk, seq_len = self.chunks[bisect_right(self.first_rows, row) - 1], self.seq_len
        row -= chunk.first_row
        if row < chunk.n_long_rows:
            row = row if chunk.kept_long is None else int(chunk.kept_long[row])
            number = int(np.searchsorted(chunk.long_ends, row, side="right"))
            part = row - (int(chunk.long_ends[number - 1]) if number else 0)
            document = chunk.first_document + int(chunk.long_documents[number])
            return chunk.corpus, [(int(chunk.corpus.offsets[document]) + part * seq_len, seq_len)]
        row -= chunk.n_long_rows
        begin = int(chunk.ends[row - 1]) if row else 0
        starts, ends = self._bounds(chunk, chunk.pieces[begin : int(chunk.ends[row])])
        return chunk.corpus, list(zip(starts.tolist(), (ends - starts).tolist()))


def best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece: longest first, each to the row with the least space that still takes it.

    lengths: `[pieces]`, 1 to seq_len. Returns `[pieces]` int64. Pieces of equal length are assigned in one step: the
    work grows with the number of distinct lengths, not of pieces.
    """
    order = np.sort((seq_len - lengths).astype(np.int64) << 32 | np.arange(len(lengths))) & 0xFFFFFFFF
    counts = np.bincount(lengths, minlength=seq_len + 1).tolist()
    rows = np.empty(len(lengths), np.int64)
    n_rows = placed = 0
    spaces: list[int] = []  # of the open rows, ascending
    open_rows: dict[int, list[tuple[int, int]]] = {}  # by their space, runs of them: first row, number of rows

    def put(length: int, each: int, first: int, n: int, space: int) -> None:
        """`each` pieces into each of `n` rows, which have `space`."""
        nonlocal placed
        rows[order[placed : placed + n * each]] = np.repeat(np.arange(first, first + n), each)
        placed += n * each
        keep(first, n, space - each * length)

    def keep(first: int, n: int, space: int) -> None:
        if n and space:
            if space not in open_rows:
                open_rows[space] = []
                insort(spaces, space)
            open_rows[space].append((first, n))

    for length in range(seq_len, 0, -1):
        left = counts[length]
        while left:
            at = bisect_left(spaces, length)
            if at == len(spaces):
                space, each = seq_len, seq_len // length
                first, n = n_rows, -(-left // each)
                n_rows += n
            else:
                space, each = spaces[at], spaces[at] // length
                first, n = open_rows[space].pop()
                if not open_rows[space]:
                    del open_rows[space], spaces[at]
            # a row that has just taken one has the least space, and takes the next
            full = min(n, left // each)
            if full:
                put(length, each, first, full, space)
                left -= full * each
            if full < n and left:
                put(length, left, first + full, 1, space)
                left, full = 0, full + 1
            keep(first + full, n - full, space)
    return rows
