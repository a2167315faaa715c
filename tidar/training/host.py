"""How the host keeps step with its device and with the hosts of other ranks."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class HostThrottle:
    """Lets the host run at most one micro-batch ahead of its device.

    That is enough to keep the device busy, and few enough that a hang is noticed in time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.previous: torch.cuda.Event | None = None

    def wait(self) -> None:
        """After each micro-batch: waits until the device has computed the one before it."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        if self.previous:
            self.previous.synchronize()
        self.previous = event


@contextmanager
def scheduled_gc(freq: int) -> Iterator[Callable[[int], None]]:
    """If freq is above 0, Python collects garbage only in each freq-th step, the same on all ranks.

    So no rank waits for another's collection. Objects that exist already are never collected. Yields a
    function to call after each step, with the step's number.
    """
    if freq:
        gc.collect()
        gc.freeze()
        gc.disable()

    def collect(step: int) -> None:
        if freq and step % freq == 0:
            gc.collect()

    try:
        yield collect
    finally:
        if freq:
            gc.enable()
            gc.unfreeze()
