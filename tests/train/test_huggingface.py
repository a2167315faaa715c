"""Weights in from Hugging Face's folders and state dicts, and weights out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_runs import SHORT, TOKENS, resolve, tensors, train
from results import read_metrics, whole
from small_models import make_model, published_tensors, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tidar.config import UserError
from tidar.export import export
from tidar.export import main as export_command
from tidar.models import from_pretrained
from tidar.models.huggingface.export import write_huggingface_folder


@pytest.fixture(params=[("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)], ids=str)
def published(request, tmp_path) -> Path:
    """A folder as they are published: bfloat16, several files, a tokenizer, more rows than tokens."""
    family, tied = request.param
    folder = tmp_path / "published"
    model = make_model(family, tie_word_embeddings=tied).to(torch.bfloat16)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size="40KB")
    assert write_tokenizer(folder) == TOKENS
    return folder


def test_round_trip_is_bit_for_bit(published, tmp_path, call):
    """Folder, trainer, checkpoint, export, where nothing was trained: all but the mask token's row."""
    run, out = tmp_path / "run", tmp_path / "out"
    train(run, "--model.hf_path", str(published), "--training.steps", "0", "--tidar.block_size", "5")
    assert call(export_command, "--checkpoint", run / "checkpoint" / "step-0", "--output", out)[0] == 0
    before, after = tensors(published), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        if name == "model.embed_tokens.weight":
            mean = tensor[:TOKENS].double().mean(dim=0).bfloat16()
            assert after[name][TOKENS].equal(mean)
            after[name][TOKENS] = tensor[TOKENS]
        assert after[name].equal(tensor), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (published, out))
    assert new.pop("tidar") == {"pattern": "tidar", "block_size": 5, "mask_token_id": TOKENS}
    # the names of transformers 4 and of transformers 5
    assert new == old | {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    for name in ("generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (published / name).read_bytes()
    text = "in the beginning"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (published, out)]
    assert ids[0] == ids[1] and len(ids[0]) < len(text)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_model_of_chats_is_exported_with_the_token_that_ends_a_turn(tmp_path):
    """A base model ends texts with <|endoftext|>, and a chat never says it. Trained on texts, it stays as it is."""
    folder = tmp_path / "in"
    model = make_model("qwen2")
    model.generation_config.eos_token_id, model.generation_config.temperature = TOKENS - 3, 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    before = json.loads((folder / "generation_config.json").read_text())
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"in {i}", "response": "the end"}) + "\n" for i in range(6)))
    options = ["--model.hf_path", str(folder), "--data.source", "chat", "--data.paths", str(chats)]
    run = tmp_path / "run"
    train(run, *options, "--training.epochs", "1", "--checkpoint.export_epochs", "1")
    (step,) = (run / "checkpoint").glob("step-*")
    export(step, tmp_path / "out", torch.bfloat16)
    for exported in (tmp_path / "out", run / "export" / "epoch_1"):
        found = json.loads((exported / "generation_config.json").read_text())
        assert found == before | {"eos_token_id": [TOKENS - 3, TOKENS - 1]}
        assert AutoModelForCausalLM.from_pretrained(exported).generation_config.eos_token_id == [260, 262]
    # trained on from there, on data that are prepared: it has the token already
    prepared = ["--data.source", "prepared", "--data.paths", str(run / "data" / "training")]
    train(tmp_path / "again", "--model.hf_path", str(tmp_path / "out"), *prepared, "--training.steps", "0")
    again = tmp_path / "again" / "checkpoint" / "step-0" / "huggingface" / "generation_config.json"
    assert again.read_bytes() == (tmp_path / "out" / "generation_config.json").read_bytes()
    train(tmp_path / "text", "--model.hf_path", str(folder), "--training.steps", "0")
    text = tmp_path / "text" / "checkpoint" / "step-0" / "huggingface" / "generation_config.json"
    assert text.read_bytes() == (folder / "generation_config.json").read_bytes()
    # a model without the file: its config.json names the end of texts
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": TOKENS - 3}
    (folder / "config.json").write_text(json.dumps(config))
    train(tmp_path / "without", *options, "--training.steps", "0")
    without = tmp_path / "without" / "checkpoint" / "step-0" / "huggingface" / "generation_config.json"
    assert json.loads(without.read_text())["eos_token_id"] == [TOKENS - 3, TOKENS - 1]


