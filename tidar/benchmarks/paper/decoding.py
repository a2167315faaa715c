"""What a trained run gives: scores under full masking, decoding of held-out prompts, and how good its texts are."""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tidar.benchmarks.paper.corpus import prepare_texts
from tidar.benchmarks.paper.runs import BY_SIZE, CAUSAL, Run, Scale, last_step, run_folder
from tidar.config import Config
from tidar.config.files import parse_json, write_atomically
from tidar.data import Corpus, load_tokenizer, make_rows
from tidar.decoding import Completion, Engine, load
from tidar.decoding.prompts import end_tokens
from tidar.distributed import compute_dtype, join_world, leave_world
from tidar.evaluation import held_out_prompts, measure_speed, n_new_tokens, validate
from tidar.evaluation.scores import scorer
from tidar.patterns import DECODABLE
from tidar.training.batches import Batches
from tidar.training.inputs import load_inputs
from tidar.training.plan import plan_run

LONGEST_PERIOD, LEAST_REPEATS, LEAST_LOOP = 32, 3, 32
# how decoding is asked; "ar" and "greedy" are to be equal
GREEDY: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "greedy": {},
    "greedy, trust diffusion": {"draft_mix": 0.0},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "ar, temperature 1": {"mode": "ar", "temperature": 1.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, trust diffusion": {"temperature": 1.0, "draft_mix": 0.0},
}
LOOKUP = 2  # tokens; see `Sampling`
LOOKED_UP: dict[str, dict[str, Any]] = {
    "greedy, lookup": {"lookup": LOOKUP},
    "temperature 1, lookup": {"temperature": 1.0, "lookup": LOOKUP},
}
EXACT_PROMPTS, EXACT_TOKENS = 16, 128  # decoded in float32, in which rounding should hardly ever change a greedy token
SPEED_PROMPTS = 8  # decoded one at a time
JUDGED_AT_ONCE = 8  # texts whose logits exist at one time


def loop_start(tokens: Sequence[int]) -> int:
    """Index from which a text repeats a pattern of at most LONGEST_PERIOD tokens, at least LEAST_REPEATS more times and
    for at least LEAST_LOOP tokens. The length of the text if it does not.
    """
    text, n = np.array(tokens), len(tokens)
    periods, index = np.arange(1, LONGEST_PERIOD + 1)[:, None], np.arange(n)
    needed = np.maximum(LEAST_REPEATS * periods, LEAST_LOOP)
    later, ends = index + periods, index + needed  # [periods, n]
    same = (later < n) & (text[later.clip(max=n - 1)] == text)
    sums = np.pad(same.cumsum(axis=1), ((0, 0), (1, 0)))
    repeats = np.take_along_axis(sums, ends.clip(max=n), axis=1) - sums[:, :-1] == needed
    found = np.flatnonzero((repeats & (ends <= n)).any(axis=0))
    return int(found[0]) if len(found) else n


def counts(completions: Sequence[Completion]) -> dict[str, Any]:
    """Tokens per forward pass of texts up to where each begins to loop, with its standard error over texts; that of
    whole texts; and the share of tokens that loop. by_text: tokens and forward passes of each up to there.

    The pass that reaches the loop is counted whole.
    """
    by_text = []
    for completion in completions:
        start = loop_start(completion.tokens)
        ends = list(itertools.accumulate(completion.accepted))
        passes = 1 + next((n for n, end in enumerate(ends, start=1) if end >= start), len(ends)) if start else 0
        by_text.append((start, passes))
    before_loops, whole = sum(tokens for tokens, _ in by_text), sum(len(one.tokens) for one in completions)
    passes, all_passes = sum(passes for _, passes in by_text), sum(one.n_forwards for one in completions)
    return {
        "tokens_per_forward": before_loops / passes if passes else 0.0,
        "error": ratio_error(by_text),
        "whole_texts": whole / all_passes,
        "looped": 1 - before_loops / whole,
        "tokens": whole,
        "forwards": all_passes,
        "by_text": by_text,
    }


