"""Drafts from the text itself: what followed the last tokens where they occurred before."""

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST = 8  # tokens of a copy that are compared


def look_up(tokens: Tensor, n_known: Tensor, shortest: int, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that followed the longest earlier copy of the last tokens of each row; the newest of equal ones.

    tokens: `[batch, capacity]` int64, of which the first `n_known` `[batch]` of a row are known. shortest: tokens that
    a copy has at least, from 1 to LONGEST; longer ones than LONGEST count as equal. Returns whether there is a copy
    `[batch]`, and the `count` tokens after it `[batch, count]`. Where those reach beyond what is known, they continue
    as if the text repeated itself from the copy on.
    """
    (_, capacity), device = tokens.shape, tokens.device
    last = n_known[:, None] - 1
    # index by index backwards from the end: of the known tokens `[batch, LONGEST]`, and of a copy that ends anywhere
    key = tokens.gather(1, (last - torch.arange(LONGEST, device=device)).clamp(min=0))
    copies = F.pad(tokens, (LONGEST - 1, 0), value=-1).unfold(1, LONGEST, 1).flip(-1)
    lengths = (copies == key[:, None]).cumprod(dim=-1, dtype=torch.uint8).sum(dim=-1)
    ends = torch.arange(capacity, device=device)
    lengths = lengths.where((lengths >= shortest) & (ends < last), 0)
    best = (lengths * capacity + ends).argmax(dim=1, keepdim=True)
    ahead = torch.arange(count, device=device) % (last - best).clamp(min=1)
    return lengths.gather(1, best)[:, 0] > 0, tokens.gather(1, (best + 1 + ahead).clamp(max=capacity - 1))
