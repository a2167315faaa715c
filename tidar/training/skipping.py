"""Steps whose loss or gradient is not finite: they change nothing, and who caused them is told."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidar.objective import TokenScores
from tidar.patterns import ModelBatch

# rows and ranks that a message names
NAMED = 8


class TooManySkipped(Exception):
    """Steps were skipped in a row, as many as are allowed."""


@dataclass
class _Outcome:
    """What is known of a step on the device; the host looks at it later, so that it need not wait."""

    step: int
    found_inf: Tensor
    ready: torch.cuda.Event | None
    rows: Callable[[], list[int]]
    bad_losses: list[Tensor]
    bad_gradients: list[Tensor]
    bad_shard: Tensor


class SkippedSteps:
    """Judges each step on the device, and lets the host know a step later.

    `counts` holds the steps skipped in all and in a row, int64; it is saved with checkpoints.
    """

    def __init__(self, limit: int, group: dist.ProcessGroup, log: Callable[[str], None]):
        """limit: steps in a row with which TooManySkipped is raised. group: of all ranks, on the CPU."""
        self.limit = limit
        self.group = group
        self.log = log
        self.counts = torch.zeros(2, dtype=torch.long)
        self.bad_losses: list[Tensor] = []
        self.bad_gradients: list[Tensor] = []
        self.pending: _Outcome | None = None

    @property
    def total(self) -> int:
        return int(self.counts[0])

    def watch(self, embedding: nn.Module) -> None:
        """From now on notes which rows the gradient of the model's input is not finite for."""

        def note(gradient: Tensor) -> None:
            self.bad_gradients.append(~gradient.detach().abs().amax(dim=(1, 2)).isfinite())

        def forward_hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note)

        embedding.register_forward_hook(forward_hook)

    def note_losses(self, rows: ModelBatch, scores: dict[str, TokenScores]) -> None:
        """Takes in the losses of a micro-batch."""
        bad = torch.zeros(len(rows.input_ids), device=rows.input_ids.device)
        for loss, target in rows.targets.items():
            bad.index_add_(0, target.index // rows.input_ids.shape[1], (~scores[loss].nll.isfinite()).float())
        self.bad_losses.append(bad > 0)

    def judge(
        self, step: int, sums: Tensor, grad_norm: Tensor, local_norm: Tensor, rows: Callable[[], list[int]]
    ) -> Tensor:
        """1 where a step is to be skipped and 0 otherwise, a scalar float32 that is the same on all ranks.

        sums, grad_norm: of all ranks; local_norm: of this rank's shard; rows: those of this rank's
        micro-batches, in order.
        `settle` comes between two steps.
        """
        found_inf = (~(sums.isfinite().all() & grad_norm.isfinite())).float()
        seen_by_host, ready = found_inf, None
        if found_inf.is_cuda:
            seen_by_host = torch.empty((), pin_memory=True).copy_(found_inf, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending = _Outcome(
            step, seen_by_host, ready, rows, self.bad_losses, self.bad_gradients, ~local_norm.isfinite()
        )
        self.bad_losses, self.bad_gradients = [], []
        return found_inf

    def settle(self) -> bool | None:
        """Whether the last step was skipped, None where that was told before. All ranks call it.

        Raises TooManySkipped.
        """
        outcome, self.pending = self.pending, None
        if outcome is None:
            return None
        if outcome.ready:
            outcome.ready.synchronize()
        if not outcome.found_inf:
            self.counts[1] = 0
            return False
        self.counts += 1
        self.log(f"step {outcome.step} skipped: {self._cause(outcome)}")
        if self.counts[1] >= self.limit:
            raise TooManySkipped(f"{self.counts[1]} steps in a row were skipped, up to step {outcome.step}")
        return True

    def _cause(self, outcome: _Outcome) -> str:
        """Names the ranks and rows whose loss is not finite, or else whose gradient, or else whose shard of it."""
        bad = [torch.cat(flags).tolist() for flags in (outcome.bad_losses, outcome.bad_gradients)]
        rows = outcome.rows()
        mine = [[row for row, is_bad in zip(rows, flags) if is_bad] for flags in bad]
        all_ranks: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(all_ranks, (*mine, bool(outcome.bad_shard)), group=self.group)
        for number, what in enumerate(("loss", "gradient")):
            ranks = {rank: found[number] for rank, found in enumerate(all_ranks) if found[number]}
            if ranks:
                places = [f"rank {rank}, {_named('row', rows)}" for rank, rows in list(ranks.items())[:NAMED]]
                more = f"; and {len(ranks) - NAMED} more ranks" if len(ranks) > NAMED else ""
                return f"the {what} is not finite on {'; '.join(places)}{more}"
        shards = [rank for rank, found in enumerate(all_ranks) if found[2]]
        return f"the gradient's norm is not finite, its shard on {_named('rank', shards)}; no single row's is to blame"


def _named(what: str, numbers: list[int]) -> str:
    """row 3; rows 3, 5; rows 1, 2, … and 9 more"""
    text = ", ".join(map(str, numbers[:NAMED]))
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {text}{more}"
