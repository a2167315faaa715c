"""Copies a run's state to host memory, from which it is written while training continues."""

import mmap

import torch
from torch import Tensor

from tidar.config import UserError

# alignment of each tensor in the pinned buffer, bytes
ALIGNMENT = 64


class Staging:
    """Copies tensors of this rank as checkpoint.async_mode says.

    "disabled" makes no copy: the tensors themselves are written before training continues. "async" copies at once.
    "async_with_pinned_mem" keeps a page-locked buffer and copies on its own stream during the next forward and
    backward passes; `before_update` makes the device, not the host, wait for the copy.
    """

    def __init__(self, mode: str, device: torch.device):
        self.mode = mode
        self.overlaps = mode == "async_with_pinned_mem" and device.type == "cuda"
        self.buffers: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None
        self.waits: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if self.overlaps:
            self.stream = torch.cuda.Stream()

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Allocates the buffer for these tensors. Raises UserError where the host has too little memory."""
        if self.overlaps:
            try:
                self.buffers, self.whole = _pinned_like(tensors)
            except (OSError, RuntimeError) as error:
                gib = sum(tensor.nbytes for tensor in tensors.values()) / 2**30
                raise UserError(
                    f"checkpoint.async_mode = async_with_pinned_mem: {gib:.1f} GiB of the host's memory cannot be "
                    f"page-locked for each device ({error}); use async or disabled"
                ) from None

    def take(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Returns the current values by name, and the event after which any thread may read them (None: at once).
        Overwrites the tensors that the call before has returned.
        """
        if self.mode == "disabled":
            return tensors, None
        if not self.overlaps:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for name, tensor in tensors.items():
                self.buffers[name].copy_(tensor.detach(), non_blocking=True)
            self.copied = self.stream.record_event()
        return self.buffers, self.copied

    def before_update(self) -> None:
        """Called on the thread that called `take`, before any of the tensors changes on the device."""
        if self.copied:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda.current_stream().wait_event(self.copied)
            end.record()
            self.waits = (start, end)
            self.copied = None

    def device_wait(self) -> float:
        """Seconds that the device has waited in `before_update` since the last call. Synchronizes the device."""
        waits, self.waits = self.waits, None
        if not waits:
            return 0.0
        waits[1].synchronize()
        return waits[0].elapsed_time(waits[1]) / 1000

    def close(self) -> None:
        """Frees the buffer."""
        if self.buffers:
            # its result is ignored: an error of the device is reported where it occurred
            torch.cuda.cudart().cudaHostUnregister(self.whole.data_ptr())
            self.buffers = {}


def _pinned_like(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Page-locked tensors of these shapes and dtypes, and the one buffer that holds them: torch's allocator of pinned
    memory would round each up to a power of two.
    """
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    memory = mmap.mmap(-1, max(end, ALIGNMENT))
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)))
    buffers = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offsets[name])
            buffers[name] = flat.view(tensor.shape)
        else:
            buffers[name] = torch.empty_like(tensor, device="cpu")
    return buffers, whole
