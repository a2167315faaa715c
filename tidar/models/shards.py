"""Which elements of the decoder's parameters a rank has.

Tensor parallelism divides a parameter into parts by rows or by columns, and FSDP2 each part by rows.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from tidar.models.decoder import DecoderConfig

Shape = tuple[int, ...]

# modules whose parameters are divided by rows: by heads, or by tokens of the vocabulary
BY_ROWS = ("qkv_proj", "embed_tokens", "lm_head")
# whose weights are divided by columns, because their inputs are
BY_COLUMNS = ("o_proj", "down_proj")
# by rows of the gate and rows of the up projection
BY_HALVES = ("gate_up_proj",)


class Block(NamedTuple):
    """`length` rows of a tensor, from `at` on. In the whole parameter they begin at `row` and `column`."""

    at: int
    length: int
    row: int
    column: int


class Numbering(NamedTuple):
    """Element p of a part is element `start + p + p // run * gap` of the whole parameter, both flattened."""

    start: int
    run: int
    gap: int


@dataclass(frozen=True)
class TensorShard:
    """The part of each parameter that rank `rank` of the `size` ranks of tensor parallelism has.

    With one rank this is all of it, and nothing is communicated; see `tidar.distributed.TensorParallel` for several.
    """

    rank: int = 0
    size: int = 1

    def sizes(self, config: "DecoderConfig") -> "DecoderConfig":
        """Sizes of the layers of a rank, which the number of ranks must divide."""
        return replace(
            config,
            vocab_size=config.vocab_size // self.size,
            n_heads=config.n_heads // self.size,
            n_kv_heads=config.n_kv_heads // self.size,
            hidden_dim=config.hidden_dim // self.size,
        )

    def is_divided(self, name: str) -> bool:
        """Whether ranks have different parts of a parameter, and not all of them the whole."""
        return self.size > 1 and (_has_module(name, BY_ROWS + BY_HALVES) or _by_columns(name))

    def whole_shape(self, name: str, shape: Shape) -> Shape:
        """Shape of a parameter, given that of a part."""
        rows, *columns = shape
        if not self.is_divided(name):
            return tuple(shape)
        return (rows, columns[0] * self.size) if _by_columns(name) else (rows * self.size, *columns)

    def blocks(self, name: str, shape: Shape) -> list[Block]:
        """The rows of this rank's part of a parameter. shape: of the part."""
        rows = shape[0]
        if not self.is_divided(name):
            return [Block(0, rows, 0, 0)]
        if _by_columns(name):
            return [Block(0, rows, 0, self.rank * shape[1])]
        if _has_module(name, BY_HALVES):
            half = rows // 2
            return [Block(0, half, self.rank * half, 0), Block(half, half, (self.size + self.rank) * half, 0)]
        return [Block(0, rows, self.rank * rows, 0)]

    def numbering(self, name: str, shape: Shape) -> Numbering:
        """Of the elements of this rank's part of a parameter. shape: of the part."""
        size = 1
        for length in shape[1:]:
            size *= length
        blocks = self.blocks(name, shape)
        start = blocks[0].row * size + blocks[0].column
        if self.is_divided(name) and _by_columns(name):
            return Numbering(start, size, (self.size - 1) * size)
        run = blocks[0].length * size
        return Numbering(start, max(run, 1), (self.size - 1) * run if len(blocks) > 1 else 0)

    def gathered(self, x: Tensor) -> Tensor:
        """All-gathers positions: `[1, positions, …]` from `[1, positions / size, …]`."""
        return x

    def summed(self, x: Tensor) -> Tensor:
        """Sums `[…, dim]` over the ranks in float32, and keeps this rank's positions: `[1, positions / size, dim]`."""
        return x

    def stacked(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, `[size, …]`. Not differentiable."""
        return x[None]

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        return value

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter, from this rank's part of it. All ranks call it."""
        return part


WHOLE = TensorShard()


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a part, and the index of the first."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    if any(isinstance(placement, Shard) and placement.dim != 0 for placement in parameter.placements):
        raise ValueError(f"{parameter.placements}: only rows can be sharded")
    _, (first, *_) = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local().detach(), first


def local_blocks(shard: TensorShard, name: str, parameter: Tensor) -> tuple[Tensor, list[Block]]:
    """This rank's rows of a parameter, or of a tensor sharded like it (a moment), and where they lie in the whole."""
    local, first = local_rows(parameter)
    end, found = first + len(local), []
    for block in shard.blocks(name, parameter.shape):
        at, stop = max(block.at, first), min(block.at + block.length, end)
        if at < stop:
            found.append(Block(at - first, stop - at, block.row + at - block.at, block.column))
    return local, found


def _has_module(name: str, modules: tuple[str, ...]) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in modules


def _by_columns(name: str) -> bool:
    return _has_module(name, BY_COLUMNS) and name.endswith(".weight")
