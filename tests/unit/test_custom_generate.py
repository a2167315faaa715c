"""The exported custom_generate/generate.py under transformers, against the engine and plain decoding."""

import json
import random
from pathlib import Path

import pytest
import torch
from laws import LAWS, check_law, joint_law
from small_models import make_model, write_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from tidar.decoding import load
from tidar.models.huggingface import write_huggingface_folder


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers copies the file before it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def export(folder: Path, model, block_size: int, pattern: str = "tidar", **generation) -> Path:
    """Writes a model as if it had been trained. generation: options of its generation_config.json."""

    def write_assets(assets: Path) -> None:
        write_tokenizer(assets)
        method = {"pattern": pattern, "block_size": block_size, "mask_token_id": model.config.vocab_size - 1}
        (assets / "config.json").write_text(json.dumps(model.config.to_dict() | {"tidar": method}))
        (assets / "generation_config.json").write_text(json.dumps(generation))

    tensors = dict(model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_huggingface_folder(folder, shapes, torch.float32, lambda name: [tensors[name]], write_assets)
    return folder


def both(folder: Path, attention: str = "sdpa"):
    """The model with TiDAR's generate(), and plain."""
    return [
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, attn_implementation=attention)
        for trust in (True, False)
    ]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    most = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (most - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def random_prompts(rng: random.Random, n: int, most: int = 12) -> list[list[int]]:
    return [[rng.randrange(1, 260) for _ in range(rng.randint(1, most))] for _ in range(n)]


class Recorder:
    """A streamer and a record of what it got."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("block_size", "attention"), [(1, "sdpa"), (4, "sdpa"), (5, "eager")])
def test_greedy_equals_the_engine_and_plain_decoding(family, block_size, attention, tmp_path):
    """A ragged batch padded on the left, and one by one; and a streamer gets the prompt, then every token once."""
    rng = random.Random(block_size)
    folder = export(tmp_path / "out", make_model(family, tie_word_embeddings=block_size == 4), block_size)
    model, plain = both(folder, attention)
    prompts, options = random_prompts(rng, 4), dict(max_new_tokens=30, do_sample=False, pad_token_id=0)
    completions = load(folder).generate(prompts, 30)
    inputs, streamer = padded(prompts), Recorder()
    width = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, **options, streamer=streamer, return_dict_in_generate=True)
    assert output.sequences[:, width:].tolist() == [completion.tokens for completion in completions]
    assert output.n_forwards.tolist() == [completion.n_forwards for completion in completions]
    assert output.n_tokens.tolist() == [30] * 4
    assert block_size == 1 or min(output.n_forwards) < 31  # some drafts are accepted
    assert plain.generate(**inputs, **options).equal(output.sequences)
    assert torch.cat([streamer.values[0], *(value[:, None] for value in streamer.values[1:])], 1).equal(
        output.sequences
    )
    assert streamer.ended == 1
    for prompt, completion in zip(prompts, completions):
        assert model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() == completion.tokens


def test_options_mean_what_they_mean_in_plain_decoding(tmp_path):
    """Of the call and of the folder's generation_config.json, in batches and one by one."""
    rng = random.Random(0)
    model, plain = both(export(tmp_path / "out", make_model("qwen3", 1), 4))
    for _ in range(12):
        inputs = padded(random_prompts(rng, rng.choice([1, 3])))
        width = inputs["input_ids"].shape[1]
        likely = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[:, width:]
        choices = {
            "repetition_penalty": rng.choice([0.8, 1.3]),
            "eos_token_id": [int(likely[0, 7]), int(likely[-1, 3])],
            "min_new_tokens": rng.randint(1, 9),
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[int(likely[0, 2])], [int(likely[0, 0]), int(likely[0, 1])]],
            "exponential_decay_length_penalty": (2, 1.4),
            "suppress_tokens": [int(likely[0, 4])],
            "forced_eos_token_id": 5,
        }
        named = {name: choices[name] for name in rng.sample(list(choices), rng.randint(1, 3))}
        named |= {"eos_token_id": 7} if "exponential_decay_length_penalty" in named else {}
        options = GenerationConfig(pad_token_id=0, **named, do_sample=False)
        options.max_new_tokens, options.max_length = rng.choice([(rng.randint(1, 25), None), (None, width + 9)])
        ours, theirs = (found.generate(**inputs, generation_config=options) for found in (model, plain))
        assert ours.equal(theirs), options
        model.generation_config = plain.generation_config = options
        assert model.generate(**inputs).equal(theirs), options
        model.generation_config = plain.generation_config = GenerationConfig()


def test_the_folders_own_ends_and_limits_hold(tmp_path):
    inner = make_model("qwen2")
    likely = both(export(tmp_path / "first", inner, 4))[1].generate(torch.tensor([[9, 8]]), max_new_tokens=30)[0, 2:]
    end = max(likely.tolist(), key=likely.tolist().index)  # the token that comes first the latest
    options = dict(eos_token_id=[end, 3], pad_token_id=1, repetition_penalty=1.0, max_new_tokens=25)
    model, plain = both(export(tmp_path / "second", inner, 4, **options))
    inputs = padded([[9, 8], [7]])
    output = model.generate(**inputs, return_dict_in_generate=True)
    assert output.sequences.equal(plain.generate(**inputs))
    n = likely.tolist().index(end) + 1
    assert int(output.n_tokens[0]) == n and output.sequences[0, 2 : 2 + n].equal(likely[:n])
    assert set(output.sequences[0, 2 + n :].tolist()) <= {1}


