"""Weights from folders and files that are damaged, malicious or large."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import export_memory
import forks
import load_memory
import pytest
import torch
import torch.distributed.checkpoint as dcp
import uneven  # noqa: F401  (registers the source)
from runs import train_run
from safetensors.torch import load_file, save_file
from small_models import make_model, published_tensors
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tidar import __version__
from tidar.config import UserError
from tidar.export import export
from tidar.models import Decoder, TensorShard, from_pretrained, initialize, size_config
from tidar.models.huggingface import decoder_config, load_weights, open_weights
from tidar.training.checkpoint.manifest import describe, file_names, write_manifest
from tidar.training.trainer import Trainer


@pytest.mark.parametrize("kind", ["folder", "step"])
def test_two_processes_load_half_each(kind, tmp_path):
    """Peak of anonymous memory, per process, above what it had before: under 60 % of the model's float32 bytes."""
    shape = dict(vocab_size=20000, hidden_size=768, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4)
    log = tmp_path / "log"
    model = make_model("qwen2", intermediate_size=3072, **shape).to(torch.bfloat16)
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    if kind == "step":  # saved by one process, so that each tensor lies there in one piece
        saved = {f"model.{name}": parameter for name, parameter in from_pretrained(tmp_path).named_parameters()}
        dcp.save(saved, checkpoint_id=tmp_path / "step-1", no_dist=True)
        (tmp_path / "step-1" / "huggingface").mkdir()
        shutil.copy(tmp_path / "config.json", tmp_path / "step-1" / "huggingface")
        tmp_path = tmp_path / "step-1"
    _, output = forks.call(forks.torchrun, 2, load_memory.main, str(tmp_path), log=log)
    print(output)
    found = re.findall(r"peak (\S+) of (\d+) sum (\S+)", output)
    assert len(found) == 2
    for peak, size, found_total in found:
        assert int(size) > 200e6
        assert 0.45 < float(peak) < 0.6
        assert float(found_total) == pytest.approx(total, rel=1e-6)


def test_an_export_holds_few_rows(tmp_path):
    """Peak of anonymous memory of the command above its start, for an embedding of 246 MB in float32."""
    config = decoder_config(size_config("debug") | {"vocab_size": 320_000})
    step = tmp_path / "step-1"
    model = Decoder(config)
    initialize(model, seed=0)
    saved = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    dcp.save(saved, checkpoint_id=step, no_dist=True)
    (step / "huggingface").mkdir()
    (step / "huggingface" / "config.json").write_text(json.dumps(size_config("debug") | {"vocab_size": 320_000}))
    write_manifest(step, describe(step, file_names(step)), {"step": 1})
    code, output = forks.call(export_memory.main, step, tmp_path / "out", log=tmp_path / "log")
    assert code == 0
    print(output)
    assert int(re.search(r"peak (\d+)", output)[1]) < 60e6
    expected = published_tensors(model.state_dict(), config.n_heads, config.n_kv_heads)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(tensor.equal(expected[name].bfloat16()) for name, tensor in exported.items())


@pytest.mark.parametrize("n_ranks, n_parts", [(2, 1), (3, 2), (7, 1)])
def test_a_rank_reads_the_rows_that_it_keeps(n_ranks, n_parts, tmp_path, monkeypatch):
    """Shards that begin anywhere in heads, gate and up: of a folder, of a step's folder, and of first values.

    n_parts: of tensor parallelism; each rank also reads no more columns than it keeps.
    """
    make_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    whole = from_pretrained(tmp_path)
    saved = {f"model.{name}": parameter for name, parameter in whole.named_parameters()}
    dcp.save(saved, checkpoint_id=tmp_path / "step-1", no_dist=True)
    drawn = Decoder(whole.config)
    initialize(drawn, seed=0)
    monkeypatch.setattr("tidar.models.huggingface.layout.PIECE_BYTES", 1000)
    sources = {"folder": open_weights(tmp_path), "step": open_weights(tmp_path / "step-1"), "first values": None}
    for (source, weights), part in product(sources.items(), range(n_parts)):
        shard = TensorShard(part, n_parts)
        model, read = Decoder(whole.config, shard=shard), []
        if weights:
            monkeypatch.setattr(weights, "rows", partial(counted_rows, type(weights).rows, weights, read))
        for rank in range(n_ranks):
            monkeypatch.setattr("tidar.models.shards.local_rows", partial(rows_of_rank, rank, n_ranks))
            if weights is None:
                initialize(model, seed=0)
            else:
                load_weights(model, weights)
        for name, one in model.named_parameters():
            expected = (whole if weights else drawn).get_parameter(name)
            for block in shard.blocks(name, one.shape):
                rows, own = expected[block.row : block.row + block.length], one[block.at : block.at + block.length]
                assert own.equal(rows[..., block.column : block.column + one.shape[1]] if rows.ndim > 1 else rows)
        if weights:
            assert sum(read) == sum(parameter.numel() for parameter in model.parameters()), source


