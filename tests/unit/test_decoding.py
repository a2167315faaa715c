"""Decoding against a slow reference in plain loops, against transformers, and against itself."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from laws import LAWS, check_law, joint_law
from small_models import make_model

from tidar import masks
from tidar.decoding import Engine, Method, load
from tidar.decoding.lookup import look_up
from tidar.decoding.sampling import Sampling
from tidar.models import Decoder, DecoderConfig, initialize

MASK = 22


def random_engine(rng: random.Random, block_size: int, dtype: torch.dtype = torch.float64, **shape) -> Engine:
    """A random small model of the Qwen2 or Qwen3 form, sharp enough that drafts are accepted and rejected."""
    qwen3, n_kv_heads = rng.random() < 0.5, rng.choice([1, 2])
    options = dict(
        vocab_size=23,
        dim=24,
        n_layers=rng.choice([1, 2, 3]),
        n_heads=n_kv_heads * rng.choice([1, 2, 3]),
        n_kv_heads=n_kv_heads,
        head_dim=8,
        hidden_dim=32,
        qkv_bias=not qwen3,
        o_bias=False,
        qk_norm=qwen3,
        tie_embeddings=rng.random() < 0.5,
        rope_theta=100.0,
        initializer_range=0.4,
    )
    model = Decoder(DecoderConfig(**options | shape)).to(dtype)
    initialize(model, rng.randrange(2**30))
    return Engine(model.eval(), Method("tidar", block_size, MASK), max_batch_size=rng.choice([1, 2, 4]))


def slow_lookup(known: list[int], shortest: int, count: int) -> list[int] | None:
    """What followed the longest earlier copy of the end of `known`, the newest of equal ones; None without a copy."""
    best, newest = 0, 0
    for end in range(1, len(known)):
        length = 0
        while length < min(end, 8) and known[end - 1 - length] == known[-1 - length]:
            length += 1
        if length >= max(best, shortest):
            best, newest = length, end
    if not best:
        return None
    text = list(known)
    for _ in range(count):
        text.append(text[newest + len(text) - len(known)])
    return text[len(known) :]


def slow_decode(
    engine: Engine, prompt: list[int], n_new: int, choose, lookup: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Decoding without a cache: the whole sequence in each pass. Returns the tokens and the draft of each step.

    choose: (logits, position) -> token. Group k of a step with L committed tokens stands at L+k … L+k+B-1.
    """
    block, model = engine.method.block_size, engine.model

    def forward(committed: list[int], draft: list[int], groups: list[int]) -> torch.Tensor:
        """Logits of all positions; groups: for each, how many tokens of the draft it sees."""
        n = len(committed) + len(draft)
        tokens, positions, owners = committed + draft, list(range(n)), [None] * n
        for seen in groups:
            for j in range(block):
                tokens, positions, owners = tokens + [MASK], positions + [len(committed) + seen + j], owners + [seen]
        mask = [[False] * len(tokens) for _ in tokens]
        for q in range(len(tokens)):
            for k in range(len(tokens)):
                if q < n:
                    mask[q][k] = k <= q
                elif k < n:
                    mask[q][k] = k < len(committed) + owners[q]
                else:
                    mask[q][k] = owners[q] == owners[k]
        ids, position_ids = torch.tensor([tokens]), torch.tensor([positions])
        with torch.no_grad():
            return model(ids, position_ids, torch.tensor(mask)[None, None])[0]

    def drafted(logits: torch.Tensor, first: int, token: int) -> list[int]:
        copied = slow_lookup([*committed, token], lookup, block - 1) if lookup else None
        return [token, *(copied or [int(logits[first + j].argmax()) for j in range(1, block)])]

    committed, steps, drafts = list(prompt), [], []
    logits = forward(committed, [], [0])
    draft = drafted(logits, len(prompt), choose(logits[len(prompt) - 1], len(prompt)))
    while sum(map(len, steps)) < n_new:
        drafts.append(draft)
        length = len(committed)
        logits = forward(committed, draft, list(range(1, block + 1)))
        for accepted in range(1, block + 1):
            token = choose(logits[length + accepted - 1], length + accepted)
            if accepted == block or draft[accepted] != token:
                break
        steps.append(draft[:accepted])
        committed += draft[:accepted]
        draft = drafted(logits, length + block + (accepted - 1) * block, token)
    return steps, drafts


def greedy(logits: torch.Tensor, position: int) -> int:
    return int(logits.argmax())


@pytest.mark.parametrize("block_size", range(1, 9))
def test_greedy_equals_the_slow_reference(block_size):
    rng = random.Random(block_size)
    for _ in range(2):
        engine = random_engine(rng, block_size)
        prompts = [[rng.randrange(22) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 5))]
        n_new = rng.randint(1, 20)
        for prompt, completion in zip(prompts, engine.generate(prompts, n_new)):
            steps, _ = slow_decode(engine, prompt, n_new, greedy)
            tokens = sum(steps, [])[:n_new]
            assert completion.tokens == tokens
            accepted = [len(step) for step in steps]
            accepted[-1] -= sum(accepted) - n_new
            assert completion.accepted == accepted and completion.n_forwards == 1 + len(steps)


