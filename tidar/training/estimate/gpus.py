"""The GPUs that estimates know, with rates that were measured in training (docs/performance-log.md)."""

from dataclasses import dataclass

import torch

from tidar.config import UserError
from tidar.kernels import Capability

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Sustained rates, at the power limit.

    memory: bytes. peak: FLOP/s by datasheet, for MFU. gemm, float8_gemm: FLOP/s of large ones. flash, flex: FLOP/s of
    attention over tiles that are wholly allowed. program: seconds of an SM to begin and end a tile of queries or of
    keys, forward and backward, besides its FLOPs. copy: bytes/s of large copies and of AdamW. elementwise: bytes/s of
    norms, rotary embeddings and activations. rounding: bytes/s of what rounds to FP8. gather, scatter: bytes/s that
    all-gathers and reduce-scatters move into and out of each GPU by NVLink.
    """

    name: str
    starts: str  # what the device's name starts with
    memory: float
    copy: float
    capability: Capability = (9, 0)
    n_sms: int = 132
    peak: float = 989e12
    gemm: float = 675e12
    float8_gemm: float = 1369e12
    flash: float = 567e12
    flex: float = 298e12
    program: float = 31e-6
    gather: float = 325e9
    scatter: float = 338e9

    @property
    def elementwise(self) -> float:
        return 0.68 * self.copy

    @property
    def rounding(self) -> float:
        return 0.9 * self.copy


# both have the same chip and the same limit of power
GPUS = {
    "h100": Gpu("h100", "NVIDIA H100 80GB", memory=79.1 * GIB, copy=3.02e12),
    "h200": Gpu("h200", "NVIDIA H200", memory=139.8 * GIB, copy=4.26e12),
}
# GPUs of a host, which NVLink connects
PER_HOST = 8
# bytes/s between hosts of each GPU: InfiniBand NDR. Not measured here
NETWORK = 50e9


def named_gpu(name: str) -> Gpu:
    """Raises UserError for a name that is not in GPUS."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: must be one of {', '.join(GPUS)}, whose kernels were measured")
    return GPUS[name]


def this_gpu(device: torch.device) -> Gpu | None:
    """The one of GPUS that a device is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu for gpu in GPUS.values() if name.startswith(gpu.starts) and "NVL" not in name), None)
