"""Where the rows of the decoder's parameters are in Hugging Face's checkpoints."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from tidar.models.decoder import DecoderConfig
from tidar.models.shards import Shape

PIECE_BYTES = 2 * 2**20  # of rows in float32 that are read and converted at a time


class RowRange(NamedTuple):
    """`length` rows of a published tensor from row `start` on, which are a parameter's rows from `at` on."""

    name: str
    start: int
    length: int
    at: int


def published_name(name: str) -> str:
    """Name in Hugging Face's checkpoints of a parameter that is not fused."""
    return name if name == "lm_head.weight" else f"model.{name}"


def row_ranges(parameter: str, n_rows: int, config: DecoderConfig) -> list[RowRange]:
    """The published rows that make up a parameter of the decoder with `n_rows` rows, in the order of its rows.

    `qkv_proj` and `gate_up_proj` take rows of several tensors (see `Attention` and `MLP`), the others all of one.
    """
    module, _, kind = parameter.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if leaf == "qkv_proj":
        group_rows = config.n_heads // config.n_kv_heads * config.head_dim
        kv_rows = config.head_dim
        sources = [
            (part, group * length, length)
            for group in range(config.n_kv_heads)
            for part, length in (("q_proj", group_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        ]
    elif leaf == "gate_up_proj":
        sources = [("gate_proj", 0, config.hidden_dim), ("up_proj", 0, config.hidden_dim)]
    else:
        return [RowRange(published_name(parameter), 0, n_rows, 0)]
    ranges, at = [], 0
    for part, start, length in sources:
        ranges.append(RowRange(published_name(f"{parent}.{part}.{kind}"), start, length, at))
        at += length
    return ranges


def published_ranges(shapes: dict[str, Shape], config: DecoderConfig) -> dict[str, list[tuple[str, RowRange]]]:
    """Each published tensor's name: the parameters and ranges that hold its rows, in the order of its rows.

    shapes: of the decoder's parameters by name. The tensors of one parameter follow each other.
    """
    found: dict[str, list[tuple[str, RowRange]]] = {}
    for parameter, shape in shapes.items():
        for rows in row_ranges(parameter, shape[0], config):
            found.setdefault(rows.name, []).append((parameter, rows))
    return found


def published_shapes(shapes: dict[str, Shape], config: DecoderConfig) -> dict[str, Shape]:
    """Shapes of the published tensors by name. shapes: of the decoder's parameters by name."""
    return {
        name: (sum(rows.length for _, rows in parts), *shapes[parts[0][0]][1:])
        for name, parts in published_ranges(shapes, config).items()
    }


def pieces(shape: Shape, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows `start` to `stop` of a tensor as ranges (start, stop) of at most PIECE_BYTES, or of one row."""
    length = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
    for first in range(start, stop, length):
        yield first, min(first + length, stop)
