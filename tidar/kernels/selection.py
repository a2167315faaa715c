"""The one decision about which kernels a run uses."""

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from tidar.config import Config, UserError, named_error
from tidar.config.packages import install

# elements of 16 bits: rows are multiples of them, so that each begins at 16 bytes
ALIGNED = 8
# of a device's vocabulary for the loss without logits: its last columns, fewer than a tile, are a tile of their own
VOCAB_MULTIPLE = 64
# of the MLP's sizes for FP8: what cuBLAS requires
FLOAT8_MULTIPLE = 16
# QuACK's interface changes with each version: from the first, before the second
QUACK_VERSIONS = (0, 6, 5), (0, 7)
# the first GPUs with FP8 matmuls
FLOAT8_CAPABILITY = (8, 9)
# where FlashAttention-4 under FlexAttention was tested
FLASH_HEAD_DIM, HOPPER = 128, 9
NARROW_DTYPES = (torch.bfloat16, torch.float16)

Capability = tuple[int, int]


class Sizes(NamedTuple):
    """Sizes of a decoder, or of a device's part of it, that decide which kernels can compute it."""

    dim: int
    hidden_dim: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True)
class Kernels:
    """Which kernels run. All but FP8 compute what the plain ones of torch do, which are the default.

    attention: "flash" is FlexAttention with FlashAttention-4's kernels, "flex" with Triton's, "sdpa" takes dense masks.
    compile: layers, and small functions of the loss, by torch.compile.
    fused_matmul: QuACK's GEMMs in the layers, with the gated activation and the residual connection inside of them.
    dynamic_tiles: these GEMMs hand out their tiles as SMs become free, because collectives hold some of the SMs.
    fused_backward: backward passes of norms and rotary embeddings in one kernel each.
    loss_kernel: cross-entropy and its gradient in place of the logits, in Triton.
    loss_matmul: QuACK's GEMMs for the logits. loss_without_logits: in training they write exponentials and not logits.
    adamw: all parameters of a group in one Triton kernel.
    float8: the MLP's matmuls in FP8, in place of QuACK's; emulated on a CPU.
    fallbacks: why faster kernels do not run. warnings: lines for the user's log.
    """

    attention: Literal["flash", "flex", "sdpa"] = "sdpa"
    compile: bool = False
    fused_matmul: bool = False
    dynamic_tiles: bool = False
    fused_backward: bool = False
    loss_kernel: bool = False
    loss_matmul: bool = False
    loss_without_logits: bool = False
    adamw: bool = False
    float8: bool = False
    fallbacks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """What runs, and what does not and why, on one line."""
        parts = [f"{self.attention} attention", f"compile {self.compile}"]
        optional = {
            "MLP in float8": self.float8,
            "QuACK matmuls": self.fused_matmul,
            "loss without logits": self.loss_without_logits,
        }
        parts += [name for name, runs in optional.items() if runs]
        return ", ".join(parts) + "".join(f"; {reason}" for reason in self.fallbacks)


PLAIN = Kernels()


class Obstacle(NamedTuple):
    """Why kernels cannot be used. is_broken: their package is installed, but cannot be imported."""

    reason: str
    is_broken: bool = False


@lru_cache
def count_sms(device: torch.device) -> int | None:
    """Number of SMs of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def has_decode_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a decoding step runs `tidar.kernels.decode_attention`, whose tiles have sizes that are powers of two and
    must fit in shared memory.
    """
    is_power_of_two, largest = head_dim & (head_dim - 1) == 0, 128 if dtype == torch.float32 else 256
    return device.type == "cuda" and dtype != torch.float64 and 16 <= head_dim <= largest and is_power_of_two


def choose_kernels(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    elsewhere: Capability | None = None,
    several_devices: bool = False,
) -> Kernels:
    """The fastest kernels that the device, the compute dtype, the sizes, the options and the installed packages allow.

    sizes: None where the model is not known yet; then only what the options ask for explicitly is checked, and the rest
    is not final. elsewhere: of GPUs of another machine, which is taken to have all packages; None: ask the device.
    Raises UserError where what they ask for explicitly cannot run.
    """
    on_cuda = device.type == "cuda"
    compile = on_cuda if config.compile.enable == "auto" else config.compile.enable
    fallbacks, warnings = [], []

    def is_free(name: str, obstacle: Obstacle | None) -> bool:
        if obstacle and on_cuda:
            fallbacks.append(f"no {name}: {obstacle.reason}")
        if obstacle and obstacle.is_broken:
            warnings.append(f"warning: {obstacle.reason}; the run continues without it")
        return obstacle is None

    attention = config.model.attention_backend
    if attention in ("flex", "flash") and not on_cuda:
        raise UserError(f"model.attention_backend = {attention}: has no backward pass without CUDA; use sdpa or auto")
    if not on_cuda:
        attention = "sdpa"
    elif attention in ("auto", "flash") and (sizes or attention == "flash"):
        obstacle = _flash_obstacle(device, dtype, sizes, config.training.deterministic, elsewhere)
        if obstacle and attention == "flash":
            raise UserError(f"model.attention_backend = flash: {obstacle.reason}; use flex or auto")
        attention = "flash" if is_free("flash attention", obstacle) else "flex"
    if attention == "auto":
        attention = "flex"
    if attention == "flash":
        # compiled for half a minute, its kernels are kept on disk for the next process
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

    float8 = config.training.float8
    if float8:
        obstacle = _float8_obstacle(device, dtype, sizes, elsewhere)
        if obstacle:
            raise UserError(f"training.float8 = true: {obstacle.reason}")
        if not on_cuda:
            warnings.append("warning: training.float8 is emulated on a CPU, and slow; it is for trying things out")
    if dtype == torch.float16 and not on_cuda:
        warnings.append(
            "warning: training.mixed_precision_param = float16 is slow on a CPU; it is for trying things out"
        )

    quack = without_logits = False
    if compile and sizes is not None and is_free("QuACK matmuls", _quack_obstacle(device, dtype, sizes, elsewhere)):
        quack, without_logits = True, is_free("loss without logits", _loss_obstacle(dtype, sizes))
    return Kernels(
        attention=attention,
        compile=compile,
        fused_matmul=quack,
        dynamic_tiles=quack and several_devices,
        fused_backward=compile and on_cuda,
        loss_kernel=compile and on_cuda,
        loss_matmul=quack,
        loss_without_logits=without_logits,
        adamw=on_cuda and not config.training.enable_cpu_offload,
        float8=float8,
        fallbacks=tuple(fallbacks),
        warnings=tuple(warnings),
    )


