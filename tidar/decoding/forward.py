"""The two forward passes of decoding, prefill and step: static shapes, and on CUDA a graph for the step."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.decoding.cache import KeyValueCache
from tidar.decoding.layout import Layout, prefill_layout, step_layout
from tidar.decoding.sampling import Sampling, choose
from tidar.kernels.selection import has_decode_attention
from tidar.models import CachedAttention, Decoder, KeyEnds, RangeMask


@dataclass
class State:
    """The sequences of a batch, on the device. Forward passes update it in place.

    `lengths`: committed tokens `[batch]`. `draft`: the next tokens `[batch, block_size]`, the first one certain.
    `keys`: random keys `[batch]`. `active`: rows that hold a sequence; the others do not advance.
    """

    lengths: Tensor
    draft: Tensor
    keys: Tensor
    active: Tensor

    @staticmethod
    def empty(batch: int, block_size: int, device: torch.device) -> "State":
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return State(zeros(batch), zeros(batch, block_size), zeros(batch), zeros(batch, dtype=torch.bool))


class Forward:
    """Prefill and step of one model with one cache and one way of choosing tokens.

    masks: whether groups of mask tokens draft the next block; without them this is plain autoregressive decoding, in
    blocks of one token. graph: capture the step in a CUDA graph, with compiled layers.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KeyValueCache,
        state: State,
        mask_token_id: int,
        masks: bool,
        sampling: Sampling,
        graph: bool = False,
    ):
        self.model, self.cache, self.state = model, cache, state
        self.mask_token_id, self.masks, self.sampling = mask_token_id, masks, sampling
        self.block_size = state.draft.shape[1]
        # what a step leaves for the host: the draft that it verified, and how many of its tokens it committed
        self.verified, self.accepted = torch.zeros_like(state.draft), torch.zeros_like(state.lengths)
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._capture()

    @torch.no_grad()
    def prefill(self, rows: list[int], prompts: list[list[int]], keys: list[int], padded: int) -> None:
        """Puts prompts into rows of the batch: fills the cache, chooses each first token and drafts each first block.

        keys: see `prompt_key`. padded: number of tokens that each prompt is padded to, so that few shapes occur.
        """
        state, device = self.state, self.state.lengths.device
        tokens = torch.tensor(
            [prompt + [self.mask_token_id] * (padded - len(prompt)) for prompt in prompts], device=device
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        at, new_keys = torch.tensor(rows, device=device), torch.tensor(keys, device=device)
        layout = prefill_layout(lengths, padded, self.block_size, self.masks)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
            logits = self._logits(hidden.gather(1, last), hidden[:, padded : padded + 1], weight)
            token = choose(logits, self.sampling, new_keys, lengths[:, None])
            return torch.cat([token, F.linear(hidden[:, padded + 1 :], weight).argmax(dim=-1)], dim=1)

        attention = self.cache.for_prefill(
            at, padded, layout.mask.block_mask() if device.type == "cuda" else layout.mask.dense()
        )
        state.draft[at] = self._run(tokens, layout, attention, head)
        state.lengths[at], state.keys[at], state.active[at] = lengths, new_keys, True

    def step(self) -> None:
        """Verifies the draft of each active row, commits what is accepted and drafts the next block."""
        if self.graph:
            self.graph.replay()
        else:
            self._step()

    @torch.no_grad()
    def _step(self) -> None:
        state, block = self.state, self.block_size
        layout = step_layout(state.lengths, block, self.cache.capacity, self.masks)

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._logits(hidden[:, :block], hidden[:, block::block], weight)
            positions = state.lengths[:, None] + torch.arange(1, block + 1, device=logits.device)
            chosen = choose(logits, self.sampling, state.keys, positions)
            matches = state.draft[:, 1:] == chosen[:, :-1]
            accepted = 1 + matches.long().cumprod(dim=1).sum(dim=1)
            certain = chosen.gather(1, accepted[:, None] - 1)
            if not self.masks:
                return accepted, certain
            # the masks after the first of the group that stands behind the accepted tokens
            rows = accepted[:, None] * block + torch.arange(1, block, device=logits.device)
            masked = hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))
            return accepted, torch.cat([certain, F.linear(masked, weight).argmax(dim=-1)], dim=1)

        attention = self.cache.for_step(layout.slots, self._step_mask(layout.mask))
        accepted, draft = self._run(state.draft, layout, attention, head)
        self.verified.copy_(state.draft)
        self.accepted.copy_(accepted)
        state.lengths += accepted * state.active
        state.draft.copy_(draft.where(state.active[:, None], state.draft))

    def _run(self, clean: Tensor, layout: Layout, attention: list[CachedAttention], head: Callable) -> Any:
        """One pass over clean tokens `[batch, n]` and as many masks as the layout has behind them."""
        masks = clean.new_full((len(clean), layout.slots.shape[1] - clean.shape[1]), self.mask_token_id)
        return self.model(torch.cat([clean, masks], dim=1), layout.position_ids, attention, head=head)

    def _step_mask(self, mask: RangeMask) -> Tensor | KeyEnds:
        if not has_decode_attention(mask.device, self.cache.layers[0][0].dtype, self.model.config.head_dim):
            return mask.dense()
        (_, end), (own_start, own_end) = mask.ranges
        return KeyEnds(end, own_start, own_end)

    def _logits(self, clean: Tensor, first_masks: Tensor, weight: Tensor) -> Tensor:
        """Logits that decide tokens: the autoregressive ones, mixed with those of the mask at the same position."""
        logits, mix = F.linear(clean, weight), self.sampling.draft_mix
        return logits if mix == 1 else logits.lerp(F.linear(first_masks, weight), 1 - mix)

    def _capture(self) -> None:
        """No row is active yet, so the steps that warm up change nothing that counts."""
        with compiled_layers(self.model):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()


@contextmanager
def compiled_layers(model: Decoder):
    """Compiles the decoder's layers, which share one compiled graph, for the forward passes inside the context."""
    for layer in model.layers:
        layer.forward = torch.compile(type(layer).forward.__get__(layer), fullgraph=True, dynamic=False)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward
