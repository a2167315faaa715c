"""Layout of two halves: a clean copy of each row, then a noisy one, whose blocks are predicted by diffusion.

A noisy block sees all clean tokens before it, and itself both ways. Each pattern defines how tokens are corrupted and
what the clean half sees.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from tidar.patterns.base import Documents, MaskMod, ModelBatch, Targets, in_either
from tidar.patterns.blocks import BlockPattern, draw, row_seeds


@dataclass
class TwoHalves(BlockPattern):
    """diffusion_share: the noisy half holds at most this share of a row's tokens, rounded up to whole largest blocks.

    Below 1, m of a row's n blocks are drawn by its seed, each with the same probability; the others are not part of the
    model's input. m is the largest number of blocks that fit for every draw. The weights of the diffusion targets
    are multiplied by n / m, so the expectations of the weighted sums are the sums over all blocks. The rest of the
    noisy half is filled with positions that see only themselves and predict nothing.
    """

    diffusion_share: float = 1.0

    @abstractmethod
    def clean_end(self, documents: Documents) -> Tensor:
        """The token after the last one that each clean token sees, `[batch, seq_len]` int32."""

    @abstractmethod
    def corrupt(
        self, is_target: Tensor, block_start: Tensor, documents: Documents, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens that the noisy half masks, bool, and the factor of each one's weight, both `[batch, seq_len]`.

        is_target: bool. block_start: first token of each token's block, int32.
        """

    def parts(self, seq_len: int) -> dict[str, int]:
        return {"clean": seq_len, "noisy": self.noisy_positions(seq_len)}

    def noisy_positions(self, seq_len: int) -> int:
        blocks = ceil(self.diffusion_share * seq_len / self.block_size - 1e-9)
        return min(seq_len, blocks * self.block_size)

    def documents(self, document_ids: Tensor, seeds: Sequence[int] | None = None) -> Documents:
        documents = super().documents(document_ids, seeds)
        if self.noisy_positions(document_ids.shape[1]) < document_ids.shape[1]:
            seeds = row_seeds(seeds, len(document_ids))
            documents.blocks = documents.blocks or self.draw_blocks(seeds, document_ids.device)
            documents.blocks.tokens = self._draw_tokens(documents, seeds)
        return documents

    def _draw_tokens(self, documents: Documents, seeds: Sequence[int]) -> Tensor:
        """Tokens of the noisy half: those of the drawn blocks in the row's order, then -1."""
        tokens = documents.tokens
        room = self.noisy_positions(tokens.shape[1])
        is_first = self._bounds(documents)[0] == tokens
        drawn = []
        for number, seed in zip((is_first.cumsum(dim=1) - 1), seeds):
            lengths = torch.bincount(number)
            # as many blocks as fit if the longest are drawn: no block is drawn more often because it is short
            n_shown = int((lengths.sort(descending=True).values.cumsum(dim=0) <= room).sum())
            order = torch.randperm(len(lengths), generator=draw(seed, "share")).to(number.device)
            is_shown = torch.zeros_like(lengths, dtype=torch.bool)
            is_shown[order[:n_shown]] = True
            (kept,) = is_shown[number].nonzero(as_tuple=True)
            drawn.append(torch.cat([kept, kept.new_full((room - len(kept),), -1)]))
        return torch.stack(drawn).int()

    def _bounds(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """First token of each token's block and the one after its last, `[batch, seq_len]` int32."""
        return self.block_bounds(documents.start, documents.position, documents.end, documents.blocks)

    def layout(
        self, tokens: Tensor, document_ids: Tensor, loss_mask: Tensor, seeds: Sequence[int] | None = None
    ) -> ModelBatch:
        seq_len = tokens.shape[1]
        tokens = tokens.long()
        documents = self.documents(document_ids, seeds)
        position = documents.position.long()
        block_start, _ = self._bounds(documents)
        # no position predicts the first token of a document
        is_target = (loss_mask > 0) & (position > 0)
        is_masked, factor = self.corrupt(is_target, block_start, documents, row_seeds(seeds, len(tokens)))
        block_position = (documents.tokens - block_start).long()
        weights = loss_mask.float()

        blocks = documents.blocks
        shown = (documents.tokens if blocks is None or blocks.tokens is None else blocks.tokens).long()
        is_shown, shown = shown >= 0, shown.clamp(min=0)
        is_first = block_start == documents.tokens
        n_shown = (is_shown & is_first.gather(1, shown)).sum(dim=1, keepdim=True)
        inverse_probability = is_first.sum(dim=1, keepdim=True) / n_shown
        noisy = torch.where(is_masked, self.mask_token_id, tokens).gather(1, shown)  # type: ignore[arg-type]
        noisy = torch.where(is_shown, noisy, self.mask_token_id)  # type: ignore[arg-type]
        positions = seq_len + shown.shape[1]
        targets = {}
        if "ar" in self.losses:
            row, target = is_target.nonzero(as_tuple=True)
            at = row * positions + target - 1
            targets["ar"] = Targets(at, tokens[row, target], weights[row, target], block_position[row, target])
        row, slot = (is_shown & (is_target & is_masked).gather(1, shown)).nonzero(as_tuple=True)
        target = shown[row, slot]
        block_position = block_position[row, target]
        weights = (weights * factor * inverse_probability)[row, target] * self.place_weight(block_position)
        at = row * positions + seq_len + slot
        targets["diffusion"] = Targets(at, tokens[row, target], weights, block_position)
        return ModelBatch(
            input_ids=torch.cat([tokens, noisy], dim=1),
            position_ids=torch.cat([position, torch.where(is_shown, position.gather(1, shown), 0)], dim=1),
            documents=documents,
            targets=targets,
        )

    def mask_mod(self, documents: Documents) -> MaskMod:
        seq_len = documents.index.shape[1]
        start, none = documents.start, torch.zeros_like(documents.index)
        block_start, block_end = self._bounds(documents)
        # the noisy copy of each token sees the clean tokens of its document before its block, and its noisy block
        noisy = [start, block_start, block_start + seq_len, block_end + seq_len]
        if documents.blocks is not None and documents.blocks.tokens is not None:
            noisy = _bounds_of_shown(documents.blocks.tokens, seq_len, *noisy)
        clean_start, clean_end, noisy_start, noisy_end = (
            torch.cat(halves, dim=1) for halves in zip((start, self.clean_end(documents), none, none), noisy)
        )
        return in_either((clean_start, clean_end), (noisy_start, noisy_end))


def _bounds_of_shown(
    shown: Tensor, seq_len: int, start: Tensor, end: Tensor, first: Tensor, after: Tensor
) -> list[Tensor]:
    """Bounds of the keys that the noisy positions see, given those of the noisy copies of all tokens.

    shown: the token of each noisy position, -1 for none. start, end: of clean keys; first, after: of noisy keys.
    """
    slot = torch.arange(seq_len, seq_len + shown.shape[1], dtype=torch.int32, device=shown.device)
    is_shown, token = shown >= 0, shown.clamp(min=0).long()
    start, end, first, after = (bound.gather(1, token) for bound in (start, end, first, after))
    # the tokens of a block are contiguous here, too
    moved = slot - (token.int() + seq_len)
    return [
        torch.where(is_shown, start, 0),
        torch.where(is_shown, end, 0),
        torch.where(is_shown, first + moved, slot),
        torch.where(is_shown, after + moved, slot + 1),
    ]


def mask_at_random(
    is_target: Tensor, block_start: Tensor, documents: Documents, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Masks l of the n targets of each block, l drawn uniformly from 1 to n; their weights are multiplied by n / l.

    This is the linear schedule (each token is masked with probability t, drawn from 0 to 1, and weighs 1 / t), but
    draws the number of masked tokens instead of t: the same bound in expectation, with less variance (LLaDA, arXiv
    2502.09992, evaluates likelihoods so). The weights of a block add up to n for every draw. Tokens that are not
    targets stay unmasked. Arguments and results are those of `TwoHalves.corrupt`.
    """
    batch, seq_len = is_target.shape
    draws = torch.stack([torch.rand(2, seq_len, generator=draw(seed, "noise"), dtype=torch.double) for seed in seeds])
    draws = draws.to(is_target.device)
    block = (block_start + torch.arange(batch, device=is_target.device)[:, None] * seq_len).long()
    targets = torch.zeros(batch * seq_len, dtype=torch.long, device=is_target.device)
    targets = targets.index_add(0, block.flatten(), is_target.long().flatten())[block]
    # a block's number of masked tokens comes from the draw of its first token
    masked = 1 + (draws[:, 0].flatten()[block] * targets).long().clamp(max=targets - 1)
    # rank of each target among those of its block, by a second draw
    order = torch.argsort(torch.where(is_target, draws[:, 1], 2.0), dim=1, stable=True)
    by_block = order.gather(1, torch.argsort(block.gather(1, order), dim=1, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(1, by_block, torch.arange(seq_len, device=order.device).expand_as(order))
    rank = rank - block_start
    return is_target & (rank < masked), targets / masked.clamp(min=1)
