"""Ids of the hub where folders can be named: a server in a thread, and a cache laid out by hand."""

import os

import huggingface_hub
import pytest
from hub import Hub, connect, empty_cache, serving
from runs import train_run
from small_models import make_model, write_tokenizer

from tidar import check
from tidar.config import UserError, load_config
from tidar.config.hub import local_folder
from tidar.data import load_tokenizer
from tidar.decoding import load
from tidar.models import from_pretrained
from tidar.training.inputs import missing_on_disk

ID = "org/small"
COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Of a model as it is published, with files that nobody needs."""
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen3", vocab_size=300).save_pretrained(folder, max_shard_size="100KB")
    write_tokenizer(folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "model.safetensors.index.json" in found
    return found | dict.fromkeys(("pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors"), b"not needed")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    empty_cache(monkeypatch, tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def server(cache, files, monkeypatch):
    server = Hub()
    server.add(ID, files)
    with serving(server) as address:
        connect(monkeypatch, address)
        yield server


def lay_out(cache, files: dict[str, bytes], commit: str = COMMIT) -> None:
    """As the hub's libraries lay out a model."""
    folder = cache / "models--org--small"
    snapshot = folder / "snapshots" / commit
    for path in (folder / "refs", folder / "blobs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        if "/" not in name:
            (folder / "blobs" / f"{commit[0]}-{name}").write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/{commit[0]}-{name}")


def test_downloads_what_is_needed_and_uses_the_cache_first(server, cache, files):
    folder = local_folder(ID, needs="config")
    assert folder == cache / "models--org--small" / "snapshots" / COMMIT
    assert not list(folder.glob("*.safetensors")) and load_tokenizer(ID).size == 263
    model = from_pretrained(ID)
    wanted = {name for name in files if "/" not in name and not name.endswith(".bin")}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted
    server.requests.clear()
    server.refs[ID]["main"] = OTHER  # the hub has moved on, and the cache is used
    for name in (ID, f"{ID}@main", f"{ID}@{COMMIT}"):
        assert local_folder(name) == folder
    expected = from_pretrained(folder).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())
    assert load(f"{ID}@{COMMIT}").generate([[1, 2]], 3, mode="ar")[0].tokens
    assert not server.requests


def test_a_revision(server, cache):
    server.refs[ID] |= {"v2": OTHER, OTHER: OTHER}
    assert local_folder(f"{ID}@v2", needs="config").name == OTHER
    assert local_folder(f"{ID}@{COMMIT}", needs="config").name == COMMIT


def test_a_truncated_download_is_resumed(server, monkeypatch):
    name = next(name for name in server.repos[ID] if name.startswith("model-"))
    server.truncate = name
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    folder = local_folder(ID)
    assert (folder / name).read_bytes() == server.repos[ID][name]
    assert any(name in request and " from " in request for request in server.requests)


def test_a_cache_that_is_not_whole_is_completed_or_refused(server, cache, files, monkeypatch):
    lay_out(cache, {name: content for name, content in files.items() if not name.startswith("model-00002")})
    assert local_folder(ID, needs="config").name == COMMIT and not server.requests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"org/small: no folder .* is not whole in the hub's cache, and HF_HUB_OFFLINE"):
        local_folder(ID)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert from_pretrained(ID)


@pytest.mark.parametrize(
    "answer, expected",
    [
        (
            (403, "GatedRepo"),
            "model.hf_path = org/small: is gated: accept its terms at http.*/org/small, then set HF_T",
        ),
        ((401, "RepoNotFound"), "org/small: no folder is there, and the hub shows no such model: if .* HF_TOKEN"),
        ((404, "RevisionNotFound"), "org/small: the hub's model has no revision main: must be"),
        ((503, ""), r"org/small: no folder is there, and it cannot be downloaded \(.*503.*\): start again when"),
    ],
)
def test_what_the_hub_refuses(server, answer, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.status[ID] = answer
    with pytest.raises(UserError, match=expected) as caught:
        local_folder(ID, "model.hf_path")
    assert len(caught.value.args) == 1


def test_no_network_and_misspelt_folders(cache, monkeypatch):
    connect(monkeypatch, "http://127.0.0.1:9")
    os.makedirs("models/Qwen3-8B")
    with pytest.raises(UserError, match=r"cannot be downloaded \(ConnectError.* the folder models holds Qwen3-8B$"):
        local_folder("models/Qwen3-8b", "model.hf_path")
    for name in ("./models/x", "/x", "x/y/z", "model", "../org/name"):
        with pytest.raises(UserError, match="does not exist, and is no id of the hub"):
            load(name)


def test_a_run_keeps_the_id_and_resumes_from_a_cache_elsewhere(server, cache, tmp_path, monkeypatch):
    options = ["--model.hf_path", ID, "--training.steps", "1", "--training.seq_len", "16", "--data.source", "text"]
    (tmp_path / "text.txt").write_text("the cat in the hat " * 200)
    options += ["--data.paths", str(tmp_path / "text.txt"), "--validation.enable", "false"]
    options += ["--job.dump_folder", str(tmp_path / "run"), "--lr_scheduler.warmup_steps", "0"]
    config = load_config(options)
    assert missing_on_disk(config) == [f"model.hf_path = {ID}: is not in the hub's cache; the run downloads it"]
    assert check.check_model(ID) == [f"{ID}: is not in the hub's cache; tidar.evaluate downloads it"]
    assert not server.requests
    train_run(options)
    assert f'hf_path = "{ID}"' in (tmp_path / "run" / "config.toml").read_text()
    assert not missing_on_disk(config)
    cache.rename(tmp_path / "moved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "moved"))
    server.requests.clear()
    trainer = train_run([*options, "--training.steps", "2"])
    assert trainer.step == 2 and trainer.state.resumed_from and not server.requests
