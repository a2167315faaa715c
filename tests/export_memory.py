"""Exports, and prints the peak of anonymous memory above that at its start."""

from pathlib import Path

import torch
from load_memory import peak_bytes

from tidar.export import export


def main(step: Path, out: Path) -> None:
    print(f"peak {peak_bytes(lambda: export(step, out, torch.bfloat16))}")
