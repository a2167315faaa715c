"""Manifests and metadata of any shape: what is not whole is said to be, and nothing outside of the folder is read."""

import copy
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from tidar.models.huggingface.manifest import NAME, content_checksum, find_problem, read_manifest
from tidar.training.checkpoint.manifest import describe, file_names, write_manifest

ABOUT = {"step": 3, "samples": 4, "tokens": 60, "seconds": 1.5, "val_loss": None, "compared": {}, "options": {"a": {}}}


@pytest.fixture
def step(tmp_path) -> Path:
    folder = tmp_path / "step-3"
    tensors = {"model.a": torch.arange(12.0).view(4, 3), "model.b": torch.ones(5)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text("{}")
    seal(folder)
    assert find_problem(folder) is None
    return folder


def seal(folder: Path) -> None:
    """Writes a manifest that agrees with the files, as a stranger can."""
    (folder / NAME).unlink(missing_ok=True)
    write_manifest(folder, describe(folder, file_names(folder)), ABOUT)


def odd_value(depth: int = 0):
    """A JSON value of any kind; Python's json writes and reads infinities, nan and lone surrogates too."""
    simple = [None, True, False, 0, -1, 1, 2**63, 10**40, -0.0, 1e308, float("inf"), float("nan"), "", "a", "\ud800"]
    simple += ["../victim", "/dev/zero", "a\0b", "a//b", ".", "..", "x" * 300, "a" * 64, [], {}]
    if depth > 2 or random.random() < 0.7:
        return random.choice(simple)
    values = [odd_value(depth + 1) for _ in range(random.randrange(4))]
    return values if random.random() < 0.5 else {str(value)[:9]: value for value in values}


def mutate(node):
    """Replaces, removes or adds one item anywhere below a list or a dict."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    inner = [key for key in keys if isinstance(node[key], (dict, list)) and node[key]]
    if inner and random.random() < 0.7:
        mutate(node[random.choice(inner)])
    elif not keys or random.random() < 0.2:
        node.update({random.choice(["a", "../victim", "", ".metadata "]): odd_value()}) if isinstance(
            node, dict
        ) else node.append(odd_value())
    elif random.random() < 0.2:
        del node[random.choice(keys)]
    else:
        node[random.choice(keys)] = odd_value()


def test_mutated_manifests(step):
    honest = json.loads((step / NAME).read_text())
    random.seed(5)
    accepted = 0
    for number in range(600):
        content = copy.deepcopy(honest)
        for _ in range(random.choice((1, 1, 2, 4))):
            mutate(content)
        if number % 2:  # the checksum is no secret
            content.pop("checksum", None)
            content["checksum"] = content_checksum(content)
        (step / NAME).write_text(json.dumps(content))
        problem = find_problem(step)
        if problem is None:
            accepted += 1
            about = read_manifest(step)["about"]
            assert content["files"].items() <= honest["files"].items()
            assert type(about.get("samples", 0)) is int and type(about.get("val_loss")) in (float, type(None))
        else:
            assert isinstance(problem, str) and problem
    assert accepted < 250


@pytest.mark.parametrize("root", [None, True, 3, "x", [], [[]], {}, {"files": [], "about": {}}])
def test_other_roots(step, root):
    (step / NAME).write_text(json.dumps(root))
    assert NAME in find_problem(step)


def test_bytes_that_are_no_manifest(step):
    honest = (step / NAME).read_bytes()
    cases = [b"", b"\xff\xfe", b"[" * 200_000, b'{"files":' * 100_000, honest[:-1], b"9" * 5000, honest * 2]
    deep = {"about": ABOUT | {"options": {"a": json.loads("[" * 900 + "]" * 900)}}, "files": {}}
    for content in [*cases, json.dumps(deep).encode()]:
        (step / NAME).write_bytes(content)
        assert find_problem(step).startswith(NAME)
    (step / NAME).unlink()
    assert find_problem(step) == f"it has no {NAME}"
    (step / NAME).mkdir()
    assert find_problem(step).startswith(NAME)


@pytest.mark.parametrize("name", [NAME, ".metadata", "__0_0.distcp", "huggingface/config.json", "huggingface", "new"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
def test_links_and_special_files(step, tmp_path, name, kind):
    """Refused without waiting for them, even where a link leads to the very content."""
    path, moved = step / name, tmp_path / "moved"
    if path.exists():
        path.rename(moved)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(moved if kind == "link" else "/dev/zero")
    assert find_problem(step) is not None


def test_files_outside_are_not_read(step, tmp_path):
    (tmp_path / "victim").write_text("x")
    for name in ("../victim", str(tmp_path / "victim"), "huggingface/../../victim"):
        files = describe(step, file_names(step)) | {name: describe(tmp_path, ["victim"])["victim"]}
        (step / NAME).unlink()
        write_manifest(step, files, ABOUT)
        assert "is no name of its files" in find_problem(step)


def metadata_changes():
    def storage(**changes):
        def change(metadata):
            index = next(index for index in metadata.storage_data if index.fqn == "model.a")
            metadata.storage_data[index] = _StorageInfo(
                **{"relative_path": "__0_0.distcp", "offset": 0, "length": 9} | changes
            )

        return change

    def tensor(act):
        return lambda metadata: act(metadata.state_dict_metadata["model.a"])

    yield from (
        storage(relative_path=path) for path in ("../step-3/__0_0.distcp", "/dev/zero", "..", "", 3, None, "a/b")
    )
    yield from (
        storage(**{name: value}) for name in ("offset", "length") for value in (-1, 2**63, 1.0, True, None, "1")
    )
    yield storage(transform_descriptors=["x"])
    yield storage(relative_path="unlisted")
    yield tensor(lambda saved: setattr(saved, "size", torch.Size([3, 3])))
    yield tensor(lambda saved: setattr(saved, "size", (4, 3)))
    yield tensor(lambda saved: setattr(saved, "size", torch.Size([4])))
    yield tensor(lambda saved: setattr(saved, "chunks", None))
    yield tensor(lambda saved: setattr(saved.chunks[0], "offsets", torch.Size([1, 0])))
    yield tensor(lambda saved: setattr(saved.chunks[0], "sizes", torch.Size([4, -3])))
    yield tensor(lambda saved: setattr(saved.chunks[0], "sizes", "43"))
    yield tensor(lambda saved: setattr(saved.properties, "dtype", "float32"))
    yield lambda metadata: setattr(metadata, "storage_data", None)
    yield lambda metadata: setattr(metadata, "state_dict_metadata", [])
    yield lambda metadata: metadata.storage_data.update({3: 4})
    yield lambda metadata: metadata.storage_data.pop(MetadataIndex("model.a", torch.Size([0, 0])))


def test_mutated_metadata(step):
    """Sealed again with a right manifest: paths, offsets, lengths, types and shapes that no file has."""
    honest = (step / ".metadata").read_bytes()
    for number, change in enumerate(metadata_changes()):
        metadata = pickle.loads(honest)
        change(metadata)
        (step / ".metadata").write_bytes(pickle.dumps(metadata))
        seal(step)
        assert find_problem(step) is not None, number
    random.seed(6)
    for _ in range(200):
        content = bytearray(honest)
        for _ in range(random.choice((1, 2, 5))):
            content[random.randrange(len(content))] = random.randrange(256)
        (step / ".metadata").write_bytes(content[: random.choice((None, -1, len(content) // 2))])
        seal(step)
        assert isinstance(find_problem(step), str | None)
