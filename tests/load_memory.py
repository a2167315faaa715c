"""Loads a folder's weights into shards, as one rank of some, and prints its peak of anonymous memory above what it had
before, as a share of the whole model's float32 bytes.
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tidar.config import load_config
from tidar.distributed import join_world, leave_world, parallelize
from tidar.models import Decoder
from tidar.models.huggingface import ASSETS, decoder_config, load_weights, open_weights, read_config_json


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak of anonymous memory during a call, above that at its start."""
    baseline = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(peak, anonymous_bytes()) - baseline  # on a busy machine the watcher can be late


def main(folder: str) -> None:
    config = load_config([])
    world = join_world(config)
    kept = Path(folder) / ASSETS
    with torch.device("meta"):
        model = Decoder(decoder_config(read_config_json(kept if kept.is_dir() else Path(folder))))
    parallelize(model, world, config, torch.float32, compile=False)
    peak = peak_bytes(lambda: load_weights(model, open_weights(folder)))
    sums = [parameter.full_tensor().double().sum().item() for parameter in model.parameters()]
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    line = f"rank {world.rank} peak {peak / size:.3f} of {size} sum {sum(sums):.6f}\n"
    print(line, end="", flush=True)  # in one write: both ranks have the same output
    leave_world()
