"""Slow references in plain loops, written from the paper's rules and not from the code under test."""

import random

import torch


def tidar_mask(document_lengths: list[int], block_size: int) -> torch.Tensor:
    """Dense mask of one row, one position at a time: clean half first."""
    seq_len = sum(document_lengths)
    document, place = [], []
    for number, length in enumerate(document_lengths):
        document += [number] * length
        place += range(length)
    mask = torch.zeros(2 * seq_len, 2 * seq_len, dtype=torch.bool)
    for q in range(seq_len):
        for k in range(seq_len):
            if document[q] != document[k]:
                continue
            i, j = place[q], place[k]
            block_start = i - i % block_size
            block_end = block_start + block_size
            mask[q, k] = j <= i
            mask[seq_len + q, k] = j < block_start
            mask[seq_len + q, seq_len + k] = block_start <= j < block_end
    return mask


def tidar_targets(tokens, document_lengths: list[int], loss_mask, block_size: int):
    """(model position, label, weight, place in the block) of each target of one row: for AR, for diffusion."""
    ar, diffusion, start = [], [], 0
    for length in document_lengths:
        for i in range(1, length):
            t = start + i
            if loss_mask[t] > 0:
                ar.append((t - 1, tokens[t], loss_mask[t], i % block_size))
                diffusion.append((len(tokens) + t, tokens[t], loss_mask[t], i % block_size))
        start += length
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
