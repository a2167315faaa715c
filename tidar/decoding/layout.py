"""Who sees whom in one forward pass of decoding: the positions, cache slots and mask of its queries.

Queries come in two kinds. The *clean* ones are the prompt (prefill) or the draft (step). After them come *groups* of
`block_size` mask tokens. A group sees the clean tokens before its first position, and itself both ways, like a masked
block in training.

In a step, keys are the slots of the cache: slot p below `capacity` holds position p, and the slots after them hold the
masks of the current step only. In a prefill, keys are the queries themselves, as if the capacity were the padded
length.
A step with blocks of 2 and L committed tokens (rows are queries):

              committed    draft   group 1  group 2
    draft 1   ■ ■ ■ … ■    ■ ·     · ·      · ·
    draft 2   ■ ■ ■ … ■    ■ ■     · ·      · ·
    group 1   ■ ■ ■ … ■    ■ ·     ■ ■      · ·        if draft 1 alone is accepted, this group drafts the next block
              ■ ■ ■ … ■    ■ ·     ■ ■      · ·
    group 2   ■ ■ ■ … ■    ■ ■     · ·      ■ ■        if both are accepted, this one
              ■ ■ ■ … ■    ■ ■     · ·      ■ ■
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.models import RangeMask


@dataclass(frozen=True)
class Layout:
    """`position_ids`; `slots`, where the key and value of each query are stored: both `[batch, queries]` int64.

    `mask`: over queries and slots.
    """

    position_ids: Tensor
    slots: Tensor
    mask: RangeMask


def step_layout(lengths: Tensor, block_size: int, capacity: int, masks: bool) -> Layout:
    """A step: the draft, then a group for each number of accepted tokens.

    lengths: committed tokens `[batch]`. masks: False for autoregressive decoding, without groups.
    """
    starts = lengths[:, None] + torch.arange(1, block_size + 1 if masks else 1, device=lengths.device)
    return _layout(lengths, block_size, starts, block_size, capacity)


def prefill_layout(lengths: Tensor, padded: int, block_size: int, masks: bool) -> Layout:
    """A prefill: `padded` prompt tokens, of which the first `lengths` `[batch]` count, then one group.

    The cache entries of the padding lie after the prompt: nothing sees them before a step overwrites them.
    """
    starts = lengths[:, None] if masks else lengths[:, None][:, :0]
    return _layout(torch.zeros_like(lengths), padded, starts, block_size, padded)


def _layout(first: Tensor, n_clean: int, group_starts: Tensor, block_size: int, capacity: int) -> Layout:
    """n_clean queries from position `first` on `[batch]`; a group at each of `group_starts` `[batch, groups]`."""
    batch, groups = group_starts.shape
    device = first.device
    clean = first[:, None] + torch.arange(n_clean, device=device)
    in_block = torch.arange(block_size, device=device)
    masked = (group_starts[:, :, None] + in_block).flatten(1)
    # of each query: clean tokens that it sees, and the scratch slots of its group
    seen = torch.cat([clean + 1, group_starts.repeat_interleave(block_size, dim=1)], dim=1).int()
    scratch = torch.arange(groups * block_size, device=device).expand(batch, -1) + capacity
    group_first = scratch - scratch.sub(capacity) % block_size
    none = torch.zeros_like(clean)
    own_first = torch.cat([none, group_first], dim=1).int()
    own_end = torch.cat([none, group_first + block_size], dim=1).int()
    return Layout(
        position_ids=torch.cat([clean, masked], dim=1),
        slots=torch.cat([clean, scratch], dim=1),
        mask=RangeMask([(torch.zeros_like(seen), seen), (own_first, own_end)], capacity + groups * block_size),
    )
