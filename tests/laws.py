"""The law of sampled tokens: the model's own probabilities, and whether samples follow them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch

LAWS = (dict(temperature=0.5), dict(temperature=1.3, top_k=3), dict(temperature=1.3, top_p=0.8))


def joint_law(
    model: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> dict[tuple[int, ...], float]:
    """Probability of each three tokens after a prompt, from causal passes over all of their beginnings.

    model: tokens to logits.
    """

    def law(texts: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor(texts))[:, -1].double() / temperature
        ranked = logits.sort(dim=-1, descending=True).values
        if top_k:
            logits = logits.masked_fill(logits < ranked[:, top_k - 1, None], -torch.inf)
        p = logits.softmax(dim=-1)
        ranked = p.sort(dim=-1, descending=True).values
        smallest = ranked.gather(1, ((ranked.cumsum(dim=-1) - ranked < top_p).sum(dim=-1) - 1)[:, None])
        p = p.where(p >= smallest, 0)
        return p / p.sum(dim=-1, keepdim=True)

    first = law([prompt])[0]
    vocab = range(len(first))
    second = law([[*prompt, a] for a in vocab])
    third = law([[*prompt, a, b] for a in vocab for b in vocab])
    joint = first[:, None, None] * second[:, :, None] * third.view(len(vocab), len(vocab), -1)
    return {(a, b, c): float(joint[a, b, c]) for a in vocab for b in vocab for c in vocab}


def check_law(samples: Sequence[Sequence[int]], law: dict[tuple[int, ...], float]) -> None:
    """By chi-square."""
    n, counts = len(samples), Counter(map(tuple, samples))
    assert all(law[sample] > 0 for sample in counts)
    # samples that are too rare for chi-square form one cell
    cells = [(counts[sample], n * p) for sample, p in law.items() if n * p >= 10]
    rare = n - sum(count for count, _ in cells), n - sum(expected for _, expected in cells)
    cells += [rare] if rare[1] >= 10 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    # one in 10,000 draws lies above, by the normal approximation of chi-square
    assert statistic < freedom + 3.8 * math.sqrt(2 * freedom), (statistic, freedom)
