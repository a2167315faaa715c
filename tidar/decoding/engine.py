"""The decoding engine: batches of sequences of any lengths, each with its own acceptance and end."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tidar.config import UserError
from tidar.decoding.cache import KeyValueCache
from tidar.decoding.forward import Forward, State
from tidar.decoding.lookup import LONGEST
from tidar.decoding.sampling import Sampling, prompt_key
from tidar.models import Decoder
from tidar.patterns import DECODABLE

Mode = Literal["tidar", "ar"]
# called after each token with the index of the prompt and its new tokens so far; True ends the sequence
Stop = Callable[[int, list[int]], bool]

SMALLEST_CAPACITY, SMALLEST_PROMPT = 256, 128
# tokens of one prefill, padding included, where it has several prompts
PREFILL_TOKENS = 2**15


@dataclass
class Completion:
    """What was generated after one prompt.

    `index`: of the prompt. `tokens`: the new ones, with the end token. `n_forwards`: forward passes, with the prefill.
    `accepted`: how many tokens each step committed; their sum is the number of tokens. `finished`: False while the
    engine still extends it. `cut_off`: finished by max_new_tokens alone.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    n_forwards: int = 1
    accepted: list[int] = field(default_factory=list)
    finished: bool = False
    cut_off: bool = False


@dataclass(frozen=True)
class _Task:
    """What a stream has to complete. keys: random keys of the prompts, see `prompt_key`. The rest is as of `stream`."""

    prompts: Sequence[Sequence[int]]
    keys: list[int]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    stop: Stop | None


@dataclass(frozen=True)
class Method:
    """How a TiDAR model was trained: the `tidar` section of its config.json."""

    pattern: str
    block_size: int
    mask_token_id: int


