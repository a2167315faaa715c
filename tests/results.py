"""What a run has left behind."""

import json
from pathlib import Path

import torch


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_weights(path: Path) -> torch.Tensor:
    """All that a pool's run has saved of its parameters, flat."""
    return torch.cat([tensor.flatten() for tensor in torch.load(path, weights_only=True).values()])
