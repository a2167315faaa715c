"""The mask token: its id, its row in the embedding, and vocabularies that grow for it."""

import json
import re

import pytest
import torch
import uneven
from hf_runs import TOKENS, resolve, tensors, train
from results import whole
from small_models import make_model, write_tokenizer
from transformers import AutoModelForCausalLM

from tidar.config import UserError, load_config
from tidar.export import main as export_command


def test_the_mask_token_is_the_first_free_row(tmp_path):
    assert resolve("--model.name", "qwen2.5-1.5b").mask_token_id == 151665
    assert resolve("--model.name", "qwen3-8b").mask_token_id == 151669
    debug = resolve()
    assert (debug.mask_token_id, debug.decoder.vocab_size) == (257, 258)
    write_tokenizer(tmp_path)
    for vocab_size, mask_token_id, rows in ((300, TOKENS, 300), (264, TOKENS, 264), (TOKENS, TOKENS, 320)):
        make_model("qwen3", vocab_size=vocab_size).config.save_pretrained(tmp_path)
        spec = resolve("--model.hf_path", str(tmp_path))
        assert (spec.mask_token_id, spec.decoder.vocab_size, spec.used_rows) == (mask_token_id, rows, TOKENS)
    # named: any row, but none outside
    assert resolve("--model.hf_path", str(tmp_path), "--tidar.mask_token_id", "7").decoder.vocab_size == TOKENS
    with pytest.raises(UserError, match="tidar.mask_token_id = 263: must be from 0 to 262, a row of the embedding"):
        resolve("--model.hf_path", str(tmp_path), "--tidar.mask_token_id", str(TOKENS))


def test_a_full_vocabulary_grows(tmp_path, capfd, call):
    """New rows, of the embedding and of the output, start as the mean; the export says that it has grown."""
    folder, run, out = tmp_path / "in", tmp_path / "run", tmp_path / "out"
    make_model("qwen2", tie_word_embeddings=False, vocab_size=TOKENS).save_pretrained(folder)
    write_tokenizer(folder)
    train(run, "--model.hf_path", str(folder), "--training.steps", "0")
    assert "grows from 263 to 320 rows" in capfd.readouterr().out
    arguments = ["--checkpoint", run / "checkpoint" / "step-0", "--output", out, "--dtype", "float32"]
    assert "has grown from 263 to 320 rows" in call(export_command, *arguments)[1]
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 320 and config["tidar"]["vocab_size_before_mask_token"] == 263
    before, after = tensors(folder), tensors(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name][:TOKENS].equal(before[name])
        assert all(row.equal(before[name].double().mean(dim=0).float()) for row in after[name][TOKENS:])
    AutoModelForCausalLM.from_pretrained(out)
    # trained on from the export: it keeps its rows and its mask token
    capfd.readouterr()
    again = train(tmp_path / "again", "--model.hf_path", str(out), "--training.steps", "0")
    assert "trained with other options" not in capfd.readouterr().out
    assert again.spec.mask_token_id == TOKENS and again.spec.decoder.vocab_size == 320
    assert whole(again.model.embed_tokens.weight).equal(after["model.embed_tokens.weight"])
    # and from the first run's checkpoint, though model.hf_path names the folder before it grew
    options = ["--checkpoint.initial_load_path", str(run / "checkpoint" / "step-0"), "--training.steps", "0"]
    options += ["--tidar.block_size", "2"]
    again = train(tmp_path / "third", "--model.hf_path", str(folder), *options)
    assert re.search(r"trained with other options: tidar.block_size: \d+ -> 2$", capfd.readouterr().out, re.MULTILINE)
    assert whole(again.model.embed_tokens.weight).equal(after["model.embed_tokens.weight"])


@pytest.mark.parametrize("init, row", [("auto", "mean"), ("mean", "mean"), ("keep", "kept")])
@pytest.mark.parametrize("mask_token_id", [-1, 5])
def test_first_value_of_the_mask_row(init, row, mask_token_id, tmp_path):
    """A free row starts as the mean of the used ones, a token's as it is; either can be asked for."""
    folder = tmp_path / "in"
    model = make_model("qwen2")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    options = ["--tidar.mask_token_init", init, "--tidar.mask_token_id", str(mask_token_id), "--training.steps", "0"]
    trainer = train(tmp_path / "run", "--model.hf_path", str(folder), *options)
    embedding, before = whole(trainer.model.embed_tokens.weight), model.model.embed_tokens.weight
    number = TOKENS if mask_token_id == -1 else mask_token_id
    kept = row == "kept" or (init == "auto" and mask_token_id == 5)
    expected = before[number] if kept else before[:TOKENS].double().mean(dim=0).float()
    assert embedding[number].equal(expected)
    rest = torch.arange(300) != number
    assert embedding[rest].equal(before[rest])


def test_a_mask_token_in_the_data(tmp_path, capfd):
    """Refused, unless the option named it: then it is counted."""
    folder = tmp_path / "in"
    make_model("qwen2").save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"tidar": {"mask_token_id": 8}})
    )
    with pytest.raises(UserError, match=r"tidar.mask_token_id = 8: occurs \d+ times in the data; name"):
        train(tmp_path / "run", "--model.hf_path", str(folder), "--training.steps", "0")
    train(tmp_path / "run", "--model.hf_path", str(folder), "--training.steps", "0", "--tidar.mask_token_id", "8")
    times = int(re.search(r"warning: tidar.mask_token_id = 8: occurs (\d+) times", capfd.readouterr().out)[1])
    documents = uneven.Uneven(load_config([]).data, None).documents(None)
    assert times == sum(int((document.tokens == 8).sum()) for document in documents)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"vocab_size": 90})
    )
    with pytest.raises(UserError, match="holds the token 256, but the model's embedding has 90 rows"):
        train(tmp_path / "run", "--model.hf_path", str(folder), "--training.steps", "0", "--tidar.mask_token_id", "8")


def test_a_run_resumes_with_its_own_mask_token(tmp_path):
    train(tmp_path, "--training.steps", "0")
    with pytest.raises(UserError, match="another model: mask_token_id: 257 -> 1"):
        train(tmp_path, "--training.steps", "0", "--tidar.mask_token_id", "1")


def test_data_beyond_the_embedding_is_refused_though_the_vocabulary_may_grow(tmp_path):
    make_model("qwen2", vocab_size=200).save_pretrained(tmp_path / "in")
    with pytest.raises(UserError, match="holds the token 256, but the model's embedding has 200 rows"):
        train(tmp_path / "run", "--model.hf_path", str(tmp_path / "in"), "--training.steps", "0")
