"""Finding the newest whole checkpoint of a run, and loading it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tidar.config import UserError
from tidar.distributed import World
from tidar.models.huggingface import CheckpointReader
from tidar.models.huggingface.manifest import find_problem, saved_steps
from tidar.training.checkpoint.state import LoadPlanner
from tidar.training.checkpoint.writer import error_text

# damaged checkpoints whose problem an error states
NAMED = 3


def find_newest(
    run: Path, world: World, group: dist.ProcessGroup, threads: int, log: Callable[[str], None]
) -> tuple[int | None, set[int]]:
    """Step of the newest whole checkpoint, None where there is no checkpoint, and the steps of newer, damaged ones.

    All ranks call it and share the reading; each damaged checkpoint is logged. Raises UserError where there are
    checkpoints and none is whole, and where a rank does not see what rank 0 sees.
    """
    steps = [list(saved_steps(run))]
    dist.broadcast_object_list(steps, src=0, group=group)
    damaged: dict[int, str] = {}
    for step in reversed(steps[0]):
        path = run / "checkpoint" / f"step-{step}"
        found = torch.tensor(int(path.exists()))
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
        if not found:
            raise UserError(f"{path}: is not on all nodes; job.dump_folder must be one that they share")
        problems: list = [None] * world.size
        dist.all_gather_object(problems, find_problem(path, world.rank, world.size, threads), group=group)
        problem = next(filter(None, problems), None)
        if problem is None:
            return step, set(damaged)
        damaged[step] = problem
        log(f"warning: {path} is not whole and is skipped: {problem}")
    if damaged:
        named = [f"step-{step} ({problem})" for step, problem in list(damaged.items())[:NAMED]]
        more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise UserError(
            f"{run / 'checkpoint'}: none of its checkpoints is whole: {', '.join(named)}{more}",
            "remove them to start from step 0, or choose another job.dump_folder "
            "(checkpoint.initial_load_path starts from other weights)",
        )
    return None, set()


def load(
    path: Path, state: dict[str, Any], random_state: dict[str, Tensor], group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Loads a checkpoint into the tensors of `state` and `random_state`. Returns those of `random_state` that it has.

    The random state is restored only on the same number of ranks and kind of device; otherwise it is new. No step
    depends on it. Counts (progress.*) that an older checkpoint does not have stay as they are.
    Raises UserError where tensors of model or optimizer are missing, superfluous or of another dtype, and where the
    files cannot be read.
    """
    reader = CheckpointReader(path)
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    random_state = {name: tensor for name, tensor in random_state.items() if name in saved}
    state = {name: tensor for name, tensor in state.items() if name in saved or not name.startswith("progress.")}
    _check_names(path, [name for name in saved if name.startswith(("model.", "optimizer."))], state)
    for name, tensor in state.items():
        before, now = (str(dtype).removeprefix("torch.") for dtype in (saved[name].properties.dtype, tensor.dtype))
        if before != now and name.startswith("optimizer."):
            raise UserError(f"optimizer.state_dtype = {now}: {path} has {before}; resume with that")
        if before != now:
            raise UserError(f"{path}: {name} is {before}, must be {now}")
    try:
        dcp.load(state | random_state, storage_reader=reader, planner=LoadPlanner(), process_group=group)
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise UserError(f"{path}: cannot be restored: {error_text(cause)} (rank {rank})") from None
    return random_state


def _check_names(path: Path, saved: Iterable[str], expected: Iterable[str]) -> None:
    """Raises UserError unless the checkpoint has exactly the tensors of model and optimizer that the run has."""
    found, wanted = set(saved), {name for name in expected if not name.startswith("progress.")}
    for verb, names in (("misses", wanted - found), ("has", found - wanted)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            end = "" if verb == "misses" else ", which the model of this run does not have"
            raise UserError(f"{path}: {verb} the tensor {min(names)}{others}{end}")
