"""Model folders in the forms that people have: names, dtypes, config.json and tokenizers of other versions."""

import importlib.metadata
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_model, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from tidar.config import UserError
from tidar.data import load_tokenizer
from tidar.models import from_pretrained
from tidar.models.huggingface import decoder_config, open_weights
from tidar.models.huggingface.export import write_huggingface_folder
from tidar.models.huggingface.weights import StateDictFile
from tidar.models.sizes import size_config


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_transformers_4_and_5_read_the_same_positions(tmp_path):
    """Exported from the names of either version, with and without scaling."""
    rng = random.Random(0)
    for number in range(30):
        theta = rng.choice([1e4, 1e6, 12345.5])
        scaling = rng.choice(
            [
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": 2.5},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0},
            ]
        )
        new = {"rope_parameters": {"rope_theta": theta, **scaling}}
        old = {"rope_theta": theta}
        if scaling["rope_type"] != "default":
            old["rope_scaling"] = {("type" if number % 2 else key) if key == "rope_type" else key: value
                                   for key, value in scaling.items()}  # fmt: skip
        options = {**size_config("debug"), "vocab_size": 300}
        del options["rope_theta"]
        given = options | rng.choice([new, old, new | old])
        with_folder = tmp_path / f"in-{number}"
        with_folder.mkdir()
        (with_folder / "config.json").write_text(json.dumps(given))
        write_huggingface_folder(
            tmp_path / str(number), {}, torch.bfloat16, read=lambda name: [],
            write_assets=lambda folder, source=with_folder: shutil.copytree(source, folder),
        )  # fmt: skip
        exported = json.loads((tmp_path / str(number) / "config.json").read_text())
        # transformers 4: these two keys, and defaults where they are missing
        assert exported.get("rope_theta", 10000.0) == theta
        assert (exported.get("rope_scaling") or {"rope_type": "default"}) == scaling
        assert exported["torch_dtype"] == exported["dtype"] == "bfloat16"
        assert exported["rope_parameters"] == new["rope_parameters"]
        read = Qwen3Config(**exported).rope_parameters
        assert {key: read[key] for key in new["rope_parameters"]} == new["rope_parameters"]
        assert decoder_config(exported) == decoder_config(given)


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_read_as_transformers_reads_them(tied, tmp_path):
    """Names without `model.`, and an index that names a tied output weight that no file holds."""
    make_model("qwen3", tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="40KB")
    expected = from_pretrained(tmp_path).state_dict()
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    if tied:
        assert "lm_head.weight" not in index["weight_map"]
        index["weight_map"]["lm_head.weight"] = min(index["weight_map"].values())
        index_file.write_text(json.dumps(index))
        assert_equal(from_pretrained(tmp_path).state_dict(), expected)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    index["weight_map"] = {name.removeprefix("model."): file for name, file in index["weight_map"].items()}
    index_file.write_text(json.dumps(index))
    assert_equal(from_pretrained(tmp_path).state_dict(), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert theirs["model.norm.weight"].equal(expected["norm.weight"])
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors(tmp_path).items()}, tmp_path / "dump.bin")
    found = StateDictFile(tmp_path / "dump.bin").tensors
    assert_equal(found, {name: theirs[name] for name in found})
    if not tied:
        index["weight_map"].pop("lm_head.weight")
        for file in tmp_path.glob("*.safetensors"):
            save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
        index_file.write_text(json.dumps(index))
        with pytest.raises(UserError, match="misses the tensor lm_head.weight"):
            from_pretrained(tmp_path)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


def rename(prefix: str):
    def change(folder: Path) -> None:
        save_file({prefix + name: tensor for name, tensor in tensors(folder).items()}, folder / "model.safetensors")

    return change


def add_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def cache_of_hub(folder: Path) -> None:
    for revision in ("bbb", "aaa", "ccc"):
        (folder / "snapshots" / revision).mkdir(parents=True)
        shutil.copy(folder / "config.json", folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


def to_dtype(dtype: torch.dtype):
    def change(folder: Path) -> None:
        held = tensors(folder)
        held["model.layers.1.mlp.up_proj.weight"] = held["model.layers.1.mlp.up_proj.weight"].to(dtype)
        save_file(held | {"model.layers.1.mlp.up_proj.weight_scale": torch.ones(1)}, folder / "model.safetensors")

    return change


OTHER_FOLDERS = {
    "compiled": (rename("_orig_mod."), "the names of all its tensors begin with _orig_mod.: strip it"),
    "DDP": (rename("module."), "the names of all its tensors begin with module.: strip it"),
    "twice": (rename("model."), "the names of all its tensors begin with model.: strip it"),
    "LoRA": (add_adapter, "holds a LoRA adapter (adapter_config.json): merge it into its model"),
    "hub": (cache_of_hub, "is a cache of the Hugging Face hub: name its snapshot, {}/snapshots/aaa"),
    "float8": (to_dtype(torch.float8_e4m3fn), "model.layers.1.mlp.up_proj.weight is F8_E4M3: must be bfloat16"),
    "int8": (to_dtype(torch.int8), "model.layers.1.mlp.up_proj.weight is I8: must be bfloat16"),
}


@pytest.mark.parametrize("change, message", OTHER_FOLDERS.values(), ids=list(OTHER_FOLDERS))
def test_other_folders_are_named(change, message, tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    change(tmp_path)
    for read in (lambda: from_pretrained(tmp_path), lambda: open_weights(str(tmp_path))):
        with pytest.raises(UserError) as error:
            read()
        assert message.format(tmp_path) in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_a_tokenizer_of_transformers_5_is_named(tmp_path, monkeypatch):
    """transformers 4 does not know the class that 5 names."""
    write_tokenizer(tmp_path)

    def fail(*args, **kwargs):
        raise ValueError("Tokenizer class TokenizersBackend does not exist or is not currently imported.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"transformers": "4.57.1"}[name])
    advice = "transformers 5 or later saved it, and transformers 4.57.1 is installed: upgrade transformers"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for changed, is_newer in (({}, False), ({"tokenizer_class": "TokenizersBackend"}, True), ({"backend": "x"}, True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match="its tokenizer cannot be read") as error:
            load_tokenizer(str(tmp_path))
        assert (advice in str(error.value)) == is_newer
