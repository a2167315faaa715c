"""How far the host may run ahead of its device."""

import torch


class Pace:
    """Holds the host at most one micro-batch ahead: enough to keep the device busy, and who hangs is seen in time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before: torch.cuda.Event | None = None

    def __call__(self) -> None:
        """After each micro-batch: waits until the one before it is computed."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        if self.before:
            self.before.synchronize()
        self.before = event
