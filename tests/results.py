"""What a run has left behind."""

import json
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of each file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_steps(folder: Path, name: str) -> list[float]:
    """A metric of all steps that were reported. Other lines are about an epoch, a validation or a checkpoint."""
    return [line[name] for line in read_metrics(folder) if name in line]


def batch_losses(folder: Path) -> list[float]:
    return of_steps(folder, "train/batch_loss")


def read_weights(path: Path) -> torch.Tensor:
    """All that a pool's run has saved of its parameters, flat."""
    return torch.cat([tensor.flatten() for tensor in torch.load(path, weights_only=True).values()])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, or what belongs to one, whether it is sharded or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
