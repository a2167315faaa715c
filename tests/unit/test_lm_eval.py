"""lm-eval's tasks answered by the engine, against lm-eval's own HFLM on the same folder."""

import json
import os
import random
from functools import partialmethod

import pytest
import torch
from small_models import make_model, write_tokenizer

lm_eval = pytest.importorskip("lm_eval")
os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when datasets is imported, which lm_eval's parts do

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tidar import evaluate  # noqa: E402
from tidar.config import UserError  # noqa: E402
from tidar.data import load_tokenizer  # noqa: E402
from tidar.decoding import load  # noqa: E402
from tidar.evaluation.lm_eval_model import EngineLM  # noqa: E402

CONTEXT = 96
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl, train: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
GENERATES = """
task: sums
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" the"], max_gen_toks: 20, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSES = """
task: choices
output_type: multiple_choice
doc_to_choice: ["in the", "a", " no"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm}}]
"""
RUNS_CODE = "task: runs_code\noutput_type: generate_until\ndoc_to_target: x\nunsafe_code: true\n"
NO_DATA = "task: no_data\noutput_type: generate_until\ndoc_to_text: x\ndoc_to_target: x\ntest_split: test\n"
NO_DATA += "dataset_path: {folder}/none\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random TiDAR model with tokenizer and template, and tasks over data of its own."""
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen2", eos_token_id=None, max_position_embeddings=CONTEXT).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    config["tidar"] = {"pattern": "tidar", "block_size": 4, "mask_token_id": 299}
    (folder / "config.json").write_text(json.dumps(config))
    tasks = folder / "tasks"
    tasks.mkdir()
    rng = random.Random(0)
    sums = [{"question": f"{rng.randrange(99)} the {n}", "answer": str(n)} for n in range(9)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
    for name, text in {"sums": GENERATES, "choices": CHOOSES, "code": RUNS_CODE}.items():
        (tasks / f"{name}.yaml").write_text((COMMON + text).format(folder=tasks))
    (tasks / "no_data.yaml").write_text(NO_DATA.format(folder=tasks))
    return folder


@pytest.fixture(autouse=True)
def without_defaults(monkeypatch):
    """An index of thousands of tasks takes seconds to read."""
    whole = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(whole, include_defaults=False))


@pytest.fixture(scope="module")
def models(folder) -> tuple[EngineLM, HFLM]:
    ours = EngineLM(load(folder, max_batch_size=4), load_tokenizer(str(folder)))
    return ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def ask(models, kind: str, *arguments: tuple) -> tuple[list, list]:
    requests = [Instance(kind, {}, each, n, ("task", n, 1)) for n, each in enumerate(arguments)]
    return tuple(getattr(model, kind)(requests, disable_tqdm=True) for model in models)


def random_text(rng: random.Random, longest: int) -> str:
    return "".join(
        rng.choice(["the ", "in", " the", "ä", "…🙂", "x", "\n", " "]) for _ in range(rng.randrange(longest))
    )


def test_log_likelihoods(models):
    rng = random.Random(0)
    pairs = [("x" + random_text(rng, longest), random_text(rng, 9) + "x") for longest in (6, 20, 90) for _ in range(12)]
    pairs += [("", "the in"), ("in  ", " the")]
    (greedy,) = ask(models[:1], "generate_until", *[(a, {"max_gen_toks": 1}) for a, _ in pairs])
    pairs += [(a, text) for (a, _), text in zip(pairs, greedy) if a and text and "\ufffd" not in text]
    ours, theirs = ask(models, "loglikelihood", *pairs)
    for one, other in zip(ours, theirs, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-4) and one[1] == other[1]
    assert {is_greedy for _, is_greedy in ours} == {True, False}
    texts = [(random_text(rng, 200) + "x",) for _ in range(8)]
    ours, theirs = ask(models, "loglikelihood_rolling", *texts)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


