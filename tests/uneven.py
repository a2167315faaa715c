"""python tests/uneven.py ARGS: tidar.train on a small corpus whose rows differ much in their number of targets."""

import numpy as np

from tidar import train
from tidar.data import SOURCES, Document
from tidar.data.source import Part, Source


class Uneven(Source):
    """Random documents, most of which have few targets."""

    needs_tokenizer = needs_paths = False

    def training_paths(self, paths: list[str]) -> list[str]:
        return ["uneven"]

    def parts(self, paths: list[str]) -> list[Part]:
        return [Part(0, ())]

    def documents(self, part: Part):
        random = np.random.default_rng(11)
        for _ in range(241):
            length = random.integers(1, 120)
            tokens = random.integers(0, 256, length) // 4 * 4
            tokens[-1] = 256
            yield Document(tokens, random.random(length) < random.random() ** 4)


SOURCES["uneven"] = Uneven
if __name__ == "__main__":
    train.main()
