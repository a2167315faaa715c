"""python tests/uneven.py ARGS: tidar.train on a small corpus whose rows differ much in their number of targets."""

import torch

from tidar import train
from tidar.data import SOURCES, Corpus, Vocabulary


def load(paths):
    generator = torch.Generator().manual_seed(11)

    def corpus(n_documents: int) -> Corpus:
        lengths = torch.randint(1, 120, (n_documents,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        tokens = torch.randint(0, 256, (int(offsets[-1]),), generator=generator) // 4 * 4
        share = (torch.rand(n_documents, generator=generator) ** 4).repeat_interleave(lengths)  # mostly few targets
        return Corpus(tokens, offsets, (torch.rand(len(tokens), generator=generator) < share).float())

    return corpus(200), corpus(41)


SOURCES["uneven"] = (Vocabulary(size=257, padding_token_id=256), load)

if __name__ == "__main__":
    train.main()
