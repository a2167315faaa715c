"""Slow references in plain loops, written from the papers' rules and not from the code under test."""

import random

import torch

from tidar.patterns import Documents, get_pattern

HALVES = ("tidar", "tidar_random", "block_diffusion")


def document_positions(document_lengths: list[int]) -> tuple[list[int], list[int]]:
    """Number of the document, and position in it, of each token of a row."""
    document, position = [], []
    for number, length in enumerate(document_lengths):
        document += [number] * length
        position += range(length)
    return document, position


def block_of(position: int, block_size: int, offset: int = 0) -> int:
    """Number of the block in which a position lies, counted one token at a time."""
    number, left = 0, block_size - offset
    for _ in range(position):
        left -= 1
        if left == 0:
            number, left = number + 1, block_size
    return number


def pattern_mask(
    pattern: str,
    document_lengths: list[int],
    block_size: int,
    offset: int = 0,
    clean_ratio: float = 0.5,
    shown: list[int] | None = None,
) -> torch.Tensor:
    """Dense mask of one row, one pair at a time. shown: the token of each noisy position, -1 for none."""
    document, position = document_positions(document_lengths)
    seq_len = len(position)
    block = [block_of(p, block_size, offset) for p in position]
    shown = list(range(seq_len)) if shown is None else shown
    if pattern in ("causal", "tidar_split"):
        shown = []
    n_clean = [int(document_lengths[d] * clean_ratio) if pattern == "tidar_split" else seq_len for d in document]
    # what each position is: (kind, token)
    positions = [("clean" if position[t] < n_clean[t] else "split", t) for t in range(seq_len)]
    positions += [("noisy", t) for t in shown]
    mask = [[False] * len(positions) for _ in positions]  # a tensor's elements take ten times as long to write
    for at_q, (q_kind, q) in enumerate(positions):
        for at_k, (k_kind, k) in enumerate(positions):
            if q == -1 or k == -1:
                mask[at_q][at_k] = at_q == at_k
                continue
            if document[q] != document[k]:
                continue
            if (q_kind, k_kind) == ("clean", "clean"):
                sees = block[k] <= block[q] if pattern == "block_diffusion" else position[k] <= position[q]
            elif (q_kind, k_kind) == ("noisy", "clean"):
                sees = block[k] < block[q]
            elif (q_kind, k_kind) == ("noisy", "noisy"):
                sees = block[k] == block[q]
            elif (q_kind, k_kind) == ("split", "clean"):
                sees = True
            elif (q_kind, k_kind) == ("split", "split"):
                blocks = [block_of(position[t] - n_clean[t], block_size, offset) for t in (q, k)]
                sees = blocks[0] == blocks[1]
            else:
                sees = False
            mask[at_q][at_k] = sees
    return torch.tensor(mask)


def tidar_mask(document_lengths: list[int], block_size: int) -> torch.Tensor:
    """Dense mask of one row of TiDAR, clean half first."""
    return pattern_mask("tidar", document_lengths, block_size)


def tidar_targets(tokens, document_lengths: list[int], loss_mask, block_size: int, offset: int = 0):
    """(model position, label, weight, position in the block) of each target of one row: for AR, for diffusion."""
    ar, diffusion = [], []
    _, position = document_positions(document_lengths)
    for t, i in enumerate(position):
        if i > 0 and loss_mask[t] > 0:
            in_block = sum(block_of(j, block_size, offset) == block_of(i, block_size, offset) for j in range(i))
            ar.append((t - 1, tokens[t], loss_mask[t], in_block))
            diffusion.append((len(tokens) + t, tokens[t], loss_mask[t], in_block))
    return ar, diffusion


def random_lengths(rng: random.Random, seq_len: int) -> list[int]:
    """Document lengths that add up to seq_len."""
    lengths = []
    while sum(lengths) < seq_len:
        lengths.append(min(rng.choice([1, 2, 3, rng.randint(1, seq_len)]), seq_len - sum(lengths)))
    return lengths


def ids_of(document_lengths: list[int]) -> torch.Tensor:
    """Document ids `[1, seq_len]`."""
    return torch.tensor([[number for number, length in enumerate(document_lengths) for _ in range(length)]])


def random_pattern(name: str, rng: random.Random, block_size: int):
    """With experiments of its options, each on or off, and the numbers of the reference."""
    options = {} if name == "causal" else {"block_size": block_size, "mask_token_id": 99}
    if name == "tidar_split":
        options["clean_ratio"] = rng.choice([0.5, rng.uniform(0.01, 0.99)])
    if name != "causal" and rng.random() < 0.5:
        options |= {"block_sizes": [rng.randint(1, block_size), block_size], "random_block_offset": rng.random() < 0.7}
    if name in HALVES and rng.random() < 0.5:
        options["diffusion_share"] = rng.uniform(0.01, 1)
    return get_pattern(name, **options)


def expected_mask(name: str, pattern, documents: Documents, row: int, lengths: list[int]) -> torch.Tensor:
    """The reference's mask of a row, with what was drawn for it."""
    drawn = {}
    block_size = pattern.block_size
    if documents.blocks is not None:
        block_size, offset = documents.blocks.size[row].item(), documents.blocks.offset[row].item()
        shown = documents.blocks.tokens
        drawn = {"offset": offset, "shown": None if shown is None else shown[row].tolist()}
    return pattern_mask(name, lengths, block_size, clean_ratio=getattr(pattern, "clean_ratio", 0.5), **drawn)


def listed(block_mask, of: str) -> list[list[int]]:
    """The tiles that are listed for each row and tile of it, in their order. of: kv, full_kv, q or full_q."""
    counts, indices = getattr(block_mask, f"{of}_num_blocks"), getattr(block_mask, f"{of}_indices")
    return [row[:count] for count, row in zip(counts.flatten().tolist(), indices.flatten(0, 2).tolist())]
