"""Exports, and prints the peak of anonymous memory above that at its start."""

import threading
from pathlib import Path

import torch
from load_memory import anonymous_bytes

from tidar.export import export


def main(step: Path, out: Path) -> None:
    baseline = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    export(step, out, torch.bfloat16)
    done.set()
    watcher.join()
    print(f"peak {peak - baseline}")
