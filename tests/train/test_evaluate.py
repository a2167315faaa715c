"""tidar.evaluate on a run: the scores of its own validation, and what decoding takes."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from results import read_metrics
from runs import train_run
from small_models import make_model

from tidar import evaluate
from tidar.decoding import load
from tidar.evaluation import decode, held_out_prompts
from tidar.patterns import PADDING


@pytest.fixture(scope="module")
def run(tmp_path_factory, uneven_data):
    """A run of few steps, in bfloat16, with rows that validation leaves out."""
    folder = tmp_path_factory.mktemp("run")
    make_model("qwen3", tie_word_embeddings=False, eos_token_id=None).save_pretrained(folder / "model")
    options = f"{uneven_data} --model.hf_path {folder / 'model'} --validation.enable --validation.share 0.3"
    options += " --validation.steps 2 --training.local_batch_size 2 --training.seq_len 32 --tidar.block_size 3"
    options += " --training.steps 4 --checkpoint.interval 2 --validation.freq 2 --optimizer.lr 1e-3"
    options += f" --training.mixed_precision_param bfloat16 --job.dump_folder {folder / 'run'}"
    train_run(options.split())
    return folder / "run"


def evaluated(run, capsys, *arguments: str) -> dict:
    output = run.parent / "evaluation.json"
    evaluate.main(["--output", str(output), *arguments])
    assert "tokens/forward" in capsys.readouterr().out
    return json.loads(output.read_text())


def test_the_scores_are_those_of_the_runs_own_validation(run, capsys):
    lines = {line["step"]: line for line in read_metrics(run) if "val/loss" in line}
    for step in (2, 4):
        found = evaluated(run, capsys, "--model", str(run / "checkpoint" / f"step-{step}"), "--n_prompts", "2")
        expected = {name: value for name, value in lines[step].items() if name.startswith("val/")}
        scores = {name: value for name, value in found["held_out"].items() if name.startswith("val/")}
        assert scores == expected and found["dtype"] == "bfloat16"


def test_counts_are_those_of_prompts_decoded_one_by_one(run, capsys):
    step = run / "checkpoint" / "step-4"
    found = evaluated(run, capsys, "--model", str(step), "--n_prompts", "5", "--max_new_tokens", "9")["decoding"]
    tokens, forwards, accepted = (found["tidar"][name] for name in ("tokens", "forwards", "accepted_lengths"))
    assert tokens == found["ar"]["tokens"] == 5 * 9 and found["ar"]["forwards"] == 5 * (9 + 1)
    assert found["tidar"]["tokens_per_forward"] == tokens / forwards
    assert sum(int(n) * steps for n, steps in accepted.items()) == tokens and sum(accepted.values()) == forwards - 5
    # texts that end early, alone and in batches
    engine = load(step, dtype=torch.float64)
    rng = random.Random(0)
    prompts = [[rng.randrange(200) for _ in range(rng.randint(1, 9))] for _ in range(12)]
    plain = engine.generate(prompts, 20, mode="ar")
    ends = {plain[0].tokens[4], plain[5].tokens[11]}
    decoded, texts = decode(engine, prompts, max_new_tokens=20, stop_token_ids=list(ends))
    for text, whole in zip(texts, plain):
        end = next((n for n, token in enumerate(whole.tokens, start=1) if token in ends), 20)
        assert text == whole.tokens[:end]
    assert decoded.tokens == sum(map(len, texts)) < 12 * 20
    one_by_one = [engine.generate([prompt], 20, stop_token_ids=list(ends))[0] for prompt in prompts]
    assert decoded.forwards == sum(completion.n_forwards for completion in one_by_one)


def test_held_out_prompts():
    rng = random.Random(0)
    for _ in range(200):
        seq_len, rows, expected = 12, [], []
        for row in range(rng.randint(1, 8)):
            length, first_target = rng.randint(1, seq_len), rng.randint(1, seq_len)
            tokens = list(range(100 * row, 100 * row + seq_len))
            ids = [0] * length + [rng.choice([1, PADDING])] * (seq_len - length)
            targets = [float(n >= first_target) for n in range(seq_len)]
            rows.append(tuple(map(torch.tensor, (tokens, ids, targets))))
            if first_target > 1:
                expected.append(tokens[: min(first_target, length)][-seq_len // 2 :])
            else:
                expected.append(tokens[: max(1, length // 2)])
        assert held_out_prompts(rows, 100) == expected
        n = rng.randint(1, len(rows))
        assert held_out_prompts(rows, n) == [expected[i * len(rows) // n] for i in range(n)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {run}/checkpoint/step-4 --run {run}/checkpoint", "holds no config.toml"),
        ("--model {model}", "lies in no run whose held-out data could be used; give --prompts or --run"),
        ("--model {model} --run {run}", 'no section "tidar"'),
        ("--model {run}/checkpoint/step-4 --prompts {empty}", "--prompts {empty}: holds no prompts"),
        ("--model {run}/checkpoint/step-4 --n_prompts 0", "--n_prompts 0: must be at least 1"),
        ("--model {run}/checkpoint/step-4 --max_new_tokens 0", "max_new_tokens = 0: must be at least 1"),
        ("--model {run}/checkpoint/step-4 --output {run}", "--output {run}: must be a file"),
        ("--model {run}/checkpoint/step-4 --tokenizer {run}", "must be bytes, or a local folder"),
    ],
)
def test_bad_input(run, tmp_path, arguments, message, capsys):
    (tmp_path / "empty").touch()
    places = SimpleNamespace(run=run, model=run.parent / "model", empty=tmp_path / "empty")
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--output", str(tmp_path / "x.json"), *arguments.format(**vars(places)).split()])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and message.format(**vars(places)) in error and len(error.splitlines()) <= 2
