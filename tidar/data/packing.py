"""Documents packed into rows of seq_len tokens."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tidar.data.corpus import Corpus
from tidar.patterns import PADDING

EMPTY_ROW = -1

Row = tuple[Tensor, Tensor, Tensor]  # tokens, document ids, loss mask, each [seq_len]


class PackedRows(Dataset[Row]):
    """Rows of a corpus. A row is a sample, and its number the sample's id.

    A document longer than a row is cut into full rows and a rest; rests and short documents are packed together, kept
    whole. A piece of a document is a document of its own: nothing predicts its first token. Row EMPTY_ROW is padding.
    """

    def __init__(self, corpus: Corpus, seq_len: int, padding_token_id: int):
        self.corpus = corpus
        self.seq_len = seq_len
        self.padding_token_id = padding_token_id
        self.rows = pack(corpus.offsets, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        tokens = torch.full((self.seq_len,), self.padding_token_id)
        document_ids = torch.full((self.seq_len,), PADDING)
        loss_mask = torch.zeros(self.seq_len)
        filled = 0
        for number, (start, length) in enumerate(() if row == EMPTY_ROW else self.rows[row]):
            piece = slice(filled, filled + length)
            tokens[piece] = self.corpus.tokens[start : start + length]
            document_ids[piece] = number
            loss_mask[piece] = 1 if self.corpus.loss_mask is None else self.corpus.loss_mask[start : start + length]
            filled += length
        return tokens, document_ids, loss_mask


def pack(offsets: Tensor, seq_len: int) -> list[list[tuple[int, int]]]:
    """Rows of (first token, length), by best fit, longest first: each rest goes to the row that it fills most.

    offsets: `[documents + 1]`, where documents start and end.
    """
    rows, rests = [], []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        full_rows = (end - start) // seq_len
        rows += [[(start + i * seq_len, seq_len)] for i in range(full_rows)]
        if (end - start) % seq_len:
            rests.append((start + full_rows * seq_len, (end - start) % seq_len))
    open_rows: list[list[list]] = [[] for _ in range(seq_len + 1)]  # by the space that is left
    for start, length in sorted(rests, key=lambda rest: -rest[1]):
        space = next((space for space in range(length, seq_len + 1) if open_rows[space]), None)
        if space is None:
            rows.append([])
            space = seq_len
            open_rows[space].append(rows[-1])
        row = open_rows[space].pop()
        row.append((start, length))
        open_rows[space - length].append(row)
    return rows