def counted_rows(rows, weights, read: list[int], *arguments):
    values = rows(weights, *arguments)
    read.append(values.numel())
    return values


def rows_of_rank(rank: int, n_ranks: int, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As `local_rows` of a parameter that FSDP2 shards."""
    size = -(-len(parameter) // n_ranks)
    return parameter.detach()[rank * size : (rank + 1) * size], min(rank * size, len(parameter))


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    """In each way in, in one line that names it and both versions."""
    run = tmp_path / "run"
    run_of_no_steps(run)
    step = run / "checkpoint" / "step-0"
    metadata = pickle.loads((step / ".metadata").read_bytes())
    tensors = metadata.state_dict_metadata
    for name in [name for name in tensors if "qkv_proj" in name]:
        tensors[name.replace("qkv_proj", "q_proj")] = tensors.pop(name)
    metadata.storage_data = {
        replace(index, fqn=index.fqn.replace("qkv_proj", "q_proj")): info
        for index, info in metadata.storage_data.items()
    }
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(step, describe(step, file_names(step)), {"step": 0})
    for act in (
        lambda: run_of_no_steps(run),
        lambda: run_of_no_steps(tmp_path / "new", "--checkpoint.initial_load_path", str(step)),
        lambda: export(step, tmp_path / "out", torch.bfloat16),
        lambda: from_pretrained(step),
    ):
        with pytest.raises(UserError, match=f"{step}: was saved by tidar 0.1, .* tidar {__version__} reads") as error:
            act()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


class Getter:
    """Asks for getattr, which metadata written by some versions of Python does too, for the member of an enum."""

    def __reduce__(self):
        return getattr, (str, "upper")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damage_nothing(folder: Path) -> None:
    pass


def damage_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_file(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])


def damage_header(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_text("version https://git-lfs.github.com/spec/v1")


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def damage_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def change_tensors(change):
    def damage(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            held = load_file(file)
            if "model.norm.weight" in held:
                change(held)
                save_file(held, file)

    return damage


def other_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")


DAMAGED = {
    "no config.json": (damage_config, "holds no config.json: must be a Hugging Face model"),
    "a truncated file": (damage_file, "-00002-of-"),
    "a pointer in place of a file": (damage_header, "is not a whole safetensors file"),
    "a missing shard": (remove_shard, "is missing; model.safetensors.index.json names it"),
    "a damaged index": (damage_index, "is not an index of safetensors files"),
    "a missing tensor": (change_tensors(lambda held: held.pop("model.norm.weight")), "misses model.norm.weight"),
    "an extra tensor": (
        change_tensors(lambda held: held.update(more=torch.ones(3))),
        "has the tensor more, which the model",
    ),
    "a wrong shape": (
        change_tensors(lambda held: held.update({"model.norm.weight": torch.ones(47)})),
        "model.norm.weight has shape [47]: must be [48]",
    ),
    "integers": (
        change_tensors(lambda held: held.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)})),
        "model.norm.weight is I32: must be bfloat16, float16, float32 or float64, not quantised",
    ),
    "weights in another form": (other_weights, "must be model.safetensors or pytorch_model.bin"),
}


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    make_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="40KB")
    from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        from_pretrained(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_bad_state_dict_is_refused(tmp_path):
    with torch.device("meta"):
        model = Decoder(decoder_config(size_config("debug") | {"vocab_size": 258}))
    path, trap = tmp_path / "pytorch_model.bin", tmp_path / "trap"
    contents = {
        "a list": lambda: torch.save([torch.ones(3)], path),
        "numbers": lambda: torch.save({"a": 3}, path),
        "malicious": lambda: torch.save({"a": Malicious(trap)}, path),
        "malicious pickle": lambda: path.write_bytes(pickle.dumps(Malicious(trap))),
        "text": lambda: path.write_text("no weights"),
        "empty": lambda: path.write_text(""),
    }
    for write in contents.values():
        write()
        with pytest.raises(UserError) as error:
            open_weights(path)
        assert str(path) in str(error.value) and "state dict" in str(error.value) and "\n" not in str(error.value)
    assert not trap.exists()
    torch.save({"model.norm.weight": torch.ones(192)}, path)
    with pytest.raises(UserError, match="misses the tensor model.embed_tokens.weight and 4[0-9] more"):
        load_weights(model, open_weights(path))
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "nothing")
    with pytest.raises(UserError, match="must be a Hugging Face folder"):
        (tmp_path / "folder").mkdir()
        open_weights(tmp_path / "folder")


def test_tied_weights_that_differ_are_refused(tmp_path):
    model = make_model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    from_pretrained(tmp_path)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["lm_head.weight"][299, 47] += 1
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs"):
        from_pretrained(tmp_path)


def test_one_whole_file_comes_before_an_index(tmp_path):
    """As transformers reads them; an index that says a tensor lies elsewhere than it does is refused."""
    model = make_model("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    other = make_model("qwen2", seed=1, tie_word_embeddings=False)
    save_file(
        {name: tensor.detach().clone() for name, tensor in other.named_parameters()}, tmp_path / "model.safetensors"
    )
    assert from_pretrained(tmp_path).norm.weight.equal(other.model.norm.weight)
    (tmp_path / "model.safetensors").unlink()
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="misses model.norm.weight, which model.safetensors.index.json says it holds"):
        from_pretrained(tmp_path)


def run_of_no_steps(folder: Path, *options: str) -> Trainer:
    arguments = [
        "--data.source",
        "uneven",
        "--training.seq_len",
        "32",
        "--training.steps",
        "0",
        "--data.num_workers",
        "0",
    ]
    return train_run([*arguments, "--job.dump_folder", str(folder), *options])


def test_metadata_of_a_checkpoint_runs_no_code(tmp_path):
    """Where a run goes on, starts from its weights or is exported; beside a folder's safetensors it is not read."""
    run, trap = tmp_path / "run", tmp_path / "trap"
    run_of_no_steps(run)
    step = run / "checkpoint" / "step-0"
    for content in (
        pickle.dumps(Malicious(trap)),
        pickle.dumps(Getter()),
        b"",
        b"nothing",
        (step / ".metadata").read_bytes()[:-30],
    ):
        (step / ".metadata").write_bytes(content)
        write_manifest(step, describe(step, file_names(step)), {"step": 0})  # as a stranger would
        for act in (
            lambda: run_of_no_steps(run),
            lambda: run_of_no_steps(tmp_path / "new", "--checkpoint.initial_load_path", str(step)),
            lambda: export(step, tmp_path / "out", torch.bfloat16),
        ):
            with pytest.raises(UserError, match="is not the metadata of a checkpoint") as error:
                act()
            assert len(str(error.value).splitlines()) <= 2
    make_model("qwen3").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(Malicious(trap)))
    from_pretrained(tmp_path / "folder")
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_tensors_of_a_checkpoint_run_no_code(tmp_path):
    """A tensor's bytes are another pickle, or it is an item of bytes, which DCP would unpickle freely."""
    run, trap = tmp_path / "run", tmp_path / "trap"
    run_of_no_steps(run)
    step = run / "checkpoint" / "step-0"
    honest, data = (step / ".metadata").read_bytes(), step / "__0_0.distcp"
    name = "model.norm.weight"
    for saved in (
        lambda file: torch.save({"a": Malicious(trap)}, file),
        lambda file: pickle.dump(Malicious(trap), file),
    ):
        for as_bytes in (False, True):
            metadata = pickle.loads(honest)
            (index,) = (index for index in metadata.storage_data if index.fqn == name)
            with data.open("ab") as file:
                start = file.tell()
                saved(file)
                end = file.tell()
            metadata.storage_data[index] = _StorageInfo("__0_0.distcp", start, end - start)
            if as_bytes:
                metadata.state_dict_metadata[name] = BytesStorageMetadata()
            (step / ".metadata").write_bytes(pickle.dumps(metadata))
            write_manifest(step, describe(step, file_names(step)), {"step": 0})
            for act in (
                lambda: run_of_no_steps(run),
                lambda: run_of_no_steps(tmp_path / "new", "--checkpoint.initial_load_path", str(step)),
                lambda: export(step, tmp_path / "out", torch.bfloat16),
            ):
                with pytest.raises(UserError, match="cannot be restored|is not the metadata|cannot be read from it"):
                    act()
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    run_of_no_steps(tmp_path / "run")
    step = tmp_path / "run" / "checkpoint" / "step-0"
    data = min(step.glob("*.distcp"))
    whole = data.read_bytes()
    manifest = (step / "manifest.json").read_text()
    for content in (None, whole[:2000], bytes(len(whole))):
        (step / "manifest.json").write_text(manifest)
        data.unlink() if content is None else data.write_bytes(content)
        with pytest.raises(UserError, match="is not whole"):
            export(step, tmp_path / "out", torch.bfloat16)
        write_manifest(step, describe(step, file_names(step)), {"step": 0})
        words = "is not in manifest.json" if content is None else "cannot be read from it"
        with pytest.raises(UserError, match=words):
            export(step, tmp_path / "out", torch.bfloat16)
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match="must be a checkpoint of a run"):
        export(tmp_path / "run" / "checkpoint", tmp_path / "out", torch.bfloat16)