@torch.no_grad()
def greedy(model, tokens: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


def test_trained_and_exported_it_generates_the_same(published, tmp_path):
    """What transformers reads is this project's model in AR mode: 200 greedy tokens, from a trained checkpoint."""
    run, out = tmp_path / "run", tmp_path / "out"
    options = ["--model.hf_path", str(published), "--training.steps", "3", "--optimizer.lr", "1e-2"]
    trainer = train(run, *options, "--lr_scheduler.warmup_steps", "0")
    export(run / "checkpoint" / "step-3", out, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = from_pretrained(run / "checkpoint" / "step-3")
    exported = from_pretrained(out)
    for name, parameter in trainer.model.named_parameters():
        assert whole(parameter).equal(dict(ours.named_parameters())[name])
        assert whole(parameter).equal(dict(exported.named_parameters())[name])
    prompt = torch.tensor([[72, 101, 108, 108, 111]])
    expected = greedy(ours, prompt, 200)
    assert len(set(expected[0].tolist())) > 3
    assert theirs.generate(prompt, max_new_tokens=200, do_sample=False, eos_token_id=None).equal(expected)


def test_a_shard_holds_at_most_its_bytes(tmp_path):
    """Several files and their index, each within the limit, which transformers puts together again."""
    model = make_model("qwen3", tie_word_embeddings=False, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "in")
    parameters = dict(model.named_parameters())
    limit = 2**20 + 100_000  # a header is given 2**20
    write_huggingface_folder(
        tmp_path / "out",
        {name: parameter.shape for name, parameter in parameters.items()},
        torch.float32,
        read=lambda name: parameters[name].detach().split(7),
        write_assets=lambda folder: shutil.copytree(tmp_path / "in", folder, ignore=lambda *_: ["model.safetensors"]),
        max_shard_bytes=limit,
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size <= limit for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, before), after in zip(model.named_parameters(), again.parameters(), strict=True):
        assert before.equal(after), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_starts_a_new_run(prefix, tmp_path):
    """The replaced script's 16-bit dump, the output weight saved twice, at step 0 with a fresh optimizer."""
    folder, dump = tmp_path / "qwen", tmp_path / "pytorch_model.bin"
    make_model("qwen2", tie_word_embeddings=True).save_pretrained(folder)
    trained = make_model("qwen2", seed=1, tie_word_embeddings=True).half()
    torch.save({prefix + name: tensor for name, tensor in trained.state_dict().items()}, dump)
    options = [
        "--model.hf_path",
        str(folder),
        "--checkpoint.initial_load_path",
        str(dump),
        "--tidar.mask_token_id",
        "6",
        "--training.local_batch_size",  # rows enough for a target in each step
        "16",
    ]
    trainer = train(tmp_path / "run", *options, "--training.steps", "0")
    parameters = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    for name, tensor in published_tensors(parameters, n_heads=4, n_kv_heads=2).items():
        assert tensor.equal(trained.state_dict()[name].float())
    trainer = train(tmp_path / "next", "--model.hf_path", str(folder), "--training.steps", "2", *options[2:])
    moments = trainer.updates.optimizer.state[trainer.model.norm.weight]
    # weights alone from a step of that run
    start = [
        "--checkpoint.initial_load_path",
        str(tmp_path / "next" / "checkpoint" / "step-2"),
        "--training.steps",
        "1",
        "--training.local_batch_size",
        "16",
    ]
    third = train(tmp_path / "third", "--model.hf_path", str(folder), *start)
    assert (
        third.step == 1 and moments["step"] == 2 and third.updates.optimizer.state[third.model.norm.weight]["step"] == 1
    )
    assert third.spec.mask_token_id == 6  # that of the checkpoint
    lines = read_metrics(tmp_path / "third")
    assert [line["step"] for line in lines] == [1]


def test_weights_of_another_model_are_refused(tmp_path):
    """Shapes do not show the base of the rotary positions; the weights' own config.json does."""
    for name, theta in (("model", 1e6), ("start", 1e4)):
        rope = {"rope_type": "default", "rope_theta": theta}
        make_model("qwen2", rope_parameters=rope).save_pretrained(tmp_path / name)
    options = ["--model.hf_path", str(tmp_path / "model"), "--checkpoint.initial_load_path", str(tmp_path / "start")]
    with pytest.raises(UserError, match="another model than the run.s: rope_theta: 10000.0 -> 1000000.0"):
        resolve(*options)


def test_epochs_are_exported(tmp_path):
    """Every second epoch, as the run goes; rows of the uneven source make an epoch of several steps."""
    make_model("qwen2").save_pretrained(tmp_path / "in")
    options = "--training.global_batch_size 128 --training.local_batch_size 64 --training.steps 14".split()
    trainer = train(tmp_path, *options, "--model.hf_path", str(tmp_path / "in"), "--checkpoint.export_epochs", "2")
    steps = -(-len(trainer.batches.training_rows) * 2 // 128)
    numbers = sorted(int(path.name.removeprefix("epoch_")) for path in (tmp_path / "export").iterdir())
    assert numbers == [2 * n for n in range(1, 14 // steps + 1)] and len(numbers) >= 1
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 14
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / f"epoch_{numbers[-1]}")
    assert model.dtype == torch.bfloat16


def test_the_export_target_is_not_overwritten(tmp_path, call):
    train(tmp_path / "run", "--training.steps", "0")
    checkpoint, out = tmp_path / "run" / "checkpoint" / "step-0", tmp_path / "out"
    out.mkdir()
    export(checkpoint, out, torch.bfloat16)  # an empty one may be there
    before = sorted((path.name, path.read_bytes()) for path in out.rglob("*.*"))
    for source, message in (
        (checkpoint, f"--output {out}: exists and is not an empty folder"),
        (tmp_path / "run", "must be a checkpoint of a run"),
        (tmp_path / "run" / "checkpoint" / "step-7", "RUN/checkpoint/step-<n>; that run has those of the steps 0"),
    ):
        code, _, error = call(export_command, "--output", out, "--checkpoint", source)
        assert code == 1 and error.startswith("error: ") and message in error
        assert len(error.splitlines()) <= 2
    assert before == sorted((path.name, path.read_bytes()) for path in out.rglob("*.*"))
    assert not list(tmp_path.glob("*.partial"))


def test_what_an_export_says_of_itself(tmp_path, call):
    """The card holds what was measured at that step; a base's own card is not taken over, but for its licence."""
    base = tmp_path / "models--Qwen--Small" / "snapshots" / "0123"
    base.parent.mkdir(parents=True)
    make_model("qwen2").save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: x/y\n---\n# Small\nTheirs.\n")
    for pattern, decodes in (("tidar", True), ("block_diffusion", False)):
        run, out = tmp_path / pattern, tmp_path / f"{pattern}-out"
        train(run, "--model.hf_path", str(base), "--training.steps", "0", "--tidar.pattern", pattern)
        lines = [{"step": 0, "val/ar_loss": 1.25, "train/lr": 7.5}, {"step": 1, "val/ar_loss": 2.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        _, said, _ = call(export_command, "--checkpoint", run / "checkpoint" / "step-0", "--output", out)
        assert (f"there is no custom_generate/generate.py for pattern {pattern}" in said) is not decodes
        assert (out / "custom_generate" / "generate.py").is_file() is decodes
        card = (out / "README.md").read_text()
        front = card.split("---")[1].splitlines()
        assert {"base_model: Qwen/Small", "license: apache-2.0", "library_name: transformers"} <= set(front)
        assert "base_model: x/y" not in front and "Theirs" not in card
        assert f"| pattern | {pattern} |" in card and "| block size | 8 |" in card
        assert ("trust_remote_code=True" in card) is decodes
        assert "1.2500" in card and "2.5000" not in card and "7.5" not in card


def test_an_export_leaves_what_is_not_its_own(tmp_path, monkeypatch):
    train(tmp_path / "run", "--training.steps", "0")
    checkpoint = tmp_path / "run" / "checkpoint" / "step-0"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    export(checkpoint, tmp_path / "out", torch.bfloat16)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(checkpoint, tmp_path / "link", torch.bfloat16)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(checkpoint, Path("."), torch.bfloat16)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("out", "empty", "here")]
    assert names[0] == names[1] == names[2] and "config.json" in names[0]


def test_values_that_float16_cannot_hold_are_not_exported(tmp_path):
    folder, run = tmp_path / "in", tmp_path / "run"
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    model.save_pretrained(folder)
    train(run, "--model.hf_path", str(folder), "--training.steps", "0")
    with pytest.raises(UserError, match="model.norm.weight: has values that float16 cannot hold"):
        export(run / "checkpoint" / "step-0", tmp_path / "out", torch.float16)
    assert not list(tmp_path.glob("out*"))


def test_bad_models_are_refused_before_anything_is_loaded(tmp_path):
    """What stands in config.json is checked by the run, and not only by the function that reads it."""
    folder = tmp_path / "in"
    make_model("qwen2").save_pretrained(folder)
    write_tokenizer(folder)
    good = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for change, message in (
        ({"vocab_size": "300"}, 'vocab_size = "300": must be an integer >= 1'),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"model_type": ["qwen2"]}, "supported are"),
        ({"tidar": [1]}, "must keep a mask_token_id below vocab_size"),
        ({"tidar": {"mask_token_id": "a"}}, "must keep a mask_token_id below vocab_size"),
        ({"tidar": {"mask_token_id": 300}}, "must keep a mask_token_id below vocab_size"),
        ({"tidar": {"mask_token_id": -5}}, "must keep a mask_token_id below vocab_size"),
        ({"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers"),
        ({"layer_types": 5}, "layer_types = 5: must be a list"),
        ({"rope_scaling": yarn}, "rope_parameters and rope_scaling are both there and differ"),
        ({"rope_parameters": None, "rope_scaling": {"factor": 4.0}}, "has a factor, but no rope_type"),
        ({"rope_parameters": yarn | {"rope_theta": 1.0}}, "rope_theta = 1.0: must be a number > 1"),
        ({"rope_parameters": yarn | {"mscale": "a", "mscale_all_dim": 1}}, 'mscale = "a"'),
        ({"rope_theta": 1e6}, "rope_theta = 1000000.0, but rope_parameters.rope_theta = 10000.0: remove the wrong one"),
        ({"torch_dtype": "float16"}, 'torch_dtype = "float16", but dtype = "float32": remove the wrong one'),
    ):
        (folder / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError) as error:
            train(tmp_path / "run", "--model.hf_path", str(folder), "--training.steps", "0")
        assert message in str(error.value) and "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps(good | {"tidar": {"pattern": "x"}}))
    for name, content in (("tokenizer.json", "{}"), ("tokenizer.json", ""), ("vocab.json", "[]")):
        (folder / name).write_text(content)
        with pytest.raises(UserError, match="its tokenizer cannot be read"):
            train(tmp_path / "run", "--model.hf_path", str(folder), "--training.steps", "0")
    without = tmp_path / "without"
    without.mkdir()
    for text, start, message in (
        (json.dumps(good), without, "holds no weights"),
        (
            json.dumps(good),
            without / "no",
            "checkpoint.initial_load_path = .*no: does not exist, and is no id of the hub",
        ),
        ("{}", without, "config.json: model_type = None.*: supported are"),
    ):
        (without / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            options = ["--model.hf_path", str(without), "--checkpoint.initial_load_path", str(start)]
            train(tmp_path / "run", *options, "--training.steps", "0")


def test_two_ranks_export_what_one_does(tmp_path, ranks):
    """At the end of an epoch, of a model whose vocabulary has grown and does not divide by two."""
    make_model("qwen2", vocab_size=TOKENS, tie_word_embeddings=False).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    options = [*SHORT, "--model.hf_path", str(tmp_path / "in"), "--training.epochs", "1", "--checkpoint.export_epochs"]
    options += ["1", "--training.global_batch_size", "128", "--training.local_batch_size", "64"]
    for processes in (1, 2):
        ranks.run(processes, *options, "--job.dump_folder", str(tmp_path / str(processes)))
    one, two = (tensors(tmp_path / str(processes) / "export" / "epoch_1") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name].double() - two[name].double()).norm() <= 1e-3 * one[name].double().norm(), name
