"""python tests/export_memory.py STEP OUT: exports, and prints the peak of anonymous memory above that at its start."""

import sys
import threading
from pathlib import Path

import torch
from load_memory import anonymous_bytes

from tidar.export import export

if __name__ == "__main__":
    baseline = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        global peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    export(Path(sys.argv[1]), Path(sys.argv[2]), torch.bfloat16)
    done.set()
    watcher.join()
    print(f"peak {peak - baseline}")