def ratio_error(*by_text: Sequence[Sequence[int]]) -> float:
    """Standard error of the tokens per forward pass of some texts; given two decodings of the same prompts, that of
    the second one's relative to the first one's, minus 1: what both find hard or easy counts in neither.

    By the delta method: the relative change of a ratio is that of its numerator less that of its denominator.
    """
    influences = np.zeros(len(by_text[0]))
    ratio = 1.0
    for sign, counted in zip((1, -1), reversed(by_text)):
        tokens, forwards = np.array(counted, dtype=float).T
        if not tokens.sum():
            return 0.0
        ratio *= (tokens.sum() / forwards.sum()) ** sign
        influences += sign * (tokens / tokens.sum() - forwards / forwards.sum())
    return float(ratio * math.sqrt((influences**2).sum()))


def evaluate(config: Config, folder: Path, name: str, scale: Scale) -> None:
    """Writes evaluation.json of a finished run: see `read_evaluation`."""
    if config.tidar.pattern == "block_diffusion":  # neither half is trained to predict the next token
        _write(folder, name, {"decoding": {}, "seconds": 0.0})
        return
    started = time.monotonic()
    step = last_step(folder, name)
    inputs = load_inputs(config, prepares=False)
    prompts = held_out_prompts(make_rows(config, inputs.data)[1], scale.prompts)
    n_new = min(scale.new_tokens, n_new_tokens(config.training.seq_len))
    decodable = config.tidar.pattern in DECODABLE
    result: dict[str, Any] = {"prompts": prompts}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # texts: step by step, without a graph, whose capture would take longer than they do
    engine = load(step, dtype=compute_dtype(config, device), device=device, max_batch_size=scale.prompts, graph=False)
    options: dict[str, Any] = {"stop_token_ids": end_tokens(engine, inputs.tokenizer), "max_new_tokens": n_new}
    ways = GREEDY | SAMPLED | LOOKED_UP
    wanted = {how: asked for how, asked in ways.items() if decodable or asked.get("mode") == "ar"}
    completions = {how: engine.generate(prompts, **options, **asked) for how, asked in wanted.items()}
    result["decoding"] = {how: counts(found) for how, found in completions.items()}
    result["texts"] = {
        how: [completion.tokens[: loop_start(completion.tokens)] for completion in completions[how]]
        for how in SAMPLED.keys() & completions.keys()
    }
    if decodable:
        if config.tidar.pattern != "tidar":
            result["scores"] = _scores(config, engine, inputs)
        result["equal"] = _share_equal(completions["greedy"], completions["ar"])
        if name in BY_SIZE.values():
            fast = load(step, dtype=engine.dtype, device=device, max_batch_size=1)
            speeds = measure_speed(fast, prompts[:SPEED_PROMPTS], "tidar", **options)
            result["speed"] = {mode: decoded.tokens_per_second for mode, decoded in speeds.items()}
        exact = load(step, dtype=torch.float32, device=device, graph=False)
        options["max_new_tokens"] = min(n_new, EXACT_TOKENS)
        found = [
            exact.generate(prompts[:EXACT_PROMPTS], **options | ways[how]) for how in ("ar", "greedy", "greedy, lookup")
        ]
        result["exact_prompts"], result["equal_float32"] = len(found[0]), _share_equal(*found)
    _write(folder, name, result | {"seconds": time.monotonic() - started})


def _share_equal(*decoded: list[Completion]) -> float:
    """Share of the prompts whose texts are the same in all decodings."""
    texts = [[completion.tokens for completion in completions] for completions in decoded]
    return sum(all(text == others[0] for text in others) for others in zip(*texts, strict=True)) / len(texts[0])


def _scores(config: Config, engine: Engine, inputs: Any) -> dict[str, float]:
    """Validation with full masks, as decoding has them, whatever the run was trained with."""
    config.tidar.pattern = "tidar"
    plan = plan_run(config, 1, engine.device, inputs.spec.decoder, inputs.spec.mask_token_id)
    try:
        batches = Batches(plan, inputs.data, join_world(config))
        pattern, weights = plan.validation_pattern, plan.loss_weights
        score = scorer(engine.model, pattern, weights, config.training.loss_chunk_size)
        return validate(batches.validation(), score, pattern.block_size, weights, engine.device)
    finally:
        leave_world()


