"""Tokenised documents and the vocabulary that they are written in."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Vocabulary:
    """size: number of token ids, all of them below it. padding_token_id: fills short rows."""

    size: int
    padding_token_id: int


@dataclass
class Corpus:
    """Documents end to end.

    tokens: `[tokens]`, any integer dtype. offsets: `[documents + 1]` int64, where each document starts and the
    last ends. loss_mask: `[tokens]`, weight of each token as a target; None: every token counts.
    """

    tokens: Tensor
    offsets: Tensor
    loss_mask: Tensor | None = None
