"""Ids of the hub on several ranks: who downloads, and what the others read."""

import contextlib
import json
import os
from pathlib import Path

import forks
import huggingface_hub
import pytest
import torch.distributed as dist
from hub import Hub, connect, serving
from small_models import make_model, write_tokenizer

from tidar.config import load_config
from tidar.distributed import join_world, leave_world
from tidar.training.inputs import read_inputs

ID, OTHER = "org/small", "b" * 40


def read_as_rank(addresses: list[str], caches: list[Path], options: list[str]) -> None:
    """Prints what a rank reads of the model, from a hub and a cache of its own."""
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(caches[rank]))
        connect(patch, addresses[rank])
        world = join_world(load_config(options))
        spec = read_inputs(load_config(options), world, dist.new_group(backend="gloo")).spec
        # in one piece: print writes the end of a line by itself where output is not buffered, and lines would mix
        os.write(1, f"{json.dumps([rank, spec.decoder.hidden_dim])}\n".encode())
    leave_world()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[dict[str, bytes]]:
    """The files of two commits."""
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for folder, size in zip(folders, (64, 96)):
        make_model("qwen3", intermediate_size=size).save_pretrained(folder)
        write_tokenizer(folder)
    return [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]


def test_all_ranks_read_the_commit_that_rank_0_finds(tmp_path, models):
    """Rank 1 has the cache of rank 0 and asks nothing. That of rank 2 holds another commit of main, as does its hub."""
    (tmp_path / "a.jsonl").write_text('{"text": "the cat in the hat"}\n' * 50)
    options = f"--model.hf_path {ID} --data.source text --data.paths {tmp_path / 'a.jsonl'} --validation.enable false"
    options += f" --training.seq_len 16 --job.dump_folder {tmp_path / 'run'}"
    caches = [tmp_path / "cache", tmp_path / "cache", tmp_path / "other"]
    hubs = [Hub(), Hub(), Hub()]
    for hub in hubs:
        hub.add(ID, models[0])
    hubs[2].refs[ID]["main"] = OTHER
    folder = caches[2] / "models--org--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(OTHER)
    (folder / "snapshots" / OTHER).mkdir(parents=True)
    for name, content in models[1].items():
        (folder / "snapshots" / OTHER / name).write_bytes(content)
    with contextlib.ExitStack() as servers:
        addresses = [servers.enter_context(serving(hub)) for hub in hubs]
        arguments = addresses, caches, options.split()
        code, output = forks.call(forks.torchrun, 3, read_as_rank, *arguments, log=tmp_path / "log")
    assert code == 0, output
    read = sorted(json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert read == [[0, 64], [1, 64], [2, 64]]
    assert [bool(hub.requests) for hub in hubs] == [True, False, True]
