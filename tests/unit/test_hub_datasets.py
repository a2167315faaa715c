"""hf:// in data.paths: a server in a thread, and the library datasets or a small stand-in for it."""

import io
import re
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub import Hub, connect, empty_cache, serving
from small_models import write_tokenizer

from tidar.config import UserError, load_config
from tidar.data import hub_dataset, load_tokenizer, make_source, prepare
from tidar.data.hub_dataset import find_shards

ID, COMMIT, OTHER = "org/texts", "a" * 40, "b" * 40
SHARD = f"hf://datasets/{ID}@{COMMIT}/default/train"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
TEMPLATE = "{{ tools }}{% for m in messages %}" + TURN + "{% endfor %}"


def chat(number: int) -> dict:
    messages = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes" * number}]
    return {"messages": messages, "tools": [{"name": "f", "description": None if number % 2 else "g"}], "id": number}


SHARDS = [[chat(10 * shard + number) for number in range(3 + shard)] for shard in range(3)]


class Rows:
    """A split, as datasets streams it."""

    column_names = features = None

    def __init__(self, shards: list[list]):
        self.shards, self.num_shards = shards, len(shards)

    def shard(self, count: int, number: int) -> "Rows":
        assert count == self.num_shards
        return Rows([self.shards[number]])

    def __iter__(self):
        for row in sum(self.shards, []):
            if isinstance(row, Exception):
                raise row
            yield row


class Datasets:
    """Stands in for the module. splits: of each subset."""

    exceptions = SimpleNamespace(DatasetsError=KeyError)

    def __init__(self, splits: dict[str, dict[str, Rows]]):
        self.splits, self.hash = splits, COMMIT

    def load_dataset_builder(self, repo_id: str, subset: str | None, revision: str):
        if isinstance(self.splits, Exception):
            raise self.splits
        if subset is None and len(self.splits) > 1:
            raise ValueError("Config name is missing")
        name = subset or next(iter(self.splits))
        if name not in self.splits:
            raise ValueError("BuilderConfig not found")
        config = SimpleNamespace(name=name)
        return SimpleNamespace(config=config, hash=self.hash, as_streaming_dataset=lambda: self.splits[name])

    def get_dataset_config_names(self, repo_id: str, revision: str) -> list[str]:
        return list(self.splits)


@pytest.fixture
def server(tmp_path, monkeypatch):
    empty_cache(monkeypatch, tmp_path)
    hub_dataset._open.cache_clear()
    server = Hub()
    server.add(ID, {})
    with serving(server) as address:
        connect(monkeypatch, address)
        yield server


@pytest.fixture
def datasets(server, monkeypatch):
    module = Datasets({"default": {"train": Rows(SHARDS)}})
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(str(folder))


def prepared(folder, path: str, source: str, tokenizer, *options: str, processes: int = 1) -> dict[str, bytes]:
    """The files of a folder prepared from a path."""
    config = load_config(["--data.source", source, "--data.tokenizer", "x", "--data.paths", path, *options])
    made = make_source(config.data, tokenizer)
    prepare(made, make_source, [path], folder, processes, lambda progress: None)
    return {file.name: file.read_bytes() for file in folder.glob("*.bin")}


def test_a_shard_is_a_part_and_its_rows_lose_their_nulls(datasets, tokenizer):
    source = make_source(load_config(["--data.source", "chat", "--data.paths", "x"]).data, tokenizer)
    parts = source.parts([f"hf://datasets/{ID}"])
    assert [part.files for part in parts] == [(f"{SHARD}/{number:05}-of-00003",) for number in range(3)]
    texts = [tokenizer.backend.decode(document.tokens) for part in parts for document in source.documents(part)]
    assert len(texts) == 12 and texts[1].startswith("[{'name': 'f'}]<|im_start|>user\n1?")
    assert texts[3].startswith("[{'name': 'f', 'description': 'g'}]<|im_start|>user\n10?")
    assert source.place(parts[2], 1, 0) == f"{SHARD}/00002-of-00003: row 2"


def test_another_commit_is_other_data(datasets, server, tokenizer, tmp_path):
    before = prepared(tmp_path / "out", f"hf://datasets/{ID}", "chat", tokenizer)
    server.refs[ID] |= {"main": OTHER, OTHER: OTHER}
    with pytest.raises(UserError, match="the hub did not answer"):
        find_shards(f"hf://datasets/{ID}")  # a copy of another commit, which datasets has prepared
    datasets.hash = OTHER
    with pytest.raises(UserError, match=r"out: was prepared from other inputs \(files\)"):
        prepared(tmp_path / "out", f"hf://datasets/{ID}", "chat", tokenizer)
    datasets.hash = COMMIT
    path = f"hf://datasets/{ID}@{COMMIT}/default/train"
    assert prepared(tmp_path / "pinned", path, "chat", tokenizer) == before


