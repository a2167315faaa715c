"""Scores of held-out rows: the losses, and the quality of the drafts by position in the block."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from tidar.data import Batch
from tidar.losses.objective import Objective, TokenScores
from tidar.losses.sums import LossSums
from tidar.models import Decoder, MaskBuilder
from tidar.patterns import LOSSES, ModelBatch, Pattern, Share, Targets


@torch.no_grad()
def validate(
    batches: Iterable[Batch],
    score: Callable[[ModelBatch], dict[str, TokenScores]],
    block_size: int,
    loss_weights: dict[str, float],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    loss_group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The `val/` scalars over the batches of all ranks, each of which must have equally many.

    score: the model's scores of one batch on `device`. group: the ranks that share each row, where rows are shared.
    loss_group: ranks that together have all targets once (default: all ranks).
    """
    sums = LossSums.zeros(device)
    by_position = torch.zeros(3, block_size, dtype=torch.float64, device=device)  # weight, nll, correct arg-maxes
    prefixes = torch.zeros(2, dtype=torch.float64, device=device)  # full blocks, sum of their accepted prefixes
    for batch in batches:
        rows = batch.to(device).rows
        scores = score(rows)
        sums += LossSums.of(rows.targets, scores)
        if "diffusion" not in rows.targets:
            continue
        targets, drafts = rows.targets["diffusion"], scores["diffusion"]
        scored = torch.stack([torch.ones_like(drafts.nll), drafts.nll, drafts.correct]).double()
        by_position.index_add_(1, targets.block_position, scored * targets.weights)
        correct = drafts.correct
        if rows.share is not None:
            assert group
            targets, correct = _of_whole_rows(targets, correct, rows.share, group)
        accepted = accepted_prefixes(targets, correct, block_size)
        prefixes += torch.stack([accepted.new_tensor(len(accepted)), accepted.sum()])
    sums.all_reduce(loss_group)
    for total in (by_position, prefixes):
        dist.all_reduce(total, group=loss_group)
    scalars = sums.means(loss_weights)
    full_blocks, accepted_tokens = prefixes.tolist()
    if full_blocks:
        scalars["accepted_prefix"] = accepted_tokens / full_blocks
    for position, (weight, nll, correct) in enumerate(by_position.T.tolist()):
        if weight:
            scalars[f"diffusion_loss_at/{position}"] = nll / weight
            scalars[f"accuracy_diff_at/{position}"] = correct / weight
    return {f"val/{name}": value for name, value in scalars.items()}


def _of_whole_rows(targets: Targets, correct: Tensor, share: Share, group: dist.ProcessGroup) -> tuple[Targets, Tensor]:
    """The targets of whole rows and which are correct, on the first rank of the group; none on the others.

    Ranks may have parts of a block.
    """
    batch, n_positions = share.positions.shape
    row = targets.index // n_positions
    at = row * share.length + share.positions.flatten()[targets.index]
    whole = torch.zeros(2, batch * share.length, dtype=torch.long, device=correct.device)
    whole[:, at] = torch.stack([targets.block_position + 1, correct.long()])
    dist.all_reduce(whole, group=group)
    index = whole[0].nonzero()[:, 0] if dist.get_rank(group) == 0 else at[:0]
    position, correct = whole[:, index]
    return Targets(index, index, index, position - 1), correct.bool()


def scorer(
    model: Decoder, pattern: Pattern, loss_weights: dict[str, float], chunk_size: int
) -> Callable[[ModelBatch], dict[str, TokenScores]]:
    """The `score` of `validate` for a whole model on one device. chunk_size: see `Objective`."""
    device = model.output_weight().device
    objective = Objective(loss_weights, chunk_size)
    build_mask = MaskBuilder(pattern, "flex" if device.type == "cuda" else "sdpa")
    ones = dict.fromkeys(LOSSES, torch.ones((), device=device))

    def score(rows: ModelBatch) -> dict[str, TokenScores]:
        return model(
            rows.input_ids,
            rows.position_ids,
            build_mask(rows.documents).attention,
            head=lambda hidden, weight: objective(hidden, weight, rows.targets, ones)[1],
        )

    return score


def accepted_prefixes(targets: Targets, correct: Tensor, block_size: int) -> Tensor:
    """Length of the run of correct drafts at the start of each full block, `[full blocks]` int64.

    A block is full if all its `block_size` tokens are targets. correct: `[n]` bool, of the n targets in order.
    """
    if len(correct) < block_size:
        return torch.zeros(0, dtype=torch.long, device=correct.device)
    index, position = targets.index.unfold(0, block_size, 1), targets.block_position.unfold(0, block_size, 1)
    # targets in order, from the first position of a block to its last, and none missing between them
    full = (position[:, 0] == 0) & (index[:, -1] - index[:, 0] == block_size - 1)
    return correct.unfold(0, block_size, 1)[full].long().cumprod(dim=1).sum(dim=1)