def _flash_obstacle(
    device: torch.device, dtype: torch.dtype, sizes: Sizes | None, deterministic: bool, elsewhere: Capability | None
) -> Obstacle | None:
    try:
        installed = elsewhere is not None or find_spec("flash_attn.cute") is not None
    except ImportError:
        installed = False
    if not installed:
        return Obstacle(f"is not installed: {install('flash')}")
    if (elsewhere or torch.cuda.get_device_capability(device))[0] != HOPPER:
        return Obstacle(f"needs a Hopper GPU{'' if elsewhere else f', not {torch.cuda.get_device_name(device)}'}")
    if dtype not in NARROW_DTYPES:
        return Obstacle(f"needs training.mixed_precision_param = bfloat16 or float16, not {_name(dtype)}")
    if sizes and sizes.head_dim != FLASH_HEAD_DIM:
        return Obstacle(f"needs heads of {FLASH_HEAD_DIM}, not {sizes.head_dim}")
    if deterministic:
        return Obstacle("training.deterministic = true: its backward pass does not repeat bit for bit")
    return None if elsewhere else _import_obstacle("flash-attn-4", "flash_attn.cute")


def _quack_obstacle(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, elsewhere: Capability | None
) -> Obstacle | None:
    first, end = QUACK_VERSIONS
    version = first if elsewhere else _version("quack-kernels", 3)
    if version is None:
        return Obstacle(f"is not installed: {install('flash')}")
    if not first <= version < end:
        known = f"{'.'.join(map(str, first))} or later, before {'.'.join(map(str, end))}"
        return Obstacle(f"needs quack-kernels {known}, not {metadata.version('quack-kernels')}")
    if device.type != "cuda" or (elsewhere or torch.cuda.get_device_capability(device))[0] != HOPPER:
        return Obstacle("needs a Hopper GPU")
    if dtype not in NARROW_DTYPES:
        return Obstacle(f"needs training.mixed_precision_param = bfloat16 or float16, not {_name(dtype)}")
    if sizes.dim % ALIGNED or sizes.hidden_dim % ALIGNED:
        return Obstacle(f"needs sizes that are multiples of {ALIGNED}, not {sizes.dim} and {sizes.hidden_dim}")
    modules = "quack.gemm_interface", "quack.epilogue.library", "tidar.kernels.anchored_cross_entropy"
    return None if elsewhere else _import_obstacle("quack-kernels", *modules)


def _loss_obstacle(dtype: torch.dtype, sizes: Sizes) -> Obstacle | None:
    if dtype != torch.bfloat16:  # exponentials have to have its range (see anchored_cross_entropy)
        return Obstacle(f"needs training.mixed_precision_param = bfloat16, not {_name(dtype)}")
    if sizes.vocab_size % VOCAB_MULTIPLE:
        return Obstacle(f"needs a multiple of {VOCAB_MULTIPLE} tokens on each device, not {sizes.vocab_size}")
    return None


def _float8_obstacle(
    device: torch.device, dtype: torch.dtype, sizes: Sizes | None, elsewhere: Capability | None
) -> Obstacle | None:
    if device.type == "cuda":
        if (elsewhere or torch.cuda.get_device_capability(device)) < FLOAT8_CAPABILITY:
            return Obstacle(f"needs an Ada, Hopper or later GPU, not {torch.cuda.get_device_name(device)}")
        if dtype != torch.bfloat16:  # what it was tested with there
            return Obstacle(f"needs training.mixed_precision_param = bfloat16, not {_name(dtype)}")
    if sizes and (sizes.dim % FLOAT8_MULTIPLE or sizes.hidden_dim % FLOAT8_MULTIPLE):
        needed = f"multiples of {FLOAT8_MULTIPLE}, not {sizes.dim} and {sizes.hidden_dim}"
        return Obstacle(f"needs sizes of the MLP that are {needed}")
    return None


def _version(package: str, parts: int) -> tuple[int, ...] | None:
    """The first numbers of an installed package's version; None where there is no package or no such numbers."""
    try:
        return tuple(map(int, metadata.version(package).split(".")[:parts]))
    except (metadata.PackageNotFoundError, ValueError):
        return None


def _import_obstacle(package: str, *modules: str) -> Obstacle | None:
    """Imports the modules. A package whose own imports fail may raise anything."""
    try:
        for module in modules:
            import_module(module)
    except Exception as error:
        installed = f"{package} {metadata.version(package)}"
        return Obstacle(f"{installed} cannot be imported: {named_error(error)}", is_broken=True)
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
