"""A model of lm-eval (extra eval): texts by the engine, log-likelihoods by one causal pass.

It encodes, truncates and stops as lm-eval's `HFLM` does, so that both answer the same.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tidar.config import UserError
from tidar.data.tokenizer import FolderTokenizer
from tidar.decoding import Engine
from tidar.evaluation.speed import Decoded
from tidar.losses.objective import Objective
from tidar.patterns import Targets

DEFAULT_CONTEXT, DEFAULT_NEW_TOKENS = 2048, 256
# target positions whose logits exist at a time
CHUNK = 1024
# generation options that change nothing at these values
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
Scored = tuple[Any, list[int], list[int]]  # the request's key, tokens of the context, tokens of the continuation


class EngineLM(TemplateLM):
    """`decoded`: by task, the counts of its texts. decoding: mode, seed and lookup, as of `Engine.stream`."""

    def __init__(self, engine: Engine, tokenizer: FolderTokenizer, **decoding: Any):
        super().__init__()
        self.engine, self.decoding = engine, decoding
        self.tokenizer: Any = tokenizer.backend
        self.name = tokenizer.name
        self.max_length = engine.context or DEFAULT_CONTEXT
        self.decoded: dict[str, Decoded] = {}
        self.objective = Objective({"ar": 1.0}, CHUNK)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Precedes a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text. A template that refuses a system turn gets the chat without it."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(turns, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """add_special_tokens: None as the tokenizer does, but not a second time before a text that has them."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    # log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each continuation, the sum of its tokens' log-probabilities, and whether each is the most likely one."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # longest first: what does not fit in memory fails at once
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        size = self.engine.max_batch_size
        for first in tqdm(range(0, len(order), size), desc="log-likelihoods", disable=disable_tqdm):
            batch = order[first : first + size]
            for number, answer in zip(batch, self._score([requests[number] for number in batch])):
                answers[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return answers

    @torch.no_grad()
    def _score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        """One causal pass. Padding follows all tokens that are scored."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [min(len(continuation), len(row) - 1) for row, (_, _, continuation) in zip(rows, requests)]
        width = max(map(len, rows)) - 1
        inputs = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in rows])
        ends = [width * number + len(row) - 1 for number, row in enumerate(rows)]
        index = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts)])
        labels = torch.tensor([token for row, count in zip(rows, counts) for token in row[len(row) - count :]])
        device = self.engine.device
        ones = torch.ones(len(index), device=device)
        targets = {"ar": Targets(index.to(device), labels.to(device), ones, torch.zeros_like(index, device=device))}
        denominators = {"ar": torch.ones((), device=device)}
        scores = self.engine.model(
            inputs.to(device),
            head=lambda hidden, weight: self.objective(hidden, weight, targets, denominators)[1]["ar"],
        )
        parts = zip(scores.nll.double().split(counts), scores.correct.split(counts))
        return [(-float(nll.sum()), bool(correct.all())) for nll, correct in parts]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's context that each see one token before them."""
        windows: list[Scored] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            found = list(get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1))
            windows += [(None, *make_disjoint_window(window)) for window in found]
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # texts

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as progress:
            for numbers in groups.values():
                for number, text in self._generate([requests[number] for number in numbers], numbers):
                    texts[number] = text
                    progress.update()
        return texts

    def _generate(self, requests: Sequence[Instance], numbers: Sequence[int]) -> Iterable[tuple[int, str]]:
        """Yields the number and the text of requests with the same options, as they end."""
        until, settings = self._settings(requests[0].task_name, requests[0].args[1])
        room = self.max_length - settings["max_new_tokens"]
        if room < 1:
            raise UserError(
                f"task {requests[0].task_name}: asks for {settings['max_new_tokens']} new tokens: must be below the "
                f"context of {self.engine.name}, {self.max_length} tokens"
            )
        prompts = [self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id] for request in requests]
        ends = dict.fromkeys([*self.engine.end_token_ids, self.eot_token_id])
        # a stop string that the newest token completes spans at most as many tokens as it has bytes
        reach = max(len(string.encode()) for string in until)

        def stop(_: int, tokens: list[int]) -> bool:
            newest = self.tokenizer.decode(tokens[-reach:], skip_special_tokens=False)
            return any(string in newest for string in until)

        options = settings | {"stop_token_ids": list(ends), "stop": stop, "indices": numbers}
        for completion in self.engine.stream(prompts, **options, **self.decoding):
            if completion.finished:
                request = requests[completion.index]
                self.decoded.setdefault(str(request.task_name), Decoded()).add(completion)
                text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                text = postprocess_generated_text(text, until, think_end_token=None)
                self.cache_hook.add_partial("generate_until", request.args, text)
                yield numbers[completion.index], text

    def _settings(self, task: str | None, options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Stop strings, and arguments of `Engine.stream`. Raises UserError for options that it does not have."""
        known = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = [text for text in handle_stop_sequences(known.pop("until", None), eos=eos) if text]
        settings = {"max_new_tokens": known.pop("max_gen_toks")}
        draws, temperature = known.pop("do_sample"), known.pop("temperature", None)
        limits = {"top_k": known.pop("top_k", 0), "top_p": known.pop("top_p", 1.0)}
        if draws:
            settings |= limits | {"temperature": 1.0 if temperature is None else temperature}
        for name, value in known.items():
            if NEUTRAL.get(name) != value and value is not None:
                raise UserError(f"task {task}: generation option {name} = {value}: is not supported by the engine")
        return until, settings
