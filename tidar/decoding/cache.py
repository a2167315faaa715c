"""Keys and values of all layers, preallocated, and what attention needs to read and write them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.kernels.selection import has_decode_attention
from tidar.models import (
    CachedAttention,
    DecoderConfig,
    FusedStepAttention,
    PrefillAttention,
    RangeMask,
    StepAttention,
)


@dataclass(frozen=True)
class KeyValueCache:
    """`layers`: keys and values of each, `[batch, n_kv_heads, capacity + scratch, head_dim]`."""

    layers: list[tuple[Tensor, Tensor]]
    capacity: int

    @staticmethod
    def allocate(
        config: DecoderConfig, batch: int, capacity: int, scratch: int, dtype: torch.dtype, device: torch.device
    ) -> "KeyValueCache":
        """capacity: positions of a sequence; scratch: slots for the masks of one forward pass."""
        shape = (batch, config.n_kv_heads, capacity + scratch, config.head_dim)
        layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.n_layers)
        ]
        return KeyValueCache(layers, capacity)

    def for_step(self, slots: Tensor, mask: RangeMask) -> list[CachedAttention]:
        """What each layer takes as its mask: FusedStepAttention where its kernels run, else StepAttention."""
        keys = self.layers[0][0]
        if has_decode_attention(keys.device, keys.dtype, keys.shape[-1]):
            (_, end), own = mask.ranges
            return [FusedStepAttention(*layer, slots, end, *own) for layer in self.layers]
        dense = mask.dense()
        return [StepAttention(*layer, slots, dense) for layer in self.layers]

    def for_prefill(self, rows: Tensor, length: int, mask: RangeMask) -> list[CachedAttention]:
        """See `PrefillAttention`. mask: of all queries, of which the first `length` are causal."""
        of_masks = mask.queries_from(length).dense()
        return [PrefillAttention(*layer, rows, length, of_masks) for layer in self.layers]
