"""Checks of a pattern before training, so that a mistake in a user's pattern is an error at the start, not a NaN."""

import torch
from torch import Tensor

from tidar.config import UserError, named_error
from tidar.patterns.base import LOSSES, PADDING, Documents, MaskMod, ModelBatch, Pattern, dense_pieces, key_ranges

# longest row that is checked, as its mask may be evaluated at all points
LONGEST = 2048


def check_pattern(pattern: Pattern, name: str, seq_len: int) -> None:
    """Lays out a whole and a packed row of at most `seq_len` tokens and checks every query of their masks.

    name: of the pattern, for messages. Raises UserError for model input or targets of a wrong shape, type or range, a
    mask_mod that does not return bool, or a query that sees no key.
    """
    ids = probe_ids(seq_len)
    seq_len = ids.shape[1]
    about = f"tidar.pattern = {name}"
    try:
        rows = pattern.layout(torch.zeros_like(ids), ids, torch.ones(2, seq_len), [0, 1])
        mask_mod = pattern.mask_mod(rows.documents)
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise UserError(
            f"{about}: layout or mask_mod fails on rows of {seq_len} tokens ({named_error(error)})"
        ) from None
    _check_rows(about, pattern, rows, seq_len)
    _check_value(about, mask_mod, rows.documents)
    positions = rows.input_ids.shape[1]
    for row, query in _queries_without_key(about, mask_mod, positions, rows.documents):
        kind = "row of one document" if row == 0 else "packed row"
        raise UserError(
            f"{about}: position {query} of {positions} sees no key in a {kind} ({seq_len} tokens), which would be NaN",
            "each must see at least one, itself for example: `| (q == k)`",
        )


def probe_ids(seq_len: int) -> Tensor:
    """Document ids of a whole row, and of one with documents of 1, 2, 3 … tokens and padding: `[2, tokens]` int64.

    tokens: `seq_len`, or LONGEST where that is less.
    """
    seq_len = min(seq_len, LONGEST)
    ids = torch.zeros(2, seq_len, dtype=torch.long)
    lengths = torch.arange(seq_len) + 1
    ids[1] = torch.repeat_interleave(lengths, lengths)[:seq_len]
    ids[1, seq_len - seq_len // 8 :] = PADDING
    return ids


def _check_rows(about: str, pattern: Pattern, rows: ModelBatch, seq_len: int) -> None:
    positions = pattern.model_positions(seq_len)
    for what in ("input_ids", "position_ids"):
        tensor = getattr(rows, what)
        if tensor.shape != (2, positions) or tensor.dtype != torch.long:
            raise UserError(
                f"{about}: layout gives {what} of {_kind(tensor)} for 2 rows of {seq_len} tokens: "
                f"must be int64 of [2, {positions}], as parts says"
            )
    if tuple(rows.targets) != tuple(pattern.losses) or not set(pattern.losses) <= set(LOSSES) or not pattern.losses:
        raise UserError(
            f"{about}: layout gives targets of {', '.join(rows.targets) or 'no loss'}, and losses = {pattern.losses}: "
            f"must be the same, of {', '.join(LOSSES)}, in this order"
        )
    for loss, targets in rows.targets.items():
        columns = vars(targets)
        if len({tuple(column.shape) for column in columns.values()}) != 1 or targets.index.ndim != 1:
            shapes = ", ".join(f"{key} {list(column.shape)}" for key, column in columns.items())
            raise UserError(f"{about}: targets of {loss} have the shapes {shapes}: must be one and the same, [n]")
        highs = {"index": 2 * positions, "block_position": pattern.block_size}
        for key, high in highs.items():
            if len(columns[key]) and not 0 <= columns[key].min() <= columns[key].max() < high:
                found = f"{columns[key].min()} to {columns[key].max()}"
                raise UserError(f"{about}: {key} of {loss} targets is {found}: must be from 0 to {high - 1}")


def _check_value(about: str, mask_mod: MaskMod, documents: Documents) -> None:
    """Calls mask_mod as FlexAttention does, with one query and one key."""
    zero = torch.zeros((), dtype=torch.long, device=documents.index.device)
    try:
        value = mask_mod(zero, zero, zero, zero)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{about}: mask_mod fails on b = h = q = k = 0 ({named_error(error)})") from None
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim != 0:
        raise UserError(
            f"{about}: mask_mod returns {_kind(value)} for one query and one key: must be one bool tensor without "
            "dimensions, such as `q >= k`"
        )


def _queries_without_key(about: str, mask_mod: MaskMod, positions: int, documents: Documents):
    """(row, query) of each query that sees no key."""
    batch, device = len(documents.index), documents.index.device
    ranges = key_ranges(mask_mod)
    if ranges is not None:
        sees = torch.stack([end > start for start, end in ranges]).any(dim=0)
    else:
        try:
            pieces = [piece.any(dim=-1) for piece in dense_pieces(mask_mod, batch, positions, positions, device)]
        except Exception as error:  # a user's code may raise anything
            raise UserError(f"{about}: mask_mod fails ({named_error(error)})") from None
        sees = torch.cat(pieces, dim=1)
    yield from (~sees).nonzero().tolist()


def _kind(value: object) -> str:
    return f"{value.dtype} of {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
