"""tidar.evaluate on a run: the scores of its own validation, and what decoding takes."""

import importlib.metadata
import io
import json
import random
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from results import read_metrics
from runs import train_run
from small_models import make_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tidar import check, evaluate
from tidar.config import UserError, load_config
from tidar.decoding import load
from tidar.evaluation import decode, held_out_prompts
from tidar.patterns import PADDING
from tidar.training.plan import plan_run


@pytest.fixture(scope="module")
def options(tmp_path_factory, uneven_data):
    """Options of a run of few steps, in bfloat16, with rows that validation leaves out, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    make_model("qwen3", tie_word_embeddings=False, eos_token_id=None).save_pretrained(folder / "model")
    options = f"{uneven_data} --model.hf_path {folder / 'model'} --validation.enable --validation.share 0.3"
    options += " --validation.steps 2 --training.local_batch_size 2 --training.seq_len 32 --tidar.block_size 3"
    options += " --training.steps 4 --checkpoint.interval 2 --validation.freq 2 --metrics.log_freq 1"
    options += f" --training.mixed_precision_param bfloat16 --job.dump_folder {folder / 'run'}"
    return SimpleNamespace(folder=folder / "run", options=options.split())


@pytest.fixture(scope="module")
def run(options):
    """A run whose validation decodes three prompts, and what it leaves."""
    with redirect_stdout(io.StringIO()) as printed:
        trainer = train_run([*options.options, "--validation.generate_prompts", "3"])
    return SimpleNamespace(
        folder=options.folder,
        random_state=torch.get_rng_state(),
        weights=dict(trainer.model.named_parameters()),
        held_out_rows=trainer.batches.held_out_rows,
        printed=printed.getvalue(),
    )


def evaluated(run: Path, capsys, *arguments: str) -> dict:
    output = run.parent / "evaluation.json"
    evaluate.main(["--output", str(output), *arguments])
    assert "tokens/forward" in capsys.readouterr().out
    return json.loads(output.read_text())


def test_the_scores_are_those_of_the_runs_own_validation(run, capsys):
    lines = {line["step"]: line for line in read_metrics(run.folder) if "val/loss" in line}
    for step in (2, 4):
        found = evaluated(run.folder, capsys, "--model", str(run.folder / "checkpoint" / f"step-{step}"))
        expected = {name: value for name, value in lines[step].items() if name.startswith("val/")}
        scores = {name: value for name, value in found["held_out"].items() if name.startswith("val/")}
        decoded = found["decoding"]["tidar"]
        assert scores | {"val/tokens_per_forward": decoded["tokens_per_forward"]} == expected
        assert found["dtype"] == "bfloat16" and decoded["prompts"] == 3 and decoded["tokens"] == 3 * 16


def test_validation_takes_as_many_rows_as_on_the_devices_of_the_run(run, monkeypatch):
    about = {"devices": 24, "options": {"parallelism": {"context_parallel_degree": 2, "tensor_parallel_degree": 3}}}
    monkeypatch.setattr(evaluate, "read_manifest", lambda _: {"about": about})
    config = evaluate._run_config(run.folder, run.folder / "checkpoint" / "step-4")
    assert config.validation.steps == 2 * 24 // 6


def test_decoding_prompts_does_not_disturb_training(run, options, tmp_path):
    """Without it: the same losses, weights and random state."""
    trainer = train_run([*options.options, "--job.dump_folder", str(tmp_path)])
    assert torch.get_rng_state().equal(run.random_state)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.equal(run.weights[name]), name
    found, expected = read_metrics(tmp_path), read_metrics(run.folder)
    for line, other in zip(found, expected, strict=True):
        assert ("val/loss" in line) == (other.pop("val/tokens_per_forward", None) is not None)
        assert line.keys() == other.keys()
        assert all(line[name] == other[name] for name in line if name.startswith(("train/", "val/")))


def test_a_pattern_that_is_not_decoded_is_refused():
    config = load_config("--validation.generate_prompts 2 --tidar.pattern causal".split())
    with pytest.raises(UserError, match=r"validation.generate_prompts = 2: tidar.pattern = causal is not decoded"):
        plan_run(config, 1, torch.device("cpu"))


def test_the_sample_is_shown(run):
    reader = EventAccumulator(str(run.folder / "tb")).Reload()
    samples = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("val/sample")]
    engine, rows = load(run.folder / "checkpoint" / "step-4", dtype=torch.bfloat16), run.held_out_rows
    prompts = held_out_prompts(rows, 3)
    text = " ".join(map(str, engine.generate(prompts, 16)[0].tokens))
    assert len(samples) == 2 and samples[1].endswith(f"**decoded**\n\n    {text}") and text in run.printed
    assert "decoded 3 prompts" in run.printed


def test_counts_are_those_of_prompts_decoded_one_by_one(run, capsys):
    step = run.folder / "checkpoint" / "step-4"
    found = evaluated(run.folder, capsys, "--model", str(step), "--n_prompts", "5", "--max_new_tokens", "9")["decoding"]
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


def test_check_of_a_folder(run, tmp_path, call, monkeypatch):
    step = run.folder / "checkpoint" / "step-4"
    code, printed, _ = call(check.main, "--model", step)
    assert code == 0 and "blocks of 3" in printed and "it holds no tokenizer: texts are bytes" in printed
    monkeypatch.setattr("tidar.evaluation.tasks.FIRST_LM_EVAL", (10**6,))
    assert "needs lm-eval" in call(check.main, "--model", step)[1]
    damaged = shutil.copytree(step, tmp_path / "step-4")
    next(damaged.glob("*.distcp")).write_bytes(b"x")
    code, _, error = call(check.main, "--model", damaged)
    assert code == 1 and "step-4: is not whole: " in error and len(error.splitlines()) == 1
    model = tmp_path / "model"
    make_model("qwen2", vocab_size=600).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    for section, message in (
        ({}, 'has no section "tidar", and so no mask token'),
        ({"tidar": {"pattern": "tidar", "block_size": 4}}, "must hold pattern, block_size and mask_token_id"),
        ({"tidar": {"pattern": "tidar", "block_size": 4, "mask_token_id": 299}}, "holds no tokenizer"),
    ):
        (model / "config.json").write_text(json.dumps(config | section))
        code, _, error = call(check.main, f"--model={model}")
        assert code == 1 and message in error and len(error.splitlines()) == 1


def test_tasks_need_lm_eval(run, monkeypatch, capsys):
    for version, message in ((None, "--tasks: needs lm-eval 0.4.13 or later: pip"), ("0.4.9", "; 0.4.9 is installed")):

        def installed(name: str, version: str | None = version) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", installed)
        with pytest.raises(SystemExit):
            evaluate.main(["--model", str(run.folder / "checkpoint" / "step-4"), "--tasks", "gsm8k"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {run}/checkpoint/step-4 --run {run}/checkpoint", "holds no config.toml"),
        ("--model {run}/nowhere", "--model {run}/nowhere: does not exist, and is no id of the hub"),
        ("--model {model}", "lies in no run whose held-out data could be used; give --prompts, --run or --tasks"),
        ("--model {model} --run {run}", 'no section "tidar"'),
        ("--model {run}/checkpoint/step-4 --prompts {empty}", "--prompts {empty}: holds no prompts"),
        ("--model {run}/checkpoint/step-4 --n_prompts 0", "--n_prompts 0: must be at least 1"),
        ("--model {run}/checkpoint/step-4 --max_new_tokens 0", "max_new_tokens = 0: must be at least 1"),
        ("--model {run}/checkpoint/step-4 --temperature -1", "temperature = -1.0: must be at least 0"),
        ("--model {run}/checkpoint/step-4 --output {run}", "--output {run}: must be a file"),
        ("--model {run}/checkpoint/step-4 --tokenizer {run}", "must be bytes, a local folder"),
        ("--model {run}/checkpoint/step-4 --limit 8", "--limit 8.0: is for --tasks, which is not given"),
        ("--model {run}/checkpoint/step-4 --apply_chat_template", "--apply_chat_template: is for --tasks"),
    ],
)
def test_bad_input(run, tmp_path, arguments, message, capsys, monkeypatch):
    """All of it ends before anything is scored."""
    monkeypatch.delattr(evaluate.HeldOut, "scores")
    (tmp_path / "empty").touch()
    places = SimpleNamespace(run=run.folder, model=run.folder.parent / "model", empty=tmp_path / "empty")
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--output", str(tmp_path / "x.json"), *arguments.format(**vars(places)).split()])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and message.format(**vars(places)) in error and len(error.splitlines()) <= 2
