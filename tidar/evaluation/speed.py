"""The cost of decoding: forward passes, tokens accepted in each, and time compared with autoregressive decoding."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tidar.decoding import Completion, Engine


@dataclass
class Decoded:
    """Counts over `prompts` prompts.

    tokens: new ones, up to the end of each text. forwards: forward passes of each text, prefill counted, summed up.
    accepted: by the number of tokens that a step added, how many steps. seconds: of all, 0 where it was not measured.
    """

    prompts: int = 0
    tokens: int = 0
    forwards: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, completion: Completion) -> None:
        self.prompts += 1
        self.tokens += len(completion.tokens)
        self.forwards += completion.n_forwards
        for n in completion.accepted:
            self.accepted[n] = self.accepted.get(n, 0) + 1

    @property
    def tokens_per_forward(self) -> float:
        """0 where nothing was decoded."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The time must have been measured."""
        return self.tokens / self.seconds

    def report(self) -> dict[str, Any]:
        """The counts as the JSON file holds them."""
        rate = {"tokens_per_second": self.tokens_per_second} if self.seconds else {}
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "accepted_lengths": {str(n): self.accepted[n] for n in sorted(self.accepted)},
            **rate,
        }


def decode(
    engine: Engine, prompts: Sequence[Sequence[int]], after_step: Callable[[], None] = lambda: None, **options: Any
) -> tuple[Decoded, list[list[int]]]:
    """Decodes prompts. Returns the counts and the new tokens of each. options: of `Engine.stream`.

    after_step: called after each step that has extended a text. Raises UserError as `Engine.stream` does.
    """
    decoded, texts = Decoded(), [[] for _ in prompts]  # type: tuple[Decoded, list[list[int]]]
    started = time.perf_counter()
    for completion in engine.stream(prompts, **options):
        after_step()
        if completion.finished:
            decoded.add(completion)
            texts[completion.index] = completion.tokens
    decoded.seconds = time.perf_counter() - started
    return decoded, texts


def measure_speed(engine: Engine, prompts: Sequence[Sequence[int]], mode: str, **options: Any) -> dict[str, Decoded]:
    """Decodes prompts in `mode` and autoregressively, and measures both. options: of `Engine.stream`; autoregressive
    decoding has no drafts, so no `lookup`.

    Raises UserError as `Engine.stream` does.
    """
    measured = {}
    longest = sorted(prompts, key=len)[-engine.max_batch_size :]
    for name in dict.fromkeys([mode, "ar"]):
        # of `mode` itself a lookup may be refused; what it is compared with goes without
        asked = options | {"lookup": 0} if name != mode else options
        # compiles and captures what will be measured: as many sequences of the same length, one token of each
        decode(engine, longest, mode=name, **asked | {"stop": lambda *_: True})
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        measured[name], _ = decode(engine, prompts, mode=name, **asked)
    return measured