def test_texts_and_where_they_stop(models):
    """Stop strings that end in the middle of a step, in several tokens, in special ones, and never."""
    rng, engine, tokenizer = random.Random(1), models[0].engine, models[0].tokenizer
    contexts = [random_text(rng, 60) + "in" for _ in range(32)]
    asked, in_a_step = [], 0
    for context in contexts:
        completion = engine.generate([tokenizer.encode(context)[-CONTEXT + 24 :]], 24)[0]
        starts = [sum(completion.accepted[:n]) for n in range(len(completion.accepted))]
        long = [start for start, n in zip(starts, completion.accepted) if n >= 3 and start]
        until: list[str] = []
        for start in long:
            # it is whole with the second token of a step of three or more
            stop = tokenizer.decode(completion.tokens[start - 1 : start + 2])
            if not until and "\ufffd" not in stop and stop not in tokenizer.decode(completion.tokens[: start + 1]):
                until, in_a_step = [stop], in_a_step + 1
        until.append(rng.choice(["<|im_end|>", "never", " t", "\n\n"]))
        asked.append((context, {"until": until, "max_gen_toks": 24, "do_sample": False}))
    models[0].decoded.clear()
    ours, theirs = ask(models, "generate_until", *asked)
    assert ours == theirs and in_a_step >= 3
    counts, n_tokens = models[0].decoded["task"], 0
    for context, options in asked:
        (completion,) = engine.generate([tokenizer.encode(context)[-CONTEXT + 24 :]], 24, mode="ar")
        stops = [*options["until"], "<|endoftext|>"]
        texts = [tokenizer.decode(completion.tokens[:n]) for n in range(1, 25)]
        n_tokens += next((n for n, text in enumerate(texts, start=1) if any(stop in text for stop in stops)), 24)
    assert counts.prompts == 32 and counts.tokens == n_tokens < 32 * 24 and counts.tokens_per_forward > 1
    with pytest.raises(UserError, match="generation option num_beams = 4"):
        ask(models[:1], "generate_until", ("in", {"num_beams": 4}))
    with pytest.raises(UserError, match="must be below the context"):
        ask(models[:1], "generate_until", ("in", {"max_gen_toks": CONTEXT}))


@pytest.mark.parametrize("arguments", ["--limit 5", "--num_fewshot 1 --apply_chat_template"])
def test_tasks_score_as_with_hflm(folder, models, arguments, capsys):
    output = folder.parent / "evaluation.json"
    command = f"--model {folder} --tasks sums,choices --include_path {folder / 'tasks'} --output {output} {arguments}"
    evaluate.main(command.split())
    printed, found = capsys.readouterr().out, json.loads(output.read_text())["lm_eval"]
    chat = "chat" in arguments
    expected = lm_eval.simple_evaluate(
        models[1],
        tasks=["sums", "choices"],
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        limit=None if chat else 5,
        num_fewshot=1 if chat else None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    per_forward = found["results"]["sums"]["tokens_per_forward,none"]
    assert per_forward == found["decoding"]["sums"]["tokens_per_forward"] > 1
    for task, scores in expected["results"].items():
        for name, value in scores.items():
            assert found["results"][task][name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert found["n-samples"] == expected["n-samples"] and found["configs"].keys() == {"sums", "choices"}
    assert "tokens/forward" in printed and "exact_match" in printed and "acc_norm" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks summs", "--tasks summs: lm-eval knows no such task; did you mean sums?"),
        ("--tasks runs_code", "--tasks runs_code: executes code that the model writes; --confirm_run_unsafe_code"),
        ("--tasks no_data", "--tasks: cannot be loaded ("),
        ("--tasks sums --limit 0", "--limit 0.0: must be above 0"),
        ("--tasks sums --include_path /no/such", "--include_path /no/such: is not a folder"),
        ("--tasks sums --tokenizer bytes", "holds no tokenizer, which --tasks needs"),
    ],
)
def test_bad_tasks(folder, arguments, message, capsys):
    command = f"--model {folder} --include_path {folder / 'tasks'} --output {folder.parent / 'x.json'} {arguments}"
    with pytest.raises(SystemExit) as ended:
        evaluate.main(command.split())
    error = capsys.readouterr().err
    assert ended.value.code == 1 and message in error.splitlines()[0] and len(error.splitlines()) <= 2
    assert torch.is_grad_enabled()