class EndsAfter(StoppingCriteria):
    """Ends each sequence that holds one of the tokens behind its prompt."""

    def __init__(self, tokens: list[int], start: int):
        self.tokens, self.start, self.widths = tokens, start, []

    def __call__(self, input_ids, scores, **options):
        self.widths.append(input_ids.shape[1])
        return torch.isin(input_ids[:, self.start :], torch.tensor(self.tokens)).any(dim=1)


class Stateful(LogitsProcessor):
    """Forbids a token that depends on how often it was called."""

    def __init__(self):
        self.widths = []

    def __call__(self, input_ids, scores):
        self.widths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, scores[0].argsort(descending=True)[: len(self.widths) % 3]] = -torch.inf
        return scores


def test_criteria_and_processors_are_asked_token_by_token(tmp_path):
    """As often as in plain decoding, within a step too; and stop strings end in the middle of a step."""
    rng = random.Random(2)
    folder = export(tmp_path / "out", make_model("qwen2", 2), 6)
    model, plain = both(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for trial in range(6):
        inputs = padded(random_prompts(rng, 3))
        width = inputs["input_ids"].shape[1]
        options = dict(max_new_tokens=25, do_sample=False, pad_token_id=0)
        likely = plain.generate(**inputs, **options)[:, width:]
        stop = tokenizer.decode(likely[0, 4:6])
        if trial % 2 and stop.strip() and "\ufffd" not in stop:
            options |= dict(stop_strings=[stop], tokenizer=tokenizer)
        else:
            options |= dict(eos_token_id=int(likely[1, 9]))
        ends, processors = [int(row[rng.randrange(3, 9)]) for row in likely], (Stateful(), Stateful())
        criteria = EndsAfter(ends, width), EndsAfter(ends, width)
        one = {name: value[:1] for name, value in inputs.items()}
        ours, theirs = (
            [
                found.generate(**inputs, **options, stopping_criteria=[criterion]),
                found.generate(**one, max_new_tokens=15, logits_processor=[processor]),
            ]
            for found, criterion, processor in zip((model, plain), criteria, processors)
        )
        assert ours[0].equal(theirs[0]) and criteria[0].widths == criteria[1].widths
        assert ours[1].equal(theirs[1]) and processors[0].widths == processors[1].widths


@pytest.mark.parametrize("options", LAWS)
def test_joint_law_of_three_sampled_tokens(options, tmp_path):
    shape = dict(vocab_size=6, hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=2)
    inner = make_model("qwen3", 4, **shape, initializer_range=0.4)
    law = joint_law(lambda tokens: inner(tokens).logits, [1, 2, 3], **options)
    sampling = dict(do_sample=True, top_k=0, max_new_tokens=3) | options
    for block_size in (1, 4):
        model, _ = both(export(tmp_path / str(block_size), inner, block_size))
        torch.manual_seed(block_size)
        samples = model.generate(torch.tensor([[1, 2, 3]] * 4000), **sampling)
        check_law(samples[:, 3:].tolist(), law)


def test_sampled_tokens_do_not_depend_on_what_is_accepted(tmp_path):
    """The same seed gives the same tokens whatever the block size, with processors that look at tokens too."""
    inner, inputs = make_model("qwen2", 3), padded(random_prompts(random.Random(3), 3))
    for options in (dict(temperature=0.4), dict(temperature=0.6, top_p=0.9, repetition_penalty=1.1)):
        outputs = []
        for block_size in (1, 3, 8):
            folder = tmp_path / f"{len(options)}-{block_size}"
            model, _ = both(export(folder, inner, block_size))
            torch.manual_seed(0)
            settings = dict(do_sample=True, max_new_tokens=20, num_return_sequences=2) | options
            outputs.append(model.generate(**inputs, **settings).tolist())
        assert outputs[0] == outputs[1] == outputs[2] and len({tuple(row) for row in outputs[0]}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=3), "num_beams = 3: is no part of TiDAR decoding"),
        (dict(assistant_model=object()), "assistant_model: is no part"),
        (dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens = 2: is no part"),
        (dict(guidance_scale=1.5), "guidance_scale = 1.5: is no part"),
        (dict(output_scores=True), "output_scores = True: is no part"),
        (dict(cache_implementation="static"), "cache_implementation = 'static': is no part"),
        (dict(inputs_embeds=torch.zeros(1, 2, 48)), "inputs_embeds: is no part"),
        (dict(stop_strings="a"), "stop_strings = 'a': need the tokenizer"),
        (dict(attention_mask=torch.tensor([[1, 0]])), "must be padded on the left"),
        (dict(no_such_option=1), "no_such_option"),
    ],
)
def test_what_is_not_decoded_is_refused_by_name(options, message, tmp_path):
    model, _ = both(export(tmp_path / "out", make_model("qwen2"), 4))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, **options)
    assert "no_such" in message or "\n" not in str(error.value)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation = 'flash_attention_2'"):
        model.generate(torch.tensor([[1, 2]]))
