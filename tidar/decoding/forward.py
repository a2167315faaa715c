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
from tidar.decoding.lookup import look_up
from tidar.decoding.sampling import Sampling, choose
from tidar.models import CachedAttention, Decoder

MOST_SHAPES = 2**12  # compiled in a process: one for each batch, capacity and block size
PROJECTED = 256  # rows up to which reading the weight dominates the time of the output projection


@dataclass
class State:
    """The sequences of a batch, on the device. Forward passes update it in place.

    `lengths`: committed tokens `[batch]`. `draft`: the next tokens `[batch, block_size]`, the first one certain.
    `keys`: random keys `[batch]`. `active`: rows that hold a sequence; the others do not advance. `tokens`: the known
    ones, which are the committed ones and the first of the draft, `[batch, capacity + block_size]`: rows that have
    ended still write; kept for `Sampling.lookup` alone.
    """

    lengths: Tensor
    draft: Tensor
    keys: Tensor
    active: Tensor
    tokens: Tensor

    @staticmethod
    def empty(batch: int, block_size: int, capacity: int, device: torch.device) -> "State":
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        active = zeros(batch, dtype=torch.bool)
        return State(zeros(batch), zeros(batch, block_size), zeros(batch), active, zeros(batch, capacity + block_size))


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
        # for few rows the time is that of reading the weight: one matmul projects the draft and all groups
        self.projects_all = state.draft.device.type == "cuda" and len(state.draft) * self.block_size**2 <= PROJECTED
        # results of a step for the host: the draft that it verified, and how many of its tokens it committed
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
            logits = F.linear(hidden.gather(1, last), weight)
            logits = self._mixed(logits, hidden[:, padded : padded + 1], weight)
            token = choose(logits, self.sampling, new_keys, lengths[:, None])
            return torch.cat([token, F.linear(hidden[:, padded + 1 :], weight).argmax(dim=-1)], dim=1)

        attention = self.cache.for_prefill(at, padded, layout.mask)
        draft = self._run(tokens, layout, attention, head)
        if self.sampling.lookup:
            state.tokens[at, :padded] = tokens
            state.tokens[at, lengths] = draft[:, 0]
            draft = self._looked_up(state.tokens[at], lengths + 1, draft)
        state.draft[at] = draft
        state.lengths[at], state.keys[at], state.active[at] = lengths, new_keys, True

    def step(self) -> None:
        """Verifies the draft of each active row, commits what is accepted and drafts the next block."""
        if self.graph:
            self.graph.replay()
        else:
            self._step()

    @torch.no_grad()
    def _step(self) -> None:
        state = self.state
        layout = self._layout(state.lengths)
        attention = self.cache.for_step(layout.slots, layout.mask)
        accepted, draft = self._run(state.draft, layout, attention, self._verify)
        self.verified.copy_(state.draft)
        self.accepted.copy_(accepted)
        if self.sampling.lookup:
            in_block = torch.arange(self.block_size, device=draft.device)
            committed = state.lengths + accepted
            state.tokens.scatter_(1, state.lengths[:, None] + in_block, state.draft)
            state.tokens.scatter_(1, committed[:, None], draft[:, :1])
            draft = self._looked_up(state.tokens, committed + 1, draft)
        state.lengths += accepted * state.active
        state.draft.copy_(draft.where(state.active[:, None], state.draft))

    def _layout(self, lengths: Tensor) -> Layout:
        return step_layout(lengths, self.block_size, self.cache.capacity, self.masks)

    def _verify(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens of the draft are committed `[batch]`, and the next draft, from a step's hidden states."""
        state, block, sampling = self.state, self.block_size, self.sampling
        batch, _, dim = hidden.shape
        clean = hidden[:, :block]
        # of each group the masks after the first, whose token is certain: [batch, groups, block - 1, dim]
        masked = hidden[:, block:].view(batch, block if self.masks else 0, block, dim)[:, :, 1:]
        drafts = None
        if self.masks and self.projects_all:
            logits = F.linear(torch.cat([clean, masked.flatten(1, 2)], dim=1), weight)
            drafts = logits[:, block:].argmax(dim=-1).view(batch, block, block - 1)
            logits = logits[:, :block]
        else:
            logits = F.linear(clean, weight)
        positions = state.lengths[:, None] + torch.arange(1, block + 1, device=logits.device)
        chosen = choose(self._mixed(logits, hidden[:, block::block], weight), sampling, state.keys, positions)
        matches = state.draft[:, 1:] == chosen[:, :-1]
        accepted = 1 + matches.long().cumprod(dim=1).sum(dim=1)
        certain = chosen.gather(1, accepted[:, None] - 1)
        if not self.masks:
            return accepted, certain
        # the group after the accepted tokens
        group = (accepted - 1)[:, None, None]
        if drafts is not None:
            draft = drafts.gather(1, group.expand(-1, 1, block - 1))[:, 0]
        else:
            rows = masked.gather(1, group[..., None].expand(-1, 1, block - 1, dim))[:, 0]
            draft = F.linear(rows, weight).argmax(dim=-1)
        return accepted, torch.cat([certain, draft], dim=1)

    def _looked_up(self, tokens: Tensor, n_known: Tensor, draft: Tensor) -> Tensor:
        """A draft `[batch, block_size]`, replaced after its first token in the rows where `look_up` finds something."""
        found, following = look_up(tokens, n_known, self.sampling.lookup, self.block_size - 1)
        return torch.cat([draft[:, :1], following.where(found[:, None], draft[:, 1:])], dim=1)

    def _run(self, clean: Tensor, layout: Layout, attention: list[CachedAttention], head: Callable) -> Any:
        """One pass over clean tokens `[batch, n]` and the masks that the layout has after them."""
        masks = clean.new_full((len(clean), layout.slots.shape[1] - clean.shape[1]), self.mask_token_id)
        return self.model(torch.cat([clean, masks], dim=1), layout.position_ids, attention, head=head)

    def _mixed(self, logits: Tensor, first_masks: Tensor, weight: Tensor) -> Tensor:
        """The logits that decide tokens: the autoregressive ones, mixed with those of the mask at the same position."""
        mix = self.sampling.draft_mix
        return logits if mix == 1 else logits.lerp(F.linear(first_masks, weight), 1 - mix)

    def _capture(self) -> None:
        """No row is active yet, so the steps that warm up change nothing that counts."""
        with self._compiled():
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
    def _compiled(self):
        """Compiles the parts of a step for the forward passes inside the context. All layers share one graph.

        `_verify` stays as it is: a compiled arg-max takes four times as long, and the order of a draw's sums must not
        depend on the batch.
        """
        model = self.model
        parts: list[tuple[Any, str]] = [(layer, "forward") for layer in model.layers]
        parts += [(model, "embed"), (model.norm, "forward"), (self, "_layout")]
        for owner, name in parts:
            method = getattr(type(owner), name).__get__(owner)
            setattr(owner, name, torch.compile(method, fullgraph=True, dynamic=False))
        try:
            # dynamo's default limit is 8 compilations of a function; here each (batch, capacity) needs one
            with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=MOST_SHAPES):
                yield
        finally:
            for owner, name in parts:
                delattr(owner, name)
