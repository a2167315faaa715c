"""The mask of one row with its labels, and where parts, documents and blocks begin."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tidar.decoding.layout import step_layout
from tidar.patterns import Pattern

# what begins at a position
NOTHING, BLOCK, DOCUMENT, PART = range(4)


@dataclass
class RowMask:
    """`mask`: `[positions, positions]` bool. `parts`: name and length of each part of the row. `labels`: one per
    position: x, or M for the mask token, and the position in the document. `begins`: what begins at each position, one
    of NOTHING, BLOCK, DOCUMENT, PART. `title`: one line.
    """

    mask: Tensor
    parts: dict[str, int]
    labels: list[str]
    begins: list[int]
    title: str


def make_row_mask(pattern: Pattern, name: str, lengths: list[int], seed: int, mask_token_id: int) -> RowMask:
    """The mask of a row with documents of these lengths, whose tokens are 0.

    seed: of the row. mask_token_id: that of the pattern, not 0.
    """
    seq_len = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    rows = pattern.layout(torch.zeros_like(ids), ids, torch.ones(1, seq_len), [seed])
    mask = pattern.dense_mask(seq_len, ids, [seed])[0]
    position, is_masked = rows.position_ids[0].tolist(), (rows.input_ids[0] == mask_token_id).tolist()
    parts = pattern.parts(seq_len)
    begins = [NOTHING] * len(mask)
    # queries of one block see the same keys, or the pattern has no blocks here
    same = [True, *(mask[1:] == mask[:-1]).all(dim=1).tolist(), False]
    for at in range(1, len(mask)):
        if not same[at] and (same[at + 1] or (at > 1 and same[at - 1])):
            begins[at] = BLOCK
        if position[at] == 0:
            begins[at] = DOCUMENT
    for first in _starts(parts):
        begins[first] = PART
    allowed, pairs = int(mask.sum()), mask.numel()
    title = (
        f"{name}: {seq_len} tokens, {len(mask)} model positions, {allowed:,} of {pairs:,} pairs ({allowed / pairs:.0%})"
    )
    return RowMask(mask, parts, [f"{'M' if m else 'x'}{p}" for p, m in zip(position, is_masked)], begins, title)


def make_step_mask(block_size: int, committed: int) -> RowMask:
    """The mask of a decoding step after `committed` tokens, which are shown as queries too, as a prefill has them."""
    capacity = committed + block_size
    step = step_layout(torch.tensor([committed]), block_size, capacity, masks=True).mask.dense()[0, 0]
    mask = torch.ones(committed + len(step), step.shape[1], dtype=torch.bool).tril()
    mask[committed:] = step
    parts = {"committed": committed, "draft": block_size}
    parts |= {f"group {k}": block_size for k in range(1, block_size + 1)}
    positions = list(range(capacity))
    positions += [committed + k + j for k in range(1, block_size + 1) for j in range(block_size)]
    labels = [f"{'x' if at < capacity else 'M'}{position}" for at, position in enumerate(positions)]
    starts = _starts(parts)
    begins = [PART if at in starts else NOTHING for at in range(len(mask))]
    title = f"decoding step, blocks of {block_size}: {committed} committed tokens, {len(step)} query positions"
    return RowMask(mask, parts, labels, begins, title)


def _starts(parts: dict[str, int]) -> list[int]:
    return list(accumulate(parts.values(), initial=0))[:-1]
