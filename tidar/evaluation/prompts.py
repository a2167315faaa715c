"""Prompts from held-out rows: the same in a run's validation and in tidar.evaluate."""

from torch import Tensor

from tidar.data import PackedRows

MOST_NEW_TOKENS = 256


def n_new_tokens(seq_len: int) -> int:
    """New tokens for each held-out prompt of rows of `seq_len` tokens: with the prompt they fit into a row."""
    return min(MOST_NEW_TOKENS, seq_len // 2)


def held_out_prompts(rows: PackedRows, n: int) -> list[list[int]]:
    """A prompt from each of n rows, or of all if there are fewer: the beginning of the row's first document.

    The rows are spread evenly over all, for neighbours may be of one long document. A chat's prompt is all before the
    first token that is to be predicted, of a long one the end; a text's prompt is its first half.
    """
    n = min(n, len(rows))
    return [_prompt(*rows[number * len(rows) // n]) for number in range(n)]


def _prompt(tokens: Tensor, document_ids: Tensor, loss_mask: Tensor) -> list[int]:
    most = max(1, len(tokens) // 2)
    is_first = document_ids == document_ids[0]
    document, targets = tokens[is_first], loss_mask[is_first][1:].nonzero()
    first_target = int(targets[0]) + 1 if len(targets) else len(document)
    if first_target > 1:
        return document[:first_target][-most:].tolist()
    return document[: max(1, len(document) // 2)].tolist()