def slow_draw(engine: Engine, seed: int, index: int, temperature: float, top_k: int, top_p: float):
    """Inverse transform sampling in plain loops; its uniform number is splitmix64 in Python's integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def hashed(x: int) -> int:
        return mix((x + 0x9E3779B97F4A7C15) % 2**64)

    key = hashed(hashed(seed) + index)

    def choose(logits: torch.Tensor, position: int) -> int:
        uniform = (mix((key + position * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
        logits = [float(logit) / temperature for logit in logits]
        ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        kept = ranked[: top_k or len(ranked)]
        weights = {token: math.exp(logits[token] - logits[ranked[0]]) for token in kept}
        total, before, nucleus = sum(weights.values()), 0.0, {}
        for token in kept:
            if before < top_p * total:
                nucleus[token] = weights[token]
            before += weights[token]
        threshold, reached = uniform * sum(nucleus.values()), 0.0
        for token in sorted(nucleus):
            reached += nucleus[token]
            if reached > threshold:
                return token
        raise AssertionError("the probabilities sum to less than the draw")

    return choose


def test_sampled_equals_the_slow_reference():
    rng = random.Random(0)
    for trial in range(10):
        engine = random_engine(rng, rng.randint(1, 8))
        prompts = [[rng.randrange(22) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 4))]
        options = dict(temperature=rng.uniform(0.3, 2), top_k=rng.choice([0, 1, 5]), top_p=rng.choice([1.0, 0.7]))
        seed, n_new = rng.randrange(2**62), rng.randint(1, 16)
        for index, completion in enumerate(engine.generate(prompts, n_new, seed=seed, **options)):
            steps, _ = slow_decode(engine, prompts[index], n_new, slow_draw(engine, seed, index, **options))
            assert completion.tokens == sum(steps, [])[:n_new], (trial, options)
            assert completion.n_forwards == 1 + len(steps)


@pytest.mark.parametrize("lookup", [0, 1, 2])
def test_drafts_equal_the_slow_reference(lookup):
    """The drafts themselves, that are rejected too; of the prompts some repeat themselves, or have every token."""
    rng = random.Random(1)
    for _ in range(5 if lookup == 0 else 3):
        engine = random_engine(rng, rng.randint(2, 8))
        prompt, n_new = [rng.randrange(rng.choice([3, 22])) for _ in range(rng.randint(1, 9))] * rng.randint(1, 4), 12
        prompt = prompt if lookup != 1 else rng.sample(range(23), 23)
        _, drafts = slow_decode(engine, prompt, n_new, greedy, lookup)
        with engine._forward(1, len(prompt) + n_new, "tidar", Sampling(lookup=lookup)) as forward:
            forward.prefill([0], [prompt], [0], padded=len(prompt) + rng.randint(0, 5))
            for draft in drafts:
                assert forward.state.draft[0].tolist() == draft
                forward.step()


def test_output_depends_on_seed_prompt_and_index_alone():
    """Not on batch mates, batch size, block size or mode, nor on where a sequence ends; greedy and sampled."""
    rng = random.Random(2)
    for _ in range(2):
        engine = random_engine(rng, 4, torch.float32)
        prompts = [[rng.randrange(22) for _ in range(rng.randint(1, 30))] for _ in range(7)]
        for options in (dict(), dict(temperature=1.1, top_p=0.9, seed=5)):
            expected = [c.tokens for c in engine.generate(prompts, 24, **options, mode="ar")]
            for block_size, batch in ((4, 1), (4, 7), (1, 7), (3, 2), (8, 4)):
                engine.method, engine.max_batch_size = replace(engine.method, block_size=block_size), batch
                completions = engine.generate(prompts, 24, **options)
                assert [c.tokens for c in completions] == expected
                shorter = engine.generate(prompts, 5, **options)
                assert [c.tokens for c in shorter] == [tokens[:5] for tokens in expected]
            stops = {tokens[10] for tokens in expected[:2]}
            for completion, tokens in zip(engine.generate(prompts, 24, stop_token_ids=stops, **options), expected):
                end = next((i for i, token in enumerate(tokens) if token in stops), 23)
                assert completion.tokens == tokens[: end + 1] and sum(completion.accepted) == end + 1


def test_look_up_equals_the_slow_reference():
    """Rows of few different tokens, with any tokens after the known ones."""
    rng, found = random.Random(5), set()
    for _ in range(100):
        capacity, shortest, count = rng.randint(1, 60), rng.choice([1, 2, 3, 8]), rng.randint(0, 7)
        rows = [[rng.randrange(n_tokens) for _ in range(capacity)] for n_tokens in (2, 3, 9)]
        n_known = [rng.randint(1, capacity) for _ in rows]
        are_found, following = look_up(torch.tensor(rows), torch.tensor(n_known), shortest, count)
        assert following.shape == (3, count)
        for row, n, is_found, tokens in zip(rows, n_known, are_found.tolist(), following.tolist()):
            expected = slow_lookup(row[:n], shortest, count)
            assert is_found == (expected is not None) and (not is_found or tokens == expected)
            found.add(is_found)
    assert found == {True, False}


def test_lookup_changes_no_token():
    """Greedy and sampled, with more prompts than rows, whose texts must not meet; and it saves forward passes."""
    rng, passes = random.Random(4), [0, 0]
    for _ in range(3):
        engine = random_engine(rng, rng.randint(2, 8), torch.float32)
        prompts = [[rng.randrange(5) for _ in range(rng.randint(1, 30))] for _ in range(7)]
        for options in (dict(), dict(temperature=0.8, seed=1)):
            plain = engine.generate(prompts, 24, **options)
            for lookup in (1, 3):
                found = engine.generate(prompts, 24, lookup=lookup, **options)
                assert [one.tokens for one in found] == [one.tokens for one in plain]
                single = engine.generate([prompts[6]], 24, lookup=lookup, indices=[6], **options)[0]
                assert single.accepted == found[6].accepted
                if lookup == 1 and not options:
                    passes = [n + sum(one.n_forwards for one in ones) for n, ones in zip(passes, (plain, found))]
    assert passes[1] < 0.9 * passes[0]


def test_rows_that_have_ended_write_within_their_bounds():
    """On a GPU such a row is part of two more steps, as far behind its end as drafts reach."""
    for block_size in (1, 8):
        engine = random_engine(random.Random(0), block_size)
        with engine._forward(2, 9, "tidar", Sampling(lookup=1)) as forward:
            forward.prefill([0, 1], [[1, 2, 1], [3]], [0, 0], padded=3)
            forward.state.lengths.fill_(forward.cache.capacity - 1)
            forward.state.active.fill_(False)
            forward.step()


def test_streams_of_one_engine_do_not_meet():
    """Two side by side, a third that is abandoned, and a call between their steps; at a temperature near 0."""
    rng = random.Random(3)
    engine = random_engine(rng, 4, torch.float32)
    prompts = [[rng.randrange(22) for _ in range(9)] for _ in range(3)]
    expected = [engine.generate([prompt], 20)[0].tokens for prompt in prompts]
    streams = [engine.stream([prompt], 20) for prompt in prompts]
    for stream in streams:
        next(stream)
    assert engine.generate(prompts[2:], 20, temperature=1e-310)[0].tokens == expected[2]
    assert [list(stream)[-1].tokens for stream in streams[:2]] == expected[:2]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("models", "n"), [(1, 6), pytest.param(5, 20, marks=pytest.mark.long)])
def test_greedy_equals_transformers(family, models, n, tmp_path):
    rng = random.Random(family)
    for seed in range(models):
        reference = make_model(family, seed, tie_word_embeddings=seed % 2 == 0).eval()
        reference.save_pretrained(tmp_path / str(seed))
        engine = load(tmp_path / str(seed))
        engine.method = Method("tidar", 4, mask_token_id=299)
        prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 40))] for _ in range(n)]
        for mode in ("tidar", "ar"):
            for prompt, completion in zip(prompts, engine.generate(prompts, 20, mode=mode)):
                ids = torch.tensor([prompt])
                options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
                # without a mask, generate takes tokens of a prompt for padding
                expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
                assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_the_picture_of_a_step_equals_the_loops(capsys, monkeypatch):
    """A draft token sees what is before it; group k the first k tokens of the draft, and itself."""
    for block, committed in ((1, 1), (2, 3), (3, 3), (4, 2)):
        options = f"show --pattern decode --block_size {block} --seq_len {committed} --format csv"
        monkeypatch.setattr("sys.argv", ["masks", *options.split()])
        masks.main()
        shown = [list(map(int, line.split(","))) for line in capsys.readouterr().out.splitlines()]
        clean = committed + block
        for q in range(clean + block * block):
            for k in range(clean + block * block):
                group = (q - clean) // block + 1
                expected = (
                    k <= q if q < clean else k < committed + group if k < clean else (k - clean) // block + 1 == group
                )
                assert shown[q][k] == expected, (block, q, k)


@pytest.mark.parametrize("n", [4_000, pytest.param(200_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("options", LAWS)
def test_joint_law_of_three_tokens(options, n):
    """The first three tokens of many samples against the model's own probabilities, by chi-square."""
    engine = random_engine(random.Random(3), 1, torch.float32, vocab_size=6, dim=8, n_layers=1, hidden_dim=8)
    engine.max_batch_size = 2000
    law = joint_law(engine.model, [1, 2, 3], **options)
    for block_size in (1, 2, 4):
        engine.method = Method("tidar", block_size, mask_token_id=5)
        completions = engine.generate([[1, 2, 3]] * n, 3, seed=block_size, **options)
        check_law([completion.tokens for completion in completions], law)


def test_any_number_of_shapes_is_compiled(monkeypatch):
    """As before a CUDA graph is captured, in plain Python: the parts of a step, once for each (batch, capacity)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    engine = random_engine(random.Random(0), 2, n_layers=1)
    for capacity in range(16, 34, 2):
        with engine._forward(1, capacity, "tidar", Sampling()) as forward, forward._compiled():
            forward._step()
    torch._dynamo.reset()
