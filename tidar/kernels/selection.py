"""Which kernels of other libraries a decoder runs."""

from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

import torch

# elements of 16 bits that a row must be a multiple of, so that it begins at 16 bytes
ALIGNED = 8
# of QuACK, whose interface changes with each: from the one, before the other
KNOWN_VERSIONS = (0, 6, 5), (0, 7)


@dataclass(frozen=True)
class Kernels:
    """Kernels that take the place of plain ones where the device has them. All of them compute the same.

    flash: FlashAttention-4's under block masks. fused_products: QuACK's, with what stands beside them inside, of
    `tidar.kernels.matmul`. fused_backward: those of `tidar.kernels.backward`, for the norms of the residual stream and
    for rotary embeddings where no norm comes before them.
    """

    flash: bool = False
    fused_products: bool = False
    fused_backward: bool = False


PLAIN = Kernels()


@lru_cache
def multiprocessors(device: torch.device) -> int | None:
    """Of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def has_fast_products(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether QuACK's kernels run here. sizes: of the MLP."""
    try:
        version = tuple(map(int, metadata.version("quack-kernels").split(".")[:3]))
    except (metadata.PackageNotFoundError, ValueError):
        return False
    fits = (
        KNOWN_VERSIONS[0] <= version < KNOWN_VERSIONS[1]
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and dtype in (torch.bfloat16, torch.float16)
        and all(size % ALIGNED == 0 for size in sizes)
    )
    if fits:
        try:
            import quack.epilogue.library
            import quack.gemm_interface  # noqa: F401
        except (ImportError, OSError):  # what it needs itself is missing, or another version
            return False
    return fits
