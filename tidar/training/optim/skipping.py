"""Steps whose loss or gradient is not finite: they change nothing, and the rows that caused them are logged."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidar.losses.objective import TokenScores
from tidar.losses.sums import LossSums
from tidar.models import Decoder
from tidar.patterns import ModelBatch

# rows and ranks that a message names
NAMED = 8


@dataclass
class _Evidence:
    """A micro-batch's rows whose loss, or gradient of the embeddings, is not finite, bool `[rows]`; and the largest
    gradient of each parameter.
    """

    bad_losses: Tensor
    bad_gradients: Tensor
    weight_gradients: list[Tensor]


class TooManySkipped(Exception):
    """training.max_steps_skipped steps in a row were skipped."""


@dataclass
class _Outcome:
    """Whether a step is skipped, decided on the device; the host reads it one step later and does not wait for it."""

    step: int
    found_inf: Tensor
    ready: torch.cuda.Event | None
    rows: Callable[[], list[int]]
    evidence: list[_Evidence]


class SkippedSteps:
    """Decides on the device whether a step is skipped; the host reads the decision one step later.

    `counts` holds the steps skipped in all and in a row, int64; it is saved in checkpoints.
    """

    def __init__(self, limit: int, group: dist.ProcessGroup, log: Callable[[str], None]):
        """limit: steps in a row that end the run. group: of all ranks, on the CPU."""
        self.limit = limit
        self.group = group
        self.log = log
        self.counts = torch.zeros(2, dtype=torch.long)
        self.evidence: list[_Evidence] = []
        self.input_gradient = torch.zeros(0)
        self.weight_gradients: list[Tensor] = []
        self.pending: _Outcome | None = None
        self.last_skipped = 0

    @property
    def total(self) -> int:
        return int(self.counts[0])

    def watch(self, model: Decoder, weights: bool) -> None:
        """Registers hooks that record, for each row, whether the gradient of the embeddings is finite.

        weights: records the largest gradient of each parameter, too. In float16 a sum over tokens may overflow, which
        no row's own gradient shows.
        """

        def note_input(gradient: Tensor) -> None:
            self.input_gradient = gradient.detach().abs().amax(dim=(1, 2))

        def after_embedding(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note_input)

        def note_weight(gradient: Tensor) -> None:
            self.weight_gradients.append(gradient.detach().abs().amax())

        watched: set[nn.Parameter] = set()

        def before_module(module: nn.Module, inputs: tuple) -> None:
            # the parameters are unsharded now: their gradients, before the reduction, are this rank's own
            for name, parameter in module.named_parameters():
                if parameter not in watched and not (module is model and name.startswith("layers.")):
                    watched.add(parameter)
                    parameter.register_hook(note_weight)

        model.embed_tokens.register_forward_hook(after_embedding)
        for module in (model, *model.layers) if weights else ():
            module.register_forward_pre_hook(before_module)

    def record(self, rows: ModelBatch, scores: dict[str, TokenScores]) -> None:
        """Records a micro-batch after its backward pass."""
        bad = torch.zeros(len(rows.input_ids), device=rows.input_ids.device)
        for loss, target in rows.targets.items():
            bad.index_add_(0, target.index // rows.input_ids.shape[1], (~scores[loss].nll.isfinite()).float())
        self.evidence.append(_Evidence(bad > 0, ~self.input_gradient.isfinite(), self.weight_gradients))
        self.weight_gradients = []

    def decide(self, step: int, sums: LossSums, grad_norm: Tensor, rows: Callable[[], list[int]]) -> Tensor:
        """1 if the step must be skipped, otherwise 0: a scalar float32, the same on all ranks.

        sums, grad_norm: of all ranks; rows: row numbers of this rank's micro-batches, in order. `read_decision` must be
        called between two steps.
        """
        found_inf = (~(sums.is_finite() & grad_norm.isfinite())).float()
        seen_by_host, ready = found_inf, None
        if found_inf.is_cuda:
            seen_by_host = torch.empty((), pin_memory=True).copy_(found_inf, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending = _Outcome(step, seen_by_host, ready, rows, self.evidence)
        self.evidence = []
        return found_inf

    def read_decision(self) -> bool | None:
        """Whether the last step was skipped, None where that was read before. All ranks call it. Synchronizes."""
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
        self.last_skipped = outcome.step
        return True

    def check(self) -> None:
        """Raises TooManySkipped where the limit of steps skipped in a row is reached."""
        if self.counts[1] >= self.limit:
            raise TooManySkipped(f"{self.counts[1]} steps in a row were skipped, up to step {self.last_skipped}")

    def restart_count(self) -> None:
        """Called when a run is resumed: its count of steps skipped in a row starts at 0."""
        self.counts[1] = 0

    def _cause(self, outcome: _Outcome) -> str:
        """Names ranks and rows by the first known cause: their loss, gradient of their embeddings, or of parameters."""
        rows = iter(outcome.rows())
        mine: list[list[int]] = [[], [], []]
        for evidence in outcome.evidence:
            its_rows = list(islice(rows, len(evidence.bad_losses)))
            bad_weights = not all(gradient.isfinite() for gradient in evidence.weight_gradients)
            causes: list[Any] = [evidence.bad_losses, evidence.bad_gradients, [bad_weights] * len(its_rows)]
            for found, flags in zip(mine, causes):
                found += [row for row, is_bad in zip(its_rows, flags) if is_bad]
        all_ranks: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(all_ranks, mine, group=self.group)
        whats = (
            "the loss is not finite",
            "the gradient is not finite",
            "the sum of gradients over tokens is not finite",
        )
        for number, what in enumerate(whats):
            ranks = {rank: found[number] for rank, found in enumerate(all_ranks) if found[number]}
            if ranks:
                found_on = [f"rank {rank}, {_named('row', rows)}" for rank, rows in list(ranks.items())[:NAMED]]
                more = f"; and {len(ranks) - NAMED} more ranks" if len(ranks) > NAMED else ""
                return f"{what} on {'; '.join(found_on)}{more}"
        return "the gradient's norm is not finite, though that of each row is"


def _named(what: str, numbers: list[int]) -> str:
    """row 3; rows 3, 5; rows 1, 2, … and 9 more"""
    text = ", ".join(map(str, numbers[:NAMED]))
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {text}{more}"
