"""Hand-tuned kernels, and which of them run on a device. Knows tensors only: no model, no run."""

from tidar.kernels.selection import Capability, Kernels, Sizes, choose_kernels, count_sms

__all__ = ["Capability", "Kernels", "Sizes", "choose_kernels", "count_sms"]