def _path(folder: Path, name: str) -> Path:
    return run_folder(folder, name) / "evaluation.json"


def _write(folder: Path, name: str, result: dict[str, Any]) -> None:
    write_atomically(_path(folder, name), json.dumps(result) + "\n")


def read_evaluation(folder: Path, name: str) -> dict[str, Any] | None:
    """Of a run, None where it is not evaluated.

    decoding: `counts` by how it was asked. scores: the `val/` scalars under full masking, where the run's own ones are
    under random masking. equal, equal_float32: share of the greedy texts that are those of autoregressive decoding.
    speed: tokens/s by mode, one prompt at a time, for one run of each block size. judged: mean loss of its sampled
    texts under the causal model, where `judge` has been called. seconds: that all this took.
    """
    try:
        return parse_json(_path(folder, name).read_bytes())
    except (OSError, ValueError):
        return None


@torch.no_grad()
def judge(folder: Path, names: list[str]) -> None:
    """Adds the causal model's mean loss of the sampled texts to the evaluations that do not have it yet.

    It is that of their new tokens after their prompts: what a reader that has never seen a draft makes of them.
    """
    waiting = {name: found for name in names if (found := read_evaluation(folder, name)) and "judged" not in found}
    if not waiting:
        return
    engine = load(last_step(folder, CAUSAL), graph=False)
    for name, found in waiting.items():
        judged = {}
        for how, texts in found.get("texts", {}).items():
            pairs = [(prompt, text) for prompt, text in zip(found["prompts"], texts) if text]
            parts = [pairs[at : at + JUDGED_AT_ONCE] for at in range(0, len(pairs), JUDGED_AT_ONCE)]
            total = sum(_loss(engine, part) for part in parts)
            judged[how] = total / max(1, sum(len(text) for _, text in pairs))
        _write(folder, name, found | {"judged": judged})


def _loss(engine: Engine, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Sum of the losses of texts after their prompts."""
    rows = [prompt + text for prompt, text in pairs]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=engine.device)
    logits = engine.model(tokens)
    total = 0.0
    for row, (prompt, text) in enumerate(pairs):
        predicted = logits[row, len(prompt) - 1 : len(prompt) + len(text) - 1].float()
        total += F.cross_entropy(predicted, torch.tensor(text, device=engine.device), reduction="sum").item()
    return total


def write_own_text(folder: Path, run: Run, temperature: float, config: Config, scale: Scale) -> tuple[Path, float]:
    """Completions of beginnings of training documents by the run that `run` continues, prepared, if they are not there.

    config: of `run`, with the corpus as its only data. Returns the prepared folder, and how often an epoch repeats it
    so that `run.own_share` of the tokens are of it. A text ends where it begins to loop.
    """
    name = run.starts_from
    prepared = folder / "own_text" / f"{name}-{temperature:g}"
    texts = prepared.parent / f"{prepared.name}.jsonl"
    if not texts.is_file():
        inputs = load_inputs(config, prepares=False)
        # so many at one time that the kernels take longer than their launch, and a graph would save nothing
        engine = load(last_step(folder, name), max_batch_size=1024, graph=False)
        prompts = held_out_prompts(make_rows(config, inputs.data)[0], scale.own_prompts)
        n_new = min(scale.new_tokens, n_new_tokens(config.training.seq_len))
        ends = end_tokens(engine, inputs.tokenizer)
        found = engine.generate(prompts, n_new, mode="ar", temperature=temperature, stop_token_ids=ends)
        decode = load_tokenizer(str(folder / "tokenizer")).decode
        own = (decode(prompt + text.tokens[: loop_start(text.tokens)]) for prompt, text in zip(prompts, found))
        texts.parent.mkdir(exist_ok=True)
        write_atomically(texts, "".join(json.dumps({"text": text}) + "\n" for text in own))
    n_own = prepare_texts(folder, texts, prepared, "none")  # most texts stop before their end
    n_corpus = Corpus.open(folder / "data" / "training", verify=False).meta["tokens"]
    return prepared, n_corpus / n_own * run.own_share / (1 - run.own_share)