class Engine:
    """Decodes with a TiDAR model (`mode="tidar"`) or with any decoder (`mode="ar"`).

    model: a decoder in the dtype and on the device to decode with. name: of the model, for messages. method: None if it
    is not a TiDAR model. context: its longest sequence, None if unknown. max_batch_size: sequences decoded at a time.
    graph: capture each step in a CUDA graph, with compiled layers (default: on CUDA).
    """

    def __init__(
        self,
        model: Decoder,
        method: Method | None = None,
        name: str = "model",
        context: int | None = None,
        end_token_ids: Sequence[int] = (),
        max_batch_size: int = 32,
        graph: bool | None = None,
    ):
        self.model, self.method, self.name, self.context = model, method, name, context
        self.end_token_ids = tuple(end_token_ids)
        self.max_batch_size = max_batch_size
        weight = model.output_weight()
        self.dtype, self.device = weight.dtype, weight.device
        self.graph = self.device.type == "cuda" if graph is None else graph
        self._last: tuple[tuple, Forward] | None = None

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options) -> list[Completion]:
        """Completes prompts, one `Completion` each, in their order. Arguments as of `stream`."""
        completions = {completion.index: completion for completion in self.stream(prompts, max_new_tokens, **options)}
        return [completions[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
        draft_mix: float = 1.0,
        mode: Mode = "tidar",
        stop: Stop | None = None,
        indices: Sequence[int] | None = None,
        lookup: int = 0,
    ) -> Iterator[Completion]:
        """Completes prompts, lists of token ids: any number of them, of any lengths. Yields a `Completion` after each
        step that has extended it; its last `accepted[-1]` tokens are new.

        max_new_tokens: new tokens of each, unless a stop token or `stop` ends it before. temperature 0: greedy. top_k 0
        and top_p 1: no limit. seed: a drawn token is a function of the model, the seed, the index of its prompt and
        its position alone. draft_mix, lookup: see `Sampling`; of draft_mix only 1 is lossless, lookup always is.
        stop: see `Stop`.
        indices: numbers of the prompts, of which their draws are a function (default: 0, 1, 2 …).

        Raises UserError, before the first forward pass, for arguments out of range and for a prompt that is empty,
        holds an id outside the vocabulary, or with max_new_tokens is longer than the context.
        """
        sampling = Sampling(temperature, top_k, top_p, draft_mix, lookup)
        indices = range(len(prompts)) if indices is None else indices
        self.check(prompts, max_new_tokens, sampling, mode, indices)
        keys = [prompt_key(seed, index) for index in indices]
        if not prompts:
            return iter(())
        task = _Task(prompts, keys, max_new_tokens, frozenset(stop_token_ids), stop)
        return self._stream(task, mode, sampling)

    def _stream(self, task: _Task, mode: Mode, sampling: Sampling) -> Iterator[Completion]:
        length = max(map(len, task.prompts)) + task.max_new_tokens
        with self._forward(len(task.prompts), length, mode, sampling) as forward:
            yield from self._steps(forward, task)

    def _steps(self, forward: Forward, task: _Task) -> Iterator[Completion]:
        state = forward.state
        state.active.zero_()
        waiting = deque(enumerate(task.prompts))
        rows: list[Completion | None] = [None] * len(state.lengths)
        running: tuple[list[Completion | None], Callable] | None = None
        while True:
            for row, completion in enumerate(rows):
                if completion is not None and completion.finished:
                    rows[row] = None
                    state.active[row] = False
            free = [row for row, completion in enumerate(rows) if completion is None]
            admitted = [(row, *waiting.popleft()) for row in free[: len(waiting)]]
            for padded, group in self._by_length(admitted):
                forward.prefill(
                    [row for row, _, _ in group],
                    [list(prompt) for _, _, prompt in group],
                    [task.keys[index] for _, index, _ in group],
                    padded,
                )
            for row, index, _ in admitted:
                rows[row] = Completion(index)
            started = None
            if any(rows):
                forward.step()
                started = list(rows), _to_host(forward.verified, forward.accepted)
            # on a GPU the host looks at a step while the device computes the next one
            if self.device.type == "cuda":
                started, running = running, started
            if started is None and running is None:
                return
            if started is None:
                continue
            for completion, draft, accepted in zip(started[0], *started[1]()):
                # a sequence that finished in the previous step was still part of this one
                if completion is not None and not completion.finished:
                    yield _extend(completion, draft[:accepted], task)

    def _by_length(self, admitted: list[tuple[int, int, Sequence[int]]]) -> Iterator[tuple[int, list]]:
        """Groups (row, index, prompt) into prefills: the length that their prompts are padded to, and the group."""
        if self.device.type != "cuda":
            if admitted:
                yield max(len(prompt) for _, _, prompt in admitted), admitted
            return
        groups: dict[int, list] = {}
        for item in admitted:
            groups.setdefault(_power_of_two(len(item[2]), SMALLEST_PROMPT), []).append(item)
        for padded, group in groups.items():
            size = max(1, PREFILL_TOKENS // padded)
            for first in range(0, len(group), size):
                yield padded, group[first : first + size]

    @contextmanager
    def _forward(self, n_prompts: int, length: int, mode: Mode, sampling: Sampling) -> Iterator[Forward]:
        """Forward passes for `n_prompts` sequences of at most `length` tokens, kept for the same shapes.

        A stream that begins before another one has ended gets its own.
        """
        method = self.method if mode == "tidar" else None
        block_size = method.block_size if method else 1
        # a step writes a whole block after the last token, and one more step may have been started
        capacity, batch = length + 2 * block_size, min(n_prompts, self.max_batch_size)
        if self.device.type == "cuda":  # few shapes, for each is compiled and captured
            capacity = _power_of_two(capacity, SMALLEST_CAPACITY)
            batch = min(_power_of_two(batch, 1), self.max_batch_size)
        key = (batch, capacity, mode, sampling)
        forward = self._last[1] if self._last and self._last[0] == key else None
        self._last = None  # frees its cache before another one is allocated
        if forward is None:
            scratch = block_size**2 if method else 0
            forward = Forward(
                self.model,
                self._allocate(batch, capacity, scratch),
                State.empty(batch, block_size, capacity, self.device),
                method.mask_token_id if method else 0,
                method is not None,
                sampling,
                self.graph,
            )
        try:
            yield forward
        finally:
            self._last = key, forward

    def _allocate(self, batch: int, capacity: int, scratch: int) -> KeyValueCache:
        try:
            return KeyValueCache.allocate(self.model.config, batch, capacity, scratch, self.dtype, self.device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.name}: no memory for the cache of {batch} sequences of {capacity} tokens",
                "fewer prompts at a time (max_batch_size) or shorter ones need less",
            ) from None

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        mode: str,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Raises UserError for what `stream` cannot decode."""
        for name, value, right, allowed in (
            ("mode", mode, mode in get_args(Mode), "tidar or ar"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "at least 0"),
            ("top_k", sampling.top_k, sampling.top_k >= 0, "at least 0"),
            ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
            ("draft_mix", sampling.draft_mix, 0 <= sampling.draft_mix <= 1, "from 0 to 1"),
            ("lookup", sampling.lookup, sampling.lookup in range(LONGEST + 1), f"a whole number from 0 to {LONGEST}"),
        ):
            if not right:
                raise UserError(f"{name} = {value}: must be {allowed}")
        if mode == "ar":
            for name, given, only in (("draft_mix", sampling.draft_mix, 1), ("lookup", sampling.lookup, 0)):
                if given != only:
                    raise UserError(f'{name} = {given}: must be {only} with mode = "ar", which has no drafts')
        if mode == "tidar":
            self._check_method()
        vocab_size = self.model.config.vocab_size
        for index, prompt in zip(range(len(prompts)) if indices is None else indices, prompts, strict=True):
            if len(prompt) == 0:
                raise UserError(f"prompt {index}: is empty: must hold at least one token")
            if not (0 <= min(prompt) and max(prompt) < vocab_size):
                wrong = next(token for token in prompt if not 0 <= token < vocab_size)
                raise UserError(f"prompt {index}: holds token id {wrong}: must be from 0 to {vocab_size - 1}")
            if self.context and len(prompt) + max_new_tokens > self.context:
                raise UserError(
                    f"prompt {index}: its {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed the "
                    f"context of {self.name}, {self.context} tokens"
                )

    def _check_method(self) -> None:
        """Raises UserError for a model that cannot be decoded with `mode="tidar"`."""
        if self.method is None:
            raise UserError(
                f'{self.name}: config.json has no section "tidar", so it is not a TiDAR model; use mode = "ar"'
            )
        if self.method.pattern not in DECODABLE:
            raise UserError(
                f"{self.name}: was trained with pattern {self.method.pattern}, which the engine does not decode "
                f'(it decodes {", ".join(DECODABLE)}); use mode = "ar"'
            )


def _extend(completion: Completion, tokens: list[int], task: _Task) -> Completion:
    """Adds the tokens of a step one by one, up to the first that ends the sequence."""
    completion.n_forwards += 1
    before = len(completion.tokens)
    for token in tokens:
        completion.tokens.append(token)
        ended = token in task.stop_token_ids or bool(task.stop and task.stop(completion.index, completion.tokens))
        completion.finished = ended or len(completion.tokens) == task.max_new_tokens
        completion.cut_off = completion.finished and not ended
        if completion.finished:
            break
    completion.accepted.append(len(completion.tokens) - before)
    return completion


def _to_host(*tensors: Tensor) -> Callable[[], list[list]]:
    """Starts to copy tensors to the host; the result waits for them and returns them as lists."""
    if tensors[0].device.type != "cuda":
        lists = [tensor.tolist() for tensor in tensors]
        return lambda: lists
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[list]:
        copied.synchronize()
        return [copy.tolist() for copy in copies]

    return wait


def _power_of_two(number: int, smallest: int) -> int:
    return max(smallest, 1 << (number - 1).bit_length())
