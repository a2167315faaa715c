"""Hand-tuned kernels, and which of them run on a device. Knows tensors only: no model, no run."""

from tidar.kernels.float8 import check_float8, make_mlps_float8
from tidar.kernels.selection import Kernels, has_fast_products, multiprocessors

__all__ = ["Kernels", "check_float8", "has_fast_products", "make_mlps_float8", "multiprocessors"]