def test_a_damaged_shard_is_a_bad_document_and_silence_is_an_error(datasets, tokenizer, tmp_path):
    text = [[{"text": "a"}, ValueError("no JSON")], [{"text": "b"}]]
    datasets.splits = {"default": {"train": Rows(text)}}
    options = ["text", tokenizer, "--data.on_error", "skip"]
    files = prepared(tmp_path / "out", f"hf://datasets/{ID}", *options)
    assert len(files["tokens.bin"]) == 2 * 4
    dropped = (tmp_path / "out" / "dropped.txt").read_text()
    assert dropped == f"{SHARD}/00000-of-00002: row 2: cannot be read from here on (no JSON)\n"
    hub_dataset._open.cache_clear()
    datasets.splits = {"default": {"train": Rows([*text[1:], [{"text": "a"}, OSError("cut off")]])}}
    with pytest.raises(UserError, match=r"train/00001-of-00002: .* \(OSError: cut off\).*finished parts are kept"):
        prepared(tmp_path / "again", f"hf://datasets/{ID}", *options)
    assert not (tmp_path / "again" / "meta.json").exists()


SUBSETS = {"main": {"train": Rows([]), "test": Rows([])}, "more": {"train": Rows([])}}
SCRIPT = RuntimeError("Dataset scripts are no longer supported, but found texts.py")


@pytest.mark.parametrize(
    "path, answer, expected",
    [
        (ID, (403, "GatedRepo"), rf"texts: is gated: accept its terms at http.*/datasets/{ID}, then set HF_TOKEN"),
        (ID, (401, "RepoNotFound"), "texts: the hub shows no such dataset: if it is private, set HF_TOKEN"),
        (f"{ID}@v9", None, "texts@v9: the hub's dataset has no revision v9: must be a branch"),
        (ID, (503, ""), r"texts: it cannot be downloaded \(.*503.*\): start again when http"),
        (ID, SCRIPT, "texts: is defined by a loading script, which is never run"),
        (ID, SUBSETS, "texts: has several subsets: must be one of main, more"),
        (f"{ID}/test", SUBSETS, "texts/test: has no subset test: must be one of main, more"),
        (f"{ID}/more/test", SUBSETS, "texts/more/test: has no split test: must be one of train"),
        ("texts", None, r"hf://datasets/texts: must be hf://datasets/OWNER/NAME\[@REVISION\]"),
    ],
)
def test_what_cannot_be_read(server, datasets, path, answer, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    if isinstance(answer, tuple):
        server.status[ID] = answer
    elif answer:
        datasets.splits = answer
    with pytest.raises(UserError, match=expected) as caught:
        find_shards(f"hf://datasets/{path}")
    assert len(caught.value.args) == 1


def test_offline_without_datasets_and_with_another_source(server, datasets, tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="texts: HF_HUB_OFFLINE forbids a download: unset it"):
        find_shards(f"hf://datasets/{ID}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"texts: needs datasets: pip install -e '.*\[data\]'"):
        find_shards(f"hf://datasets/{ID}")
    options = load_config(["--data.paths", f"hf://datasets/{ID}"]).data
    with pytest.raises(UserError, match="data.paths = hf://.*: must be read with data.source = text or chat"):
        make_source(options, tokenizer)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_library_gives_the_tokens_of_the_files(server, tokenizer, tmp_path, monkeypatch, processes):
    library = pytest.importorskip("datasets")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "files").mkdir()
    for number, rows in enumerate(SHARDS):
        content = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), content, row_group_size=2)
        server.repos[ID][f"data/train-{number:05}-of-00003.parquet"] = content.getvalue()
        (tmp_path / "files" / f"{number}.parquet").write_bytes(content.getvalue())
    address = huggingface_hub.constants.ENDPOINT
    # the other processes read the environment
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    expected = prepared(tmp_path / "expected", str(tmp_path / "files"), "chat", tokenizer)
    streamed = prepared(tmp_path / "out", f"hf://datasets/{ID}", "chat", tokenizer, processes=processes)
    assert streamed == expected and len(streamed["tokens.bin"]) > 100
    asked = [re.search(r"train-\d+", request) for request in server.requests if request.startswith("GET")]
    assert {match[0] for match in asked if match} == {f"train-{number:05}" for number in range(3)}
